"""The primitive dialect: opset 21 for TensorRT 10.3 to 10.13 (JetPack 6.1, 6.2 and 7.1).

Those versions know none of Attention, RotaryEmbedding, RMSNormalization, TensorScatter and Gelu, so they are written
out; what TensorRT still fuses of them is found by its own pattern matching. Without TensorScatter the graph cannot
write into the cache: it gives the new tokens' keys and values, and the engine stores them.
"""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir

from edgevl.export.dialect_standard import StandardDialect
from edgevl.runtime.graph_spec import CACHE_KEY, CACHE_VALUE

__all__ = ["PrimitiveDialect"]

_FLOAT32 = np.dtype(np.float32)


class PrimitiveDialect(StandardDialect):
    """The standard dialect in older operators."""

    opset = 21  # DequantizeLinear of INT4 in blocks
    ir_version = 10

    def _embedding_table(self, table: str) -> ir.Value:
        # Whether these versions scale only the wanted rows of an int8 table is not known: a plain table is safe.
        return self._weights.table(table)

    def rms_norm(self, x: ir.Value, name: str, epsilon: float) -> ir.Value:
        wide = self.cast(x, _FLOAT32)
        mean = self.op("ReduceMean", self.op("Mul", wide, wide), self.ints(-1), keepdims=1)
        root = self.op("Sqrt", self.op("Add", mean, self.scalar(epsilon, _FLOAT32)))
        unit = self.cast(self.op("Div", wide, root), self.dtype)
        return self.op("Mul", unit, self._weights.vector([name], "weight"))

    def gelu(self, x: ir.Value) -> ir.Value:
        wide = self.cast(x, _FLOAT32)
        erf = self.op("Erf", self.op("Mul", wide, self.scalar(math.sqrt(0.5), _FLOAT32)))
        half = self.op("Mul", wide, self.scalar(0.5, _FLOAT32))
        return self.cast(self.op("Mul", half, self.op("Add", erf, self.scalar(1.0, _FLOAT32))), self.dtype)

    def rotate(self, x: ir.Value) -> ir.Value:
        # x * [cos cos] + [-x2 x1] * [sin sin], in halves.
        cos, sin = (
            self.shared(
                name, lambda name=name: self.op("Unsqueeze", self.input(name), self.ints(1))
            )  # [B, 1, S, d / 2]
            for name in ("rotary_cos", "rotary_sin")
        )
        first, second = self.op("Split", x, axis=-1, num_outputs=2, outputs=2)
        low = self.op("Sub", self.op("Mul", first, cos), self.op("Mul", second, sin))
        high = self.op("Add", self.op("Mul", second, cos), self.op("Mul", first, sin))
        return self.op("Concat", low, high, axis=-1)

    def attend(self, q: ir.Value, k: ir.Value, v: ir.Value, mask: ir.Value | None) -> ir.Value:
        t = self._config.text
        if mask is None:
            return self._softmax_attention(q, k, v, None, self._config.vision.head_dim)
        groups = t.num_attention_heads // t.num_key_value_heads
        if groups == 1:
            return self._softmax_attention(q, k, v, mask, t.head_dim)
        # The query heads of one kv head as further rows of it, [B, kv_heads, groups × S, d]: repeating keys and values
        # instead writes them out several times over, and takes the next product's int4 weights apart.
        rows = self.op("Reshape", q, self.ints(0, t.num_key_value_heads, -1, t.head_dim))
        seen = self.shared("mask_of_groups", lambda: self.op("Concat", *[mask] * groups, axis=2))
        y = self._softmax_attention(rows, k, v, seen, t.head_dim)
        return self.op("Reshape", y, self.ints(0, t.num_attention_heads, -1, t.head_dim))

    def _softmax_attention(self, q: ir.Value, k: ir.Value, v: ir.Value, mask: ir.Value | None, dim: int) -> ir.Value:
        # Scaled before the product: large keys would overflow float16 where it is not fused.
        q = self.op("Mul", q, self.scalar(1 / math.sqrt(dim)))
        scores = self.op("MatMul", q, self.op("Transpose", k, perm=[0, 1, 3, 2]))
        if mask is not None:
            scores = self.op("Add", scores, mask)
        return self.op("MatMul", self.op("Softmax", scores, axis=-1), v)

    def update_cache(self, k: ir.Value, v: ir.Value, layer: int) -> tuple[ir.Value, ir.Value]:
        seen = []
        for pattern, new in ((CACHE_KEY, k), (CACHE_VALUE, v)):
            past = self.input(pattern.format(kind="past", layer=layer))
            self.output(pattern.format(kind="new", layer=layer), new)
            visible = self.op("Slice", past, self.ints(0), self._visible(), self.ints(2))
            seen.append(self.op("Concat", visible, new, axis=2))
        return seen[0], seen[1]

    def _visible(self) -> ir.Value:
        """[1]: how many cached tokens the mask covers."""

        def made() -> ir.Value:
            attended = self.op("Shape", self.input("attention_mask"), start=3, end=4)
            return self.op("Sub", attended, self.op("Shape", self.input("input_ids"), start=1, end=2))

        return self.shared("visible", made)
