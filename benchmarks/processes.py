"""Processes that belong to a command: none outlives it, however it ends. Knows nothing of what they do.

SIGTERM ends the command as Ctrl-C does, so that what it opened is closed on the way out: the process that it waits for
is told to end, and killed where it does not; what such a process had in temporary folders is removed. A command that is
killed outright cannot do that: its process hears of it from the kernel (Linux) and ends by itself.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from edgevl.runtime.stop_signals import StopSignals

__all__ = ["TERMINATED", "Ending", "end_with_parent", "run_process", "scratch_folder"]

TERMINATED = 128 + signal.SIGTERM  # the status that a shell tells of a process which SIGTERM ended
_GRACE_S = 5.0  # for a process that is told to end: deep in a call of an engine it hears that afterwards only
_PR_SET_PDEATHSIG = 1  # prctl(2)


class Ending(StopSignals):
    """Within its block SIGTERM raises SystemExit with the status TERMINATED, and Ctrl-C KeyboardInterrupt. A second
    SIGTERM changes nothing: the first one's ending is under way. In the main thread only."""

    def _handle(self, number: int, _: Any) -> None:
        ending = self.event.is_set()
        super()._handle(number, _)
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        if not ending:
            self.status = TERMINATED
            raise SystemExit(TERMINATED)


def run_process(command: Sequence[str], text: str, environment: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    """Run `command` with `text` as its input, and catch what it writes; whatever interrupts the waiting ends it."""
    pipe = subprocess.PIPE
    with subprocess.Popen(command, text=True, env=environment, stdin=pipe, stdout=pipe, stderr=pipe) as process:
        try:
            out, err = process.communicate(text)
        except BaseException:
            _end(process)
            raise
        finally:
            if process.poll() is not None:
                _sweep(process.pid)  # of one that was killed
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def _end(process: subprocess.Popen[str]) -> None:
    try:
        process.terminate()
        process.wait(_GRACE_S)
    except subprocess.TimeoutExpired:
        pass
    finally:
        process.kill()
        process.wait()


@contextlib.contextmanager
def scratch_folder() -> Iterator[Path]:
    """A temporary folder of this process, which `run_process` finds by its name should the process be killed."""
    with tempfile.TemporaryDirectory(prefix=_prefix(os.getpid())) as folder:
        yield Path(folder)


def _prefix(pid: int) -> str:
    return f"edgevl-bench-{pid}-"


def _sweep(pid: int) -> None:
    for folder in Path(tempfile.gettempdir()).glob(f"{_prefix(pid)}*"):
        shutil.rmtree(folder, ignore_errors=True)


def end_with_parent(parent: int) -> None:
    """Have this process get SIGTERM when `parent`, the process that started it, has ended. Linux only; elsewhere a
    parent that is killed outright leaves it running to its end."""
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGTERM), 0, 0, 0)
    if os.getppid() != parent:  # it had ended before the kernel was asked
        raise SystemExit(TERMINATED)
