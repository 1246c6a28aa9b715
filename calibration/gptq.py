"""GPTQ for one linear layer: the Hessian of its inputs, and rounding that passes errors on.

Pure maths over torch tensors: knows neither models nor files nor the order of layers. GPTQ is Frantar et al.,
arXiv 2210.17323; below, a weight is W `[N, K]` and its Hessian H = sum of x xᵀ over the tokens, `[K, K]`.
Everything runs in float32 and is deterministic. Grids and their clip search: edgevl.calibration.grids.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from edgevl.calibration.formats import BlockQuantized
from edgevl.calibration.grids import (
    CLIP_FACTORS,
    Grid,
    checked_weight,
    dequantized,
    fit_groups,
    nearest,
    round_to_nearest,
    to_blocks,
)
from edgevl.runtime.errors import EngineError, InputError

__all__ = [
    "GptqResult",
    "HessianAccumulator",
    "gptq_quantize",
    "output_error",
    "round_to_nearest",
    "token_weights",
]

_CHUNK = 4096  # tokens added to a Hessian at once
_ELEMENTS = 2**23  # of a temporary: 32 MB
_GROWTH, _LEAST_DAMP, _MOST_DAMP = 10.0, 1e-6, 1.0
_TRIANGLE = 512  # up to this size a triangular matrix is inverted by substitution


# ---------------------------------------------------------------------- Hessian


class HessianAccumulator:
    """H = sum of x xᵀ over tokens, for all linear layers that share one input.

    Every token counts, the first of a sequence too: it is the attention sink, and leaving it out costs quality.

    Attributes:
        hessian: float32 [K, K].
        absmax: float32 [K], of every channel.
        tokens: how many were added.
    """

    def __init__(self, columns: int, name: str = "layer") -> None:
        """`name` stands in errors."""
        self.name = name
        self.hessian = torch.zeros(columns, columns)
        self.absmax = torch.zeros(columns)
        self.tokens = 0

    def add(self, x: Tensor, weights: Tensor | None = None) -> None:
        """Add the tokens of `x` [..., K], each counted `weights` [...] times (`token_weights`).

        Raises:
            ValueError: another shape, or a weight that is negative or not finite.
            EngineError: an activation that is not finite; nothing is added then.
        """
        columns = len(self.absmax)
        if x.shape[-1] != columns or (weights is not None and weights.shape != x.shape[:-1]):
            shape = None if weights is None else tuple(weights.shape)
            raise ValueError(f"{self.name}: tokens {tuple(x.shape)}, weights {shape}; expected [..., {columns}], [...]")
        rows = x.detach().reshape(-1, columns)
        wrong = rows.numel() - int(torch.isfinite(rows).sum())
        if wrong:
            raise EngineError(
                f"{self.name}: {wrong} of {rows.numel()} numbers of its input are not finite; run the layers in "
                "float32 and check the checkpoint's tensors"
            )
        roots = None
        if weights is not None:
            if not (torch.isfinite(weights).all() and (weights >= 0).all()):
                raise ValueError(f"{self.name}: token weights must be finite and not negative")
            roots = weights.detach().reshape(-1, 1).float().sqrt()
        for start in range(0, len(rows), _CHUNK):
            chunk = rows[start : start + _CHUNK].float()
            self.absmax = torch.maximum(self.absmax, chunk.abs().amax(0))
            if roots is not None:
                chunk = chunk * roots[start : start + _CHUNK]
            self.hessian.addmm_(chunk.T, chunk)
        self.tokens += len(rows)

    def merge(self, other: HessianAccumulator) -> None:
        """Add what `other` has seen, as if its tokens had been added here.

        Raises:
            ValueError: another number of channels.
        """
        if other.absmax.shape != self.absmax.shape:
            raise ValueError(f"{self.name}: {len(other.absmax)} channels to merge, expected {len(self.absmax)}")
        self.hessian += other.hessian
        self.absmax = torch.maximum(self.absmax, other.absmax)
        self.tokens += other.tokens


def token_weights(visual: Tensor, weight: float) -> Tensor:
    """Weights of one sequence's tokens: `weight` where `visual` [S] is True, 1 elsewhere and for the first token.

    A picture has hundreds of tokens that resemble each other and swamp the words' share of the Hessian (VLMQ,
    arXiv 2508.03351).
    """
    weights = torch.where(visual, float(weight), 1.0)
    weights[:1] = 1.0
    return weights


# ---------------------------------------------------------------------- GPTQ


@dataclass(frozen=True)
class GptqResult:
    """A rounded weight and how it went. Errors are shares of the layer's output under H, squared."""

    weight: BlockQuantized
    loss: float  # tr(E (H + damping) Eᵀ), what GPTQ minimises greedily
    damping: float  # finally used, as a share of H's mean diagonal
    rtn_error: float  # of rounding to nearest on the same grid
    error: float  # of this result


def gptq_quantize(
    weight: Tensor,
    hessian: Tensor,
    *,
    bits: int,
    group_size: int,
    symmetric: bool = True,
    signed: bool = False,
    act_order: bool = True,
    clip: bool = True,
    damp: float = 0.01,
    block: int = 128,
    scale_dtype: torch.dtype = torch.float16,
) -> GptqResult:
    """Round column by column, spreading each column's error over those to come (arXiv 2210.17323, algorithm 1).

    Memory: at most two K × K matrices besides `hessian`. A column whose input was always zero is rounded to nearest:
    it may not be zero at run time.

    Args:
        weight: [N, K].
        hessian: float32 [K, K], HessianAccumulator.hessian.
        bits, group_size, symmetric, signed, scale_dtype: as in `round_to_nearest`.
        act_order: columns with the largest diagonal first; groups stay where they lie and their scales come from the
            original columns ("static groups"), so no order has to be stored. False: from left to right, a group's
            scales come from its columns as corrected so far.
        clip: search every group's range, weighted with H's diagonal.
        damp: share of H's mean diagonal added to the diagonal; grows tenfold, up to 1, until H can be factored.
        block: columns between two updates of all the later ones; changes speed only.

    Raises:
        As `round_to_nearest`; ValueError also for a Hessian of another shape, EngineError also for one that is not
        finite or cannot be factored.
    """
    grid = Grid(bits, symmetric, signed, CLIP_FACTORS if clip else (1.0,), scale_dtype)
    w, group = checked_weight(weight, grid, group_size)
    columns = w.shape[1]
    if hessian.shape != (columns, columns):
        raise ValueError(f"the Hessian has shape {tuple(hessian.shape)}, expected ({columns}, {columns})")
    diagonal = hessian.diagonal().float().clone()
    scale, zero = fit_groups(w, group, grid, diagonal)
    rtn_error = output_error(w, dequantized(nearest(w, scale, zero, grid, group)), hessian)
    order = torch.argsort(diagonal, descending=True, stable=True) if act_order else torch.arange(columns)
    factor, damping = _inverse_factor(hessian, order, damp)
    importance = None if act_order else diagonal
    codes, loss = _spread_errors(w, factor, order, grid, group, scale, zero, importance, block)
    result = to_blocks(codes, scale, zero, grid, group)
    return GptqResult(result, loss, damping, rtn_error, output_error(w, dequantized(result), hessian))


def output_error(weight: Tensor, rounded: Tensor, hessian: Tensor) -> float:
    """tr(E H Eᵀ) / tr(W H Wᵀ) with E = W - rounded, both [N, K]: the squared error of the layer's output on the tokens
    behind `hessian`, as a share of the squared output (0 where there is no output)."""
    error = total = 0.0
    step = max(1, _ELEMENTS // weight.shape[1])
    for i in range(0, len(weight), step):
        w = weight[i : i + step].float()
        e = w - rounded[i : i + step].float()
        error += float(torch.sum((e @ hessian) * e, dtype=torch.float64))
        total += float(torch.sum((w @ hessian) * w, dtype=torch.float64))
    return error / total if total > 0 else 0.0


def _dampings(damp: float) -> Iterator[float]:
    yield damp
    while (damp := max(damp * _GROWTH, _LEAST_DAMP)) <= _MOST_DAMP * (1 + 1e-9):
        yield damp


def _inverse_factor(hessian: Tensor, order: Tensor, damp: float) -> tuple[Tensor, float]:
    """Upper triangular U with UᵀU = (H + damping)⁻¹, rows and columns in `order`; and the damping used.

    The Cholesky factor M of the *reversed* matrix gives it at once, without forming an inverse: with J the reversal,
    J H J = M Mᵀ, so H = R Rᵀ with R = J M J upper triangular, and U = R⁻¹ = J M⁻¹ J.
    """
    if not math.isfinite(damp) or damp < 0:
        raise InputError(f"damp is {damp}, expected 0 or more")
    if not torch.isfinite(hessian.sum()):
        raise EngineError("the Hessian is not finite; the layer's input grew too large for float32")
    mean = float(hessian.diagonal().double().mean())
    backwards = order.flip(0)
    matrix = hessian.float().index_select(0, backwards).index_select(1, backwards)
    diagonal = matrix.diagonal().clone()
    for damping in _dampings(damp):
        # without any input there is nothing to spread: any diagonal does
        matrix.diagonal().copy_(diagonal + damping * mean if mean > 0 else torch.ones_like(diagonal))
        lower, failed = torch.linalg.cholesky_ex(matrix)
        if not int(failed) and bool(torch.isfinite(lower.diagonal()).all()):
            del matrix
            _invert_lower(lower)
            return lower.flip(0, 1), damping
        del lower
    raise EngineError(
        f"the Hessian of {len(order)} channels cannot be factored, not even with its mean diagonal added; "
        "it is no sum of x xᵀ: collect it again"
    )


def _invert_lower(m: Tensor) -> None:
    """Replace a lower triangular matrix by its inverse, in place: halves by recursion, so nearly all is matmul."""
    size = len(m)
    if size <= _TRIANGLE:
        m.copy_(torch.linalg.solve_triangular(m, torch.eye(size, dtype=m.dtype), upper=False))
        return
    half = size // 2
    _invert_lower(m[:half, :half])
    _invert_lower(m[half:, half:])
    m[half:, :half] = (m[half:, half:] @ m[half:, :half]).neg_() @ m[:half, :half]


def _spread_errors(
    weight: Tensor,
    factor: Tensor,
    order: Tensor,
    grid: Grid,
    group: int,
    scale: Tensor,
    zero: Tensor,
    importance: Tensor | None,
    block: int,
) -> tuple[Tensor, float]:
    """Codes uint8 [N, K] (columns where they lie) and the loss.

    With `importance`, `order` is the columns' own and a group's scale and zero [N, G] are replaced, in place, when its
    first column is reached. Columns are rows in here: contiguous.
    """
    columns = len(order)
    w = weight.T[order].contiguous()  # [K, N]
    scales, zeros = scale.T.contiguous(), zero.T.contiguous()  # [G, N]
    codes = torch.empty(weight.T.shape, dtype=torch.uint8)
    places = order.tolist()
    loss = 0.0
    for start in range(0, columns, block):
        stop = min(start + block, columns)
        part, errors = w[start:stop], torch.zeros(stop - start, w.shape[1])
        for i in range(stop - start):
            at = start + i
            place, row = places[at], factor[at]
            if importance is not None and place % group == 0:
                end = min(place + group, columns)
                current = w[at:end].clone()
                # columns beyond the block have not got this block's errors yet
                current[stop - at :] -= factor[start:at, stop : max(end, stop)].T @ errors[:i]
                g = place // group
                scales[g], zeros[g] = grid.fit(current.T, importance[place:end])
            s, z = scales[place // group], zeros[place // group]
            code = grid.encode(part[i], s, z)
            codes[place] = code.to(torch.uint8)
            errors[i] = (part[i] - (code - z) * s) / row[at]
            part[i + 1 :].addr_(row[at + 1 : stop], errors[i], alpha=-1)
        loss += float(torch.sum(errors.square(), dtype=torch.float64))
        w[stop:].addmm_(factor[start:stop, stop:].T, errors, alpha=-1)
    scale.copy_(scales.T)
    zero.copy_(zeros.T)
    return codes.T, loss
