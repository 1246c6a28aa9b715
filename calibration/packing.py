"""Layouts in which quantized checkpoints hold their layers: GPTQ, AWQ and compressed-tensors, packed and unpacked.

numpy only; knows neither models nor files. Everything is written as the tensors of one layer by their suffix
(`{"qweight": ..., "scales": ...}`) and read back into the structures of edgevl.calibration.formats, bit for bit.

All int32 words are read from their low bits up. Below, K is the number of inputs, N of outputs, b the bits of a code,
G the number of groups; the weight is `W[n, k] = (q[k, n] - z[g_idx[k], n]) * s[g_idx[k], n]`.

A slice of the outputs of any of these layers is a layer again, as long as it starts and ends on a word: 32 / b outputs.
That is how export reads them a few rows at a time.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from edgevl.calibration.formats import BlockQuantized, ChannelQuantized, Float, explicit_zero_points

__all__ = [
    "AWQ_ORDER",
    "Tensors",
    "group_order",
    "pack_awq",
    "pack_compressed",
    "pack_gptq",
    "pack_int8",
    "unpack_awq",
    "unpack_awq_zeros",
    "unpack_compressed",
    "unpack_compressed_zeros",
    "unpack_gptq",
    "unpack_gptq_zeros",
    "unpack_int8",
]

Tensors = dict[str, np.ndarray]
Codes = npt.NDArray[np.uint8]
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # nibble i of word j is output 8 * j + AWQ_ORDER[i]


# ---------------------------------------------------------------------- words of 32 bits


def _pack_words(codes: Codes, bits: int, order: tuple[int, ...] | None = None) -> npt.NDArray[np.int32]:
    """Codes [R, C] packed along C: int32 [R, ceil(C * bits / 32)]; place i of a word holds its code `order[i]`."""
    per_word = 32 // bits
    padded = np.zeros((len(codes), -(-codes.shape[1] // per_word) * per_word), np.uint32)
    padded[:, : codes.shape[1]] = codes
    words = np.zeros((len(codes), padded.shape[1] // per_word), np.uint32)
    for place, column in enumerate(order or range(per_word)):
        words |= padded[:, column::per_word] << np.uint32(bits * place)
    return words.view(np.int32)


def _unpack_words(words: np.ndarray, bits: int, columns: int, order: tuple[int, ...] | None = None) -> Codes:
    """The inverse of `_pack_words`: int32 [R, W] -> uint8 [R, columns]."""
    per_word = 32 // bits
    unsigned = np.ascontiguousarray(words).view(np.uint32)
    codes = np.empty((len(words), words.shape[1] * per_word), np.uint8)
    for place, column in enumerate(order or range(per_word)):
        codes[:, column::per_word] = (unsigned >> np.uint32(bits * place)) & np.uint32(2**bits - 1)
    return codes[:, :columns]


# ---------------------------------------------------------------------- from and to blocks


def group_order(g_idx: np.ndarray, group_size: int) -> npt.NDArray[np.int64] | None:
    """The columns sorted by group, or None where they lie so already.

    Args:
        g_idx: [K] the group of each column.

    Raises:
        ValueError: the groups are not of `group_size` columns each (the last one may be shorter).
    """
    filled = np.arange(len(g_idx)) // group_size
    if np.array_equal(g_idx, filled):
        return None
    order = np.argsort(g_idx, kind="stable").astype(np.int64)
    if not np.array_equal(g_idx[order], filled):
        raise ValueError(f"g_idx does not put {group_size} columns into every group")
    return order


def _blocks(
    codes: Codes, scales: Float, zeros: Codes, bits: int, group_size: int, order: np.ndarray | None
) -> BlockQuantized:
    """From codes [N, K] as they lie in the file, scales and zero points [N, G] (dropped where all are the default)."""
    rows, columns = codes.shape
    padded = np.repeat(zeros, group_size, 1)
    padded[:, :columns] = codes if order is None else codes[:, order]
    said = bool((zeros != 2 ** (bits - 1)).any())
    return BlockQuantized(
        padded.reshape(rows, -1, group_size), scales.astype(np.float32), zeros if said else None, bits, columns, order
    )


def _in_file_order(q: BlockQuantized) -> Codes:
    """Codes [N, K] with the columns where the weight has them."""
    codes = q.codes.reshape(len(q.codes), -1)[:, : q.columns]
    return codes if q.order is None else codes[:, np.argsort(q.order)]


def _group_index(q: BlockQuantized) -> npt.NDArray[np.int32]:
    index = np.arange(q.columns, dtype=np.int32) // q.block_size
    return index if q.order is None else index[np.argsort(q.order)]


def _stored_scales(scales: Float, dtype: npt.DTypeLike) -> np.ndarray:
    with np.errstate(over="ignore"):
        stored = scales.astype(dtype, order="C")
    if not np.array_equal(stored.astype(np.float32), scales):
        raise ValueError(f"scales are not exact in {np.dtype(dtype)}: round them to it before the codes are chosen")
    return stored


def _check_bits(q: BlockQuantized, what: str, *bits: int) -> None:
    if q.bits not in bits:
        raise ValueError(f"{what} holds {' or '.join(map(str, bits))} bits here, got {q.bits}")


def _check_words(q: BlockQuantized, what: str, **counts: int) -> None:
    for along, count in counts.items():
        if count * q.bits % 32:
            raise ValueError(f"{what} packs {32 // q.bits} codes of {q.bits} bits to a word, got {count} {along}")


# ---------------------------------------------------------------------- GPTQ


def pack_gptq(q: BlockQuantized, version: int = 1, scale_dtype: npt.DTypeLike = np.float16) -> Tensors:
    """A layer as AutoGPTQ and GPTQModel store it (their qlinear modules' `pack`), 4 or 8 bits.

    Returns:
        qweight int32 [K * b / 32, N] packed along K; qzeros int32 [G, N * b / 32] packed along N; scales [G, N];
        g_idx int32 [K]. Version 1 (checkpoint_format "gptq", or none) stores z - 1, version 2 ("gptq_v2") z.

    Raises:
        ValueError: K or N does not fill whole words; a scale that `scale_dtype` does not hold exactly; version 1 with
            a zero point of 0, whose z - 1 has no code: readers disagree about it.
    """
    _check_bits(q, "GPTQ", 4, 8)
    _check_words(q, "GPTQ", inputs=q.columns, outputs=len(q.codes))
    zeros = explicit_zero_points(q)
    if version == 1:
        if not zeros.all():
            raise ValueError(
                "GPTQ version 1 stores zero points less one and has no code for 0: use version 2 (checkpoint_format "
                '"gptq_v2"), a symmetric grid, or keep zero points at 1 and above'
            )
        zeros = zeros - np.uint8(1)
    return {
        "qweight": np.ascontiguousarray(_pack_words(_in_file_order(q), q.bits).T),
        "qzeros": _pack_words(zeros.T, q.bits),
        "scales": np.ascontiguousarray(_stored_scales(q.scales, scale_dtype).T),
        "g_idx": _group_index(q),
    }


def unpack_gptq_zeros(qzeros: np.ndarray, bits: int, rows: int, version: int = 1) -> Codes:
    """qzeros int32 [G, N * b / 32] -> zero points uint8 [N, G].

    In version 1 the one is added per code, with a mask: added to the word it would carry into the next code.
    """
    zeros = _unpack_words(qzeros, bits, rows).T
    if version == 1:
        zeros = (zeros + np.uint8(1)) & np.uint8(2**bits - 1)
    return np.ascontiguousarray(zeros)


def unpack_gptq(
    qweight: np.ndarray,
    qzeros: np.ndarray,
    scales: np.ndarray,
    g_idx: np.ndarray | None,
    bits: int,
    group_size: int,
    version: int = 1,
) -> BlockQuantized:
    """The inverse of `pack_gptq`; `group_size` is K for one group per output, `g_idx` None where it is k // group_size.

    Raises:
        ValueError: see `group_order`.
    """
    rows, columns = qweight.shape[1], len(qweight) * 32 // bits
    order = None if g_idx is None else group_order(g_idx, group_size)
    zeros = unpack_gptq_zeros(qzeros, bits, rows, version)
    return _blocks(_unpack_words(qweight.T, bits, columns), scales.T, zeros, bits, group_size, order)


# ---------------------------------------------------------------------- AWQ


def pack_awq(q: BlockQuantized, scale_dtype: npt.DTypeLike = np.float16) -> Tensors:
    """A layer as AutoAWQ's "gemm" version stores it (its WQLinear_GEMM.from_linear), 4 bits.

    Returns:
        qweight int32 [K, N / 8] and qzeros int32 [G, N / 8], both packed along N in the order of `AWQ_ORDER`, the zero
        point as it is; scales [G, N]. There is no g_idx.

    Raises:
        ValueError: other bits, an activation order, N not a multiple of 8, or inexact scales.
    """
    _check_bits(q, "AWQ", 4)
    _check_words(q, "AWQ", outputs=len(q.codes))
    if q.order is not None:
        raise ValueError("AWQ has no g_idx: columns must lie in the order of their groups")
    return {
        "qweight": _pack_words(_in_file_order(q).T, 4, AWQ_ORDER),
        "qzeros": _pack_words(explicit_zero_points(q).T, 4, AWQ_ORDER),
        "scales": np.ascontiguousarray(_stored_scales(q.scales, scale_dtype).T),
    }


def unpack_awq_zeros(qzeros: np.ndarray, rows: int) -> Codes:
    """qzeros int32 [G, N / 8] -> zero points uint8 [N, G]."""
    return np.ascontiguousarray(_unpack_words(qzeros, 4, rows, AWQ_ORDER).T)


def unpack_awq(qweight: np.ndarray, qzeros: np.ndarray, scales: np.ndarray, group_size: int) -> BlockQuantized:
    """The inverse of `pack_awq`; `group_size` is K for one group per output."""
    rows = qweight.shape[1] * 8
    codes = np.ascontiguousarray(_unpack_words(qweight, 4, rows, AWQ_ORDER).T)
    return _blocks(codes, scales.T, unpack_awq_zeros(qzeros, rows), 4, group_size, None)


# ---------------------------------------------------------------------- compressed-tensors


def pack_compressed(q: BlockQuantized, scale_dtype: npt.DTypeLike = np.float16) -> Tensors:
    """A layer in compressed-tensors' "pack-quantized" format (its PackedQuantizationCompressor), 4 or 8 bits.

    Returns:
        weight_packed int32 [N, ceil(K * b / 32)] packed along K, signed codes plus 2^(b-1); weight_scale [N, G];
        weight_shape int64 [2]; with zero points weight_zero_point int32 [ceil(N * b / 32), G] packed along N; with an
        activation order weight_g_idx int32 [K].

    Raises:
        ValueError: other bits, or inexact scales.
    """
    _check_bits(q, "pack-quantized", 4, 8)
    out = {
        "weight_packed": _pack_words(_in_file_order(q), q.bits),
        "weight_scale": _stored_scales(q.scales, scale_dtype),
        "weight_shape": np.array([len(q.codes), q.columns], np.int64),
    }
    if q.zero_points is not None:
        out["weight_zero_point"] = np.ascontiguousarray(_pack_words(q.zero_points.T, q.bits).T)
    if q.order is not None:
        out["weight_g_idx"] = _group_index(q)
    return out


def unpack_compressed_zeros(zero_point: np.ndarray, bits: int, rows: int) -> Codes:
    """weight_zero_point -> zero points uint8 [N, G]; as int8 [N, G] (early releases) they are not packed."""
    if zero_point.dtype == np.int8:
        return (zero_point.astype(np.int16) + 2 ** (bits - 1)).astype(np.uint8)
    return np.ascontiguousarray(_unpack_words(zero_point.T, bits, rows).T)


def unpack_compressed(
    packed: np.ndarray,
    scale: np.ndarray,
    zero_point: np.ndarray | None,
    g_idx: np.ndarray | None,
    bits: int,
    columns: int,
    group_size: int,
) -> BlockQuantized:
    """The inverse of `pack_compressed`; `columns` is K (weight_shape[1]), which the words do not tell.

    Raises:
        ValueError: see `group_order`.
    """
    rows = len(packed)
    if zero_point is None:
        zeros = np.full((rows, scale.shape[1]), 2 ** (bits - 1), np.uint8)
    else:
        zeros = unpack_compressed_zeros(zero_point, bits, rows)
    order = None if g_idx is None else group_order(g_idx, group_size)
    return _blocks(_unpack_words(packed, bits, columns), scale, zeros, bits, group_size, order)


def pack_int8(q: ChannelQuantized, scale_dtype: npt.DTypeLike = np.float32) -> Tensors:
    """A layer in compressed-tensors' "int-quantized" format (W8A8): weight int8 [N, K], weight_scale [N, 1]."""
    return {"weight": np.ascontiguousarray(q.codes), "weight_scale": _stored_scales(q.scales, scale_dtype)[:, None]}


def unpack_int8(weight: np.ndarray, scale: np.ndarray) -> ChannelQuantized:
    """The inverse of `pack_int8`; `scale` is [N, 1] or [N]."""
    return ChannelQuantized(weight, scale.reshape(-1).astype(np.float32))
