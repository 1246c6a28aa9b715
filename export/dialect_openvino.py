"""The OpenVINO dialect: the prompt's way through a decoder, for the engine `openvino` beside ONNX Runtime.

OpenVINO multiplies int4 weights by activations rounded to int8 nearly twice as fast over many rows as MatMulNBits
does, and more slowly over one (figures in benchmarks/LOG.md). So it only fills the cache: the graph ends at the last
layer's keys and values, and the last token of a prompt is ONNX Runtime's first step. Weights are the decoder's bytes
in the same file, written as what OpenVINO takes for compressed weights (Cast, Sub, Mul, Reshape in front of a
product); its reader of MatMulNBits would copy them instead of mapping the file. W8A8 layers are those of the ONNX
Runtime dialect, which OpenVINO reads, but that down_proj has no zero points: in bfloat16, the offsets that they add and
take away again would cost more than they gain.
"""

from __future__ import annotations

from collections.abc import Sequence

import ml_dtypes
import numpy as np
import onnx_ir as ir

from edgevl.export.dialect_ort import OrtDialect
from edgevl.export.precision import LinearFormat, Precision
from edgevl.export.weights import BlockWeights
from edgevl.runtime.checkpoint import DECODER_LAYERS, Checkpoint
from edgevl.runtime.graph_spec import CACHE_KEY, CACHE_VALUE

__all__ = ["OpenVinoDialect", "is_offered"]


def is_offered(precision: Precision, checkpoint: Checkpoint) -> bool:
    """Whether a decoder has a prefill graph for OpenVINO: a float32 cache, and layers all in blocks or all W8A8 with
    scales found at run time, or plain."""
    layers = [q for name, q in checkpoint.layers.items() if name.startswith(DECODER_LAYERS)]
    kinds = {"blocks" if q.kind != "int8" else "w8a8" if q.input_scale is None else "static" for q in layers}
    alike = precision.linear.kind in ("blocks", "w8a8") and kinds <= {precision.linear.kind}
    return alike and precision.dtype == "float32" and not precision.cache


class OpenVinoDialect(OrtDialect):
    """Implements edgevl.export.dialect.Dialect for a graph that fills the cache; it has no logits."""

    # ------------------------------------------------------------------ tables and rows

    def embedding(self, ids: ir.Value, table: str) -> ir.Value:
        """Rows of codes are looked up and made numbers here: a compressed table may be written out whole."""
        form = self._precision.table
        if form.kind == "float":
            return super().embedding(ids, table)
        packed = self._weights.blocks([table], form, gathered=True)
        columns = packed.shape[1]
        scales, zeros = self._weights.gather(packed)
        codes = self._bytes_to_codes(self._op("Gather", packed.codes, ids), form)
        if zeros is None:
            codes = self._op("Sub", codes, self._float(2 ** (form.bits - 1)))
        else:
            codes = self._op("Sub", codes, self._to_float(self._op("Gather", zeros, ids)))
        x = self._op("Mul", codes, self._op("Gather", scales, ids))
        x = self._op("Reshape", x, self._shape(0, 0, packed.blocks * form.block_size))
        return x if packed.blocks * form.block_size == columns else self._first(x, columns, 2)

    def _bytes_to_codes(self, packed: ir.Value, form: LinearFormat) -> ir.Value:
        """uint8 [B, S, blocks, bytes] -> float32 [B, S, blocks, block_size]; of two codes the low bits come first."""
        x = self._to_float(packed)
        if form.bits == 8:
            return x
        high = self._op("Floor", self._op("Mul", x, self._float(1 / 16)))
        low = self._op("Sub", x, self._op("Mul", high, self._float(16)))
        last = self.builder.constant("axis_last", np.array([-1], np.int64))
        pair = self._op("Concat", self._op("Unsqueeze", low, last), self._op("Unsqueeze", high, last), axis=-1)
        return self._op("Reshape", pair, self._shape(0, 0, 0, form.block_size))

    def place_images(self, x: ir.Value) -> ir.Value:
        rows, zero = self.input("image_rows"), self.builder.constant("int64_0", np.array([0], np.int64))
        last = self.builder.constant("axis_last", np.array([-1], np.int64))
        pictured = self._op("Unsqueeze", self._op("GreaterOrEqual", rows, zero), last)
        found = self._op("Gather", self.input("image_embeds"), self._op("Max", rows, zero))
        return self._op("Where", pictured, found, x)

    # ------------------------------------------------------------------ linear layers

    def _affine_product(self, x: ir.Value, name: str, like: ir.Value) -> ir.Value:
        return self._product(x, [name], False)

    def _matmul_nbits(self, x: ir.Value, weight: BlockWeights, bias: ir.Value | None) -> ir.Value:
        if weight.order is not None:
            x = self._columns(x, weight.order)
        y = self._op("MatMul", x, self._op("Transpose", self._dequantized(weight), perm=[1, 0]))
        return y if bias is None else self._op("Add", y, bias)

    def _dequantized(self, weight: BlockWeights) -> ir.Value:
        """[N, K], for OpenVINO to find again as codes, scales and zero points."""
        form, (rows, columns) = weight.format, weight.shape
        shape = (rows, weight.blocks, form.block_size)
        element = ir.DataType.UINT4 if form.bits == 4 else ir.DataType.UINT8
        codes = self.builder.alias(f"{weight.key}.codes", weight.key, shape, element)
        scales = self.builder.alias(f"{weight.key}.scales.blocks", f"{weight.key}.scales", (rows, weight.blocks, 1))
        zero = self._middle(form) if weight.zero_points is None else self._zero_points(weight, element)
        centred = self._op("Sub", self._to_float(codes), zero)
        width = weight.blocks * form.block_size
        plain = self._op("Reshape", self._op("Mul", centred, scales), self._shape(rows, width))
        return plain if width == columns else self._first(plain, columns, 1)

    def _middle(self, form: LinearFormat) -> ir.Value:
        """The zero point of symmetric codes [1, 1, 1]. Out of an integer: where it is a float, OpenVINO does not round
        activations."""
        element = ml_dtypes.uint4 if form.bits == 4 else np.uint8
        value = np.array([[[2 ** (form.bits - 1)]]]).astype(element)
        return self._to_float(self.builder.constant(f"middle_{form.bits}", value))

    def _zero_points(self, weight: BlockWeights, element: ir.DataType) -> ir.Value:
        """[N, blocks, 1]; the decoder pads every row of them to whole bytes."""
        rows, blocks, key = weight.shape[0], weight.blocks, f"{weight.key}.zeros"
        padding = blocks * weight.format.bits % 8 // 4
        zeros = self._to_float(self.builder.alias(f"{key}.blocks", key, (rows, blocks + padding, 1), element))
        return self._first(zeros, blocks, 1) if padding else zeros

    # ------------------------------------------------------------------ attention

    def causal_attention(self, q: ir.Value, k: ir.Value, v: ir.Value, layer: int) -> ir.Value | None:
        t = self._config.text
        names = [pattern.format(kind="{kind}", layer=layer) for pattern in (CACHE_KEY, CACHE_VALUE)]
        k = self._heads(self._rotate(k, t.num_key_value_heads), t.num_key_value_heads)
        v = self._heads(v, t.num_key_value_heads)
        for name, new in zip(names, (k, v)):
            self.output(name.format(kind="new"), new)
        if layer == t.num_hidden_layers - 1:
            return None
        pasts = [self.input(n.format(kind="past")) for n in names]
        k, v = (self._op("Concat", past, new, axis=2) for past, new in zip(pasts, (k, v)))
        q = self._heads(self._rotate(q, t.num_attention_heads), t.num_attention_heads)
        y = self._op("Attention", q, k, v, self.input("attention_mask"), scale=t.head_dim**-0.5)
        width = t.num_attention_heads * t.head_dim
        return self._op("Reshape", self._op("Transpose", y, perm=[0, 2, 1, 3]), self._shape(0, 0, width))

    def _heads(self, x: ir.Value, count: int) -> ir.Value:
        """[B, S, heads × d] -> [B, heads, S, d]."""
        split = self._op("Reshape", x, self._shape(0, 0, count, self._config.text.head_dim))
        return self._op("Transpose", split, perm=[0, 2, 1, 3])

    # ------------------------------------------------------------------ plumbing

    def _op(self, op_type: str, *inputs: ir.Value, **attributes: int | float | Sequence[int]) -> ir.Value:
        return self.builder.op(op_type, inputs, attributes)

    def _to_float(self, x: ir.Value) -> ir.Value:
        return self._op("Cast", x, to=int(ir.DataType.FLOAT))

    def _float(self, value: float) -> ir.Value:
        return self.builder.constant(f"float32_{value!r}", np.array(value, np.float32))

    def _first(self, x: ir.Value, count: int, axis: int) -> ir.Value:
        """The first `count` entries along an axis."""
        ends = (self.builder.constant(f"int64_at_{i}", np.array([i], np.int64)) for i in (0, count, axis))
        return self._op("Slice", x, *ends)
