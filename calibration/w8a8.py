"""One block in W8A8: statistics of its inputs, smoothing, int8 weights, and activations as the kernels will round them.

Pure maths over one block's float weights, of the decoder or of the vision encoder; knows neither files nor models.
fc2 and the merger's second layer stand behind an activation function, into which no factor folds. Where a static scale
needs smoothing there too, the factors become a tensor of their own, `pre_quant_scale`, with which the engine multiplies
the input, as in ModelOpt's checkpoints; a scale per token needs none (measured: benchmarks/LOG.md).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from edgevl.calibration.formats import ChannelQuantized, quantize_channels
from edgevl.calibration.gptq import HessianAccumulator, gptq_quantize
from edgevl.calibration.layer_report import LayerReport
from edgevl.calibration.layers import DECODER_GROUPS, MERGER_GROUPS, VISION_GROUPS, Watch
from edgevl.calibration.observers import ModalityObserver
from edgevl.calibration.packing import pack_int8
from edgevl.calibration.smooth import (
    ALPHAS,
    Activations,
    Share,
    column_absmax,
    kv_share,
    merger_share,
    round_activations,
    search_alpha,
    smooth_decoder_layer,
    smooth_factors,
    smooth_merger,
    smooth_vision_block,
    static_scale,
    w8a8_error,
)
from edgevl.runtime.config import TextConfig, VisionConfig

__all__ = [
    "AFFINE",
    "Int8Block",
    "Int8Scheme",
    "Points",
    "Smoothing",
    "Statistics",
    "decoder_points",
    "merger_points",
    "quantize_block",
    "rounding",
    "smooth_block",
    "vision_points",
]

AFFINE = ("down",)  # of a decoder layer
_ROWS = 1024  # tokens of a point that the search of alpha sees: 36 MB at down_proj's input of the 2B


@dataclass(frozen=True)
class Int8Scheme:
    """How activations become int8.

    activations: "token" (every token's own scale, found at run time) or "tensor" (one, fixed by calibration).
    alpha: of smoothing; None: the one of ALPHAS, or no smoothing, with the least output error, point by point.
    feedback: weights by GPTQ, which spreads every column's error over the later ones, instead of to nearest.
    """

    activations: Activations
    alpha: float | None
    feedback: bool = False


@dataclass(frozen=True)
class Points:
    """The inputs of a kind of block: layers by point, `folds` in the order in which factors are folded, `behind`: those
    without a fold; `affine`: those for which scales per token come with zero points."""

    groups: Mapping[str, tuple[str, ...]]
    folds: tuple[str, ...]
    behind: tuple[str, ...]
    share: Mapping[str, Share]
    fold: Callable[[dict[str, Tensor], Mapping[str, Tensor], float], dict[str, Tensor]]
    affine: tuple[str, ...] = ()

    def kind(self, point: str, activations: Activations) -> Activations:
        return "affine" if activations == "token" and point in self.affine else activations


def decoder_points(config: TextConfig) -> Points:
    def fold(weights: dict[str, Tensor], absmax: Mapping[str, Tensor], alpha: float) -> dict[str, Tensor]:
        return smooth_decoder_layer(weights, absmax, alpha, config)

    return Points(DECODER_GROUPS, ("down", "o", "qkv", "gate_up"), (), {"o": kv_share(config)}, fold, AFFINE)


def vision_points(config: VisionConfig) -> Points:
    def fold(weights: dict[str, Tensor], absmax: Mapping[str, Tensor], alpha: float) -> dict[str, Tensor]:
        return smooth_vision_block(weights, absmax, alpha, config)

    return Points(VISION_GROUPS, ("proj", "qkv", "fc1"), ("fc2",), {}, fold)


def merger_points(config: VisionConfig) -> Points:
    def fold(weights: dict[str, Tensor], absmax: Mapping[str, Tensor], alpha: float) -> dict[str, Tensor]:
        return smooth_merger(weights, absmax, alpha, config)

    return Points(MERGER_GROUPS, ("mlp.0",), ("mlp.2",), {"mlp.0": merger_share(config)}, fold)


# ---------------------------------------------------------------------- statistics


class _Rows:
    """Every n-th token, n doubling so that at most _ROWS are kept: the same ones whatever the pace."""

    def __init__(self) -> None:
        self._kept: list[Tensor] = []
        self._seen, self._every = 0, 1

    def add(self, x: Tensor) -> None:
        self._kept += [row.clone() for row in x[-self._seen % self._every :: self._every]]
        self._seen += len(x)
        while len(self._kept) > _ROWS:
            self._kept, self._every = self._kept[::2], self._every * 2

    def tensor(self) -> Tensor:
        return torch.stack(self._kept)


class Statistics:
    """A watcher of one block: ranges of text and visual tokens apart, some tokens as they are, and Hessians where they
    are asked for, by point.

    Attributes:
        visual: bool [tokens] of the sequence that comes next, True for a picture's; None: all are.
    """

    def __init__(self, points: Points, where: str, *, hessians: bool = False) -> None:
        """`where` stands in errors."""
        self.visual: Tensor | None = None
        self.ranges: dict[str, ModalityObserver] = {}
        self._points, self._where = points, where
        self._rows: dict[str, _Rows] = {}
        self._hessians: dict[str, HessianAccumulator] | None = {} if hessians else None

    def __call__(self, point: str, x: Tensor) -> None:
        if point not in self._points.groups:
            return
        if point not in self.ranges:
            self.ranges[point] = ModalityObserver(x.shape[-1], f"{self._where}, input of {point}")
            self._rows[point] = _Rows()
            if self._hessians is not None:
                self._hessians[point] = HessianAccumulator(x.shape[-1], self.ranges[point].name)
        visual = torch.ones(len(x), dtype=torch.bool) if self.visual is None else self.visual
        self.ranges[point].add(x, visual)
        self._rows[point].add(x)
        if self._hessians is not None:
            self._hessians[point].add(x)

    def absmax(self, point: str) -> Tensor:
        """[K], over all tokens."""
        return self.ranges[point].together().absmax

    def take_hessian(self, point: str) -> Tensor | None:
        """[K, K], the caller's from now on: the largest one is as large as a layer."""
        return None if self._hessians is None else self._hessians.pop(point).hessian

    def rows(self, point: str) -> Tensor:
        """[at most 1024, K]."""
        return self._rows[point].tensor()


# ---------------------------------------------------------------------- one block


@dataclass
class Int8Block:
    """A quantized block: tensors to write by name within it, the weights it computes with now (norms and biases as
    smoothing left them), how it rounds activations, and how it went."""

    tensors: dict[str, Tensor]
    weights: dict[str, Tensor]
    watch: Watch
    reports: list[LayerReport]


@dataclass
class Smoothing:
    """What was decided for one input: factors [K] (None: not smoothed) with their alpha, what the engine multiplies
    with (`pre`) where they could not be folded, and the static scale (None: one per token)."""

    factors: Tensor | None = None
    alpha: float | None = None
    pre: Tensor | None = None
    scale: float | None = None


def smooth_block(
    weights: dict[str, Tensor], seen: Statistics, points: Points, scheme: Int8Scheme
) -> dict[str, Smoothing]:
    """Smooth a block in place, exactly: nothing is rounded yet.

    Args:
        weights: of one block, float32, by their names within it.
        seen: of the block with these weights.

    Raises:
        InputError, EngineError: as smooth_factors.
    """
    return {point: _decide(weights, seen, points, scheme, point) for point in (*points.folds, *points.behind)}


def quantize_block(
    weights: Mapping[str, Tensor], seen: Statistics, points: Points, scheme: Int8Scheme, prefix: str
) -> Int8Block:
    """int8 codes per output channel after smoothing; `weights` stays as it was, `prefix` is of the block's names in
    the checkpoint, for the reports; else as `smooth_block`."""
    smooth = {name: value.clone() for name, value in weights.items()}
    found = smooth_block(smooth, seen, points, scheme)
    pre = {point: f.pre for point, f in found.items() if f.pre is not None}
    block = Int8Block({}, smooth, rounding({p: f.scale for p, f in found.items()}, pre, points.affine), [])
    for point, names in points.groups.items():
        decided, absmax = found[point], seen.absmax(point)
        hessian = seen.take_hessian(point) if scheme.feedback else None
        if hessian is not None and decided.factors is not None:  # of the inputs as they will be
            hessian.div_(decided.factors[:, None]).div_(decided.factors)
        for name in names:
            weight = smooth[f"{name}.weight"]
            codes = quantize_channels(weight.numpy()) if hessian is None else _with_feedback(weight, hessian)
            smooth[f"{name}.weight"] = torch.from_numpy(codes.codes * codes.scales[:, None])
            block.tensors |= {f"{name}.{k}": torch.from_numpy(v) for k, v in pack_int8(codes).items()}
            if decided.scale is not None:
                block.tensors[f"{name}.input_scale"] = torch.tensor([decided.scale])
            if decided.pre is not None:
                block.tensors[f"{name}.pre_quant_scale"] = decided.pre.clone()
            kind = points.kind(point, scheme.activations)
            three = weights[f"{name}.weight"], weight, smooth[f"{name}.weight"]
            error = _errors(seen.rows(point), *three, decided, absmax, kind)
            block.reports.append(_report(f"{prefix}.{name}", seen.ranges[point], decided, *error))
    return block


def _decide(weights: dict[str, Tensor], seen: Statistics, points: Points, scheme: Int8Scheme, point: str) -> Smoothing:
    """Smooth one input in place."""
    behind = point in points.behind
    found, absmax = Smoothing(), seen.absmax(point)
    static = scheme.activations == "tensor"
    names = points.groups[point]
    if not behind or static:
        found.alpha = scheme.alpha
        if scheme.alpha is None:
            joined = torch.cat([weights[f"{name}.weight"] for name in names])
            search = search_alpha(
                seen.rows(point),
                joined,
                activations=points.kind(point, scheme.activations),
                alphas=ALPHAS,
                share=points.share.get(point),
                absmax=absmax,
            )
            found.alpha = search.best if search.error < search.unsmoothed else None
    if found.alpha is not None:
        if behind:
            found.factors = smooth_factors(absmax, column_absmax(weights, names), found.alpha)
            for name in names:
                weights[f"{name}.weight"].mul_(found.factors)
            found.pre = 1 / found.factors
        else:
            found.factors = points.fold(weights, {point: absmax}, found.alpha)[point]
    if static:
        found.scale = static_scale(float((absmax if found.factors is None else absmax / found.factors).max()))
    return found


def _with_feedback(weight: Tensor, hessian: Tensor) -> ChannelQuantized:
    found = gptq_quantize(
        weight, hessian, bits=8, group_size=-1, symmetric=True, clip=False, scale_dtype=torch.float32
    ).weight
    codes = found.codes.reshape(weight.shape).astype(np.int16) - 128
    return ChannelQuantized(codes.astype(np.int8), found.scales[:, 0])


def _errors(
    x: Tensor,
    original: Tensor,
    smoothed: Tensor,
    rounded: Tensor,
    decided: Smoothing,
    absmax: Tensor,
    kind: Activations,
) -> tuple[float, float]:
    """Output error of a layer as it is now, and as it would be without the method: not smoothed, to nearest."""
    plain = w8a8_error(x, original, activations=kind, absmax=absmax)
    # The rows may have been divided too (up_proj's, v_proj's): as a share of the output that changes nothing much.
    weight = smoothed if decided.factors is None else smoothed / decided.factors
    return w8a8_error(x, weight, decided.factors, activations=kind, absmax=absmax, rounded=rounded), plain


def _report(name: str, ranges: ModalityObserver, decided: Smoothing, error: float, plain: float) -> LayerReport:
    text, visual = ranges.text.absmax, ranges.visual.absmax
    factors = 1 if decided.factors is None else decided.factors
    before, after = ([float(m.max()) for m in pair] for pair in ((text, visual), (text / factors, visual / factors)))
    return LayerReport(name, 8, error, plain, None, decided.alpha, *before, *after, decided.scale)


def rounding(
    scales: Mapping[str, float | None], pre: Mapping[str, Tensor] | None = None, affine: Sequence[str] = ()
) -> Watch:
    """A watcher that gives the layers at the points of `scales` rounded activations: with one scale, or (None) with
    every token's own, and its own zero point at the points of `affine`; multiplied with `pre` first."""
    pre = pre or {}

    def watch(point: str, x: Tensor) -> Tensor | None:
        if point not in scales:
            return None
        return round_activations(x * pre[point] if point in pre else x, scales[point], affine=point in affine)

    return watch
