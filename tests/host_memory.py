"""Host memory behind the interface of edgevl.runtime.cuda_memory, and ONNX Runtime behind that of a TensorRT context.

What can be tested without a GPU is everything but the GPU: addresses, pitches, shapes, feeds, what is captured and what
a replay then does. The copies are memmove, the kernels are ONNX Runtime's on the very same graph file. A capture
records what is put on the stream and does nothing else, as CUDA's does.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime as ort

from edgevl.runtime.cuda_memory import CudaGraph, CudaRuntime, DeviceBuffer, PinnedArray, Stream
from edgevl.runtime.errors import EngineError
from edgevl.runtime.graph_spec import GraphSpec


class HostCuda(CudaRuntime):
    def __init__(self, total: int = 1 << 30) -> None:
        self.total = total
        self.blocks: dict[int, np.ndarray] = {}
        self.device = 0

    def memory(self) -> tuple[int, int]:
        return self.total - sum(b.nbytes for b in self.blocks.values()), self.total

    def _block(self, nbytes: int) -> int:
        block = np.full(max(1, nbytes), 0xFF, np.uint8)  # NaN in every float type
        self.blocks[block.ctypes.data] = block
        return block.ctypes.data

    def allocate(self, nbytes: int, what: str, advice: str) -> DeviceBuffer:
        if nbytes > self.memory()[0]:
            raise EngineError(f"{what} needs {nbytes}; {advice}")
        return DeviceBuffer(self, self._block(nbytes), nbytes)

    def pinned(self, nbytes: int) -> PinnedArray:
        return PinnedArray(self, self._block(nbytes), nbytes)

    def stream(self) -> Stream:
        return HostStream(self)

    def release(self, name: str, pointer: int) -> None:
        if name in ("cudaFree", "cudaFreeHost"):
            del self.blocks[pointer]  # a second free is an error


class HostStream(Stream):
    def __init__(self, cuda: HostCuda) -> None:
        super().__init__(cuda, 0)
        self.recording: list[Callable[[], object]] | None = None
        self.launches = self.captures = 0

    def do(self, work: Callable[[], object]) -> None:
        if self.recording is None:
            work()
        else:
            self.recording.append(work)

    def copy(self, target: int, source: int, nbytes: int) -> None:
        self.do(lambda: ctypes.memmove(target, source, nbytes))

    def copy_rows(self, target: int, target_pitch: int, source: int, source_pitch: int, width: int, rows: int) -> None:
        assert width <= target_pitch or rows <= 1
        for i in range(rows):
            self.copy(target + i * target_pitch, source + i * source_pitch, width)

    def clear(self, target: int, nbytes: int) -> None:
        self.do(lambda: ctypes.memset(target, 0, nbytes))

    def synchronize(self) -> None:
        if self.recording is not None:
            raise EngineError("synchronize while capturing")

    def begin_capture(self) -> None:
        self.recording = []
        self.captures += 1

    def end_capture(self) -> HostGraph:
        assert self.recording is not None
        work, self.recording = self.recording, None
        return HostGraph(work)

    def abandon_capture(self) -> None:
        self.recording = None


class HostGraph(CudaGraph):
    def __init__(self, work: list[Callable[[], object]]) -> None:
        self.work = work

    def launch(self, stream: Stream) -> None:
        assert isinstance(stream, HostStream)
        stream.launches += 1
        for step in self.work:
            step()


class OrtContext:
    """One graph file on ONNX Runtime, inputs and outputs at given addresses."""

    def __init__(self, path: Path, spec: GraphSpec, stream: HostStream) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self.spec, self.stream = spec, stream
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}

    def shape(self, name: str, shape: tuple[int, ...]) -> None:
        assert name in {t.name for t in self.spec.inputs} and min(shape) > 0  # TensorRT takes no empty tensor
        self.shapes[name] = shape

    def address(self, name: str, pointer: int) -> None:
        self.addresses[name] = pointer

    def enqueue(self) -> None:
        shapes, addresses = dict(self.shapes), dict(self.addresses)
        self.stream.do(lambda: self.run(shapes, addresses))

    def run(self, shapes: dict[str, tuple[int, ...]], addresses: dict[str, int]) -> None:
        binding = self.session.io_binding()
        for t in self.spec.inputs:
            binding.bind_input(t.name, "cpu", 0, np.dtype(t.dtype), shapes[t.name], addresses[t.name])
        for t in self.spec.outputs:
            shape = self.output_shape(t.name, t.shape, shapes)
            binding.bind_output(t.name, "cpu", 0, np.dtype(t.dtype), shape, addresses[t.name])
        self.session.run_with_iobinding(binding)

    def output_shape(
        self, name: str, axes: tuple[int | str, ...], shapes: dict[str, tuple[int, ...]]
    ) -> tuple[int, ...]:
        sizes: dict[str, int] = {}
        for t in self.spec.inputs:
            sizes |= {a: n for a, n in zip(t.shape, shapes[t.name]) if isinstance(a, str)}
        if name == "image_embeds":
            sizes["image_tokens"] = sizes["frames"] * sizes["patches"] // 4
        return tuple(sizes[a] if isinstance(a, str) else a for a in axes)
