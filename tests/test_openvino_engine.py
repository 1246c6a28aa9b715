"""The engine `openvino`: the vision encoder on OpenVINO gives ONNX Runtime's numbers, the rest is ONNX Runtime's."""

from __future__ import annotations

import importlib.metadata
import shutil
from pathlib import Path

import numpy as np
import openvino
import pytest
from conftest import Pair
from PIL import Image
from test_cli import edgevl

from edgevl.export.exporter import ExportOptions, export_bundle
from edgevl.runtime import VisionLanguageModel, openvino_engine
from edgevl.runtime.bundle import Bundle
from edgevl.runtime.engine import open_engine
from edgevl.runtime.errors import EngineError
from edgevl.runtime.openvino_engine import LEAST_OPENVINO, OpenVinoGraph, openvino_version

pytest.importorskip("openvino")

DEMO = Path(__file__).parent.parent / "demo"


@pytest.fixture(scope="module")
def demo_bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("openvino")
    for precision in ("fp32", "int8"):
        export_bundle(DEMO / "model", folder / precision, ExportOptions(precision=precision))
    return {p: folder / p for p in ("fp32", "int8")}


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (7, 9, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def relative(got: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(got - expected) / np.linalg.norm(expected))


def test_embeddings_are_onnx_runtimes_at_every_size(demo_bundles: dict[str, Path]) -> None:
    """Sums may be in bfloat16 (8 bits), where the processor has it: an error of some thousandths over six blocks."""
    with (
        VisionLanguageModel.open(demo_bundles["fp32"], "openvino", threads=1) as ours,
        VisionLanguageModel.open(demo_bundles["fp32"], "ort-cpu", threads=1) as reference,
    ):
        for number, size in enumerate([(56, 84), (252, 112), (28, 28), (252, 112)]):
            image = picture(*size, seed=number)
            got, expected = (np.asarray(m.encode_image(image).embeds) for m in (ours, reference))
            assert got.shape == expected.shape and got.dtype == expected.dtype
            assert relative(got, expected) < 0.03
        # what was handed out is not overwritten by the next picture
        first = np.asarray(ours.encode_image(picture(56, 56, 8)).embeds)
        kept = first.copy()
        ours.encode_image(picture(56, 56, 9))
        assert np.array_equal(first, kept)


@pytest.mark.parametrize("tiles", [False, True])
def test_int8_costs_what_it_costs_on_onnx_runtime(
    demo_bundles: dict[str, Path], tiles: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One activation scale per token on both: no further from float than 1.5 times the other. Whichever kernels the
    processor is taken to have, it runs."""
    monkeypatch.setattr(openvino_engine, "has_int8_tiles", lambda: tiles)
    image = picture(224, 168)
    embeds = {}
    for precision, engine in (("fp32", "ort-cpu"), ("int8", "ort-cpu"), ("int8", "openvino")):
        with VisionLanguageModel.open(demo_bundles[precision], engine, threads=1) as model:
            embeds[precision, engine] = model.encode_image(image).embeds
    reference = embeds["fp32", "ort-cpu"]
    onnxruntime = relative(embeds["int8", "ort-cpu"], reference)
    assert onnxruntime > 0
    assert relative(embeds["int8", "openvino"], reference) < 1.5 * onnxruntime


@pytest.mark.parametrize("slow", [False, True])
def test_no_bfloat16_where_it_is_slow(tiny: Pair, monkeypatch: pytest.MonkeyPatch, slow: bool) -> None:
    monkeypatch.setattr(openvino_engine, "slow_bfloat16", lambda: slow)
    bundle = Bundle.open(tiny.bundle)
    graph = bundle.graphs["vision"]
    used = OpenVinoGraph(bundle.path(graph.file), graph.spec, 1, 32)._compiled.get_property("INFERENCE_PRECISION_HINT")
    default = openvino.Core().get_property("CPU", "INFERENCE_PRECISION_HINT")
    assert used == (openvino.Type.f32 if slow else default)


def test_verify_and_run_on_it(demo_bundles: dict[str, Path], tmp_path: Path) -> None:
    bundle = tmp_path / "verified"
    done = edgevl("export", DEMO / "model", "-o", bundle, "--precision", "int8")
    assert done.returncode == 0, done.stderr
    done = edgevl("verify", bundle, "--engine", "openvino")
    assert done.returncode == 0, done.stdout
    path = tmp_path / "p.png"
    picture(112, 84).save(path)
    answers = [
        edgevl("run", bundle, "How many shapes?", "--image", path, "--engine", engine, "--max-new-tokens", 4).stdout
        for engine in ("ort-cpu", "openvino")
    ]
    assert answers[0] == answers[1] != ""


def test_bundles_that_it_cannot_run(tiny: Pair, tmp_path: Path) -> None:
    export_bundle(tiny.checkpoint, tmp_path / "trt", ExportOptions(precision="fp16", target="tensorrt"))
    with pytest.raises(EngineError, match="exported for 'tensorrt'; export with --target cpu"):
        open_engine(Bundle.open(tmp_path / "trt"), "openvino")


def test_a_broken_graph_is_one_line(tiny: Pair, tmp_path: Path) -> None:
    shutil.copytree(tiny.bundle, tmp_path / "b")
    bundle = Bundle.open(tmp_path / "b")
    graph = bundle.graphs["vision"]
    bundle.path(graph.file).write_bytes(b"not a graph")
    with pytest.raises(EngineError, match=r"vision.onnx: openvino .* cannot load it: .+") as caught:
        OpenVinoGraph(bundle.path(graph.file), graph.spec, 1, 32)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("version", [None, "2025.4.0"])
def test_missing_or_too_old(tiny: Pair, monkeypatch: pytest.MonkeyPatch, version: str | None) -> None:
    real = importlib.metadata.version

    def fake(name: str) -> str:
        if name != "openvino":
            return real(name)
        if version is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(importlib.metadata, "version", fake)
    what = "not installed; pip install 'edgevl\\[openvino\\]'" if version is None else f"too old, {LEAST_OPENVINO} is"
    with pytest.raises(EngineError, match=what):
        openvino_version()
    with pytest.raises(EngineError, match="engine 'openvino' cannot run here"):
        open_engine(Bundle.open(tiny.bundle), "openvino")
