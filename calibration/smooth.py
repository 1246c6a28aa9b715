"""SmoothQuant: moving the size of activations into the weights, exactly, before both become int8.

Pure maths over one block's float weights, named as in edgevl.calibration.layers; knows neither files nor models.
Channel j of a linear layer's input is divided by s_j and the layer's column j multiplied by it (Xiao et al., arXiv
2211.10438, section 4); the division is folded into whatever makes that input:

    input_layernorm ─► q, k, v        v rows ─► o_proj          norm1 ─► attn.qkv      v rows of qkv ─► attn.proj
    post_attention_layernorm ─► gate, up    up rows ─► down_proj    norm2 ─► mlp.fc1       ln_q ─► merger.mlp.0

fc2 stays: quick_gelu lies in front of it, through which no factor can pass.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from edgevl.runtime.config import TextConfig, VisionConfig
from edgevl.runtime.errors import EngineError, InputError

__all__ = [
    "ALPHAS",
    "AlphaSearch",
    "Share",
    "column_absmax",
    "kv_share",
    "merger_share",
    "round_activations",
    "search_alpha",
    "smooth_decoder_layer",
    "smooth_factors",
    "smooth_merger",
    "smooth_vision_block",
    "static_scale",
    "w8a8_error",
]

Weights = MutableMapping[str, Tensor]
Share = tuple[int, int, int]  # channels as [outer, shared, inner]: one factor along the middle axis
Alpha = float | Mapping[str, float]
Activations = Literal["token", "affine", "tensor"]

ALPHAS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
_FLOOR = 1e-5  # of the largest: below it a column of weights is taken for that large
_LIMIT = 1e4  # factors stay between 1 / this and this, so that fp16 still holds what they are folded into


# ---------------------------------------------------------------------- factors


def kv_share(config: TextConfig) -> Share:
    """Of o_proj's input: the query heads of a kv head share its values, so channel d of all of them has one factor."""
    return config.num_key_value_heads, config.num_attention_heads // config.num_key_value_heads, config.head_dim


def merger_share(config: VisionConfig) -> Share:
    """Of merger.mlp.0's input: spatial_merge_size² patches side by side, all from one ln_q."""
    return 1, config.spatial_merge_size**2, config.embed_dim


def smooth_factors(activation: Tensor, weight: Tensor, alpha: float, share: Share | None = None) -> Tensor:
    """s_j = max|x_j|^alpha / max|w_j|^(1 - alpha), equation 4 of the paper.

    Channels that share a factor take the maxima over all of them. A channel that was never used keeps 1; a column
    without weights counts as 1e-5 of the largest; factors stay within 1e-4 .. 1e4.

    Args:
        activation: [K], max |x_j|.
        weight: [K], max |w_j| over all layers that read x (`column_absmax`).
        alpha: 0 (all in the activations) to 1 (all in the weights).
        share: [outer, shared, inner] with K entries.

    Returns:
        [K], of activation's dtype.

    Raises:
        InputError: an alpha outside 0 .. 1.
        ValueError: another shape.
        EngineError: maxima that are negative or not finite.
    """
    if not 0 <= alpha <= 1:
        raise InputError(f"alpha is {alpha}, expected 0 to 1")
    share = share or (len(activation), 1, 1)
    if activation.shape != weight.shape or activation.shape != (share[0] * share[1] * share[2],):
        raise ValueError(f"maxima {tuple(activation.shape)} and {tuple(weight.shape)} for channels {share}")
    for maxima in (activation, weight):
        if not (torch.isfinite(maxima).all() and (maxima >= 0).all()):
            raise EngineError("maxima of activations or weights are negative or not finite")
    x, w = activation.view(share).amax(1, keepdim=True), weight.view(share).amax(1, keepdim=True)
    if not w.any():
        return torch.ones_like(activation)
    factors = x**alpha / w.clamp(min=_FLOOR * float(w.max())) ** (1 - alpha)
    factors = torch.where(x > 0, factors.clamp(1 / _LIMIT, _LIMIT), 1.0)
    return factors.expand(share).flatten()


def column_absmax(weights: Mapping[str, Tensor], layers: Sequence[str]) -> Tensor:
    """[K]: the largest magnitude in every column, over the layers that share an input."""
    return torch.stack([weights[f"{name}.weight"].abs().amax(0) for name in layers]).amax(0)


# ---------------------------------------------------------------------- folding


def _divide_norm(weights: Weights, norm: str, factors: Tensor) -> None:
    weights[f"{norm}.weight"].div_(factors)
    if f"{norm}.bias" in weights:  # LayerNorm: out = normed * weight + bias
        weights[f"{norm}.bias"].div_(factors)


def _divide_rows(weights: Weights, layer: str, factors: Tensor, first: int = 0) -> None:
    """Rows `first` and on of a linear layer, and of its bias, which is part of what the next layer reads."""
    rows = slice(first, first + len(factors))
    weights[f"{layer}.weight"][rows].div_(factors[:, None])
    if f"{layer}.bias" in weights:
        weights[f"{layer}.bias"][rows].div_(factors)


def _multiply_columns(weights: Weights, layers: Sequence[str], factors: Tensor) -> None:
    for name in layers:
        weights[f"{name}.weight"].mul_(factors)


def _once(factors: Tensor, share: Share) -> Tensor:
    """[K] -> [outer * inner]: every shared factor once, in the producer's order."""
    return factors.view(share)[:, 0].flatten()


@dataclass(frozen=True)
class _Point:
    consumers: tuple[str, ...]
    norm: str = ""  # the producer: a norm,
    rows: str = ""  # or the rows of a linear layer,
    first: int = 0  # from this one on
    share: Share | None = None


def _smooth(
    weights: Weights, absmax: Mapping[str, Tensor], alpha: Alpha, points: Mapping[str, _Point]
) -> dict[str, Tensor]:
    unknown = set(absmax) - set(points)
    if not isinstance(alpha, (int, float)):
        unknown |= set(absmax) - set(alpha)
    if unknown:
        raise InputError(f"points {sorted(unknown)} have no fold or no alpha; expected some of {', '.join(points)}")
    found: dict[str, Tensor] = {}
    for name, point in points.items():
        if name not in absmax:
            continue
        strength = alpha if isinstance(alpha, (int, float)) else alpha[name]
        columns = column_absmax(weights, point.consumers)
        factors = smooth_factors(absmax[name].to(columns), columns, strength, point.share)
        producer = factors if point.share is None else _once(factors, point.share)
        if point.norm:
            _divide_norm(weights, point.norm, producer)
        else:
            _divide_rows(weights, point.rows, producer, point.first)
        _multiply_columns(weights, point.consumers, factors)
        found[name] = factors
    return found


def smooth_decoder_layer(
    weights: Weights, absmax: Mapping[str, Tensor], alpha: Alpha, config: TextConfig
) -> dict[str, Tensor]:
    """Fold factors into one decoder layer, in place; its output stays what it was. Undefined weights after an error.

    Args:
        weights: DECODER_TENSORS, float, writable.
        absmax: max |x_j| of the *unsmoothed* layer at the points to smooth ("qkv", "o", "gate_up", "down"), each [K].
        alpha: one for all, or one for each point.
        config: for the heads.

    Returns:
        The factors [K] of every point: the activations there are divided by them from now on, so static scales are
        those of absmax / factors.

    Raises:
        InputError: a point that has no fold or no alpha, or an alpha outside 0 .. 1.
        ValueError, EngineError: as `smooth_factors`.
    """
    attn = "self_attn"
    points = {  # what divides rows goes first: the others then weigh the rows as they will be
        "down": _Point(("mlp.down_proj",), rows="mlp.up_proj"),
        "o": _Point((f"{attn}.o_proj",), rows=f"{attn}.v_proj", share=kv_share(config)),
        "qkv": _Point((f"{attn}.q_proj", f"{attn}.k_proj", f"{attn}.v_proj"), norm="input_layernorm"),
        "gate_up": _Point(("mlp.gate_proj", "mlp.up_proj"), norm="post_attention_layernorm"),
    }
    return _smooth(weights, absmax, alpha, points)


def smooth_vision_block(
    weights: Weights, absmax: Mapping[str, Tensor], alpha: Alpha, config: VisionConfig
) -> dict[str, Tensor]:
    """As `smooth_decoder_layer`, for a block of the vision encoder (VISION_TENSORS): "qkv", "proj", "fc1"."""
    points = {
        "proj": _Point(("attn.proj",), rows="attn.qkv", first=2 * config.embed_dim),
        "qkv": _Point(("attn.qkv",), norm="norm1"),
        "fc1": _Point(("mlp.fc1",), norm="norm2"),
    }
    return _smooth(weights, absmax, alpha, points)


def smooth_merger(
    weights: Weights, absmax: Mapping[str, Tensor], alpha: Alpha, config: VisionConfig
) -> dict[str, Tensor]:
    """As `smooth_decoder_layer`, for the merger (`ln_q`, `mlp.0`): "mlp.0"."""
    return _smooth(weights, absmax, alpha, {"mlp.0": _Point(("mlp.0",), norm="ln_q", share=merger_share(config))})


# ---------------------------------------------------------------------- alpha


@dataclass(frozen=True)
class AlphaSearch:
    """Relative squared output errors in W8A8: `best` of all alphas tried, and without smoothing."""

    best: float
    error: float
    unsmoothed: float
    errors: dict[float, float]


def _round_weight(weight: Tensor) -> Tensor:
    """Symmetric int8 per output channel, as formats.quantize_channels."""
    scale = weight.abs().amax(1, keepdim=True) / 127
    scale = torch.where(scale == 0, 1.0, scale)
    return torch.round(weight / scale).clamp_(-127, 127) * scale


def static_scale(absmax: float) -> float:
    """The scale, exact in float32, with which the int8 codes -127 .. 127 hold -absmax .. absmax; 1 for nothing seen."""
    return float(np.float32(absmax / 127)) or 1.0


def round_activations(x: Tensor, scale: float | None = None, *, affine: bool = False) -> Tensor:
    """x [..., K] as the W8A8 kernels see it: int8 with one fixed `scale` (what lies outside is cut off), or in steps of
    every token's own.

    Those are of the token's largest magnitude: ONNX Runtime's DynamicQuantizeMatMul is given rows divided by it, and
    lays 256 codes between the least and the largest number of all rows (operator DynamicQuantizeLinear). So a step is
    1 / 127.5 of that magnitude where both signs reach it in some row, and 1 / 255 behind a GELU, where only one does.
    With `affine`, as down_proj's kernel has it, the codes lie between the extremes of each token.
    """
    if scale is not None:
        return torch.round(x / scale).clamp_(-128, 127) * scale
    if affine:
        low, high = x.amin(-1, keepdim=True).clamp_max(0), x.amax(-1, keepdim=True).clamp_min(0)
        step = ((high - low) / 255).clamp_min(1e-30)
        zero = torch.round(-low / step)
        return (torch.round(x / step) + zero).clamp_(0, 255).sub_(zero) * step
    largest = x.abs().amax(-1, keepdim=True).clamp_min(1e-30)
    unit = x / largest
    low, high = unit.amin().clamp_max(0), unit.amax().clamp_min(0)
    step = ((high - low) / 255).clamp_min(1e-30)
    zero = torch.round(-low / step)
    return (torch.round(unit / step) + zero).clamp_(0, 255).sub_(zero) * (step * largest)


def w8a8_error(
    x: Tensor,
    weight: Tensor,
    factors: Tensor | None = None,
    *,
    activations: Activations = "token",
    absmax: Tensor | None = None,
    rounded: Tensor | None = None,
) -> float:
    """Squared error of x Wᵀ in int8 as a share of its square.

    x: [T, K], whole sequences, first token included. weight: [N, K]. factors: [K], None for 1. activations: "token"
    (every token's step, as it comes), "affine" (with a zero point of its own) or "tensor" (one scale fixed
    beforehand). absmax: [K], of more tokens than x's, for that fixed scale. rounded: [N, K], what int8 holds of weight
    times factors; None: to nearest.
    """
    expected = x @ weight.T
    largest = x.abs().amax(0) if absmax is None else absmax
    if factors is not None:
        x, weight, largest = x / factors, weight * factors, largest / factors
    scale = static_scale(float(largest.max())) if activations == "tensor" else None
    found = (
        round_activations(x, scale, affine=activations == "affine")
        @ (_round_weight(weight) if rounded is None else rounded).T
    )
    total = float(torch.sum(expected.square(), dtype=torch.float64))
    return float(torch.sum((found - expected).square(), dtype=torch.float64)) / total if total else 0.0


def search_alpha(
    x: Tensor,
    weight: Tensor,
    *,
    activations: Activations = "token",
    alphas: Sequence[float] = ALPHAS,
    share: Share | None = None,
    absmax: Tensor | None = None,
) -> AlphaSearch:
    """The alpha whose factors give the least W8A8 output error on samples; the first of equals.

    The error of single layers is a guide only: it says little about tokens whose activations are small beside the
    attention sink's. Judge the model end to end.

    Args:
        x: [T, K], activations at one point.
        weight: [N, K], the rows of all layers that read them.
        activations: "token", "affine" (range of every token at run time) or "tensor" (one scale, fixed by calibration).
        alphas: to try.
        share: as in `smooth_factors`.
        absmax: [K], of all calibration tokens; None: of x.

    Raises:
        As `smooth_factors`; InputError also without any alpha.
    """
    if not alphas:
        raise InputError("no alpha to try, expected at least one")
    largest = x.abs().amax(0) if absmax is None else absmax
    columns = weight.abs().amax(0)
    errors = {
        alpha: w8a8_error(
            x, weight, smooth_factors(largest, columns, alpha, share), activations=activations, absmax=largest
        )
        for alpha in alphas
    }
    best = min(errors, key=errors.__getitem__)
    plain = w8a8_error(x, weight, activations=activations, absmax=largest)
    return AlphaSearch(best, errors[best], plain, errors)
