"""A model's scores on the yardstick: anything that answers batches of conversations as VisionLanguageModel does.

`answer_cases` takes an open model; `score_bundle` opens a bundle in several processes of one thread each, because the
demo model is too small to gain from more threads.
"""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from edgevl.tasks.cases import TASKS, Case
from edgevl.tasks.scoring import Score, wilson

__all__ = ["Answered", "Answerer", "TaskResult", "answer_cases", "score_bundle", "summarize"]

_SHARE = 50  # cases handed to a process at once
_model: Any = None  # of a worker process of score_bundle


class Answerer(Protocol):
    """What is scored; `edgevl.runtime.VisionLanguageModel` is one."""

    def generate_batch(self, conversations: Sequence[Sequence[dict[str, Any]]], **generation: Any) -> Sequence[Any]:
        """One answer with a `.text` for each conversation."""
        ...


@dataclass(frozen=True)
class Answered:
    """One case, what was said, and its score."""

    case: Case
    text: str
    score: Score


@dataclass(frozen=True)
class TaskResult:
    """right: share of n cases; interval: its 95 % interval; value: mean of the scores that move smoothly."""

    task: str
    n: int
    right: float
    interval: tuple[float, float]
    value: float


def answer_cases(model: Answerer, cases: Iterable[Case], batch: int = 16) -> list[Answered]:
    """Greedy answers to `cases`, `batch` of them decoded together (which changes no answer)."""
    out: list[Answered] = []
    waiting: list[Case] = []

    def answer() -> None:
        longest = max(case.max_new_tokens for case in waiting)
        answers = model.generate_batch([c.messages for c in waiting], max_new_tokens=longest, do_sample=False)
        out.extend(Answered(c, a.text, TASKS[c.task].score(a.text, c)) for c, a in zip(waiting, answers))
        waiting.clear()

    for case in cases:
        waiting.append(case)
        if len(waiting) == batch:
            answer()
    if waiting:
        answer()
    return out


def summarize(answered: Sequence[Answered]) -> list[TaskResult]:
    """One row per task, in the yardstick's order."""
    rows = []
    for task in TASKS:
        scores = [a.score for a in answered if a.case.task == task]
        if scores:
            right = sum(s.correct for s in scores)
            value = sum(s.value for s in scores) / len(scores)
            rows.append(TaskResult(task, len(scores), right / len(scores), wilson(right, len(scores)), value))
    return rows


def score_bundle(
    bundle: str | Path,
    tasks: Sequence[str],
    cases: int,
    *,
    split: str = "test",
    seed: int = 0,
    engine: str = "ort-cpu",
    processes: int | None = None,
    threads: int = 1,
) -> list[Answered]:
    """Answers of a bundle to the first `cases` cases of every task, their pictures left out; progress on a terminal.

    Args:
        processes: the cores that this process may use by default; each opens the bundle with `threads` threads.

    Raises:
        EdgeVLError: the bundle cannot be opened.
    """
    from edgevl.runtime.bundle import Bundle
    from edgevl.runtime.engine import usable_cores

    Bundle.open(bundle)  # a worker's error would come back as a broken pool
    starts = range(0, cases, _SHARE)
    shares = [(task, split, seed, start, min(start + _SHARE, cases)) for task in tasks for start in starts]
    # Not forked: a process that has run an engine holds threads and locks.
    context = multiprocessing.get_context("spawn")
    answered: list[Answered] = []
    with (
        ProcessPoolExecutor(processes or usable_cores(), context, _open, (str(bundle), engine, threads)) as pool,
        tqdm(total=cases * len(tasks), unit="case", file=sys.stderr, disable=None) as bar,
    ):
        for future in [pool.submit(_answer, *share) for share in shares]:
            answered += future.result()
            bar.update(len(answered) - bar.n)
    return answered


def _open(bundle: str, engine: str, threads: int) -> None:
    global _model
    from edgevl.runtime import VisionLanguageModel

    _model = VisionLanguageModel.open(bundle, engine, threads=threads)


def _answer(task: str, split: str, seed: int, start: int, stop: int) -> list[Answered]:
    answered = answer_cases(_model, (TASKS[task].case(split, i, seed) for i in range(start, stop)))
    return [replace(a, case=replace(a.case, pictures=())) for a in answered]
