"""Attention of one new token per row, by plain operators: how the ONNX Runtime dialect decodes on a CPU.

GroupQueryAttention lays the keys of a head out anew for every query head of its group, six times for Qwen2-VL-2B, and
multiplies one row each time. Here the heads of a group are the rows of one product, so that keys and values are read
once. Of several new tokens it knows nothing: their mask would be a matrix, and GroupQueryAttention has none to read.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from edgevl.export.graph import MICROSOFT, GraphBuilder
from edgevl.runtime.config import TextConfig
from edgevl.runtime.graph_spec import CACHE_KEY

__all__ = ["StepAttention"]


class StepAttention:
    """What the layers of one decoder graph share: where new tokens go, and what they see.

    Attributes:
        applies: bool, whether every row has one new token.
    """

    def __init__(self, builder: GraphBuilder, text: TextConfig) -> None:
        self._builder, self._text = builder, text
        self.applies = builder.op("Equal", [self._size(builder.input("input_ids"), 1), self._int(1)])
        # seqlens_k is a row's length less one: the slot of its new token.
        slots = builder.op("Cast", [builder.input("seqlens_k")], {"to": int(ir.DataType.INT64)})
        self._targets = self._scatter_targets(slots)
        self._mask = self._additive_mask(slots)

    def write(self, q: ir.Value, k: ir.Value, v: ir.Value, keys: ir.Value, values: ir.Value) -> list[ir.Value]:
        """The step itself.

        Args:
            q: [B, 1, heads × d]. k, v: [B, 1, kv_heads × d], of the new tokens, rotated.
            keys, values: [B, kv_heads, capacity, d], the cache; what lies behind a row's length is never seen.

        Returns:
            Attention [B, 1, heads × d], and keys and values with the new ones in their places.
        """
        op, t = self._builder.op, self._text
        group = t.num_attention_heads // t.num_key_value_heads
        # ScatterND copies nothing where input and output are one buffer, as OrtGraph binds them.
        fresh = [op("Reshape", [new, self._shape(0, t.num_key_value_heads, t.head_dim)]) for new in (k, v)]
        keys, values = (op("ScatterND", [kept, self._targets, new]) for kept, new in zip((keys, values), fresh))
        rows = op("Reshape", [q, self._shape(0, t.num_key_value_heads, group, t.head_dim)])
        attributes = {"transB": 1, "alpha": t.head_dim**-0.5}
        scores = op("FusedMatMul", [rows, keys], attributes, domain=MICROSOFT)  # [B, kv_heads, group, capacity]
        weights = op("Softmax", [op("Add", [scores, self._mask])], {"axis": -1})
        y = op("Reshape", [op("MatMul", [weights, values]), self._shape(0, 1, t.num_attention_heads * t.head_dim)])
        return [y, keys, values]

    def _scatter_targets(self, slots: ir.Value) -> ir.Value:
        """int64 [B, kv_heads, 3]: row, head and slot of every new key."""
        op, heads = self._builder.op, self._text.num_key_value_heads
        count = self._size(self._builder.input("input_ids"), 0)
        rows = op("Range", [self._int(0), count, self._int(1)])
        unit = [self._builder.constant(f"unit_{i}", np.eye(3, dtype=np.int64)[i]) for i in (0, 2)]
        parts = [op("Mul", [op("Reshape", [x, self._shape(-1, 1, 1)]), u]) for x, u in zip((rows, slots), unit)]
        numbered = np.array([[[0, head, 0] for head in range(heads)]], np.int64)
        return op("Add", [op("Add", parts), self._builder.constant("head_numbers", numbered)])

    def _additive_mask(self, slots: ir.Value) -> ir.Value:
        """float32 [B, 1, 1, capacity]: 0 up to a row's new token, -inf behind it."""
        op, constant = self._builder.op, self._builder.constant
        capacity = self._size(self._builder.input(CACHE_KEY.format(kind="past", layer=0)), 2)
        places = op("Range", [self._int(0), capacity, self._int(1)])
        seen = op("LessOrEqual", [places, op("Reshape", [slots, self._shape(-1, 1, 1, 1)])])
        limits = (constant(f"float32_{v}", np.array(v, np.float32)) for v in (0.0, -np.inf))
        return op("Where", [seen, *limits])

    def _size(self, x: ir.Value, axis: int) -> ir.Value:
        return self._builder.op("Gather", [self._builder.op("Shape", [x]), self._int(axis)])

    def _int(self, value: int) -> ir.Value:
        return self._builder.constant(f"int64_scalar_{value}", np.array(value, np.int64))

    def _shape(self, *dims: int) -> ir.Value:
        return self._builder.constant(f"shape_{'_'.join(map(str, dims))}", np.array(dims, np.int64))
