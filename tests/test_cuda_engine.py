"""ONNX Runtime on CUDA, as far as it can be tested without a GPU: the exported graphs hold only operators that have
CUDA kernels, their numbers on the CPU, the choice of an engine, and that nothing falls back silently."""

from __future__ import annotations

import gc
import json
import re
import shutil
import subprocess
import sys
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from conftest import USABLE, Pair
from host_memory import HostCuda

from edgevl.export.exporter import ExportOptions, export_bundle
from edgevl.runtime import cli, engine, ort_cuda_engine
from edgevl.runtime.bundle import Bundle
from edgevl.runtime.engine import EngineStatus, GpuOptions, engine_status, open_engine
from edgevl.runtime.errors import EngineError, InputError
from edgevl.runtime.generation import VisionLanguageModel
from edgevl.runtime.golden import COSINE_FLOORS
from edgevl.runtime.gpu import current_gpu
from edgevl.runtime.jetson import jetson_facts, parse_power_mode, parse_release
from edgevl.runtime.ort_cuda_engine import (
    GraphNumbers,
    OrtCudaEngine,
    check_providers,
    cuda_session,
    output_shape,
    provider_problem,
)
from edgevl.runtime.ort_engine import OrtEngine

TABLE = json.loads((Path(__file__).parent / "cuda_kernels.json").read_text())
NO_GPU = pytest.mark.skipif(current_gpu() is not None, reason="a GPU is here")

VARIANTS: dict[str, dict[str, Any]] = {
    "fp16": {"precision": "fp16"},
    "int4": {"precision": "int4"},
    "int8-weights": {"precision": "int8-weights"},
    "asymmetric, 4-bit head, fp32 vision": {
        "precision": "int4",
        "symmetric": False,
        "head_bits": 4,
        "block_size": 32,
        "vision_precision": "fp32",
    },
    "asymmetric": {"precision": "int4", "symmetric": False},
}


@pytest.fixture(scope="module", params=VARIANTS)
def variant(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def cuda_bundle(tiny: Pair, tmp_path_factory: pytest.TempPathFactory) -> Any:
    made: dict[str, Bundle] = {}

    def make(name: str) -> Bundle:
        if name not in made:
            folder = tmp_path_factory.mktemp("cuda") / "bundle"
            export_bundle(tiny.checkpoint, folder, ExportOptions(target="cuda", **VARIANTS[name]))
            made[name] = Bundle.open(folder)
        return made[name]

    return make


def without_kernel(model: onnx.ModelProto, dtype: str) -> set[str]:
    """Operators of a graph that the table does not have for graphs of `dtype`."""
    assert {o.domain: o.version for o in model.opset_import}[""] == TABLE["opset"]
    return {n.op_type for n in model.graph.node if n.op_type not in TABLE[dtype].get(n.domain, [])}


def test_every_node_has_a_cuda_kernel(cuda_bundle: Any, variant: str) -> None:
    bundle = cuda_bundle(variant)
    for role, graph in bundle.graphs.items():
        model = onnx.load(bundle.path(graph.file), load_external_data=False)
        dtype = graph.spec.input("rotary_cos").dtype
        assert dtype == ("float32" if role == "vision" and "fp32" in variant else "float16")
        assert without_kernel(model, dtype) == set()
        for node in model.graph.node:
            if node.op_type == "MatMulNBits":
                assert len(node.input) <= 4  # 1.23's CUDA kernel has no bias, and says so only when it runs
        types = {i.name: i.data_type for i in model.graph.initializer}
        scales = [types[n.input[2]] for n in model.graph.node if n.op_type == "MatMulNBits"]
        assert set(scales) <= {onnx.TensorProto.FLOAT16}


def test_the_check_sees_the_dialect_of_the_cpu(tiny: Pair) -> None:
    bundle = Bundle.open(tiny.bundle)
    model = onnx.load(bundle.path("decoder.onnx"), load_external_data=False)
    model.opset_import[0].version = TABLE["opset"]
    assert "RMSNormalization" in without_kernel(model, "float16")


def prompt_logits(model: VisionLanguageModel) -> np.ndarray:
    """Logits after a prompt with a picture and after each of three tokens."""
    picture = np.random.default_rng(1).integers(0, 256, (84, 112, 3), dtype=np.uint8)
    content = [{"type": "image", "image": picture}, {"type": "text", "text": "What is it?"}]
    prompt = model.prepare([{"role": "user", "content": content}])
    decoder = model.decoder()
    rows = [decoder.prefill(0, prompt.ids, prompt.positions, np.asarray(prompt.images[0].embeds))]
    for i in range(3):
        rows.append(decoder.step(np.array([7 + i]), np.array([prompt.next_position + i]))[0])
    return np.stack(rows)


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    a, b = (x - x.mean(-1, keepdims=True) for x in (a, b))
    return float((a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b))


def test_its_numbers_are_those_of_float32_and_of_the_cpu_dialect(
    cuda_bundle: Any, variant: str, tiny: Pair, tmp_path: Path
) -> None:
    ours = prompt_logits(VisionLanguageModel(*_opened(cuda_bundle(variant))))
    exact = prompt_logits(tiny.open())
    assert cosine(ours, exact) > COSINE_FLOORS["decoder"]["fp16" if variant == "fp16" else "int4"]
    # The same rounding of weights in the CPU's dialect: what is left is float16 and the CPU's int8 activations.
    options = {**VARIANTS[variant], "vision_precision": VARIANTS[variant].get("vision_precision", "fp16")}
    export_bundle(tiny.checkpoint, tmp_path / "cpu", ExportOptions(**options))
    assert cosine(ours, prompt_logits(VisionLanguageModel.open(tmp_path / "cpu", "ort-cpu", threads=2))) > 0.998


def _opened(bundle: Bundle) -> tuple[Bundle, OrtEngine]:
    return bundle, OrtEngine(bundle, threads=2)


def test_the_embedding_is_unpacked_exactly(tiny: Pair, tmp_path: Path, variant: str) -> None:
    """The rows that the graph makes of the codes are code minus zero point, times scale: held against the codes."""
    from edgevl.calibration.formats import dequantize_blocks, quantize_blocks
    from edgevl.export.dialect_cuda import CudaDialect
    from edgevl.export.graph import DataFile
    from edgevl.export.targets import find_target
    from edgevl.runtime.checkpoint import Checkpoint
    from edgevl.runtime.graph_spec import GraphSpec, TensorSpec

    options = ExportOptions(**VARIANTS[variant])
    (precision,) = find_target("cuda").decoder_precision(
        options.precision or "int4", options.block_size, options.symmetric, options.head_bits
    )
    ids = np.array([[3, 511, 0], [7, 7, 250]], np.int64)
    spec = GraphSpec(
        "rows",
        (TensorSpec("input_ids", "int64", ("batch", "sequence")),),
        (TensorSpec("rows", "float16", ("batch", "sequence", 64)),),
    )
    with Checkpoint.open(tiny.checkpoint) as checkpoint, DataFile(tmp_path / "rows.onnx.data") as data:
        table = checkpoint.read("model.embed_tokens.weight")
        dialect = CudaDialect(spec, checkpoint.config, checkpoint, data, precision)
        dialect.output("rows", dialect.embedding(dialect.input("input_ids"), "model.embed_tokens"))
        dialect.builder.save(tmp_path / "rows.onnx")
    session = ort.InferenceSession(str(tmp_path / "rows.onnx"), providers=["CPUExecutionProvider"])
    found = np.asarray(session.run(None, {"input_ids": ids})[0], np.float32)
    if precision.table.kind == "float":
        expected = table[ids].astype(np.float16)
    else:
        form = precision.table
        quantized = quantize_blocks(np.asarray(table, np.float32), form.bits, form.block_size, form.symmetric)
        expected = dequantize_blocks(quantized)[ids]
    assert np.abs(found - expected).max() <= 2e-3 * np.abs(expected).max()


def test_lengths_decide_and_the_largest_total_only_bounds(cuda_bundle: Any) -> None:
    """A captured step is given the cache's capacity as the largest length; the rows' own lengths are in seqlens_k."""
    bundle = cuda_bundle("fp16")
    runner = OrtEngine(bundle, threads=1)
    model = VisionLanguageModel(bundle, runner, capacity=64)
    logits = []
    for bound in (None, 64):
        decoder = model.decoder()
        decoder.prefill(0, np.arange(5), np.broadcast_to(np.arange(5), (3, 5)))
        feeds = decoder._feeds(np.array([[9]]), np.full((3, 1, 1), 5), decoder.cache.lengths[:1])
        feeds |= {"image_slots": np.zeros(0, np.int64), "image_embeds": np.zeros((0, 64)), "logits_rows": np.zeros(1)}
        if bound is not None:
            feeds["total_sequence_length"] = np.array([bound], np.int32)
        logits.append(runner.decoder.run(feeds, decoder.cache.view(0, 1))["logits"])
    assert np.array_equal(*logits)


def test_precisions_without_cuda_kernels_are_refused(tiny: Pair, tmp_path: Path) -> None:
    cases: tuple[tuple[dict[str, Any], str], ...] = (
        (
            {"precision": "int8"},
            r"precision 'int8' is unknown for target 'cuda'; expected one of fp16, int8-weights, int4",
        ),
        ({"vision_precision": "int8"}, r"vision precision 'int8' has no CUDA kernels.*offers fp16, fp32"),
        ({"decoder_precision": "hybrid"}, r"decoder precision 'hybrid' has no CUDA kernels.*int8-weights, int4"),
        ({"decoder_precision": "fp32"}, "decoder precision 'fp32' has no CUDA kernels"),
        ({"vision_precision": "int1"}, "vision precision 'int1' is unknown"),
    )
    for options, message in cases:
        with pytest.raises(InputError, match=message):
            export_bundle(tiny.checkpoint, tmp_path / "b", replace(ExportOptions(target="cuda"), **options))
        assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------- no silent fallback


def test_a_session_on_the_cpu_is_refused(cuda_bundle: Any) -> None:
    path = cuda_bundle("fp16").path("vision.onnx")
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    with pytest.raises(EngineError, match=r"asked for CUDAExecutionProvider, got CPUExecutionProvider"):
        check_providers(path, session.get_providers())
    check_providers(path, ["CUDAExecutionProvider", "CPUExecutionProvider"])


def test_a_session_on_cuda_is_refused_where_the_provider_is_not(cuda_bundle: Any) -> None:
    if "CUDAExecutionProvider" in ort.get_available_providers():
        pytest.skip("onnxruntime-gpu is here")
    path = cuda_bundle("fp16").path("vision.onnx")
    with pytest.raises(EngineError, match=r"vision.onnx: onnxruntime .* cannot run it on CUDA: .*'edgevl\[ort-gpu\]'"):
        cuda_session(path, GpuOptions(), capture=False)


def provider_files(folder: Path, monkeypatch: pytest.MonkeyPatch, cuda: str) -> None:
    """An onnxruntime-gpu whose CUDA provider is the C source `cuda`, or a file that is no library where it is empty."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler")
    (folder / "capi").mkdir()
    for name, source in (("shared", "int shared;"), ("cuda", cuda)):
        library = folder / "capi" / f"libonnxruntime_providers_{name}.so"
        library.write_bytes(b"")
        if source:
            command = [compiler, "-shared", "-fPIC", "-x", "c", "-", "-o", str(library)]
            subprocess.run(command, input=source, text=True, check=True)
    monkeypatch.setattr(ort, "__file__", str(folder / "__init__.py"))
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"])


@pytest.mark.skipif(sys.platform != "linux", reason="files as on Linux")
@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("int cuda;", None),
        ("", "its CUDA provider does not load: .*libonnxruntime_providers_cuda.so: .*; install the CUDA and cuDNN"),
        # onnxruntime-gpu 1.26 and 1.28, where onnxruntime has not set its side up
        ("__attribute__((constructor)) static void load(void) { *(volatile int *)8 = 1; }", None),
    ],
    ids=["loads", "lacks a library", "dies"],
)
def test_a_provider_that_dies_as_it_is_loaded_does_not_take_us_along(
    source: str, problem: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    provider_files(tmp_path, monkeypatch, source)
    found = provider_problem()
    assert found is None if problem is None else found is not None and re.match(problem, found), found


def test_a_session_that_fails_is_one_line_and_nothing_is_printed(
    cuda_bundle: Any, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """ONNX Runtime's own fallback prints to stdout and tries the CPU."""

    def fail(self: Any, *_: Any) -> None:
        where = "; GPU=-1 ; hostname=orin ; file=cuda_execution_provider_info.cc ; line=67 ;"
        raise RuntimeError(f"{'x' * 400}CUDA failure 35: CUDA driver version is\ninsufficient for CUDA runtime {where}")

    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"])
    monkeypatch.setattr(ort.InferenceSession, "_create_inference_session", fail)
    with pytest.raises(
        EngineError, match=r"on CUDA: CUDA failure 35: CUDA driver version is insufficient for CUDA \w+$"
    ):
        cuda_session(cuda_bundle("fp16").path("vision.onnx"), GpuOptions(), capture=False)
    assert capfd.readouterr().out == ""


def test_why_a_session_fell_back_is_asked_for(cuda_bundle: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Any, *_: Any) -> None:
        raise RuntimeError("This session contains graph nodes ... but fallback to CPU EP has been explicitly disabled")

    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"])
    monkeypatch.setattr(ort.InferenceSession, "_create_inference_session", fail)
    monkeypatch.setattr(ort_cuda_engine, "provider_problem", lambda: "its CUDA provider does not load: libcudnn.so.9")
    with pytest.raises(EngineError, match=r"on CUDA: its CUDA provider does not load: libcudnn.so.9, or use --engine"):
        cuda_session(cuda_bundle("fp16").path("vision.onnx"), GpuOptions(), capture=False)


@NO_GPU
@pytest.mark.parametrize("name", ["ort-cuda", "tensorrt"])
def test_asking_for_an_engine_that_is_not_here_is_one_line_and_status_2(
    tiny: Pair, cuda_bundle: Any, name: str, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = cuda_bundle("fp16").folder if name == "ort-cuda" else tiny.bundle
    assert cli.run(["run", str(folder), "hi", "--engine", name]) == 2
    out, err = capfd.readouterr()
    assert out == "" and err.count("\n") == 1 and f"engine {name!r} cannot run here: " in err
    assert ("no NVIDIA GPU is found" if name == "ort-cuda" else "export with --target tensorrt") in err


@NO_GPU
def test_auto_says_what_it_took_and_why_not_the_others(cuda_bundle: Any) -> None:
    notes: list[str] = []
    bundle = cuda_bundle("fp16")
    opened = open_engine(bundle, "auto", threads=1, notice=notes.append)
    assert opened.name == "ort-cpu"
    (note,) = notes
    assert note.startswith("engine: ort-cpu (onnxruntime ") and note.count("\n") == 0
    assert "; not tensorrt: the bundle was exported for 'cuda'" in note and "; not ort-cuda: no NVIDIA GPU" in note


def test_auto_takes_the_first_that_is_usable(tiny: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorRT, then CUDA, then the CPU; only the choice is looked at, nothing is opened."""
    bundle = Bundle.open(tiny.bundle)
    usable = {"ort-cpu": True, "ort-cuda": True, "tensorrt": False}
    notes: list[str] = []

    def status(of: Bundle) -> list[EngineStatus]:
        return [EngineStatus(n, ok, "fine" if ok else "no plans") for n, ok in usable.items()]

    chosen = engine._first_usable(bundle, {s.name: s for s in status(bundle)}, notes.append)
    assert chosen == "ort-cuda" and notes == ["engine: ort-cuda (fine); not tensorrt: no plans"]
    usable["tensorrt"] = True
    assert engine._first_usable(bundle, {s.name: s for s in status(bundle)}, notes.append) == "tensorrt"
    assert notes[1] == "engine: tensorrt (fine)"
    usable.update({"ort-cpu": False, "ort-cuda": False, "tensorrt": False})
    with pytest.raises(EngineError, match="no engine is usable here: tensorrt: no plans; ort-cuda: no plans; ort-cpu"):
        engine._first_usable(bundle, {s.name: s for s in status(bundle)}, None)


def test_status_follows_the_bundle(tiny: Pair, cuda_bundle: Any) -> None:
    here = {s.name: s for s in engine_status()}
    assert here["ort-cpu"].usable
    cpu = {s.name: s for s in engine_status(Bundle.open(tiny.bundle))}
    assert cpu["ort-cpu"].usable and "exported for 'cpu'; export with --target cuda" in cpu["ort-cuda"].detail
    cuda = {s.name: s for s in engine_status(cuda_bundle("fp16"))}
    assert cuda["ort-cpu"].usable and "exported for" not in cuda["ort-cuda"].detail
    assert not any("not yet" in s.detail or " yet" in s.detail for s in here.values())


class Device(HostCuda):
    """Notes the threads whose current device it became."""

    def __init__(self) -> None:
        super().__init__()
        self.threads: list[int] = []

    def use(self) -> None:
        self.threads.append(threading.get_ident())


def test_a_closed_engine_frees_its_sessions_whoever_holds_its_graphs(
    cuda_bundle: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The vision stage and decoders of a closed model still refer to graphs."""

    def on_the_cpu(path: Path, *_: Any) -> ort.InferenceSession:
        return ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    monkeypatch.setattr(ort_cuda_engine, "cuda_session", on_the_cpu)
    monkeypatch.setattr(ort_cuda_engine, "CudaRuntime", lambda number: Device())
    opened = OrtCudaEngine(cuda_bundle("fp16"))
    held = [opened.vision, opened.decoder]
    sessions = [weakref.ref(graph._session) for graph in held]
    opened.close()
    gc.collect()
    assert [session() for session in sessions] == [None, None]
    with pytest.raises(EngineError, match="graph 'vision' is closed; open the model again"):
        held[0].run({})


def test_a_run_makes_its_device_that_of_the_thread(cuda_bundle: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """`serve --gpu 1` opens in one thread and runs in another."""
    device = Device()
    monkeypatch.setattr(ort_cuda_engine, "cuda_session", lambda path, *_: ort.InferenceSession(str(path)))
    monkeypatch.setattr(ort_cuda_engine, "CudaRuntime", lambda number: device)
    opened = OrtCudaEngine(cuda_bundle("fp16"))
    device.threads.clear()

    def run() -> None:
        with suppress(KeyError):  # the device comes first, then that there are no feeds
            opened.vision.run({})

    with ThreadPoolExecutor(1) as pool:
        pool.submit(run).result()
    assert len(device.threads) == 1 and device.threads[0] != threading.get_ident()


def test_gpu_options_are_checked() -> None:
    with pytest.raises(InputError, match="GPU number is -1"):
        GpuOptions(device=-1)
    with pytest.raises(InputError, match="memory limit is 0"):
        GpuOptions(memory=0)


def test_captured_steps_are_numbered_by_what_must_be_the_same() -> None:
    numbers = GraphNumbers(most=2)
    assert [numbers.number(k) for k in ((1, 9), (2, 9), (1, 9), (3, 9), (2, 9))] == [1, 2, 1, None, 2]


def test_output_shapes_follow_from_the_feeds(cuda_bundle: Any) -> None:
    graphs = cuda_bundle("fp16").graphs
    patches = {"patches": np.zeros((2, 24, 1176))}
    assert output_shape(graphs["vision"].spec, "image_embeds", patches, 4) == (12, 64)
    assert output_shape(graphs["decoder"].spec, "logits", {"logits_rows": np.zeros(3)}, 4) == (3, 512)


# ---------------------------------------------------------------------- doctor


def test_a_jetson_is_described() -> None:
    release = "# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, EABI: aarch64, DATE: Wed Jan  8 2025\n"
    assert parse_release(release) == "Jetson Linux 36.4.3 (JetPack 6)"
    assert parse_release("# R38 (release), REVISION: 2.0, GCID: 1") == "Jetson Linux 38.2.0 (JetPack 7)"
    assert parse_release("nonsense") == "Jetson Linux of unknown release"
    assert parse_power_mode("NV Power Mode: MAXN_SUPER\n2\n") == "MAXN_SUPER"
    assert parse_power_mode("NVPM WARN: fan mode is not set!\n") is None
    if not Path("/etc/nv_tegra_release").exists():
        assert jetson_facts() == {}


@NO_GPU
def test_doctor_says_that_there_is_no_gpu(capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["doctor", "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    assert found["machine"]["gpu"].startswith("none")
    assert {e["name"]: e["usable"] for e in found["engines"]} == USABLE
