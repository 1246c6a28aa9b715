"""Scales of an INT8 KV cache from what a layer's keys and values are, and that cache's arithmetic for measuring it.

Knows layers as edgevl.calibration.layers shows them, not files. A scale belongs to one channel of one head, symmetric
and static: ONNX Runtime's GroupQueryAttention keeps `clip(round(x / scale), -128, 127)` and attends to those, in the
prompt too.
"""

from __future__ import annotations

import torch
from torch import Tensor

from edgevl.calibration.layers import Watch
from edgevl.calibration.observers import KVObserver, KVScales
from edgevl.runtime.config import TextConfig

__all__ = ["CacheWatch", "chained", "rounded_cache"]


class CacheWatch:
    """A watcher that measures one layer's cache.

    The rotary turns a key's channels i and i + head_dim / 2 into each other as positions grow, and prompts at run time
    are longer than samples: both channels of a pair are given the pair's largest length, which no position changes.
    """

    def __init__(self, config: TextConfig, name: str) -> None:
        self.observer = KVObserver(config.num_key_value_heads, config.head_dim, name)

    def __call__(self, point: str, x: Tensor) -> None:
        if point == "k":
            length = torch.hypot(*x.chunk(2, -1))
            self.observer.add_keys(torch.cat([length, length], -1))
        elif point == "v":
            self.observer.add_values(x)

    def tensors(self, prefix: str) -> dict[str, Tensor]:
        """k_scale and v_scale as a checkpoint stores them: float32 [kv_heads, 1, head_dim]."""
        scales = self.observer.scales()
        return {f"{prefix}.k_scale": scales.key[:, None], f"{prefix}.v_scale": scales.value[:, None]}


def rounded_cache(scales: KVScales) -> Watch:
    """Keys and values as an INT8 cache gives them back."""

    def watch(point: str, x: Tensor) -> Tensor | None:
        if point not in ("k", "v"):
            return None
        scale = scales.key if point == "k" else scales.value
        return torch.round(x / scale).clamp_(-128, 127) * scale

    return watch


def chained(*watches: Watch | None) -> Watch:
    """Several watchers one after the other; each sees what the one before it gives."""

    def watch(point: str, x: Tensor) -> Tensor | None:
        last = None
        for each in watches:
            found = None if each is None else each(point, x if last is None else last)
            last = last if found is None else found.view(x.shape)
        return last

    return watch
