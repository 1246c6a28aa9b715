"""What answers that are being written notice of a request that comes with a picture, and what it costs the request.

Method: some answers are under way; a picture of noise comes, is encoded, and its prompt is read, by turns with the
others' steps in its pauses (as `edgevl serve` does it) and without. Longest gap between two tokens of those that wait,
first token of the one that comes, and all work per token: a turn's time less what its steps take alone. Then, through
the server's scheduler: a short text comes as a picture is encoded, and overtakes it or does not, by turns.

    python -m edgevl.benchmarks.interleaving BUNDLE --answers 3
"""

from __future__ import annotations

import statistics
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
from PIL import Image
from tabulate import tabulate

from edgevl.runtime import VisionLanguageModel
from edgevl.runtime.decode_loop import DecodeLoop
from edgevl.runtime.doctor import cpu_model
from edgevl.runtime.errors import EdgeVLError, InputError
from edgevl.runtime.jobs import Event, Job
from edgevl.runtime.pauses import pauses
from edgevl.runtime.scheduler import Scheduler
from edgevl.runtime.serve_metrics import Metrics

__all__ = ["Overtaking", "Turn", "main", "measure", "measure_overtaking"]

_PROMPT = 200  # words of the answers under way
_SHORT = "How do I boil an egg?"
_PATIENCE_S = 600


@dataclass(frozen=True)
class Turn:
    """first_token_s: of the request that comes. steps: of the others meanwhile. gap_s: the longest between two of
    them, the first one after it included."""

    interleaved: bool
    first_token_s: float
    steps: int
    gap_s: float


def measure(model: VisionLanguageModel, size: tuple[int, int], answers: int, turns: int) -> list[Turn]:
    """`turns` with pauses and as many without, in turn. The model must not keep pictures."""
    rng, loop = np.random.default_rng(0), model.decode_loop(answers + 1)
    tokens = min(model.capacity - 2 * _PROMPT, 200 + 400 * turns)
    config = model.generation_config(max_new_tokens=tokens, eos_token_ids=(), do_sample=False)
    for _ in range(answers):
        words = " ".join(f"{n}" for n in rng.integers(0, 10, _PROMPT // 2))
        prompt = model.prepare([{"role": "user", "content": words}], tokens)
        loop.join(model.row(prompt, config), prompt)
    found = [_turn(model, loop, rng, size, number % 2 == 1) for number in range(2 * turns + 2)]
    return found[2:]  # one of each to warm up


def _turn(
    model: VisionLanguageModel, loop: DecodeLoop, rng: np.random.Generator, size: tuple[int, int], interleaved: bool
) -> Turn:
    picture = Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), np.uint8))
    content = [{"type": "image", "image": picture}, {"type": "text", "text": "What is this?"}]
    ends: list[float] = []

    def step() -> None:
        if loop.rows and loop.step():
            ends.append(time.perf_counter())

    step()
    began = time.perf_counter()
    with pauses(step) if interleaved else nullcontext():
        prompt = model.prepare([{"role": "user", "content": content}])
        loop.join(model.row(prompt, model.generation_config(max_new_tokens=1)), prompt)
    first_token_s, steps = time.perf_counter() - began, len(ends) - 1
    step()
    if not loop.rows:
        raise InputError("the answers under way have ended: fewer turns, or a bundle with a larger --max-tokens")
    return Turn(interleaved, first_token_s, steps, float(np.diff(ends).max()))


@dataclass(frozen=True)
class Overtaking:
    """First tokens of a short text and of the picture during whose encoding it came, each from its own arrival;
    text_first: which of the two had its own."""

    overtakes: bool
    text_s: float
    picture_s: float
    text_first: bool


class _InOrder(Scheduler):
    def _overtake(self) -> None:
        pass


def measure_overtaking(model: VisionLanguageModel, size: tuple[int, int], turns: int) -> list[Overtaking]:
    """`turns` in order and as many with overtaking, in turn. The model must not keep pictures."""
    rng, found = np.random.default_rng(0), []
    for number in range(2 * turns + 2):
        scheduler = (Scheduler if number % 2 else _InOrder)(model, 2, 2, Metrics())
        try:
            found.append(_overtaking_turn(scheduler, rng, size, number % 2 == 1))
        finally:
            scheduler.close(_PATIENCE_S)
    return found[2:]


def _overtaking_turn(
    scheduler: Scheduler, rng: np.random.Generator, size: tuple[int, int], overtakes: bool
) -> Overtaking:
    picture = Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), np.uint8))
    image = [{"type": "image", "image": picture}, {"type": "text", "text": "What is this?"}]
    first_s: dict[str, float] = {}
    both = threading.Event()

    def ask(name: str, content: Any) -> None:
        arrived = time.perf_counter()

        def deliver(event: Event) -> None:
            first_s.setdefault(name, time.perf_counter() - arrived)
            if len(first_s) == 2:
                both.set()

        messages = [{"role": "user", "content": content}]
        scheduler.submit(Job(lambda: messages, {"max_new_tokens": 2, "eos_token_ids": ()}, deliver))

    ask("picture", image)
    while not scheduler.encoding and "picture" not in first_s:
        time.sleep(0.001)
    ask("text", _SHORT)
    if not both.wait(_PATIENCE_S):
        raise InputError(f"no answer within {_PATIENCE_S} s: take a smaller picture")
    return Overtaking(overtakes, first_s["text"], first_s["picture"], next(iter(first_s)) == "text")


def _figure(values: Sequence[float], digits: int) -> str:
    low, middle, high = min(values), statistics.median(values), max(values)
    return f"{middle:.{digits}f} ({low:.{digits}f}–{high:.{digits}f})"


def _overtaking_rows(turns: Sequence[Overtaking]) -> list[tuple[str, ...]]:
    without, with_ = ([t for t in turns if t.overtakes == o] for o in (False, True))
    rows = [
        (name, *(_figure(c, 2) for c in ([t.text_s for t in mine], [t.picture_s for t in mine])))
        for name, mine in (("in order", without), ("the text overtakes", with_))
    ]
    text = [b.text_s / a.text_s for a, b in zip(without, with_)]
    picture = [b.picture_s / a.picture_s for a, b in zip(without, with_)]
    return [*rows, ("ratio", _figure(text, 2), _figure(picture, 2))]


def _rows(turns: Sequence[Turn]) -> list[tuple[str, ...]]:
    rows = []
    for interleaved, name in ((False, "one after the other"), (True, "steps in the pauses")):
        mine = [t for t in turns if t.interleaved == interleaved]
        columns = [t.gap_s for t in mine], [t.first_token_s for t in mine]
        rows.append((name, *(_figure(c, 2) for c in columns), _figure([t.steps for t in mine], 0)))
    without, with_ = ([t for t in turns if t.interleaved == i] for i in (False, True))
    gap = [b.gap_s / a.gap_s for a, b in zip(without, with_)]
    first = [b.first_token_s / a.first_token_s for a, b in zip(without, with_)]
    return [*rows, ("ratio", _figure(gap, 2), _figure(first, 2), "")]


@click.command(help="How long answers under way wait for a picture that comes, with steps in its pauses and without.")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--answers", type=click.IntRange(1, 15), default=3, show_default=True, help="Under way.")
@click.option("--width", type=click.IntRange(28, 2048), default=448, show_default=True)
@click.option("--height", type=click.IntRange(28, 2048), default=448, show_default=True)
@click.option("--turns", type=click.IntRange(1, 50), default=4, show_default=True)
def main(bundle: Path, answers: int, width: int, height: int, turns: int) -> None:
    try:
        with VisionLanguageModel.open(bundle, "ort-cpu", image_cache_mb=0) as model:
            rows = _rows(measure(model, (width, height), answers, turns))
            overtaking = _overtaking_rows(measure_overtaking(model, (width, height), turns))
    except EdgeVLError as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(e.exit_status)
    print(f"{cpu_model()}; {bundle.name}, {width}×{height}, {answers} answers under way; median (least–most)")
    print(tabulate(rows, headers=("", "longest gap s", "first token s", "steps meanwhile")))
    print(f"\n{_SHORT!r} comes as the picture is encoded")
    print(tabulate(overtaking, headers=("", "its first token s", "the picture's s")))


if __name__ == "__main__":
    main()
