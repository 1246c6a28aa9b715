"""The benchmark beside other programs: the run, its arithmetic and what it says; no assertion on times."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner
from conftest import Pair
from PIL import Image

from edgevl.benchmarks.peers import run, worker
from edgevl.benchmarks.peers.contract import Answer, Measured, Request, Unsupported
from edgevl.benchmarks.peers.results import read_rows
from edgevl.benchmarks.peers.table import Row, ratios, spread, tables
from edgevl.benchmarks.turns import environment, in_turn
from edgevl.benchmarks.workloads import Workload
from edgevl.runtime.errors import InputError

HEAD = {
    "date": "2026-01-01", "processor": "P", "flags": ["f"], "threads": 2, "checkpoint": "c", "repeats": 2,
    "workloads": {"picture": "1 × 448×448"},
}  # fmt: skip


def cli(*arguments: object) -> tuple[int, str]:
    done = CliRunner().invoke(run.main, [str(a) for a in arguments])
    return done.exit_code, done.output


def test_bundle_beside_transformers_goes_on_where_it_stopped(tiny: Pair, tmp_path: Path) -> None:
    arguments = (tiny.checkpoint, tiny.bundle, "--peers", "transformers", "--models", tmp_path / "models")
    arguments += ("--results", tmp_path / "r", "--workload", "thumbnail", "--new-tokens", 4, "--repeats", 2)
    status, output = cli(*arguments, "--threads", 1, "--rounds", 1)
    assert status == 0, output
    first = (tmp_path / "r" / "results.jsonl").read_text()
    found = [Measured(**json.loads(line)["measured"]) for line in first.splitlines()]
    assert [m.contender for m in found] == [f"edgevl {tiny.bundle.name}", "transformers bf16"]
    for m in found:
        assert m.versions and not m.unsupported and m.peak_mb > 0
        assert len(m.ttft_s) == len(m.vision_s) == len(m.prefill_s) == len(m.decode_tokens_per_s) == 2
        assert all(t > v for t, v in zip(m.ttft_s, m.vision_s))  # no token is there before the picture
    assert found[0].prompt_tokens == found[1].prompt_tokens
    assert "ratio to edgevl" in output and "thumbnail*: 1 × 224×224" in output
    assert (tmp_path / "r" / "table.md").read_text().strip() in output
    with Image.open(tmp_path / "r" / "peers.png") as picture:
        assert picture.width > 1000
    status, output = cli(*arguments, "--threads", 1, "--rounds", 2)
    assert status == 0 and "2 rounds of 2 requests" in output
    lines = (tmp_path / "r" / "results.jsonl").read_text()
    assert lines.startswith(first) and len(lines.splitlines()) == 4
    status, output = cli(*arguments, "--threads", 2, "--rounds", 2)
    assert status == 2 and "threads was 1, is 2" in output and "choose another --results" in output


def test_a_line_that_was_cut_off_is_told(tmp_path: Path) -> None:
    whole = json.dumps({"workload": "w", "round": 0, "measured": {"contender": "a"}})
    (tmp_path / "r.jsonl").write_text(f"{whole}\n{whole[:20]}")
    with pytest.raises(InputError, match=r"r.jsonl: line 2 is no result \(cut off\?\); remove it to go on"):
        read_rows(tmp_path / "r.jsonl")
    (tmp_path / "r.jsonl").write_bytes(b"\xff")
    with pytest.raises(InputError, match=r"r.jsonl: cannot be read"):
        read_rows(tmp_path / "r.jsonl")


def test_every_round_begins_with_another() -> None:
    assert [in_turn("abc", n) for n in (0, 1, 2, 3)] == [list("abc"), list("bca"), list("cab"), list("abc")]
    assert in_turn([], 1) == []


def test_every_process_gets_huge_pages_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    assert environment(3).items() >= {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1", "OMP_NUM_THREADS": "3"}.items()
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.hugetlb=0")
    assert environment(3)["GLIBC_TUNABLES"] == "glibc.malloc.hugetlb=0"


class Scripted:
    """A contender whose answers are written down."""

    def __init__(self, *round_trips: list[Answer]) -> None:
        self.versions: Mapping[str, str] = {"scripted": "1"}
        self.asked: list[list[Request]] = []
        self._trips = iter(round_trips)

    def answer(self, requests: Sequence[Request], new_tokens: int) -> list[Answer]:
        self.asked.append(list(requests))
        try:
            return next(self._trips)
        except StopIteration:
            raise Unsupported("one at a time") from None


def test_one_request_is_told_apart_in_stages() -> None:
    slow, fast = Answer(9, (9.0, 9.5, 10.0)), Answer(9, (2.0, 2.5, 3.0), 1.25, 0.5)
    model = Scripted([slow], [fast])
    work = Workload("w", 32, 32, new_tokens=3)
    m = worker.measure("x", model, 0.5, work, "q", 1)
    assert (m.ttft_s, m.vision_s, m.prefill_s, m.prompt_tokens) == ([2.0], [1.25], [0.5], [9])  # the warm-up is not in
    assert m.decode_tokens_per_s == [2.0] and m.total_tokens_per_s == [1.0] and m.open_s == 0.5
    pictures = [r.pictures for asked in model.asked for r in asked]
    assert len({p for each in pictures for p in each}) == 2


def test_several_at_once_are_measured_together() -> None:
    """Four tokens in the two seconds after the last row has its first."""
    trip = [Answer(5, (1.0, 3.0, 4.0), 0.5), Answer(5, (2.0, 3.0, 4.0), 0.5)]
    m = worker.measure("x", Scripted(trip, trip), 0, Workload("w", 32, 32, new_tokens=3, concurrency=2), "q", 1)
    assert m.ttft_s == [1.0, 2.0] and m.vision_s == []
    assert m.decode_tokens_per_s == [2.0] and m.total_tokens_per_s == [1.5]


def test_what_a_contender_cannot_do_is_kept_and_too_few_tokens_are_an_error() -> None:
    m = worker.measure("x", Scripted(), 0, Workload("w", 32, 32, new_tokens=3), "q", 2)
    assert m.unsupported == "one at a time" and m.ttft_s == []
    with pytest.raises(RuntimeError, match="x gave 2 tokens, 3 were asked for"):
        worker.measure("x", Scripted([Answer(1, (1.0, 2.0))]), 0, Workload("w", 32, 32, new_tokens=3), "q", 1)


def row(contender: str, number: int, tokens: int = 100, **measured: list[float]) -> Row:
    return Row("picture", number, Measured(contender, prompt_tokens=[tokens], peak_mb=100.0, **measured))  # type: ignore[arg-type]


def test_ratios_are_taken_round_by_round() -> None:
    """A machine twice as slow in the second round changes no ratio."""
    rows = [row("a", 0, ttft_s=[1.0]), row("a", 1, ttft_s=[2.0]), row("b", 0, ttft_s=[4.0]), row("b", 1, ttft_s=[8.0])]
    assert ratios(rows, "picture", "b", "a", "ttft_s") == [4.0, 4.0]
    assert ratios(rows[:3], "picture", "b", "a", "ttft_s") == [4.0]  # a round that one of them lacks does not count
    nothing = [replace(r, measured=replace(r.measured, vision_s=[0.0])) for r in rows]  # as without a picture
    assert ratios(nothing, "picture", "b", "a", "vision_s") == []
    text = tables(rows, HEAD, ["a", "b"])
    assert "1.50 (1.00–2.00)" in text and "4.00 (4.00–4.00)" in text and "vision" not in text


def test_the_table_says_what_is_not_equal() -> None:
    rows = [row("a", 0, ttft_s=[1.0]), row("b", 0, tokens=90, ttft_s=[1.0])]
    rows.append(Row("picture", 0, Measured("c", unsupported="no pictures")))
    text = tables(rows, HEAD, ["a", "b", "c"])
    assert "- b: its prompts had 90 tokens, ours 100" in text and "- c: no pictures" in text
    assert (
        spread([]) == "" and spread([1.0, 3.0, 2.0]) == "2.00 (1.00–3.00)" and spread([101.4, 140.6]) == "121 (101–141)"
    )


def test_a_process_that_dies_is_a_row_with_its_reason(tmp_path: Path) -> None:
    (entrant,) = run.entrants("none", [tmp_path / "absent"], tmp_path, tmp_path)
    measured = run._measure(entrant, {"threads": 1, "cores": [], "work": {"name": "w"}, "text": "a", "repeats": 1})
    assert measured.unsupported == (
        f"the measurement ended with status 1: {tmp_path / 'absent'}: no such folder; expected a bundle written by "
        "`edgevl export`"
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--peers", "abacus"), "peer 'abacus' is unknown; expected some of transformers"),
        (("--peers", "transformers:fp4"), "transformers has no variant 'fp4'; expected one of bf16"),
        (("--peers", "llama_cpp"), "make the peers' environments with `make peers`"),
        (("--peers", "none", "--engines", "abacus"), "engine 'abacus': expected some of ort-cpu, openvino"),
        (("--workload", "sudoku"), "'sudoku' is not one of"),
    ],
)
def test_bad_input(tiny: Pair, tmp_path: Path, options: tuple[str, ...], message: str) -> None:
    folders = ("--models", tmp_path / "m", "--results", tmp_path / "r", "--environments", tmp_path / "absent")
    status, output = cli(tiny.checkpoint, tiny.bundle, *folders, *options)
    assert status == 2 and message in output and "Traceback" not in output
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_no_bundle(tiny: Pair, tmp_path: Path) -> None:
    status, output = cli(tiny.checkpoint, tmp_path / "absent", "--peers", "none")
    assert status == 2 and "no such folder" in output
