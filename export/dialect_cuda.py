"""The ONNX Runtime dialect for CUDA: float16, and only what has a CUDA kernel from onnxruntime-gpu 1.23 on.

ONNX Runtime puts a node without a CUDA kernel on the CPU and copies its inputs and outputs there and back, without a
word. `tests/cuda_kernels.json` lists what this dialect may use, as two wheels place it; a test holds
every exported graph against it. The graph runs on the CPU too, which gives its numbers where there is no GPU.

What differs from the CPU's dialect, and why:
    opset 20: 1.23 has CUDA kernels of RMSNormalization and RotaryEmbedding 23, but runs Reshape, Shape, Unsqueeze and
    Cast 21 and later on the CPU. So the norm is SimplifiedLayerNormalization, the rotary embedding com.microsoft's
    scales are float16: MatMulNBits on CUDA takes them in the type of its input
    biases are added apart: 1.23's kernel refuses its bias input, and only when it runs
    a quantized embedding is unpacked by standard operators: GatherBlockQuantized reads packed zero points on CUDA and
    one per byte on the CPU
    no W8A8: DynamicQuantizeMatMul has no CUDA kernel
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from edgevl.export.dialect_ort import OrtDialect, nbits_attributes
from edgevl.export.graph import MICROSOFT, DataFile
from edgevl.export.precision import Precision
from edgevl.export.weights import BlockWeights
from edgevl.runtime.checkpoint import Checkpoint
from edgevl.runtime.config import ModelConfig
from edgevl.runtime.graph_spec import GraphSpec

__all__ = ["CudaDialect"]


class CudaDialect(OrtDialect):
    """Implements edgevl.export.dialect.Dialect for one graph."""

    opset, ir_version = 20, 9
    has_steps = False  # its kernel has them

    def __init__(
        self, spec: GraphSpec, config: ModelConfig, checkpoint: Checkpoint, data: DataFile, precision: Precision
    ) -> None:
        super().__init__(spec, config, checkpoint, data, precision)
        self._flat_tables: dict[str, ir.Value] = {}

    def output(self, name: str, value: ir.Value) -> None:
        if name == "image_embeds":  # what the decoder takes, so that it need not leave the device
            wanted = next(t for t in self.builder.spec.outputs if t.name == name).dtype
            value = value if wanted == self._precision.dtype else self._cast(value, wanted)
        super().output(name, value)

    def embedding(self, ids: ir.Value, table: str) -> ir.Value:
        form = self._precision.table
        if form.kind == "float":
            return super().embedding(ids, table)
        packed = self._weights.blocks([table], form, gathered=True)
        scale_table, zero_table = self._weights.gather(packed)
        codes = self.builder.op("Gather", [packed.codes, ids], {"axis": 0})  # uint8 [B, S, blocks, bytes]
        codes = self._cast(codes, self._precision.dtype)
        if form.bits == 4:
            codes = self._nibbles(codes, packed.blocks, form.block_size)
        if zero_table is None:
            middle = np.array(2 ** (form.bits - 1), self._precision.dtype)
            zeros = self.builder.constant(f"middle_{form.bits}", middle)
        else:
            zeros = self._cast(self.builder.op("Gather", [zero_table, ids], {"axis": 0}), self._precision.dtype)
        scales = self.builder.op("Gather", [scale_table, ids], {"axis": 0})  # [B, S, blocks, 1]
        x = self.builder.op("Mul", [self.builder.op("Sub", [codes, zeros]), scales])
        x = self.builder.op("Reshape", [x, self._shape(0, 0, packed.blocks * form.block_size)])
        if packed.blocks * form.block_size == packed.shape[1]:
            return x
        ends = [self.builder.constant(f"int64_{i}", np.array([i], np.int64)) for i in (0, packed.shape[1], 2)]
        return self.builder.op("Slice", [x, *ends])

    def rms_norm(self, x: ir.Value, name: str, epsilon: float) -> ir.Value:
        weight = self._weights.vector([name], "weight")
        return self.builder.op("SimplifiedLayerNormalization", [x, weight], {"axis": -1, "epsilon": epsilon})

    def _rotate(self, x: ir.Value, heads: int) -> ir.Value:
        """com.microsoft's operator looks rows of one table up by position. All tokens of all rows seen as one row of
        positions 0, 1, 2, … take the rows of cos and sin in order, each token its own."""
        part = self._config.vision if self.builder.spec.name == "vision" else self._config.text
        tables = [self._table_rows(name, part.head_dim // 2) for name in ("rotary_cos", "rotary_sin")]
        first = self.builder.constant("position_0", np.zeros(1, np.int64))
        one_row = self.builder.op("Reshape", [x, self._shape(1, -1, heads * part.head_dim)])
        y = self.builder.op("RotaryEmbedding", [one_row, first, *tables], {"num_heads": heads}, domain=MICROSOFT)
        return self.builder.op("Reshape", [y, self.builder.op("Shape", [x])])

    def _table_rows(self, name: str, width: int) -> ir.Value:
        if name not in self._flat_tables:
            self._flat_tables[name] = self._flat(self.input(name), width)
        return self._flat_tables[name]

    def _cast(self, x: ir.Value, dtype: str) -> ir.Value:
        return self.builder.op("Cast", [x], {"to": int(ir.DataType.from_numpy(np.dtype(dtype)))})

    def _nibbles(self, x: ir.Value, blocks: int, block_size: int) -> ir.Value:
        """Bytes as floats [B, S, blocks, block_size / 2] -> their low and high halves in turn; exact in float16."""
        dtype, last = self._precision.dtype, self.builder.constant("axis_last", np.array([-1], np.int64))
        sixteenth = self.builder.constant("sixteenth", np.array(1 / 16, dtype))
        high = self.builder.op("Floor", [self.builder.op("Mul", [x, sixteenth])])
        sixteen = self.builder.constant("sixteen", np.array(16, dtype))
        low = self.builder.op("Sub", [x, self.builder.op("Mul", [high, sixteen])])
        pair = [self.builder.op("Unsqueeze", [half, last]) for half in (low, high)]
        both = self.builder.op("Concat", pair, {"axis": -1})
        return self.builder.op("Reshape", [both, self._shape(0, 0, blocks, block_size)])

    def _matmul_nbits(self, x: ir.Value, weight: BlockWeights, bias: ir.Value | None) -> ir.Value:
        if weight.order is not None:
            x = self._columns(x, weight.order)
        attributes = nbits_attributes(weight)
        inputs = [x, weight.codes, weight.scales]
        if weight.zero_points is not None:
            inputs.append(weight.zero_points)
        y = self.builder.op("MatMulNBits", inputs, attributes, domain=MICROSOFT)
        return y if bias is None else self.builder.op("Add", [y, bias])
