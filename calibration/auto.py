"""`--auto`: single layers at more bits than the recipe says, the most sensitive first, until the divergence is allowed.

The recipe is tried as it is. Where its KL is too large, every group of layers over one input is quantized alone and its
KL taken on calibration samples (the held-out ones decide in the end, so they choose nothing). Groups then go up a
ladder, 4 bits -> 8 -> as they were, in the order of KL saved per bit of weight added. The KL of a rounded layer goes
with the square of its step to second order, so 8 bits leave 1/289 of what 4 bits cost ((15/255)²; measured on a real
model: 1/200). How many steps are taken is searched for, with a run of the quantization for every guess.

Everything is a function of checkpoint, recipe and samples, and every run and result is kept until the end, so a run
that was killed goes on to the same bytes.
"""

from __future__ import annotations

import errno
import json
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from edgevl.calibration.dataset import Sample
from edgevl.calibration.dequantized import FloatCheckpoint
from edgevl.calibration.driver import (
    REPORT,
    LayerReport,
    Progress,
    QuantizeReport,
    check_output,
    check_still_free,
    quantize_checkpoint,
)
from edgevl.calibration.fidelity import Divergence
from edgevl.calibration.fingerprint import check_same_run, fingerprint
from edgevl.calibration.recipes import PLAIN, Recipe
from edgevl.calibration.sensitivity import Sensitivity, sensitivities, units_of
from edgevl.runtime.checkpoint import Checkpoint
from edgevl.runtime.errors import CheckFailedError, CheckpointError, InputError

__all__ = ["AutoReport", "Step", "Trial", "ladder", "quantize_auto"]

_SAMPLES = 8  # of those to calibrate on, for sensitivities
_AT_8_BITS = (15 / 255) ** 2
_FINE = 0.02  # the search ends when its ends differ by this share of all bits that the ladder may add
_MOST_PLAIN = 0.5  # of the decoder's linear weights stay plain at most: more is no quantized model


@dataclass(frozen=True)
class Step:
    """One group of layers one rung up. kl: what the group costs alone at the bits that it leaves; saved_per_mbit: what
    the step saves of that, for a million bits more."""

    name: str
    modules: tuple[str, ...]
    bits: int
    kl: float
    saved_per_mbit: float
    added_bits: int


@dataclass(frozen=True)
class Trial:
    """The held-out KL with the first `steps` steps of the ladder."""

    steps: int
    kl: float


@dataclass(frozen=True)
class AutoReport:
    """What was kept at more bits, in order, and every run on the way there."""

    max_kl: float
    steps: tuple[Step, ...]
    trials: tuple[Trial, ...]


AutoJudge = Callable[[Path, AutoReport], None]  # of a complete folder that is not published yet


def ladder(found: Sequence[Sensitivity], recipe: Recipe) -> list[Step]:
    """All steps that may be taken, the one that saves most per bit first; ties in the order of computation.

    From 4 bits it ends with the last group at 8 (a group whose 8 bits still cost more than others' 4 may stay plain on
    the way); a recipe of 8 bits may leave up to half of the weights plain.
    """
    steps: list[tuple[float, int, Step]] = []
    for place, unit in enumerate(found):
        bits = recipe.bits_of(unit.modules[0])
        left = max(unit.kl, 0.0)
        for higher in (8, PLAIN):
            if higher <= bits:
                continue
            after = left * _AT_8_BITS if higher == 8 else 0.0
            added = (higher - bits) * unit.parameters
            per_mbit = (left - after) / (added / 1e6)
            steps.append((-per_mbit, place, Step(unit.name, unit.modules, higher, left, per_mbit, added)))
            bits, left = higher, after
    steps.sort(key=lambda s: s[:2])  # a group's 8 bits always come before its next step: they save more for less
    ordered = [step for *_, step in steps]
    sizes = {unit.name: unit.parameters for unit in found}
    kept, plain = [], 0
    for step in ordered:
        if step.bits == PLAIN:
            if plain + sizes[step.name] > _MOST_PLAIN * sum(sizes.values()):
                continue
            plain += sizes[step.name]
        kept.append(step)
    eights = [i for i, step in enumerate(kept) if step.bits == 8]
    return kept[: eights[-1] + 1] if eights else kept


def quantize_auto(
    source: str | Path,
    output: str | Path,
    recipe: Recipe,
    samples: Sequence[Sample],
    held_out: Sequence[Sample],
    max_kl: float,
    *,
    resume: bool = False,
    progress: Progress | None = None,
    judge: AutoJudge | None = None,
) -> tuple[QuantizeReport, AutoReport]:
    """`quantize_checkpoint` with as few layers at more bits as hold the KL under `max_kl`; arguments as there, but that
    `judge` is told of the choice.

    Raises:
        InputError: as `quantize_checkpoint`; a W8A8 recipe, which has no bits to choose.
        CheckFailedError: not even the end of the ladder is good enough, or `judge` said so; nothing is published.
        CheckpointError, EngineError: as `quantize_checkpoint`.
    """
    started = time.monotonic()
    target = Path(output).absolute()
    check_output(target)
    if recipe.method == "w8a8":
        raise InputError(
            f"recipe {recipe.name!r} has 8 bits everywhere; --auto raises the bits of int4 and int8 recipes"
        )
    if recipe.method == "none" or recipe.vision != "none":
        raise InputError("--auto chooses the bits of a weight-only decoder; leave --vision away, and quantize it apart")
    if not samples or not held_out:
        raise InputError("--auto chooses layers on samples and checks on held-out ones; pass pictures or conversations")
    search = _Search(source, target.with_name(f".{target.name}.auto"), recipe, samples, held_out, progress)
    try:
        search.prepare(resume, max_kl)
        report = search.run(max_kl)
        best = search.trial_folder(len(report.steps))
        if judge is not None:
            judge(best, report)
        check_still_free(target, search.folder)
        quantized = _renamed(best, Path(output), time.monotonic() - started)
        best.rename(target)
    except CheckFailedError:
        shutil.rmtree(search.folder)
        raise
    except OSError as e:
        if e.errno != errno.ENOSPC:
            raise CheckpointError(f"{target}: cannot be written ({e})") from None
        raise CheckpointError(f"{target}: the disk is full; free some space, then go on with --resume") from None
    shutil.rmtree(search.folder)
    return quantized, report


def _renamed(folder: Path, output: Path, seconds: float) -> QuantizeReport:
    """The report of a trial's folder, which now says where it will lie and how long it all took."""
    path = folder / REPORT
    data = {**json.loads(path.read_text(encoding="utf-8")), "output": str(output), "seconds": seconds}
    path.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    layers = tuple(LayerReport(**row) for row in data["layers"])
    known = {"output": output, "recipe": Recipe(**data["recipe"]), "layers": layers}
    return QuantizeReport(**{**data, **known, "divergence": Divergence(**data["divergence"])})


class _Search:
    """The runs of one search, in one folder beside the target."""

    def __init__(
        self,
        source: str | Path,
        folder: Path,
        recipe: Recipe,
        samples: Sequence[Sample],
        held_out: Sequence[Sample],
        progress: Progress | None,
    ) -> None:
        self.source, self.folder, self.recipe = source, folder, recipe
        self.samples, self.held_out = samples, held_out
        self._progress = progress or (lambda *_: None)
        self._steps: list[Step] = []
        self._trials: list[Trial] = []

    def prepare(self, resume: bool, max_kl: float) -> None:
        """The working folder, empty or that of the same search."""
        with Checkpoint.open(self.source) as checkpoint:
            if checkpoint.quantization is not None:
                raise InputError(
                    f"{checkpoint.folder}: already quantized ({checkpoint.quantization.method}); give the original "
                    "checkpoint"
                )
            wanted = {**fingerprint(checkpoint, self.recipe, self.samples, self.held_out), "max_kl": max_kl}
        if self.folder.exists() and not resume:
            shutil.rmtree(self.folder)
        state = self.folder / "state.json"
        if state.exists():
            check_same_run(self.folder, state, wanted)
        self.folder.mkdir(exist_ok=True)
        _put(state, wanted)

    def trial_folder(self, steps: int) -> Path:
        return self.folder / f"trial-{steps:04d}"

    def run(self, max_kl: float) -> AutoReport:
        """Find the fewest steps that hold, and keep their folder.

        Raises:
            CheckFailedError: not even all of them do.
        """
        first = low = self._trial(0)
        if first.kl <= max_kl:
            return AutoReport(max_kl, (), tuple(self._trials))
        found = self._sensitivities()
        self._steps = ladder(found, self.recipe)
        self._forget(0)
        left = [sum(max(unit.kl, 0.0) for unit in found)]  # by the sum of what each costs alone, after so many steps
        for step in self._steps:
            left.append(left[-1] - step.saved_per_mbit * step.added_bits / 1e6)
        high: Trial | None = None
        while high is None or not self._close(low, high):
            if high is None and low.steps == len(self._steps):
                top = "8 bits everywhere" if self.recipe.bits < 8 else "as much as may stay plain"
                raise CheckFailedError(
                    f"KL to the original is {low.kl:.4g} with {top} and {first.kl:.4g} with {self.recipe.name} alone, "
                    f"at most {max_kl:g} was asked; nothing was written: allow more, or calibrate on more samples"
                )
            trial = self._trial(_guess(left, low, high, max_kl, len(self._trials) % 2 == 1))
            if trial.kl <= max_kl:
                if high is not None:
                    self._forget(high.steps)
                high = trial
            else:
                self._forget(trial.steps)
                low = trial
        return AutoReport(max_kl, tuple(self._steps[: high.steps]), tuple(self._trials))

    def _close(self, low: Trial, high: Trial) -> bool:
        added = [step.added_bits for step in self._steps]
        return high.steps - low.steps == 1 or sum(added[low.steps : high.steps]) <= _FINE * sum(added)

    def _trial(self, steps: int) -> Trial:
        """Quantize with the first `steps` steps, unless that was done already."""
        overrides = {m: step.bits for step in self._steps[:steps] for m in step.modules}
        folder, known = self.trial_folder(steps), self.folder / f"trial-{steps:04d}.json"
        run = len(self._trials) + 1

        def progress(done: int, layers: int, what: str) -> None:
            self._progress(done, layers, f"run {run}, {steps} groups raised: {what}")

        if not known.exists():
            if not folder.exists():
                recipe = replace(self.recipe, overrides=overrides)
                given = (self.source, folder, recipe, self.samples, self.held_out)
                quantize_checkpoint(*given, resume=True, progress=progress)
            divergence = json.loads((folder / REPORT).read_text(encoding="utf-8"))["divergence"]
            _put(known, {"steps": steps, "kl": divergence["kl"]})
        self._trials.append(Trial(**json.loads(known.read_text(encoding="utf-8"))))
        return self._trials[-1]

    def _sensitivities(self) -> list[Sensitivity]:
        known = self.folder / "sensitivities.json"
        if not known.exists():
            scratch = self.folder / "sensitivities"
            shutil.rmtree(scratch, ignore_errors=True)
            scratch.mkdir()
            with FloatCheckpoint.open(self.source) as a, FloatCheckpoint.open(self.trial_folder(0)) as b:
                units = units_of(b, "group")
                found = sensitivities(a, b, self.samples[:_SAMPLES], units, scratch, self._progress)
            shutil.rmtree(scratch)
            _put(known, [asdict(unit) for unit in found])
        rows = json.loads(known.read_text(encoding="utf-8"))
        return [Sensitivity(**{**row, "modules": tuple(row["modules"])}) for row in rows]

    def _forget(self, steps: int) -> None:
        """The weights of a run that is not the best one; its KL is kept."""
        shutil.rmtree(self.trial_folder(steps), ignore_errors=True)


def _guess(left: Sequence[float], low: Trial, high: Trial | None, max_kl: float, halve: bool) -> int:
    """How many steps to try next, between those that failed and those that held.

    KLs of layers alone add up to the whole only roughly, so their sum is scaled to what was measured last. Every other
    guess between two known ends is their middle, which bounds the number of runs.
    """
    top = len(left) - 1 if high is None else high.steps - 1
    near = low if high is None else high
    scale = near.kl / left[near.steps] if left[near.steps] > 0 else 0.0
    guess = next((k for k in range(low.steps + 1, top) if left[k] * scale <= max_kl), top)
    if high is not None and halve:
        return (low.steps + high.steps) // 2
    # a guess that failed was too bold: do not creep upwards
    least = low.steps + 1 if high is not None or low.steps == 0 else low.steps + max(1, (top - low.steps) // 4)
    return min(max(guess, least), top)


def _put(path: Path, value: Any) -> None:
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)
