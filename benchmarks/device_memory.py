"""Memory of the GPU while measuring, and which kinds of memory cannot be told apart here."""

from __future__ import annotations

from edgevl.runtime.cuda_memory import CudaRuntime
from edgevl.runtime.errors import EngineError

__all__ = ["DeviceMemory", "absences", "gpu_used"]

_GPU_ENGINES = ("ort-cuda", "tensorrt")
_NO_ARENA = "ONNX Runtime's Python API tells nothing of its allocators"


def gpu_used() -> float | None:
    """Bytes of the device in use by everybody; None without a GPU."""
    try:
        free, total = CudaRuntime().memory()
    except EngineError:
        return None
    return float(total - free)


class DeviceMemory:
    """The most that GPU 0 had in use, by everybody, whenever it was looked at: an engine's allocator keeps what it
    took, so that a look after each request finds that of the request. `engine`: one that uses no GPU has none."""

    def __init__(self, engine: str) -> None:
        self.absent: str | None = None if engine in _GPU_ENGINES else f"the engine {engine} uses no GPU"
        self.peak_mb: float | None = None

    def look(self) -> None:
        if self.absent is not None:
            return
        used = gpu_used()
        if used is None:
            self.absent = "CUDA's runtime library tells nothing of the GPU's memory"
        else:
            self.peak_mb = max(self.peak_mb or 0.0, used / 1e6)


def absences(memory: DeviceMemory, slow: int | bool | None) -> dict[str, str]:
    """What is not told of memory and of throttling, and why."""
    absent = {"arena memory": _NO_ARENA}
    if memory.absent is not None:
        absent["GPU memory"] = memory.absent
    if slow is None:
        absent["throttling"] = "no core_throttle_count, and no clocks of the cores (cpufreq) or too few samples of them"
    return absent
