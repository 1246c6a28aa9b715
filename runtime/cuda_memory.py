"""CUDA's runtime through ctypes: device and pinned memory, copies, streams, graphs. Every call is checked and named.

ctypes rather than the cuda-python package: some thirty functions of one library whose C interface is the same from
CUDA 11.4 to 13, and which is there wherever CUDA is, on JetPack 6 (Python 3.10, CUDA 12.6) without a further wheel.
The structures that do change between versions are not touched. Knows no engine and no model.
"""

from __future__ import annotations

import ctypes
import importlib.util
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from edgevl.runtime.errors import EngineError

__all__ = ["FUNCTIONS", "CudaGraph", "CudaRuntime", "DeviceBuffer", "PinnedArray", "Stream", "gigabytes"]

_P, _I, _U, _Z, _S = ctypes.c_void_p, ctypes.c_int, ctypes.c_uint, ctypes.c_size_t, ctypes.c_char_p
_OUT_P, _OUT_I, _OUT_Z = ctypes.POINTER(_P), ctypes.POINTER(_I), ctypes.POINTER(_Z)
# name -> argument types (driver_types.h, cuda_runtime_api.h); all return cudaError_t but the two that name errors
FUNCTIONS: dict[str, tuple[type, ...]] = {
    "cudaGetErrorName": (_I,),
    "cudaGetErrorString": (_I,),
    "cudaRuntimeGetVersion": (_OUT_I,),
    "cudaDriverGetVersion": (_OUT_I,),
    "cudaGetDeviceCount": (_OUT_I,),
    "cudaSetDevice": (_I,),
    "cudaDeviceGetAttribute": (_OUT_I, _I, _I),
    "cudaMemGetInfo": (_OUT_Z, _OUT_Z),
    "cudaMalloc": (_OUT_P, _Z),
    "cudaFree": (_P,),
    "cudaHostAlloc": (_OUT_P, _Z, _U),
    "cudaFreeHost": (_P,),
    "cudaMemcpyAsync": (_P, _P, _Z, _I, _P),
    "cudaMemcpy2DAsync": (_P, _Z, _P, _Z, _Z, _Z, _I, _P),
    "cudaMemsetAsync": (_P, _I, _Z, _P),
    "cudaStreamCreateWithFlags": (_OUT_P, _U),
    "cudaStreamDestroy": (_P,),
    "cudaStreamSynchronize": (_P,),
    "cudaStreamBeginCapture": (_P, _I),
    "cudaStreamEndCapture": (_P, _OUT_P),
    "cudaGraphInstantiateWithFlags": (_OUT_P, _P, ctypes.c_ulonglong),
    "cudaGraphLaunch": (_P, _P),
    "cudaGraphExecDestroy": (_P,),
    "cudaGraphDestroy": (_P,),
    "cudaGetLastError": (),
}
_VERSIONS = ("13", "12", "11.0")  # sonames
_MEMCPY_DEFAULT = 4  # cudaMemcpyDefault: the direction follows from the addresses
_NON_BLOCKING = 1  # cudaStreamNonBlocking: not held up by the legacy default stream
_CAPTURE_RELAXED = 2  # cudaStreamCaptureModeRelaxed: other threads may allocate meanwhile
_MAJOR, _MINOR = 75, 76  # cudaDevAttrComputeCapabilityMajor / Minor
_INTEGRATED = 18  # cudaDevAttrIntegrated: the GPU works in the machine's memory
_OUT_OF_MEMORY = 2
MEMINFO = Path("/proc/meminfo")


class CudaRuntime:
    """The loaded library, bound to one device. CUDA keeps the current device per thread, and any library may change it:
    whatever depends on it calls `use` first.

    Raises:
        EngineError: no library (says where it was looked for), no driver, no such device.
    """

    def __init__(self, device: int = 0) -> None:
        self._library, self.path = _load()
        self.device = device
        count = _I()
        self.call("cudaGetDeviceCount", ctypes.byref(count))
        if not 0 <= device < count.value:
            raise EngineError(f"GPU {device} does not exist; expected a number from 0 to {count.value - 1}")
        self.use()

    def use(self) -> None:
        """Make the device the calling thread's; far less than a microsecond where it is already."""
        self.call("cudaSetDevice", self.device)

    def call(self, name: str, *arguments: object) -> None:
        """Call `name` and raise EngineError, with the error's name and text, where it does not return success."""
        status = getattr(self._library, name)(*arguments)
        if status:
            self._library.cudaGetLastError()  # clears it: the next call must not report it again
            raise EngineError(
                f"CUDA: {name} failed: {self.error_name(status)} ({self._text('cudaGetErrorString', status)})"
            )

    def error_name(self, status: int) -> str:
        return self._text("cudaGetErrorName", status)

    def _text(self, name: str, status: int) -> str:
        found = getattr(self._library, name)(status)
        return found.decode(errors="replace") if found else f"error {status}"

    @property
    def version(self) -> tuple[int, int]:
        """(major, minor) of the runtime library."""
        value = _I()
        self.call("cudaRuntimeGetVersion", ctypes.byref(value))
        return value.value // 1000, value.value % 1000 // 10

    @property
    def capability(self) -> tuple[int, int]:
        """Compute capability (major, minor) of the device."""
        return self._attribute(_MAJOR), self._attribute(_MINOR)

    def _attribute(self, number: int) -> int:
        value = _I()
        self.call("cudaDeviceGetAttribute", ctypes.byref(value), number, self.device)
        return value.value

    def memory(self) -> tuple[int, int]:
        """(free, total) bytes of the device. On a Jetson this is the machine's memory, of which CUDA does not count as
        free what the kernel keeps files in and gives back on demand."""
        self.use()
        free, total = _Z(), _Z()
        self.call("cudaMemGetInfo", ctypes.byref(free), ctypes.byref(total))
        if not self._attribute(_INTEGRATED):
            return free.value, total.value
        return max(free.value, min(_available(), total.value)), total.value

    def allocate(self, nbytes: int, what: str, advice: str) -> DeviceBuffer:
        """Device memory, not cleared.

        Args:
            what: names it in the error of a device that is too full; `advice` says what to do then.
        """
        self.use()
        pointer = _P()
        status = self._library.cudaMalloc(ctypes.byref(pointer), max(1, nbytes))
        if status == _OUT_OF_MEMORY:
            self._library.cudaGetLastError()
            raise EngineError(out_of_memory(what, nbytes, *self.memory(), advice))
        if status:
            raise EngineError(f"CUDA: cudaMalloc of {nbytes:,} bytes failed: {self.error_name(status)}")
        return DeviceBuffer(self, int(pointer.value or 0), nbytes)

    def pinned(self, nbytes: int) -> PinnedArray:
        """Page-locked host memory: copies from and to it do not wait for the host."""
        self.use()
        pointer = _P()
        self.call("cudaHostAlloc", ctypes.byref(pointer), max(1, nbytes), 0)
        return PinnedArray(self, int(pointer.value or 0), nbytes)

    def stream(self) -> Stream:
        self.use()
        pointer = _P()
        self.call("cudaStreamCreateWithFlags", ctypes.byref(pointer), _NON_BLOCKING)
        return Stream(self, int(pointer.value or 0))

    def release(self, name: str, pointer: int) -> None:
        """Free something as it is collected; a context that is gone already has freed it."""
        getattr(self._library, name)(pointer)


class DeviceBuffer:
    """Device memory, freed when collected."""

    def __init__(self, cuda: CudaRuntime, pointer: int, nbytes: int) -> None:
        self.cuda, self.pointer, self.nbytes = cuda, pointer, nbytes
        self._free = weakref.finalize(self, cuda.release, "cudaFree", pointer)

    def close(self) -> None:
        self._free()


class PinnedArray:
    """Page-locked host memory as `array`, uint8 [nbytes]; freed when collected, so keep it while the array is used."""

    def __init__(self, cuda: CudaRuntime, pointer: int, nbytes: int) -> None:
        self.pointer, self.nbytes = pointer, nbytes
        raw = (ctypes.c_uint8 * max(1, nbytes)).from_address(pointer)
        self.array: np.ndarray = np.frombuffer(raw, np.uint8, nbytes)
        self._free = weakref.finalize(self, cuda.release, "cudaFreeHost", pointer)

    def close(self) -> None:
        self._free()


class Stream:
    """Work in order; destroyed when collected."""

    def __init__(self, cuda: CudaRuntime, pointer: int) -> None:
        self.cuda, self.pointer = cuda, pointer
        self._destroy = weakref.finalize(self, cuda.release, "cudaStreamDestroy", pointer)

    def copy(self, target: int, source: int, nbytes: int) -> None:
        """Between any two addresses, device or host. Host memory that is not pinned must outlive `synchronize`."""
        if nbytes:
            self.cuda.call("cudaMemcpyAsync", target, source, nbytes, _MEMCPY_DEFAULT, self.pointer)

    def copy_rows(self, target: int, target_pitch: int, source: int, source_pitch: int, width: int, rows: int) -> None:
        """`rows` times `width` bytes, each a pitch after the one before."""
        if width and rows:
            arguments = (target, target_pitch, source, source_pitch, width, rows, _MEMCPY_DEFAULT, self.pointer)
            self.cuda.call("cudaMemcpy2DAsync", *arguments)

    def clear(self, target: int, nbytes: int) -> None:
        if nbytes:
            self.cuda.call("cudaMemsetAsync", target, 0, nbytes, self.pointer)

    def synchronize(self) -> None:
        self.cuda.call("cudaStreamSynchronize", self.pointer)

    def begin_capture(self) -> None:
        self.cuda.call("cudaStreamBeginCapture", self.pointer, _CAPTURE_RELAXED)

    def end_capture(self) -> CudaGraph:
        graph, executable = _P(), _P()
        self.cuda.call("cudaStreamEndCapture", self.pointer, ctypes.byref(graph))
        try:
            self.cuda.call("cudaGraphInstantiateWithFlags", ctypes.byref(executable), graph, 0)
        finally:
            self.cuda.release("cudaGraphDestroy", int(graph.value or 0))
        return CudaGraph(self.cuda, int(executable.value or 0))

    def abandon_capture(self) -> None:
        """End a capture in which a call failed; the stream can be used again."""
        graph = _P()
        try:
            self.cuda.call("cudaStreamEndCapture", self.pointer, ctypes.byref(graph))
        except EngineError:  # the capture was invalidated, which is why we are here
            return
        if graph.value:
            self.cuda.release("cudaGraphDestroy", graph.value)

    def close(self) -> None:
        self._destroy()


class CudaGraph:
    """Captured work: the same kernels and copies at the same addresses, launched at once."""

    def __init__(self, cuda: CudaRuntime, pointer: int) -> None:
        self.cuda, self.pointer = cuda, pointer
        self._destroy = weakref.finalize(self, cuda.release, "cudaGraphExecDestroy", pointer)

    def launch(self, stream: Stream) -> None:
        self.cuda.call("cudaGraphLaunch", self.pointer, stream.pointer)

    def close(self) -> None:
        self._destroy()


def gigabytes(nbytes: int) -> str:
    """`1.34 GB`."""
    return f"{nbytes / 1e9:.2f} GB"


def out_of_memory(what: str, needed: int, free: int, total: int, advice: str) -> str:
    return f"{what} needs {gigabytes(needed)} of GPU memory, {gigabytes(free)} of {gigabytes(total)} are free; {advice}"


def _available() -> int:
    """Bytes of the machine's memory that can be had without swapping (Linux' MemAvailable); 0 where none tells."""
    try:
        lines = MEMINFO.read_text().splitlines()
    except OSError:
        return 0
    found = [line.split() for line in lines if line.startswith("MemAvailable:")]
    return int(found[0][1]) * 1024 if found else 0


def _load() -> tuple[ctypes.CDLL, str]:
    """The newest runtime that this machine's driver can serve; where it serves none, the newest, which will say why.

    Several may be here: CUDA's own, and those that Python packages brought.
    """
    found = []
    for candidate in _candidates():
        try:
            library = ctypes.CDLL(candidate)
        except OSError:
            continue
        if not _bind(library):
            continue
        if library.cudaGetDeviceCount(ctypes.byref(_I())) == 0:
            return library, candidate
        found.append((library, candidate))
    if found:
        return found[0]
    raise EngineError(
        "CUDA's runtime library is not found here (libcudart.so.12 or .13, CUDA 11.4 or newer); on a Jetson it comes "
        "with JetPack, elsewhere install CUDA or pip install nvidia-cuda-runtime-cu12 (nvidia-cuda-runtime for CUDA 13)"
    )


def _bind(library: ctypes.CDLL) -> bool:
    """Declare the functions; False where the library lacks one, being older than CUDA 11.4."""
    for name, arguments in FUNCTIONS.items():
        function = getattr(library, name, None)
        if function is None:
            return False
        function.argtypes = list(arguments)
        function.restype = _S if name in ("cudaGetErrorName", "cudaGetErrorString") else _I
    return True


def _candidates() -> Iterator[str]:
    if sys.platform == "win32":
        yield from ("cudart64_13.dll", "cudart64_12.dll", "cudart64_110.dll")
        return
    yield from (f"libcudart.so.{v}" for v in _VERSIONS)
    yield from (f"/usr/local/cuda/lib64/libcudart.so.{v}" for v in _VERSIONS)
    spec = importlib.util.find_spec("nvidia")  # a namespace package that the wheels share
    for place in spec.submodule_search_locations or () if spec else ():
        yield from sorted((str(p) for p in Path(place).glob("*/lib/libcudart.so.*")), reverse=True)
