"""Task scores of two checkpoints, before and after quantization, and the gates on them.

Scored are bundles, in the real runtime: `edgevl export` writes them into a temporary folder (as a command of its own:
calibration does not know graphs), the yardstick (edgevl.tasks) asks them. Both keep their vision encoder in float32,
so that the difference is the quantization's; a quantized checkpoint with scales of an INT8 KV cache has that cache.
"""

from __future__ import annotations

import importlib.util
import math
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from edgevl.calibration.cache_rounding import has_int8_cache
from edgevl.calibration.fidelity import Interval
from edgevl.runtime.checkpoint import Checkpoint
from edgevl.runtime.errors import CheckpointError, EdgeVLError, InputError
from edgevl.tasks import TASKS, Answered, score_bundle, wilson

__all__ = [
    "MEAN",
    "Gate",
    "TaskScore",
    "check_scoring",
    "compare_answers",
    "paired_interval",
    "parse_min_scores",
    "score_gates",
    "score_pair",
]

MEAN = "mean"
_Z95 = 1.959963984540054


@dataclass(frozen=True)
class TaskScore:
    """One task, or the mean over all (`task` is "mean"). before, after: share of right answers of n cases; the
    intervals are 95 % (Wilson's). change: after - before on the same cases, its interval that of `paired_interval`.
    lost, won: cases answered right by the original only, by the quantized only."""

    task: str
    n: int
    before: float
    before_interval: Interval
    after: float
    after_interval: Interval
    change: float
    change_interval: Interval
    lost: int
    won: int


@dataclass(frozen=True)
class Gate:
    """A limit that was asked for, what was found, and whether it holds."""

    name: str
    limit: float
    found: float
    held: bool
    detail: str = ""


def parse_min_scores(values: Sequence[str]) -> dict[str, float]:
    """`TASK=0.9` or `0.85` (for the mean over tasks) -> limits by task.

    Raises:
        InputError: an unknown task, or no share between 0 and 1.
    """
    limits: dict[str, float] = {}
    for value in values:
        task, _, share = value.rpartition("=")
        task = task.strip() or MEAN
        if task != MEAN and task not in TASKS:
            raise InputError(f"--min-score {value!r}: task {task!r} is unknown; expected one of {', '.join(TASKS)}")
        try:
            limit = float(share)
        except ValueError:
            limit = -1.0
        if not 0 <= limit <= 1:
            raise InputError(
                f"--min-score {value!r}: expected TASK=SHARE or SHARE, a share of right answers from 0 to 1"
            )
        limits[task] = limit
    return limits


def check_scoring(tasks: Sequence[str], limits: Mapping[str, float]) -> None:
    """Whether scores can be made at all: asked before hours are spent.

    Raises:
        InputError: an unknown task, or a limit on a task that is not scored.
        EdgeVLError: a package is missing.
    """
    unknown = [t for t in tasks if t not in TASKS]
    if unknown:
        raise InputError(f"task {unknown[0]!r} is unknown; expected some of {', '.join(TASKS)}")
    unscored = [t for t in limits if t != MEAN and t not in tasks]
    if unscored:
        raise InputError(f"--min-score {unscored[0]}: that task is not scored; add it to --task")
    for package, extra in (("onnx_ir", "export"), ("onnxruntime", "ort")):
        if importlib.util.find_spec(package) is None:
            raise EdgeVLError(f"scores need the package {package!r}, not installed here; pip install 'edgevl[{extra}]'")


def score_pair(
    original: str | Path,
    quantized: str | Path,
    tasks: Sequence[str],
    cases: int,
    folder: Path,
    notice: Callable[[str], None] | None = None,
) -> list[TaskScore]:
    """Scores of both checkpoints on the first `cases` test cases of every task, and the mean last.

    Args:
        folder: for the bundles, one after the other; it exists, and what is written there is taken away again.
        notice: told what goes on.

    Raises:
        EdgeVLError: a checkpoint cannot be exported, or its bundle not be opened.
    """
    answers = []
    for what, checkpoint in (("original", original), ("quantized", quantized)):
        (notice or (lambda _: None))(f"scores of the {what} checkpoint: {cases} cases of each of {len(tasks)} tasks")
        bundle = _export(Path(checkpoint), folder / f"bundle-{what}", int8_cache=what == "quantized")
        answers.append(score_bundle(bundle, list(tasks), cases))
        shutil.rmtree(bundle)
    return compare_answers(answers[0], answers[1])


def compare_answers(before: Sequence[Answered], after: Sequence[Answered]) -> list[TaskScore]:
    """One row per task, in the yardstick's order, and the mean over tasks.

    Args:
        before, after: the same cases in the same order, as many of every task: one mean for both.
    """
    right = [(a.case.task, a.score.correct, b.score.correct) for a, b in zip(before, after, strict=True)]
    tasks = [t for t in TASKS if any(t == task for task, *_ in right)]
    rows = [_row(task, [(a, b) for t, a, b in right if t == task]) for task in tasks]
    return [*rows, _row(MEAN, [(a, b) for _, a, b in right])]


def _row(name: str, right: Sequence[tuple[bool, bool]]) -> TaskScore:
    n, before, after = len(right), sum(a for a, _ in right), sum(b for _, b in right)
    lost, won = sum(a and not b for a, b in right), sum(b and not a for a, b in right)
    intervals = wilson(before, n), wilson(after, n), paired_interval(lost, won, n)
    return TaskScore(
        name, n, before / n, intervals[0], after / n, intervals[1], (won - lost) / n, intervals[2], lost, won
    )


def paired_interval(lost: int, won: int, n: int) -> Interval:
    """95 % interval of a change of shares on the same n cases: Wald's after half a case more in each of the four cells
    (Agresti and Min, Simple improved confidence intervals for comparing matched proportions, Statistics in Medicine
    2005), which stays honest where nothing changed."""
    b, c, m = lost + 0.5, won + 0.5, n + 2
    half = _Z95 * math.sqrt(max(b + c - (c - b) ** 2 / m, 0)) / m
    return (c - b) / m - half, (c - b) / m + half


def score_gates(scores: Sequence[TaskScore], limits: Mapping[str, float]) -> list[Gate]:
    """The limits of `parse_min_scores` on the quantized model's shares of right answers."""
    by_task = {s.task: s for s in scores}
    out = []
    for task, limit in limits.items():
        s = by_task[task]
        low, high = s.after_interval
        detail = f"95 % interval {low:.3f} to {high:.3f} over {s.n} cases, {s.before:.3f} before"
        out.append(Gate(f"score {task}", limit, s.after, s.after >= limit, detail))
    return out


def _export(checkpoint: Path, bundle: Path, *, int8_cache: bool) -> Path:
    """A bundle of the checkpoint, in its own precision; `int8_cache`: with its INT8 KV cache, where it has one."""
    with Checkpoint.open(checkpoint) as opened:
        own = opened.quantization is not None
        quantized_vision = any(name.startswith("visual.") for name in opened.layers)
        int8_cache = int8_cache and has_int8_cache(opened)
    options = [] if own else ["--precision", "fp32"]
    options += [] if quantized_vision else ["--vision-precision", "fp32"]
    options += ["--kv-cache", "int8"] if int8_cache else []
    command = [sys.executable, "-m", "edgevl.runtime", "export", str(checkpoint), "-o", str(bundle), "--no-verify"]
    done = subprocess.run([*command, *options], capture_output=True, text=True, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        reason = lines[-1].removeprefix("edgevl: error: ") if lines else f"status {done.returncode}"
        raise CheckpointError(f"{checkpoint}: cannot be exported to be scored: {reason}")
    return bundle
