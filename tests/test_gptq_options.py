"""GPTQ's options at the command line, and hybrid bundles: what they change is exactly what they say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import random_model, save_checkpoint
from safetensors.torch import load_file

from edgevl.calibration.dataset import Sample
from edgevl.calibration.driver import quantize_checkpoint
from edgevl.calibration.gptq import HessianAccumulator, gptq_quantize
from edgevl.calibration.grids import dequantized
from edgevl.calibration.layers import DECODER_GROUPS, decoder_layer
from edgevl.calibration.recipes import RECIPES, recipe
from edgevl.calibration.weights import layer_weights
from edgevl.export.exporter import ExportOptions, export_bundle
from edgevl.runtime import cli
from edgevl.runtime.bundle import Bundle
from edgevl.runtime.checkpoint import Checkpoint
from edgevl.runtime.errors import InputError
from edgevl.runtime.generation import VisionLanguageModel
from edgevl.runtime.mrope import rotary_rows

GROUP = 32


def samples(count: int = 5, length: int = 60) -> list[Sample]:
    """Random tokens; the driver is told that a third of them are a picture's (there is none: `vision` is empty)."""
    rng = np.random.default_rng(0)
    positions = np.broadcast_to(np.arange(length), (3, length)).copy()
    visual = np.zeros(length, bool)
    visual[10:30] = True
    return [Sample(rng.integers(0, 400, length), positions, (), visual) for _ in range(count)]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(random_model(num_hidden_layers=1), tmp_path_factory.mktemp("options") / "plain")


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for f in sorted(folder.glob("*.safetensors")) for k, v in load_file(f).items()}


def dequantize(t: dict[str, torch.Tensor], name: str, version: int) -> np.ndarray:
    """W[k, n] = (q[k, n] - z[g, n]) * s[g, n] of 4 bits, one number at a time from the words."""
    qweight, qzeros = (t[f"{name}.{p}"].numpy().view(np.uint32) for p in ("qweight", "qzeros"))
    scales, g_idx = t[f"{name}.scales"].float().numpy(), t[f"{name}.g_idx"].numpy()
    columns, rows = len(qweight) * 8, qweight.shape[1]
    out = np.empty((rows, columns), np.float32)
    for k in range(columns):
        for n in range(rows):
            zero = int(qzeros[g_idx[k], n // 8]) >> 4 * (n % 8) & 15
            code = int(qweight[k // 8, n]) >> 4 * (k % 8) & 15
            out[n, k] = (code - zero - (1 if version == 1 else 0)) * scales[g_idx[k], n]
    return out


def test_asymmetric_is_written_as_version_2_and_export_reads_it(tmp_path: Path, plain: Path) -> None:
    quantize_checkpoint(plain, tmp_path / "q", recipe("gptq-int4", GROUP, asymmetric=True), samples())
    said = json.loads((tmp_path / "q" / "config.json").read_text())["quantization_config"]
    assert said["sym"] is False and said["checkpoint_format"] == "gptq_v2"
    tensors, before = tensors_of(tmp_path / "q"), tensors_of(plain)
    name = "model.layers.0.mlp.up_proj"
    zeros = tensors[f"{name}.qzeros"].numpy().view(np.uint32)
    found = {int(z) >> 4 * i & 15 for z in zeros.ravel() for i in range(8)}
    assert len(found) > 4 and found - {8}, "zero points differ"
    weight = dequantize(tensors, name, version=2)
    original = before[f"{name}.weight"].float().numpy()
    assert np.linalg.norm(weight - original) < 0.15 * np.linalg.norm(original)
    assert np.linalg.norm(dequantize(tensors, name, version=1) - original) > 0.25 * np.linalg.norm(original)
    # the same numbers in the bundle: MatMulNBits of an identity against the words read above
    export_bundle(tmp_path / "q", tmp_path / "b", ExportOptions())
    assert bundle_weight(tmp_path / "b", name) == pytest.approx(weight, abs=1e-6)


def bundle_weight(bundle: Path, name: str) -> np.ndarray:
    """A weight of the exported graph, from the initializers of its MatMulNBits node."""
    import onnx
    from onnx.numpy_helper import to_array

    graph = onnx.load(bundle / "decoder.onnx").graph
    data = {i.name: i for i in graph.initializer}
    node = next(n for n in graph.node if n.op_type == "MatMulNBits" and n.input[1].startswith(f"{name}.weight"))
    codes, scales, zeros = (to_array(data[i], str(bundle)) for i in node.input[1:4])
    low = np.stack([codes & 15, codes >> 4], -1).reshape(*codes.shape[:2], -1).astype(np.float32)
    z = np.stack([zeros & 15, zeros >> 4], -1).reshape(len(codes), -1)[:, : codes.shape[1]].astype(np.float32)
    return ((low - z[..., None]) * scales.reshape(codes.shape[:2])[..., None]).reshape(len(codes), -1)


@pytest.mark.parametrize("sequential, visual_weight", [(False, None), (True, None), (False, 0.25)])
def test_codes_are_gptqs_on_those_inputs(
    tmp_path: Path, plain: Path, sequential: bool, visual_weight: float | None
) -> None:
    """The oracle: Hessians from a pass through the layer, before anything is quantized or group by group."""
    chosen = recipe("gptq-int4", GROUP, true_sequential=sequential, visual_weight=visual_weight)
    given = samples()
    quantize_checkpoint(plain, tmp_path / "q", chosen, given)
    written = tensors_of(tmp_path / "q")
    with Checkpoint.open(plain) as checkpoint:
        weights = layer_weights(checkpoint, 0)
        table = torch.from_numpy(checkpoint.read("model.embed_tokens.weight"))
        config = checkpoint.config.text
    now = dict(weights)
    for point, names in DECODER_GROUPS.items():
        columns = weights[f"{names[0]}.weight"].shape[1]
        hessian = torch.zeros(columns, columns)
        for sample in given:
            cos, sin = (torch.from_numpy(r) for r in rotary_rows(sample.positions, config))

            seen: dict[str, torch.Tensor] = {}
            decoder_layer(table[sample.ids], now if sequential else weights, cos, sin, config, seen.__setitem__)
            for i, row in enumerate(seen[point]):
                # the first token always counts whole: it is the attention sink
                share = 1.0 if visual_weight is None or not sample.visual[i] or i == 0 else visual_weight
                hessian += share * torch.outer(row, row)
        for name in names:
            result = gptq_quantize(weights[f"{name}.weight"], hessian, bits=4, group_size=GROUP)
            expected = dequantized(result.weight)
            now[f"{name}.weight"] = expected
            got = dequantize(written, f"model.layers.0.{name}", 1)
            # sums in another order may move a code that lies half way, and the columns after it
            assert (np.abs(got - expected.numpy()) > 1e-6).mean() < 0.02, name
    config_said = json.loads((tmp_path / "q" / "config.json").read_text())["quantization_config"]
    assert config_said["true_sequential"] is sequential


def test_the_options_change_the_codes(tmp_path: Path, plain: Path) -> None:
    """So that the test above cannot pass with options that do nothing."""
    found = []
    variants: list[dict[str, Any]] = [{}, {"true_sequential": True}, {"visual_weight": 0.25}, {"visual_weight": 1.0}]
    for i, options in enumerate(variants):
        quantize_checkpoint(plain, tmp_path / str(i), recipe("gptq-int4", GROUP, **options), samples())
        found.append(tensors_of(tmp_path / str(i)))
    name = "model.layers.0.mlp.down_proj.qweight"
    assert not torch.equal(found[0][name], found[1][name]) and not torch.equal(found[0][name], found[2][name])
    assert torch.equal(found[0][name], found[3][name])
    first = "model.layers.0.self_attn.q_proj.qweight"  # nothing before it is quantized
    assert torch.equal(found[0][first], found[1][first]) and not torch.equal(found[0][first], found[2][first])


def test_bad_options(tmp_path: Path, plain: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for options, match in [
        (
            ["int8", "--true-sequential"],
            "recipe 'int8' does not use GPTQ; --true-sequential and --visual-weight are for",
        ),
        (["rtn-int4", "--visual-weight", "0.5"], "does not use GPTQ"),
        (["w8a8", "--asymmetric"], "recipe 'w8a8' has no zero points"),
        (["kv-int8", "--group-size", "32"], "recipe 'kv-int8' has no groups, got a group size of 32"),
        (["gptq-int4", "--visual-weight", "0"], "the weight of visual tokens is 0.0, expected more than 0"),
        (["gptq-int4", "--visual-weight", "nan"], "the weight of visual tokens is nan"),
        (["hybrid"], "no checkpoint format holds together; quantize with gptq-int4, then `edgevl export QCHECKPOINT"),
    ]:
        assert cli.run(["quantize", str(plain), "-o", str(tmp_path / "q"), "--recipe", *options]) == 2
        err = capfd.readouterr().err
        assert match in err and err.count("\n") == 1, err
    with pytest.raises(ValueError, match="must be finite and not negative"):
        HessianAccumulator(2).add(torch.ones(1, 2), torch.tensor([-1.0]))


# ---------------------------------------------------------------------- hybrid


@pytest.mark.parametrize("kv_cache", ["float", "int8"])
def test_hybrid_of_a_quantized_checkpoint(tmp_path: Path, plain: Path, kv_cache: str) -> None:
    """Prefill is that of the original in int8, decode that of the codes; both over one cache."""
    quantize_checkpoint(plain, tmp_path / "q", recipe("gptq-int4", GROUP, kv_cache="int8"), samples())
    common = {"vision_precision": "fp32", "block_size": 32, "kv_cache": kv_cache}
    both = {**common, "prefill_from": str(plain)}
    export_bundle(tmp_path / "q", tmp_path / "hybrid", ExportOptions(**both))
    export_bundle(tmp_path / "q", tmp_path / "int4", ExportOptions(**common))
    bundle = Bundle.open(tmp_path / "hybrid")
    assert bundle.graphs["prefill"].precision == "int8" and bundle.graphs["decoder"].precision == "int4"
    assert bundle.precision == "vision fp32, decoder hybrid" + (", KV cache int8" if kv_cache == "int8" else "")
    assert bundle.options["prefill_from"] == plain.name
    ids = np.random.default_rng(5).integers(0, 400, 30)
    positions = np.broadcast_to(np.arange(30), (3, 30))
    found = {}
    export_bundle(
        plain, tmp_path / "int8", ExportOptions(decoder_precision="int8", vision_precision="fp32", block_size=32)
    )
    for name in ("hybrid", "int4", "int8"):
        with VisionLanguageModel.open(tmp_path / name, "ort-cpu", threads=1) as model:
            decoder = model.decoder()
            first = decoder.prefill(0, ids, positions)
            found[name] = np.stack([first, decoder.step(np.array([7]), np.array([30]))[0]])
    if kv_cache == "float":
        np.testing.assert_allclose(found["hybrid"][0], found["int8"][0], atol=1e-5)
    assert np.linalg.norm(found["hybrid"][1] - found["int4"][1]) < 0.5 * np.linalg.norm(found["int4"][1])
    assert not np.allclose(found["hybrid"][1], found["int8"][1], atol=1e-3), "decode is not the int8 graph"


def test_bad_originals(tmp_path: Path, plain: Path, capfd: pytest.CaptureFixture[str]) -> None:
    quantize_checkpoint(plain, tmp_path / "q", recipe("rtn-int4", GROUP), [])
    quantize_checkpoint(plain, tmp_path / "w8a8", RECIPES["w8a8"], samples())
    other = save_checkpoint(random_model(num_hidden_layers=1, rms_norm_eps=3e-5), tmp_path / "other")
    for source, original, match in [
        (
            plain,
            plain,
            "--prefill-from goes with a checkpoint of quantized weights (GPTQ, AWQ); a plain one becomes hybrid",
        ),
        (tmp_path / "w8a8", plain, "--prefill-from goes with a checkpoint of quantized weights"),
        (tmp_path / "q", tmp_path / "w8a8", "quantized (compressed-tensors); --prefill-from needs the unquantized"),
        (tmp_path / "q", other, "text rms_norm_eps is 3e-05, in the quantized checkpoint"),
    ]:
        arguments = ["export", str(source), "-o", str(tmp_path / "b"), "--prefill-from", str(original)]
        assert cli.run(arguments) == 2
        err = capfd.readouterr().err
        assert match in err and not (tmp_path / "b").exists(), err
    with pytest.raises(InputError, match="unknown"):
        recipe("hybrids")
