"""The latency benchmark measures what it says, on tiny bundles; no assertion on times."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from conftest import Pair

from edgevl.benchmarks import latency
from edgevl.benchmarks.latency import Result, Workload


def run(*arguments: object) -> tuple[int, str]:
    done = CliRunner().invoke(latency.main, [str(a) for a in arguments])
    return done.exit_code, done.output


def test_bundle_beside_transformers(tiny: Pair, tmp_path: Path) -> None:
    sizes = ("--size", "84x56", "--prompt-tokens", 64, "--new-tokens", 5, "--requests", 2, "--rounds", 2)
    status, output = run(tiny.checkpoint, tiny.bundle, *sizes, "--threads", 1, "--json", tmp_path / "r.jsonl")
    assert status == 0, output
    assert "84×56 picture, 64 prompt tokens, 5 new tokens, 2 rounds of 2 requests" in output
    assert "ratio to transformers bf16" in output and "1 threads" in output
    rows = [json.loads(line) for line in (tmp_path / "r.jsonl").read_text().splitlines()]
    assert [(r["contender"], r["round"]) for r in rows] == [
        *(("transformers bf16", n) for n in (0, 1)),
        *((tiny.bundle.name, n) for n in (0, 1)),
    ]
    for row in rows:
        assert row["machine"]["processor"] and row["versions"]
        measured = row["measured"]
        assert len(measured["ttft_s"]) == len(measured["vision_s"]) == len(measured["decode_tokens_per_s"]) == 2
        assert all(v > 0 for values in measured.values() for v in values)
        # the first token cannot be there before the picture
        assert all(ttft > vision for ttft, vision in zip(measured["ttft_s"], measured["vision_s"]))


def test_prompts_have_the_promised_length(tiny: Pair) -> None:
    with tiny.open() as model:
        for tokens in (40, 41, 77):
            work = Workload(84, 56, prompt_tokens=tokens)
            assert len(model.prepare(latency.messages_for(model, work, work.picture(0))).ids) == tokens


def test_a_prompt_that_cannot_be_so_short(tiny: Pair) -> None:
    status, output = run(tiny.checkpoint, tiny.bundle, "--size", "84x56", "--prompt-tokens", 9, "--no-transformers")
    assert status == 1 and "the prompt cannot have 9 tokens" in output


def test_pictures_differ_and_are_reproduced() -> None:
    work = Workload(32, 16)
    assert work.picture(0).tobytes() != work.picture(1).tobytes()
    assert work.picture(1).tobytes() == Workload(32, 16).picture(1).tobytes()


def test_ratios_are_taken_round_by_round() -> None:
    """A machine twice as slow in the second round changes no ratio."""
    ours = [Result("ours", {}, {"ttft_s": [1.0]}), Result("ours", {}, {"ttft_s": [2.0]})]
    base = [Result("base", {}, {"ttft_s": [4.0]}), Result("base", {}, {"ttft_s": [8.0]})]
    table = latency.summary([base, ours], 0)
    assert "1.50 (1.00–2.00)" in table and "0.25 (0.25–0.25)" in table
    assert "ratio" not in latency.summary([base, ours], None)


@pytest.mark.parametrize(
    ("bundle", "options", "message"),
    [
        ("absent", (), "absent: no such folder"),
        (None, ("--size", "448"), "size '448': expected WIDTHxHEIGHT"),
        (None, ("--size", "axb"), "expected WIDTHxHEIGHT"),
    ],
)
def test_bad_input(tiny: Pair, bundle: str | None, options: tuple[str, ...], message: str) -> None:
    status, output = run(tiny.checkpoint, bundle or tiny.bundle, *options)
    assert status == 2 and message in output and "Traceback" not in output
