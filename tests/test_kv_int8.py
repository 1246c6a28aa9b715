"""The INT8 KV cache: what ONNX Runtime computes is the emulation in numpy, in every way in which a cache is used."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from checkpoints import random_model, save_checkpoint
from safetensors.torch import load_file, save_file

from edgevl.calibration.dataset import Sample, SampleSource
from edgevl.calibration.driver import quantize_checkpoint
from edgevl.calibration.kv_cache import CacheWatch, chained, rounded_cache
from edgevl.calibration.observers import KVScales
from edgevl.calibration.recipes import RECIPES, recipe
from edgevl.export.exporter import ExportOptions, export_bundle
from edgevl.export.verify import write_golden
from edgevl.runtime import cli
from edgevl.runtime.bundle import Bundle
from edgevl.runtime.checkpoint import Checkpoint
from edgevl.runtime.config import ModelConfig
from edgevl.runtime.errors import CheckpointError, EngineError, InputError
from edgevl.runtime.generation import VisionLanguageModel
from edgevl.runtime.golden import INT8_CACHE_FLOOR, replay
from edgevl.runtime.kv_cache import KVCache
from edgevl.runtime.mrope import rotary_rows

WORDS = ["What is the answer?", "Count to ten.", "Say yes or no, and why.", "Only words, no picture at all."]


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random checkpoint, untouched but for the scales of its cache."""
    folder = tmp_path_factory.mktemp("kv")
    source = save_checkpoint(random_model(), folder / "plain")
    samples = [Sample(*tokens(100, seed), (), np.zeros(100, bool)) for seed in range(8)]
    quantize_checkpoint(source, folder / "quantized", RECIPES["kv-int8"], samples, samples[:1])
    return folder / "quantized"


@pytest.fixture(scope="module")
def bundle(calibrated: Path) -> Path:
    out = calibrated.parent / "bundle"
    export_bundle(calibrated, out, ExportOptions(precision="fp32", kv_cache="int8"))
    return out


@pytest.fixture(scope="module")
def model(bundle: Path) -> Iterator[VisionLanguageModel]:
    with VisionLanguageModel.open(bundle, "ort-cpu", threads=1) as opened:
        yield opened


# ---------------------------------------------------------------------- the oracle


def emulate(folder: Path, ids: np.ndarray, positions: np.ndarray) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Logits [S, vocab] and codes by tensor [kv_heads, S, d], one query and one head at a time, in float64."""
    config = ModelConfig.from_folder(folder).text
    t = {k: v.double().numpy() for k, v in load_file(folder / "all.safetensors").items()}
    heads, shared, d = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    cos, sin = (rows.astype(np.float64)[:, None] for rows in rotary_rows(positions, config))
    codes = {}

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + config.rms_norm_eps) * t[f"{name}.weight"]

    def linear(x: np.ndarray, name: str) -> np.ndarray:
        return x @ t[f"{name}.weight"].T + t.get(f"{name}.bias", 0.0)

    def rotate(x: np.ndarray) -> np.ndarray:
        a, b = x[..., : d // 2], x[..., d // 2 :]
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)

    x = t["model.embed_tokens.weight"][ids]
    for layer in range(config.num_hidden_layers):
        name = f"model.layers.{layer}"
        h = norm(x, f"{name}.input_layernorm")
        q, k, v = (linear(h, f"{name}.self_attn.{p}_proj").reshape(len(ids), -1, d) for p in "qkv")
        q, k = rotate(q), rotate(k)
        for kind, value in (("key", k), ("value", v)):
            scale = t[f"{name}.self_attn.{kind[0]}_scale"][:, 0]  # [kv_heads, d]
            codes[f"past_key_values.{layer}.{kind}"] = np.clip(np.round(value / scale), -128, 127).transpose(1, 0, 2)
        k, v = (
            codes[f"past_key_values.{layer}.{kind}"] * t[f"{name}.self_attn.{kind[0]}_scale"]
            for kind in ("key", "value")
        )
        attended = np.zeros((len(ids), heads, d))
        for i in range(len(ids)):
            for head in range(heads):
                group = head // (heads // shared)
                scores = k[group, : i + 1] @ q[i, head] / np.sqrt(d)
                p = np.exp(scores - scores.max())
                attended[i, head] = p @ v[group, : i + 1] / p.sum()
        x = x + linear(attended.reshape(len(ids), -1), f"{name}.self_attn.o_proj")
        h = norm(x, f"{name}.post_attention_layernorm")
        gate = linear(h, f"{name}.mlp.gate_proj")
        x = x + linear(gate / (1 + np.exp(-gate)) * linear(h, f"{name}.mlp.up_proj"), f"{name}.mlp.down_proj")
    return norm(x, "model.norm") @ t["model.embed_tokens.weight"].T, codes


def tokens(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Ids and positions on which t, h and w differ."""
    ids = np.random.default_rng(seed).integers(0, 400, count)
    return ids, np.arange(count) * np.array([[1], [2], [3]]) + 1


@pytest.fixture(scope="module")
def oracle(calibrated: Path) -> Path:
    """The checkpoint with all its tensors in one file, for `emulate`."""
    folder = calibrated.parent / "oracle"
    folder.mkdir()
    for path in calibrated.glob("*.json"):
        shutil.copy(path, folder / path.name)
    tensors = {k: v for f in sorted(calibrated.glob("*.safetensors")) for k, v in load_file(f).items()}
    save_file({k.removeprefix("language_model."): v for k, v in tensors.items()}, folder / "all.safetensors")
    return folder


# ---------------------------------------------------------------------- arithmetic


@pytest.mark.parametrize("chunk", [50, 7, 1])
def test_codes_and_logits_are_numpys(oracle: Path, bundle: Path, chunk: int) -> None:
    """Prompts in chunks of any size, then single tokens: the prompt sees rounded keys and values as well."""
    ids, positions = tokens(29)
    expected, codes = emulate(oracle, ids, positions)
    with VisionLanguageModel.open(bundle, "ort-cpu", threads=1, prefill_chunk=chunk) as opened:
        decoder = opened.decoder()
        got = [decoder.prefill(0, ids[:23], positions[:, :23])]
        # `step` takes one position for t, h and w: here they differ, so single tokens are prompts of one token too
        got += [decoder.prefill(0, ids[i : i + 1], positions[:, i : i + 1]) for i in range(23, 29)]
        np.testing.assert_allclose(np.stack(got), expected[22:], atol=2e-3 * np.abs(expected).max())
        buffers = decoder.cache.view(0, 1).buffers
        for name, wanted in codes.items():
            assert buffers[name].dtype == np.int8
            difference = np.abs(buffers[name][0, :, :29] - wanted)
            # Codes at half-way values, and all that follows from them, may part by one.
            assert difference.max() <= 1 and (difference > 0).mean() < 0.01, name
            assert not buffers[name][0, :, 29:].any() and len(np.unique(wanted)) > 100


def test_the_measure_rounds_like_the_kernel() -> None:
    scales = KVScales(torch.tensor([[0.5, 0.25]]), torch.tensor([[1.0, 0.125]]))
    x = torch.tensor([[[100.0, 0.3]], [[-0.74, -100.0]], [[0.26, 0.124]]])
    watch = rounded_cache(scales)
    key, value = watch("k", x), watch("v", x)
    assert key is not None and value is not None and watch("qkv", x) is None
    assert key.tolist() == [[[63.5, 0.25]], [[-0.5, -32.0]], [[0.5, 0.0]]]
    assert value.tolist() == [[[100.0, 0.25]], [[-1.0, -16.0]], [[0.0, 0.125]]]
    double = chained(None, lambda point, x: 2 * x if point == "k" else None, watch)
    assert torch.equal(double("k", x), watch("k", 2 * x)) and torch.equal(double("v", x), value)  # type: ignore[arg-type]


@pytest.mark.parametrize("theta", [10.0, 1e6])
def test_no_position_leaves_the_range_of_the_keys(theta: float) -> None:
    """Against every position, one after the other: keys seen near the start reach these scales, and not more.

    With theta 1e6 the lowest frequencies hardly turn: there each channel keeps a scale of its own."""
    config = replace(
        ModelConfig.from_folder(Path(__file__).parents[1] / "demo" / "model").text,
        rope_theta=theta,
        max_position_embeddings=3001,
    )
    rng = np.random.default_rng(0)
    heads, d = config.num_key_value_heads, config.head_dim
    plain = torch.from_numpy(rng.normal(size=(9, heads, d)).astype(np.float32)) * torch.linspace(0.1, 5, d)

    def rows(positions: np.ndarray) -> list[torch.Tensor]:
        return [torch.from_numpy(r) for r in rotary_rows(np.broadcast_to(positions, (3, *positions.shape)), config)]

    def rotated(cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        a, b = plain.chunk(2, -1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

    watch = CacheWatch(config, "layer 0")
    with pytest.raises(ValueError, match="before `begin`"):
        watch("k", plain)
    cos, sin = rows(np.arange(20, 29))
    watch.begin(cos, sin)
    watch("k", rotated(cos[:, None], sin[:, None]))
    watch("v", plain)
    scales = watch.observer.scales()
    largest = torch.zeros(heads, d)
    for position in range(3001):
        largest = torch.maximum(largest, rotated(*(r[0] for r in rows(np.array([position])))).abs().amax(0))
    assert float((largest / scales.key).max()) <= 127.02
    # positions are whole numbers and may step over a fast pair's peak, by a little
    assert float((largest / scales.key).min()) >= 126
    length = torch.hypot(*plain.chunk(2, -1)).amax(0)
    own = scales.key[:, : d // 2] < length / 127 * 0.9
    assert bool(own.any()) == (theta == 1e6)
    assert torch.allclose(scales.value, plain.abs().amax(0) / 127)
    tensors = watch.tensors("x")
    assert {k: tuple(v.shape) for k, v in tensors.items()} == {"x.k_scale": (heads, 1, d), "x.v_scale": (heads, 1, d)}


# ---------------------------------------------------------------------- what a cache is used for


def test_rows_together_and_apart(model: VisionLanguageModel) -> None:
    """Rows of different lengths decode together as each alone."""
    prompts = [tokens(n, n) for n in (5, 19, 11)]
    together = model.decoder(batch=3)
    alone = []
    for row, (ids, positions) in enumerate(prompts):
        first = together.prefill(row, ids, positions)
        single = model.decoder()
        np.testing.assert_array_equal(first, single.prefill(0, ids, positions))
        alone.append([single.step(np.array([7 + s]), np.array([80 + s]))[0] for s in range(3)])
    for step in range(3):
        got = together.step(np.full(3, 7 + step), np.full(3, 80 + step))
        np.testing.assert_allclose(got, np.stack([a[step] for a in alone]), atol=1e-4)


def test_fork_rewind_and_move(model: VisionLanguageModel) -> None:
    ids, positions = tokens(17)
    decoder = model.decoder(batch=2)
    decoder.prefill(0, ids, positions)
    kept = decoder.cache.fork()

    def go_on(cache: KVCache, rows: int = 1) -> np.ndarray:
        decoder.cache = cache
        return np.stack([decoder.step(np.full(rows, t), np.full(rows, 60 + t)) for t in (3, 4, 5)])

    first = go_on(decoder.cache)
    cache = decoder.cache
    assert cache.lengths[0] == 20 and kept.lengths[0] == 17
    np.testing.assert_array_equal(go_on(kept), first)
    cache.rewind(0, 17)
    np.testing.assert_array_equal(go_on(cache), first)
    cache.rewind(0, 17)
    cache.move(0, 1)
    both = go_on(cache, rows=2)
    np.testing.assert_array_equal(both[:, 0], both[:, 1])
    np.testing.assert_allclose(both[:, :1], first, atol=1e-4)


def test_memory_is_a_quarter(calibrated: Path, model: VisionLanguageModel) -> None:
    floats = export_bundle(calibrated, calibrated.parent / "floats", ExportOptions(precision="fp32"))
    spec = Bundle.open(floats.bundle).graphs["decoder"].spec
    assert 4 * KVCache(model.engine.decoder.spec, 100).nbytes == KVCache(spec, 100).nbytes == 2 * 2 * 2 * 100 * 16 * 4
    assert not spec.quantized_cache and model.engine.decoder.spec.quantized_cache
    assert Bundle.open(floats.bundle).requires == {"onnxruntime": "1.23"}


@pytest.mark.parametrize("precision", ["fp16", "hybrid", "int4"])
def test_every_precision_takes_it(tmp_path: Path, calibrated: Path, precision: str) -> None:
    """The same prompt through both caches: next to nothing changes, and both graphs of a hybrid share the codes."""
    rows = []
    for kind in ("float", "int8"):
        options = ExportOptions(decoder_precision=precision, vision_precision="fp32", block_size=32, kv_cache=kind)
        export_bundle(calibrated, tmp_path / kind, options)
        with VisionLanguageModel.open(tmp_path / kind, "ort-cpu", threads=1) as opened:
            decoder = opened.decoder()
            ids, positions = tokens(21)
            decoder.prefill(0, ids, positions)
            rows.append(np.concatenate([decoder.step(np.array([t]), np.array([70 + t])) for t in range(4)]))
            assert ("KV cache int8" in opened.bundle.precision) == (kind == "int8")
            least = {"float": "1.23", "int8": "1.29" if precision == "fp16" else "1.27"}[kind]
            assert opened.bundle.requires == {"onnxruntime": least}
    a, b = rows
    assert np.abs(a - b).max() > 0 and (a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b) > 0.999


# ---------------------------------------------------------------------- verify, versions


def test_verify_holds_and_sees_wrong_scales(tmp_path: Path, calibrated: Path) -> None:
    """Golden vectors from transformers, which reads the checkpoint though its config speaks of a cache."""
    options = ExportOptions(precision="fp32", kv_cache="int8")
    export_bundle(calibrated, tmp_path / "b", options, finish=lambda f, b: write_golden(f, b, calibrated, steps=3))
    report = replay(Bundle.open(tmp_path / "b"), "ort-cpu", threads=1)
    assert report.passed
    decoded = [r for r in report.results if r.stage in ("prefill", "decode")]
    assert {r.threshold for r in decoded} == {INT8_CACHE_FLOOR} and all(r.value > 0.9995 for r in decoded)
    assert all(r.threshold == 0 for r in report.results if r.stage == "tokens"), "reported, no gate"
    spoiled = tmp_path / "spoiled"
    shutil.copytree(calibrated, spoiled)
    _edit(spoiled, lambda name, value: value / 4 if name.endswith("0.self_attn.k_scale") else value)
    export_bundle(spoiled, tmp_path / "bad", options, finish=lambda f, b: write_golden(f, b, calibrated, steps=3))
    drift = replay(Bundle.open(tmp_path / "bad"), "ort-cpu", threads=1).first_drift
    assert drift is not None and drift.stage == "prefill"


def test_an_old_onnxruntime_is_told(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert Bundle.open(bundle).requires == {"onnxruntime": "1.27"}
    monkeypatch.setattr(onnxruntime, "__version__", "1.26.0")
    with pytest.raises(EngineError, match=r"1\.26\.0 is too old for this bundle, it needs 1\.27"):
        VisionLanguageModel.open(bundle, "ort-cpu")


# ---------------------------------------------------------------------- checkpoints


def _edit(folder: Path, change: Any) -> None:
    """Put `change(name, tensor)` in the place of every tensor; None drops it."""
    weight_map = {}
    for path in sorted(folder.glob("*.safetensors")):
        changed = {k: change(k, v) for k, v in load_file(path).items()}
        kept = {k: v.contiguous() for k, v in changed.items() if v is not None}
        save_file(kept, path, {"format": "pt"})
        weight_map |= dict.fromkeys(kept, path.name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def _scheme(folder: Path, **fields: Any) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["kv_cache_scheme"].update(fields)
    path.write_text(json.dumps(config))


def test_what_is_written(calibrated: Path) -> None:
    """The names of compressed-tensors; the weights as they were."""
    said = json.loads((calibrated / "config.json").read_text())["quantization_config"]
    assert said["quant_method"] == "compressed-tensors" and said["config_groups"] == {}
    scheme = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False}
    assert scheme.items() <= said["kv_cache_scheme"].items()
    tensors = {k: v for f in calibrated.glob("*.safetensors") for k, v in load_file(f).items()}
    scale = tensors["model.layers.1.self_attn.k_scale"]
    assert scale.shape == (2, 1, 16) and scale.dtype == torch.float32
    assert torch.equal(scale[..., :4], scale[..., 8:12]), "both channels of a rotary pair that turns have one scale"
    plain = load_file(calibrated.parent / "plain" / "model.safetensors")
    with Checkpoint.open(calibrated) as ours, Checkpoint.open(calibrated.parent / "plain") as theirs:
        assert ours.quantization is None and ours.names() == theirs.names()
        assert all(np.array_equal(ours.read(n), theirs.read(n)) for n in theirs.names())
        np.testing.assert_array_equal(ours.cache_scale(1, "k"), scale[:, 0])
    assert len(tensors) == len(plain) + 4


def test_scales_of_other_tools(tmp_path: Path, calibrated: Path) -> None:
    """One number, or one per head, as llm-compressor and vLLM have them."""
    for number, shape in enumerate([(1,), (), (2, 1, 1)]):
        folder = tmp_path / str(number)
        shutil.copytree(calibrated, folder)
        given = torch.full(shape, 0.25, dtype=torch.bfloat16)
        if shape == (2, 1, 1):
            given[1] = 0.5
        _edit(folder, lambda k, v, given=given: given.clone() if k.endswith("_scale") else v)
        _scheme(folder, strategy="tensor")
        with Checkpoint.open(folder) as checkpoint:
            scale = checkpoint.cache_scale(0, "v")
        assert (
            scale.shape == (2, 16)
            and (scale[0] == 0.25).all()
            and (scale[1] == (0.5 if shape == (2, 1, 1) else 0.25)).all()
        )
        export_bundle(folder, tmp_path / f"b{number}", ExportOptions(precision="fp32", kv_cache="int8"))


@pytest.mark.parametrize(
    "name, group, method", [("rtn-int4", 32, "gptq"), ("gptq-int4", 32, "gptq"), ("w8a8", None, "compressed-tensors")]
)
def test_with_quantized_weights(tmp_path: Path, calibrated: Path, name: str, group: int | None, method: str) -> None:
    source = calibrated.parent / "plain"
    samples = [SampleSource(source).sample([{"role": "user", "content": text}]) for text in WORDS]
    quantize_checkpoint(source, tmp_path / "q", recipe(name, group, kv_cache="int8"), samples)
    said = json.loads((tmp_path / "q" / "config.json").read_text())["quantization_config"]
    assert said["quant_method"] == method and said["kv_cache_scheme"]["num_bits"] == 8
    export_bundle(tmp_path / "q", tmp_path / "b", ExportOptions(kv_cache="int8"))
    with VisionLanguageModel.open(tmp_path / "b", "ort-cpu", threads=1) as opened:
        assert len(opened.generate([{"role": "user", "content": "Hello"}], max_new_tokens=3).token_ids) > 0
    # and without: the scales lie there unused
    export_bundle(tmp_path / "q", tmp_path / "float", ExportOptions())
    assert not Bundle.open(tmp_path / "float").graphs["decoder"].spec.quantized_cache


def test_bad_scales(tmp_path: Path, calibrated: Path) -> None:
    def fails(match: str, change: Any = None, **scheme: Any) -> None:
        folder = tmp_path / "c"
        shutil.copytree(calibrated, folder)
        if change is not None:
            _edit(folder, change)
        if scheme:
            _scheme(folder, **scheme)
        with pytest.raises((CheckpointError, InputError), match=match):
            export_bundle(folder, tmp_path / "b", ExportOptions(precision="fp32", kv_cache="int8"))
        shutil.rmtree(folder)
        assert list(tmp_path.iterdir()) == []

    def replaced(name: str, value: torch.Tensor | None) -> Any:
        return lambda k, v: value if k.endswith(name) else v

    fails("needs scales of keys and values .* has none; make them with `edgevl quantize", replaced("_scale", None))
    fails(r"tensor 'model\.layers\.1\.self_attn\.v_scale' is missing", replaced("1.self_attn.v_scale", None))
    fails(r"v_scale' is F32 \[3\], expected a scale of one of 2 layers", replaced("v_scale", torch.ones(3)))
    fails(r"k_scale' holds 0; scales must be positive", replaced("0.self_attn.k_scale", torch.zeros(1)))
    fails(r"k_scale' holds|not finite|nan", replaced("0.self_attn.k_scale", torch.full((1,), torch.nan)))
    fails(r"kv_cache_scheme has \{'type': 'float'\}, an INT8 KV cache needs \{'type': 'int'\}", type="float")
    fails(r"kv_cache_scheme has \{'dynamic': True\}", dynamic=True)
    _ = calibrated


def test_bad_options(tmp_path: Path, calibrated: Path, capfd: pytest.CaptureFixture[str]) -> None:
    plain = str(calibrated.parent / "plain")
    arguments = ["export", plain, "-o", str(tmp_path / "b"), "--precision", "fp32", "--kv-cache"]
    assert cli.run([*arguments, "int8"]) == 2
    assert "edgevl quantize CHECKPOINT -o QCHECKPOINT --recipe R --kv-cache int8" in capfd.readouterr().err
    assert cli.run([*arguments, "int4"]) == 2
    assert "KV cache 'int4' is unknown; expected one of float, int8" in capfd.readouterr().err
    quantize = ["quantize", plain, "-o", str(tmp_path / "q"), "--recipe"]
    assert cli.run([*quantize, "rtn-int4", "--group-size", "32", "--kv-cache", "int8"]) == 2
    assert "recipe 'rtn-int4' calibrates on pictures; pass --images" in capfd.readouterr().err
    assert cli.run([*quantize, "kv-int8", "--kv-cache", "fp8"]) == 2
    assert "KV cache 'fp8' is unknown" in capfd.readouterr().err
    assert list(tmp_path.iterdir()) == []
