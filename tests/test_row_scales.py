"""W8A8 behind a QuickGelu: scales of rows without a pass over magnitudes, against numpy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from conftest import Pair

from edgevl.export.dialect_ort import OrtDialect
from edgevl.export.graph import DataFile
from edgevl.export.precision import vision_precision
from edgevl.runtime.checkpoint import Checkpoint
from edgevl.runtime.graph_spec import GraphSpec, TensorSpec

LAYER = "visual.blocks.0.mlp.fc2"


def rounded_product(x: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(y, bound of its error) in float64: 255 codes of x between ± each row's largest magnitude, or ± 0.1636 where that
    is more; int8 codes of weights between ± each output's largest. The kernel's own codes may differ by a whole one."""
    largest = np.maximum(np.abs(x).max(-1, keepdims=True), 0.163611)
    step = np.abs(weight).max(-1, keepdims=True) / 127
    coded = np.round(weight / step) * step
    return x @ coded.T + bias, largest / 127 * np.abs(coded).sum(-1) + 1e-6


def test_rows_behind_a_quick_gelu_need_no_magnitudes(tiny: Pair, tmp_path: Path) -> None:
    with Checkpoint.open(tiny.checkpoint) as checkpoint, DataFile(tmp_path / "g.onnx.data") as data:
        vision = checkpoint.config.vision
        spec = GraphSpec(
            "vision",
            (TensorSpec("x", "float32", ("rows", vision.intermediate_size)),),
            (TensorSpec("y", "float32", ("rows", vision.embed_dim)),),
        )
        dialect = OrtDialect(spec, checkpoint.config, checkpoint, data, vision_precision("int8"))
        dialect.output("y", dialect.linear(dialect.quick_gelu(dialect.input("x")), LAYER, bias=True))
        dialect.builder.save(tmp_path / "g.onnx")
    rng = np.random.default_rng(3)
    x = rng.normal(size=(5, vision.intermediate_size)).astype(np.float32)
    x[1], x[2], x[3] = -np.abs(x[1]), -0.7512, 0.01 * x[3]  # no positive entry; the least value itself; small ones
    x[4] *= 30
    assert "Abs" not in {n.op_type for n in onnx.load(str(tmp_path / "g.onnx"), load_external_data=False).graph.node}
    session = ort.InferenceSession(str(tmp_path / "g.onnx"), providers=["CPUExecutionProvider"])
    y = np.asarray(session.run(None, {"x": x})[0])
    weights = {n: p.detach().numpy() for n, p in tiny.model.named_parameters() if LAYER in n}
    (weight,) = (w for n, w in weights.items() if n.endswith("weight"))
    (bias,) = (b for n, b in weights.items() if n.endswith("bias"))
    gelu = x.astype(np.float64) / (1 + np.exp(-1.702 * x.astype(np.float64)))
    assert gelu.min() > -0.163611
    wanted, bound = rounded_product(gelu, weight.astype(np.float64), bias)
    assert (np.abs(y - wanted) < bound).all()
    # Not merely within the bound: errors of codes are random, a wrong scale's are not.
    assert np.sqrt(np.mean((y - wanted) ** 2)) < 0.1 * np.sqrt(np.mean(bound**2))
