"""The KV cache in device memory: the same rows, lengths and rewinds as on the host, copies by the device.

Buffers go back to the engine's pool when a cache is collected. So the next request finds the same addresses, and a
captured decode step, which holds addresses, can be launched again.
"""

from __future__ import annotations

import math
import weakref

import numpy as np

from edgevl.runtime.cuda_memory import CudaRuntime, DeviceBuffer, Stream
from edgevl.runtime.device_tensor import DeviceTensor, item_size
from edgevl.runtime.graph_spec import GraphSpec
from edgevl.runtime.kv_cache import KVCache, check_capacity

__all__ = ["BufferPool", "DeviceKVCache"]

_ADVICE = "open with a smaller --capacity, a smaller batch, or end other programs that use the GPU"


class BufferPool:
    """Sets of cache buffers that are not in use, by what they are for; a set is one block of device memory."""

    def __init__(self, cuda: CudaRuntime, stream: Stream, keep: int = 2) -> None:
        self._cuda, self._stream, self._keep = cuda, stream, keep
        self._free: dict[int, list[DeviceBuffer]] = {}
        self._closed = False

    def take(self, nbytes: int) -> DeviceBuffer:
        free = self._free.get(nbytes)
        if free:
            return free.pop()
        needed, (available, _) = nbytes, self._cuda.memory()
        if needed > available:
            self.clear()  # sets of other sizes
        buffer = self._cuda.allocate(needed, "the KV cache", _ADVICE)
        # Masked positions count zero times what is there: a NaN left in the memory would survive that.
        self._stream.clear(buffer.pointer, buffer.nbytes)
        self._stream.synchronize()
        return buffer

    def give(self, buffer: DeviceBuffer) -> None:
        free = self._free.setdefault(buffer.nbytes, [])
        if self._closed or len(free) >= self._keep:
            buffer.close()
        else:
            free.append(buffer)

    def clear(self) -> None:
        for buffers in self._free.values():
            for buffer in buffers:
                buffer.close()
        self._free.clear()

    def close(self) -> None:
        self._closed = True
        self.clear()


class DeviceKVCache(KVCache):
    """Keys and values of `batch` rows in device memory; see KVCache.

    Raises:
        EngineError: the device has too little memory: what was needed and what is free.
    """

    def __init__(self, spec: GraphSpec, capacity: int, batch: int, pool: BufferPool, stream: Stream) -> None:
        check_capacity(spec, capacity)
        self._spec, self._pool, self._stream = spec, pool, stream
        self.capacity = capacity
        self.lengths = np.zeros(batch, np.int64)
        self.held, self._fixed = 0, True
        shapes = {}
        for past, _ in spec.cache:
            tensor = spec.input(past)
            _, heads, _, dim = tensor.shape
            shapes[past] = ((batch, int(heads), capacity, int(dim)), tensor.dtype)
        sizes = [math.prod(shape) * item_size(dtype) for shape, dtype in shapes.values()]
        memory = pool.take(sum(sizes))
        self._give_back = weakref.finalize(self, pool.give, memory)
        self._buffers: dict[str, DeviceTensor] = {}
        offset = 0
        for (name, (shape, dtype)), size in zip(shapes.items(), sizes):
            self._buffers[name] = DeviceTensor(memory, stream, dtype, shape, offset)
            offset += size

    def move(self, source: int, target: int) -> None:
        """Copy row `source` over row `target` (its used part)."""
        used = int(self.lengths[source])
        for b in self._buffers.values():
            self._copy(b[target : target + 1], 0, b[source : source + 1], 0, used)
        self._stream.synchronize()
        self.lengths[target] = used

    def fork(self) -> DeviceKVCache:
        """An independent copy; only the used part is copied."""
        other = DeviceKVCache(self._spec, self.capacity, self.batch, self._pool, self._stream)
        used = int(self.lengths.max())
        for name, b in self._buffers.items():
            self._copy(other._buffers[name], 0, b, 0, used)
        self._stream.synchronize()
        other.lengths[:] = self.lengths
        other.held = int(other.lengths.sum())
        return other

    def read(self, row: int, start: int, stop: int) -> dict[str, np.ndarray]:
        """Copies on the host of the tokens [start, stop) of `row`: {past input name: [kv_heads, stop - start, d]}.
        bfloat16 comes as its bits, uint16."""
        if not 0 <= start <= stop <= self.lengths[row]:
            raise ValueError(f"cannot read tokens {start} to {stop} of row {row}, it holds {int(self.lengths[row])}")
        found = {}
        for name, b in self._buffers.items():
            _, heads, _, dim = b.shape
            out = np.empty((heads, stop - start, dim), np.uint16 if b.dtype == "bfloat16" else b.dtype)
            token = dim * item_size(b.dtype)
            source = b[row : row + 1].pointer + start * token
            width = (stop - start) * token
            self._stream.copy_rows(out.ctypes.data, width, source, self.capacity * token, width, heads)
            found[name] = out
        self._stream.synchronize()
        return found

    def append(self, row: int, tokens: dict[str, np.ndarray], count: int) -> None:
        """Put the first `count` tokens of what `read` gave after those of `row`, as though the graph had written them.

        Raises:
            CapacityError: they do not fit.
        """
        self.reserve(row, count)
        start = int(self.lengths[row])
        for name, b in self._buffers.items():
            _, heads, _, dim = b.shape
            given = np.ascontiguousarray(tokens[name])
            token = dim * item_size(b.dtype)
            target = b[row : row + 1].pointer + start * token
            pitch = given.shape[1] * token
            self._stream.copy_rows(target, self.capacity * token, given.ctypes.data, pitch, count * token, heads)
        self._stream.synchronize()
        self._lengthen(row, count)

    def _copy(self, target: DeviceTensor, target_start: int, source: DeviceTensor, start: int, count: int) -> None:
        """`count` tokens of every head of every row, both of one shape but for the rows."""
        rows, heads, _, dim = source.shape
        token = dim * item_size(source.dtype)
        pitch = self.capacity * token
        self._stream.copy_rows(
            target.pointer + target_start * token,
            pitch,
            source.pointer + start * token,
            pitch,
            count * token,
            rows * heads,
        )
