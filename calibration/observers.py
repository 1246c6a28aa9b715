"""Ranges of activations over calibration: per channel, per tensor, and of keys and values for an INT8 cache.

Pure arithmetic on running extremes; knows neither models nor files. Extremes, never percentiles: the massive
activations that a percentile cuts off carry the attention sink, and without them the model breaks (measured: KL 0.66
with the extremes, 2.6 with the 99.99th percentile). All states go through JSON and back unchanged.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from edgevl.runtime.errors import EngineError, InputError

__all__ = ["KVObserver", "KVScales", "ModalityObserver", "RangeObserver", "TensorRange"]

_FLOOR = 1e-3  # of a head's largest channel: a channel hardly used may be used more at run time


def _finite(x: Tensor, name: str) -> Tensor:
    wrong = x.numel() - int(torch.isfinite(x).sum())
    if wrong:
        raise EngineError(f"{name}: {wrong} of {x.numel()} numbers are not finite; run the layers in float32")
    return x.detach().float()


def _stored(state: Mapping[str, Any], name: str, *keys: str) -> list[Any]:
    if not isinstance(state, Mapping) or set(state) != set(keys):
        got = sorted(state) if isinstance(state, Mapping) else type(state).__name__
        raise InputError(f"{name}: the stored ranges hold {got}, expected {sorted(keys)}; calibrate again")
    return [state[key] for key in keys]


def _maxima(values: Any, shape: tuple[int, ...], name: str) -> Tensor:
    """Stored maxima of `shape`, or an error."""
    try:
        found = torch.tensor(values, dtype=torch.float32)
    except (TypeError, ValueError, RuntimeError):
        found = torch.empty(0)
    if found.shape != shape or not bool((found >= 0).all() and torch.isfinite(found).all()):
        raise InputError(f"{name}: stored maxima {tuple(found.shape)}, expected {shape} of 0 or more; calibrate again")
    return found


@dataclass(frozen=True)
class TensorRange:
    """The least and the largest number of a tensor, zero included; empty tensors are 0 .. 0."""

    low: float
    high: float

    def symmetric(self) -> float:
        """Scale of int8 codes -127 .. 127; 1 for a tensor of zeros."""
        return max(-self.low, self.high) / 127 or 1.0

    def affine(self) -> tuple[float, int]:
        """Scale and zero point of uint8 codes; zero is a code. 1 and 0 for a tensor of zeros."""
        scale = (self.high - self.low) / 255 or 1.0
        return scale, round(-self.low / scale)


class RangeObserver:
    """Running extremes of one activation.

    Attributes:
        absmax: float32 [K], of every channel.
        tokens: how many were seen.
    """

    def __init__(self, channels: int, name: str = "layer") -> None:
        """`name` stands in errors."""
        self.name = name
        self.absmax = torch.zeros(channels)
        self.tokens = 0
        self._low = self._high = 0.0  # a range without zero could not code it

    def add(self, x: Tensor) -> None:
        """See the tokens of `x` [..., K].

        Raises:
            ValueError: another number of channels.
            EngineError: a number that is not finite; nothing is kept then.
        """
        if x.shape[-1] != len(self.absmax):
            raise ValueError(f"{self.name}: tokens {tuple(x.shape)}, expected [..., {len(self.absmax)}]")
        rows = _finite(x, self.name).reshape(-1, len(self.absmax))
        if len(rows):
            self.absmax = torch.maximum(self.absmax, rows.abs().amax(0))
            self._low, self._high = min(self._low, float(rows.min())), max(self._high, float(rows.max()))
            self.tokens += len(rows)

    @property
    def range(self) -> TensorRange:
        return TensorRange(self._low, self._high)

    def merge(self, other: RangeObserver) -> None:
        """Take in what `other` has seen.

        Raises:
            ValueError: another number of channels.
        """
        if other.absmax.shape != self.absmax.shape:
            raise ValueError(f"{self.name}: {len(other.absmax)} channels to merge, expected {len(self.absmax)}")
        self.absmax = torch.maximum(self.absmax, other.absmax)
        self._low, self._high = min(self._low, other._low), max(self._high, other._high)
        self.tokens += other.tokens

    def state(self) -> dict[str, Any]:
        """For JSON."""
        return {"absmax": self.absmax.tolist(), "low": self._low, "high": self._high, "tokens": self.tokens}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`.

        Raises:
            InputError: it is not the state of such an observer; nothing changes then.
        """
        absmax, low, high, tokens = _stored(state, self.name, "absmax", "low", "high", "tokens")
        found = _maxima(absmax, tuple(self.absmax.shape), self.name)
        largest = float(found.max()) if len(found) else 0.0
        if not (isinstance(tokens, int) and low <= 0 <= high and max(-low, high) == largest):
            raise InputError(f"{self.name}: the stored range {low} .. {high} does not fit its maxima; calibrate again")
        self.absmax, self._low, self._high, self.tokens = found, float(low), float(high), tokens


class ModalityObserver:
    """One activation, visual and text tokens apart.

    What both share, a scale or a smoothing factor, is dominated by the larger of the two (MASQuant, arXiv 2603.04800).
    """

    def __init__(self, channels: int, name: str = "layer") -> None:
        self.name = name
        self.text = RangeObserver(channels, f"{name} (text)")
        self.visual = RangeObserver(channels, f"{name} (visual)")

    def add(self, x: Tensor, visual: Tensor) -> None:
        """See the tokens of `x` [..., K]; `visual` bool [...] is True for those of pictures.

        Raises:
            ValueError: shapes that do not fit.
            EngineError: a number that is not finite.
        """
        if visual.shape != x.shape[:-1] or visual.dtype != torch.bool:
            got = f"{visual.dtype} {tuple(visual.shape)}"
            raise ValueError(f"{self.name}: visual is {got}, expected torch.bool {tuple(x.shape[:-1])}")
        _finite(x, self.name)  # before either half keeps anything
        self.text.add(x[~visual])
        self.visual.add(x[visual])

    def together(self) -> RangeObserver:
        """Both as one."""
        both = RangeObserver(len(self.text.absmax), self.name)
        both.merge(self.text)
        both.merge(self.visual)
        return both

    def merge(self, other: ModalityObserver) -> None:
        """Take in what `other` has seen; ValueError as for RangeObserver."""
        self.text.merge(other.text)
        self.visual.merge(other.visual)

    def state(self) -> dict[str, Any]:
        """For JSON."""
        return {"text": self.text.state(), "visual": self.visual.state()}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`; InputError as for RangeObserver."""
        text, visual = _stored(state, self.name, "text", "visual")
        self.text.load(text)
        self.visual.load(visual)


@dataclass(frozen=True)
class KVScales:
    """Symmetric int8 scales of a cache, float32 [kv_heads, head_dim]: code = round(value / scale), -127 .. 127 for all
    that calibration saw."""

    key: Tensor
    value: Tensor

    def per_tensor(self) -> tuple[float, float]:
        """One scale for all keys, one for all values."""
        return float(self.key.max()), float(self.value.max())


class KVObserver:
    """Maxima of one layer's keys, after the rotary, and values: per channel, since k_proj's biases make outliers.

    The rotary turns pairs of channels with the position, so keys need samples as long as at run time.

    Attributes:
        key, value: their ranges, channel head * head_dim + d.
    """

    def __init__(self, kv_heads: int, head_dim: int, name: str = "layer") -> None:
        """`name` stands in errors."""
        self.name = name
        self.key = RangeObserver(kv_heads * head_dim, f"{name} (keys)")
        self.value = RangeObserver(kv_heads * head_dim, f"{name} (values)")
        self._heads = (kv_heads, head_dim)

    def add_keys(self, key: Tensor) -> None:
        """See keys after the rotary [..., kv_heads, head_dim]; ValueError and EngineError as for RangeObserver."""
        self.key.add(self._flat(key))

    def add_values(self, value: Tensor) -> None:
        """See values [..., kv_heads, head_dim]; ValueError and EngineError as for RangeObserver."""
        self.value.add(self._flat(value))

    def _flat(self, x: Tensor) -> Tensor:
        if x.shape[-2:] != self._heads:
            raise ValueError(f"{self.name}: heads {tuple(x.shape)}, expected [..., {self._heads[0]}, {self._heads[1]}]")
        return x.flatten(-2)

    def scales(self) -> KVScales:
        """absmax / 127 of every channel; one below a thousandth of its head's largest counts as that large, and a head
        of zeros has scale 1.

        Raises:
            EngineError: no keys or no values were seen.
        """
        if not (self.key.tokens and self.value.tokens):
            raise EngineError(f"{self.name}: no keys or no values were seen, so there are no scales; calibrate first")
        return KVScales(*(_cache_scale(x.absmax.view(self._heads)) for x in (self.key, self.value)))

    def merge(self, other: KVObserver) -> None:
        """Take in what `other` has seen.

        Raises:
            ValueError: other heads.
        """
        if other._heads != self._heads:
            raise ValueError(f"{self.name}: heads {other._heads} to merge, expected {self._heads}")
        self.key.merge(other.key)
        self.value.merge(other.value)

    def state(self) -> dict[str, Any]:
        """For JSON."""
        return {"key": self.key.state(), "value": self.value.state()}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`; InputError as for RangeObserver."""
        key, value = _stored(state, self.name, "key", "value")
        self.key.load(key)
        self.value.load(value)


def _cache_scale(absmax: Tensor) -> Tensor:
    largest = absmax.amax(1, keepdim=True)
    return torch.where(largest > 0, torch.maximum(absmax, largest * _FLOOR) / 127, 1.0)
