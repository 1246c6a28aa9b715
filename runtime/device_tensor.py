"""Tensors in device memory, as far as the host needs them: shape, rows, a copy to the host. And staging of feeds.

An engine on a GPU gives image embeddings as a DeviceTensor; the decoder loop slices rows off it and hands them back,
and nothing is copied. numpy functions that are given one copy it to the host and go on (`__array__`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from edgevl.runtime.cuda_memory import CudaRuntime, DeviceBuffer, PinnedArray, Stream

__all__ = ["ALIGNMENT", "DeviceTensor", "Rows", "Staging", "freeze", "item_size", "join_rows", "plan_offsets"]

ALIGNMENT = 256  # bytes; what TensorRT asks of the addresses it is given


def item_size(dtype: str) -> int:
    """Bytes of one number; numpy does not know bfloat16."""
    return 2 if dtype == "bfloat16" else np.dtype(dtype).itemsize


@dataclass(frozen=True)
class DeviceTensor:
    """A contiguous tensor in device memory. Keeps its memory alive; rows of it share the memory.

    Args:
        memory: what the tensor lies in; `offset` bytes from its start.
        dtype: numpy's name, or `bfloat16`.
    """

    memory: DeviceBuffer
    stream: Stream
    dtype: str
    shape: tuple[int, ...]
    offset: int = 0

    @property
    def pointer(self) -> int:
        return self.memory.pointer + self.offset

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * item_size(self.dtype)

    @property
    def row_bytes(self) -> int:
        return math.prod(self.shape[1:]) * item_size(self.dtype)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice) -> DeviceTensor:
        """Rows [start, stop) of the first axis, sharing memory."""
        start, stop, step = rows.indices(len(self))
        if step != 1:
            raise ValueError(f"rows of a device tensor follow one another, step is {step}")
        count = max(0, stop - start)
        offset = self.offset + start * self.row_bytes
        return DeviceTensor(self.memory, self.stream, self.dtype, (count, *self.shape[1:]), offset)

    def numpy(self) -> np.ndarray:
        """A copy on the host; bfloat16 comes as float32, which holds it exactly."""
        bits = self.dtype == "bfloat16"
        out = np.empty(self.shape, np.uint16 if bits else self.dtype)
        self.stream.copy(out.ctypes.data, self.pointer, self.nbytes)
        self.stream.synchronize()
        return (out.astype(np.uint32) << np.uint32(16)).view(np.float32) if bits else out

    def __array__(self, dtype: object = None, copy: bool | None = None) -> np.ndarray:
        if copy is False:
            raise ValueError("a device tensor cannot be seen from the host without a copy")
        found = self.numpy()
        return found if dtype is None else found.astype(np.dtype(dtype))  # type: ignore[call-overload]


Rows = np.ndarray | DeviceTensor


def join_rows(parts: Sequence[Rows]) -> Rows:
    """The rows of all parts in one tensor: on the device where every part is there in one dtype, else on the host."""
    first = parts[0]
    if len(parts) == 1:
        return first
    if not all(isinstance(p, DeviceTensor) for p in parts) or len({(p.dtype, p.shape[1:]) for p in parts}) > 1:
        return np.concatenate([np.asarray(p) for p in parts])
    tensors = [p for p in parts if isinstance(p, DeviceTensor)]
    count, total = sum(len(t) for t in tensors), sum(t.nbytes for t in tensors)
    stream = tensors[0].stream
    memory = stream.cuda.allocate(total, "joining the embeddings of several pictures", "use smaller pictures")
    offset = 0
    for tensor in tensors:
        stream.copy(memory.pointer + offset, tensor.pointer, tensor.nbytes)
        offset += tensor.nbytes
    stream.synchronize()
    return DeviceTensor(memory, stream, tensors[0].dtype, (count, *tensors[0].shape[1:]))


def freeze(rows: Rows) -> None:
    """Make an array read-only; a device tensor is already."""
    if isinstance(rows, np.ndarray):
        rows.flags.writeable = False


def plan_offsets(sizes: Mapping[str, int], alignment: int = ALIGNMENT) -> tuple[dict[str, int], int]:
    """Places of several tensors in one block: ({name: offset}, bytes in all), each aligned and of its own.

    An empty tensor gets an address too: engines want one.
    """
    offsets, end = {}, 0
    for name, size in sizes.items():
        offsets[name] = end
        end += -(-max(1, size) // alignment) * alignment
    return offsets, end


class Staging:
    """The small inputs of a graph: written to one pinned block on the host, copied to the device at once.

    The addresses on the device stay as long as no set of inputs is larger than any before.
    """

    def __init__(self, cuda: CudaRuntime, stream: Stream) -> None:
        self._cuda, self._stream = cuda, stream
        self._host: PinnedArray | None = None
        self._device: DeviceBuffer | None = None
        self._used = 0

    @property
    def addresses(self) -> tuple[int, int]:
        """Of the block on the device and of that on the host; they change when a larger one is needed."""
        if self._device is None or self._host is None:
            return 0, 0
        return self._device.pointer, self._host.pointer

    def write(self, arrays: Mapping[str, np.ndarray]) -> dict[str, int]:
        """Lay the arrays out in the pinned block; returns their addresses on the device. `send` copies them."""
        offsets, size = plan_offsets({name: a.nbytes for name, a in arrays.items()})
        if self._host is None or self._device is None or size > self._device.nbytes:
            self._stream.synchronize()  # what is in use must not be freed
            self._host = self._cuda.pinned(size)
            self._device = self._cuda.allocate(size, "the inputs of a graph", "use smaller pictures or prefill chunks")
        for name, array in arrays.items():
            start = offsets[name]
            flat = np.ascontiguousarray(array).reshape(-1)
            self._host.array[start : start + flat.nbytes] = flat.view(np.uint8)
        self._used = size
        return {name: self._device.pointer + offset for name, offset in offsets.items()}

    def send(self) -> None:
        """Put the copy of what was written on the stream."""
        if self._host is not None and self._device is not None:
            self._stream.copy(self._device.pointer, self._host.pointer, self._used)
