"""One process of the peers' benchmark: converts a checkpoint, or opens a model and times its answers.

Runs in the peer's environment, where edgevl is installed without its dependencies: standard library, numpy, Pillow.

    python -m edgevl.benchmarks.peers.worker PEER VARIANT prepare CHECKPOINT FOLDER
    python -m edgevl.benchmarks.peers.worker PEER VARIANT measure FOLDER < JSON   (prints one JSON line)
    python -m edgevl.benchmarks.peers.worker PEER VARIANT turns FOLDER

`turns` reads the JSON from its first line, prints one when the model is open and warm, and another after every line
that follows, the number of a turn: the contenders of a run stay open together and answer one after the other.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

from edgevl.benchmarks.peers.contract import Answer, Contender, Measured, PeerModule, Request, Unsupported
from edgevl.benchmarks.workloads import Workload
from edgevl.runtime.doctor import peak_rss_bytes
from edgevl.runtime.errors import EdgeVLError

__all__ = ["main", "measure", "peer"]

SEED = 1


def peer(name: str) -> PeerModule:
    return cast(PeerModule, importlib.import_module(f"edgevl.benchmarks.peers.{name}"))


def _requests(work: Workload, text: str, number: int) -> list[Request]:
    """The requests of round trip `number`: `concurrency` of them, with pictures of their own."""
    return [
        Request(tuple(work.picture(SEED, number * work.concurrency + i, p) for p in range(work.pictures)), text)
        for i in range(work.concurrency)
    ]


def _add(into: Measured, answers: list[Answer]) -> None:
    """Keep what one round trip took. Decode speed is that of all its requests together, from when the last of them
    had its first token."""
    for a in answers:
        into.prompt_tokens.append(a.prompt_tokens)
        into.ttft_s.append(a.token_s[0])
    if len(answers) == 1:  # the stages of one request are told apart; those of several may overlap
        into.vision_s += [a.vision_s for a in answers if a.vision_s is not None]
        into.prefill_s += [a.prefill_s for a in answers if a.prefill_s is not None]
    began, ended = max(a.token_s[0] for a in answers), max(a.token_s[-1] for a in answers)
    if ended > began:
        late = sum(t > began for a in answers for t in a.token_s)
        into.decode_tokens_per_s.append(late / (ended - began))
    into.total_tokens_per_s.append(sum(len(a.token_s) for a in answers) / ended)


def measure(
    name: str,
    opened: Contender,
    open_s: float,
    work: Workload,
    text: str,
    repeats: int,
    warm_up: int = 1,
    first: int = 0,
) -> Measured:
    """`warm_up` round trips that do not count, and `repeats` that do, each with new pictures, from the `first` on.

    Raises:
        Unsupported: a workload with a video, which no peer is handed.
        RuntimeError: an answer of fewer or more tokens.
    """
    if work.frames:
        raise Unsupported(f"workload {work.name!r} has a video of {work.frames} frames; videos are not measured here")
    result = Measured(name, dict(opened.versions), open_s)
    try:
        for number in range(warm_up + repeats):
            answers = opened.answer(_requests(work, text, first + number), work.new_tokens)
            for a in answers:
                if len(a.token_s) != work.new_tokens:
                    raise RuntimeError(f"{name} gave {len(a.token_s)} tokens, {work.new_tokens} were asked for")
            if number >= warm_up:
                _add(result, answers)
    except Unsupported as e:
        result.unsupported = str(e)
    result.peak_mb = peak_rss_bytes() / 1e6
    return result


def main(arguments: list[str]) -> None:
    """Whatever goes wrong, the last line on stderr is the message."""
    try:
        _work(*arguments)
    except Exception as e:
        traceback.print_exc()
        message = " ".join(str(e).split())
        sys.exit(message if isinstance(e, (Unsupported, EdgeVLError)) else f"{type(e).__name__}: {message}")


def _work(name: str, variant: str, verb: str, *paths: str) -> None:
    module = peer(name)
    if verb == "prepare":
        module.prepare(Path(paths[0]), Path(paths[1]), variant)
        return
    task = json.loads(sys.stdin.readline())
    if task["cores"]:
        os.sched_setaffinity(0, task["cores"])
    out = os.dup(1)  # libraries write to stdout; the result goes to the real one
    os.dup2(2, 1)
    for result in _results(module, name, variant, Path(paths[0]), task, verb == "turns"):
        os.write(out, (json.dumps(asdict(result)) + "\n").encode())


def _results(
    module: PeerModule, name: str, variant: str, folder: Path, task: dict[str, Any], in_turn: bool
) -> Iterator[Measured]:
    """One; or one of the warm-up and one for every line of stdin."""
    began, title, repeats = time.perf_counter(), f"{name} {variant}", task["repeats"]
    try:
        opened = module.open_model(folder, variant, task["threads"])
    except Unsupported as e:
        yield Measured(title, unsupported=str(e))
        return
    open_s, work = time.perf_counter() - began, Workload(**task["work"])

    def measured(count: int, warm_up: int, first: int) -> Measured:
        result = measure(title, opened, open_s, work, task["text"], count, warm_up, first)
        if work.pictures and getattr(module, "NO_VISION", False):  # a first token without the picture is no TTFT
            result.ttft_s, result.total_tokens_per_s = [], []
        return result

    if not in_turn:
        yield measured(repeats, 1, 0)
        return
    yield measured(0, 1, 0)
    for line in sys.stdin:
        yield measured(repeats, 0, 1 + int(line) * repeats)


if __name__ == "__main__":
    main(sys.argv[1:])
