"""Quantized checkpoints that cannot be read: every guard is tripped, and the message says what to do."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from quantized import CASES, Written, compressed_config, write
from safetensors.torch import load_file, save_file

from edgevl.export.exporter import export_bundle
from edgevl.runtime.checkpoint import Checkpoint
from edgevl.runtime.errors import CheckpointError

Q0 = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def int4(tmp_path_factory: pytest.TempPathFactory) -> Written:
    return write(tmp_path_factory.mktemp("int4"), **CASES["gptq int4, 2B"][1])


def set_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] = {**config["quantization_config"], **changes}
    path.write_text(json.dumps(config))


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file({k: t.contiguous() for k, t in tensors.items()}, path)


def error(folder: Path) -> str:
    with pytest.raises(CheckpointError) as raised:
        Checkpoint.open(folder)
    assert "\n" not in str(raised.value)
    return str(raised.value)


@pytest.fixture
def broken(int4: Written, tmp_path: Path) -> Path:
    """A good checkpoint, to break."""
    return Path(shutil.copytree(int4.folder, tmp_path / "c"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quant_method": "bitsandbytes"}, "quant_method 'bitsandbytes' is not read; read are gptq"),
        ({"quant_method": "fp8"}, "quant_method 'fp8' is not read"),
        ({"quant_method": "modelopt"}, "quant_method 'modelopt' is not read"),
        ({"quant_method": None}, "quant_method None is not read"),
        ({"quant_method": "awq", "version": "gemv"}, "awq in the format 'gemv' is not read"),
        ({"checkpoint_format": "marlin"}, "gptq in the format 'marlin' is not read"),
        ({"is_marlin_format": True}, "gptq in the format 'marlin' is not read"),
        ({"pack_dtype": "int16"}, "pack_dtype 'int16' is not read"),
        ({"group_size": 0}, "group_size is 0, expected"),
        ({"group_size": True}, "group_size is True, expected"),
        ({"quant_method": "compressed-tensors", "format": "float-quantized"}, "'float-quantized' is not read"),
        ({"quant_method": "compressed-tensors", "format": "pack-quantized"}, "config_groups must give the weights"),
    ],
)
def test_methods_that_are_not_read(broken: Path, changes: dict[str, Any], message: str) -> None:
    set_config(broken, **changes)
    found = error(broken)
    assert message in found and "config.json: quantization_config: " in found
    assert any(remedy in found for remedy in ("export the unquantized checkpoint", "re-download"))


def test_config_that_is_no_object(broken: Path) -> None:
    path = broken / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": "gptq"}))
    assert "quantization_config: expected an object, got str" in error(broken)


def scheme(**changes: Any) -> dict[str, Any]:
    return {"config_groups": {"group_0": {"weights": {"num_bits": 8, "type": "int"}, **changes}}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"transform_config": {"config_groups": {}}}, "transform_config is not read"),
        ({"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config is not read"),
        (scheme(weights={"type": "float", "num_bits": 8}), "group_0 holds float weights"),
        (scheme(format="nvfp4-pack-quantized"), "as 'nvfp4-pack-quantized'"),
        (scheme(format="int-quantized"), "are neither 8-bit dynamic nor 8-bit static per tensor and symmetric"),
        *(
            (
                scheme(format="int-quantized", input_activations={"num_bits": 8, "dynamic": False, **inputs}),
                "are neither",
            )
            for inputs in (
                {},
                {"strategy": "channel"},
                {"strategy": "tensor", "symmetric": False},
                {"strategy": "tensor", "num_bits": 4},
                {"strategy": "tensor", "type": "float"},
            )
        ),
    ],
)
def test_compressed_tensors_that_are_not_read(broken: Path, changes: dict[str, Any], message: str) -> None:
    config = compressed_config("pack-quantized", 4)["quantization_config"]
    set_config(broken, **{**config, **changes})
    found = error(broken)
    assert message in found and "export the unquantized checkpoint" in found


def poison_scale(value: float) -> Callable[..., Any]:
    return lambda t: t.update({f"{Q0}.input_scale": torch.tensor([value])})


def drop(suffix: str) -> Callable[[dict[str, torch.Tensor]], Any]:
    return lambda t: t.pop(f"{Q0}.{suffix}")


def put(suffix: str, shape: tuple[int, ...], dtype: torch.dtype = torch.int32) -> Callable[..., Any]:
    return lambda t: t.update({f"{Q0}.{suffix}": torch.ones(shape, dtype=dtype)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop("scales"), "q_proj.scales' is missing, but 'model.layers.0.self_attn.q_proj."),
        (drop("qzeros"), "q_proj.qzeros' is missing"),
        (drop("qweight"), "has no codes beside it (qweight of model.layers.0.self_attn.q_proj)"),
        (
            put("qweight", (8, 128)),
            "qweight' is [8, 128], expected qweight [inputs × bits / 32, outputs]: 2 bits",
        ),
        (put("qweight", (12, 128)), "3 bits, read are 4 and 8"),
        (put("qweight", (16, 64)), "q_proj.qweight' is I32 [16, 64], expected I32 [16, 128] by config.json"),
        (put("qweight", (16,)), "0 bits, read are 4 and 8"),
        (put("qweight", (16, 128), torch.int64), "is I64 [16, 128], expected I32 [16, 128]"),
        (put("scales", (1, 64), torch.float16), "q_proj.scales' is F16 [1, 64], expected BF16 or F16 or F32 [1, 128]"),
        (put("scales", (128,), torch.float16), "q_proj.scales' is F16 [128], expected"),
        (put("scales", (1, 128), torch.int32), "q_proj.scales' is I32 [1, 128], expected BF16"),
        (put("qzeros", (2, 16)), "q_proj.qzeros' is I32 [2, 16], expected I32 [1, 16]"),
        (put("g_idx", (64,)), "q_proj.g_idx' is I32 [64], expected I32 or I64 [128]"),
        (put("weight", (128, 128), torch.float16), "are both there; remove the one"),
        (
            put("weight_scale", (128, 1), torch.float16),
            "unexpected tensor 'model.layers.0.self_attn.q_proj.weight_",
        ),
        (put("input_scale", (1,), torch.float32), "scales of activations are read beside int8 weights per channel"),
        (put("weight_packed", (128, 16)), "unexpected tensor 'model.layers.0.self_attn.q_proj.weight_packed'"),
        (
            lambda t: t.update({"lm_head.qweight": t[f"{Q0}.qweight"].clone()}),
            "lm_head is quantized; read are quantized",
        ),
        (
            lambda t: t.update({"visual.blocks.0.mlp.fc1.qweight": t[f"{Q0}.qweight"].clone()}),
            "visual.blocks.0.mlp.fc1 is quantized; read are",
        ),
        (
            lambda t: t.update({"model.layers.7.mlp.up_proj.qweight": t[f"{Q0}.qweight"].clone()}),
            "model.layers.7.mlp.up_proj is quantized; read are quantized linear layers of the decoder that config.json",
        ),
    ],
)
def test_broken_layers(broken: Path, change: Callable[..., Any], message: str) -> None:
    edit(broken, change)
    found = error(broken)
    assert message in found and "model.safetensors: " in found


def with_scales(count: int) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{Q0}.scales"] = torch.ones((count, 128), dtype=torch.float16)
        tensors[f"{Q0}.qzeros"] = torch.ones((count, 16), dtype=torch.int32)

    return change


def test_groups_that_do_not_fit(broken: Path) -> None:
    edit(broken, with_scales(3))
    assert "has 3 groups for 128 inputs, which the config's group_size 128 does not give" in error(broken)
    edit(broken, with_scales(16))
    assert "has groups of 8 inputs, read are multiples of 16" in error(broken)
    edit(broken, with_scales(2))  # another group size than the config's, as GPTQModel's `dynamic` may say
    with Checkpoint.open(broken) as checkpoint:
        layer = checkpoint.layer(Q0)
        assert layer is not None and layer.group_size == 64


def test_config_and_tensors_that_contradict(broken: Path, int4: Written) -> None:
    config = json.loads((broken / "config.json").read_text())
    set_config(broken, **compressed_config("pack-quantized", 4)["quantization_config"])
    assert "qweight' is not how compressed-tensors stores a layer" in error(broken)
    del config["quantization_config"]
    (broken / "config.json").write_text(json.dumps(config))
    assert "neither config.json nor quantize_config.json says how it is quantized" in error(broken)
    (broken / "config.json").write_text(json.dumps({**config, "compression_config": {"quant_method": "fp8"}}))
    assert "config.json: compression_config: quant_method 'fp8' is not read" in error(broken)


def test_activation_order_without_its_index(tmp_path: Path) -> None:
    written = write(tmp_path, **CASES["desc_act"][1])
    edit(written.folder, drop("g_idx"))
    assert "q_proj.g_idx' is missing" in error(written.folder)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("awq, 7B", put("qweight", (128, 32)), "[128, 32], expected qweight [inputs, outputs × bits / 32]: 8 bits"),
        ("awq, 7B", drop("qzeros"), "q_proj.qzeros' is missing"),
        ("awq, 7B", put("g_idx", (128,)), "unexpected tensor 'model.layers.0.self_attn.q_proj.g_idx'"),
        ("packed symmetric", put("weight_packed", (128, 12)), "[128, 12] for 128 inputs: 4 and 8 bits are read"),
        ("packed symmetric", drop("weight_scale"), "q_proj.weight_scale' is missing"),
        ("packed symmetric", drop("weight_shape"), "q_proj.weight_shape' is missing"),
        ("packed symmetric", put("weight_g_idx", (5,)), "weight_g_idx' is I32 [5], expected I32 or I64 [128]"),
        (
            "packed symmetric",
            put("weight_zero_point", (5, 4)),
            "weight_zero_point' is I32 [5, 4], expected I8 or I32",
        ),
        (
            "int8 channels and activations",
            put("weight_scale", (128, 2), torch.float16),
            "weight_scale' is F16 [128, 2], expected BF16 or F16 or F32 [128, 1]",
        ),
        (
            "int8 channels and activations",
            put("weight", (128, 64), torch.int8),
            "q_proj.weight' is I8 [128, 64], expected I8 [128, 128]",
        ),
        ("int8 channels and activations", put("input_scale", (1,), torch.float32), "says that they are rounded at run"),
        (
            "int8 channels and activations",
            put("input_zero_point", (1,), torch.int8),
            "says that they are rounded at run",
        ),
        (
            "int8 channels and activations",
            put("input_global_scale", (1,), torch.float32),
            "are read beside int8 weights",
        ),
        ("int8 channels and activations", put("pre_quant_scale", (64,), torch.float32), "scale' is F32 [64], expected"),
        (
            "packed symmetric",
            lambda t: t.update({"visual.blocks.0.mlp.fc1.weight_packed": torch.ones((128, 4), dtype=torch.int32)}),
            "visual.blocks.0.mlp.fc1 is quantized; read are",
        ),
        ("static activations", drop("input_scale"), "q_proj.input_scale' is missing"),
        ("static activations", put("input_scale", (2,), torch.float32), "input_scale' is F32 [2], expected"),
        ("static activations", put("input_scale", (1,), torch.int32), "input_scale' is I32 [1], expected"),
        ("static activations", poison_scale(-1.0), "input_scale' holds -1, expected a positive number"),
        ("static activations", poison_scale(0.0), "input_scale' holds 0, expected a positive number"),
        ("static activations", poison_scale(float("nan")), "input_scale' holds nan"),
        (
            "static activations",
            put("input_zero_point", (1,), torch.int8),
            "is not zero; static activations are read symm",
        ),
    ],
)
def test_broken_layers_of_other_methods(tmp_path: Path, name: str, change: Callable, message: str) -> None:
    written = write(tmp_path, **CASES[name][1], num_hidden_layers=1)
    edit(written.folder, change)
    assert message in error(written.folder)


def poison(suffix: str, at: tuple[int, ...], value: float) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{Q0}.{suffix}"][at] = value

    return change


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("desc_act", poison("scales", (2, 5), float("nan")), r"q_proj.scales' holds nan at \[2, 5\]"),
        ("desc_act", poison("scales", (2, 5), float("inf")), r"q_proj.scales' holds inf at \[2, 5\]"),
        ("desc_act", poison("scales", (2, 5), -0.5), r"q_proj.scales' holds -0.5 at \[2, 5\]; scales must not be neg"),
        ("desc_act", poison("g_idx", (3,), 77), r"q_proj.g_idx' cannot be used: g_idx does not put 32 columns into"),
        (
            "packed symmetric",
            poison("weight_shape", (1,), 127),
            r"weight_shape' holds \[128, 127\], expected",
        ),
        ("packed symmetric", poison("weight_scale", (5, 2), -1), r"q_proj.weight_scale' holds -1 at \[5, 2\]"),
        (
            "int8 channels and activations",
            put("weight_zero_point", (128, 1), torch.int8),
            "weight_zero_point' is not zero; W8A8 is read with symmetric weights only",
        ),
    ],
)
def test_values_that_cannot_be(tmp_path: Path, name: str, change: Callable, message: str) -> None:
    written = write(tmp_path, **CASES[name][1], num_hidden_layers=1)
    edit(written.folder, change)
    with pytest.raises(CheckpointError, match=message) as raised:
        export_bundle(written.folder, tmp_path / "b")
    assert "model.safetensors: " in str(raised.value)
    assert not (tmp_path / "b").exists()
