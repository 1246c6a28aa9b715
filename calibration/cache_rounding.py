"""A checkpoint's own INT8 KV cache, for measuring: whether it has one, and what it does to keys and values.

Cache scales that the engines do not use (FP8, or found at run time) count as none: such a model runs, and is measured,
with a float cache.
"""

from __future__ import annotations

import torch

from edgevl.calibration.dequantized import FloatCheckpoint
from edgevl.calibration.kv_cache import rounded_cache
from edgevl.calibration.layers import Watch
from edgevl.calibration.observers import KVScales
from edgevl.runtime.checkpoint import Checkpoint
from edgevl.runtime.errors import CheckpointError

__all__ = ["cache_rounding", "has_int8_cache"]


def has_int8_cache(checkpoint: Checkpoint) -> bool:
    """Whether `edgevl export --kv-cache int8` takes the checkpoint's scales."""
    try:
        checkpoint.cache.check()
    except CheckpointError:
        return False
    return True


def cache_rounding(checkpoint: FloatCheckpoint, layer: int) -> Watch | None:
    """Keys and values of a decoder layer as its INT8 cache gives them back; None where the cache is float.

    Raises:
        CheckpointError: a scale that is not finite or not positive.
    """
    stored = checkpoint.stored
    if not has_int8_cache(stored):
        return None
    return rounded_cache(KVScales(*(torch.from_numpy(stored.cache_scale(layer, kind)) for kind in "kv")))
