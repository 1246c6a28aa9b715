"""Grids of weights in torch: scales and zero points of groups of columns, with a clip search; rounding to nearest.

Pure maths: knows neither models nor files. A weight is `[N, K]`, its groups lie along K. Scales are rounded to what the
checkpoint stores before any code is chosen, so codes belong to the stored scales. The same grids without a search and
in numpy, for weights that export rounds: edgevl.calibration.formats.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from edgevl.calibration.formats import BlockQuantized
from edgevl.runtime.errors import EngineError, InputError

__all__ = [
    "CLIP_FACTORS",
    "Grid",
    "checked_weight",
    "dequantized",
    "fit_groups",
    "nearest",
    "round_to_nearest",
    "to_blocks",
]

CLIP_FACTORS = tuple(1 - i / 40 for i in range(20))  # 1 down to 0.525 of the range
_ELEMENTS = 2**23  # of a temporary in the clip search: 32 MB


@dataclass(frozen=True)
class Grid:
    """How scales and zero points are found: `w = (code - zero) * scale`, codes 0 .. 2^bits - 1.

    Symmetric: zero = 2^(bits-1), scale = 2 absmax / (2^bits - 1) as GPTQ's readers know it; `signed`: the entry of
    largest magnitude sits on code 0 exactly and the scale carries its sign (as formats.quantize_blocks). Asymmetric:
    from min(w, 0) to max(w, 0). `factors` are the shares of that range to try.
    """

    bits: int
    symmetric: bool = True
    signed: bool = False
    factors: tuple[float, ...] = (1.0,)
    scale_dtype: torch.dtype = torch.float16

    @property
    def top(self) -> int:
        return 2**self.bits - 1

    def encode(self, w: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """Codes, still float32, of `w`; half-way values go to the even multiple of the scale."""
        return torch.round(w / scale).add_(zero).clamp_(0, self.top)

    def range(self, w: Tensor, factor: float) -> tuple[Tensor, Tensor]:
        """Scales, as stored, and zero points [...] of `w` [..., g] for `factor` of its range."""
        low, high = torch.aminmax(w, dim=-1)
        if self.symmetric:
            if self.signed:
                scale = torch.where(-low > high, low, high) * factor / -(2 ** (self.bits - 1))
            else:
                scale = torch.maximum(-low, high) * factor * 2 / self.top
        else:
            low, high = low.clamp(max=0), high.clamp(min=0)
            scale = (high - low) * factor / self.top
        stored = scale.to(self.scale_dtype).float()
        # what underflows keeps the smallest step there is: a scale of 0 would make codes of infinity
        limits = torch.finfo(self.scale_dtype)
        tiny = limits.smallest_normal * limits.eps
        stored = torch.where((stored == 0) & (scale != 0), torch.sign(scale) * tiny, stored)
        stored = torch.where(scale == 0, torch.ones_like(scale), stored)
        if self.symmetric:
            return stored, torch.full_like(stored, 2 ** (self.bits - 1))
        return stored, torch.round(-low * factor / stored).clamp_(0, self.top)

    def fit(self, w: Tensor, importance: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Scales and zero points [...] of `w` [..., g] with the least sum of importance * error².

        importance: [..., g], broadcast to `w`; None: 1 everywhere. Equal errors go to the wider range.
        """
        scale, zero = self.range(w, self.factors[0])
        if len(self.factors) == 1:
            return scale, zero
        least = self._error(w, scale, zero, importance)
        for factor in self.factors[1:]:
            other = self.range(w, factor)
            error = self._error(w, *other, importance)
            better = error < least
            least = torch.where(better, error, least)
            scale, zero = torch.where(better, other[0], scale), torch.where(better, other[1], zero)
        return scale, zero

    def _error(self, w: Tensor, scale: Tensor, zero: Tensor, importance: Tensor | None) -> Tensor:
        s, z = scale[..., None], zero[..., None]
        error = self.encode(w, s, z).sub_(z).mul_(s).sub_(w).square_()
        return (error if importance is None else error.mul_(importance)).sum(-1)


def _grouped(x: Tensor, group: int) -> Tensor:
    """[..., K] -> [..., G, group], the last group padded with zeros."""
    groups = -(-x.shape[-1] // group)
    padded = x.new_zeros(*x.shape[:-1], groups * group)
    padded[..., : x.shape[-1]] = x
    return padded.unflatten(-1, (groups, group))


def fit_groups(weight: Tensor, group: int, grid: Grid, importance: Tensor | None) -> tuple[Tensor, Tensor]:
    """Scales and zero points [N, G], some rows at a time."""
    cut = None if importance is None else _grouped(importance, group)
    step = max(1, _ELEMENTS // max(weight.shape[1], 1))
    parts = [grid.fit(_grouped(weight[i : i + step], group), cut) for i in range(0, len(weight), step)]
    return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])


def to_blocks(codes: Tensor, scale: Tensor, zero: Tensor, grid: Grid, group: int) -> BlockQuantized:
    """codes [N, K] (whole numbers of any dtype); scale, zero [N, G]."""
    rows, columns = codes.shape
    padded = zero.to(torch.uint8).repeat_interleave(group, 1)
    padded[:, :columns] = codes.to(torch.uint8)
    return BlockQuantized(
        codes=padded.view(rows, -1, group).numpy(),
        scales=scale.numpy(),
        zero_points=None if grid.symmetric else zero.to(torch.uint8).numpy(),
        bits=grid.bits,
        columns=columns,
    )


def nearest(w: Tensor, scale: Tensor, zero: Tensor, grid: Grid, group: int) -> BlockQuantized:
    """w [N, K] float32 on given scales and zero points [N, G]."""
    codes = grid.encode(_grouped(w, group), scale[..., None], zero[..., None])
    return to_blocks(codes.flatten(1)[:, : w.shape[1]], scale, zero, grid, group)


def dequantized(q: BlockQuantized) -> Tensor:
    """float32 [N, K] of blocks in the columns' own order."""
    zero = float(2 ** (q.bits - 1)) if q.zero_points is None else torch.from_numpy(q.zero_points)[..., None].float()
    w = (torch.from_numpy(q.codes).float() - zero).mul_(torch.from_numpy(q.scales)[..., None])
    return w.flatten(1)[:, : q.columns]


def checked_weight(weight: Tensor, grid: Grid, group_size: int) -> tuple[Tensor, int]:
    """The weight as float32 and the columns of a group, or the errors of `round_to_nearest`."""
    if not 2 <= grid.bits <= 8:
        raise InputError(f"bits is {grid.bits}, expected 2 to 8")
    if group_size != -1 and group_size < 1:
        raise InputError(f"group_size is {group_size}, expected 1 or more, or -1 for whole rows")
    if weight.dim() != 2 or not weight.numel():
        raise ValueError(f"the weight has shape {tuple(weight.shape)}, expected [N, K]")
    w = weight.detach().float()
    largest = float(torch.linalg.vector_norm(w, math.inf))
    if not math.isfinite(largest):
        raise EngineError("the weight holds numbers that are not finite; check the checkpoint")
    limit = torch.finfo(grid.scale_dtype).max * (grid.top / 2)
    if largest >= limit:
        raise EngineError(
            f"a weight of {largest:.3g} has no scale in {grid.scale_dtype}, expected less than {limit:.3g}"
        )
    return w, weight.shape[1] if group_size == -1 else group_size


def round_to_nearest(
    weight: Tensor,
    *,
    bits: int,
    group_size: int,
    symmetric: bool = True,
    signed: bool = False,
    importance: Tensor | None = None,
    scale_dtype: torch.dtype = torch.float16,
) -> BlockQuantized:
    """Every weight to the nearest code.

    Args:
        weight: [N, K].
        bits: 2 to 8.
        group_size: columns per scale, -1 for whole rows; the last group may be shorter.
        symmetric, signed: the grid, see `Grid`.
        importance: [K], of the inputs, such as the Hessian's diagonal. With it, every row and group searches for the
            share of its range with the least weighted error; with equal weights that search gains nothing end to end.
        scale_dtype: what the checkpoint stores.

    Raises:
        InputError: `bits` or `group_size` out of range.
        ValueError: another shape.
        EngineError: weights that are not finite, or too large for `scale_dtype`.
    """
    grid = Grid(bits, symmetric, signed, (1.0,) if importance is None else CLIP_FACTORS, scale_dtype)
    w, group = checked_weight(weight, grid, group_size)
    if importance is not None and importance.shape != w.shape[1:]:
        raise ValueError(f"importance has shape {tuple(importance.shape)}, expected ({w.shape[1]},)")
    scale, zero = fit_groups(w, group, grid, None if importance is None else importance.float())
    return nearest(w, scale, zero, grid, group)
