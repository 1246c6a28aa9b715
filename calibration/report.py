"""The fidelity report: what quantization did to a model, as one JSON document (`fidelity.json`).

Schema "edgevl.fidelity", version 2; a version changes when a key changes its meaning or goes away, not when one comes.
Version 1 took its divergence over the words before a conversation's first picture too, and had no null intervals.
Keys, in order (`FidelityReport` has the same names):

    schema, version       "edgevl.fidelity", 2
    original, quantized   {name, nbytes, decoder_bits, quantization, kv_cache}: folder name, bytes of all weights, bits
                          per weight of the decoder's linear layers with scales and zero points, what the checkpoint
                          says of its format (null for a plain one), and the cache that it was measured with, "float"
                          or "int8"
    divergence            null without samples, else {kl, kl_interval, top1, top1_interval, tokens, conversations}: mean
                          KL(original || quantized) in nats and share of equal top tokens over the words from the first
                          picture on, 95 % intervals from redrawing conversations (null with a single one), and
                          {kl, top1, tokens} of each
    layers                [{name, bits, group_size, parameters, nbytes, error, rtn_error}], see
                          `comparison.LinearReport`
    hidden_errors         [number]: after each decoder layer, mean over tokens of |h' - h|² / |h|²
    folded                whether factors were folded into layers (then they have no error of their own)
    sensitivities         [{name, granularity, modules, kl, top1, parameters, nbytes}], see `sensitivity.Sensitivity`
    scores                [{task, n, before, before_interval, after, after_interval, change, change_interval, lost,
                          won}], see `scores.TaskScore`; the last one is the mean
    gates                 [{name, limit, found, held, detail}]
    auto                  null, or {max_kl, steps, trials}, see `auto.AutoReport`
    provenance            {recipe, images, samples, held_out, seed, max_pixels, threads, machine}; null where not known

Nothing in it depends on the clock: the same run gives the same bytes.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from edgevl.calibration.auto import AutoReport
from edgevl.calibration.cache_rounding import has_int8_cache
from edgevl.calibration.comparison import LinearReport, Progress, compare
from edgevl.calibration.dataset import Sample
from edgevl.calibration.dequantized import FloatCheckpoint
from edgevl.calibration.fidelity import Divergence, Interval, bootstrap, combined
from edgevl.calibration.scores import Gate, TaskScore, score_gates, score_pair
from edgevl.calibration.sensitivity import Sensitivity, sensitivities, units_of
from edgevl.runtime.doctor import machine
from edgevl.runtime.errors import CheckFailedError, InputError
from edgevl.runtime.output_file import whole

__all__ = [
    "FIDELITY",
    "CheckpointSummary",
    "EndToEnd",
    "FidelityReport",
    "Wanted",
    "check_gates",
    "measure",
    "read_report",
    "report_text",
    "write_report",
]

FIDELITY = "fidelity.json"  # inside a quantized checkpoint
SCHEMA, VERSION = "edgevl.fidelity", 2
_READ = (1, VERSION)  # they have the same keys


@dataclass(frozen=True)
class CheckpointSummary:
    name: str
    nbytes: int
    decoder_bits: float
    quantization: dict[str, Any] | None
    kv_cache: str


@dataclass(frozen=True)
class EndToEnd:
    """`Divergence` with 95 % intervals (None where there was one conversation), and of every conversation."""

    kl: float
    kl_interval: Interval | None
    top1: float
    top1_interval: Interval | None
    tokens: int
    conversations: tuple[Divergence, ...]


@dataclass(frozen=True)
class FidelityReport:
    """See the module's docstring."""

    original: CheckpointSummary
    quantized: CheckpointSummary
    divergence: EndToEnd | None
    layers: tuple[LinearReport, ...]
    hidden_errors: tuple[float, ...]
    folded: bool
    sensitivities: tuple[Sensitivity, ...]
    scores: tuple[TaskScore, ...]
    gates: tuple[Gate, ...]
    auto: AutoReport | None
    provenance: Mapping[str, Any]

    def to_dict(self) -> dict[str, Any]:
        return {"schema": SCHEMA, "version": VERSION, **asdict(self)}


@dataclass(frozen=True)
class Wanted:
    """What is measured beside the divergence, and the limits: granularities of sensitivities, cases (0: no scores) of
    which tasks, the largest KL, and the least scores by task."""

    granularities: tuple[str, ...] = ()
    cases: int = 0
    tasks: tuple[str, ...] = ()
    max_kl: float | None = None
    min_scores: Mapping[str, float] = field(default_factory=dict)


def measure(
    original: str | Path,
    quantized: str | Path,
    samples: Sequence[Sample],
    wanted: Wanted,
    scratch: Path,
    *,
    provenance: Mapping[str, Any] | None = None,
    name: str | None = None,
    auto: AutoReport | None = None,
    progress: Progress | None = None,
    notice: Callable[[str], None] | None = None,
) -> FidelityReport:
    """Measure a quantized checkpoint against its original on held-out samples.

    Args:
        scratch: a folder that is made for hidden states and bundles, and taken away again.
        provenance: what is known of how it was made.
        name: of the quantized checkpoint, where its folder will be called otherwise.

    Raises:
        InputError: the two do not belong together, or no samples for what needs them.
        EdgeVLError: as `compare`, `sensitivities` and `score_pair`.
    """
    if not samples and (wanted.granularities or wanted.max_kl is not None):
        raise InputError("divergence and sensitivities are measured on samples, none were given; pass --images")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    try:
        with FloatCheckpoint.open(original) as a, FloatCheckpoint.open(quantized) as b:
            result = compare(a, b, samples, scratch, progress)
            units = [u for granularity in wanted.granularities for u in units_of(b, granularity)]
            found = sensitivities(a, b, samples, units, scratch, progress) if units else []
            summaries = _summary(a), _summary(b, name, "int8" if has_int8_cache(b.stored) else "float")
        scores: list[TaskScore] = []
        if wanted.cases:
            scores = score_pair(original, quantized, wanted.tasks, wanted.cases, scratch, notice)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    divergence = _end_to_end(result.conversations) if result.conversations else None
    gates = score_gates(scores, wanted.min_scores)
    if wanted.max_kl is not None and divergence is not None:
        detail = "of one conversation, so without an interval"
        if divergence.kl_interval is not None:
            low, high = divergence.kl_interval
            detail = f"95 % interval {low:.4f} to {high:.4f} over {len(samples)} conversations"
        gates.insert(0, Gate("KL", wanted.max_kl, divergence.kl, divergence.kl <= wanted.max_kl, detail))
    return FidelityReport(
        *summaries,
        divergence,
        result.layers,
        result.hidden_errors,
        result.folded,
        tuple(found),
        tuple(scores),
        tuple(gates),
        auto,
        {**_EMPTY, "held_out": len(samples), **(provenance or {}), **_machine()},
    )


_EMPTY = {"recipe": None, "images": None, "samples": None, "held_out": None, "seed": None, "max_pixels": None}


def check_gates(report: FidelityReport, consequence: str = "") -> None:
    """Raises CheckFailedError naming every gate that does not hold, with numbers; `consequence` ends the message."""
    broken = [g for g in report.gates if not g.held]
    if broken:
        said = [
            f"{g.name} is {g.found:.4f}, at {'most' if g.name == 'KL' else 'least'} {g.limit:g} was asked ({g.detail})"
            for g in broken
        ]
        raise CheckFailedError("; ".join([*said, *([consequence] if consequence else [])]))


def write_report(path: Path, report: FidelityReport) -> None:
    """Write the document, all of it or nothing.

    Raises:
        OSError: the disk is full, or the file cannot be written.
    """
    with whole(path) as partial:
        partial.write_text(report_text(report), encoding="utf-8")


def report_text(report: FidelityReport) -> str:
    """The document itself."""
    return json.dumps(report.to_dict(), indent=1, ensure_ascii=False) + "\n"


def read_report(path: str | Path) -> dict[str, Any]:
    """The document of a `fidelity.json`, or of the one in a checkpoint's folder.

    Raises:
        InputError: no such file, no fidelity report, or one of a later version.
    """
    path = Path(path)
    path = path / FIDELITY if path.is_dir() else path
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise InputError(f"{path}: not readable as a fidelity report ({e})") from None
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        raise InputError(f"{path}: no fidelity report; expected a file that `edgevl fidelity` or `quantize` wrote")
    if data.get("version") not in _READ:
        raise InputError(
            f"{path}: version {data.get('version')} of the report, this edgevl reads {VERSION}; upgrade it"
        )
    return data


def _end_to_end(parts: Sequence[Divergence]) -> EndToEnd:
    whole, tokens = combined(parts), [float(d.tokens) for d in parts]
    kl = top1 = None
    if len(parts) > 1:
        kl, top1 = (bootstrap([getattr(d, key) for d in parts], tokens) for key in ("kl", "top1"))
    return EndToEnd(whole.kl, kl, whole.top1, top1, whole.tokens, tuple(parts))


def _summary(checkpoint: FloatCheckpoint, name: str | None = None, kv_cache: str = "float") -> CheckpointSummary:
    stored = checkpoint.stored
    nbytes = sum(stored.nbytes(name) for name in stored.names())
    linear = [n for n in stored.names() if n.startswith("model.layers.") and n.endswith("_proj.weight")]
    weights = sum(rows * columns for rows, columns in (stored.shape(n) for n in linear))
    bits = 8 * sum(stored.nbytes(n) for n in linear) / weights
    called = name or stored.folder.resolve().name
    return CheckpointSummary(called, nbytes, bits, stored.describe_quantization(), kv_cache)


def _machine() -> dict[str, Any]:
    return {"threads": torch.get_num_threads(), "machine": machine()}
