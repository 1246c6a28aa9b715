"""The ONNX Runtime dialect (CPU and CUDA): com.microsoft operators where they are the fast ones.

Keeps to what ONNX Runtime 1.23 runs, the newest for Python 3.10 and so for JetPack 6. Measured choices, with their
figures, are in benchmarks/LOG.md; in short: MatMulNBits with accuracy_level 4 for weight-only layers;
DynamicQuantizeMatMul over rows scaled to [-1, 1] for W8A8, which makes the per-tensor kernel per token (down_proj has
zero points per token beside it), and QuantizeLinear with MatMulIntegerToFloat where a checkpoint brings static scales;
GroupQueryAttention without its own rotary, because its rotary knows one table per batch and M-RoPE needs one per row;
a step of one token goes past it (`edgevl.export.step_attention`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from edgevl.export.graph import MICROSOFT, DataFile, GraphBuilder
from edgevl.export.precision import Precision
from edgevl.export.step_attention import StepAttention
from edgevl.export.weights import BlockWeights, WeightStore
from edgevl.runtime.checkpoint import Checkpoint
from edgevl.runtime.config import ModelConfig
from edgevl.runtime.graph_spec import CACHE_KEY, CACHE_VALUE, GraphSpec

__all__ = ["LEAST_ONNXRUNTIME", "LEAST_ONNXRUNTIME_INT8_CACHE", "OrtDialect", "nbits_attributes"]

OPSET = 23  # RotaryEmbedding and RMSNormalization
IR_VERSION = 11
LEAST_ONNXRUNTIME = "1.23"
# By the dtype of the graph; the release before each loads such a graph and fails as it runs.
LEAST_ONNXRUNTIME_INT8_CACHE = {"float32": "1.27", "float16": "1.29"}
_INT8_ACTIVATIONS = 4  # MatMulNBits accuracy_level: activations rounded to int8 per row and block in the kernel
_QUICK_GELU_LEAST = -0.163611  # x sigmoid(1.702 x) at x = -0.7512
_TINY = np.array(1e-30, np.float32)  # an all-zero row divided by its largest entry would be NaN


class OrtDialect:
    """Implements edgevl.export.dialect.Dialect for one graph."""

    opset, ir_version = OPSET, IR_VERSION
    narrows_last_layer = True
    has_steps = True  # attention of one new token by a way of its own, see StepAttention

    def __init__(
        self, spec: GraphSpec, config: ModelConfig, checkpoint: Checkpoint, data: DataFile, precision: Precision
    ) -> None:
        self.builder = GraphBuilder(spec, data, self.opset, self.ir_version)
        self._config = config
        self._precision = precision
        self._weights = WeightStore(checkpoint, self.builder, precision.dtype)
        self._step: StepAttention | None = None
        self._least: dict[ir.Value, float] = {}  # what no entry of a value is under
        self._scaled: dict[ir.Value, tuple[ir.Value, ir.Value]] = {}
        self._coded: dict[tuple[ir.Value, float], ir.Value] = {}
        self._ordered: dict[tuple[ir.Value, ir.Value], ir.Value] = {}

    # ------------------------------------------------------------------ plumbing

    def input(self, name: str) -> ir.Value:
        return self.builder.input(name)

    def output(self, name: str, value: ir.Value) -> None:
        self.builder.output(name, value)

    def add(self, a: ir.Value, b: ir.Value) -> ir.Value:
        return self.builder.op("Add", [a, b])

    def _shape(self, *dims: int) -> ir.Value:
        return self.builder.constant(f"shape_{'_'.join(map(str, dims))}", np.array(dims, np.int64))

    def _flat(self, x: ir.Value, width: int) -> ir.Value:
        return self.builder.op("Reshape", [x, self._shape(-1, width)])

    # ------------------------------------------------------------------ tables and rows

    def embedding(self, ids: ir.Value, table: str) -> ir.Value:
        form = self._precision.table
        if form.kind == "float":
            return self.builder.op("Gather", [self._weights.table(table), ids])
        packed = self._weights.blocks([table], form, gathered=True)
        scales, zeros = self._weights.gather(packed)
        attributes = {"bits": form.bits, "block_size": form.block_size, "gather_axis": 0, "quantize_axis": 2}
        rows = self.builder.op("GatherBlockQuantized", [packed.codes, ids, scales, zeros], attributes, domain=MICROSOFT)
        x = self.builder.op("Reshape", [rows, self._shape(0, 0, packed.blocks * form.block_size)])
        if packed.blocks * form.block_size == packed.shape[1]:
            return x
        ends = [self.builder.constant(f"int64_{i}", np.array([i], np.int64)) for i in (0, packed.shape[1], 2)]
        return self.builder.op("Slice", [x, *ends])

    def place_images(self, x: ir.Value) -> ir.Value:
        slots, rows = self.input("image_slots"), self.input("image_embeds")
        last = self.builder.constant("axis_last", np.array([-1], np.int64))
        flat = self._flat(x, self._config.text.hidden_size)
        index = self.builder.op("Unsqueeze", [slots, last])
        replaced = self.builder.op("ScatterND", [flat, index, rows])
        return self.builder.op("Reshape", [replaced, self.builder.op("Shape", [x])])

    def take_rows(self, x: ir.Value, rows: ir.Value) -> ir.Value:
        return self.builder.op("Gather", [self._flat(x, self._config.text.hidden_size), rows], {"axis": 0})

    def merge_rows(self, x: ir.Value, width: int) -> ir.Value:
        return self._flat(x, width)

    def lm_head(self, x: ir.Value, table: str) -> ir.Value:
        if self._precision.table.kind == "float":
            logits = self.builder.op("Gemm", [x, self._weights.table(table)], {"transB": 1})
        else:
            logits = self._matmul_nbits(x, self._weights.blocks([table], self._precision.table), None)
        if self._precision.dtype == "float32":
            return logits
        return self.builder.op("Cast", [logits], {"to": int(ir.DataType.FLOAT)})

    # ------------------------------------------------------------------ linear layers

    def linear(self, x: ir.Value, name: str, bias: bool = False) -> ir.Value:
        return self._product(x, [name], bias)

    def linears(self, x: ir.Value, names: Sequence[str], bias: bool = False) -> tuple[ir.Value, ...]:
        if not self._weights.mergeable(names):
            return tuple(self._product(x, [n], bias) for n in names)
        sizes = [self._weights.rows_of([n]) for n in names]
        split = self.builder.constant(f"split_{'_'.join(map(str, sizes))}", np.array(sizes, np.int64))
        merged = self._product(x, names, bias)
        return self.builder.op("Split", [merged, split], {"axis": -1}, outputs=len(names))

    def gated_mlp(self, x: ir.Value, gate: str, up: str, down: str) -> ir.Value:
        # Not merged: on the CPU the Split costs more than the larger product gains (0.74 ms against 1.64).
        a, b = self._product(x, [gate], False), self._product(x, [up], False)
        h = self.gated(a, b)
        form = self._weights.format_of([down], self._precision.linear)
        if form.kind == "w8a8" and form.input_scale is None and self._weights.pre_scale(down) is None:
            return self._affine_product(h, down, x)
        return self._product(h, [down], False)

    def gated(self, gate: ir.Value, up: ir.Value) -> ir.Value:
        """SiLU(gate) × up."""
        silu = self.builder.op("QuickGelu", [gate], {"alpha": 1.0}, domain=MICROSOFT)
        return self.builder.op("Mul", [silu, up])

    def patch_embedding(self, patches: ir.Value, name: str) -> ir.Value:
        # Stays float in every precision: pixels are the one input whose error nothing later can mend, and it is
        # under 1 % of the encoder's work.
        return self.builder.op("MatMul", [patches, self._weights.transposed([name])])

    def _product(self, x: ir.Value, names: Sequence[str], bias: bool) -> ir.Value:
        form = self._weights.format_of(names, self._precision.linear)
        added = self._weights.vector(names, "bias") if bias else None
        pre = self._weights.pre_scale(names[0])
        if pre is not None:
            x = self.builder.op("Mul", [x, pre])
        if form.input_scale is not None:
            return self._static_product(x, names, form.input_scale, added)
        if form.kind == "float":
            y = self.builder.op("MatMul", [x, self._weights.transposed(names)])
        elif form.kind == "w8a8":
            return self._w8a8_product(x, names, added)
        else:
            return self._matmul_nbits(x, self._weights.blocks(names, form), added)
        return y if added is None else self.builder.op("Add", [y, added])

    def _w8a8_product(self, x: ir.Value, names: Sequence[str], bias: ir.Value | None) -> ir.Value:
        unit, largest = self._unit_rows(x)
        codes, scales = self._weights.channels(names)
        y = self.builder.op("DynamicQuantizeMatMul", [unit, codes, scales], domain=MICROSOFT)
        y = self.builder.op("Mul", [y, largest])
        return y if bias is None else self.builder.op("Add", [y, bias])

    def _static_product(self, x: ir.Value, names: Sequence[str], scale: float, bias: ir.Value | None) -> ir.Value:
        """x as uint8 around 128, which is the int8 of the scheme (the kernel for u8 × s8 is 40 times that for s8 × s8);
        layers over one input share it. QuantizeLinear is Microsoft's: ONNX Runtime 1.23 (JetPack 6) has none of
        opset 23."""
        zero = self.builder.constant("uint8_128", np.array(128, np.uint8))
        step = self.builder.constant(f"float32_{scale!r}", np.array(scale, np.float32))
        if (x, scale) not in self._coded:
            self._coded[x, scale] = self.builder.op("QuantizeLinear", [x, step, zero], domain=MICROSOFT)
        codes, scales = self._weights.channels(names)
        inputs = [self._coded[x, scale], codes, step, scales, zero, None, bias]
        while inputs[-1] is None:
            inputs.pop()
        return self.builder.op("MatMulIntegerToFloat", inputs, domain=MICROSOFT)

    def _affine_product(self, x: ir.Value, name: str, like: ir.Value) -> ir.Value:
        """W8A8 with 256 codes between the extremes of every token, for what a gate made: a token's outliers are of one
        sign there, and codes around zero would leave half of the range empty. `like`: what has the output's shape.

        x ≈ step (code - zero), so x Wᵀ = step ((code - 128) Wᵀ + (128 - zero) sums of W's rows): the kernel takes no
        zero point per row.
        """
        op, constant = self.builder.op, self.builder.constant
        flat = self._flat(x, self._weights.columns_of(name))
        last, nothing = constant("axis_last", np.array([-1], np.int64)), constant("float32_0", np.array(0, np.float32))
        low = op("Min", [op("ReduceMin", [flat, last], {"keepdims": 0}), nothing])
        high = op("Max", [op("ReduceMax", [flat, last], {"keepdims": 0}), nothing])
        codes_between = constant("float32_255", np.array(255, np.float32))
        step = op("Max", [op("Div", [op("Sub", [high, low]), codes_between]), constant("tiny", _TINY)])
        zero = op("Round", [op("Div", [op("Neg", [low]), step])])
        coded = op("Cast", [zero], {"to": int(ir.DataType.UINT8)})
        codes = op("QuantizeLinear", [flat, step, coded], {"axis": 0}, domain=MICROSOFT)
        weight, scales = self._weights.channels([name])
        middle = constant("uint8_128", np.array(128, np.uint8))
        one = constant("float32_1", np.array(1, np.float32))
        y = op("MatMulIntegerToFloat", [codes, weight, one, scales, middle], domain=MICROSOFT)
        shift = op("Unsqueeze", [op("Sub", [constant("float32_128", np.array(128, np.float32)), zero]), last])
        y = op("Add", [y, op("Mul", [shift, self._weights.channel_sums([name])])])
        return op("Reshape", [op("Mul", [y, op("Unsqueeze", [step, last])]), op("Shape", [like])])

    def _matmul_nbits(self, x: ir.Value, weight: BlockWeights, bias: ir.Value | None) -> ir.Value:
        if weight.order is not None:
            x = self._columns(x, weight.order)
        attributes = {**nbits_attributes(weight), "accuracy_level": _INT8_ACTIVATIONS}
        inputs = [x, weight.codes, weight.scales, weight.zero_points, None, bias]
        while inputs[-1] is None:
            inputs.pop()
        return self.builder.op("MatMulNBits", inputs, attributes, domain=MICROSOFT)

    def _columns(self, x: ir.Value, order: ir.Value) -> ir.Value:
        """x with its last axis in the order of a layer's groups, shared by layers over one input."""
        if (x, order) not in self._ordered:
            self._ordered[x, order] = self.builder.op("Gather", [x, order], {"axis": -1})
        return self._ordered[x, order]

    def _unit_rows(self, x: ir.Value) -> tuple[ir.Value, ir.Value]:
        """(x with every row divided by its largest magnitude, that magnitude), shared by layers over one input."""
        if x not in self._scaled:
            last = self.builder.constant("axis_last", np.array([-1], np.int64))
            least = self._least.get(x)
            if least is None:
                magnitudes, floor = self.builder.op("Abs", [x]), self.builder.constant("tiny", _TINY)
            else:  # the most negative entry is known, which spares a pass
                magnitudes, floor = x, self.builder.constant(f"float32_{-least!r}", np.array(-least, np.float32))
            largest = self.builder.op("ReduceMax", [magnitudes, last], {"keepdims": 1})
            largest = self.builder.op("Max", [largest, floor])
            self._scaled[x] = (self.builder.op("Div", [x, largest]), largest)
        return self._scaled[x]

    # ------------------------------------------------------------------ norms and activations

    def rms_norm(self, x: ir.Value, name: str, epsilon: float) -> ir.Value:
        weight = self._weights.vector([name], "weight")
        return self.builder.op("RMSNormalization", [x, weight], {"axis": -1, "epsilon": epsilon})

    def layer_norm(self, x: ir.Value, name: str, epsilon: float) -> ir.Value:
        weight, bias = (self._weights.vector([name], part) for part in ("weight", "bias"))
        return self.builder.op("LayerNormalization", [x, weight, bias], {"axis": -1, "epsilon": epsilon})

    def quick_gelu(self, x: ir.Value) -> ir.Value:
        y = self.builder.op("QuickGelu", [x], {"alpha": 1.702}, domain=MICROSOFT)
        self._least[y] = _QUICK_GELU_LEAST
        return y

    def gelu(self, x: ir.Value) -> ir.Value:
        return self.builder.op("Gelu", [x])

    # ------------------------------------------------------------------ attention

    def _rotate(self, x: ir.Value, heads: int) -> ir.Value:
        tables = [self.input("rotary_cos"), self.input("rotary_sin")]
        return self.builder.op("RotaryEmbedding", [x, *tables], {"num_heads": heads})

    def causal_attention(self, q: ir.Value, k: ir.Value, v: ir.Value, layer: int) -> ir.Value:
        names = [pattern.format(kind="{kind}", layer=layer) for pattern in (CACHE_KEY, CACHE_VALUE)]
        past = [self.input(n.format(kind="past")) for n in names]
        y, *present = self._attend(q, k, v, past, layer)
        for name, value in zip(names, present):
            self.output(name.format(kind="present"), value)
        return y

    def _attend(
        self, q: ir.Value, k: ir.Value, v: ir.Value, past: Sequence[ir.Value], layer: int
    ) -> Sequence[ir.Value]:
        """(attention, keys and values with the new ones in them) of q and k as they were multiplied, not rotated."""
        t = self._config.text
        q, k = self._rotate(q, t.num_attention_heads), self._rotate(k, t.num_key_value_heads)
        step = self._step_attention()
        if step is None:
            return self._prompt_attention(q, k, v, past, layer)
        return self.builder.either(
            step.applies,
            lambda: step.write(q, k, v, *past),
            lambda: self._prompt_attention(q, k, v, past, layer),
        )

    def _prompt_attention(
        self, q: ir.Value, k: ir.Value, v: ir.Value, past: Sequence[ir.Value], layer: int
    ) -> Sequence[ir.Value]:
        """(attention, keys and values with the new ones in them), for any number of new tokens."""
        t = self._config.text
        lengths = [self.input("seqlens_k"), self.input("total_sequence_length")]
        attributes: dict[str, Any] = {
            "num_heads": t.num_attention_heads,
            "kv_num_heads": t.num_key_value_heads,
            "scale": t.head_dim**-0.5,
            "do_rotary": 0,
        }
        inputs = [q, k, v, *past, *lengths]
        if self._precision.cache == "int8":
            attributes |= {"kv_cache_bit_width": 8, "k_quant_type": "PER_CHANNEL", "v_quant_type": "PER_CHANNEL"}
            # Five inputs are left out: rotary tables, positions, a bias, sinks.
            inputs += [None] * 5 + [self._weights.cache_scale(layer, kind) for kind in "kv"]
        return self.builder.op("GroupQueryAttention", inputs, attributes, domain=MICROSOFT, outputs=3)

    def _step_attention(self) -> StepAttention | None:
        """One for all layers, of a graph that decodes over a float32 cache."""
        plain = self._precision.dtype == "float32" and self._precision.cache != "int8"
        if self._step is None and self.has_steps and plain and self.builder.spec.name == "decoder":
            self._step = StepAttention(self.builder, self._config.text)
        return self._step

    def frame_attention(self, x: ir.Value, qkv: str) -> ir.Value:
        vision = self._config.vision
        merged = self._product(x, [qkv], True)
        split = self.builder.constant("split_qkv", np.array([vision.embed_dim] * 3, np.int64))
        q, k, v = self.builder.op("Split", [merged, split], {"axis": -1}, outputs=3)
        q, k = self._rotate(q, vision.num_heads), self._rotate(k, vision.num_heads)
        attributes = {"num_heads": vision.num_heads, "scale": vision.head_dim**-0.5}
        return self.builder.op("MultiHeadAttention", [q, k, v], attributes, domain=MICROSOFT)


def nbits_attributes(weight: BlockWeights) -> dict[str, int]:
    """What MatMulNBits is told of a weight [N, K] in blocks, on every provider."""
    rows, columns = weight.shape
    return {"K": columns, "N": rows, "bits": weight.format.bits, "block_size": weight.format.block_size}
