"""Checkpoint tensors as graph weights: read a few rows at a time, rounded or transposed, streamed to the data file.

Shared by the dialects. A merged layer (q, k and v over one input) is a list of names whose rows follow one another.
Layers that the checkpoint stores quantized keep their codes, scales and zero points; only the layout changes.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from edgevl.calibration.formats import (
    BlockQuantized,
    ChannelQuantized,
    explicit_zero_points,
    pack_codes,
    pack_zero_points,
    quantize_blocks,
    quantize_channels,
)
from edgevl.calibration.quantized import QuantizedReader
from edgevl.export.graph import GraphBuilder
from edgevl.export.precision import FLOAT, W8A8, LinearFormat
from edgevl.runtime.checkpoint import DECODER_LAYERS, Checkpoint

__all__ = ["BlockWeights", "WeightStore", "merged_key"]

_CHUNK_ELEMENTS = 1 << 22  # 16 MiB of float32: what one step of a conversion holds


@dataclass(frozen=True)
class BlockWeights:
    """A block-quantized matrix in MatMulNBits' layout; `shape` is [N, K], `blocks` the number of blocks along K."""

    codes: ir.Value  # uint8 [N, blocks, block_size × bits / 8]
    scales: ir.Value  # float32, or float16 in a graph of float16, [N, blocks]
    zero_points: ir.Value | None  # uint8 [N, ceil(blocks × bits / 8)]
    shape: tuple[int, int]
    blocks: int
    format: LinearFormat
    key: str
    order: ir.Value | None = None  # int64 [K]: the columns of the input that the blocks are made of


def merged_key(names: Sequence[str]) -> str:
    """One name for several layers: `model.layers.0.self_attn.q_proj+k_proj+v_proj`."""
    return "+".join([names[0], *(n.rsplit(".", 1)[-1] for n in names[1:])])


class WeightStore:
    """Weights of one checkpoint for one graph under construction."""

    def __init__(self, checkpoint: Checkpoint, builder: GraphBuilder, dtype: str) -> None:
        self._checkpoint, self._builder = checkpoint, builder
        self._quantized = QuantizedReader(checkpoint)
        self._sums: dict[str, np.ndarray] = {}
        self.dtype = np.dtype(dtype)

    def rows_of(self, names: Sequence[str]) -> int:
        return sum(self._checkpoint.shape(f"{n}.weight")[0] for n in names)

    def columns_of(self, name: str) -> int:
        return int(np.prod(self._checkpoint.shape(f"{name}.weight")[1:]))

    def mergeable(self, names: Sequence[str]) -> bool:
        """Whether the layers over one input may be one product: all plain, or quantized alike."""
        layers = [self._checkpoint.layer(n) for n in names]
        alike = {(q.kind == "int8", q.bits, q.block_size, q.input_scale) if q else None for q in layers}
        if len(alike) > 1 or any(q is not None and "pre_quant_scale" in q.entries for q in layers):
            return False
        orders = [self._quantized.grid(q).order for q in layers if q]
        return all((a is None) == (b is None) and np.array_equal(a, b) for a, b in itertools.pairwise(orders))

    def format_of(self, names: Sequence[str], plain: LinearFormat) -> LinearFormat:
        """How mergeable layers are stored in the checkpoint, `plain` where they are to be rounded here.

        What a quantized checkpoint leaves plain in its decoder stays float: it was left so because it is sensitive.
        """
        layers = [q for q in (self._checkpoint.layer(n) for n in names) if q]
        if not layers:
            return FLOAT if self._checkpoint.layers and names[0].startswith(DECODER_LAYERS) else plain
        if layers[0].kind == "int8":
            return replace(W8A8, input_scale=layers[0].input_scale)
        symmetric = all(self._quantized.grid(q).zero_points is None for q in layers)
        return LinearFormat("blocks", layers[0].bits, layers[0].block_size, symmetric)

    def vector(self, names: Sequence[str], suffix: str, dtype: np.dtype | None = None) -> ir.Value:
        """Norm weights and biases; several names follow one another."""
        dtype = dtype or self.dtype
        size = sum(self._checkpoint.shape(f"{n}.{suffix}")[0] for n in names)
        return self._builder.weight(
            f"{merged_key(names)}.{suffix}:{dtype}",
            dtype,
            (size,),
            lambda: (self._checkpoint.read(f"{n}.{suffix}").astype(dtype) for n in names),
        )

    def cache_scale(self, layer: int, kind: str) -> ir.Value:
        """float32 [1, kv_heads, 1, head_dim]: scales of an INT8 KV cache, `kind` "k" or "v"."""
        text = self._checkpoint.config.text
        return self._builder.weight(
            f"model.layers.{layer}.self_attn.{kind}_scale",
            np.float32,
            (1, text.num_key_value_heads, 1, text.head_dim),
            lambda: [self._checkpoint.cache_scale(layer, kind)],
        )

    def pre_scale(self, name: str) -> ir.Value | None:
        """[K]: what the layer's input is multiplied with before it is rounded, where the checkpoint says so."""
        layer = self._checkpoint.layer(name)
        if layer is None or "pre_quant_scale" not in layer.entries:
            return None
        entry = layer.entries["pre_quant_scale"]
        read = self._checkpoint.files.floats
        return self._builder.weight(
            f"{name}.pre_quant_scale:{self.dtype}",
            self.dtype,
            entry.shape,
            lambda: [read(entry.stored_name, entry, 0, entry.shape[0]).astype(self.dtype)],
        )

    def transposed(self, names: Sequence[str]) -> ir.Value:
        """Float [K, N] for MatMul."""
        shape = (self.columns_of(names[0]), self.rows_of(names))

        def chunks() -> Iterator[np.ndarray]:
            out = np.empty(shape, self.dtype)
            for start, part in self._parts(names):
                out[:, start : start + len(part)] = part.T
            yield out

        return self._builder.weight(f"{merged_key(names)}.weight.T:{self.dtype}", self.dtype, shape, chunks)

    def table(self, name: str) -> ir.Value:
        """Float [N, K] as in the checkpoint: an embedding, and the head that is tied to it."""
        shape = (self.rows_of([name]), self.columns_of(name))
        return self._builder.weight(
            f"{name}.weight:{self.dtype}",
            self.dtype,
            shape,
            lambda: (part.astype(self.dtype) for _, part in self._parts([name])),
        )

    def channels(self, names: Sequence[str]) -> tuple[ir.Value, ir.Value]:
        """int8 codes [K, N] and float32 scales [N] for W8A8."""
        key = merged_key(names)
        rows, columns = self.rows_of(names), self.columns_of(names[0])
        scales = np.empty(rows, np.float32)
        sums = self._sums[key] = np.empty(rows, np.float32)

        def chunks() -> Iterator[np.ndarray]:
            out = np.empty((columns, rows), np.int8)
            start = 0
            for q in self._channel_parts(names):
                stop = start + len(q.scales)
                out[:, start:stop], scales[start:stop] = q.codes.T, q.scales
                sums[start:stop] = q.codes.sum(1, dtype=np.int64) * q.scales
                start = stop
            yield out

        codes = self._builder.weight(f"{key}.weight.int8", np.int8, (columns, rows), chunks)
        return codes, self._builder.weight(f"{key}.weight.int8.scales", np.float32, (rows,), lambda: [scales])

    def channel_sums(self, names: Sequence[str]) -> ir.Value:
        """float32 [N]: the sums of the rows of `channels`, which is to be asked for first."""
        key = merged_key(names)
        return self._builder.weight(
            f"{key}.weight.int8.sums", np.float32, self._sums[key].shape, lambda: [self._sums[key]]
        )

    def blocks(self, names: Sequence[str], form: LinearFormat, gathered: bool = False) -> BlockWeights:
        """Packed codes, scales and zero points for MatMulNBits.

        Args:
            form: of the layers in the checkpoint where it stores them quantized (see `format_of`).
            gathered: rows are looked up as well (see `gather`); to be said when the table is first asked for.
        """
        rows, columns = self.rows_of(names), self.columns_of(names[0])
        count = -(-columns // form.block_size)
        key = f"{merged_key(names)}.weight.int{form.bits}b{form.block_size}{'' if form.symmetric else 'z'}"
        scale_dtype = np.dtype(np.float16) if self.dtype == np.float16 else np.dtype(np.float32)
        scales: list[np.ndarray] = []
        zeros: list[np.ndarray] = []

        def chunks() -> Iterator[np.ndarray]:
            for q in self._block_parts(names, form):
                scales.append(q.scales.astype(scale_dtype, copy=False))
                if not form.symmetric:
                    zeros.append(explicit_zero_points(q))
                yield pack_codes(q.codes, form.bits)

        width = form.block_size * form.bits // 8
        codes = self._builder.weight(key, np.uint8, (rows, count, width), chunks)
        scale = self._builder.weight(f"{key}.scales", scale_dtype, (rows, count), lambda: scales)
        zero = None
        if not form.symmetric:
            packed = -(-count * form.bits // 8)
            zero = self._builder.weight(
                f"{key}.zeros", np.uint8, (rows, packed), lambda: (pack_zero_points(z, form.bits) for z in zeros)
            )
            if gathered:  # one code per byte, kept beside because the packed ones cannot be indexed
                self._builder.data_only(f"{key}.zeros.gather", np.uint8, (rows, count, 1), lambda: zeros)
        return BlockWeights(codes, scale, zero, (rows, columns), count, form, key, self._order(names[0]))

    def gather(self, table: BlockWeights) -> tuple[ir.Value, ir.Value | None]:
        """Scales and zero points of `table` in GatherBlockQuantized's shapes [N, blocks, 1]."""
        shape = (table.shape[0], table.blocks, 1)
        scales = self._builder.alias(f"{table.key}.scales.gather", f"{table.key}.scales", shape)
        if table.zero_points is None:
            return scales, None
        return scales, self._builder.alias(f"{table.key}.zeros.gather", f"{table.key}.zeros.gather", shape)

    def _order(self, name: str) -> ir.Value | None:
        """The activation order of a layer; layers over one input share it, so it is named by what it holds."""
        layer = self._checkpoint.layer(name)
        order = self._quantized.grid(layer).order if layer else None
        if order is None:
            return None
        key = f"order.{hashlib.sha256(order.tobytes()).hexdigest()[:16]}"
        return self._builder.weight(key, np.int64, order.shape, lambda: [order])

    def _block_parts(self, names: Sequence[str], form: LinearFormat) -> Iterator[BlockQuantized]:
        for name in names:
            layer = self._checkpoint.layer(name)
            if layer is not None:
                yield from self._quantized.blocks(layer)
            else:
                for _, part in self._parts([name]):
                    yield quantize_blocks(part, form.bits, form.block_size, form.symmetric)

    def _channel_parts(self, names: Sequence[str]) -> Iterator[ChannelQuantized]:
        for name in names:
            layer = self._checkpoint.layer(name)
            if layer is not None:
                yield self._quantized.channels(layer)
            else:
                yield from (quantize_channels(part) for _, part in self._parts([name]))

    def _parts(self, names: Sequence[str]) -> Iterator[tuple[int, np.ndarray]]:
        """(first row, float32 rows [n, K]) over all names, a bounded number of rows at a time."""
        offset = 0
        for name in names:
            rows, columns = self.rows_of([name]), self.columns_of(name)
            step = max(1, _CHUNK_ELEMENTS // columns)
            for start in range(0, rows, step):
                part = self._checkpoint.rows(f"{name}.weight", start, min(start + step, rows))
                yield offset + start, part.reshape(len(part), columns)
            offset += rows
