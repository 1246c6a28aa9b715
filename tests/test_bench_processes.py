"""What `edgevl bench` does when it is ended, when a case fails, and when an output cannot be written."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Pair
from test_cli import edgevl

from edgevl.benchmarks import commands, processes, rounds
from edgevl.benchmarks.processes import TERMINATED, run_process, scratch_folder
from edgevl.benchmarks.report import read_lines
from edgevl.benchmarks.stages import Job
from edgevl.benchmarks.workloads import Workload
from edgevl.runtime.cli import run
from edgevl.runtime.errors import EdgeVLError, InputError

linux = pytest.mark.skipif(sys.platform != "linux", reason="/proc, and signals of the kernel's")
SMALL = ("--size", "56x56", "--new-tokens", 2, "--requests", 1, "--threads", 1)


def until(found: Callable[[], Any], seconds: float = 60.0) -> Any:
    """What `found` gives as soon as it is true."""
    end = time.monotonic() + seconds
    while not (value := found()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)
    return value


def children(pid: int) -> list[int]:
    """Measuring processes of a command."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
            command = (stat.parent / "cmdline").read_bytes()
            if parent == pid and (b"edgevl.benchmarks.stages" in command or b"edgevl.benchmarks.open_loop" in command):
                found.append(int(stat.parent.name))
        except OSError:
            continue
    return found


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


# ---------------------------------------------------------------- ended from outside


@linux
@pytest.mark.parametrize("loop", ["closed", "open"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_nothing_outlives_a_command_that_is_ended(tiny: Pair, tmp_path: Path, loop: str, number: signal.Signals):
    """Real processes; SIGKILL of the command is heard of from the kernel."""
    endless = ("--minutes", "9") if loop == "closed" else ("--arrivals", "0.01", "--requests", "9")
    command = [sys.executable, "-m", "edgevl.runtime", "bench", str(tiny.bundle), "--size", "56x56", "--new-tokens"]
    command += ["2", "--threads", "1", *endless, "--json", str(tmp_path / "r.jsonl")]
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    environment = {**os.environ, "TMPDIR": str(scratch)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment) as parent:
        try:
            (child,) = until(lambda: children(parent.pid))
            if loop == "open":
                until(lambda: list(scratch.glob("*/8-picture-0.jpg")))  # it waits for a request that is due
            else:
                until(lambda: b"onnxruntime" in maps(child))
            parent.send_signal(number)
            status = parent.wait(30)
        finally:
            parent.kill()
    assert status == {signal.SIGTERM: TERMINATED, signal.SIGINT: 130, signal.SIGKILL: -signal.SIGKILL}[number]
    assert TERMINATED == 143
    try:
        until(lambda: not alive(child), 10)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
    left = {p.name for p in scratch.iterdir()} - {".ses"}  # ONNX Runtime's own, in every process that loads it
    assert not left and not (tmp_path / "r.jsonl").exists()


def maps(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/maps").read_bytes()
    except OSError:
        return b""


@linux
def test_a_process_that_does_not_hear_is_killed_and_its_folder_removed(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(processes, "_GRACE_S", 0.2)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    code = (
        "import signal, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "from edgevl.benchmarks.processes import scratch_folder\n"
        "with scratch_folder() as f: (f / 'kept').touch(); time.sleep(60)"
    )
    seen: list[int] = []

    def interrupted(self: Any, *arguments: Any, **named: Any) -> Any:
        seen.append(self.pid)
        until(lambda: list(tmp_path.glob("*/kept")))
        raise SystemExit(TERMINATED)

    monkeypatch.setattr(subprocess.Popen, "communicate", interrupted)
    with pytest.raises(SystemExit):
        run_process([sys.executable, "-c", code], "", {**os.environ, "TMPDIR": str(tmp_path)})
    assert not alive(seen[0]) and not list(tmp_path.iterdir())


def test_the_folder_of_a_process_that_was_killed_is_removed(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    code = (
        "import os, signal; from edgevl.benchmarks.processes import scratch_folder\n"
        "with scratch_folder() as f: (f / 'kept').touch(); os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = run_process([sys.executable, "-c", code], "", {**os.environ, "TMPDIR": str(tmp_path)})
    assert done.returncode == -signal.SIGKILL and not list(tmp_path.iterdir())
    with scratch_folder() as folder:
        assert folder.parent == tmp_path and f"-{os.getpid()}-" in folder.name
    assert not list(tmp_path.iterdir())


@linux
def test_a_process_whose_parent_is_gone_does_not_begin():
    code = "from edgevl.benchmarks.processes import end_with_parent as e; e({}); print('went on')"
    gone = subprocess.run([sys.executable, "-c", code.format(1)], capture_output=True, text=True, check=False)
    assert gone.returncode == TERMINATED and gone.stdout == ""
    here = [sys.executable, "-c", code.format(os.getpid())]
    assert subprocess.run(here, capture_output=True, text=True, check=True).stdout == "went on\n"


# ---------------------------------------------------------------- a case that fails


@pytest.mark.parametrize(
    ("arguments", "tokens"),
    [
        (("--prompt-tokens", 9000), "a prompt of 90"),
        (("--new-tokens", 8000), "an answer of 8000"),
        (("--arrivals", 5, "--prompt-tokens", 9000), "a prompt of 90"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_measured(tiny: Pair, tmp_path, arguments, tokens):
    out = tmp_path / "r.jsonl"
    done = edgevl("bench", tiny.bundle, "--workload", "picture", "--workload", "text", *SMALL[:2], *arguments,
                  "--json", out)  # fmt: skip
    assert done.returncode == 2 and done.stdout == "" and not out.exists()
    (line,) = done.stderr.splitlines()  # the ceilings are not measured either
    assert f"{tiny.bundle.name}, workload 'picture*" in line and tokens in line and "KV cache of 2048" in line


def test_the_largest_answer_that_fits_is_measured_whole(tiny: Pair):
    """One token more is refused; with it the answer would end early."""
    from edgevl.benchmarks.request_size import check_fits, prompt_tokens
    from edgevl.benchmarks.stages import run_job
    from edgevl.runtime.bundle import Bundle

    bundle = Bundle.open(tiny.bundle)
    asked = Workload("w", 56, 56, prompt_tokens=2000)
    rest = bundle.max_tokens + 1 - prompt_tokens(bundle, asked, bundle.max_tokens)
    fits = Workload("w", 56, 56, prompt_tokens=2000, new_tokens=rest)
    check_fits(bundle, fits, "tiny")
    done = run_job(Job(str(tiny.bundle), fits, threads=1, requests=1)).requests[0]
    assert done.new_tokens == rest and done.prompt_tokens + rest == bundle.max_tokens + 1
    with pytest.raises(InputError, match=r"^tiny, workload 'w': a prompt of .* are 1 tokens more than the KV cache"):
        check_fits(bundle, Workload("w", 56, 56, prompt_tokens=2000, new_tokens=rest + 1), "tiny")


def test_a_case_that_fails_leaves_the_others_their_figures(tiny: Pair, tmp_path, monkeypatch, capsys):
    """In round 2 one case fails: its first round counts, it has no third one, and the status is 2."""
    real, asked = rounds._measure, []

    def measure(job: Job) -> dict[str, Any]:
        asked.append((job.workload.name, job.round))
        if job.workload.name.startswith("text") and job.round == 1:
            raise EdgeVLError("the GPU fell off")
        return real(job)

    monkeypatch.setattr(rounds, "_measure", measure)
    out = tmp_path / "r.jsonl"
    arguments = ["bench", tiny.bundle, "--workload", "picture", "--workload", "text", *SMALL, "--json", out]
    assert run([str(a) for a in arguments]) == 2
    assert asked == [("picture*", 0), ("text*", 0), ("text*", 1), ("picture*", 1), ("picture*", 2)]
    cases = read_lines(out)
    assert [(c["workload"]["name"], len(c["cold_s"])) for c in cases] == [("picture*", 3), ("text*", 1)]
    told = capsys.readouterr()
    problem = f"{tiny.bundle.name}, workload 'text*', round 2: the GPU fell off"
    assert f"failed: {problem}" in told.err and told.err.splitlines()[-1] == f"edgevl: error: {problem}"
    assert "picture*" in told.out and "text*" in told.out


def test_where_all_fails_nothing_is_written(tiny: Pair, tmp_path, monkeypatch, capsys):
    def measure(job: Job) -> dict[str, Any]:
        raise EdgeVLError("the GPU fell off")

    monkeypatch.setattr(rounds, "_measure", measure)
    out = tmp_path / "r.jsonl"
    assert run([str(a) for a in ("bench", tiny.bundle, *SMALL, "--json", out, "--report", tmp_path / "r.html")]) == 2
    assert not list(tmp_path.iterdir()) and capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("import os; os.kill(os.getpid(), 9)", "was ended by SIGKILL; the machine may be out of memory"),
        ("import os; os.kill(os.getpid(), 11)", "was ended by SIGSEGV$"),
        ("raise ValueError('NaN came out')", "^NaN came out$"),
        ("raise SystemExit(3)", "^status 3$"),
    ],
)
def test_how_a_measuring_process_ended_is_said(monkeypatch, code: str, message: str):
    monkeypatch.setattr(rounds, "run_process", lambda _, text, env: run_process([sys.executable, "-c", code], "", env))
    with pytest.raises(EdgeVLError, match=message):
        rounds._measure(Job("bundle", Workload("w")))


# ---------------------------------------------------------------- an output that cannot be written


def test_a_folder_that_vanishes_costs_one_output_only(tiny: Pair, tmp_path, monkeypatch, capsys):
    gone = tmp_path / "gone"
    gone.mkdir()
    real = commands.measure_all

    def measure(*arguments: Any) -> Any:
        shutil.rmtree(gone)
        return real(*arguments)

    monkeypatch.setattr(commands, "measure_all", measure)
    page = tmp_path / "r.html"
    arguments = ["bench", tiny.bundle, *SMALL, "--rounds", 1, "--json", gone / "r.jsonl", "--report", page]
    assert run([str(a) for a in arguments]) == 2
    told = capsys.readouterr()
    assert "<svg" in page.read_text() and "picture*" in told.out
    assert "gone/r.jsonl: cannot be written" in told.err.splitlines()[-1]
