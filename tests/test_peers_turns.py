"""The run beside other programs by turns: who answers when, and what becomes of a contender that ends too early."""

from __future__ import annotations

import json
import os
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from conftest import Pair

from edgevl.benchmarks.peers import by_turns, run
from edgevl.benchmarks.peers.by_turns import Turns, turns
from edgevl.benchmarks.peers.entrants import Entrant

TASK: dict[str, Any] = {"threads": 1, "cores": [], "repeats": 1, "work": {}, "text": "a"}
ANSWER = '{"contender": "x", "ttft_s": [0.5], "decode_tokens_per_s": [4.0], "total_tokens_per_s": [2.0]}'


@pytest.fixture(autouse=True)
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(by_turns, "_PAUSE_S", 0)


def contender(folder: Path, name: str, script: str) -> Entrant:
    """A program in the place of Python, which is asked to measure."""
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return Entrant("mnn", name, folder, path)


def pids(folder: Path) -> list[int]:
    return [int(line) for line in (folder / "pids").read_text().split()]


def cli(tiny: Pair, *options: object) -> tuple[int, str]:
    given = ("--peers", "none", "--models", "m", "--results", "r", "--workload", "thumbnail", "--new-tokens", 4)
    arguments = (tiny.checkpoint, "a", "b", *given, "--repeats", 2, "--threads", 1, "--by-turns", *options)
    done = CliRunner().invoke(run.main, [str(a) for a in arguments])
    assert done.exception is None or isinstance(done.exception, SystemExit), repr(done.exception)
    return done.exit_code, done.output


def test_bundles_stay_open_and_another_one_begins_in_every_round(
    tiny: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in "ab":
        Path(name).symlink_to(tiny.bundle)
    status, output = cli(tiny, "--rounds", 3)
    assert status == 0 and "3 turns, all open together, of 2 requests" in output
    rows = [json.loads(line) for line in Path("r/results.jsonl").read_text().splitlines()]
    order = [(r["round"], r["measured"]["contender"].removeprefix("edgevl ")) for r in rows]
    assert order == [(0, "a"), (0, "b"), (1, "b"), (1, "a"), (2, "a"), (2, "b")]
    for name in "ab":
        mine = [r["measured"] for r in rows if r["measured"]["contender"] == f"edgevl {name}"]
        assert len({m["open_s"] for m in mine}) == 1  # opened once
        assert all(len(m["ttft_s"]) == len(m["decode_tokens_per_s"]) == 2 and not m["unsupported"] for m in mine)
    status, _ = cli(tiny, "--rounds", 4)  # goes on where it stopped
    further = [json.loads(line) for line in Path("r/results.jsonl").read_text().splitlines()][6:]
    assert status == 0 and [r["round"] for r in further] == [3, 3]
    arguments = [str(tiny.checkpoint), "a", "b", "--peers", "none", "--models", "m", "--results", "r", "--repeats", "2"]
    mixed = CliRunner().invoke(run.main, [*arguments, "--threads", "1", "--workload", "thumbnail", "--new-tokens", "4"])
    assert mixed.exit_code == 2 and "by_turns was True, is False" in mixed.output


def test_every_turn_is_told_its_number(tmp_path: Path) -> None:
    log = tmp_path / "asked"
    script = f"read task; echo '{ANSWER}'; while read n; do echo NAME$n >> {log}; echo '{ANSWER}'; done"
    listed = [contender(tmp_path, name, script.replace("NAME", name)) for name in "pq"]
    found = list(turns(listed, TASK, [0, 5]))
    assert log.read_text().split() == ["p0", "q0", "q5", "p5"]
    assert [(n, m.contender) for n, m in found] == [(0, "mnn p"), (0, "mnn q"), (5, "mnn q"), (5, "mnn p")]
    assert all(m.decode_tokens_per_s == [4.0] for _, m in found)


@pytest.mark.parametrize(
    ("script", "reason", "before"),
    [
        ("read task; echo boom >&2; exit 3", "the measurement ended with status 3: boom", 0),
        (f"read task; echo '{ANSWER}'; read n; echo '{ANSWER}'; echo late >&2; exit 1", "status 1: late", 1),
        ("""read task; echo '{"contender": "x", "unsupported": "no pictures"}'; read n; exit 9""", "no pictures", 0),
    ],
)
def test_one_that_ends_leaves_the_others_their_turns(tmp_path: Path, script: str, reason: str, before: int) -> None:
    broken = contender(tmp_path, "broken", script)
    sound = contender(tmp_path, "sound", f"while read n; do echo '{ANSWER}'; done")
    found = list(turns([broken, sound], TASK, range(3)))
    of_broken = [m.unsupported for _, m in found if m.contender == "mnn broken"]
    assert of_broken[:before] == [""] * before and len(of_broken) == 3
    assert all(text.endswith(reason) for text in of_broken[before:])
    assert [m.unsupported for _, m in found if m.contender == "mnn sound"] == [""] * 3


def test_one_that_cannot_begin(tmp_path: Path) -> None:
    entrant = contender(tmp_path, "locked", "")
    entrant.python.chmod(0o644)
    with ExitStack() as stop:
        found = Turns(entrant, TASK, stop).answer(0)
    assert found.unsupported == f"the measurement could not begin: {entrant.python}: Permission denied"


def test_no_process_outlives_the_run(tmp_path: Path) -> None:
    script = f"echo $$ >> {tmp_path}/pids; while read n; do echo '{ANSWER}'; done; sleep 60"
    listed = [contender(tmp_path, name, script) for name in "pq"]
    under_way = turns(listed, TASK, range(9))
    next(under_way)
    assert len(pids(tmp_path)) == 2
    under_way.close()  # as Ctrl-C does
    for pid in pids(tmp_path):
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
