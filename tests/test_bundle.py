"""runtime/bundle.py, engine.py, kv_cache.py, graph_spec.py: strict about files, honest about engines."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest
from conftest import USABLE, Pair

from edgevl.runtime import engine as engine_module
from edgevl.runtime import ort_engine
from edgevl.runtime.bundle import MANIFEST, Bundle
from edgevl.runtime.decoding import Decoder
from edgevl.runtime.engine import EngineStatus, engine_status, open_engine
from edgevl.runtime.errors import BundleError, CapacityError, EngineError
from edgevl.runtime.graph_spec import GraphSpec, decoder_spec
from edgevl.runtime.kv_cache import KVCache

Edit = Callable[[dict[str, Any]], None]


@pytest.fixture
def copy(tiny: Pair, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny.bundle, tmp_path / "bundle"))


def edit(folder: Path, change: Edit) -> None:
    data = json.loads((folder / MANIFEST).read_text())
    change(data)
    (folder / MANIFEST).write_text(json.dumps(data))


def test_manifest_round_trip(tiny: Pair) -> None:
    bundle = Bundle.open(tiny.bundle, verify_hashes=True)
    assert json.loads(json.dumps(bundle.manifest())) == json.loads((tiny.bundle / MANIFEST).read_text())
    spec = bundle.graphs["decoder"].spec
    assert GraphSpec.from_dict(spec.to_dict()) == spec == decoder_spec(bundle.model)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(schema_version=2), "schema version 2, this edgevl reads 1; upgrade edgevl"),
        (lambda d: d.update(schema_version=0), "export the checkpoint again"),
        (lambda d: d.pop("schema_version"), "no schema_version"),
        (lambda d: d.update(surprise=1), r"unknown keys \['surprise'\]"),
        (lambda d: d.pop("graphs"), r"missing keys \['graphs'\]"),
        (lambda d: d.update(mrope_rule="mine"), "mrope_rule 'mine'"),
        (lambda d: d["graphs"].pop("vision"), "expected vision and decoder"),
        (lambda d: d["graphs"].update(extra=d["graphs"]["vision"]), "graph 'extra'"),
        (lambda d: d["graphs"]["vision"].update(file="other.onnx"), "not listed under files"),
        (lambda d: d["files"].update({"../../etc/passwd": {"size": 1, "sha256": ""}}), "file entry"),
        (lambda d: d["files"].update({"/etc/passwd": {"size": 1, "sha256": ""}}), "file entry"),
        (lambda d: d["model"]["text"].update(flavour="mint"), "malformed"),
        (lambda d: d["model"].update(flavour="mint"), "flavour"),
        (lambda d: d["image_processor"].pop("patch_size"), "malformed"),
        (lambda d: d.update(max_tokens=None), "malformed"),
        (lambda d: d.update(files=[]), "malformed"),
    ],
)
def test_bad_manifests(copy: Path, change: Edit, message: str) -> None:
    edit(copy, change)
    with pytest.raises(BundleError, match=message):
        Bundle.open(copy)


def test_bad_folders(tmp_path: Path, tiny: Pair) -> None:
    with pytest.raises(BundleError, match="no such folder"):
        Bundle.open(tmp_path / "absent")
    with pytest.raises(BundleError, match="expected a bundle written by"):
        Bundle.open(tmp_path)
    with pytest.raises(BundleError, match="it looks like a checkpoint: run `edgevl export`"):
        Bundle.open(tiny.checkpoint)
    (tmp_path / MANIFEST).write_text("{")
    with pytest.raises(BundleError, match="not readable as JSON"):
        Bundle.open(tmp_path)


def test_damaged_files(copy: Path) -> None:
    data = copy / "decoder.onnx.data"
    original = data.read_bytes()
    data.write_bytes(original[:-1] + bytes([original[-1] ^ 1]))
    Bundle.open(copy)  # the size is right: only the hash tells
    with pytest.raises(BundleError, match=r"decoder\.onnx\.data: sha256 is"):
        Bundle.open(copy, verify_hashes=True)
    data.write_bytes(original[:-10])
    with pytest.raises(BundleError, match=r"decoder\.onnx\.data: [\d,]+ bytes, the manifest says"):
        Bundle.open(copy)
    data.unlink()
    with pytest.raises(BundleError, match=r"decoder\.onnx\.data: missing"):
        Bundle.open(copy)


def test_engines_by_name(tiny: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = Bundle.open(tiny.bundle)
    with pytest.raises(
        EngineError, match="engine 'gpu' is unknown; expected auto, ort-cpu, openvino, ort-cuda, tensorrt"
    ):
        open_engine(bundle, "gpu")
    for name in ("ort-cuda", "tensorrt"):
        with pytest.raises(EngineError, match=f"engine '{name}' cannot run here: .*edgevl doctor"):
            open_engine(bundle, name)
    notes: list[str] = []
    engine = open_engine(bundle, "auto", notice=notes.append)
    assert engine.name == "ort-cpu" and len(notes) == 1 and "ort-cpu" in notes[0]
    assert {s.name: s.usable for s in engine_status()} == USABLE
    gone = [EngineStatus(name, False, "gone") for name in engine_module.ENGINES]
    monkeypatch.setattr(engine_module, "engine_status", lambda bundle, gpu: gone)
    with pytest.raises(EngineError, match="no engine is usable here: tensorrt: gone; ort-cuda: gone; ort-cpu: gone"):
        open_engine(bundle)


def test_missing_onnxruntime_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "_version", lambda *_: None)
    assert "pip install 'edgevl[ort]'" in engine_status()[0].detail


def test_old_onnxruntime_is_refused(copy: Path) -> None:
    edit(copy, lambda d: d.update(requires={"onnxruntime": "99.0"}))
    with pytest.raises(EngineError, match=r"too old for this bundle, it needs 99\.0"):
        open_engine(Bundle.open(copy), "ort-cpu")
    edit(copy, lambda d: d.update(requires={"tensorrt": "10"}, target="tensorrt"))
    with pytest.raises(EngineError, match="not for ONNX Runtime"):
        open_engine(Bundle.open(copy), "ort-cpu")


def test_fallback_is_not_silent(tiny: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """ONNX Runtime drops providers that it cannot start with a log line; the session's own list is asserted."""
    monkeypatch.setattr(ort_engine, "PROVIDER", "CUDAExecutionProvider")
    with pytest.raises(EngineError, match="CUDAExecutionProvider"):
        open_engine(Bundle.open(tiny.bundle), "ort-cpu")


def test_broken_graphs(copy: Path) -> None:
    (copy / "vision.onnx").write_bytes(b"x" * (copy / "vision.onnx").stat().st_size)
    with pytest.raises(EngineError, match=r"vision\.onnx: onnxruntime .* cannot load it"):
        open_engine(Bundle.open(copy), "ort-cpu")


def test_swapped_graphs(copy: Path) -> None:
    edit(copy, lambda d: d["graphs"]["vision"].update(file="decoder.onnx"))
    with pytest.raises(EngineError, match="are not those of the manifest"):
        open_engine(Bundle.open(copy), "ort-cpu")


def test_released_pages_come_back(tiny: Pair) -> None:
    """Giving back the pages of mapped weights must not change a number."""
    with tiny.open() as model:
        message = {"role": "user", "content": "Read the text."}
        before = model.generate([message], max_new_tokens=6).token_ids
        ort_engine.release_file_pages([tiny.bundle / "decoder.onnx.data", tiny.bundle / "vision.onnx.data"])
        assert model.generate([message], max_new_tokens=6).token_ids == before


def test_nothing_is_mapped_while_pages_are_given_back(tiny: Pair) -> None:
    """Else an address that was a file's may be somebody's memory when its pages are given back."""
    opened, bundle = [], Bundle.open(tiny.bundle)
    thread = Thread(target=lambda: opened.append(open_engine(bundle, "ort-cpu", threads=1)))
    with ort_engine._MAPPINGS:
        thread.start()
        thread.join(0.3)
        assert not opened
    thread.join(60)
    closing = Thread(target=opened[0].close)
    with ort_engine._MAPPINGS:
        closing.start()
        closing.join(0.1)
        assert opened[0].graphs
    closing.join(60)
    assert not opened[0].graphs


# ------------------------------------------------------------------ KV cache


def test_a_kept_binding_is_of_its_cache(tiny: Pair) -> None:
    """Steps over two caches in turn, and over rows of one, are the steps over each alone."""
    ids, positions = np.arange(5), np.broadcast_to(np.arange(5), (3, 5))
    with tiny.open() as model:

        def decoded(first: int, steps: int, decoder: Decoder) -> list[np.ndarray]:
            decoder.prefill(0, ids + first, positions)
            return [decoder.step(np.array([first + i]), np.array([5 + i]))[0] for i in range(steps)]

        alone = [decoded(first, 4, model.decoder()) for first in (0, 20)]
        both = [model.decoder(), model.decoder()]
        for decoder, first in zip(both, (0, 20)):
            decoder.prefill(0, ids + first, positions)
        for i in range(4):
            for decoder, first, expected in zip(both, (0, 20), alone):
                got = decoder.step(np.array([first + i]), np.array([5 + i]))[0]
                assert np.array_equal(got, expected[i])
        pair = model.decoder(2)
        for row, first in enumerate((0, 20)):
            pair.prefill(row, ids + first, positions)
        for i in range(4):
            rows = pair.step(np.array([i, 20 + i]), np.full(2, 5 + i))
            np.testing.assert_allclose(rows, [alone[0][i], alone[1][i]], atol=1e-5)


def test_cache_rows(tiny: Pair) -> None:
    spec = decoder_spec(Bundle.open(tiny.bundle).model)
    cache = KVCache(spec, capacity=10, batch=3)
    name = spec.cache[0][0]
    view = cache.view(1, 2)
    view.buffers[name][0, :, :4] = 7  # what a graph does
    cache.advance(1, 4)
    assert cache.view(0, 3).buffers[name][1, 0, 3, 0] == 7 and cache.lengths.tolist() == [0, 4, 0]
    assert view.buffers[name].flags.c_contiguous
    fork = cache.fork()
    cache.move(1, 0)
    assert cache.lengths.tolist() == [4, 4, 0] and cache.view(0, 1).buffers[name][0, 1, 3, 5] == 7
    cache.rewind(1, 2)
    assert fork.lengths.tolist() == [0, 4, 0] and fork.view(1, 2).buffers[name][0, 0, 0, 0] == 7
    assert fork.view(0, 1).buffers[name].max() == 0
    assert cache.nbytes == 3 * 10 * 2 * 16 * 4 * len(spec.cache)


def test_heads_move_apart_and_together(tiny: Pair) -> None:
    """Every token keeps its numbers, wherever its head lies; a copy that never moves says which."""
    spec, rng = decoder_spec(Bundle.open(tiny.bundle).model), np.random.default_rng(0)
    cache = KVCache(spec, capacity=1000, batch=3)
    shape = cache.read(0, 0, 0)[spec.cache[0][0]].shape
    kept = [{name: np.zeros((shape[0], 0, shape[2]), np.float32) for name, _ in spec.cache} for _ in range(3)]
    rooms, most = set(), 0
    for row, count in ((0, 5), (1, 70), (2, 300), (1, 400), (0, -3), (1, -460), (2, -250), (2, 3), (0, 200), (2, -53)):
        if count > 0:
            more = {n: rng.standard_normal((shape[0], count, shape[2]), np.float32) for n, _ in spec.cache}
            cache.append(row, more, count)
            kept[row] = {n: np.concatenate([kept[row][n], more[n]], axis=1) for n in more}
        else:
            cache.rewind(row, int(cache.lengths[row]) + count)
            kept[row] = {n: b[:, :count] for n, b in kept[row].items()}
            cache.narrow()
        most = max(most, int(cache.lengths.sum()))
        assert cache.held == most
        room = cache.view(0, 3).buffers[spec.cache[0][0]].shape[2]
        rooms.add(room)
        assert int(cache.lengths.max()) <= room and (count > 0 or room - int(cache.lengths.max()) < 64)
        for i in range(3):
            for name, numbers in cache.read(i, 0, int(cache.lengths[i])).items():
                np.testing.assert_array_equal(numbers, kept[i][name])
    assert len(rooms) > 3


def test_cache_guards(tiny: Pair) -> None:
    cache = KVCache(decoder_spec(Bundle.open(tiny.bundle).model), capacity=10)
    cache.advance(0, 10)
    with pytest.raises(CapacityError, match="11 tokens are needed, the KV cache holds 10"):
        cache.reserve(0, 1)
    with pytest.raises(ValueError, match="cannot rewind row 0 to 11"):
        cache.rewind(0, 11)


def test_fork_goes_its_own_way(tiny: Pair) -> None:
    """A forked cache continues like the original, and writing to one leaves the other alone."""
    with tiny.open() as model:
        prompt = model.prepare([{"role": "user", "content": "Read the text."}])
        decoder = model.decoder()
        decoder.prefill(0, prompt.ids, prompt.positions)
        position = np.array([prompt.next_position])
        original, fork = decoder.cache, decoder.cache.fork()
        a = decoder.step(np.array([5]), position)
        decoder.cache = fork
        decoder.step(np.array([9]), position)
        fork.rewind(0, len(prompt.ids))
        np.testing.assert_array_equal(decoder.step(np.array([5]), position), a)
        assert original.lengths[0] == fork.lengths[0] == len(prompt.ids) + 1
