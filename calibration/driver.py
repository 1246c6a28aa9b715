"""Quantizes a checkpoint layer by layer, with one decoder layer in memory, and can go on after a kill.

Everything is written to a folder beside the target: one shard per layer, the hidden states that enter the next layer,
and `state.json`, which says what the run was asked. Samples run through the layers that are already quantized, so every
layer sees the inputs that it will have. The last step writes what stays as it is, the configs and the report, and
renames the folder. The same inputs and number of threads give the same bytes, resumed or not.
"""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from edgevl.calibration.activations import Activations
from edgevl.calibration.dataset import Sample
from edgevl.calibration.fidelity import Divergence, DivergenceSum
from edgevl.calibration.formats import BlockQuantized
from edgevl.calibration.gptq import HessianAccumulator, gptq_quantize, output_error, token_weights
from edgevl.calibration.grids import dequantized, round_to_nearest
from edgevl.calibration.kv_cache import CacheWatch, chained, rounded_cache
from edgevl.calibration.layer_report import LayerReport
from edgevl.calibration.layers import DECODER_GROUPS, Watch, decoder_layer
from edgevl.calibration.output import as_stored, pack_blocks, save_shard, shard_name, write_rest
from edgevl.calibration.recipes import PLAIN, Recipe
from edgevl.calibration.vision import block_file, quantize_tower, tower_reports
from edgevl.calibration.w8a8 import Int8Scheme, Statistics, decoder_points, quantize_block
from edgevl.calibration.weights import Head, embed_samples, layer_weights
from edgevl.runtime.checkpoint import Checkpoint
from edgevl.runtime.errors import CheckFailedError, CheckpointError, InputError
from edgevl.runtime.mrope import rotary_rows

__all__ = ["REPORT", "LayerReport", "QuantizeReport", "check_output", "fingerprint", "quantize_checkpoint"]

REPORT = "edgevl_quantize.json"
_ROWS = 32  # of logits at once: 20 MB with the released vocabulary
_WORK = ("*.npy", "layer-*.json", "vision-*.json", "vision-*.block")  # what a finished run takes away
_ACTIVATIONS: dict[str, Literal["token", "tensor"]] = {"int8": "token", "int8-static": "tensor"}
Progress = Callable[[int, int, str], None]  # layers done, layers in all, what is being done
Judge = Callable[[Path], None]  # of a complete folder that is not published yet
Begin = Callable[[Sample, Tensor, Tensor], None]  # the sample, and its rotary rows


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
        run = _Run(checkpoint, folder, recipe, samples, held_out, progress or (lambda *_: None))
        try:
            with torch.inference_mode():
                _prepare(run, resume)
                for layer in range(run.layers):
                    if not run.shard(layer).exists():
                        _quantize_layer(run, layer)
                divergence = _divergence(run)
            _gate(run, divergence, max_kl)
            layers = tuple(r for i in range(run.layers) for r in run.reports(i))
            if recipe.vision != "none":
                layers += tuple(tower_reports(folder, checkpoint.config.vision.depth))
            tokens = sum(len(s.ids) for s in samples)
            blocks = [block_file(folder, i) for i in range(checkpoint.config.vision.depth + 1)]
            write_rest(checkpoint, folder, run.layers, recipe, blocks if recipe.vision != "none" else ())
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


@dataclass
class _Run:
    """One run's state: where it works, on what."""

    checkpoint: Checkpoint
    folder: Path
    recipe: Recipe
    samples: Sequence[Sample]
    held_out: Sequence[Sample]
    progress: Progress
    rotary: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    @property
    def layers(self) -> int:
        return self.checkpoint.config.text.num_hidden_layers

    @property
    def streams(self) -> dict[str, Sequence[Sample]]:
        """Hidden states that are carried along: the samples, and the held-out ones through both models."""
        streams = {"samples": self.samples, "original": self.held_out, "quantized": self.held_out}
        if not (self.recipe.watches_decoder or self.recipe.kv_cache):
            del streams["samples"]
        return {name: some for name, some in streams.items() if some}

    def shard(self, layer: int) -> Path:
        return self.folder / shard_name(layer, self.layers)

    def hidden(self, stream: str, layer: int) -> Activations:
        """What enters `layer` (or the final norm)."""
        lengths = [len(s.ids) for s in self.streams[stream]]
        path = self.folder / f"{stream}-{layer:03d}.npy"
        return Activations(path, lengths, self.checkpoint.config.text.hidden_size)

    def outputs(
        self,
        stream: str,
        layer: int,
        weights: Mapping[str, Tensor],
        watch: Watch | None = None,
        begin: Begin | None = None,
    ) -> Iterator[Tensor]:
        """Outputs of one layer, sample by sample; `begin` is told of each before."""
        extra: dict[str, Any] = {} if watch is None else {"watch": watch}
        for sample, hidden in zip(self.streams[stream], self.hidden(stream, layer).read()):
            cos, sin = self._rows(sample)
            if begin is not None:
                begin(sample, cos, sin)
            yield decoder_layer(hidden, weights, cos, sin, self.checkpoint.config.text, **extra)

    def reports(self, layer: int) -> list[LayerReport]:
        rows = json.loads((self.folder / f"layer-{layer:03d}.json").read_text(encoding="utf-8"))
        return [LayerReport(**row) for row in rows]

    def _rows(self, sample: Sample) -> tuple[Tensor, Tensor]:
        if id(sample) not in self.rotary:
            cos, sin = rotary_rows(sample.positions, self.checkpoint.config.text)
            self.rotary[id(sample)] = torch.from_numpy(cos), torch.from_numpy(sin)
        return self.rotary[id(sample)]


# ---------------------------------------------------------------------- before


def check_output(target: Path) -> None:
    """Raises InputError unless `target` can be made: its folder is there, itself is not."""
    if not target.parent.is_dir():
        raise InputError(f"{target.parent}: no such folder; create it, or choose another output")
    if target.exists():
        raise InputError(f"{target}: exists already; choose another output, or remove it first")


def _check_recipe(
    checkpoint: Checkpoint, recipe: Recipe, samples: Sequence[Sample], held_out: Sequence[Sample], max_kl: float | None
) -> None:
    if checkpoint.quantization is not None:
        raise InputError(
            f"{checkpoint.folder}: already quantized ({checkpoint.quantization.method}); give the original checkpoint"
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


def fingerprint(
    checkpoint: Checkpoint, recipe: Recipe, samples: Sequence[Sample], held_out: Sequence[Sample]
) -> dict[str, Any]:
    """What must be equal for a run to go on: the recipe, the weights' files and the samples. JSON."""
    digest = hashlib.sha256()
    for sample in (*samples, *held_out):
        digest.update(sample.ids.tobytes() + sample.positions.tobytes())
        for picture in sample.vision:
            digest.update(np.ascontiguousarray(picture.pixel_values).data)
    files = {p.name: p.stat().st_size for p in sorted(checkpoint.folder.glob("*.safetensors"))}
    layers = checkpoint.config.text.num_hidden_layers
    return {"recipe": asdict(recipe), "weights": files, "samples": digest.hexdigest(), "layers": layers}


def _prepare(run: _Run, resume: bool) -> None:
    """The working folder with the hidden states that enter the first layer, or that of a run to go on with."""
    state = run.folder / "state.json"
    wanted = fingerprint(run.checkpoint, run.recipe, run.samples, run.held_out)
    if run.folder.exists() and not resume:
        shutil.rmtree(run.folder)
    if state.exists():
        found = json.loads(state.read_text(encoding="utf-8"))
        different = [key for key, value in wanted.items() if found.get(key) != value]
        if different:
            raise InputError(
                f"{run.folder}: was begun with other {', '.join(different)}; run without --resume to start over"
            )
    run.folder.mkdir(exist_ok=True)
    _replace(state, json.dumps(wanted))
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


def _quantize_vision(run: _Run) -> dict[str, Activations]:
    """The vision encoder's blocks into the working folder; image embeddings by stream."""
    scheme = Int8Scheme(_ACTIVATIONS[run.recipe.vision], run.recipe.vision_alpha)
    streams = {"samples": run.samples, **run.streams}
    return quantize_tower(run.checkpoint, run.folder, scheme, streams, lambda what: run.progress(0, run.layers, what))


# ---------------------------------------------------------------------- one layer


class _Observed:
    """The Hessians that a recipe needs of the inputs of one layer's linear layers, by point of DECODER_GROUPS."""

    def __init__(self, recipe: Recipe, layer: int, points: Sequence[str] = tuple(DECODER_GROUPS)) -> None:
        self._layer, self._points, self._recipe = layer, points, recipe
        self._by_point: dict[str, HessianAccumulator] = {}
        self._weights: tuple[Tensor, ...] = ()

    def begin(self, sample: Sample, *_: Tensor) -> None:
        """What comes next is of `sample`."""
        if self._recipe.visual_weight != 1.0:
            self._weights = (token_weights(torch.from_numpy(sample.visual), self._recipe.visual_weight),)

    def __call__(self, point: str, x: Tensor) -> None:
        if point not in self._points:
            return
        if point not in self._by_point:
            name = f"model.layers.{self._layer}, input of {point}"
            self._by_point[point] = HessianAccumulator(x.shape[-1], name)
        self._by_point[point].add(x, *self._weights)

    def hessian(self, point: str) -> Tensor | None:
        return self._by_point[point].hessian if point in self._by_point else None

    def forget(self, point: str) -> None:
        """The largest Hessian is K² of the MLP's width."""
        self._by_point.pop(point, None)


@dataclass
class _Quantized:
    """One quantized layer: the tensors to write, the weights it computes with now, and how it went."""

    tensors: dict[str, Tensor]
    weights: dict[str, Tensor]
    reports: list[LayerReport]
    watch: Watch | None = None  # rounds activations as the kernels will


def _quantize_layer(run: _Run, layer: int) -> None:
    """Statistics with the original weights, codes, and the layer's outputs with the quantized ones."""
    run.progress(layer, run.layers, "calibrating")
    weights = layer_weights(run.checkpoint, layer)
    done = {"w8a8": _to_channels, "none": _as_it_is}.get(run.recipe.method, _to_blocks)(run, layer, weights)
    packed = {name.rpartition(".")[0] for name in done.tensors}
    for name, value in done.weights.items():
        full = f"model.layers.{layer}.{name}"
        if full.removesuffix(".weight") not in packed:
            # What smoothing has changed keeps its precision: bfloat16 has 8 bits too.
            same = torch.equal(value, weights[name])
            done.tensors[full] = as_stored(run.checkpoint, full, value) if same else value
    cache = CacheWatch(run.checkpoint.config.text, f"model.layers.{layer}") if run.recipe.kv_cache else None
    for stream in run.streams:  # samples come first: the cache's scales are those of the layer that will run
        rounded = rounded_cache(cache.observer.scales()) if cache and stream == "quantized" else None
        watch = chained(done.watch, cache if stream == "samples" else rounded)
        how = (weights, None) if stream == "original" else (done.weights, watch)
        begin = None if cache is None else lambda _, cos, sin: cache.begin(cos, sin)
        run.hidden(stream, layer + 1).write(run.outputs(stream, layer, *how, begin=begin))
    if cache is not None:
        done.tensors |= cache.tensors(f"model.layers.{layer}.self_attn")
    _replace(run.folder / f"layer-{layer:03d}.json", json.dumps([asdict(r) for r in done.reports]))
    save_shard(run.shard(layer), done.tensors)
    for stream in run.streams:
        run.hidden(stream, layer).remove()


def _observed(run: _Run, layer: int, weights: Mapping[str, Tensor], point: str | None = None) -> _Observed:
    """The samples through one layer, watched at `point` or everywhere."""
    seen = _Observed(run.recipe, layer) if point is None else _Observed(run.recipe, layer, (point,))
    if run.recipe.watches_decoder:
        for _ in run.outputs("samples", layer, weights, seen, seen.begin):
            pass
    return seen


def _as_it_is(run: _Run, layer: int, weights: Mapping[str, Tensor]) -> _Quantized:
    return _Quantized({}, dict(weights), [])


def _to_blocks(run: _Run, layer: int, weights: Mapping[str, Tensor]) -> _Quantized:
    """Weight-only codes in blocks."""
    first = next(iter(DECODER_GROUPS)) if run.recipe.true_sequential else None
    done, seen = _Quantized({}, dict(weights), []), _observed(run, layer, weights, first)
    for number, (point, names) in enumerate(DECODER_GROUPS.items()):
        if number and run.recipe.true_sequential:
            run.progress(layer, run.layers, f"input of {point}")
            seen = _observed(run, layer, done.weights, point)
        for name in names:
            run.progress(layer, run.layers, name)
            full = f"model.layers.{layer}.{name}"
            if run.recipe.bits_of(full) == PLAIN:
                plain = f"{full}.weight"
                done.tensors[plain] = as_stored(run.checkpoint, plain, weights[f"{name}.weight"])
                done.reports.append(LayerReport(full, PLAIN, 0.0, 0.0, None))
                continue
            codes, report = _quantize_weight(run.recipe, full, weights[f"{name}.weight"], seen.hessian(point))
            done.weights[f"{name}.weight"] = dequantized(codes)
            done.tensors |= {f"{full}.{k}": torch.from_numpy(v) for k, v in pack_blocks(run.recipe, codes).items()}
            done.reports.append(report)
        seen.forget(point)
    return done


def _to_channels(run: _Run, layer: int, weights: Mapping[str, Tensor]) -> _Quantized:
    """int8 per output channel, after smoothing; statistics of text and visual tokens apart."""
    prefix, points = f"model.layers.{layer}", decoder_points(run.checkpoint.config.text)
    seen = Statistics(points, prefix)
    outputs = run.outputs("samples", layer, weights, seen)
    for sample in run.samples:
        seen.visual = torch.from_numpy(sample.visual)
        next(outputs)
    block = quantize_block(weights, seen, points, Int8Scheme(run.recipe.activations, run.recipe.alpha), prefix)
    tensors = {f"{prefix}.{name}": value for name, value in block.tensors.items()}
    return _Quantized(tensors, block.weights, block.reports, block.watch)


def _quantize_weight(
    recipe: Recipe, name: str, weight: Tensor, hessian: Tensor | None
) -> tuple[BlockQuantized, LayerReport]:
    bits = recipe.bits_of(name)
    grid: dict[str, Any] = {"bits": bits, "group_size": recipe.group_size, "symmetric": recipe.symmetric}
    if recipe.method == "gptq" and hessian is not None:
        done = gptq_quantize(weight, hessian, **grid, clip=recipe.clip)
        return done.weight, LayerReport(name, bits, done.error, done.rtn_error, done.damping)
    importance = None if hessian is None or not recipe.clip else hessian.diagonal()
    codes = round_to_nearest(weight, **grid, importance=importance)
    if hessian is None:
        return codes, LayerReport(name, bits, None, None, None)
    error = output_error(weight, dequantized(codes), hessian)
    return codes, LayerReport(name, bits, error, error, None)


# ---------------------------------------------------------------------- after


def _divergence(run: _Run) -> Divergence | None:
    """Over the held-out positions whose next token is text: nobody samples after a picture's token."""
    if not run.held_out:
        return None
    run.progress(run.layers, run.layers, "held-out samples")
    total, head = DivergenceSum(), Head(run.checkpoint)
    pairs = zip(run.held_out, *(run.hidden(s, run.layers).read() for s in ("original", "quantized")))
    for sample, original, quantized in pairs:
        wanted = torch.from_numpy(~sample.visual)
        for some in zip(original[wanted].split(_ROWS), quantized[wanted].split(_ROWS)):
            total.add(*(head(hidden) for hidden in some))
    return total.result()


def _gate(run: _Run, divergence: Divergence | None, max_kl: float | None) -> None:
    if max_kl is not None and divergence is not None and divergence.kl > max_kl:
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


def _finish(run: _Run, target: Path, report: QuantizeReport) -> None:
    for path in (*(p for kind in _WORK for p in run.folder.glob(kind)), run.folder / "state.json"):
        path.unlink()
    _replace(run.folder / REPORT, json.dumps(report.to_dict(), indent=1) + "\n")
    run.folder.rename(target)


def _replace(path: Path, text: str) -> None:
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
