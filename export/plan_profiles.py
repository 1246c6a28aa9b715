"""The shapes that plans are built for: profiles of decoder and vision encoder, and their limits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgevl.runtime.bundle import Bundle
from edgevl.runtime.errors import InputError
from edgevl.runtime.graph_spec import APPENDED, GraphSpec
from edgevl.runtime.plans import DECODE_PROFILE, PREFILL_PROFILE, VISION_PROFILE, PlanProfile, ShapeRange

if TYPE_CHECKING:
    from edgevl.export.tensorrt_build import BuildOptions

__all__ = ["Limits", "decoder_profiles", "plan_limits", "vision_profile"]

_USUAL_PATCHES = 1024  # of a picture of 448 x 448: what the vision profile is tuned for


@dataclass(frozen=True)
class Limits:
    """The largest requests that plans take."""

    capacity: int
    rows: int
    prefill: int
    frames: int
    min_patches: int
    max_patches: int
    merged: int  # patches per token


def decoder_profiles(spec: GraphSpec, limits: Limits) -> tuple[PlanProfile, PlanProfile]:
    """(one token, prefill): one wide profile would lose the decode kernels."""
    pictures = max(limits.prefill, limits.frames * limits.max_patches // limits.merged)
    rows, usual = limits.rows, min(limits.prefill, 512)
    whole = limits.capacity
    decode = {"batch": (1, 1, rows), "sequence": (1, 1, 1), "image_tokens": (1, 1, 1), "rows": (1, 1, rows)}
    prefill = {
        "batch": (1, 1, 1),
        "sequence": (1, usual, limits.prefill),
        "image_tokens": (1, min(usual, pictures), pictures),
        "rows": (1, 1, 1),
    }
    if spec.cache_update == APPENDED:
        decode["attended"] = (2, max(2, whole // 2), max(2, whole))
        prefill["attended"] = (2, usual + 1, limits.prefill + whole)
    return _profile(DECODE_PROFILE, spec, decode), _profile(PREFILL_PROFILE, spec, prefill)


def vision_profile(spec: GraphSpec, limits: Limits) -> PlanProfile:
    usual = min(max(_USUAL_PATCHES, limits.min_patches), limits.max_patches)
    axes = {"frames": (1, 1, limits.frames), "patches": (limits.min_patches, usual, limits.max_patches)}
    return _profile(VISION_PROFILE, spec, axes)


def _profile(name: str, spec: GraphSpec, axes: dict[str, tuple[int, int, int]]) -> PlanProfile:
    shapes = {}
    for tensor in spec.inputs:
        per_axis = [axes[d] if isinstance(d, str) else (d, d, d) for d in tensor.shape]
        shapes[tensor.name] = ShapeRange(*(tuple(a[i] for a in per_axis) for i in range(3)))
    return PlanProfile(name, shapes)


def plan_limits(bundle: Bundle, options: BuildOptions) -> Limits:
    """From a bundle and what the options ask for.

    Raises:
        InputError: an option out of range.
    """
    decoder, vision = bundle.graphs["decoder"].spec, bundle.model.vision
    capacity = int(decoder.input(decoder.cache[0][0]).shape[2])
    prefill = min(1024, capacity) if options.prefill is None else options.prefill
    for name, value, most in (
        ("rows", options.rows, 64),
        ("prefill", prefill, capacity),
        ("frames", options.frames, 64),
    ):
        if not 1 <= value <= most:
            raise InputError(f"profile {name} is {value}, expected 1 to {most}")
    pixels, merged = vision.patch_size**2, vision.spatial_merge_size**2
    processor = bundle.image_processor
    largest = merged * capacity  # a picture of more tokens fits no prompt
    low = merged if options.min_pixels is None else options.min_pixels // pixels // merged * merged
    high = processor.max_pixels if options.max_pixels is None else options.max_pixels
    high = high // pixels // merged * merged
    if options.max_pixels is None:
        high = min(high, largest)
    if high > largest:
        raise InputError(
            f"profile max-pixels is {options.max_pixels:,}, which is {high // merged:,} tokens; the KV cache holds "
            f"{capacity:,}: expected at most {largest * pixels:,}, or export with more --max-tokens"
        )
    if not merged <= low <= high:
        raise InputError(
            f"profile pixels from {options.min_pixels or low * pixels:,} to {options.max_pixels or high * pixels:,}, "
            f"expected at least {merged * pixels:,} and no less at the upper end"
        )
    return Limits(capacity, options.rows, prefill, options.frames, low, high, merged)
