"""Contenders that stay open together and answer one after the other.

A machine whose speed moves from minute to minute hits processes that follow each other differently, by more than the
contenders differ. What answers within the same seconds is hit alike, so that the ratios of turns hold where those of
rounds do not. It takes memory for all of them at once.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import tempfile
import time
from collections.abc import Generator, Mapping, Sequence
from typing import Any

from edgevl.benchmarks.peers.contract import Measured, ending
from edgevl.benchmarks.peers.entrants import Entrant
from edgevl.benchmarks.turns import environment, in_turn

__all__ = ["Turns", "turns"]

_PAUSE_S = 0.2  # a pool of threads goes on spinning after its last answer, on the cores that the next one needs


class Turns:
    """A contender's process, its model open and warm. `stop` ends it."""

    def __init__(self, entrant: Entrant, task: Mapping[str, Any], stop: contextlib.ExitStack) -> None:
        self._name, self._reason = entrant.name, ""
        self._errors = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 (closed by `stop`)
        stop.callback(self._errors.close)
        command = entrant.worker("turns", str(entrant.folder))
        pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self._errors}
        try:
            self._process = subprocess.Popen(command, text=True, env=environment(task["threads"]), **pipes)
        except OSError as e:
            self._reason = f"the measurement could not begin: {command[0]}: {e.strerror}"
            return
        stop.callback(self._end)
        self._ask(json.dumps(task))

    def answer(self, turn: int) -> Measured:
        """What it measured in this turn; of one that has failed, how."""
        return Measured(self._name, unsupported=self._reason) if self._reason else self._ask(str(turn))

    def _ask(self, line: str) -> Measured:
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            print(line, file=self._process.stdin, flush=True)
            said = self._process.stdout.readline()
        except BrokenPipeError:
            said = ""
        if said:
            found = Measured(**{**json.loads(said), "contender": self._name})
            self._reason = found.unsupported
            return found
        status = self._process.wait()
        self._errors.seek(0)
        self._reason = f"the measurement {ending(status, self._errors.read())}"
        return Measured(self._name, unsupported=self._reason)

    def _end(self) -> None:
        self._process.kill()
        self._process.communicate()


def turns(
    racing: Sequence[Entrant], task: Mapping[str, Any], rounds: Sequence[int]
) -> Generator[tuple[int, Measured], None, None]:
    """(round, what one contender measured): in every round each has a turn, and another one begins."""
    with contextlib.ExitStack() as stop:
        opened = [Turns(entrant, task, stop) for entrant in racing]
        for number in rounds:
            for contender in in_turn(opened, number):
                time.sleep(_PAUSE_S)
                yield number, contender.answer(number)
