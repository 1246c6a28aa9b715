"""What `compare` rounds: INT8 vision against the driver, which kept its hidden states, and against the engine."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from edgevl.benchmarks.divergence import conversation_logits, divergence
from edgevl.calibration.comparison import compare, vision_rounding
from edgevl.calibration.dataset import Sample, SampleSource
from edgevl.calibration.dequantized import FloatCheckpoint
from edgevl.calibration.driver import quantize_checkpoint
from edgevl.calibration.fidelity import combined
from edgevl.calibration.recipes import recipe
from edgevl.calibration.vision import Tower
from edgevl.export.exporter import ExportOptions, export_bundle
from edgevl.runtime.config import ModelConfig
from edgevl.runtime.generation import VisionLanguageModel
from edgevl.runtime.mrope import rotary_rows
from edgevl.runtime.native_kernels import SWITCH
from edgevl.runtime.prompt import collect_vision
from edgevl.runtime.vision import VisionStage
from edgevl.tasks import TASKS

DEMO = Path(__file__).parents[1] / "demo" / "model"


def conversations(split: str, count: int) -> list[list[dict[str, Any]]]:
    cases = [TASKS[t].case(split, i) for i in range(count) for t in ("read_2_lines", "where", "count")]
    return [[*c.messages, {"role": "assistant", "content": c.truth}] for c in cases[:count]]


def rounded_by_hand(x: torch.Tensor, scale: float | None) -> torch.Tensor:
    """A fixed scale, one number at a time; or the engine's DynamicQuantizeLinear over rows divided by their largest."""
    if scale is not None:
        rows = [[max(-128, min(127, round(v / scale))) * scale for v in row] for row in x.tolist()]
        return torch.tensor(rows)
    make, floats, bytes_ = onnx.helper, onnx.TensorProto.FLOAT, onnx.TensorProto.UINT8
    outputs = [
        make.make_tensor_value_info(n, t, s)
        for n, t, s in (("y", bytes_, x.shape), ("step", floats, ()), ("zero", bytes_, ()))
    ]
    node = make.make_node("DynamicQuantizeLinear", ["x"], ["y", "step", "zero"])
    graph = make.make_graph([node], "g", [make.make_tensor_value_info("x", floats, x.shape)], outputs)
    model = make.make_model(graph, opset_imports=[make.make_opsetid("", 13)], ir_version=8)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    largest = x.abs().amax(1, keepdim=True)
    y, step, zero = (np.asarray(v, np.float32) for v in session.run(None, {"x": (x / largest).numpy()}))
    return torch.from_numpy((y - zero) * step) * largest


@pytest.mark.parametrize("vision", ["int8", "int8-static"])
def test_vision_activations_are_rounded(vision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in ONNX Runtime's own operators: attention in int8, which our kernels have beside, is not part of a report."""
    monkeypatch.setenv(SWITCH, "off")
    source = SampleSource(DEMO)
    samples, asked = [source.sample(c) for c in conversations("calibration", 8)], conversations("test", 6)
    held_out = [source.sample(c) for c in asked]
    report = quantize_checkpoint(DEMO, tmp_path / "q", recipe("none", vision=vision), samples, held_out)
    with FloatCheckpoint.open(DEMO) as a, FloatCheckpoint.open(tmp_path / "q") as b:
        found = combined(compare(a, b, held_out, tmp_path).conversations)
        assert vision_rounding(a, 0) is None
        watch = vision_rounding(b, 1)
        assert watch is not None and watch("no point", torch.ones(1, 1)) is None
        for point, name in (("qkv", "attn.qkv"), ("fc2", "mlp.fc2")):
            layer = b.layer(f"visual.blocks.1.{name}")
            assert layer is not None
            x = torch.randn(5, layer.shape[1], generator=torch.Generator().manual_seed(0))
            pre = torch.ones(layer.shape[1])
            if vision == "int8-static" and point == "fc2":
                factors = b.factors(layer)
                assert factors is not None
                pre = torch.from_numpy(factors)
            got = watch(point, x)
            assert got is not None
            assert torch.allclose(got, rounded_by_hand(x * pre, layer.input_scale) / pre, rtol=1e-5, atol=1e-6)
    assert report.divergence is not None and found.tokens == report.divergence.tokens
    assert found.kl == pytest.approx(report.divergence.kl, rel=0.02)
    logits = []
    plain, quantized = ExportOptions(precision="fp32"), ExportOptions(decoder_precision="fp32")
    for folder, options in ((DEMO, plain), (tmp_path / "q", quantized)):
        export_bundle(folder, tmp_path / f"b-{len(logits)}", options)
        rows = conversation_logits(tmp_path / f"b-{len(logits)}", asked)  # of all words
        masks = [s.measured[~s.visual] for s in held_out]
        logits.append([(x[m], following[m]) for (x, following), m in zip(rows, masks, strict=True)])
    engine = divergence(logits[0], iter(logits[1]))
    assert engine.tokens == found.tokens
    assert engine.kl == pytest.approx(found.kl, rel=0.4)  # numbers on an edge are rounded the other way
    with FloatCheckpoint.open(DEMO) as a, FloatCheckpoint.open(tmp_path / "q") as b:
        plain, rounded, floats = (
            torch.cat(list(Tower(c, held_out).embeds(tmp_path / "scratch.npy", rounds)))
            for c, rounds in ((a, None), (b, functools.partial(vision_rounding, b)), (b, None))
        )
    with VisionLanguageModel.open(tmp_path / "b-1", "ort-cpu") as model:
        stage = VisionStage(model.engine.vision, model.config, model.bundle.image_processor)
        ours = [torch.tensor(stage.encode(item).embeds) for c in asked for item in collect_vision(c)]
    # A number on an edge that is rounded the other way moves others across theirs, so after some blocks the two are
    # like two draws of one noise: its size is what agrees.
    whole, emulated, weights_only = (float((t - plain).square().sum()) for t in (torch.cat(ours), rounded, floats))
    print(vision, engine.kl, found.kl, emulated / whole, weights_only / whole)
    assert emulated == pytest.approx(whole, rel=0.15)
    assert weights_only < 0.8 * whole


def test_down_proj_has_zero_points_per_token(tmp_path: Path) -> None:
    """The decoder's products over affine codes against float64, from what the graph feeds them."""
    source = SampleSource(DEMO)
    samples = [source.sample(c) for c in conversations("calibration", 8)]
    quantize_checkpoint(DEMO, tmp_path / "q", recipe("w8a8"), samples)
    export_bundle(tmp_path / "q", tmp_path / "b", ExportOptions(vision_precision="fp32"))
    graph = onnx.load(tmp_path / "b" / "decoder.onnx", load_external_data=False)
    readers: dict[str, list[Any]] = {}
    for node in graph.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    products = []
    for node in [n for n in graph.graph.node if n.op_type == "QuantizeLinear"]:
        (product,) = readers[node.output[0]]
        last = product
        while last.op_type != "Reshape":
            (last,) = (n for n in readers[last.output[0]] if n is not last)
        products.append((product.input[1].split(".weight.")[0], node.input[0], last.output[0]))
    assert [name for name, *_ in products] == [f"model.layers.{i}.mlp.down_proj" for i in range(4)]
    wanted = [name for _, *both in products for name in both]
    graph.graph.output.extend(onnx.ValueInfoProto(name=n) for n in wanted)
    onnx.save(graph, tmp_path / "b" / "watched.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "b" / "watched.onnx", providers=["CPUExecutionProvider"])
    found: dict[str, Any] = dict(
        zip(wanted, session.run(wanted, decoder_feed(source.sample(conversations("test", 1)[0]))))
    )
    with FloatCheckpoint.open(tmp_path / "q") as b:
        for name, x, y in products:
            rows, weight = found[x].astype(np.float64), b.read(f"{name}.weight").astype(np.float64)
            low, high = rows.min(1, keepdims=True).clip(max=0), rows.max(1, keepdims=True).clip(min=0)
            step = (high - low) / 255
            zero = np.rint(-low / step)
            expected = (np.clip(np.rint(rows / step) + zero, 0, 255) - zero) * step @ weight.T
            got = found[y].reshape(len(rows), -1)  # the last layer has the wanted row alone
            assert np.abs(got - expected).max() < 2e-3 * np.abs(expected).max()  # numbers on an edge
            assert np.abs(got - expected).mean() < 1e-5 * np.abs(expected).max()
            lost = rows @ weight.T - expected
            assert np.abs(lost).mean() > 20 * np.abs(got - expected).mean(), "or the test cannot tell"


def decoder_feed(sample: Sample) -> dict[str, np.ndarray]:
    """A prompt of words: pictures are random rows."""
    config = ModelConfig.from_folder(DEMO).text
    cos, sin = rotary_rows(sample.positions, config)
    length, slots = len(sample.ids), np.flatnonzero(sample.visual)
    shape = (1, config.num_key_value_heads, length, config.head_dim)
    cache = {
        f"past_key_values.{i}.{kind}": np.zeros(shape, np.float32)
        for i in range(config.num_hidden_layers)
        for kind in ("key", "value")
    }
    return {
        "input_ids": sample.ids[None],
        "image_embeds": np.random.default_rng(0).standard_normal((len(slots), config.hidden_size)).astype(np.float32),
        "image_slots": slots,
        "logits_rows": np.array([length - 1]),
        "rotary_cos": cos[None],
        "rotary_sin": sin[None],
        "seqlens_k": np.array([length - 1], np.int32),
        "total_sequence_length": np.array([length], np.int32),
        **cache,
    }
