"""Our own operators for ONNX Runtime on the CPU: whether this machine has them.

`runtime/native` is C, built as edgevl is installed where a C compiler is found; everything works without it, more
slowly. The library registers its operators with a session: `edgevl.MatMulNBits`, products with weights of 4 and 8 bits
read where they lie in the bundle's mapped file, and `edgevl.MatMulInt8` and `edgevl.FrameAttention` for W8A8.
"""

from __future__ import annotations

import ctypes
import os
from functools import cache
from pathlib import Path

from edgevl.runtime.errors import EngineError, InputError

__all__ = ["SWITCH", "has_int8_kernels", "kernel_instructions", "native_library"]

SWITCH = "EDGEVL_KERNELS"  # environment: "off" leaves the kernels out
_NAME = "_kernels*.so"


def native_library() -> Path:
    """The library to register with a session.

    Raises:
        EngineError: it was not built, cannot be loaded, knows no instructions of this processor, or is switched off.
        InputError: the switch is neither on nor off.
    """
    path, reason = _find(os.environ.get(SWITCH, ""))
    if path is None:
        raise EngineError(f"edgevl's own kernels are not used: {reason}")
    return path


def kernel_instructions() -> str:
    """What the kernels are made of here, such as `avx512-vnni`. Raises EngineError as `native_library` does."""
    return _instructions(native_library())


def has_int8_kernels() -> bool:
    """Whether the library has the vision encoder's operators for this processor, too. Raises as `native_library`."""
    return bool(_instructions(native_library(), "edgevl_int8_instructions"))


@cache
def _find(switch: str) -> tuple[Path | None, str]:
    if switch not in ("", "on", "off"):
        raise InputError(f"the environment's {SWITCH} is {switch!r}, expected on or off")
    if switch == "off":
        return None, f"{SWITCH} is off"
    path = next(iter(sorted(Path(__file__).parent.glob(_NAME))), None)
    if path is None:
        return None, "not built (no C compiler as edgevl was installed); install gcc or clang, then edgevl again"
    try:
        known = _instructions(path)
    except (OSError, AttributeError) as e:
        return None, f"{path.name} cannot be loaded ({e}); install edgevl again"
    return (path, "") if known else (None, "this processor has none of the instructions that they know")


def _instructions(path: Path, name: str = "edgevl_instructions") -> str:
    function = ctypes.CDLL(str(path))[name]
    function.restype = ctypes.c_char_p
    return (function() or b"").decode()
