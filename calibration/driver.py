"""Quantizes a checkpoint layer by layer, with one decoder layer in memory, and can go on after a kill.

Everything is written to a folder beside the target: one shard per layer, the hidden states that enter the next layer,
and `state.json`, which says what the run was asked. Samples run through the layers that are already quantized, so every
layer sees the inputs that it will have. The last step writes what stays as it is, the configs and the report, and
renames the folder. The same inputs and number of threads give the same bytes, resumed or not.
"""

from __future__ import annotations

import errno
import json
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from edgevl.calibration.activations import Activations
from edgevl.calibration.dataset import Sample
from edgevl.calibration.fidelity import Divergence, DivergenceSum
from edgevl.calibration.fingerprint import check_same_run, fingerprint
from edgevl.calibration.layer_methods import quantize_layer
from edgevl.calibration.layer_report import LayerReport
from edgevl.calibration.output import write_rest
from edgevl.calibration.recipes import Recipe
from edgevl.calibration.rotation import RotatedCheckpoint
from edgevl.calibration.run import Progress, Run, replace_file
from edgevl.calibration.vision import block_file, quantize_tower, tower_reports
from edgevl.calibration.w8a8 import Int8Scheme
from edgevl.calibration.weights import Head, embed_samples
from edgevl.runtime.checkpoint import Checkpoint
from edgevl.runtime.errors import CheckFailedError, CheckpointError, InputError

__all__ = [
    "REPORT",
    "LayerReport",
    "Progress",
    "QuantizeReport",
    "check_output",
    "check_still_free",
    "quantize_checkpoint",
]

REPORT = "edgevl_quantize.json"
_ROWS = 32  # of logits at once: 20 MB with the released vocabulary
_WORK = ("*.npy", "layer-*.json", "vision-*.json", "vision-*.block")  # what a finished run takes away
_ACTIVATIONS: dict[str, Literal["token", "tensor"]] = {"int8": "token", "int8-static": "tensor"}
Judge = Callable[[Path], None]  # of a complete folder that is not published yet


@dataclass(frozen=True)
class QuantizeReport:
    """What a run did. `divergence` is end to end on held-out samples, None where there were none."""

    output: Path
    recipe: Recipe
    samples: int
    tokens: int
    layers: tuple[LayerReport, ...]
    divergence: Divergence | None
    seconds: float
    nbytes: int

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "output": str(self.output)}


def quantize_checkpoint(
    source: str | Path,
    output: str | Path,
    recipe: Recipe,
    samples: Sequence[Sample],
    held_out: Sequence[Sample] = (),
    *,
    resume: bool = False,
    max_kl: float | None = None,
    progress: Progress | None = None,
    judge: Judge | None = None,
) -> QuantizeReport:
    """Write the quantized checkpoint `output`: in GPTQ's format, or compressed-tensors' where W8A8 is part of it;
    everything but the linear layers (and what smoothing folds into norms and biases) as it was.

    Args:
        samples: what the layers are calibrated on; may be empty where the recipe needs none.
        held_out: other samples, on which the divergence from the original is measured.
        resume: go on with a run that was killed; without it what such a run left is thrown away.
        max_kl: a gate: nothing is published when the divergence is larger.
        judge: looks at the complete folder before it is published, and may write beside the weights; where it raises
            CheckFailedError nothing is published.

    Raises:
        CheckpointError: the checkpoint cannot be read, or the disk is full.
        InputError: the output exists, no samples, a group size that does not divide, another run's leftovers.
        CheckFailedError: `max_kl` was exceeded, or `judge` said so.
    """
    started = time.monotonic()
    target = Path(output).absolute()
    check_output(target)
    with Checkpoint.open(source) as checkpoint:
        _check_recipe(checkpoint, recipe, samples, held_out, max_kl)
        folder = target.with_name(f".{target.name}.partial")
        rotated = recipe.rotate != "none"
        given = RotatedCheckpoint(checkpoint, recipe.rotate, recipe.rotate_seed) if rotated else checkpoint
        run = Run(given, folder, recipe, samples, held_out, progress or (lambda *_: None))
        try:
            with torch.inference_mode():
                _prepare(run, resume)
                for layer in range(run.layers):
                    if not run.shard(layer).exists():
                        quantize_layer(run, layer)
                divergence = _divergence(run)
            _gate(run, divergence, max_kl)
            layers = tuple(r for i in range(run.layers) for r in run.reports(i))
            if recipe.vision != "none":
                layers += tuple(tower_reports(folder, checkpoint.config.vision.depth))
            tokens = sum(len(s.ids) for s in samples)
            blocks = [block_file(folder, i) for i in range(checkpoint.config.vision.depth + 1)]
            write_rest(given, folder, run.layers, recipe, blocks if recipe.vision != "none" else ())
            if judge is not None:
                _judge(folder, judge)
            size = sum(f.stat().st_size for f in folder.glob("*.safetensors"))
            seconds = time.monotonic() - started
            report = QuantizeReport(Path(output), recipe, len(samples), tokens, layers, divergence, seconds, size)
            _finish(run, target, report)
        except OSError as e:
            if e.errno != errno.ENOSPC:
                raise CheckpointError(f"{target}: cannot be written ({e})") from None
            raise CheckpointError(f"{target}: the disk is full; free some space, then go on with --resume") from None
    return report


# ---------------------------------------------------------------------- before


def check_output(target: Path) -> None:
    """Raises InputError unless `target` can be made: its folder is there, itself is not."""
    if not target.parent.is_dir():
        raise InputError(f"{target.parent}: no such folder; create it, or choose another output")
    if target.exists():
        raise InputError(f"{target}: exists already; choose another output, or remove it first")


def check_still_free(target: Path, folder: Path) -> None:
    """Raises InputError where something came to lie at `target` while the result was made, which stays in `folder`."""
    if target.exists():
        raise InputError(
            f"{target}: was made by something else in the meantime; the result waits in {folder}: remove or rename "
            "what is there, then run again with --resume"
        )


def _check_recipe(
    checkpoint: Checkpoint, recipe: Recipe, samples: Sequence[Sample], held_out: Sequence[Sample], max_kl: float | None
) -> None:
    if checkpoint.quantization is not None:
        raise InputError(
            f"{checkpoint.folder}: already quantized ({checkpoint.quantization.method}); give the original checkpoint"
        )
    if checkpoint.cache.entries and not recipe.kv_cache:
        raise InputError(
            f"{checkpoint.folder}: has scales of a KV cache, which belong to its weights as they are and would be "
            "lost; add --kv-cache int8 for new ones, or give the original checkpoint"
        )
    if recipe.rotate != "none" and checkpoint.rotation is not None:
        raise InputError(
            f"{checkpoint.folder}: already rotated ({checkpoint.rotation['kind']}); leave --rotate away, or give the "
            "original checkpoint"
        )
    if recipe.needs_samples and not samples:
        raise InputError(
            f"recipe {recipe.name!r} calibrates on samples, none were given; pass pictures or conversations"
        )
    if max_kl is not None and not held_out:
        raise InputError("a limit on the divergence needs held-out samples; give more pictures")
    text = checkpoint.config.text
    widths = {"hidden_size": text.hidden_size, "intermediate_size": text.intermediate_size}
    widths["attention width"] = text.num_attention_heads * text.head_dim
    for name, width in widths.items():
        if recipe.group_size > 0 and width % recipe.group_size:
            raise InputError(
                f"group size {recipe.group_size} does not divide {name} {width}; choose one that does, or -1"
            )


def _prepare(run: Run, resume: bool) -> None:
    """The working folder with the hidden states that enter the first layer, or that of a run to go on with."""
    state = run.folder / "state.json"
    wanted = fingerprint(run.checkpoint, run.recipe, run.samples, run.held_out)
    if run.folder.exists() and not resume:
        shutil.rmtree(run.folder)
    if state.exists():
        check_same_run(run.folder, state, wanted)
    run.folder.mkdir(exist_ok=True)
    replace_file(state, json.dumps(wanted))
    if any(run.shard(i).exists() for i in range(run.layers)):
        return
    embeds = _quantize_vision(run) if run.recipe.vision != "none" else {}
    for stream, samples in run.streams.items():
        first = run.hidden(stream, 0)
        if not first.exists:
            run.progress(0, run.layers, f"pictures ({stream})")
            pictures = embeds[stream].read() if stream in embeds else None
            first.write(embed_samples(run.checkpoint, samples, run.folder / "vision.npy", pictures))
    for stream in embeds.values():
        stream.remove()


def _quantize_vision(run: Run) -> dict[str, Activations]:
    """The vision encoder's blocks into the working folder; image embeddings by stream."""
    scheme = Int8Scheme(_ACTIVATIONS[run.recipe.vision], run.recipe.vision_alpha)
    streams = {"samples": run.samples, **run.streams}
    return quantize_tower(run.checkpoint, run.folder, scheme, streams, lambda what: run.progress(0, run.layers, what))


# ---------------------------------------------------------------------- after


def _divergence(run: Run) -> Divergence | None:
    """Over the `measured` positions of the held-out samples."""
    if not run.held_out:
        return None
    run.progress(run.layers, run.layers, "held-out samples")
    total, head = DivergenceSum(), Head(run.checkpoint)
    pairs = zip(run.held_out, *(run.hidden(s, run.layers).read() for s in ("original", "quantized")))
    for sample, original, quantized in pairs:
        wanted = torch.from_numpy(sample.measured)
        for some in zip(original[wanted].split(_ROWS), quantized[wanted].split(_ROWS)):
            total.add(*(head(hidden) for hidden in some))
    return total.result()


def _gate(run: Run, divergence: Divergence | None, max_kl: float | None) -> None:
    if max_kl is not None and divergence is not None and not divergence.kl <= max_kl:
        shutil.rmtree(run.folder)
        raise CheckFailedError(
            f"KL to the original is {divergence.kl:.4f}, at most {max_kl} was asked; nothing was written: try a "
            "smaller group, more samples, or --auto, which gives the most sensitive layers more bits"
        )


def _judge(folder: Path, judge: Judge) -> None:
    try:
        judge(folder)
    except CheckFailedError:
        shutil.rmtree(folder)
        raise


def _finish(run: Run, target: Path, report: QuantizeReport) -> None:
    """Take away what only a run that goes on needs, once nothing is in the way any more, and publish the rest."""
    check_still_free(target, run.folder)
    replace_file(run.folder / REPORT, json.dumps(report.to_dict(), indent=1) + "\n")
    for path in (*(p for kind in _WORK for p in run.folder.glob(kind)), run.folder / "state.json"):
        path.unlink()
    run.folder.rename(target)
