"""Prompts on OpenVINO: the graph that fills the cache says what the decoder says, and the engine uses it rightly.

The graph's oracle is the decoder itself with activations left in float32, both on ONNX Runtime: two writings of one
formula. OpenVINO's, which rounds activations and adds in bfloat16, is then held against it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from conftest import MakePair
from quantized import CASES
from test_quantized_checkpoints import write

from edgevl.export.dialect_openvino import is_offered
from edgevl.export.exporter import ExportOptions, export_bundle
from edgevl.export.precision import decoder_precision
from edgevl.runtime import VisionLanguageModel
from edgevl.runtime.bundle import OPENVINO_PREFILL, Bundle
from edgevl.runtime.decoding import Decoder
from edgevl.runtime.engine import Engine, engine_status, open_engine
from edgevl.runtime.kv_cache import KVCache
from edgevl.runtime.mrope import rotary_rows
from edgevl.runtime.ort_engine import OrtEngine, OrtGraph
from edgevl.runtime.trt_feeds import NO_IMAGE, appended_mask

openvino = pytest.importorskip("openvino")

from edgevl.runtime import openvino_engine  # noqa: E402  (needs openvino)
from edgevl.runtime.native_kernels import native_role  # noqa: E402
from edgevl.runtime.openvino_engine import OpenVinoPrefill  # noqa: E402

DEMO = Path(__file__).parent.parent / "demo" / "model"
TOKENS = 45
FORMATS: dict[str, dict[str, Any]] = {
    "int4": {"precision": "int4"},
    "zero points": {"precision": "int4", "symmetric": False},
    "groups of 32": {"precision": "int4", "block_size": 32},
    "4-bit head": {"precision": "int4", "head_bits": 4, "symmetric": False},
    "int8-weights": {"precision": "int8-weights", "symmetric": False},
    "w8a8": {"precision": "int8"},
    "hybrid": {"precision": "hybrid"},
}
"""Padded blocks (widths of 128 and 320 in blocks of 128), an odd number of zero points, both widths of codes."""


@pytest.fixture(scope="module", params=FORMATS)
def bundle(request: pytest.FixtureRequest, make_pair: MakePair, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pair = make_pair("fp32", hidden_size=128, intermediate_size=320)
    folder = tmp_path_factory.mktemp("prefill") / "bundle"
    export_bundle(pair.checkpoint, folder, ExportOptions(**FORMATS[request.param]))
    return folder


def unrounded(folder: Path, name: str) -> Path:
    """A graph of the bundle without rounding of activations, beside it: plain products with the same weights."""
    model = onnx.load(folder / name, load_external_data=False)
    nodes = list(model.graph.node)
    del model.graph.node[:]
    for number, node in enumerate(nodes):
        names = [f"plain_{number}_{i}" for i in range(3)]
        make, made = onnx.helper.make_node, [node]
        match node.op_type:
            case "MatMulNBits":
                next(a for a in node.attribute if a.name == "accuracy_level").i = 0
            case "QuantizeLinear":  # per row, to uint8: x / step + zero
                x, step, zero = node.input
                axes = onnx.numpy_helper.from_array(np.array([-1]), f"{names[0]}_axis")
                model.graph.initializer.append(axes)
                made = [
                    make("Cast", [zero], [names[0]], to=onnx.TensorProto.FLOAT),
                    make("Unsqueeze", [step, axes.name], [f"{names[1]}_step"]),
                    make("Unsqueeze", [names[0], axes.name], [f"{names[1]}_zero"]),
                    make("Div", [x, f"{names[1]}_step"], [names[1]]),
                    make("Add", [names[1], f"{names[1]}_zero"], list(node.output)),
                ]
            case "DynamicQuantizeMatMul" | "MatMulIntegerToFloat":
                scales = node.input[2 if node.op_type.startswith("Dynamic") else 3]
                made = [
                    make("Cast", [node.input[1]], [names[0]], to=onnx.TensorProto.FLOAT),
                    make("Mul", [names[0], scales], [names[1]]),
                    make("MatMul", [node.input[0], names[1]], list(node.output)),
                ]
                if not node.op_type.startswith("Dynamic"):  # codes are around 128
                    middle = onnx.numpy_helper.from_array(np.array(128, np.float32), f"{names[2]}_128")
                    model.graph.initializer.append(middle)
                    made.insert(0, make("Sub", [node.input[0], middle.name], [names[2]]))
                    made[-1].input[0] = names[2]
        model.graph.node.extend(made)
    onnx.save(model, folder / f"unrounded_{name}")
    return folder / f"unrounded_{name}"


def exact_decoder(folder: Path) -> OrtGraph:
    """What prompts go through on ONNX Runtime, without rounding of activations."""
    graphs = Bundle.open(folder).graphs
    entry = graphs.get("prefill", graphs["decoder"])
    return OrtGraph(unrounded(folder, entry.file), entry.spec, 1)


def prompt(folder: Path, tokens: int = TOKENS, images: int = 6) -> dict[str, np.ndarray]:
    """ids, positions and embeddings; pictures' tokens stand at 3 to 3 + images."""
    config, rng = Bundle.open(folder).model, np.random.default_rng(5)
    ids = rng.integers(0, 90, tokens)
    ids[3 : 3 + images] = config.tokens.image_token_id
    positions = np.stack([np.arange(tokens), np.arange(tokens) // 2, np.arange(tokens) // 3])
    embeds = rng.normal(0, 0.1, (images, config.text.hidden_size)).astype(np.float32)
    return {"ids": ids, "positions": positions, "embeds": embeds}


class OneGraph:
    """As an engine, a single graph for all."""

    def __init__(self, graph: Any, engine: Engine) -> None:
        self.prefill = self.decoder = graph
        self.limits, self.new_cache = engine.limits, engine.new_cache


def cached(cache: KVCache, row: int = 0) -> dict[str, np.ndarray]:
    return {name: b[row, :, : int(cache.lengths[row])].copy() for name, b in cache.view(0, row + 1).buffers.items()}


def error(got: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(got - expected) / np.linalg.norm(expected))


@pytest.fixture
def reference(bundle: Path) -> Iterator[tuple[np.ndarray, dict[str, np.ndarray]]]:
    """(logits, cache) of the whole prompt by the decoder with activations in float32."""
    engine = open_engine(Bundle.open(bundle), "ort-cpu", threads=1)
    exact: Any = OneGraph(exact_decoder(bundle), engine)
    decoder = Decoder(exact, Bundle.open(bundle).model, engine.new_cache(64))
    logits = decoder.prefill(0, **prompt(bundle))
    yield logits, cached(decoder.cache)
    engine.close()


def dtyped(array: np.ndarray) -> np.ndarray:
    return array.astype(np.int64 if array.dtype.kind == "i" else np.float32)


def test_the_graph_is_the_decoder(bundle: Path, reference: tuple[np.ndarray, dict[str, np.ndarray]]) -> None:
    opened = Bundle.open(bundle)
    entry = opened.graphs[OPENVINO_PREFILL]
    path = unrounded(bundle, entry.file)
    graph = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    text, given = opened.model.text, prompt(bundle)
    caches: dict[str, list[np.ndarray]] = {new: [] for _, new in entry.spec.cache}
    for start, stop in ((0, 7), (7, 30), (30, TOKENS)):  # within the picture, behind it, to the end
        cos, sin = rotary_rows(given["positions"][:, None, start:stop], text)
        rows = np.full(TOKENS, NO_IMAGE)
        rows[3:9] = np.arange(6)
        past = {
            name: np.concatenate(caches[new] or [np.zeros((1, text.num_key_value_heads, 0, text.head_dim))], 2)
            for name, new in entry.spec.cache
        }
        feeds = {
            "input_ids": given["ids"][None, start:stop],
            "image_embeds": given["embeds"],
            "image_rows": rows[None, start:stop],
            "rotary_cos": cos,
            "rotary_sin": sin,
            "attention_mask": appended_mask(np.array([start]), stop - start, start),
            **{t.name: past[t.name] for t in entry.spec.inputs if t.name in past},
        }
        for new, value in zip(caches, graph.run(list(caches), {k: dtyped(v) for k, v in feeds.items()})):
            caches[new].append(np.asarray(value))
    for past, new in entry.spec.cache:
        np.testing.assert_allclose(np.concatenate(caches[new], 2)[0], reference[1][past], atol=2e-5)


def test_it_shares_their_bytes(bundle: Path) -> None:
    """What only this graph has is in its own file: shapes and constants."""
    ends, stored = [], {}
    for role, entry in Bundle.open(bundle).graphs.items():
        if role != "vision":
            model = onnx.load(bundle / entry.file, load_external_data=False)
            where = [{e.key: e.value for e in t.external_data} for t in model.graph.initializer if t.external_data]
            stored[role] = {int(w["offset"]) for w in where}
            ends.append(max(int(w["offset"]) + int(w["length"]) for w in where))
    assert stored.pop(OPENVINO_PREFILL) <= set().union(*stored.values())
    assert (bundle / "decoder.onnx.data").stat().st_size == max(ends)
    assert (bundle / f"{OPENVINO_PREFILL}.onnx").stat().st_size < 200_000


@pytest.fixture(params=[False, True], ids=["without tiles", "with tiles"])
def tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """What the processor is taken to have; either runs on any."""
    monkeypatch.setattr(openvino_engine, "has_int8_tiles", lambda: request.param)
    return request.param


@pytest.mark.parametrize("chunk", [2048, 40, 33])
def test_prompts_on_openvino(
    bundle: Path, reference: tuple[np.ndarray, dict[str, np.ndarray]], chunk: int, tiles: bool
) -> None:
    """No further from the oracle than rounded activations and sums in bfloat16 explain; the end of a prompt in chunks
    is too short for OpenVINO, and its beginning is in the cache then. Hybrid's last token is of its int4 decoder."""
    opened = Bundle.open(bundle)
    engine = open_engine(opened, "openvino", threads=1)
    w8a8 = opened.graphs[OPENVINO_PREFILL].precision == "int8"
    assert isinstance(engine.prefill, OpenVinoPrefill) == (tiles or not w8a8)
    decoder = Decoder(engine, opened.model, engine.new_cache(64), chunk)
    logits = decoder.prefill(0, **prompt(bundle))
    found = cached(decoder.cache)
    engine.close()
    assert int(decoder.cache.lengths[0]) == TOKENS
    other = tiles and "prefill" in opened.graphs  # what is short, and the last token, go through another precision
    same = min(chunk, TOKENS - 1) if other else TOKENS
    for name, expected in reference[1].items():
        assert error(found[name][:, :same], expected[:, :same]) < 0.03, name
    assert other or error(logits, reference[0]) < 0.05


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "int4"
    export_bundle(DEMO, folder, ExportOptions(precision="int4"))
    return folder


class Counted:
    """A graph that remembers how many tokens it was given."""

    def __init__(self, graph: Any) -> None:
        self.graph, self.spec, self.tokens = graph, graph.spec, []

    def run(self, feeds: Any, cache: Any = None) -> Any:
        self.tokens.append(np.shape(feeds["input_ids"]))
        return self.graph.run(feeds, cache)


def test_what_goes_where(demo: Path) -> None:
    """Long prompts of one row go to OpenVINO but for their last token, whatever stands there; the rest to the decoder,
    with the decoder's own numbers."""
    engine = open_engine(Bundle.open(demo), "openvino", threads=1)
    assert isinstance(engine, OrtEngine)
    prefill = engine.prefill
    assert isinstance(prefill, OpenVinoPrefill)
    filling, stepping = prefill._graph, prefill._decoder
    prefill._graph, prefill._decoder = Counted(filling), Counted(stepping)  # type: ignore[assignment]
    seen, steps = prefill._graph.tokens, prefill._decoder.tokens  # type: ignore[attr-defined]
    config = Bundle.open(demo).model
    image = config.tokens.image_token_id
    ids = np.arange(40) % 90
    decoder = Decoder(engine, config, engine.new_cache(256))
    positions = np.broadcast_to(np.arange(40), (3, 40))
    decoder.prefill(0, ids, positions)
    assert (seen, steps) == ([(1, 39)], [(1, 1)])
    decoder.prefill(0, ids, positions + 40)  # a second turn, behind the first
    assert (seen, steps) == ([(1, 39)] * 2, [(1, 1)] * 2)
    decoder.prefill(0, ids[:31], positions[:, :31] + 80)
    assert (len(seen), steps[2:]) == (2, [(1, 31)])
    # a picture's token at the very end is the decoder's
    pictured = np.where(np.arange(40) > 36, image, ids)
    embeds = np.random.default_rng(0).normal(0, 0.1, (3, config.text.hidden_size)).astype(np.float32)
    logits = {}
    for name in ("openvino", "ort-cpu"):
        other = open_engine(Bundle.open(demo), name, threads=1)
        logits[name] = Decoder(other, config, other.new_cache(64)).prefill(0, pictured, positions, embeds)
        other.close()
    assert error(logits["openvino"], logits["ort-cpu"]) < 0.05
    engine.close()


def test_answers_are_onnx_runtimes(demo: Path) -> None:
    """Greedy answers to the demo's pictures, alone and four at once."""
    questions = [
        [
            {
                "role": "user",
                "content": [{"type": "image", "image": str(path)}, {"type": "text", "text": "Read the text."}],
            }
        ]
        for path in sorted((DEMO.parent / "pictures").glob("*line*.png"))
    ]
    assert len(questions) >= 3
    answers: dict[str, list[str]] = {}
    for name in ("ort-cpu", "openvino"):
        with VisionLanguageModel.open(demo, name, threads=1) as model:
            options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False}
            answers[name] = [model.generate(q, **options).text for q in questions]
            assert [r.text for r in model.generate_batch(questions, **options)] == answers[name]
    assert answers["openvino"] == answers["ort-cpu"]


def test_a_bundle_without_the_graph(make_pair: MakePair, tmp_path: Path) -> None:
    """Float decoders have none: prompts stay where they were."""
    export_bundle(make_pair("fp32").checkpoint, tmp_path / "fp32", ExportOptions(precision="fp32"))
    opened = Bundle.open(tmp_path / "fp32")
    assert OPENVINO_PREFILL not in opened.graphs
    engine = open_engine(opened, "openvino", threads=1)
    assert isinstance(engine.prefill, OrtGraph)
    engine.close()


@pytest.mark.parametrize(
    ("precision", "kind", "scale", "offered"),
    [
        ("int4", "packed", None, True),
        ("int4", "int8", None, False),  # mixed: what rounds activations is told of the whole graph
        ("int8", "int8", None, True),
        ("int8", "int8", 0.1, False),  # static: in ONNX Runtime's own operators
        ("int8", "packed", None, False),
        ("fp32", "packed", None, False),
    ],
)
def test_who_is_offered_one(precision: str, kind: str, scale: float | None, offered: bool) -> None:
    layer = SimpleNamespace(kind=kind, input_scale=scale)
    checkpoint: Any = SimpleNamespace(layers={"model.layers.1.mlp.up_proj.weight": layer})
    checkpoint.layers["visual.blocks.0.attn.qkv.weight"] = SimpleNamespace(kind="int8", input_scale=0.2)
    assert is_offered(decoder_precision(precision)[0], checkpoint) == offered
    assert not is_offered(replace(decoder_precision(precision)[0], cache="int8"), checkpoint)


def test_hybrid_opens_one_graph_for_prompts(
    make_pair: MakePair, tmp_path: Path, tiles: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With tiles OpenVINO's; ONNX Runtime's is not opened beside it then."""
    export_bundle(make_pair("fp32").checkpoint, tmp_path / "b", ExportOptions(precision="hybrid"))
    opened: list[str] = []
    real = OrtEngine._open

    def watched(engine: OrtEngine, bundle: Bundle, role: str) -> Any:
        opened.append(role)
        return real(engine, bundle, role)

    monkeypatch.setattr(OrtEngine, "_open", watched)
    open_engine(Bundle.open(tmp_path / "b"), "openvino", threads=1).close()
    own_encoder = ["vision"] if native_role(Bundle.open(tmp_path / "b"), "vision") else []
    assert sorted(opened) == (["decoder"] if tiles else ["decoder", "prefill", *own_encoder])
    status = next(s for s in engine_status(Bundle.open(tmp_path / "b")) if s.name == "openvino")
    assert ("for vision and prompts" in status.detail) == tiles
    assert ("for nothing here" in status.detail) == (not tiles and bool(own_encoder))


def test_a_checkpoint_in_activation_order(tmp_path: Path) -> None:
    """GPTQ with desc_act: the columns of the input are taken in the order of the groups."""
    written = write(tmp_path, **CASES["desc_act"][1])
    export_bundle(written.folder, tmp_path / "bundle")
    assert OPENVINO_PREFILL in Bundle.open(tmp_path / "bundle").graphs
    logits = []
    for name in ("ort-cpu", "openvino"):
        engine = open_engine(Bundle.open(tmp_path / "bundle"), name, threads=1)
        decoder = Decoder(engine, Bundle.open(tmp_path / "bundle").model, engine.new_cache(64))
        logits.append(decoder.prefill(0, **prompt(tmp_path / "bundle")))
        engine.close()
    assert error(logits[1], logits[0]) < 0.05
