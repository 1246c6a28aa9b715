"""Whichever TensorRT is installed: `tensorrt` (10.x, 11.x) or `tensorrt_rtx`, behind one set of calls.

The two have the same classes; what only some versions have is asked for by name before it is used.
"""

from __future__ import annotations

import importlib
import importlib.util
import platform
import sys
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgevl.runtime.errors import EngineError
from edgevl.runtime.plans import FLAVOURS

__all__ = ["BuildLog", "TensorRT", "find_tensorrt", "how_to_install", "installed_versions"]

_NAMES = {"tensorrt": "TensorRT", "tensorrt_rtx": "TensorRT-RTX"}
_KEPT, _LONGEST = 100, 600  # messages, and characters of one that is told


@dataclass(frozen=True)
class TensorRT:
    """An imported library."""

    flavour: str
    module: Any

    @property
    def version(self) -> str:
        return str(self.module.__version__)

    @property
    def name(self) -> str:
        return f"{_NAMES[self.flavour]} {self.version}"

    def at_least(self, least: str) -> bool:
        return _numbers(self.version) >= _numbers(least)

    def targets(self) -> list[str]:
        """Compute capabilities (`sm86`) that can be built for without such a GPU; none for standard TensorRT."""
        known = getattr(self.module, "ComputeCapability", None)
        names = [] if known is None else [n.lower() for n in dir(known) if n.startswith("SM")]
        return sorted(names, key=lambda n: int(n[2:]))


def find_tensorrt(flavour: str | None = None) -> TensorRT:
    """Import `flavour`, or the first that is installed and can be imported: TensorRT, then TensorRT-RTX.

    Raises:
        EngineError: none is installed (says what to install here), or none can be imported.
    """
    broken = []
    for name in FLAVOURS if flavour is None else (flavour,):
        if importlib.util.find_spec(name) is None:
            continue
        try:
            module = importlib.import_module(name)
        except Exception as e:  # of bindings that do not fit their libraries, or numpy: any class
            reason = " ".join(str(e).split()) or type(e).__name__
            broken.append(f"{name} is installed but cannot be imported: {reason}; {how_to_install(name)}")
            continue
        if hasattr(module, "Builder"):  # a folder without the bindings imports too
            return TensorRT(name, module)
    if broken:
        raise EngineError("; ".join(broken))
    wanted = "TensorRT" if flavour is None else _NAMES[flavour]
    raise EngineError(f"{wanted} is not installed here; {how_to_install(flavour)}")


def how_to_install(flavour: str | None = None) -> str:
    """What to do to get TensorRT on this machine."""
    machine = platform.machine().lower()
    rtx = "pip install tensorrt-rtx"
    if Path("/etc/nv_tegra_release").exists():
        return (
            "on a Jetson it comes with JetPack: sudo apt install python3-libnvinfer (tensorrt) and make the virtual "
            "environment with --system-site-packages"
        )
    if sys.platform == "darwin":
        return "there is none for macOS: build on the device"
    if machine not in ("x86_64", "amd64", "aarch64", "arm64"):
        return f"there is none for {machine}: build on the device"
    if flavour == "tensorrt_rtx":
        return rtx
    if sys.platform == "win32":
        return f"{rtx} (GeForce RTX, builds without a GPU too), or pip install tensorrt-cu12"
    return f"pip install tensorrt-cu12 (or tensorrt-cu13, by your driver); without a GPU, {rtx}"


def installed_versions() -> dict[str, str]:
    """{flavour: version} of what can be imported here."""
    found = {}
    for flavour in FLAVOURS:
        try:
            found[flavour] = find_tensorrt(flavour).version
        except EngineError:
            continue
    return found


class BuildLog:
    """TensorRT's messages: the latest warnings, and errors for the message of a call that fails."""

    def __init__(self, library: TensorRT) -> None:
        self.errors: deque[str] = deque(maxlen=_KEPT)
        self.warnings: deque[str] = deque(maxlen=_KEPT)
        log = self
        base = library.module.ILogger
        error, warning = base.Severity.ERROR, base.Severity.WARNING

        class Logger(base):
            def log(self, severity: Any, msg: str) -> None:
                if severity <= error:
                    log.errors.append(msg)
                elif severity == warning:
                    log.warnings.append(msg)

        self.logger = Logger()

    def reason(self) -> str:
        """The last error on one line."""
        if not self.errors:
            return "it gave no reason"
        text = " ".join(self.errors[-1].split())
        return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"

    def forget_errors(self) -> None:
        """Before a call: an error of an earlier one is not its reason."""
        self.errors.clear()


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:3] if part.isdigit())
