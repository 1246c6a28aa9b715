"""Rotations: Hadamard matrices by their definition, and checkpoints that compute in transformers what they did."""

from __future__ import annotations

import json
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import random_model, save_checkpoint
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import Qwen2VLForConditionalGeneration

from edgevl.calibration import layer_methods
from edgevl.calibration.comparison import compare
from edgevl.calibration.dataset import Sample, SampleSource
from edgevl.calibration.dequantized import FloatCheckpoint
from edgevl.calibration.driver import QuantizeReport, quantize_checkpoint
from edgevl.calibration.hadamard import hadamard_factors, paley, sylvester
from edgevl.calibration.recipes import recipe
from edgevl.calibration.rotation import RotatedCheckpoint, random_rotation
from edgevl.calibration.sensitivity import sensitivities, units_of
from edgevl.runtime import cli
from edgevl.runtime.checkpoint import Checkpoint
from edgevl.runtime.errors import CheckpointError, InputError

KINDS = ("r1", "r2", "r1+r2")


# ---------------------------------------------------------------------- Hadamard matrices


def squares(q: int) -> set[int]:
    return {i * i % q for i in range(1, q)}


def test_sylvester_is_its_formula() -> None:
    for order in (1, 2, 8, 64):
        expected = [[(-1) ** bin(i & j).count("1") for j in range(order)] for i in range(order)]
        assert sylvester(order).tolist() == expected
    with pytest.raises(ValueError, match="order 12"):
        sylvester(12)


@pytest.mark.parametrize("order", [4, 8, 12, 20, 24, 28, 36, 44, 60, 68, 76, 84, 108, 140])
def test_paley_is_orthogonal(order: int) -> None:
    matrix = paley(order)
    assert matrix is not None and set(np.unique(matrix)) == {-1.0, 1.0}
    assert np.array_equal(matrix @ matrix.T, order * np.eye(order))


@pytest.mark.parametrize("order", [12, 36])
def test_paley_is_the_construction(order: int) -> None:
    """One entry at a time: 12 from squares modulo 11 (first), 36 from those modulo 17 (second)."""
    matrix = paley(order)
    assert matrix is not None
    q = 11 if order == 12 else 17
    core = np.zeros((q + 1, q + 1))
    for i in range(q + 1):
        for j in range(q + 1):
            if i == 0 or j == 0:
                core[i, j] = 0 if i == j else -1 if j == 0 and q == 11 else 1
            elif i != j:
                core[i, j] = 1 if (j - i) % q in squares(q) else -1
    if q == 11:
        assert np.array_equal(matrix, core + np.eye(order))
        return
    for i in range(q + 1):
        for j in range(q + 1):
            block = [[1, -1], [-1, -1]] if i == j else core[i, j] * np.array([[1, 1], [1, -1]])
            assert np.array_equal(matrix[2 * i : 2 * i + 2, 2 * j : 2 * j + 2], block)


@pytest.mark.parametrize("order", [1, 2, 40, 64, 80, 256, 576, 896, 1536, 3584])
def test_factors_make_the_order(order: int) -> None:
    factors = hadamard_factors(order)
    assert factors is not None
    whole = reduce(np.kron, factors)
    assert whole.shape == (order, order) and np.array_equal(np.abs(whole), np.ones_like(whole))
    probe = np.arange(0, order, max(1, order // 64))  # the rows' products are whole numbers, so nothing is rounded
    assert np.array_equal(whole[probe] @ whole.T, order * np.eye(order)[probe])


def test_orders_without_a_construction() -> None:
    assert all(hadamard_factors(n) is None for n in (3, 6, 18, 46, 52, 92, 100, 116))
    assert [len(f) for f in hadamard_factors(8192) or ()] == [64, 64, 2]
    assert paley(10) is None and paley(92) is None


# ---------------------------------------------------------------------- rotations


@pytest.mark.parametrize("size", [32, 576, 46])
def test_a_rotation_is_its_matrix(size: int) -> None:
    turn = random_rotation(size, 5)
    whole = np.diag(turn.signs) @ reduce(np.kron, turn.factors)
    assert np.abs(whole @ whole.T - np.eye(size)).max() < 1e-5
    if size != 46:
        assert np.abs(np.abs(whole) - size**-0.5).max() < 1e-6, "every channel becomes a part of every other"
    x = np.random.default_rng(0).standard_normal((7, 2, size)).astype(np.float32)
    assert np.abs(turn(x) - x @ whole).max() < 1e-5
    weight = np.random.default_rng(1).standard_normal((5, 3 * size)).astype(np.float32)
    blocks = np.kron(np.eye(3), whole)
    assert np.abs(turn.turn_columns(weight) - weight @ blocks).max() < 1e-5
    assert np.abs(turn.turn_rows(weight.T) - blocks.T @ weight.T).max() < 1e-5
    assert np.abs(turn.turn_rows(weight[0]) - weight[0] @ blocks).max() < 1e-5
    again, other = random_rotation(size, 5), random_rotation(size, 6)
    assert np.array_equal(again(x), turn(x)) and np.abs(other(x) - turn(x)).max() > 0.1


# ---------------------------------------------------------------------- whole checkpoints


def checkpoint(folder: Path, dtype: torch.dtype = torch.float32, **text: Any) -> Path:
    model = random_model(seed=7, **text)
    torch.nn.Module.to(model, dtype)
    return save_checkpoint(model, folder)


def conversations(folder: Path, count: int = 2) -> list[Sample]:
    """Each with words, one picture or two, of different sizes."""
    source, out = SampleSource(folder), []
    for i in range(count):
        noise = np.random.default_rng(i)
        pictures = [Image.fromarray(noise.integers(0, 256, (56, 84 + 28 * k, 3), dtype=np.uint8)) for k in range(i % 3)]
        content = [
            *({"type": "image", "image": p} for p in pictures),
            {"type": "text", "text": f"Compare {i}, please."},
        ]
        out.append(source.sample([{"role": "user", "content": content}]))
    return out


@torch.inference_mode()
def logits(folder: Path, samples: list[Sample]) -> list[torch.Tensor]:
    """What transformers makes of a checkpoint, in float32."""
    model = Qwen2VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    out = []
    for sample in samples:
        pictures = {}
        if sample.vision:
            pictures = {
                "pixel_values": torch.from_numpy(np.concatenate([p.pixel_values for p in sample.vision])),
                "image_grid_thw": torch.tensor([[p.grid.t, p.grid.h, p.grid.w] for p in sample.vision]),
            }
        ids, positions = torch.from_numpy(sample.ids)[None], torch.from_numpy(sample.positions)[:, None]
        out.append(model(input_ids=ids, position_ids=positions, use_cache=False, **pictures).logits[0])
    return out


def rotated(source: Path, target: Path, kind: str, seed: int = 0) -> QuantizeReport:
    return quantize_checkpoint(source, target, recipe("none", rotate=kind, seed=seed), [])


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for f in sorted(folder.glob("*.safetensors")) for k, v in load_file(f).items()}


SHAPES: dict[str, dict[str, Any]] = {
    "hadamard, tied": {},
    "hadamard, untied": {"tie_word_embeddings": False},
    "QR": {"hidden_size": 92, "num_attention_heads": 2, "num_key_value_heads": 1},  # 92 and 46: no construction
}


@pytest.mark.parametrize("shape", SHAPES)
def test_rotated_logits_are_transformers(shape: str, tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "c", **SHAPES[shape])
    samples = conversations(source, 3)
    expected = logits(source, samples)
    original = tensors_of(source)
    for kind in KINDS:
        rotated(source, tmp_path / kind, kind)
        for found, wanted in zip(logits(tmp_path / kind, samples), expected):
            assert (found - wanted).abs().max() < 1e-4 * wanted.abs().max()
        ours = tensors_of(tmp_path / kind)
        turned = {n for n in original if not torch.equal(ours[n], original[n])}
        if kind == "r2":
            values = {"v_proj.weight", "v_proj.bias", "o_proj.weight"}
            assert {n.removeprefix(f"model.layers.{n[13]}.self_attn.") for n in turned} == values
        else:
            assert {"model.embed_tokens.weight", "visual.merger.mlp.2.weight", "visual.merger.mlp.2.bias"} <= turned
            assert torch.equal(ours["model.norm.weight"], torch.ones_like(ours["model.norm.weight"]))
            assert "visual.merger.mlp.0.weight" not in turned
            assert "model.layers.1.self_attn.q_proj.bias" not in turned
            weight = "model.layers.1.mlp.down_proj.weight"  # turned, so as long as it was
            assert torch.allclose(ours[weight].norm(dim=0), original[weight].norm(dim=0), rtol=1e-5)
        assert json.loads((tmp_path / kind / "config.json").read_text())["edgevl_rotation"] == {"kind": kind, "seed": 0}
        assert "quantization_config" not in json.loads((tmp_path / kind / "config.json").read_text())


def test_what_untying_costs(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "c")
    rotated(source, tmp_path / "r1", "r1")
    rotated(source, tmp_path / "r2", "r2")
    sizes = {}
    for name in ("c", "r1", "r2"):
        with Checkpoint.open(tmp_path / name) as opened:
            sizes[name] = sum(opened.nbytes(n) for n in opened.names()), opened.config.text.tie_word_embeddings
    table = 512 * 64 * 4
    assert sizes["c"][1] and sizes["r2"] == sizes["c"] and sizes["r1"] == (sizes["c"][0] + table, False)


def test_equal_final_norms_keep_one_table(tmp_path: Path) -> None:
    model = random_model(seed=7)
    model.model.language_model.norm.weight.data.fill_(1.5)
    source = save_checkpoint(model, tmp_path / "c")
    rotated(source, tmp_path / "r", "r1")
    with Checkpoint.open(tmp_path / "r") as opened:
        assert opened.config.text.tie_word_embeddings and "lm_head.weight" not in opened.names()
        assert (opened.read("model.norm.weight") == 1.5).all()
    samples = conversations(source)
    for found, wanted in zip(logits(tmp_path / "r", samples), logits(source, samples)):
        assert (found - wanted).abs().max() < 1e-4 * wanted.abs().max()


def test_bfloat16_becomes_float16(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "c", torch.bfloat16)
    rotated(source, tmp_path / "r", "r1+r2")
    before, after = tensors_of(source), tensors_of(tmp_path / "r")
    assert after["model.layers.0.mlp.up_proj.weight"].dtype == after["lm_head.weight"].dtype == torch.float16
    for name in ("visual.patch_embed.proj.weight", "model.layers.0.self_attn.q_proj.bias"):
        assert after[name].dtype == torch.bfloat16
    samples = conversations(source)
    for found, wanted in zip(logits(tmp_path / "r", samples), logits(source, samples)):
        assert (found - wanted).abs().max() < 3e-3 * wanted.abs().max()
    before["model.embed_tokens.weight"][3] = 3e5
    save_file(before, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"'model.embed_tokens.weight' holds .* when rotated, more than float16"):
        rotated(source, tmp_path / "loud", "r1")
    assert not (tmp_path / "loud").exists()


def test_rows_are_the_whole(tmp_path: Path) -> None:
    with Checkpoint.open(checkpoint(tmp_path / "c")) as opened:
        turned = RotatedCheckpoint(opened, "r1+r2", 3)
        for name in turned.names():
            whole = turned.read(name)
            assert np.array_equal(turned.rows(name, 1, 3), whole[1:3].reshape(2, -1)), name
        with pytest.raises(ValueError, match="rotation 'r3'"):
            RotatedCheckpoint(opened, "r3")


# ---------------------------------------------------------------------- with the recipes


def outlier_checkpoint(folder: Path) -> Path:
    """Some channels of the residual stream are read with weights 40 times the others', behind norms that make them
    loud: what 4 bits in groups cannot hold, and one step per token neither."""
    model = random_model(seed=7, hidden_size=128, intermediate_size=256)
    for layer in model.model.language_model.layers:
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            norm.weight.data[[3, 60]] *= 40
    return save_checkpoint(model, folder)


@pytest.fixture(scope="module")
def outliers(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Sample]]:
    folder = outlier_checkpoint(tmp_path_factory.mktemp("outliers") / "c")
    return folder, conversations(folder, 9)


@pytest.mark.parametrize(("name", "most"), [("rtn-int4", 0.9), ("gptq-int4", 2.0), ("w8a8", 1.0), ("w8a8-static", 1.5)])
def test_recipes_gain_from_rotation(
    name: str, most: float, outliers: tuple[Path, list[Sample]], tmp_path: Path
) -> None:
    """Rounding gets better (GPTQ copes with such channels by itself), and the files give the divergence from the
    original that was reported."""
    source, samples = outliers
    found = {}
    for kind in ("none", "r1+r2"):
        chosen = recipe(name, None if "w8a8" in name else 32, rotate=kind)
        report = quantize_checkpoint(source, tmp_path / kind, chosen, samples[3:], samples[:3])
        assert report.divergence is not None
        with FloatCheckpoint.open(source) as a, FloatCheckpoint.open(tmp_path / kind) as b:
            result = compare(a, b, samples[:3], tmp_path)
            tokens = sum(c.tokens for c in result.conversations)
            kl = sum(c.kl * c.tokens for c in result.conversations) / tokens
            assert kl == pytest.approx(report.divergence.kl, rel=1e-3, abs=1e-6)
            if name in ("rtn-int4", "gptq-int4"):
                assert not result.folded and all(r.error is not None and 0 < r.error < 0.3 for r in result.layers)
                units = units_of(b, "group")[:2]
                alone = sensitivities(a, b, samples[:2], units, tmp_path)
                assert all(0 < s.kl < 2 * report.divergence.kl for s in alone)
            assert kind == "none" or max(result.hidden_errors) < 0.8
        found[kind] = report.divergence.kl
    assert found["r1+r2"] < most * found["none"], found


def test_int8_vision_beside_it(outliers: tuple[Path, list[Sample]], tmp_path: Path) -> None:
    source, samples = outliers
    kls = []
    for kind in ("none", "r1+r2"):
        report = quantize_checkpoint(
            source, tmp_path / kind, recipe("none", vision="int8", rotate=kind), samples[3:], samples[:3]
        )
        assert report.divergence is not None
        kls.append(report.divergence.kl)
    assert 0 < kls[1] < 3 * kls[0]
    assert tensors_of(tmp_path / "r1+r2")["visual.merger.mlp.2.weight"].dtype == torch.int8


def test_seeds_and_resuming(
    outliers: tuple[Path, list[Sample]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, samples = outliers
    chosen = recipe("gptq-int4", 32, rotate="r1+r2", seed=4)
    quantize_checkpoint(source, tmp_path / "whole", chosen, samples[3:], samples[:1])
    real, calls = layer_methods.save_shard, []

    def stop(path: Path, tensors: dict[str, torch.Tensor]) -> None:
        calls.append(path)
        if len(calls) == 2:
            raise KeyboardInterrupt
        real(path, tensors)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(layer_methods, "save_shard", stop)
        quantize_checkpoint(source, tmp_path / "again", chosen, samples[3:], samples[:1])
    with pytest.raises(InputError, match="was begun with other recipe"):
        other = recipe("gptq-int4", 32, rotate="r1+r2", seed=5)
        quantize_checkpoint(source, tmp_path / "again", other, samples[3:], samples[:1], resume=True)
    quantize_checkpoint(source, tmp_path / "again", chosen, samples[3:], samples[:1], resume=True)
    for path in (tmp_path / "whole").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()
    rotated(source, tmp_path / "a", "r1", 4)
    rotated(source, tmp_path / "b", "r1", 5)
    name = "model.layers.0.mlp.down_proj.weight"
    assert not torch.equal(tensors_of(tmp_path / "a")[name], tensors_of(tmp_path / "b")[name])


# ---------------------------------------------------------------------- guards, and the way to a bundle


def test_the_command_and_what_follows(outliers: tuple[Path, list[Sample]], tmp_path: Path, capfd: Any) -> None:
    """From a rotated, quantized checkpoint to a bundle, and to a hybrid whose prefill is rotated alike."""
    source, _ = outliers
    q, plain, bundle = (str(tmp_path / n) for n in ("q", "plain", "b"))
    given = ["--rotate", "r1+r2", "--seed", "2"]
    assert cli.run(["quantize", str(source), "-o", q, "--recipe", "rtn-int4", "--group-size", "32", *given]) == 0
    assert cli.run(["quantize", str(source), "-o", plain, "--recipe", "none", *given]) == 0
    export = ["export", q, "-o", bundle, "--no-verify", "--overwrite"]
    assert cli.run(export) == 0
    assert cli.run([*export, "--prefill-from", plain]) == 0
    capfd.readouterr()
    assert cli.run([*export, "--prefill-from", str(source)]) == 2
    said = capfd.readouterr().err
    assert "not rotated, the quantized checkpoint rotated r1+r2 with seed 2" in said and "--recipe none" in said
    assert cli.run(["quantize", plain, "-o", str(tmp_path / "x"), "--recipe", "rtn-int4", "--rotate", "r1"]) == 2
    assert "already rotated (r1+r2)" in capfd.readouterr().err
    assert cli.run(["quantize", str(source), "-o", str(tmp_path / "x"), "--recipe", "none", "--rotate", "r4"]) == 2
    assert "rotation 'r4' is unknown; expected one of none, r1, r2, r1+r2" in capfd.readouterr().err
    # the rotated plain checkpoint may be quantized as it is, and stays known as rotated
    assert cli.run(["quantize", plain, "-o", str(tmp_path / "y"), "--recipe", "rtn-int4", "--group-size", "32"]) == 0
    for name in ("a.safetensors",):
        assert not (tmp_path / "y" / name).exists()
    codes = "model.layers.0.mlp.down_proj.qweight"
    assert torch.equal(tensors_of(tmp_path / "y")[codes], tensors_of(tmp_path / "q")[codes])
    with FloatCheckpoint.open(plain) as a, FloatCheckpoint.open(tmp_path / "y") as b:
        assert a.stored.rotation == b.stored.rotation == {"kind": "r1+r2", "seed": 2}
        compare(a, b, [], tmp_path)
    rotated(source, tmp_path / "r2", "r2")
    with (
        FloatCheckpoint.open(plain) as a,
        FloatCheckpoint.open(tmp_path / "r2") as b,
        pytest.raises(InputError, match="give the checkpoint that it was made from"),
    ):
        compare(a, b, [], tmp_path)


@pytest.mark.parametrize("value", ["r1", {"kind": "r3", "seed": 0}, {"kind": "r1"}, {"kind": "r1", "seed": -1}])
def test_a_rotation_that_cannot_be(value: Any, tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "c")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "edgevl_rotation": value}))
    with pytest.raises(CheckpointError, match=r"edgevl_rotation is .*, expected a kind"):
        Checkpoint.open(source)
