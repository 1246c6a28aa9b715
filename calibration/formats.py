"""Number formats of weights: grids, rounding and packing. numpy only; knows neither models nor files.

A linear layer's weight is `[out, in]` = `[N, K]`. Two families:

* blocks along `in` (weight-only int4 / int8): `w = (code - zero_point) * scale`, one scale per row and block of
  columns; packed as ONNX Runtime's MatMulNBits wants it.
* channels (W8A8): `w = code * scale[n]`, symmetric int8.

Rounding here is round-to-nearest; calibrated codes, and those of checkpoints that others quantized
(edgevl.calibration.packing), arrive in the same structures.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

__all__ = [
    "BlockQuantized",
    "ChannelQuantized",
    "dequantize_blocks",
    "explicit_zero_points",
    "pack_codes",
    "pack_zero_points",
    "quantize_blocks",
    "quantize_channels",
    "split_blocks",
    "stored_scales",
]

Float = npt.NDArray[np.float32]


@dataclass(frozen=True)
class BlockQuantized:
    """Codes of one weight `[N, K]` cut into blocks along K (the last block padded with the code of zero).

    A block may be of any size, up to the whole row. With `order` (activation order without static groups) a block
    holds columns that do not lie side by side: position j of a row is column `order[j]` of the weight.
    """

    codes: npt.NDArray[np.uint8]  # [N, blocks, block_size], 0 .. 2^bits - 1
    scales: Float  # [N, blocks]
    zero_points: npt.NDArray[np.uint8] | None  # [N, blocks]; None: 2^(bits-1) everywhere
    bits: int
    columns: int  # K
    order: npt.NDArray[np.int64] | None = None  # [K]; None: as they lie

    @property
    def block_size(self) -> int:
        return self.codes.shape[2]


@dataclass(frozen=True)
class ChannelQuantized:
    """Symmetric int8 codes with one scale per output channel."""

    codes: npt.NDArray[np.int8]  # [N, K], -127 .. 127 (from other tools also -128)
    scales: Float  # [N]


def quantize_blocks(
    weight: Float, bits: int, block_size: int, symmetric: bool = True, stored: npt.DTypeLike | None = None
) -> BlockQuantized:
    """Round `weight` [N, K] float32 to `bits` (4 or 8) with one scale per block of `block_size` columns.

    Symmetric grids put the entry of largest magnitude exactly on -2^(bits-1), the one end that has no partner: a
    finer step than absmax / 7.5 (measured on a real model: KL 0.378 against 0.437 at 4 bits, block 128).
    Asymmetric grids span [min(w, 0), max(w, 0)] so that zero stays exact.

    With `stored`, the dtype in which scales are kept (float16, bfloat16), scales are positive, as TensorRT's parser
    wants them, and codes belong to the rounded scales: an extreme of positive sign gets absmax / 7.5 (127.5), of
    which it keeps 7 steps.
    """
    if bits not in (4, 8):
        raise ValueError(f"bits is {bits}, expected 4 or 8")
    if block_size < 16 or block_size & (block_size - 1):
        raise ValueError(f"block_size is {block_size}, expected a power of two from 16 on")
    rows, columns = weight.shape
    blocks = -(-columns // block_size)
    padded = np.zeros((rows, blocks * block_size), np.float32)
    padded[:, :columns] = weight
    w = padded.reshape(rows, blocks, block_size)
    top = 2**bits - 1
    if symmetric:
        low, high = w.min(-1), w.max(-1)
        half = np.float32(2 ** (bits - 1))
        if stored is None:
            extreme = np.where(-low > high, low, high)  # signed value of largest magnitude
            scales = extreme / -half
        else:
            scales = np.maximum(-low / half, high / (half - np.float32(0.5)))
        zero = np.full(scales.shape, 2 ** (bits - 1), np.float32)
    else:
        low, high = np.minimum(w.min(-1), 0), np.maximum(w.max(-1), 0)
        scales = (high - low) / np.float32(top)
        zero = np.rint(-low / np.where(scales == 0, 1, scales)).clip(0, top)
    scales = np.where(scales == 0, np.float32(1), scales).astype(np.float32)
    if stored is not None:
        scales = stored_scales(scales, stored)
    codes = np.rint(w / scales[..., None])
    codes += zero[..., None]
    codes = codes.clip(0, top).astype(np.uint8)
    return BlockQuantized(codes, scales, None if symmetric else zero.astype(np.uint8), bits, columns)


def stored_scales(scales: Float, dtype: npt.DTypeLike) -> Float:
    """Positive scales as `dtype` keeps them; what would become 0 gets the least positive number of float16."""
    return np.maximum(scales, np.float32(2.0**-24)).astype(dtype).astype(np.float32)


def dequantize_blocks(q: BlockQuantized) -> Float:
    """The float32 weight [N, K] that `q` stands for."""
    zero = np.float32(2 ** (q.bits - 1)) if q.zero_points is None else q.zero_points.astype(np.float32)[..., None]
    w = (q.codes.astype(np.float32) - zero) * q.scales[..., None]
    w = w.reshape(w.shape[0], -1)[:, : q.columns]
    return w if q.order is None else w[:, np.argsort(q.order)]


def explicit_zero_points(q: BlockQuantized) -> npt.NDArray[np.uint8]:
    """[N, blocks] zero points, written out where `q` leaves them to the default."""
    return np.full(q.scales.shape, 2 ** (q.bits - 1), np.uint8) if q.zero_points is None else q.zero_points


def split_blocks(q: BlockQuantized, block_size: int) -> BlockQuantized:
    """The same weight in smaller blocks, exactly: every block's scale and zero point are repeated for its parts.

    `block_size` divides the block size of `q`, or `q` has one block: then the last part is padded. (One block may also
    become one larger block.)
    """
    rows, blocks, size = q.codes.shape
    if size % block_size and blocks != 1:
        raise ValueError(f"block_size is {block_size}, expected a divisor of {size}")
    count = -(-q.columns // block_size)
    repeats = count if blocks == 1 else size // block_size
    zero = np.repeat(explicit_zero_points(q), repeats, 1)[:, :count]
    codes = np.repeat(zero, block_size, 1)  # the padding
    codes[:, : q.columns] = q.codes.reshape(rows, -1)[:, : q.columns]
    return BlockQuantized(
        codes.reshape(rows, count, block_size),
        np.repeat(q.scales, repeats, 1)[:, :count],
        None if q.zero_points is None else zero,
        q.bits,
        q.columns,
        q.order,
    )


def pack_codes(codes: npt.NDArray[np.uint8], bits: int) -> npt.NDArray[np.uint8]:
    """Pack the last axis into bytes, low bits first: [..., n] -> [..., ceil(n * bits / 8)] uint8."""
    if bits == 8:
        return codes
    per_byte = 8 // bits
    tail = -codes.shape[-1] % per_byte
    if tail:
        codes = np.concatenate([codes, np.zeros((*codes.shape[:-1], tail), np.uint8)], -1)
    packed = codes[..., 0::per_byte].copy()
    for i in range(1, per_byte):
        packed |= codes[..., i::per_byte] << np.uint8(bits * i)
    return packed


def pack_zero_points(zero_points: npt.NDArray[np.uint8], bits: int) -> npt.NDArray[np.uint8]:
    """MatMulNBits zero points: [N, blocks] -> [N, ceil(blocks * bits / 8)] uint8."""
    return pack_codes(zero_points, bits)


def quantize_channels(weight: Float) -> ChannelQuantized:
    """Symmetric int8 per output channel: `scale = absmax / 127`, an all-zero row keeps scale 1."""
    largest = np.abs(weight).max(-1)
    scales = np.where(largest == 0, np.float32(1), largest / np.float32(127)).astype(np.float32)
    codes = np.rint(weight / scales[:, None]).clip(-127, 127).astype(np.int8)
    return ChannelQuantized(codes, scales)
