"""Tries a JSON schema in a process of its own, which can be ended.

Some schemas keep llguidance busy for minutes, and none of its limits holds them: patterns intersected by allOf, a large
multipleOf. A server takes schemas from strangers, and a thread inside the library cannot be stopped. What has only
keywords that are known to be cheap is not tried.
"""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import sys
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
        self._good: OrderedDict[str, None] = OrderedDict()

    def check(self, schema: dict[str, Any]) -> None:
        """Try a schema, unless it is cheap or was tried before.

        Raises:
            InputError: it cannot be used, or takes too long.
            EngineError: the process could not be started.
        """
        text = json.dumps(schema)
        if text in self._good:
            self._good.move_to_end(text)
            return
        if len(text) <= _LONG and not any(f'"{word}' in text for word in _COSTLY):
            return
        self._try(text)
        self._good[text] = None
        if len(self._good) > _KEPT:
            self._good.popitem(last=False)

    def _try(self, text: str) -> None:
        command = [sys.executable, "-m", "edgevl.runtime.guide_probe", *self._arguments]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as p:
            try:
                if _line(p, _STARTING_S) != _READY:
                    raise EngineError("the process that tries JSON schemas has not started")
                told = self._ask(p, text)
            finally:
                p.kill()
        if told:
            raise InputError(told)

    def _ask(self, process: subprocess.Popen[bytes], text: str) -> str | None:
        try:
            if process.stdin is not None:
                process.stdin.write(text.encode() + b"\n")
                process.stdin.flush()
            told = _line(process, self._limit_s)
        except BrokenPipeError:
            told = None
        if told is None:
            raise InputError(
                f"the json_schema takes longer than {self._limit_s:g} s to prepare; simplify its patterns, allOf and "
                "multipleOf"
            )
        return json.loads(told)


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
