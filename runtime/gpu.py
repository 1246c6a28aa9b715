"""The NVIDIA GPU of this machine by its driver (libcuda through ctypes): name, compute capability, memory. No torch."""

from __future__ import annotations

import ctypes
import sys
from dataclasses import dataclass

__all__ = ["Gpu", "current_gpu", "driver_cuda_version"]

_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR / _MINOR, cuda.h


@dataclass(frozen=True)
class Gpu:
    name: str
    capability: tuple[int, int]  # (major, minor)
    memory: int  # bytes, of the whole device


def current_gpu(number: int = 0) -> Gpu | None:
    """GPU `number`; None where there is no driver or no such GPU."""
    cuda = _driver()
    device, count = ctypes.c_int(), ctypes.c_int()
    if cuda is None or cuda.cuInit(0) or cuda.cuDeviceGetCount(ctypes.byref(count)) or number >= count.value:
        return None
    name, memory = ctypes.create_string_buffer(256), ctypes.c_size_t()
    major, minor = ctypes.c_int(), ctypes.c_int()
    failed = (
        cuda.cuDeviceGet(ctypes.byref(device), number)
        or cuda.cuDeviceGetName(name, len(name), device)
        or cuda.cuDeviceTotalMem_v2(ctypes.byref(memory), device)
        or cuda.cuDeviceGetAttribute(ctypes.byref(major), _MAJOR, device)
        or cuda.cuDeviceGetAttribute(ctypes.byref(minor), _MINOR, device)
    )
    if failed:
        return None
    return Gpu(name.value.decode(errors="replace"), (major.value, minor.value), memory.value)


def driver_cuda_version() -> tuple[int, int] | None:
    """The newest CUDA (major, minor) that the driver serves; None without one."""
    cuda, value = _driver(), ctypes.c_int()
    if cuda is None or cuda.cuDriverGetVersion(ctypes.byref(value)):
        return None
    return value.value // 1000, value.value % 1000 // 10


def _driver() -> ctypes.CDLL | None:
    for library in ("nvcuda.dll",) if sys.platform == "win32" else ("libcuda.so.1", "libcuda.so"):
        try:
            return ctypes.CDLL(library)
        except OSError:
            continue
    return None
