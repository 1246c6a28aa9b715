"""Decoders with our own products: the same bytes, the same answers as with ONNX Runtime's, in every format."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from checkpoints import DEMO
from conftest import MakePair
from native_oracle import usable_instructions, usable_library
from quantized import CASES, Recipe, all_by, gptq_config, gptq_tensors, write

from edgevl.export.dialect_native import has_native_decoder
from edgevl.export.exporter import ExportOptions, export_bundle
from edgevl.export.precision import decoder_precision
from edgevl.runtime import VisionLanguageModel, cli
from edgevl.runtime.bundle import MANIFEST, NATIVE_DECODER, NATIVE_ROLES, Bundle
from edgevl.runtime.decoding import Decoder
from edgevl.runtime.engine import open_engine
from edgevl.runtime.native_kernels import SWITCH, kernel_instructions, uses_native_kernels
from edgevl.runtime.ort_engine import OrtEngine

FORMATS: dict[str, dict[str, Any]] = {
    "int4": {"precision": "int4"},
    "zero points": {"precision": "int4", "symmetric": False},
    "groups of 32": {"precision": "int4", "block_size": 32},
    "groups of 64": {"precision": "int4", "block_size": 64, "symmetric": False},
    "4-bit head": {"precision": "int4", "head_bits": 4, "symmetric": False},
    "int8-weights": {"precision": "int8-weights"},
    "int8-weights, zero points": {"precision": "int8-weights", "symmetric": False},
    "w8a8": {"precision": "int8"},
    "hybrid": {"precision": "hybrid"},
}
PROMPTS = (1, 3, 8, 13) * 3  # tokens: ways of few rows and of many
STEPS = 2


def logits(folder: Path, switch: str, monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    """Of short prompts of their own, and of steps behind two at a time; float32 [rows, vocabulary]."""
    monkeypatch.setenv(SWITCH, switch)
    bundle = Bundle.open(folder)
    assert uses_native_kernels(bundle) == (switch != "off")
    engine = open_engine(bundle, "ort-cpu", threads=1)
    assert isinstance(engine, OrtEngine)
    assert engine.kernels == (kernel_instructions() if switch != "off" else "")
    rng, found = np.random.default_rng(3), []
    for tokens in PROMPTS:
        decoder = Decoder(engine, bundle.model, engine.new_cache(64, 2))
        for row in range(2):
            positions = np.broadcast_to(np.arange(tokens), (3, tokens))
            found.append(decoder.prefill(row, rng.integers(0, 90, tokens), positions)[None])
        found += [decoder.step(rng.integers(0, 90, 2), np.full(2, tokens + step)) for step in range(STEPS)]
    engine.close()
    return np.concatenate(found)


def check_alike(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums in another order are 1e-7 apart. Now and then that moves an activation over the border between two codes of
    127: then the rounding itself differs, in that layer and behind it, by no more than all rounding is off. Inputs of
    W8A8 layers always round otherwise: ONNX Runtime's 256 codes lie between their extremes, ours around 0."""
    usable_library()
    bundle = Bundle.open(folder)
    decoders = [role for role in NATIVE_ROLES.values() if role != NATIVE_ROLES["vision"] and role in bundle.graphs]
    w8a8 = any(node.op_type == "MatMulInt8" for role in decoders for node in graph(folder, role).node)
    instructions = usable_instructions(int8=w8a8)
    if not instructions:
        pytest.skip("this processor has no kernels for W8A8")
    theirs = logits(folder, "off", monkeypatch)
    for name in instructions:
        ours = logits(folder, name, monkeypatch)
        errors = np.linalg.norm(ours - theirs, axis=1) / np.linalg.norm(theirs, axis=1)
        assert np.median(errors) < (0.05 if w8a8 else 3e-6) and errors.max() < 0.06, name


@pytest.fixture(scope="module", params=FORMATS)
def bundle(request: pytest.FixtureRequest, make_pair: MakePair, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Padded blocks (widths of 128 and 320 in blocks of 128), odd numbers of zero points, both widths of codes."""
    pair = make_pair("fp32", hidden_size=128, intermediate_size=320)
    folder = tmp_path_factory.mktemp("native") / "bundle"
    export_bundle(pair.checkpoint, folder, ExportOptions(**FORMATS[request.param]))
    return folder


def test_logits_are_onnx_runtimes(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_alike(bundle, monkeypatch)


@pytest.mark.parametrize(
    "name",
    ["desc_act", "v2 asymmetric", "v1 asymmetric int8", "mixed bits", "some layers plain", "some layers asymmetric",
     "whole columns", "awq, 2B, ragged", "packed, activation order", "int8 channels and activations"],
)  # fmt: skip
def test_quantized_checkpoints(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Zero points, columns in the order of their groups, and what is left plain or in another format beside."""
    export_bundle(write(tmp_path, **CASES[name][1]).folder, tmp_path / "bundle")
    check_alike(tmp_path / "bundle", monkeypatch)


def test_layers_that_are_not_merged(tmp_path: Path) -> None:
    """Attention reads q, k and v where one product has them, or each for itself."""
    export_bundle(write(tmp_path, **CASES["some layers plain"][1]).folder, tmp_path / "bundle")
    nodes = [n for n in graph(tmp_path / "bundle", NATIVE_DECODER).node if n.op_type == "CausalAttention"]
    assert nodes and {bool(n.input[1]) for n in nodes} == {True, False}
    assert all(bool(n.input[1]) == bool(n.input[2]) for n in nodes)


def test_heads_that_our_attention_does_not_take(
    make_pair: MakePair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 24 numbers: ONNX Runtime attends, behind our products."""
    pair = make_pair("fp32", hidden_size=192, num_attention_heads=8)
    export_bundle(pair.checkpoint, tmp_path / "bundle", ExportOptions(precision="int4"))
    found = {n.op_type for n in graph(tmp_path / "bundle", NATIVE_DECODER).node}
    assert {"If", "MatMulNBits"} <= found and "CausalAttention" not in found
    check_alike(tmp_path / "bundle", monkeypatch)


@pytest.mark.parametrize("precision", ["int4", "int8-weights", "hybrid"])
def test_answers_are_onnx_runtimes(precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Greedy answers of the trained model, alone and together, to what it was trained to answer: elsewhere two tokens
    may nearly tie, and one moved code decides."""
    usable_library()
    export_bundle(DEMO, tmp_path / "demo", ExportOptions(precision=precision))
    pictures = [p for name in ("*line*", "card*", "strip*") for p in (DEMO.parent / "pictures").glob(f"{name}.png")]
    assert len(pictures) >= 6
    text = {"type": "text", "text": "Read the text."}
    questions = [
        [{"role": "user", "content": [{"type": "image", "image": str(path)}, text]}] for path in sorted(pictures)
    ]
    answers: dict[str, list[str]] = {}
    for switch in ("on", "off"):
        monkeypatch.setenv(SWITCH, switch)
        with VisionLanguageModel.open(tmp_path / "demo", "ort-cpu", threads=2) as model:
            options: dict[str, Any] = {"max_new_tokens": 16, "do_sample": False}
            answers[switch] = [model.generate(q, **options).text for q in questions]
            answers[switch] += [r.text for r in model.generate_batch(questions[:4], **options)]
    assert answers["on"] == answers["off"]
    assert len(set(answers["on"])) >= 6


# --------------------------------------------------------------------------------------- what is in a bundle


def graph(folder: Path, role: str) -> onnx.GraphProto:
    return onnx.load(str(folder / Bundle.open(folder).graphs[role].file), load_external_data=False).graph


def where(graph: onnx.GraphProto) -> dict[str, tuple[int, int]]:
    """(first byte, bytes) of the initializers that are in the data file."""
    found = {}
    for tensor in graph.initializer:
        entries = {e.key: e.value for e in tensor.external_data}
        if entries:
            assert entries["location"] == "decoder.onnx.data"
            found[tensor.name] = int(entries["offset"]), int(entries["length"])
    return found


def test_it_is_the_decoder_over_the_same_bytes(bundle: Path) -> None:
    """The same nodes, but for products and what they do by the way; nothing is stored for it but the graph itself."""
    native, decoder = graph(bundle, NATIVE_DECODER), graph(bundle, "decoder")
    assert {n.domain for n in native.node if n.op_type == "MatMulNBits"} == {"edgevl"}
    assert {n.domain for n in decoder.node if n.op_type == "MatMulNBits"} == {"com.microsoft"}
    layers = Bundle.open(bundle).model.text.num_hidden_layers
    more, fewer = (Counter(n.op_type for n in g.node) for g in (decoder, native))
    if Bundle.open(bundle).graphs["decoder"].precision == "int8":
        assert fewer["MatMulInt8"] == 5 * layers and not {"DynamicQuantizeMatMul", "ReduceMax", "Div"} & set(fewer)
    else:
        beside = {"QuickGelu": layers, "Mul": layers, "Add": 2 * layers}
        beside["RMSNormalization"] = 2 * layers + 1
        attention = {"If": layers, "Split": layers, "RotaryEmbedding": 2 * layers}
        for_steps = {"Equal": 1, "Shape": 3, "Gather": 3, "Cast": 1, "Range": 2, "Reshape": 3, "Mul": 2, "Add": 2}
        for_steps |= {"LessOrEqual": 1, "Where": 1}
        assert more - fewer == Counter(beside) + Counter(attention) + Counter(for_steps)
        assert fewer - more == {"CausalAttention": layers}
    others = [role for role in Bundle.open(bundle).graphs if "vision" not in role and role != NATIVE_DECODER]
    ends = [start + size for role in others for start, size in where(graph(bundle, role)).values()]
    assert where(native).items() <= where(decoder).items()
    assert (bundle / "decoder.onnx.data").stat().st_size == max(ends)
    assert (bundle / f"{NATIVE_DECODER}.onnx").stat().st_size < 200_000
    graphs = Bundle.open(bundle).graphs
    assert replace(graphs[NATIVE_DECODER], file=graphs["decoder"].file) == graphs["decoder"]


def test_inspect_shows_it(make_pair: MakePair, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_pair("int4").bundle
    assert cli.run(["inspect", str(folder)]) == 0
    shown = capsys.readouterr().out
    assert "decoder_native: decoder_native.onnx, int4" in shown
    sections = {part.split(":", 1)[0]: part.split("\n", 1)[1] for part in shown.split("\n\n") if "logits_rows" in part}
    assert sections["decoder_native"] == sections["decoder"]
    assert cli.run(["inspect", str(folder), "--json"]) == 0
    graphs = json.loads(capsys.readouterr().out)["graphs"]
    assert graphs["decoder_native"] == {**graphs["decoder"], "file": "decoder_native.onnx"}


def test_a_bundle_of_before_runs_as_before(make_pair: MakePair, tmp_path: Path) -> None:
    """Without the graph: neither opened nor spoken of."""
    pair = make_pair("fp32", hidden_size=128, intermediate_size=320)
    folder = tmp_path / "bundle"
    export_bundle(pair.checkpoint, folder, ExportOptions(precision="int4"))
    manifest = json.loads((folder / MANIFEST).read_text())
    file = manifest["graphs"].pop(NATIVE_DECODER)["file"]
    del manifest["files"][file]
    (folder / file).unlink()
    (folder / MANIFEST).write_text(json.dumps(manifest))
    bundle = Bundle.open(folder)
    bundle.check_hashes()
    assert not uses_native_kernels(bundle)
    notices: list[str] = []
    engine = open_engine(bundle, threads=1, notice=notices.append)
    assert isinstance(engine, OrtEngine) and engine.kernels == "" and "own kernels" not in notices[0]
    decoder = Decoder(engine, bundle.model, engine.new_cache(64))
    assert np.isfinite(decoder.prefill(0, np.arange(9), np.broadcast_to(np.arange(9), (3, 9)))).all()
    engine.close()


@pytest.mark.parametrize(
    "options",
    [
        ExportOptions(precision="fp32"),
        ExportOptions(precision="fp16"),
        ExportOptions(target="cuda", precision="int4"),
    ],
    ids=["fp32", "fp16", "cuda"],
)
def test_bundles_that_have_none(options: ExportOptions, make_pair: MakePair, tmp_path: Path) -> None:
    export_bundle(make_pair("fp32").checkpoint, tmp_path / "b", options)
    assert NATIVE_DECODER not in Bundle.open(tmp_path / "b").graphs
    assert not (tmp_path / "b" / f"{NATIVE_DECODER}.onnx").exists()


@pytest.mark.parametrize("group", [16, 48, 96])
def test_smaller_groups_have_none(group: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 16 and 48 in blocks of 16, which the kernels do not take; of 96 in blocks of 32."""
    recipe = {"tensors": gptq_tensors, "config": gptq_config(4, group_size=group), "recipe": all_by(Recipe(4, group))}
    export_bundle(write(tmp_path, **recipe, hidden_size=96, intermediate_size=192).folder, tmp_path / "bundle")
    if group == 96:
        check_alike(tmp_path / "bundle", monkeypatch)
        return
    assert NATIVE_DECODER not in Bundle.open(tmp_path / "bundle").graphs
    with VisionLanguageModel.open(tmp_path / "bundle", "ort-cpu", threads=1) as model:
        assert model.generate([{"role": "user", "content": "x"}], max_new_tokens=2).finish_reason


@pytest.mark.parametrize(
    ("precision", "kind", "block_size", "expected"),
    [
        ("int4", "gptq", 16, False),
        ("int4", "gptq", 32, True),
        ("int4", "awq", 128, True),
        ("int8-weights", "packed", 64, True),
        ("int8-weights", "packed", 16, False),
        ("int8", "int8", 128, True),  # its head alone
        ("int8", "int8", 16, True),
        ("fp32", "gptq", 128, False),
        ("fp16", "gptq", 128, False),
    ],
)
def test_who_has_one(precision: str, kind: str, block_size: int, expected: bool) -> None:
    layer = SimpleNamespace(kind=kind, block_size=block_size)
    checkpoint: Any = SimpleNamespace(layers={"model.layers.1.mlp.up_proj.weight": layer})
    checkpoint.layers["visual.blocks.0.attn.qkv.weight"] = SimpleNamespace(kind="int8", block_size=16)
    decoder = decoder_precision(precision)[0]
    assert has_native_decoder(decoder, checkpoint) == expected
    assert has_native_decoder(replace(decoder, cache="int8"), checkpoint) == expected
    checkpoint.layers["model.layers.0.mlp.up_proj.weight"] = SimpleNamespace(kind="gptq", block_size=16)
    assert not has_native_decoder(decoder, checkpoint)
