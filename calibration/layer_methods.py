"""One decoder layer by a recipe: statistics with the original weights, codes, outputs with the quantized ones.

Knows one layer and the run's hidden states around it; the order of layers is the driver's.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from edgevl.calibration.dataset import Sample
from edgevl.calibration.formats import BlockQuantized
from edgevl.calibration.gptq import HessianAccumulator, gptq_quantize, output_error, token_weights
from edgevl.calibration.grids import dequantized, round_to_nearest
from edgevl.calibration.kv_cache import CacheWatch, chained, rounded_cache
from edgevl.calibration.layer_report import LayerReport
from edgevl.calibration.layers import DECODER_GROUPS, Watch
from edgevl.calibration.output import as_stored, pack_blocks, save_shard
from edgevl.calibration.recipes import PLAIN, Recipe
from edgevl.calibration.run import Run, replace_file
from edgevl.calibration.w8a8 import Int8Scheme, Statistics, decoder_points, quantize_block
from edgevl.calibration.weights import layer_weights

__all__ = ["quantize_layer"]


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


def quantize_layer(run: Run, layer: int) -> None:
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
    replace_file(run.folder / f"layer-{layer:03d}.json", json.dumps([asdict(r) for r in done.reports]))
    save_shard(run.shard(layer), done.tensors)
    for stream in run.streams:
        run.hidden(stream, layer).remove()


def _observed(run: Run, layer: int, weights: Mapping[str, Tensor], point: str | None = None) -> _Observed:
    """The samples through one layer, watched at `point` or everywhere."""
    seen = _Observed(run.recipe, layer) if point is None else _Observed(run.recipe, layer, (point,))
    if run.recipe.watches_decoder:
        for _ in run.outputs("samples", layer, weights, seen, seen.begin):
            pass
    return seen


def _as_it_is(run: Run, layer: int, weights: Mapping[str, Tensor]) -> _Quantized:
    return _Quantized({}, dict(weights), [])


def _to_blocks(run: Run, layer: int, weights: Mapping[str, Tensor]) -> _Quantized:
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


def _to_channels(run: Run, layer: int, weights: Mapping[str, Tensor]) -> _Quantized:
    """int8 per output channel, after smoothing; statistics of text and visual tokens apart."""
    prefix, points = f"model.layers.{layer}", decoder_points(run.checkpoint.config.text)
    recipe = run.recipe
    seen = Statistics(points, prefix, hessians=recipe.feedback)
    outputs = run.outputs("samples", layer, weights, seen)
    for sample in run.samples:
        seen.visual = torch.from_numpy(sample.visual)
        next(outputs)
    scheme = Int8Scheme(recipe.activations, recipe.alpha, recipe.feedback)
    block = quantize_block(weights, seen, points, scheme, prefix)
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
