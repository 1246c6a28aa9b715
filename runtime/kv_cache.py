"""The KV cache: one buffer per layer and kind, of fixed capacity, written in place by the decoder graph.

Host memory, allocated lazily by the operating system: an unused capacity costs address space, not memory. Heads lie as
close together as their tokens allow, and are moved apart when more come: a graph's step of one token goes over all the
room that a head has. It knows rows and lengths, not tokens: whoever rewinds it must know which tokens the remaining
length stands for.
"""

from __future__ import annotations

import math
import mmap
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgevl.runtime.errors import CapacityError
from edgevl.runtime.graph_spec import GraphSpec

__all__ = ["CacheView", "KVCache", "check_capacity"]

_STEP = 64  # tokens by which a head's room grows: moving costs a few hundredths of what attention reads meanwhile


@dataclass(frozen=True)
class CacheView:
    """Contiguous rows of a cache, as the graph sees them: {past input name: [rows, kv_heads, room, d]}, arrays or, from
    a DeviceKVCache, device tensors. Good until more tokens are reserved."""

    buffers: dict[str, Any]


class KVCache:
    """Keys and values of `batch` rows, each with a length of its own.

    Args:
        spec: the decoder's spec; its `cache` pairs name the buffers.
        capacity: tokens that each row can hold.

    `held` is the largest number of tokens that all rows together have had: their memory is resident, and stays so.

    Raises:
        CapacityError: another capacity than the graph's, where it is fixed.
    """

    def __init__(self, spec: GraphSpec, capacity: int, batch: int = 1) -> None:
        self._spec = spec
        self.capacity = capacity
        self.lengths = np.zeros(batch, np.int64)
        self.held = 0
        self._memory: dict[str, np.ndarray] = {}  # flat
        self._buffers: dict[str, Any] = {}  # the same, [batch, kv_heads, room, d]
        check_capacity(spec, capacity)
        self._fixed = isinstance(spec.input(spec.cache[0][0]).shape[2], int)
        for past, _ in spec.cache:
            tensor = spec.input(past)
            _, heads, _, dim = tensor.shape
            self._memory[past] = _zeros(batch * int(heads) * capacity * int(dim), np.dtype(tensor.dtype))
            room = capacity if self._fixed else min(capacity, _STEP)
            self._buffers[past] = self._laid(past, (batch, int(heads), room, int(dim)))

    @property
    def batch(self) -> int:
        return len(self.lengths)

    @property
    def nbytes(self) -> int:
        """Size of the full capacity in bytes (only touched pages are resident)."""
        return sum(b.nbytes // b.shape[2] * self.capacity for b in self._buffers.values())

    def view(self, start: int, stop: int) -> CacheView:
        """Rows [start, stop) as one contiguous batch, sharing memory with the cache."""
        return CacheView({name: b[start:stop] for name, b in self._buffers.items()})

    def has_room(self, row: int, count: int) -> bool:
        """Whether `reserve` would leave all that is in memory where it is; what a graph that runs writes to stays."""
        rooms = (b.shape[2] for b in self._buffers.values())
        return int(self.lengths[row]) + count <= min(self.capacity, *rooms)

    def reserve(self, row: int, count: int) -> None:
        """Make room for `count` more tokens in `row`.

        Raises:
            CapacityError: they do not fit.
        """
        needed = int(self.lengths[row]) + count
        if needed > self.capacity:
            raise CapacityError(f"{needed} tokens are needed, the KV cache holds {self.capacity}")
        self._widen(needed)

    def _widen(self, tokens: int) -> None:
        """Move heads apart until each has room for so many tokens."""
        for name, narrow in self._buffers.items():
            batch, heads, room, dim = narrow.shape
            if tokens <= room:
                return
            wide = self._laid(name, (batch, heads, min(self.capacity, -(-tokens // _STEP) * _STEP), dim))
            # The last first: where a head goes, no head before it lies. numpy minds that a head overlaps itself.
            for row in reversed(range(batch)):
                used = int(self.lengths[row])
                for head in reversed(range(heads)):
                    wide[row, head, :used] = narrow[row, head, :used]
            self._buffers[name] = wide

    def narrow(self) -> None:
        """Move heads together again, after tokens were forgotten."""
        if self._fixed:
            return
        tokens = max(1, int(self.lengths.max()))
        for name, wide in self._buffers.items():
            batch, heads, room, dim = wide.shape
            least = min(self.capacity, -(-tokens // _STEP) * _STEP)
            if least >= room:
                return
            narrow = self._laid(name, (batch, heads, least, dim))
            for row in range(batch):  # the first first: where a head goes, no head after it lies
                used = int(self.lengths[row])
                for head in range(heads):
                    narrow[row, head, :used] = wide[row, head, :used]
            self._buffers[name] = narrow

    def _laid(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        return self._memory[name][: math.prod(shape)].reshape(shape)

    def advance(self, row: int, count: int) -> None:
        """Count `count` tokens that the graph has written to `row`."""
        self.reserve(row, count)
        self._lengthen(row, count)

    def _lengthen(self, row: int, count: int) -> None:
        self.lengths[row] += count
        self.held = max(self.held, int(self.lengths.sum()))

    def rewind(self, row: int, length: int) -> None:
        """Forget the tokens of `row` from `length` on; what lies beyond is overwritten later, never read."""
        if not 0 <= length <= self.lengths[row]:
            raise ValueError(f"cannot rewind row {row} to {length}, it holds {int(self.lengths[row])}")
        self.lengths[row] = length

    def move(self, source: int, target: int) -> None:
        """Copy row `source` over row `target` (its used part)."""
        used = int(self.lengths[source])
        for b in self._buffers.values():
            b[target, :, :used] = b[source, :, :used]
        self.lengths[target] = used

    def read(self, row: int, start: int, stop: int) -> dict[str, np.ndarray]:
        """Copies of the tokens [start, stop) of `row`: {past input name: [kv_heads, stop - start, d]}."""
        if not 0 <= start <= stop <= self.lengths[row]:
            raise ValueError(f"cannot read tokens {start} to {stop} of row {row}, it holds {int(self.lengths[row])}")
        return {name: b[row, :, start:stop].copy() for name, b in self._buffers.items()}

    def append(self, row: int, tokens: dict[str, np.ndarray], count: int) -> None:
        """Put the first `count` tokens of what `read` gave (of this cache or another of the same spec) after those of
        `row`, as though the graph had written them there.

        Raises:
            CapacityError: they do not fit.
        """
        self.reserve(row, count)
        start = int(self.lengths[row])
        for name, b in self._buffers.items():
            b[row, :, start : start + count] = tokens[name][:, :count]
        self._lengthen(row, count)

    def fork(self) -> KVCache:
        """An independent copy; only the used part is copied."""
        other = KVCache(self._spec, self.capacity, self.batch)
        used = int(self.lengths.max())
        other._widen(used)
        for name, b in self._buffers.items():
            other._buffers[name][:, :, :used] = b[:, :, :used]
        other.lengths[:] = self.lengths
        other.held = int(other.lengths.sum())
        return other


def check_capacity(spec: GraphSpec, capacity: int) -> None:
    """Raises CapacityError for another capacity than the graph's, where it is fixed."""
    fixed = spec.input(spec.cache[0][0]).shape[2]
    if isinstance(fixed, int) and fixed != capacity:
        raise CapacityError(
            f"a KV cache of {capacity} tokens was asked for, the graph was exported for exactly {fixed}; "
            f"export with --max-tokens {capacity}, or leave the capacity away"
        )


def _zeros(count: int, dtype: np.dtype) -> np.ndarray:
    """Zeros whose pages the system gives one by one. numpy asks for huge pages, which makes the first token of every
    head resident with 2 MB: 224 MB for 300 tokens of a 2B model."""
    return np.frombuffer(mmap.mmap(-1, max(1, count * dtype.itemsize)), dtype, count)
