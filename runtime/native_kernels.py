"""Our own operators for ONNX Runtime on the CPU: whether this machine has them.

`runtime/native` is C, built as edgevl is installed where a C compiler is found; everything works without it, more
slowly. The library registers its operators with a session: `edgevl.MatMulNBits`, products with weights of 4 and 8
bits, `edgevl.CausalAttention` over a decoder's cache, and `edgevl.MatMulInt8` and `edgevl.FrameAttention` for W8A8.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np

from edgevl.runtime.bundle import NATIVE_DECODER, NATIVE_ROLES, Bundle
from edgevl.runtime.errors import EngineError, InputError

__all__ = [
    "INSTRUCTIONS",
    "SWITCH",
    "at_pauses",
    "describe_kernels",
    "has_int8_kernels",
    "kernel_instructions",
    "memory_reader",
    "native_library",
    "native_role",
    "uses_native_kernels",
]

SWITCH = "EDGEVL_KERNELS"  # environment: "off" leaves the kernels out, one of INSTRUCTIONS all others
INSTRUCTIONS = ("avx512-vnni", "avx-vnni", "avx2", "neon-dotprod")
_NAME = "_kernels*.so"
_INT8 = "edgevl_int8_instructions"
_NEWEST = "edgevl_at_pauses"  # what a library of older sources has not, which may lack operators of today's bundles
_LINE = 64  # bytes of a cache line
_CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int)
_wanted = threading.local()


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
    """Whether the library has products of int8 by int8 for this processor, too. Raises as `native_library`."""
    return bool(_instructions(native_library(), _INT8))


def describe_kernels() -> str:
    """As `kernel_instructions`, or `none` and why; for people, and never an error."""
    try:
        path, reason = _find(os.environ.get(SWITCH, ""))
    except InputError as e:
        reason, path = str(e), None
    return f"none: {reason}" if path is None else _instructions(path)


def native_role(bundle: Bundle, role: str) -> str | None:
    """The graph with our own operators that takes the place of `role` where this machine has the kernels.

    Raises:
        InputError: as `native_library`, of a bundle that has the graph.
    """
    native = NATIVE_ROLES.get(role)
    if native not in bundle.graphs:
        return None
    try:
        # Decoders of W8A8 layers have products of int8 by int8 too.
        in_blocks = native == NATIVE_DECODER and bundle.graphs[role].precision != "int8"
        usable = bool(native_library()) if in_blocks else has_int8_kernels()
    except EngineError:
        return None
    return native if usable else None


def uses_native_kernels(bundle: Bundle) -> bool:
    """Whether its decoder is the graph with our own products, see `native_role`."""
    return native_role(bundle, "decoder") is not None


def memory_reader() -> Callable[[np.ndarray], object]:
    """What reads an array of whole cache lines as fast as the products read weights; for benchmarks, and for threads.

    Raises: as `native_library`.
    """
    function = ctypes.CDLL(str(native_library())).edgevl_read_memory
    function.argtypes, function.restype = (ctypes.c_void_p, ctypes.c_int64), ctypes.c_uint64
    return lambda array: function(array.ctypes.data, array.nbytes // _LINE * (_LINE // 8))


def at_pauses(call: Callable[[], bool] | None) -> None:
    """From now on operators of sessions that this thread runs call `call` before each product, and fail where it gives
    False; it must not raise. None ends that. Nothing happens where there are no kernels."""
    try:
        path, _ = _find(os.environ.get(SWITCH, ""))
    except InputError:  # which opening the model has told of
        path = None
    if path is None:
        return
    _wanted.callback = None if call is None else _CALLBACK(call)  # C holds no reference
    ctypes.CDLL(str(path)).edgevl_at_pauses(_wanted.callback or _CALLBACK())


@cache
def _find(switch: str) -> tuple[Path | None, str]:
    if switch not in ("", "on", "off", *INSTRUCTIONS):
        raise InputError(
            f"the environment's {SWITCH} is {switch!r}, expected on, off or one of {', '.join(INSTRUCTIONS)}"
        )
    if switch == "off":
        return None, f"{SWITCH} is off"
    path = next(iter(sorted(Path(__file__).parent.glob(_NAME))), None)
    if path is None:
        return None, "not built (no C compiler as edgevl was installed); install gcc or clang, then edgevl again"
    try:
        known, _ = _instructions(path), ctypes.CDLL(str(path))[_NEWEST]
    except (OSError, AttributeError) as e:
        return None, f"{path.name} cannot be loaded ({e}); install edgevl again"
    if switch in INSTRUCTIONS:
        return (
            (path, "")
            if known
            else (None, f"{SWITCH} is {switch}, which this processor does not have or the library does not know")
        )
    return (path, "") if known else (None, "this processor has none of the instructions that they know")


def _instructions(path: Path, name: str = "edgevl_instructions") -> str:
    function = ctypes.CDLL(str(path))[name]
    function.restype = ctypes.c_char_p
    return (function() or b"").decode()
