"""Scales of an INT8 KV cache from what a layer's keys and values are, and that cache's arithmetic for measuring it.

Knows layers as edgevl.calibration.layers shows them, not files. A scale belongs to one channel of one head, symmetric
and static: ONNX Runtime's GroupQueryAttention keeps `clip(round(x / scale), -128, 127)` and attends to those, in the
prompt too.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from edgevl.calibration.layers import Watch
from edgevl.calibration.observers import KVObserver, KVScales
from edgevl.runtime.config import TextConfig

__all__ = ["REACH", "CacheWatch", "chained", "rounded_cache"]

REACH = 8191  # positions for which keys are kept within range; export's default capacity


class CacheWatch:
    """A watcher that measures one layer's cache.

    The rotary turns a key's channels i and i + head_dim / 2 into each other as positions grow, and prompts at run time
    are longer than samples: what counts is the largest that a key becomes at any position up to `REACH`. Maxima as seen
    look better on short prompts and ruin long ones (SmolLM2, KL at positions 0 and 3000: 0.0015 and 0.97, these 0.0028
    and 0.0027).
    """

    def __init__(self, config: TextConfig, name: str) -> None:
        self.observer = KVObserver(config.num_key_value_heads, config.head_dim, name)
        exponent = torch.arange(0, config.head_dim, 2, dtype=torch.float64) / config.head_dim
        reach = min(REACH, config.max_position_embeddings - 1)
        self._turn = (reach * config.rope_theta**-exponent).float()  # [head_dim / 2], radians
        self._rows: tuple[Tensor, Tensor] | None = None

    def begin(self, cos: Tensor, sin: Tensor) -> None:
        """What comes next was turned by these rotary rows [S, head_dim / 2]."""
        self._rows = cos[:, None], sin[:, None]

    def __call__(self, point: str, x: Tensor) -> None:
        if point == "v":
            self.observer.add_values(x)
        elif point == "k":
            if self._rows is None:
                raise ValueError("keys came before `begin` said how they were turned")
            (a, b), (cos, sin) = x.chunk(2, -1), self._rows
            angle = torch.atan2(b * cos - a * sin, a * cos + b * sin)  # at position 0
            length = torch.hypot(a, b)
            most = [length * _largest_cosine(angle - shift, self._turn) for shift in (0.0, math.pi / 2)]
            self.observer.add_keys(torch.cat(most, -1))

    def tensors(self, prefix: str) -> dict[str, Tensor]:
        """k_scale and v_scale as a checkpoint stores them: float32 [kv_heads, 1, head_dim]."""
        scales = self.observer.scales()
        return {f"{prefix}.k_scale": scales.key[:, None], f"{prefix}.v_scale": scales.value[:, None]}


def _largest_cosine(start: Tensor, turn: Tensor) -> Tensor:
    """The largest |cos| between the angles `start` and `start + turn`, turn >= 0."""
    stop = start + turn
    peak = torch.floor(stop / math.pi) > torch.floor(start / math.pi)
    return torch.where(peak, 1.0, torch.maximum(start.cos().abs(), stop.cos().abs()))


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
