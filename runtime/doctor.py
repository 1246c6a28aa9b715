"""What this machine is, as far as an engine cares: processor, instruction sets, memory, package versions; and what
this process has used of it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path

from edgevl.runtime.engine import usable_cores
from edgevl.runtime.gpu import current_gpu, driver_cuda_version
from edgevl.runtime.jetson import jetson_facts
from edgevl.runtime.native_kernels import describe_kernels

__all__ = ["cpu_flags", "cpu_model", "machine", "peak_rss_bytes"]

# What decides int8 and bf16 speed on x86 and ARM.
_FLAGS = (
    "avx2",
    "avx512f",
    "avx512_vnni",
    "avx_vnni",
    "avx512_bf16",
    "amx_int8",
    "amx_bf16",
    "asimddp",
    "i8mm",
    "bf16",
)
_PACKAGES = (
    "numpy",
    "pillow",
    "tokenizers",
    "jinja2",
    "onnxruntime",
    "onnxruntime-gpu",
    "openvino",
    "tensorrt",
    "tensorrt-rtx",
    "tensorrt_rtx_cu13",
    "onnx-ir",
    "torch",
    "transformers",
)


def _cpuinfo() -> str:
    path = Path("/proc/cpuinfo")
    return path.read_text(errors="replace") if path.exists() else ""


def cpu_model() -> str:
    for line in _cpuinfo().splitlines():
        if line.startswith(("model name", "Model", "Hardware")):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def cpu_flags() -> list[str]:
    """The instruction sets among those that matter which this processor has."""
    words = {w for line in _cpuinfo().splitlines() if line.startswith(("flags", "Features")) for w in line.split()}
    return [f for f in _FLAGS if f in words]


def _int8_overflows() -> bool:
    """Whether ONNX Runtime's products of uint8 by int8 are wrong where both are large: without VNNI they are made of
    VPMADDUBSW, which adds two products up in 16 bits, saturating (ONNX Runtime, "Quantize ONNX models", U8S8)."""
    flags = cpu_flags()
    return "avx2" in flags and not {"avx512_vnni", "avx_vnni"} & set(flags)


def machine() -> dict[str, str]:
    """Facts for a person to read, in order."""
    facts = {
        "edgevl": importlib.metadata.version("edgevl"),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "processor": f"{cpu_model()}, {usable_cores()} of {os.cpu_count()} cores usable",
        "instruction sets": ", ".join(cpu_flags()) or "unknown",
        "own kernels": describe_kernels(),
    }
    if _int8_overflows():
        facts["int8 products"] = (
            "ONNX Runtime's add pairs up in 16 bits on this processor and lose what is above; our own kernels do not"
        )
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        facts["memory"] = f"{os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 2**30:.1f} GiB"
    facts |= jetson_facts()
    facts["gpu"] = _gpu()
    for package in _PACKAGES:
        try:
            facts[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return facts


def _gpu() -> str:
    """Name, compute capability, memory and the CUDA version of the driver; or that there is none."""
    gpu = current_gpu()
    if gpu is None:
        return "none (no NVIDIA driver, or it has no device)"
    version = driver_cuda_version()
    driver = "" if version is None else f", driver for CUDA {version[0]}.{version[1]}"
    return "{} (compute capability {}.{}), {:.1f} GiB{}".format(gpu.name, *gpu.capability, gpu.memory / 2**30, driver)


def peak_rss_bytes() -> int:
    """Largest resident set of this process so far. Not ru_maxrss where it can be helped: Linux hands that one on from
    the process that started this one."""
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text(errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if platform.system() == "Darwin" else peak * 1024
