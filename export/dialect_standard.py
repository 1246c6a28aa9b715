"""The standard dialect: opset 24 for TensorRT >= 10.15 and TensorRT-RTX; ONNX Runtime runs the very same file.

Written so that TensorRT fuses it (measured on TensorRT-RTX, figures in benchmarks/LOG.md): TensorScatter over a cache
of constant size, which is updated in place; Attention with an additive mask in the type of the queries and an explicit
`scale` (a missing one adds moves over the cache), never `is_causal` (upper left: wrong for one token over a longer
cache) nor `nonpad_kv_seqlen` (dropped without a word); rotary rows per token without position ids; weight-only layers
as INT4 DequantizeLinear along the inputs, with scales in the compute type, positive, and no zero point.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from edgevl.export.graph import DataFile, GraphBuilder
from edgevl.export.precision import LinearFormat, Precision
from edgevl.export.trt_weights import TensorRTWeights
from edgevl.runtime.checkpoint import Checkpoint
from edgevl.runtime.config import ModelConfig
from edgevl.runtime.errors import CheckpointError
from edgevl.runtime.graph_spec import CACHE_KEY, CACHE_VALUE, GraphSpec

__all__ = ["StandardDialect"]


class StandardDialect:
    """Implements edgevl.export.dialect.Dialect for one graph."""

    opset = 24  # TensorScatter
    ir_version = 11
    narrows_last_layer = False  # at one token, which counts most, it would only add a kernel

    def __init__(
        self, spec: GraphSpec, config: ModelConfig, checkpoint: Checkpoint, data: DataFile, precision: Precision
    ) -> None:
        self.builder = GraphBuilder(spec, data, self.opset, self.ir_version)
        self._config = config
        self._precision = precision
        self._weights = TensorRTWeights(checkpoint, self.builder, precision.dtype)
        self.dtype = np.dtype(precision.dtype)
        self._shared: dict[object, ir.Value] = {}

    # ------------------------------------------------------------------ plumbing

    def op(self, op_type: str, *inputs: ir.Value | None, outputs: int = 1, **attributes: Any) -> Any:
        return self.builder.op(op_type, inputs, attributes, outputs=outputs)

    def input(self, name: str) -> ir.Value:
        return self.builder.input(name)

    def output(self, name: str, value: ir.Value) -> None:
        wanted = next(t.dtype for t in self.builder.spec.outputs if t.name == name)
        if name == "image_embeds" and wanted != self._precision.dtype:
            value = self.cast(value, np.dtype(wanted))
        self.builder.output(name, value)

    def add(self, a: ir.Value, b: ir.Value) -> ir.Value:
        return self.op("Add", a, b)

    def cast(self, x: ir.Value, dtype: np.dtype) -> ir.Value:
        return self.op("Cast", x, to=int(ir.DataType.from_numpy(dtype)))

    def ints(self, *values: int) -> ir.Value:
        return self.builder.constant(f"int64_{'_'.join(map(str, values))}", np.array(values, np.int64))

    def scalar(self, value: float, dtype: np.dtype | None = None) -> ir.Value:
        dtype = dtype or self.dtype
        return self.builder.constant(f"{dtype}_{value!r}", np.array(value).astype(dtype))

    def shared(self, key: object, make: Callable[[], ir.Value]) -> ir.Value:
        """The value that was made for `key`, made now if none was."""
        if key not in self._shared:
            self._shared[key] = make()
        return self._shared[key]

    def _flat(self, x: ir.Value, width: int) -> ir.Value:
        return self.op("Reshape", x, self.ints(-1, width))

    # ------------------------------------------------------------------ tables and rows

    def embedding(self, ids: ir.Value, table: str) -> ir.Value:
        if self._precision.table.kind == "float":
            return self.op("Gather", self._weights.table(table), ids)
        return self.op("Gather", self._embedding_table(table), ids)

    def _embedding_table(self, table: str) -> ir.Value:
        # One scale per row: TensorRT reads the wanted rows in int8 and scales them in the same kernel.
        return self.op("DequantizeLinear", *self._weights.int8_rows(table), axis=0)

    def place_images(self, x: ir.Value) -> ir.Value:
        # Looked up per token, not scattered per picture: no empty tensor where a step has no picture.
        rows, embeds = self.input("image_rows"), self.input("image_embeds")
        zero = self.ints(0)
        pictured = self.op("Unsqueeze", self.op("GreaterOrEqual", rows, zero), self.ints(-1))
        return self.op("Where", pictured, self.op("Gather", embeds, self.op("Max", rows, zero)), x)

    def take_rows(self, x: ir.Value, rows: ir.Value) -> ir.Value:
        return self.op("Gather", self._flat(x, self._config.text.hidden_size), rows, axis=0)

    def merge_rows(self, x: ir.Value, width: int) -> ir.Value:
        return self._flat(x, width)

    def lm_head(self, x: ir.Value, table: str) -> ir.Value:
        if self._precision.table.kind == "float":
            logits = self.op("Gemm", x, self._weights.table(table), transB=1)
        else:
            logits = self._int4_product(x, table, self._precision.table)
        return self.cast(logits, np.dtype(np.float32))

    # ------------------------------------------------------------------ linear layers

    def linear(self, x: ir.Value, name: str, bias: bool = False) -> ir.Value:
        form = self._form(name)
        if form.kind == "float":
            y = self.op("MatMul", x, self._weights.transposed([name]))
        elif form.kind == "w8a8":
            y = self._int8_product(x, name)
        elif form.bits == 4:
            y = self._int4_product(x, name, form)
        else:
            raise CheckpointError(
                f"layer {name} is weight-only with {form.bits} bits, which TensorRT multiplies through a copy in "
                "float16 that is larger than what it replaces; quantize to 4 bits, or to W8A8 with static scales"
            )
        return self.op("Add", y, self._weights.vector([name], "bias")) if bias else y

    def _form(self, name: str) -> LinearFormat:
        form = self._weights.format_of([name], self._precision.linear)
        return LinearFormat("float") if form.kind == "w8a8" and self._weights.left_plain(name) else form

    def linears(self, x: ir.Value, names: Sequence[str], bias: bool = False) -> tuple[ir.Value, ...]:
        # TensorRT merges products over one input itself.
        return tuple(self.linear(x, name, bias) for name in names)

    def _int4_product(self, x: ir.Value, name: str, form: LinearFormat) -> ir.Value:
        weight = self._weights.int4(name, form)
        order = weight.order
        if order is not None:
            given = x
            x = self.shared((given, order), lambda: self.op("Gather", given, order, axis=-1))
        size = weight.block_size
        y = self.op("MatMul", x, self.op("DequantizeLinear", weight.codes, weight.scales, axis=0, block_size=size))
        if weight.correction is None:
            return y
        sums = self.shared((x, size), lambda: self._block_sums(x, self._weights.columns_of(name) // size, size))
        return self.add(y, self.op("MatMul", sums, weight.correction))

    def _block_sums(self, x: ir.Value, blocks: int, size: int) -> ir.Value:
        """[B, S, K] -> [B, S, blocks]."""
        return self.op("ReduceSum", self.op("Reshape", x, self.ints(0, 0, blocks, size)), self.ints(-1), keepdims=0)

    def _int8_product(self, x: ir.Value, name: str, part: tuple[int, int] = (0, 1)) -> ir.Value:
        scale = self._weights.static_scale(name)
        factor = self._weights.pre_scale(name)
        if factor is not None:
            plain = x
            x = self.shared((plain, factor), lambda: self.op("Mul", plain, factor))
        given = x
        rounded = self.shared((given, float(scale)), lambda: self._rounded(given, scale))
        return self.op("MatMul", rounded, self.op("DequantizeLinear", *self._weights.int8_columns(name, part), axis=1))

    def _rounded(self, x: ir.Value, scale: np.ndarray) -> ir.Value:
        step = self.builder.constant(f"{self.dtype}_{float(scale)!r}", scale)
        zero = self.builder.constant("int8_0", np.array(0, np.int8))
        return self.op("DequantizeLinear", self.op("QuantizeLinear", x, step, zero), step, zero)

    def gated_mlp(self, x: ir.Value, gate: str, up: str, down: str) -> ir.Value:
        a, b = self.linears(x, [gate, up])
        return self.linear(self.op("Mul", self.op("Mul", a, self.op("Sigmoid", a)), b), down)

    def patch_embedding(self, patches: ir.Value, name: str) -> ir.Value:
        return self.op("MatMul", patches, self._weights.transposed([name]))

    # ------------------------------------------------------------------ norms and activations

    def rms_norm(self, x: ir.Value, name: str, epsilon: float) -> ir.Value:
        return self.op("RMSNormalization", x, self._weights.vector([name], "weight"), axis=-1, epsilon=epsilon)

    def layer_norm(self, x: ir.Value, name: str, epsilon: float) -> ir.Value:
        weight, bias = (self._weights.vector([name], part) for part in ("weight", "bias"))
        return self.op("LayerNormalization", x, weight, bias, axis=-1, epsilon=epsilon)

    def quick_gelu(self, x: ir.Value) -> ir.Value:
        return self.op("Mul", x, self.op("Sigmoid", self.op("Mul", x, self.scalar(1.702))))

    def gelu(self, x: ir.Value) -> ir.Value:
        return self.op("Gelu", x)

    # ------------------------------------------------------------------ attention

    def heads(self, x: ir.Value, count: int, dim: int) -> ir.Value:
        """[B, S, heads × d] -> [B, heads, S, d]."""
        return self.op("Transpose", self.op("Reshape", x, self.ints(0, 0, count, dim)), perm=[0, 2, 1, 3])

    def merged_heads(self, x: ir.Value, width: int) -> ir.Value:
        """[B, heads, S, d] -> [B, S, heads × d]."""
        return self.op("Reshape", self.op("Transpose", x, perm=[0, 2, 1, 3]), self.ints(0, 0, width))

    def rotate(self, x: ir.Value) -> ir.Value:
        """x [B, heads, S, d] turned by the graph's rotary rows [B, S, d / 2]."""
        return self.op("RotaryEmbedding", x, self.input("rotary_cos"), self.input("rotary_sin"))

    def attend(self, q: ir.Value, k: ir.Value, v: ir.Value, mask: ir.Value | None) -> ir.Value:
        """q [B, heads, S, d] over k, v [B, kv_heads, L, d], mask [B, 1, S, L]."""
        dim = self._config.text.head_dim if mask is not None else self._config.vision.head_dim
        return self.op("Attention", q, k, v, *([] if mask is None else [mask]), scale=1 / math.sqrt(dim))

    def causal_attention(self, q: ir.Value, k: ir.Value, v: ir.Value, layer: int) -> ir.Value:
        t = self._config.text
        q = self.rotate(self.heads(q, t.num_attention_heads, t.head_dim))
        k = self.rotate(self.heads(k, t.num_key_value_heads, t.head_dim))
        v = self.heads(v, t.num_key_value_heads, t.head_dim)
        k, v = self.update_cache(k, v, layer)
        return self.merged_heads(self.attend(q, k, v, self.input("attention_mask")), t.num_attention_heads * t.head_dim)

    def update_cache(self, k: ir.Value, v: ir.Value, layer: int) -> tuple[ir.Value, ir.Value]:
        """Keys and values of the new tokens into the cache; returns what the new tokens attend to."""
        seen = []
        for pattern, new in ((CACHE_KEY, k), (CACHE_VALUE, v)):
            past = self.input(pattern.format(kind="past", layer=layer))
            present = self.op("TensorScatter", past, new, self.input("write_indices"), axis=2)
            self.output(pattern.format(kind="present", layer=layer), present)
            seen.append(present)
        return seen[0], seen[1]

    def frame_attention(self, x: ir.Value, qkv: str) -> ir.Value:
        vision = self._config.vision
        if self._form(qkv).kind == "w8a8":
            # One int8 product with a Split behind it is computed in float16, with the weights written out each time.
            parts = [(i, 3) for i in range(3)]
            q, k, v = (self.add(self._int8_product(x, qkv, p), self._weights.bias_part(qkv, p)) for p in parts)
        else:
            merged = self.linear(x, qkv, bias=True)
            q, k, v = self.op("Split", merged, self.ints(*[vision.embed_dim] * 3), axis=-1, outputs=3)
        q, k, v = (self.heads(part, vision.num_heads, vision.head_dim) for part in (q, k, v))
        return self.merged_heads(self.attend(self.rotate(q), self.rotate(k), v, None), vision.embed_dim)
