"""Task scores of two checkpoints, before and after quantization, and the gates on them.

Scored are bundles, in the real runtime: `edgevl export` writes them into a temporary folder (as a command of its own:
calibration does not know graphs), the yardstick (edgevl.tasks) asks them. Both keep their vision encoder in float32,
so that the difference is the quantization's.
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from edgevl.calibration.fidelity import Interval, bootstrap
from edgevl.runtime.checkpoint import Checkpoint
from edgevl.runtime.errors import CheckpointError, EdgeVLError, InputError
from edgevl.tasks import TASKS, Answered, score_bundle, summarize

__all__ = ["MEAN", "Gate", "TaskScore", "check_scoring", "parse_min_scores", "score_gates", "score_pair"]

MEAN = "mean"


@dataclass(frozen=True)
class TaskScore:
    """One task, or the mean over all (`task` is "mean"). before, after: share of right answers of n cases; the
    intervals are 95 % (Wilson's for a task, bootstrapped for the mean). change: after - before on the same cases, with
    its bootstrapped interval. lost, won: cases answered right by the original only, by the quantized only."""

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
        bundle = _export(Path(checkpoint), folder / f"bundle-{what}")
        answers.append(score_bundle(bundle, list(tasks), cases))
        shutil.rmtree(bundle)
    return compare_answers(answers[0], answers[1])


def compare_answers(before: Sequence[Answered], after: Sequence[Answered]) -> list[TaskScore]:
    """One row per task and the mean over tasks; both lists hold the same cases in the same order."""
    rows = []
    for b, a in zip(summarize(before), summarize(after), strict=True):
        right = [
            (float(x.score.correct), float(y.score.correct)) for x, y in zip(before, after) if x.case.task == b.task
        ]
        change = [y - x for x, y in right]
        lost, won = sum(c < 0 for c in change), sum(c > 0 for c in change)
        difference = sum(change) / b.n, bootstrap(change)
        rows.append(TaskScore(b.task, b.n, b.right, b.interval, a.right, a.interval, *difference, lost, won))
    # as many cases of every task: the mean over tasks is the mean over cases
    x, y = ([float(s.score.correct) for s in some] for some in (before, after))
    change = [b - a for a, b in zip(x, y)]
    means = sum(x) / len(x), bootstrap(x), sum(y) / len(y), bootstrap(y), sum(change) / len(x), bootstrap(change)
    rows.append(TaskScore(MEAN, len(x), *means, sum(r.lost for r in rows), sum(r.won for r in rows)))
    return rows


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


def _export(checkpoint: Path, bundle: Path) -> Path:
    with Checkpoint.open(checkpoint) as opened:
        own = opened.quantization is not None
        quantized_vision = any(name.startswith("visual.") for name in opened.layers)
    options = [] if own else ["--precision", "fp32"]
    options += [] if quantized_vision else ["--vision-precision", "fp32"]
    command = [sys.executable, "-m", "edgevl.runtime", "export", str(checkpoint), "-o", str(bundle), "--no-verify"]
    done = subprocess.run([*command, *options], capture_output=True, text=True, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        reason = lines[-1].removeprefix("edgevl: error: ") if lines else f"status {done.returncode}"
        raise CheckpointError(f"{checkpoint}: cannot be exported to be scored: {reason}")
    return bundle
