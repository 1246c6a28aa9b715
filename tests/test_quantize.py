"""edgevl quantize: layer by layer, resumable, gated; what it writes is what it says, and better than rounding."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import random_model, save_checkpoint
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from edgevl.calibration import driver, layer_methods
from edgevl.calibration.dataset import Sample, SampleSource
from edgevl.calibration.driver import quantize_checkpoint
from edgevl.calibration.fidelity import DivergenceSum
from edgevl.calibration.recipes import RECIPES, recipe
from edgevl.calibration.w8a8 import rounding
from edgevl.runtime import cli
from edgevl.runtime.errors import CheckFailedError, CheckpointError, EngineError, InputError
from edgevl.tasks import TASKS

DEMO = Path(__file__).parents[1] / "demo" / "model"


def demo_samples(count: int, split: str = "calibration") -> list[Sample]:
    """Questions with their true answers, so that answers' tokens are calibrated too."""
    source = SampleSource(DEMO)
    cases = [TASKS[t].case(split, i) for i in range(count) for t in ("read_2_lines", "where", "receipt_items", "count")]
    return [source.sample([*c.messages, {"role": "assistant", "content": c.truth}]) for c in cases[:count]]


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    return demo_samples(24)


@pytest.fixture(scope="module")
def held_out() -> list[Sample]:
    return demo_samples(12, "test")


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for f in sorted(folder.glob("*.safetensors")) for k, v in load_file(f).items()}


def digest(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name != driver.REPORT}


def dequantize(t: dict[str, torch.Tensor], name: str, bits: int) -> np.ndarray:
    """W[k, n] = (q[k, n] - z[g_idx[k], n]) * s[g_idx[k], n], one number at a time from the words (version 1)."""
    qweight, qzeros = (t[f"{name}.{p}"].numpy().view(np.uint32) for p in ("qweight", "qzeros"))
    scales, g_idx = t[f"{name}.scales"].float().numpy(), t[f"{name}.g_idx"].numpy()
    per, mask = 32 // bits, 2**bits - 1
    columns, rows = len(qweight) * per, qweight.shape[1]
    out = np.empty((rows, columns), np.float32)
    for k in range(columns):
        q = (qweight[k // per] >> np.uint32(bits * (k % per))) & mask
        for n in range(rows):
            z = (int(qzeros[g_idx[k], n // per]) >> (bits * (n % per)) & mask) + 1
            out[n, k] = (int(q[n]) - z) * scales[g_idx[k], n]
    return out


def test_gptq_halves_the_divergence_of_rounding(tmp_path: Path, samples: list[Sample], held_out: list[Sample]) -> None:
    found = {}
    for name in ("rtn-int4", "gptq-int4", "gptq-int4-down8", "int8"):
        report = quantize_checkpoint(DEMO, tmp_path / name, RECIPES[name], samples, held_out)
        assert report.divergence is not None and report.divergence.tokens > 300
        found[name] = report.divergence.kl
        written = json.loads((tmp_path / name / driver.REPORT).read_text())
        assert written["divergence"]["kl"] == report.divergence.kl and len(written["layers"]) == 4 * 7
    assert found["gptq-int4"] < 0.6 * found["rtn-int4"], found
    assert found["gptq-int4-down8"] < found["gptq-int4"]
    assert found["int8"] < 0.05 * found["rtn-int4"]


def test_the_reported_divergence_is_transformers(tmp_path: Path, held_out: list[Sample]) -> None:
    """The written codes, dequantized by the textbook and put into transformers, give the reported KL."""
    from transformers import Qwen2VLForConditionalGeneration

    report = quantize_checkpoint(DEMO, tmp_path / "q", RECIPES["rtn-int4"], [], held_out[:4])
    tensors = tensors_of(tmp_path / "q")
    models = [Qwen2VLForConditionalGeneration.from_pretrained(DEMO, dtype=torch.float32).eval() for _ in range(2)]
    weights = dict(models[1].named_parameters())
    for name in [k.removesuffix(".qweight") for k in tensors if k.endswith(".qweight")]:
        ours = weights[name.replace("model.layers", "model.language_model.layers") + ".weight"]
        ours.data.copy_(torch.from_numpy(dequantize(tensors, name, 4)))
    total = DivergenceSum()
    for sample in held_out[:4]:
        pictures = [v for v in sample.vision]
        inputs = {
            "pixel_values": torch.from_numpy(np.concatenate([p.pixel_values for p in pictures])),
            "image_grid_thw": torch.tensor([[p.grid.t, p.grid.h, p.grid.w] for p in pictures]),
        }
        ids = torch.from_numpy(sample.ids)[None]
        positions = torch.from_numpy(sample.positions)[:, None]
        with torch.no_grad():
            logits = [m(input_ids=ids, position_ids=positions, use_cache=False, **inputs).logits[0] for m in models]
        total.add(*(x[torch.from_numpy(sample.measured)] for x in logits))
    expected = total.result()
    assert report.divergence is not None and report.divergence.tokens == expected.tokens
    assert report.divergence.kl == pytest.approx(expected.kl, rel=1e-3)
    assert report.divergence.top1 == pytest.approx(expected.top1, abs=2.5 / expected.tokens)


def test_what_is_written(tmp_path: Path, samples: list[Sample]) -> None:
    folder = tmp_path / "q"
    quantize_checkpoint(DEMO, folder, recipe("gptq-int4-down8", 64), samples[:4])
    original, tensors = tensors_of(DEMO), tensors_of(folder)
    for name, value in original.items():
        if name.startswith("model.layers.") and name.endswith("proj.weight"):
            layer = name.removesuffix(".weight")
            bits, (rows, columns) = 8 if "down" in name else 4, value.shape
            assert tensors[f"{layer}.qweight"].shape == (columns * bits // 32, rows)
            assert tensors[f"{layer}.qzeros"].shape == (columns // 64, rows * bits // 32)
            assert tensors[f"{layer}.scales"].dtype == torch.float16
            assert torch.equal(tensors[f"{layer}.g_idx"], torch.arange(columns) // 64)
            assert name not in tensors
        else:
            assert torch.equal(tensors[name], value) and tensors[name].dtype == value.dtype, name
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert config == json.loads((folder / "quantize_config.json").read_text())
    assert {k: config[k] for k in ("quant_method", "bits", "group_size", "sym", "desc_act")} == {
        **{"quant_method": "gptq", "bits": 4, "group_size": 64, "sym": True, "desc_act": False}
    }
    assert config["dynamic"] == {r"+:.*mlp\.down_proj.*": {"bits": 8}}
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    for file in set(index.values()):
        with safe_open(folder / file, "pt") as shard:
            assert set(shard.keys()) == {k for k, v in index.items() if v == file}
    assert (folder / "tokenizer.json").read_bytes() == (DEMO / "tokenizer.json").read_bytes()
    assert not [p for p in folder.iterdir() if p.suffix in (".npy", ".partial")]
    assert [p.name for p in tmp_path.iterdir()] == ["q"]


def test_export_takes_the_codes_as_they_are(tmp_path: Path, samples: list[Sample]) -> None:
    """From `edgevl quantize` to words: the command line, and a bundle that answers like the checkpoint."""
    quantize_checkpoint(DEMO, tmp_path / "q", RECIPES["gptq-int4-down8"], samples)
    assert cli.run(["export", str(tmp_path / "q"), "-o", str(tmp_path / "b"), "--no-verify"]) == 0
    from edgevl.runtime import VisionLanguageModel
    from edgevl.tasks import answer_cases

    cases = [TASKS[t].case("test", i) for t in ("read_1_line", "count", "where") for i in range(12)]
    with VisionLanguageModel.open(tmp_path / "b", "ort-cpu", threads=1) as model:
        assert model.bundle.precision == "vision int8, decoder int4"
        value = np.mean([a.score.value for a in answer_cases(model, cases)])
    assert value > 0.6


def test_w8a8(tmp_path: Path, samples: list[Sample], held_out: list[Sample]) -> None:
    """Smoothed, int8 per channel and per token: next to nothing lost, and the export takes it as it is."""
    report = quantize_checkpoint(DEMO, tmp_path / "q", RECIPES["w8a8"], samples, held_out)
    assert report.divergence is not None and report.divergence.kl < 0.01 and report.divergence.top1 > 0.97
    tensors, original = tensors_of(tmp_path / "q"), tensors_of(DEMO)
    layer = "model.layers.2.mlp.down_proj"
    codes, scale = tensors[f"{layer}.weight"], tensors[f"{layer}.weight_scale"]
    assert codes.dtype == torch.int8 and scale.shape == (codes.shape[0], 1) and int(codes.abs().max()) == 127
    # down_proj's columns were multiplied by what up_proj's rows were divided by
    before = original[f"{layer}.weight"].float()
    factors = (codes * scale / before).median(0).values
    assert factors.std() > 0.1
    up = "model.layers.2.mlp.up_proj"
    rows = tensors[f"{up}.weight"].float() * tensors[f"{up}.weight_scale"]
    norm = "model.layers.2.post_attention_layernorm.weight"
    assert tensors[norm].dtype == torch.float32  # changed by smoothing: not rounded to 8 bits of mantissa
    expected = original[f"{up}.weight"].float() * original[norm].float() / factors[:, None]
    assert torch.nn.functional.cosine_similarity((rows * tensors[norm]).ravel(), expected.ravel(), 0) > 0.999
    config = json.loads((tmp_path / "q" / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "compressed-tensors" and config["format"] == "int-quantized"
    assert not (tmp_path / "q" / "quantize_config.json").exists()
    assert cli.run(["export", str(tmp_path / "q"), "-o", str(tmp_path / "b"), "--no-verify"]) == 0
    from edgevl.runtime import VisionLanguageModel
    from edgevl.tasks import answer_cases

    cases = [TASKS[t].case("test", i) for t in ("read_1_line", "count", "where") for i in range(12)]
    with VisionLanguageModel.open(tmp_path / "b", "ort-cpu", threads=1) as model:
        assert model.bundle.precision == "vision int8, decoder int8"
        assert np.mean([a.score.value for a in answer_cases(model, cases)]) > 0.6


def test_rounding_is_the_kernels_arithmetic() -> None:
    x = torch.tensor([[1.0, -0.5, 0.003], [1000.0, 3.0, 0.0], [0.0, 0.0, 0.0]])
    watch = rounding({"o": None, "down": 2.0}, {"down": torch.tensor([1.0, 1.0, 1000.0])})
    rounded = watch("o", x)
    assert rounded is not None and watch("k", x) is None
    # rows divided by their largest reach from -0.5 to 1: 256 codes lie between, 85 of them below zero
    step = torch.tensor([[1.5 / 255], [1500 / 255], [0.0]])
    assert (rounded - x).abs().le(step * 0.5001 + 1e-6).all() and torch.equal(rounded[2], x[2])
    assert torch.allclose(rounded / step.clamp_min(1e-9), torch.round(rounded / step.clamp_min(1e-9)), atol=1e-3)
    assert rounded[0, 1] == -0.5 and rounded[1, 1] != 0 and rounded[1, 1] != 3.0, "each token has a step of its own"
    fixed = watch("down", x)
    assert fixed is not None and fixed.tolist() == [[0.0, 0.0, 4.0], [254.0, 4.0, 0.0], [0.0, 0.0, 0.0]]


def test_killed_runs_go_on_to_the_same_bytes(tmp_path: Path, samples: list[Sample]) -> None:
    quantize_checkpoint(DEMO, tmp_path / "whole", RECIPES["gptq-int4"], samples[:6], samples[6:8])
    code = (
        "import sys, os; sys.path[:0] = ['tests', '.']\n"
        "from test_quantize import *\n"
        "s = demo_samples(24)\n"
        "def progress(done, layers, what): print(done, what, flush=True)\n"
        f"torch.set_num_threads({torch.get_num_threads()})\n"
        "quantize_checkpoint(DEMO, sys.argv[1], RECIPES['gptq-int4'], s[:6], s[6:8], progress=progress)"
    )
    root = Path(__file__).parents[1]
    command = [sys.executable, "-c", code, str(tmp_path / "killed")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=root, env={**os.environ})
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("2 mlp"):
            break
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed").exists()
    with pytest.raises(InputError, match="was begun with other recipe"):
        quantize_checkpoint(DEMO, tmp_path / "killed", RECIPES["rtn-int4"], samples[:6], samples[6:8], resume=True)
    with pytest.raises(InputError, match="was begun with other samples"):
        quantize_checkpoint(DEMO, tmp_path / "killed", RECIPES["gptq-int4"], samples[:5], samples[6:8], resume=True)
    done: list[int] = []
    again = quantize_checkpoint(
        DEMO, tmp_path / "killed", RECIPES["gptq-int4"], samples[:6], samples[6:8],
        resume=True, progress=lambda layer, *_: done.append(layer),
    )  # fmt: skip
    assert min(done) == 2, "the first two layers were not done again"
    assert digest(tmp_path / "killed") == digest(tmp_path / "whole")
    assert len(again.layers) == 28


def test_the_gate(tmp_path: Path, samples: list[Sample], held_out: list[Sample]) -> None:
    with pytest.raises(
        CheckFailedError, match=r"KL to the original is .*, at most 1e-06 was asked; nothing was written"
    ):
        quantize_checkpoint(DEMO, tmp_path / "q", RECIPES["rtn-int4"], [], held_out[:3], max_kl=1e-6)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(InputError, match="needs held-out samples"):
        quantize_checkpoint(DEMO, tmp_path / "q", RECIPES["rtn-int4"], [], max_kl=1.0)


def test_untied_heads_and_several_pictures(tmp_path: Path) -> None:
    folder = save_checkpoint(
        random_model(tie_word_embeddings=False, hidden_size=128, intermediate_size=256), tmp_path / "c"
    )
    a, b = (
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (56, 84 + 28 * i, 3), dtype=np.uint8)) for i in (0, 1)
    )
    content = [{"type": "image", "image": a}, {"type": "video", "video": [b, b]}, {"type": "text", "text": "Compare."}]
    sample = SampleSource(folder).sample([{"role": "user", "content": content}])
    text = SampleSource(folder).sample([{"role": "user", "content": "Only words."}])
    report = quantize_checkpoint(folder, tmp_path / "q", recipe("gptq-int4", 32), [sample, text], [text, sample])
    assert report.divergence is not None and 0 < report.divergence.kl < 5
    assert "lm_head.weight" in tensors_of(tmp_path / "q")


def test_bad_input(tmp_path: Path, samples: list[Sample], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="recipe 'int3' is unknown; expected one of gptq-int4"):
        recipe("int3")
    with pytest.raises(InputError, match="group size 48 is not offered"):
        recipe("gptq-int4", 48)
    with pytest.raises(InputError, match="calibrates on samples, none were given"):
        quantize_checkpoint(DEMO, tmp_path / "q", RECIPES["gptq-int4"], [])
    (tmp_path / "there").mkdir()
    with pytest.raises(InputError, match="exists already"):
        quantize_checkpoint(DEMO, tmp_path / "there", RECIPES["rtn-int4"], [])
    with pytest.raises(InputError, match="no such folder"):
        quantize_checkpoint(DEMO, tmp_path / "no" / "q", RECIPES["rtn-int4"], [])
    odd = save_checkpoint(random_model(), tmp_path / "odd")  # 64 wide
    with pytest.raises(InputError, match="group size 128 does not divide hidden_size 64"):
        quantize_checkpoint(odd, tmp_path / "q", RECIPES["rtn-int4"], [])
    quantize_checkpoint(DEMO, tmp_path / "done", RECIPES["rtn-int4"], [])
    with pytest.raises(InputError, match="already quantized"):
        quantize_checkpoint(tmp_path / "done", tmp_path / "q", RECIPES["rtn-int4"], [])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["done", "odd", "there"]

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(layer_methods, "save_shard", full)
    with pytest.raises(CheckpointError, match="the disk is full; free some space, then go on with --resume"):
        quantize_checkpoint(DEMO, tmp_path / "q", RECIPES["rtn-int4"], [])


def test_activations_that_are_not_finite(tmp_path: Path, samples: list[Sample]) -> None:
    folder = tmp_path / "c"
    shutil.copytree(DEMO, folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.post_attention_layernorm.weight"] *= 3e38
    from safetensors.torch import save_file

    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises((EngineError, CheckpointError), match=r"layers\.1"):
        quantize_checkpoint(folder, tmp_path / "q", RECIPES["gptq-int4"], samples[:4])


def test_command_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for i in range(10):
        TASKS["where"].case("calibration", i).pictures[0].save(pictures / f"{i}.png")
    (pictures / "broken.png").write_bytes(b"no picture")
    arguments = ["quantize", str(DEMO), "-o", str(tmp_path / "q"), "--recipe", "gptq-int4"]
    assert cli.run([*arguments, "--images", str(pictures), "--samples", "8"]) == 0
    out, err = capfd.readouterr()
    assert "KL to the original" in out and "down_proj" in out and "broken.png" in err and "held out" in err
    assert cli.run(arguments) == 2
    assert "pass --images" in capfd.readouterr().err
    assert cli.run([*arguments[:-1], "nonsense"]) == 2
    status = cli.run(
        [*arguments[:3], str(tmp_path / "z"), *arguments[4:], "--images", str(pictures), "--max-kl", "1e-9"]
    )
    assert status == 1 and not (tmp_path / "z").exists()
    assert "nothing was written" in capfd.readouterr().err
