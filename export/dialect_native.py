"""The native dialect: ONNX Runtime's graphs with edgevl's own operators (runtime/native) in them.

Products with weights in blocks are ours in place of MatMulNBits; those of W8A8 round their inputs themselves and have
QuickGelu behind them. Either normalises its rows first, and multiplies with a gate or adds a residual by the way.
Attention of a vision encoder is in int8 and rotates queries and keys itself. The weights' bytes are the same, so each
is a second small file beside the graph that stays for devices without the kernels: they are built where a C compiler is
found.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from edgevl.export.dialect_ort import OrtDialect, nbits_attributes
from edgevl.export.graph import EDGEVL
from edgevl.export.precision import Precision
from edgevl.export.weights import BlockWeights
from edgevl.runtime.checkpoint import DECODER_LAYERS, Checkpoint
from edgevl.runtime.config import TextConfig

__all__ = ["NativeDialect", "has_native_decoder", "has_native_vision"]

_LEAST_BLOCK = 32
_MOST_HEAD_DIM = 128
_PLACES = {  # of inputs (runtime/native/matmul_nbits.c, int8_operators.c)
    ("MatMulNBits", "gate"): 6,
    ("MatMulNBits", "residual"): 7,
    ("MatMulInt8", "gate"): 4,
    ("MatMulInt8", "residual"): 5,
}
_HEAD_DIM_UNIT, _MOST_GROUP = 16, 96  # of attention in a decoder (runtime/native/causal.h)


def has_native_decoder(precision: Precision, checkpoint: Checkpoint) -> bool:
    """Whether a decoder has products that the kernels take, over a graph of float32: all in blocks, or all of
    W8A8, which fewer processors have kernels for."""
    layers = [q for name, q in checkpoint.layers.items() if name.startswith(DECODER_LAYERS)]
    w8a8 = precision.linear.kind == "w8a8"
    taken = all((q.kind == "int8") == w8a8 and (w8a8 or q.block_size >= _LEAST_BLOCK) for q in layers)
    return taken and precision.dtype == "float32" and precision.table.kind == "blocks"


def has_native_vision(precision: Precision, checkpoint: Checkpoint) -> bool:
    """Whether a vision encoder is of W8A8 with scales found at run time, and its heads are what the kernels take."""
    vision = checkpoint.config.vision
    layers = [q for name, q in checkpoint.layers.items() if name.startswith("visual.")]
    dynamic = all(q.kind == "int8" and q.input_scale is None for q in layers)
    return precision.linear.kind == "w8a8" and dynamic and vision.head_dim <= _MOST_HEAD_DIM


def _attends(text: TextConfig, precision: Precision) -> bool:
    """Whether the kernels take the heads and the cache of a decoder."""
    fits = text.head_dim % _HEAD_DIM_UNIT == 0 and text.head_dim <= _MOST_HEAD_DIM
    return fits and precision.cache != "int8" and text.num_attention_heads <= _MOST_GROUP * text.num_key_value_heads


class NativeDialect(OrtDialect):
    """Implements edgevl.export.dialect.Dialect for one graph."""

    def _matmul_nbits(self, x: ir.Value, weight: BlockWeights, bias: ir.Value | None) -> ir.Value:
        if weight.order is not None:
            x = self._columns(x, weight.order)
        x, norm = self._before_norm(x)
        inputs = [x, weight.codes, weight.scales, weight.zero_points, None, bias, None, None, *norm]
        return self.builder.op("MatMulNBits", inputs, nbits_attributes(weight), domain=EDGEVL)

    def _w8a8_product(self, x: ir.Value, names: Sequence[str], bias: ir.Value | None) -> ir.Value:
        return self._int8_product(x, names, bias, affine=0)

    def _affine_product(self, x: ir.Value, name: str, like: ir.Value) -> ir.Value:
        return self._int8_product(x, [name], None, affine=1)

    def _int8_product(self, x: ir.Value, names: Sequence[str], bias: ir.Value | None, affine: int) -> ir.Value:
        codes, scales = self._weights.channels(names)
        size = {"K": self._weights.columns_of(names[0]), "N": self._weights.rows_of(names)}
        attributes = {**size, "quick_gelu": 0, "affine": affine}
        x, norm = self._before_norm(x)
        return self.builder.op("MatMulInt8", [x, codes, scales, bias, None, None, *norm], attributes, domain=EDGEVL)

    # ------------------------------------------------------------------ what a product does by the way

    def _before_norm(self, x: ir.Value) -> tuple[ir.Value, list[ir.Value | None]]:
        """What a norm in front of x was given, with the norm's weight, bias and epsilon; x itself and nothing else
        where there is none. The norm's own node stays for others that read it."""
        node = x.producer()
        if node is None or node.op_type not in ("RMSNormalization", "LayerNormalization"):
            return x, [None, None, None]
        given, weight, *bias = node.inputs
        assert given is not None
        epsilon = np.array([node.attributes["epsilon"].as_float()], np.float32)
        return given, [weight, *(bias or [None]), self.builder.constant(f"epsilon_{epsilon[0]}", epsilon)]

    def quick_gelu(self, x: ir.Value) -> ir.Value:
        product = self._own_product(x)
        if product is None or product.op_type != "MatMulInt8":
            return super().quick_gelu(x)
        product.attributes["quick_gelu"] = ir.AttrInt64("quick_gelu", 1)
        return x

    def gated(self, gate: ir.Value, up: ir.Value) -> ir.Value:
        return self._with(up, "gate", gate) or super().gated(gate, up)

    def add(self, a: ir.Value, b: ir.Value) -> ir.Value:
        return self._with(b, "residual", a) or super().add(a, b)

    def _with(self, product: ir.Value, place: str, other: ir.Value) -> ir.Value | None:
        """The product with `other` as its gate or residual; None where it is not one of ours."""
        node = self._own_product(product)
        if node is None:
            return None
        node.replace_input_with(_PLACES[node.op_type, place], other)
        return product

    def _own_product(self, x: ir.Value) -> ir.Node | None:
        node = x.producer()
        return node if node is not None and node.domain == EDGEVL and node.op_type.startswith("MatMul") else None

    # ------------------------------------------------------------------ attention

    def _attend(
        self, q: ir.Value, k: ir.Value, v: ir.Value, past: Sequence[ir.Value], layer: int
    ) -> Sequence[ir.Value]:
        t = self._config.text
        if not _attends(t, self._precision):
            return super()._attend(q, k, v, past, layer)
        given: list[ir.Value | None] = [q, k, v]
        split = q.producer()
        if split is not None and split.op_type == "Split":  # read where the merged product left them
            given = [split.inputs[0], None, None]
        tables = [self.input(name) for name in ("rotary_cos", "rotary_sin")]
        inputs = [*given, *tables, *past, self.input("seqlens_k")]
        attributes = {"num_heads": t.num_attention_heads, "kv_num_heads": t.num_key_value_heads}
        return self.builder.op("CausalAttention", inputs, attributes, domain=EDGEVL, outputs=3)

    def frame_attention(self, x: ir.Value, qkv: str) -> ir.Value:
        inputs = [self._product(x, [qkv], True), self.input("rotary_cos"), self.input("rotary_sin")]
        heads = {"num_heads": self._config.vision.num_heads}
        return self.builder.op("FrameAttention", inputs, heads, domain=EDGEVL)
