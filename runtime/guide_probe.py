"""Tries a JSON schema in a process of its own, which can be ended.

Some schemas keep llguidance busy for minutes, and none of its limits holds them: patterns intersected by allOf, a large
multipleOf. A server takes schemas from strangers, and a thread inside the library cannot be stopped. What has only
keywords that are known to be cheap is not tried.
"""

from __future__ import annotations

import json
import math
import os
import selectors
import subprocess
import sys
import time
from collections import OrderedDict
from pathlib import Path
from typing import Any

from edgevl.runtime.errors import EdgeVLError, EngineError, InputError
from edgevl.runtime.guided import GuideCompiler
from edgevl.runtime.tokenizer import Tokenizer

__all__ = ["GuideProbe"]

_COSTLY = ("allOf", "format", "multipleOf", "pattern")
_LONG = 20_000  # characters; thousands of properties are costly too
_KEPT = 256  # schemas that were tried
_SLOW_S = 60.0  # for so long a schema that took too long is not tried again; another time the machine may be less busy
_STARTING_S = 60.0  # for the process to load a vocabulary, on a slow device
_READY = "ready"


class GuideProbe:
    """Says whether a schema can be prepared in reasonable time.

    Args:
        tokenizer: path of the model's tokenizer.json.
        vocab_size, eos_token_ids: as for GuideCompiler.
        limit_s: seconds that a schema may take.
    """

    def __init__(self, tokenizer: Path, vocab_size: int, eos_token_ids: tuple[int, ...], limit_s: float = 3.0) -> None:
        self._arguments = [str(tokenizer), str(vocab_size), ",".join(map(str, eos_token_ids))]
        self._limit_s = limit_s
        # schema: what is wrong with it, and until when (time.monotonic) that holds
        self._tried: OrderedDict[str, tuple[str | None, float]] = OrderedDict()

    @staticmethod
    def is_costly(schema: dict[str, Any]) -> bool:
        """Whether a schema may be one that takes long."""
        text = json.dumps(schema)
        return len(text) > _LONG or any(f'"{word}' in text for word in _COSTLY)

    def check(self, schema: dict[str, Any]) -> None:
        """Try a schema, unless it was tried before; in one thread at a time.

        Raises:
            InputError: it cannot be used, or takes too long.
            EngineError: the process could not be started.
        """
        text = json.dumps(schema)
        told, until = self._tried.get(text, (None, 0.0))
        if time.monotonic() < until:
            self._tried.move_to_end(text)
            if told:
                raise InputError(told)
            return
        told, until = self._try(text)
        self._tried[text] = told, until
        if len(self._tried) > _KEPT:
            self._tried.popitem(last=False)
        if told:
            raise InputError(told)

    def _try(self, text: str) -> tuple[str | None, float]:
        command = [sys.executable, "-m", "edgevl.runtime.guide_probe", *self._arguments]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as p:
            try:
                if _line(p, _STARTING_S) != _READY:
                    raise EngineError("the process that tries JSON schemas has not started")
                return self._ask(p, text)
            finally:
                p.kill()

    def _ask(self, process: subprocess.Popen[bytes], text: str) -> tuple[str | None, float]:
        try:
            if process.stdin is not None:
                process.stdin.write(text.encode() + b"\n")
                process.stdin.flush()
            told = _line(process, self._limit_s)
        except BrokenPipeError:
            told = None
        if told is not None:
            return json.loads(told), math.inf
        slow = f"the json_schema takes longer than {self._limit_s:g} s to prepare; simplify its patterns, allOf and "
        return slow + "multipleOf", time.monotonic() + _SLOW_S


def _line(process: subprocess.Popen[bytes], seconds: float) -> str | None:
    """A line that the process writes within so many seconds; None: it did not, or has ended."""
    if process.stdout is None:
        return None
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        if not selector.select(seconds):
            return None
    return process.stdout.readline().decode().strip() or None


def main(arguments: list[str]) -> None:
    """The process: one schema on stdin, the error's message (or null) on stdout."""
    path, vocab_size, eos = arguments
    compiler = GuideCompiler(Tokenizer.from_file(Path(path)), int(vocab_size), [int(i) for i in eos.split(",") if i])
    compiler.compile(json_schema={"type": "null"})  # prepares the vocabulary, which is not the schema's time
    _tell(_READY)
    told = None
    try:
        guide = compiler.compile(json_schema=sys.stdin.readline())
        if guide is not None:
            guide.start()
    except EdgeVLError as e:
        told = str(e)
    _tell(json.dumps(told))


def _tell(line: str) -> None:
    os.write(1, line.encode() + b"\n")


if __name__ == "__main__":
    main(sys.argv[1:])
