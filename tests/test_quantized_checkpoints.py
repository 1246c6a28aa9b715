"""Checkpoints that other tools quantized: codes reach the graph unchanged, and the graph computes with them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from quantized import (
    CASES,
    LINEAR,
    Recipe,
    Written,
    all_by,
    gptq_config,
    gptq_tensors,
    quantize,
    write,
)
from safetensors.torch import load_file, save_file
from test_export import _logits, cosine

from edgevl.export.exporter import ExportOptions, export_bundle
from edgevl.runtime.bundle import Bundle
from edgevl.runtime.checkpoint import Checkpoint, expected_shapes
from edgevl.runtime.config import ModelConfig
from edgevl.runtime.errors import CheckpointError, InputError

Q0 = "model.layers.0.self_attn.q_proj"


def stored_weights(bundle: Path) -> dict[str, np.ndarray]:
    """Module -> [N, K] as the decoder graph holds it, unpacked by the slow formula."""
    model = onnx.load(bundle / "decoder.onnx")
    arrays = {i.name: onnx.numpy_helper.to_array(i) for i in model.graph.initializer}
    producers = {node.output[0]: node for node in model.graph.node}
    found: dict[str, np.ndarray] = {}
    for node in model.graph.node:
        if node.op_type == "MatMulNBits":
            weight = _unpack_blocks(node, arrays, producers)
        elif node.op_type in ("DynamicQuantizeMatMul", "MatMulIntegerToFloat"):
            scale = arrays[node.input[2 if node.op_type == "DynamicQuantizeMatMul" else 3]]
            weight = arrays[node.input[1]].T.astype(np.float32) * scale[:, None]
        else:
            continue
        found[node.input[1].split(".weight.")[0]] = weight
    return found


def modules_of(key: str) -> list[str]:
    """model.layers.0.self_attn.q_proj+k_proj -> both names in full."""
    first, *others = key.split("+")
    return [first, *(f"{first.rsplit('.', 1)[0]}.{name}" for name in others)]


def _unpack_blocks(node: Any, arrays: dict[str, np.ndarray], producers: dict[str, Any]) -> np.ndarray:
    a = {x.name: x.i for x in node.attribute}
    packed, scales = arrays[node.input[1]], arrays[node.input[2]]
    n, count, size = a["N"], packed.shape[1], a["block_size"]
    bits, blob = a["bits"], packed.reshape(n, -1)
    codes = np.stack([blob & 15, blob >> 4], -1).reshape(n, -1) if bits == 4 else blob
    zeros = np.full((n, count), 2 ** (bits - 1))
    if len(node.input) > 3 and node.input[3]:
        z = arrays[node.input[3]]
        zeros = (np.stack([z & 15, z >> 4], -1).reshape(n, -1) if bits == 4 else z)[:, :count]
    out = np.empty((n, a["K"]), np.float32)
    for k in range(a["K"]):
        g = k // size
        out[:, k] = (codes[:, k].astype(np.float32) - zeros[:, g].astype(np.float32)) * scales[:, g]
    before = producers.get(node.input[0])
    if before is not None and before.op_type == "Gather" and before.input[1] in arrays:
        whole = np.empty_like(out)
        whole[:, arrays[before.input[1]]] = out
        return whole
    return out


@pytest.mark.parametrize("name", CASES)
def test_codes_reach_the_graph(name: str, tmp_path: Path) -> None:
    precision, arguments = CASES[name]
    written = write(tmp_path, **arguments)
    export_bundle(written.folder, tmp_path / "b", ExportOptions(vision_precision="fp32"))
    bundle = Bundle.open(tmp_path / "b", verify_hashes=True)
    assert bundle.precision == f"vision fp32, decoder {precision}"
    said = next(iter(arguments["config"].values()))
    assert bundle.options["source_quantization"]["method"] == said["quant_method"]
    seen = set()
    for key, weight in stored_weights(tmp_path / "b").items():
        modules = modules_of(key)
        if modules[0] in written.weights:
            expected = np.concatenate([written.weights[m] for m in modules])
            assert np.array_equal(weight, expected), key
            seen |= set(modules)
    assert seen == set(written.weights)
    export_bundle(written.plain, tmp_path / "reference", ExportOptions("fp32"))
    expected = _logits(tmp_path / "reference")[0]
    for prefill in (True, False):  # one coarse scale for all activations has its price
        assert cosine(_logits(tmp_path / "b", prefill)[0], expected) > (0.99 if "static" in name else 0.999)


def graph_nodes(bundle: Path) -> list[Any]:
    return list(onnx.load(bundle / "decoder.onnx", load_external_data=False).graph.node)


def test_layers_over_one_input_share_its_order(tmp_path: Path) -> None:
    written = write(tmp_path, **CASES["desc_act"][1])
    export_bundle(written.folder, tmp_path / "b", ExportOptions(vision_precision="fp32"))
    nodes = graph_nodes(tmp_path / "b")
    columns = [n for n in nodes if n.op_type == "Gather" and n.input[1].startswith("order.")]
    assert len(columns) == 2 * 4  # q/k/v, o, gate/up and down of each layer
    products = [n.input[1] for n in nodes if n.op_type == "MatMulNBits"]
    assert f"{Q0}+k_proj+v_proj.weight.int4b32" in products


def test_layers_with_unlike_orders_are_not_merged(tmp_path: Path) -> None:
    written = write(tmp_path, **CASES["desc_act"][1])
    other = Recipe(act_order=True)
    tensors = load_file(written.folder / "model.safetensors")
    plain = load_file(written.plain / "model.safetensors")
    name = "model.layers.0.self_attn.v_proj"
    layer = quantize(plain[f"{name}.weight"].numpy(), other, 12345)
    tensors |= {f"{name}.{k}": torch.from_numpy(np.ascontiguousarray(v)) for k, v in gptq_tensors(layer).items()}
    save_file(tensors, written.folder / "model.safetensors")
    export_bundle(written.folder, tmp_path / "b", ExportOptions(vision_precision="fp32"))
    found = stored_weights(tmp_path / "b")
    assert np.array_equal(found[name], layer.weight())
    assert np.array_equal(found[Q0], written.weights[Q0])
    assert f"{Q0.replace('0.self', '1.self')}+k_proj+v_proj" in found


@pytest.mark.parametrize(
    ("name", "merged"),
    [("gptq int4, 2B", True), ("some layers asymmetric", True), ("some layers plain", False)],
)
def test_merging(name: str, merged: bool, tmp_path: Path) -> None:
    written = write(tmp_path, **CASES[name][1])
    export_bundle(written.folder, tmp_path / "b", ExportOptions(vision_precision="fp32"))
    keys = [n.input[1] for n in graph_nodes(tmp_path / "b") if n.op_type == "MatMulNBits"]
    assert any(k.startswith("model.layers.1.self_attn.q_proj+k_proj+v_proj") for k in keys) == merged
    zeros = {n.input[1] for n in graph_nodes(tmp_path / "b") if n.op_type == "MatMulNBits" and len(n.input) > 3}
    zeros = {n.split(".weight")[0].rsplit(".", 1)[-1] for n in zeros if n.endswith("z")}
    assert zeros == ({"q_proj+k_proj+v_proj", "up_proj"} if "asymmetric" in name else set())


def test_layers_with_unlike_input_scales_are_not_merged(tmp_path: Path) -> None:
    """Observers of q, k and v may have seen different samples; codes and scales are theirs."""
    written = write(tmp_path, **CASES["static activations"][1])
    path = written.folder / "model.safetensors"
    tensors = load_file(path)
    tensors[Q0.replace("q_proj", "v_proj") + ".input_scale"] *= 2
    save_file(tensors, path)
    with Checkpoint.open(written.folder) as checkpoint:
        scales = [layer.input_scale for layer in checkpoint.layers.values()]
        assert scales.count(0.0625) == 13 and scales.count(0.125) == 1
    export_bundle(written.folder, tmp_path / "b", ExportOptions(vision_precision="fp32"))
    keys = [n.input[1].split(".weight")[0] for n in graph_nodes(tmp_path / "b") if n.op_type == "MatMulIntegerToFloat"]
    assert Q0 in keys and f"{Q0.replace('0.self', '1.self')}+k_proj+v_proj" in keys
    rounded = [n.input[1] for n in graph_nodes(tmp_path / "b") if n.op_type == "QuantizeLinear"]
    assert rounded.count("float32_0.125") == 1 and rounded.count("float32_0.0625") == 8


def test_old_autogptq(tmp_path: Path) -> None:
    """The config in quantize_config.json, and biases of zeros everywhere."""
    written = write(tmp_path, gptq_tensors, {}, all_by(Recipe(4, 128)))
    old = {k: v for k, v in gptq_config(4)["quantization_config"].items() if k != "quant_method"}
    (written.folder / "quantize_config.json").write_text(json.dumps(old))
    path = written.folder / "model.safetensors"
    tensors = load_file(path)
    bias = {f"{m}.bias": torch.zeros(len(w), dtype=torch.float16) for m, w in written.weights.items()}
    save_file({**bias, **tensors}, path)
    export_bundle(written.folder, tmp_path / "b")
    for key, weight in stored_weights(tmp_path / "b").items():
        if key in written.weights:
            assert np.array_equal(weight, written.weights[key])
    tensors["model.layers.1.mlp.up_proj.bias"] = torch.ones(256, dtype=torch.float16)
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match=r"up_proj.bias': the layer has no bias in Qwen2-VL, and this one is not"):
        Checkpoint.open(written.folder)


def test_sharded(int4: Written, tmp_path: Path) -> None:
    """A layer's tensors may lie in two files, as where a shard was full."""
    folder = Path(shutil.copytree(int4.folder, tmp_path / "c"))
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    parts: list[dict[str, torch.Tensor]] = [{}, {}]
    for name, tensor in tensors.items():
        parts[name.endswith(("qzeros", "scales"))][name] = tensor
    files = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    for file, part in zip(files, parts):
        save_file(part, folder / file)
    weight_map = {name: file for file, part in zip(files, parts) for name in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    export_bundle(folder, tmp_path / "a")
    export_bundle(int4.folder, tmp_path / "b")
    for name in ("decoder.onnx", "decoder.onnx.data"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@pytest.mark.parametrize(
    ("name", "extra"),
    [
        ("packed symmetric", {"weight_g_idx": torch.full((128,), -1, dtype=torch.int32)}),  # not set, early releases
        ("packed symmetric", {"weight_zero_point": torch.zeros((128, 4), dtype=torch.int8)}),
        ("int8 channels and activations", {"weight_zero_point": torch.zeros((128, 1), dtype=torch.int8)}),
    ],
)
def test_tensors_that_say_nothing(name: str, extra: dict[str, torch.Tensor], tmp_path: Path) -> None:
    written = write(tmp_path, **CASES[name][1], num_hidden_layers=1)
    export_bundle(written.folder, tmp_path / "a")
    tensors = load_file(written.folder / "model.safetensors")
    save_file({**tensors, **{f"{Q0}.{k}": t for k, t in extra.items()}}, written.folder / "model.safetensors")
    config = json.loads((written.folder / "config.json").read_text())
    config["compression_config"] = config.pop("quantization_config")  # as early releases call it
    (written.folder / "config.json").write_text(json.dumps(config))
    export_bundle(written.folder, tmp_path / "b")
    assert (tmp_path / "a" / "decoder.onnx.data").read_bytes() == (tmp_path / "b" / "decoder.onnx.data").read_bytes()


# ---------------------------------------------------------------------- options


@pytest.fixture(scope="module")
def int4(tmp_path_factory: pytest.TempPathFactory) -> Written:
    return write(tmp_path_factory.mktemp("int4"), **CASES["gptq int4, 2B"][1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"precision": "int8"},
            "'int8' was asked for, but the decoder of this gptq checkpoint is 'int4'",
        ),
        ({"precision": "hybrid"}, "'hybrid' was asked for"),
        ({"precision": "int4", "decoder_precision": "fp32"}, "'fp32' was asked for"),
        ({"decoder_precision": "int9"}, "decoder precision 'int9' is unknown"),
        ({"precision": "int9"}, "precision 'int9' is unknown"),
        ({"vision_precision": "int4"}, "vision precision 'int4' is unknown"),
    ],
)
def test_another_precision_is_refused(int4: Written, tmp_path: Path, options: dict, message: str) -> None:
    with pytest.raises(InputError, match=message) as raised:
        export_bundle(int4.folder, tmp_path / "b", ExportOptions(**options))
    assert "\n" not in str(raised.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "precision"),
    [
        ({}, "vision int8, decoder int4"),
        ({"precision": "int4"}, "vision int8, decoder int4"),
        ({"precision": "fp32", "decoder_precision": "int4"}, "vision fp32, decoder int4"),
        ({"vision_precision": "fp16"}, "vision fp16, decoder int4"),
        ({"head_bits": 4, "block_size": 32}, "vision int8, decoder int4"),
    ],
)
def test_precisions_that_fit(int4: Written, tmp_path: Path, options: dict, precision: str) -> None:
    seen: list[tuple[int, int]] = []
    export_bundle(
        int4.folder,
        tmp_path / "b",
        ExportOptions(**options),
        progress=lambda _, size, total: seen.append((size, total)),
    )
    bundle = Bundle.open(tmp_path / "b")
    assert bundle.precision == precision
    assert bundle.options["source_quantization"] == {
        "method": "gptq",
        "format": "gptq",
        "bits": [4],
        "group_size": [128],
        "layers": 14,
        "precision": "int4",
        "vision_precision": None,
        "static_activations": 0,
    }
    assert 0.85 < sum(size for size, _ in seen) / seen[-1][1] < 1.15


@pytest.mark.parametrize("name", ["v2 asymmetric", "int8 channels and activations", "desc_act", "whole columns"])
def test_expected_size(name: str, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    written = write(tmp_path, **CASES[name][1])
    export_bundle(written.folder, tmp_path / "b", progress=lambda _, size, total: seen.append((size, total)))
    assert 0.85 < sum(size for size, _ in seen) / seen[-1][1] < 1.15


def test_plain_checkpoint_records_no_quantization(int4: Written, tmp_path: Path) -> None:
    export_bundle(int4.plain, tmp_path / "b")
    options = Bundle.open(tmp_path / "b").options
    assert options["source_quantization"] is None and options["precision"] == "int4"


def test_names_and_shapes_are_those_of_the_plain_checkpoint(int4: Written) -> None:
    with Checkpoint.open(int4.folder) as ours, Checkpoint.open(int4.plain) as plain:
        assert ours.names() == plain.names()
        assert [ours.shape(n) for n in ours.names()] == [plain.shape(n) for n in plain.names()]
        assert ours.dtype(f"{Q0}.weight") == "INT4" and ours.dtype(f"{Q0}.bias") == "F16"
        assert ours.layer(Q0) is ours.layer(f"{Q0}.weight") is not None and plain.layer(Q0) is None
        with pytest.raises(CheckpointError, match=r"is stored quantized \(gptq\), expected plain numbers"):
            ours.read(f"{Q0}.weight")
        with pytest.raises(CheckpointError, match="is stored quantized"):
            ours.rows(f"{Q0}.weight", 0, 1)
        with pytest.raises(KeyError):
            ours.read(f"{Q0}.qweight")


def edgevl(*args: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "edgevl.runtime", *map(str, args)], capture_output=True, text=True)


def test_command_line(int4: Written, tmp_path: Path) -> None:
    listed = json.loads(edgevl("inspect", int4.folder, "--json").stdout)
    assert listed["quantization"]["bits"] == [4]
    assert {"name": f"{Q0}.weight", "dtype": "INT4", "shape": [128, 128]} in listed["tensors"]
    shown = edgevl("inspect", int4.folder).stdout
    assert "gptq (gptq), 14 layers of 4 bits, groups 128; decoder precision int4" in shown
    assert json.loads(edgevl("inspect", int4.plain, "--json").stdout)["quantization"] is None
    done = edgevl("export", int4.folder, "-o", tmp_path / "b", "--precision", "int8")
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1
    assert "decoder precision 'int8' was asked for" in done.stderr
    done = edgevl("export", int4.folder, "-o", tmp_path / "b")
    assert done.returncode == 0, done.stderr
    assert "no golden vectors: the checkpoint is quantized (gptq)" in done.stderr
    done = edgevl("verify", tmp_path / "b", "--against", int4.folder)
    assert done.returncode == 2 and "the checkpoint is quantized (gptq)" in done.stderr


def sparse_gptq(folder: Path, like: Path, layers: int) -> Path:
    """A wider GPTQ checkpoint without a single byte on the disk: every number is zero."""
    shutil.copytree(like, folder)
    config = json.loads((folder / "config.json").read_text())
    config["text_config"] |= {"hidden_size": 1024, "intermediate_size": 8192, "num_hidden_layers": layers}
    config["text_config"]["rope_parameters"]["mrope_section"] = [32, 48, 48]
    config["text_config"].pop("layer_types", None)
    config["vision_config"]["hidden_size"] = 1024
    (folder / "config.json").write_text(json.dumps(config))
    header, at = {}, 0
    for name, shape in expected_shapes(ModelConfig.from_folder(folder)).items():
        tensors = {name: ("F16", shape)}
        if LINEAR.fullmatch(name):
            n, k = shape
            module, groups = name.removesuffix(".weight"), k // 128
            tensors = {f"{module}.qweight": ("I32", (k // 8, n)), f"{module}.qzeros": ("I32", (groups, n // 8))}
            tensors[f"{module}.scales"] = ("F16", (groups, n))
        for stored, (dtype, size) in tensors.items():
            nbytes = int(np.prod(size)) * (4 if dtype == "I32" else 2)
            header[stored] = {"dtype": dtype, "shape": list(size), "data_offsets": [at, at + nbytes]}
            at += nbytes
    text = json.dumps(header).encode()
    path = folder / "model.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(path, path.stat().st_size + at)
    return folder


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_memory_does_not_grow_with_depth(int4: Written, tmp_path: Path) -> None:
    """Another four layers are 60 MB of codes, and 440 MB as float32."""
    code = (
        "import sys; from edgevl.export.exporter import *;"
        "export_bundle(sys.argv[1], sys.argv[2], ExportOptions());"
        "print(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])"
    )
    peaks = []
    for layers in (1, 5):
        source = sparse_gptq(tmp_path / f"c{layers}", int4.folder, layers)
        command = [sys.executable, "-c", code, str(source), str(tmp_path / f"b{layers}")]
        peaks.append(1024 * int(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    assert peaks[1] < peaks[0] + 16e6, peaks
