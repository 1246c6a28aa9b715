"""What a figure was measured on: everything that must stand beside it."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

from edgevl.runtime.doctor import cpu_flags, machine
from edgevl.runtime.engine import usable_cores

__all__ = ["system_info"]


def system_info(threads: int) -> dict[str, Any]:
    """Processor, flags, memory, package versions, threads, power mode, GPUs; None where the machine does not tell."""
    load = round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None  # before anything that adds to it
    return {
        **machine(),
        "cpu_flags": cpu_flags(),
        "threads": threads,
        "cores": usable_cores(),
        "governor": _read(Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")),
        "power_mode": _power_mode(),
        "gpus": _gpus(),
        "load_before": load,
        "hypervisor": "hypervisor" in _read_all(Path("/proc/cpuinfo")).split(),
    }


def _power_mode() -> str | None:
    """Jetson's, such as `MAXN`."""
    text = _output(["nvpmodel", "-q"])
    lines = [line for line in text.splitlines() if "NV Power Mode" in line]
    return lines[0].split(":", 1)[1].strip() if lines else None


def _gpus() -> list[str]:
    text = _output(["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"])
    return [line.strip() for line in text.splitlines() if line.strip()]


def _output(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


def _read(path: Path) -> str | None:
    return _read_all(path).strip() or None


def _read_all(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
