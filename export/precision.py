"""Precisions by name: which number format each part of a model gets. Data only; the dialects turn it into nodes."""

from __future__ import annotations

from dataclasses import dataclass

from edgevl.runtime.errors import InputError

__all__ = [
    "DECODER_PRECISIONS",
    "TENSORRT_DECODER_PRECISIONS",
    "TENSORRT_VISION_PRECISIONS",
    "VISION_PRECISIONS",
    "LinearFormat",
    "Precision",
    "decoder_precision",
    "tensorrt_decoder_precision",
    "tensorrt_vision_precision",
    "vision_precision",
]

VISION_PRECISIONS = ("fp32", "fp16", "int8")
DECODER_PRECISIONS = ("fp32", "fp16", "int8", "int8-weights", "int4", "hybrid")
BLOCK_SIZES = (32, 64, 128)
TENSORRT_VISION_PRECISIONS = ("fp16", "bf16", "int8")
TENSORRT_DECODER_PRECISIONS = ("fp16", "bf16", "int8", "int4")


@dataclass(frozen=True)
class LinearFormat:
    """How one weight matrix is stored and multiplied.

    `float`: in the graph's dtype. `w8a8`: int8 per output channel against activations rounded to int8 per token
    (per tensor ruins the model), or with the static `input_scale` (x ≈ input_scale × int8) that calibration found
    after smoothing. `blocks`: weight-only, `bits` with one scale per `block_size` inputs.
    """

    kind: str
    bits: int = 0
    block_size: int = 0
    symmetric: bool = True
    input_scale: float | None = None


@dataclass(frozen=True)
class Precision:
    """The formats of one graph: `linear` for the layers, `table` for the embedding and the head."""

    name: str
    dtype: str  # of activations: float32 or float16
    linear: LinearFormat
    table: LinearFormat
    cache: str | None = None  # dtype of the KV cache: int8, or the graph's own


FLOAT = LinearFormat("float")
W8A8 = LinearFormat("w8a8")


def vision_precision(name: str) -> Precision:
    """Raises InputError for a name that is not in VISION_PRECISIONS."""
    if name not in VISION_PRECISIONS:
        raise InputError(f"vision precision {name!r} is unknown; expected one of {', '.join(VISION_PRECISIONS)}")
    dtype = "float16" if name == "fp16" else "float32"
    return Precision(name, dtype, W8A8 if name == "int8" else FLOAT, FLOAT)


def decoder_precision(
    name: str, block_size: int = 128, symmetric: bool = True, head_bits: int = 8
) -> tuple[Precision, ...]:
    """One precision per graph: two for `hybrid` (prefill, then decode), one for the others.

    `head_bits` (4 or 8) is the format of the quantized embedding and head; int8 costs about a tenth of the decode
    speed of int4 and next to no accuracy (KL 0.001 against 0.11).

    Raises:
        InputError: a name, block size or head width that does not exist.
    """
    if name not in DECODER_PRECISIONS:
        raise InputError(f"decoder precision {name!r} is unknown; expected one of {', '.join(DECODER_PRECISIONS)}")
    if block_size not in BLOCK_SIZES:
        raise InputError(f"block size {block_size} is not offered; expected one of {', '.join(map(str, BLOCK_SIZES))}")
    if head_bits not in (4, 8):
        raise InputError(f"head bits {head_bits} is not offered; expected 4 or 8")
    if name in ("fp32", "fp16"):
        return (Precision(name, "float32" if name == "fp32" else "float16", FLOAT, FLOAT),)
    table = LinearFormat("blocks", head_bits, block_size, symmetric)
    int8 = Precision("int8", "float32", W8A8, table)
    int4 = Precision("int4", "float32", LinearFormat("blocks", 4, block_size, symmetric), table)
    if name == "hybrid":
        return (int8, int4)
    if name == "int8-weights":
        return (Precision(name, "float32", LinearFormat("blocks", 8, block_size, symmetric), table),)
    return (int8 if name == "int8" else int4,)


def tensorrt_vision_precision(name: str) -> Precision:
    """Vision precisions for TensorRT; `int8` takes its scales from the checkpoint.

    Raises:
        InputError: a name that is not in TENSORRT_VISION_PRECISIONS.
    """
    _check_tensorrt("vision", name, TENSORRT_VISION_PRECISIONS)
    return Precision(name, "bfloat16" if name == "bf16" else "float16", W8A8 if name == "int8" else FLOAT, FLOAT)


def tensorrt_decoder_precision(
    name: str, block_size: int = 128, symmetric: bool = True, head_bits: int = 16
) -> Precision:
    """Decoder precisions for TensorRT; `int8` takes its scales from the checkpoint.

    `head_bits`: 16 keeps embedding and head as one table in the compute type where the checkpoint ties them; 4 rounds
    the head to int4 and the embedding to int8 per row.

    Raises:
        InputError: a name, block size or head width that does not exist, zero points in layers rounded here.
    """
    _check_tensorrt("decoder", name, TENSORRT_DECODER_PRECISIONS)
    if block_size not in BLOCK_SIZES:
        raise InputError(f"block size {block_size} is not offered; expected one of {', '.join(map(str, BLOCK_SIZES))}")
    if head_bits not in (4, 16):
        raise InputError(
            f"head bits {head_bits} is not offered for TensorRT, which multiplies int8 weights through a copy in "
            "float16; expected 16 or 4"
        )
    if not symmetric:
        raise InputError(
            "TensorRT rounds int4 symmetrically; leave --asymmetric away (a quantized checkpoint keeps its zero points)"
        )
    table = FLOAT if head_bits == 16 else LinearFormat("blocks", 4, block_size)
    linear = {"int8": W8A8, "int4": LinearFormat("blocks", 4, block_size)}.get(name, FLOAT)
    return Precision(name, "bfloat16" if name == "bf16" else "float16", linear, table)


def _check_tensorrt(part: str, name: str, names: tuple[str, ...]) -> None:
    if name not in names:
        raise InputError(
            f"{part} precision {name!r} is not offered for TensorRT; expected one of {', '.join(names)} (int8 needs a "
            "checkpoint with static scales)"
        )
