"""The run beside other programs: what it refuses before it begins, and what it keeps when something fails."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import matplotlib.figure
import pytest
from click.testing import CliRunner
from conftest import Pair

from edgevl.benchmarks.peers import run, worker
from edgevl.benchmarks.peers.contract import Answer, Measured, Request, Unsupported, ending, run_tool
from edgevl.benchmarks.peers.conversions import fingerprint, is_current
from edgevl.benchmarks.peers.entrants import Entrant
from edgevl.benchmarks.peers.results import append_row
from edgevl.benchmarks.peers.table import Row
from edgevl.benchmarks.workloads import WORKLOADS, Workload
from edgevl.runtime.errors import InputError

FIGURES = {"ttft_s": [1.0, 2.0], "decode_tokens_per_s": [4.0], "total_tokens_per_s": [2.0], "peak_mb": 10.0}


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Who was measured; the figures are made up."""
    names: list[str] = []

    def measure(entrant: Entrant, task: dict[str, Any]) -> Measured:
        names.append(entrant.name)
        return Measured(entrant.name, **FIGURES)  # type: ignore[arg-type]

    monkeypatch.setattr(run, "_measure", measure)
    return names


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the run is started: everything that it writes is seen."""
    (tmp_path / "run").mkdir()
    monkeypatch.chdir(tmp_path / "run")
    return tmp_path / "run"


def cli(*arguments: object) -> tuple[int, str]:
    folders = ("--models", "m", "--results", "r", "--environments", "e", "--rounds", 1, "--workload", "thumbnail")
    checkpoint, bundles, options = arguments[0], *split(arguments[1:])
    done = CliRunner().invoke(run.main, [str(a) for a in (checkpoint, *bundles, *folders, *options)])
    assert done.exception is None or isinstance(done.exception, SystemExit), repr(done.exception)
    return done.exit_code, done.output


def split(arguments: tuple[object, ...]) -> tuple[tuple[object, ...], tuple[object, ...]]:
    first = next((i for i, a in enumerate(arguments) if str(a).startswith("--")), len(arguments))
    return arguments[:first], arguments[first:]


def errors(output: str) -> list[str]:
    return [line for line in output.splitlines() if line.startswith("Error:")]


def peer_python(name: str, script: str) -> Path:
    """In the environment of a peer, a program in the place of Python. Its arguments: -m MODULE PEER VARIANT prepare
    CHECKPOINT FOLDER."""
    path = Path("e", name, "bin", "python")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


# ------------------------------------------------------------------------------------------------ videos


class Never:
    """A contender that must not be asked."""

    versions: Mapping[str, str] = MappingProxyType({})

    def answer(self, requests: Sequence[Request], new_tokens: int) -> list[Answer]:
        raise AssertionError("was asked")


def test_videos_are_not_measured(tiny: Pair, folder: Path, measured: list[str]) -> None:
    videos = {name for name, work in WORKLOADS.items() if work.frames}
    assert len(videos) == 2 and set(run.WITHOUT_VIDEO) == set(WORKLOADS) - videos
    status, output = cli(tiny.checkpoint, tiny.bundle, "--peers", "none", "--workload", "video-8")
    assert status == 2 and "'video-8' is not one of 'picture'" in output and not list(folder.iterdir())

    with pytest.raises(Unsupported, match="workload 'v' has a video of 8 frames; videos are not measured here"):
        worker.measure("x", Never(), 0, Workload("v", pictures=0, frames=8), "q", 1)


# ------------------------------------------------------------------------------------------------ names


@pytest.mark.parametrize(
    ("bundles", "options", "message"),
    [
        (("a/b", "c/b"), (), "a/b and c/b would both be 'edgevl b' in the results; expected bundles whose folders"),
        (("a/b", "a/../c/b"), ("--engines", "ort-cpu"), "rename one, or give a link to it"),
        (("a/b", "a/b"), (), "'edgevl b' is asked for twice; leave one out"),
        (("a/b",), ("--engines", "ort-cpu,ort-cpu"), "'edgevl b' is asked for twice; leave one out"),
        (("a/b",), ("--peers", "transformers,transformers:bf16"), "'transformers bf16' is asked for twice"),
    ],
)
def test_two_of_one_name(
    tiny: Pair,
    folder: Path,
    measured: list[str],
    bundles: tuple[str, ...],
    options: tuple[str, ...],
    message: str,
) -> None:
    for name in ("a", "c"):
        Path(name).mkdir()
        Path(name, "b").symlink_to(tiny.bundle)
    status, output = cli(tiny.checkpoint, *bundles, "--peers", "none", *options)
    assert status == 2 and len(errors(output)) == 1 and message in output, output
    assert not measured and sorted(p.name for p in folder.iterdir()) == ["a", "c"]


def test_bundles_of_other_names_and_a_bundle_given_as_a_dot(
    tiny: Pair, folder: Path, measured: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("a").symlink_to(tiny.bundle)
    Path("b").symlink_to(tiny.bundle)
    assert cli(tiny.checkpoint, "a", "b", "--peers", "none")[0] == 0 and measured == ["edgevl a", "edgevl b"]
    monkeypatch.chdir(shutil.copytree(tiny.bundle, folder / "c"))
    (entrant,) = run.entrants("none", [Path()], folder, folder)
    assert entrant.name == "edgevl c"


# ------------------------------------------------------------------------------------------------ folders


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--results", "file"), "--results file: {}/file is a file, expected a folder; choose another"),
        (("--results", "file/x"), "--results file/x: {}/file is a file, expected a folder; choose another"),
        (("--models", "file/x/y"), "--models file/x/y: {}/file is a file, expected a folder; choose another"),
        (("--results", "n" * 300), "cannot be"),
        (("--results", "dangling"), "--results dangling: cannot be made (File exists); choose another"),
        (("--peers", "foo"), "peer 'foo' is unknown"),
        (("--peers", "mnn"), "e/mnn/bin/python is not there; make the peers' environments"),
    ],
)
def test_no_folder_is_made_for_nothing(
    tiny: Pair, folder: Path, measured: list[str], options: tuple[str, ...], message: str
) -> None:
    Path("file").write_text("mine")
    Path("dangling").symlink_to("nowhere")
    status, output = cli(tiny.checkpoint, tiny.bundle, "--peers", "none", *options)
    assert status == 2 and len(errors(output)) == 1 and message.format(folder) in output, output
    assert not measured and Path("file").read_text() == "mine"
    assert {p.name for p in folder.iterdir()} <= {"file", "dangling", *(["m"] if "dangling" in options else [])}


def test_a_folder_where_nothing_may_be_written(
    tiny: Pair, folder: Path, measured: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != folder)  # root may write anywhere
    status, output = cli(tiny.checkpoint, tiny.bundle, "--peers", "none")
    assert status == 2 and f"--models m: nothing may be written in {folder}; change its mode" in output
    assert not list(folder.iterdir())


@pytest.mark.parametrize("name", ["run.json", "results.jsonl", "table.md", "peers.png"])
def test_an_output_that_is_a_folder(tiny: Pair, folder: Path, measured: list[str], name: str) -> None:
    Path("r", name).mkdir(parents=True)
    status, output = cli(tiny.checkpoint, tiny.bundle, "--peers", "none")
    assert status == 2 and len(errors(output)) == 1 and f"r/{name}: " in output and not measured
    assert [p.name for p in Path("r").iterdir()] == [name]


def test_a_folder_that_is_no_checkpoint(tiny: Pair, folder: Path, measured: list[str]) -> None:
    Path("empty").mkdir()
    status, output = cli("empty", tiny.bundle, "--peers", "none")
    assert status == 2 and len(errors(output)) == 1 and "expected the folder of a checkpoint" in output
    assert not measured and [p.name for p in folder.iterdir()] == ["empty"]


def test_without_matplotlib_nothing_is_measured(
    tiny: Pair, folder: Path, measured: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    status, output = cli(tiny.checkpoint, tiny.bundle, "--peers", "none")
    assert status == 2 and "pip install 'edgevl[bench]'" in output and not measured and not list(folder.iterdir())


# ------------------------------------------------------------------------------------------------ earlier results


@pytest.fixture
def before(tiny: Pair, folder: Path, measured: list[str]) -> dict[str, Any]:
    """A run that has ended; what run.json says."""
    assert cli(tiny.checkpoint, tiny.bundle, "--peers", "none")[0] == 0
    assert len(measured) == 1
    measured.clear()
    return json.loads(Path("r/run.json").read_text())


def test_a_run_says_what_it_was_measured_on(tiny: Pair, before: dict[str, Any]) -> None:
    assert before["fingerprint"] == fingerprint(tiny.checkpoint) and before["checkpoint"] == tiny.checkpoint.name
    assert list(before["workloads"]) == ["thumbnail"] and list(before["bundles"]) == [tiny.bundle.name]


@pytest.mark.parametrize("text", ['{"processor": "P", "work', "", "[]", "{}", '{"workloads": []}', b"\xff"])
def test_a_run_json_that_was_cut_off(
    tiny: Pair, before: dict[str, Any], measured: list[str], text: str | bytes
) -> None:
    data = text if isinstance(text, bytes) else text.encode()
    Path("r/run.json").write_bytes(data)
    status, output = cli(tiny.checkpoint, tiny.bundle, "--peers", "none", "--rounds", 2)
    assert status == 2 and len(errors(output)) == 1 and "choose another --results" in output, output
    assert "cut off?" in output or isinstance(text, bytes)
    assert not measured and Path("r/run.json").read_bytes() == data


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fingerprint": "other"}, "fingerprint was 'other', is '"),
        ({"fingerprint": None}, "fingerprint was None, is '"),
        ({"bundles": {"bundle": "other"}}, "bundle bundle was 'other', is '"),
        ({"workloads": {"thumbnail": "another"}}, "workload thumbnail was 'another', is '1 × 224×224"),
    ],
)
def test_results_of_another_run_are_not_added_to(
    tiny: Pair, before: dict[str, Any], measured: list[str], change: dict[str, Any], message: str
) -> None:
    Path("r/run.json").write_text(json.dumps({**before, **change}))
    status, output = cli(tiny.checkpoint, tiny.bundle, "--peers", "none", "--rounds", 2)
    assert status == 2 and message in output and "choose another --results" in output and not measured


def test_results_of_nobody_knows_what(tiny: Pair, before: dict[str, Any], measured: list[str]) -> None:
    Path("r/run.json").unlink()
    status, output = cli(tiny.checkpoint, tiny.bundle, "--peers", "none", "--rounds", 2)
    assert status == 2 and "r holds results, and no run.json that says of what" in output and not measured
    assert not Path("r/run.json").exists()


def test_a_workload_that_was_not_reached_is_left_out(tiny: Pair, before: dict[str, Any]) -> None:
    Path("r/run.json").write_text(json.dumps({**before, "workloads": {"huge": "h", **before["workloads"]}}))
    status, output = cli(tiny.checkpoint, tiny.bundle, "--peers", "none")
    assert status == 0 and "### thumbnail" in output and "huge" not in output
    assert list(json.loads(Path("r/run.json").read_text())["workloads"]) == ["huge", "thumbnail"]


# ------------------------------------------------------------------------------------------------ conversions


CONVERT = 'mkdir "$7" && echo "$6" > "$7/model"'


def test_a_conversion_is_made_once_for_a_checkpoint(tiny: Pair, folder: Path, measured: list[str]) -> None:
    peer_python("mnn", f"echo made >> made; {CONVERT}")
    Path("m/mnn-int4").mkdir(parents=True)  # made before there were markers
    other = shutil.copytree(tiny.checkpoint, folder / "other" / tiny.checkpoint.name)
    (other / "tokenizer.json").write_text("{}")
    for number, checkpoint in enumerate((tiny.checkpoint, tiny.checkpoint, other, tiny.checkpoint)):
        status, _ = cli(checkpoint, tiny.bundle, "--peers", "mnn", "--results", f"r{number}")
        assert status == 0 and Path("m/mnn-int4/model").read_text().strip() == str(checkpoint)
        assert is_current(Path("m/mnn-int4"), fingerprint(checkpoint))
        assert len(Path("made").read_text().splitlines()) == (1, 1, 2, 3)[number]
    assert measured == [f"edgevl {tiny.bundle.name}", "mnn int4"] * 4


def test_who_cannot_convert_keeps_a_row_and_the_reason(tiny: Pair, folder: Path, measured: list[str]) -> None:
    peer_python("mnn", 'echo "Traceback (most recent call last):\n  File x\nRuntimeError: no such layer" >&2; exit 1')
    status, output = cli(tiny.checkpoint, tiny.bundle, "--peers", "mnn", "--workload", "picture")
    table = Path("r/table.md").read_text()
    assert status == 0 and measured == [f"edgevl {tiny.bundle.name}"] * 2
    assert table.count("\n| mnn int4 ") == 4  # in the figures and in the ratios of both workloads
    reason = "mnn int4: the conversion ended with status 1: RuntimeError: no such layer"
    assert table.count(f"\n- {reason}\n") == 2 and "Traceback" not in output and "File x" not in output
    assert "- mnn int4: 4-bit decoder" in table and "mnn int4 is not measured: the conversion ended" in output
    assert "mnn" not in Path("r/results.jsonl").read_text() and not list(Path("m").iterdir())
    peer_python("mnn", CONVERT)
    status, output = cli(tiny.checkpoint, tiny.bundle, "--peers", "mnn", "--workload", "picture")
    assert status == 0 and measured[2:] == ["mnn int4"] * 2 and "status 1" not in output


def test_a_peer_whose_python_does_not_run(tiny: Pair, folder: Path, measured: list[str]) -> None:
    peer_python("mnn", "").chmod(0o644)
    status, output = cli(tiny.checkpoint, tiny.bundle, "--peers", "mnn")
    assert status == 0 and "- mnn int4: the conversion could not begin: e/mnn/bin/python: Permission denied" in output


def test_the_reason_is_the_message() -> None:
    assert ending(1, "Traceback\n  File\nValueError: x\n\n", "out") == "ended with status 1: ValueError: x"
    assert ending(3, " \n", "first\nlast\n") == "ended with status 3: last"
    assert ending(2) == "ended with status 2"
    assert ending(-signal.SIGKILL) == "ended with SIGKILL (out of memory?)"
    assert ending(-signal.SIGSEGV, "terminate called") == "ended with SIGSEGV: terminate called"


def test_a_tool_that_fails_says_why(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run_tool("it", ["sh", "-c", 'test "$PWD" = "$1" && test "$A" = b', "sh", str(tmp_path)], tmp_path, {"A": "b"})
    for script, reason in (
        ("echo said; echo why >&2; exit 3", "the tool ended with status 3: why"),
        ("echo said; exit 3", "the tool ended with status 3: said"),
        ("kill -9 $$", "the tool ended with SIGKILL"),
    ):
        with pytest.raises(RuntimeError) as raised:
            run_tool("the tool", ["sh", "-c", script])
        assert str(raised.value).startswith(reason)
    assert capfd.readouterr() == ("", "said\nwhy\nsaid\n")


def test_the_last_line_of_a_worker_is_the_message(tmp_path: Path) -> None:
    def last(*arguments: object) -> str:
        command = [sys.executable, "-m", "edgevl.benchmarks.peers.worker", *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 1 and done.stdout == ""
        return done.stderr.splitlines()[-1]

    said = last("edgevl_bundle", "ort-cpu", "prepare", tmp_path, tmp_path / "b")
    assert said == f"{tmp_path}/b: no such bundle; make it with `edgevl export`"
    (tmp_path / "there").mkdir()
    assert last("transformers", "bf16", "prepare", tmp_path, tmp_path / "there").startswith("FileExistsError: [Errno")


# ------------------------------------------------------------------------------------------------ cut short


def test_interrupted(tiny: Pair, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(entrant: Entrant, task: dict[str, Any]) -> Measured:
        if "b" in entrant.name.split():
            raise KeyboardInterrupt
        return Measured(entrant.name, **FIGURES)  # type: ignore[arg-type]

    monkeypatch.setattr(run, "_measure", measure)
    Path("a").symlink_to(tiny.bundle)
    Path("b").symlink_to(tiny.bundle)
    status, output = cli(tiny.checkpoint, "a", "b", "--peers", "none")
    assert status == 130 and "Aborted" not in output and "Traceback" not in output
    assert len(Path("r/results.jsonl").read_text().splitlines()) == 1
    assert sorted(p.name for p in Path("r").iterdir()) == ["results.jsonl", "run.json"]


def fail_at(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """A disk that is full when half of the file is written."""
    write = Path.write_text

    def half(path: Path, text: str, *arguments: Any, **named: Any) -> int:
        if name in path.name:
            write(path, text[: len(text) // 2])
            raise OSError(28, "No space left on device")
        return write(path, text, *arguments, **named)

    def save(figure: Any, path: Path, **_: Any) -> None:
        half(Path(path), "a picture")
        write(Path(path), "a picture")

    monkeypatch.setattr(Path, "write_text", half)
    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", save)


@pytest.mark.parametrize("name", ["run.json", "table.md", "peers.png"])
def test_no_output_is_written_by_halves(
    tiny: Pair, before: dict[str, Any], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    old = Path("r", name).read_bytes()
    fail_at(monkeypatch, name)
    status, output = cli(tiny.checkpoint, tiny.bundle, "--peers", "none", "--rounds", 2)
    assert status == 2 and f"r/{name}: cannot be written (No space left on device); free some space" in output
    assert Path("r", name).read_bytes() == old
    assert sorted(p.name for p in Path("r").iterdir()) == ["peers.png", "results.jsonl", "run.json", "table.md"]


def test_results_that_cannot_be_appended(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot be written \(Is a directory\); mend that and run again to go on"):
        append_row(tmp_path, Row("w", 0, Measured("a")))
