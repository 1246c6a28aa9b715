"""Weights as TensorRT wants them: INT4 and INT8 tensors in front of DequantizeLinear, scales in the compute dtype.

TensorRT's parser takes symmetric codes and positive scales only. Zero points of a checkpoint (AWQ, asymmetric GPTQ)
are kept exactly by a second, small product:

    x · ((code - zero) · s) = x · ((code - 8) · s) + blocksum(x) · (s · (8 - zero))
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from edgevl.calibration.formats import (
    BlockQuantized,
    quantize_blocks,
    split_blocks,
    stored_scales,
)
from edgevl.export.graph import GraphBuilder
from edgevl.export.precision import LinearFormat
from edgevl.export.weights import WeightStore
from edgevl.runtime.checkpoint import Checkpoint
from edgevl.runtime.errors import CheckpointError, InputError

__all__ = ["Int4Weights", "TensorRTWeights"]

_SMALLEST_BLOCK = 16  # of TensorRT's INT4 DequantizeLinear
_ZERO = 8  # the code of zero in 4 symmetric bits


@dataclass(frozen=True)
class Int4Weights:
    """[K, N] codes and [K / block_size, N] scales; `correction` [K / block_size, N] is s · (8 - zero)."""

    codes: ir.Value
    scales: ir.Value
    block_size: int
    correction: ir.Value | None
    order: ir.Value | None  # int64 [K]: the columns of the input that the blocks are made of


class TensorRTWeights(WeightStore):
    """Weights of one checkpoint for one TensorRT graph under construction."""

    def __init__(self, checkpoint: Checkpoint, builder: GraphBuilder, dtype: str) -> None:
        super().__init__(checkpoint, builder, dtype)

    def block_size(self, name: str, wanted: int) -> int:
        """The largest block of at most `wanted` inputs that divides the inputs of `name`.

        Raises:
            InputError: none of at least 16 does.
        """
        columns = self.columns_of(name)
        size = min(wanted, columns & -columns)
        if size < _SMALLEST_BLOCK:
            raise InputError(
                f"{name} has {columns} inputs, which no int4 block of {_SMALLEST_BLOCK} or more divides, as TensorRT "
                "wants it; export the decoder in fp16"
            )
        return size

    def int4(self, name: str, form: LinearFormat) -> Int4Weights:
        """A layer in 4 bits: as the checkpoint stores it, or rounded here."""
        size = self.block_size(name, form.block_size)
        rows, columns = self.rows_of([name]), self.columns_of(name)
        key = f"{name}.weight.trt4b{size}{'' if form.symmetric else 'z'}:{self.dtype}"
        shape = (columns // size, rows)
        scales = np.empty(shape, self.dtype)
        correction = None if form.symmetric else np.empty(shape, self.dtype)

        def chunks() -> Iterator[np.ndarray]:
            out = np.empty((columns, rows), np.uint8)
            start = 0
            for q in self._int4_parts(name, form, size):
                stop = start + len(q.codes)
                out[:, start:stop] = q.codes.reshape(len(q.codes), -1).T
                scales[:, start:stop] = stored_scales(q.scales.T, self.dtype)
                if correction is not None and q.zero_points is not None:
                    correction[:, start:stop] = (q.scales * (_ZERO - q.zero_points.astype(np.float32))).T
                start = stop
            yield pack_int4(out)

        codes = self._builder.weight(key, np.uint8, (columns, rows), chunks, packed=ir.DataType.INT4)
        scale = self._builder.weight(f"{key}.scales", self.dtype, shape, lambda: [scales])
        added = None
        if correction is not None:
            added = self._builder.weight(f"{key}.correction", self.dtype, shape, lambda: [correction])
        return Int4Weights(codes, scale, size, added, self._order(name))

    def int8_rows(self, name: str) -> tuple[ir.Value, ir.Value]:
        """An embedding [N, K] in int8 and one scale per row [N]."""
        return self._int8(name, True)

    def int8_columns(self, name: str, part: tuple[int, int] = (0, 1)) -> tuple[ir.Value, ir.Value]:
        """A W8A8 layer, or part i of n equal parts of its outputs, as int8 [K, N] and one scale per output [N]."""
        return self._int8(name, False, part)

    def bias_part(self, name: str, part: tuple[int, int]) -> ir.Value:
        """Part i of n equal parts of a bias."""
        number, parts = part
        size = self._checkpoint.shape(f"{name}.bias")[0] // parts
        key = f"{name}.bias:{self.dtype}:{number}of{parts}"
        return self._builder.weight(
            key,
            self.dtype,
            (size,),
            lambda: [self._checkpoint.read(f"{name}.bias")[number * size : (number + 1) * size].astype(self.dtype)],
        )

    def left_plain(self, name: str) -> bool:
        """Whether a checkpoint with static scales in this part of the model chose to leave layer `name` as it is."""
        part = name.split(".", 1)[0] + "."
        others = (q for n, q in self._checkpoint.layers.items() if n.startswith(part))
        return self._checkpoint.layer(name) is None and any(getattr(q, "input_scale", None) is not None for q in others)

    def static_scale(self, name: str) -> np.ndarray:
        """The checkpoint's scale of the activations in front of `name`, a scalar in the compute dtype.

        Raises:
            CheckpointError: the checkpoint has none.
        """
        found = getattr(self._checkpoint.layer(name), "input_scale", None)
        if found is None:
            raise CheckpointError(
                f"{self._checkpoint.folder}: layer {name} has no static scale of its activations, which int8 on "
                "TensorRT needs (it rounds activations with scales that are constants); quantize with a recipe that "
                "writes them (edgevl quantize CHECKPOINT --recipe w8a8-static), or export in fp16 or int4"
            )
        return stored_scales(np.array(found, np.float32), self.dtype).astype(self.dtype)

    def pre_scale(self, name: str) -> ir.Value | None:
        """[K]: what a W8A8 layer's input is multiplied with before it is rounded, where the checkpoint says so."""
        layer = self._checkpoint.layer(name)
        entry = None if layer is None else layer.entries.get("pre_quant_scale")
        if entry is None:
            return None
        return self._builder.weight(
            f"{name}.pre_quant_scale:{self.dtype}",
            self.dtype,
            entry.shape,
            lambda: [self._checkpoint.files.floats(entry.stored_name, entry, 0, entry.shape[0]).astype(self.dtype)],
        )

    def _int8(self, name: str, rows_first: bool, part: tuple[int, int] = (0, 1)) -> tuple[ir.Value, ir.Value]:
        number, parts = part
        rows, columns = self.rows_of([name]) // parts, self.columns_of(name)
        shape = (rows, columns) if rows_first else (columns, rows)
        cut = "" if parts == 1 else f":{number}of{parts}"
        key = f"{name}.weight.trt8{'r' if rows_first else 'c'}:{self.dtype}{cut}"
        scales = np.empty(rows, self.dtype)

        def chunks() -> Iterator[np.ndarray]:
            out = None if rows_first else np.empty(shape, np.int8)
            start = -number * rows  # of the next rows, counted from the first that is wanted
            for q in self._channel_parts([name]):
                first, last = max(0, -start), min(len(q.scales), rows - start)
                if first < last:
                    codes, here = q.codes[first:last], slice(start + first, start + last)
                    scales[here] = stored_scales(q.scales[first:last], self.dtype)
                    if out is None:
                        yield codes
                    else:
                        out[:, here] = codes.T
                start += len(q.scales)
            if out is not None:
                yield out

        codes = self._builder.weight(key, np.int8, shape, chunks)
        return codes, self._builder.weight(f"{key}.scales", self.dtype, (rows,), lambda: [scales])

    def _int4_parts(self, name: str, form: LinearFormat, size: int) -> Iterator[BlockQuantized]:
        layer = self._checkpoint.layer(name)
        if layer is None:
            for _, part in self._parts([name]):
                yield quantize_blocks(part, 4, size, stored=self.dtype)
            return
        for part in self._quantized.blocks(layer):
            yield _unpadded(part, size)


def pack_int4(codes: np.ndarray) -> np.ndarray:
    """ONNX INT4 of codes 0 .. 15 that stand for -8 .. 7: two per byte in C order, the first in the low nibble.

    Args:
        codes: uint8, any shape; overwritten.

    Returns:
        uint8 [ceil(size / 2)].
    """
    np.bitwise_xor(codes, _ZERO, out=codes)  # code - 8 as a two's complement nibble
    flat = codes.reshape(-1)
    if len(flat) % 2:
        flat = np.append(flat, np.uint8(0))
    return flat[0::2] | (flat[1::2] << np.uint8(4))


def _unpadded(q: BlockQuantized, size: int) -> BlockQuantized:
    """`q` in blocks of `size`, which divides its columns, without what padded its last block."""
    if q.block_size != size:
        q = split_blocks(q, size)
    count = q.columns // size
    zeros = None if q.zero_points is None else q.zero_points[:, :count]
    return BlockQuantized(q.codes[:, :count], q.scales[:, :count], zeros, q.bits, q.columns, q.order)
