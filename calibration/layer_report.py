"""What calibration says of one quantized linear layer. Data only."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["LayerReport"]


@dataclass(frozen=True)
class LayerReport:
    """One linear layer.

    error: squared error of its outputs on the samples as a share of their square; rtn_error: what rounding to nearest
    on the same grid's width would give, in W8A8 without smoothing. Of W8A8 alone: the alpha of its input (None: left
    as it was), the largest magnitudes there before smoothing over text and over visual tokens (0 where none was seen),
    those after it, and the static scale (None: every token has its own).
    """

    name: str
    bits: int
    error: float | None
    rtn_error: float | None
    damping: float | None
    alpha: float | None = None
    largest_text: float | None = None
    largest_visual: float | None = None
    smoothed_text: float | None = None
    smoothed_visual: float | None = None
    input_scale: float | None = None
