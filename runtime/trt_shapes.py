"""What TensorRT plans take: limits checked before anything runs, and the shapes of one call. Data and numpy only."""

from __future__ import annotations

import numpy as np

from edgevl.runtime.device_tensor import item_size
from edgevl.runtime.errors import CapacityError, InputError
from edgevl.runtime.graph_spec import GraphSpec
from edgevl.runtime.plans import PlanSet

__all__ = [
    "VISIBLE_STEP",
    "cache_bytes",
    "check_device_memory",
    "check_patches",
    "check_rows",
    "frames_at_once",
    "visible_tokens",
]

VISIBLE_STEP = 256  # tokens: how many more of the cache a decode step sees at a time; each number is captured once


def check_patches(patches: int, plans: PlanSet, patch_size: int) -> None:
    """Raises InputError for a frame of fewer or more patches than the vision plan takes."""
    low, high = plans.min_patches, plans.max_patches
    if low <= patches <= high:
        return
    pixels = patch_size**2
    given = f"a picture of {patches:,} patches ({patches * pixels:,} pixels after resizing) was given"
    takes = f"these TensorRT plans take {low:,} to {high:,} patches"
    if patches > high:
        remedy = (
            f"pass max_pixels={high * pixels} (--max-pixels), or build with --profile max-pixels={patches * pixels}"
        )
    else:
        remedy = f"pass min_pixels={low * pixels} (--min-pixels), or build with --profile min-pixels={patches * pixels}"
    raise InputError(f"{given}, {takes}; {remedy}")


def check_rows(rows: int, plans: PlanSet) -> None:
    """Raises CapacityError for a batch of more rows than the decode profile takes."""
    if rows > plans.max_rows:
        raise CapacityError(
            f"a batch of {rows} conversations was given, these TensorRT plans decode {plans.max_rows} together; "
            f"send fewer at once, or build with --profile rows={rows}"
        )


def frames_at_once(plans: PlanSet) -> int:
    """Frames of a video that the vision plan takes in one call."""
    _, profile = plans.plans["vision"].profile("vision")
    return profile.shapes["patches"].max[0]


def visible_tokens(past: np.ndarray, sequence: int, capacity: int) -> int:
    """How many cached tokens a call looks at, for graphs that give only the new tokens.

    Args:
        past: [B], lengths before the call.

    Returns:
        At least 1. For one token per row a multiple of VISIBLE_STEP, so that few shapes occur, as far as the decode
        profile goes: the cache's capacity less the new token.
    """
    longest = max(int(past.max()), 1)
    if sequence > 1:
        return longest
    return max(longest, min(-(-longest // VISIBLE_STEP) * VISIBLE_STEP, capacity - 1))


def cache_bytes(spec: GraphSpec, rows: int, capacity: int) -> int:
    """Of a KV cache."""
    total = 0
    for past, _ in spec.cache:
        tensor = spec.input(past)
        total += rows * int(tensor.shape[1]) * capacity * int(tensor.shape[3]) * item_size(tensor.dtype)
    return total


def check_device_memory(what: str, needed: int, free: int, total: int) -> str | None:
    """Why `needed` bytes for `what` do not fit, or None where they do."""
    if needed <= free:
        return None
    return (
        f"{what} needs {needed / 1e9:.2f} GB of GPU memory, {free / 1e9:.2f} GB of {total / 1e9:.2f} GB are free; "
        "end other programs that use it, export with a smaller precision, or build with smaller --profile limits"
    )
