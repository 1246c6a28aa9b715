"""Attention of one new token per row, and the cache's rows that move apart, against slow obvious oracles."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from conftest import Pair

from edgevl.export.exporter import ExportOptions, export_bundle
from edgevl.export.graph import DataFile, GraphBuilder
from edgevl.export.step_attention import StepAttention
from edgevl.runtime.bundle import Bundle
from edgevl.runtime.config import TextConfig
from edgevl.runtime.graph_spec import GraphSpec, TensorSpec
from edgevl.runtime.kv_cache import KVCache

DIM = 8


def text_config(tiny: Pair, heads: int, kv_heads: int) -> TextConfig:
    text = Bundle.open(tiny.bundle).model.text
    return replace(text, num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=DIM, num_hidden_layers=1)


def write_graph(path: Path, text: TextConfig) -> None:
    heads, kv_heads = text.num_attention_heads, text.num_key_value_heads
    cache = ("batch", kv_heads, "room", DIM)
    rows = [("q", heads), ("k", kv_heads), ("v", kv_heads)]
    names = [f"past_key_values.0.{kind}" for kind in ("key", "value")]
    spec = GraphSpec(
        "decoder",
        (
            TensorSpec("input_ids", "int64", ("batch", "sequence")),
            TensorSpec("seqlens_k", "int32", ("batch",)),
            *(TensorSpec(name, "float32", ("batch", 1, n * DIM)) for name, n in rows),
            *(TensorSpec(name, "float32", cache) for name in names),
        ),
        (
            TensorSpec("y", "float32", ("batch", 1, heads * DIM)),
            *(TensorSpec(name, "float32", cache) for name in ("keys", "values")),
            TensorSpec("applies", "bool", ()),
        ),
    )
    with DataFile(path.with_suffix(".data")) as data:
        builder = GraphBuilder(spec, data, 23, 11)
        step = StepAttention(builder, text)
        found = step.write(*(builder.input(n) for n in ("q", "k", "v", *names)))
        for name, value in zip(("y", "keys", "values", "applies"), (*found, step.applies)):
            builder.output(name, value)
        builder.save(path)


def slow_attention(q: np.ndarray, keys: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Of one row: q [heads, d], keys and values [kv_heads, tokens, d]; float64, one head and token at a time."""
    heads, group = len(q), len(q) // len(keys)
    out = np.zeros(q.shape)
    for head in range(heads):
        k, v = keys[head // group].astype(np.float64), values[head // group].astype(np.float64)
        weights = np.exp([float(q[head] @ token) / DIM**0.5 for token in k])
        out[head] = sum(w * token for w, token in zip(weights / weights.sum(), v))
    return out


@pytest.mark.parametrize(("heads", "kv_heads"), [(12, 2), (4, 4), (7, 1)])
def test_a_step_is_attention_over_what_each_row_holds(tiny: Pair, tmp_path: Path, heads: int, kv_heads: int) -> None:
    text, rng = text_config(tiny, heads, kv_heads), np.random.default_rng(heads)
    write_graph(tmp_path / "step.onnx", text)
    session = ort.InferenceSession(str(tmp_path / "step.onnx"), providers=["CPUExecutionProvider"])
    lengths, room = np.array([0, 5, 11]), 12
    q = rng.normal(size=(3, 1, heads * DIM)).astype(np.float32)
    k, v = rng.normal(size=(2, 3, 1, kv_heads * DIM)).astype(np.float32)
    keys, values = rng.normal(size=(2, 3, kv_heads, room, DIM)).astype(np.float32)
    for row, length in enumerate(lengths):  # left there by a longer answer: must never be seen
        keys[row, :, length:], values[row, :, length:] = 1e4, -1e30
    feeds = {"input_ids": np.zeros((3, 1), np.int64), "seqlens_k": lengths.astype(np.int32), "q": q, "k": k, "v": v}
    feeds |= {"past_key_values.0.key": keys, "past_key_values.0.value": values}
    y, new_keys, new_values, applies = (np.asarray(x) for x in session.run(None, feeds))
    assert applies
    for row, length in enumerate(lengths):
        keys[row, :, length], values[row, :, length] = k[row].reshape(-1, DIM), v[row].reshape(-1, DIM)
        seen = slice(length + 1)
        wanted = slow_attention(q[row].reshape(-1, DIM), keys[row, :, seen], values[row, :, seen])
        np.testing.assert_allclose(y[row].reshape(-1, DIM), wanted, atol=2e-6)
    np.testing.assert_array_equal(new_keys, keys)
    np.testing.assert_array_equal(new_values, values)


def attention_nodes(graph: onnx.GraphProto) -> dict[str, int]:
    """Names of operators, those in branches too."""
    found: dict[str, int] = {}
    for node in graph.node:
        found[node.op_type] = found.get(node.op_type, 0) + 1
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                for name, count in attention_nodes(attribute.g).items():
                    found[name] = found.get(name, 0) + count
    return found


@pytest.mark.parametrize(
    ("options", "graph", "branches"),
    [
        (ExportOptions(precision="int4"), "decoder", True),
        (ExportOptions(precision="hybrid"), "decoder", True),
        (ExportOptions(precision="hybrid"), "prefill", False),
        (ExportOptions(precision="fp16"), "decoder", False),
        (ExportOptions(target="cuda"), "decoder", False),
    ],
)
def test_which_graphs_have_steps(
    tiny: Pair, tmp_path: Path, options: ExportOptions, graph: str, branches: bool
) -> None:
    export_bundle(tiny.checkpoint, tmp_path / "b", options)
    model = onnx.load(str(tmp_path / "b" / f"{graph}.onnx"), load_external_data=False)
    layers, found = Bundle.open(tiny.bundle).model.text.num_hidden_layers, attention_nodes(model.graph)
    assert found["GroupQueryAttention"] == layers
    assert found.get("If", 0) == found.get("ScatterND", 0) // 2 * branches == layers * branches


def test_steps_give_the_logits_of_a_prompt(tiny: Pair) -> None:
    """Every token by itself (one branch) against all at once (the other), over rooms of 64, 128 and 192 tokens."""
    ids = np.random.default_rng(0).integers(0, 200, 150)
    positions = np.broadcast_to(np.arange(150), (3, 150))
    with tiny.open(capacity=200) as model:
        whole = model.decoder()
        wanted = np.concatenate([whole.score(ids[:60], positions[0, :60]), whole.score(ids[60:], positions[0, 60:])])
        steps, rooms = model.decoder(2), set()
        for i, token in enumerate(ids):
            logits = steps.step(np.array([token, ids[0]]), np.array([i, i]))
            np.testing.assert_allclose(logits[0], wanted[i], atol=2e-5)
            rooms.add(next(iter(steps.cache.view(0, 2).buffers.values())).shape[2])
        assert rooms == {64, 128, 192}
        for name, kept in steps.cache.read(0, 0, 150).items():
            np.testing.assert_allclose(kept, whole.cache.read(0, 0, 150)[name], atol=2e-5)


CACHED = tuple(TensorSpec(n, t, ("batch", 3, "capacity", 4)) for n, t in (("k", "float32"), ("v", "int8")))


def same(cache: KVCache, rows: Sequence[list[int]]) -> None:
    for row, tokens in enumerate(rows):
        for values in cache.read(row, 0, len(tokens)).values():
            assert values.shape == (3, len(tokens), 4)
            assert (values == (np.array(tokens, int)[None, :, None] + np.arange(3)[:, None, None])).all()


def test_rows_that_move_apart_keep_their_tokens() -> None:
    """Random writes, rewinds, moves and forks against lists."""
    rng = np.random.default_rng(5)
    cache = KVCache(GraphSpec("decoder", CACHED, (), (("k", "pk"), ("v", "pv"))), 1000, 3)
    rows: list[list[int]] = [[], [], []]
    rooms = set()
    for _ in range(60):
        row, count = int(rng.integers(3)), int(rng.integers(1, 80))
        if len(rows[row]) + count > 1000:
            continue
        fresh = rng.integers(0, 100, count).tolist()
        cache.reserve(row, count)
        for buffer in cache.view(row, row + 1).buffers.values():
            assert buffer.flags.c_contiguous and len(rows[row]) + count <= buffer.shape[2] <= 1000
            rooms.add(buffer.shape[2])
            for head in range(3):
                buffer[0, head, len(rows[row]) : len(rows[row]) + count] = (np.array(fresh) + head)[:, None]
        cache.advance(row, count)
        rows[row] += fresh
        same(cache, rows)
        if rng.random() < 0.3:
            rows[row] = rows[row][: len(rows[row]) // 2]
            cache.rewind(row, len(rows[row]))
        if rng.random() < 0.2:
            cache.move(row, (row + 1) % 3)
            rows[(row + 1) % 3] = list(rows[row])
        if rng.random() < 0.2:
            cache = cache.fork()
    same(cache, rows)
    assert len(rooms) > 5 and all(room % 64 == 0 or room == 1000 for room in rooms)
