"""export/tensorrt_build.py with TensorRT-RTX's own parser and builder, which need no GPU."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from checkpoints import DEMO
from click.testing import CliRunner
from conftest import MakePair, Pair
from quantized import CASES
from trt_checkpoints import shaped_checkpoint, static_int8_checkpoint

from edgevl.export import build_progress, tensorrt_build
from edgevl.export.build_command import build
from edgevl.export.exporter import ExportOptions, export_bundle
from edgevl.export.plan_lint import lint_bundle_graphs, lint_plans, read_programs
from edgevl.export.tensorrt_build import BuildOptions, build_plans
from edgevl.runtime import tensorrt_library
from edgevl.runtime.bundle import Bundle
from edgevl.runtime.cli import run
from edgevl.runtime.errors import BundleError, EngineError, InputError
from edgevl.runtime.gpu import Gpu
from edgevl.runtime.plans import find_plans

trt = pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx has no wheel for this platform, or is not installed")

LARGE = pytest.mark.skipif(
    not os.environ.get("EDGEVL_LARGE_TESTS"), reason="minutes and 3 GB of memory; EDGEVL_LARGE_TESTS=1 runs it"
)
CAPACITY = 256
SM86 = BuildOptions(targets=("sm86",))
KINDS = {  # (target, precision) -> options of the export
    ("tensorrt", "fp16"): {},
    ("tensorrt", "bf16"): {},
    ("tensorrt", "int4"): {"block_size": 32, "head_bits": 4},
    ("jetpack6", "fp16"): {},
    ("jetpack6", "int4"): {"block_size": 32},
}


def _export(checkpoint: Path, folder: Path, target: str, precision: str, **options: Any) -> Bundle:
    export_bundle(checkpoint, folder, ExportOptions(precision, target=target, max_tokens=CAPACITY, **options))
    return Bundle.open(folder)


@pytest.fixture(scope="module")
def pair(make_pair: MakePair) -> Pair:
    return make_pair(hidden_size=128, intermediate_size=256)


@pytest.fixture(scope="module")
def standard(pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A small int4 bundle; plans are built into it."""
    folder = tmp_path_factory.mktemp("build") / "b"
    return _export(pair.checkpoint, folder, "tensorrt", "int4", **KINDS["tensorrt", "int4"])


@pytest.fixture(scope="module")
def report(standard: Bundle) -> tensorrt_build.BuildReport:
    return build_plans(standard, BuildOptions(targets=("sm89", "sm86"), rows=2, prefill=64, frames=2))


# ---------------------------------------------------------------------- every graph goes through the builder


@pytest.mark.parametrize(("target", "precision"), KINDS)
def test_full_depth(target: str, precision: str, tmp_path: Path) -> None:
    """The demo model at its whole depth: built, and fused as it should be."""
    bundle = _export(DEMO, tmp_path / "b", target, precision, **KINDS[target, precision])
    assert lint_bundle_graphs(bundle) == []
    plans = build_plans(bundle, SM86).plans
    assert lint_plans(bundle, plans) == []


@pytest.mark.parametrize(
    ("shape", "target", "precision", "fields"),
    [
        ("2b", "tensorrt", "fp16", {}),
        ("2b", "tensorrt", "int4", {}),
        ("2b", "jetpack6", "int4", {}),
        ("7b", "tensorrt", "int4", {}),
        ("72b", "tensorrt", "int4", {"intermediate_size": 7392}),  # a quarter: blocks of 32, and 1 GB of memory
        pytest.param("72b", "tensorrt", "int4", {}, marks=LARGE),
        pytest.param("72b", "jetpack6", "int4", {}, marks=LARGE),
        pytest.param("7b", "tensorrt", "fp16", {}, marks=LARGE),
    ],
)
def test_one_layer_of_true_width(
    shape: str, target: str, precision: str, fields: dict[str, int], tmp_path: Path
) -> None:
    checkpoint = shaped_checkpoint(tmp_path / "c", shape, **fields)
    bundle = _export(checkpoint, tmp_path / "b", target, precision)
    shutil.rmtree(checkpoint)
    assert lint_bundle_graphs(bundle) == []
    plans = build_plans(bundle, SM86).plans
    assert lint_plans(bundle, plans) == []
    if precision == "int4":  # once, not once per profile
        assert plans.plans["decoder"].size < 1.2 * bundle.files["decoder.onnx.data"].size + 4e6


@pytest.mark.skipif("static activations" not in CASES, reason="this reader knows no static activation scales")
@pytest.mark.parametrize("target", ["tensorrt", "jetpack6"])
def test_static_int8(target: str, tmp_path: Path) -> None:
    """W8A8 decoder and vision encoder: int8 products, no weight written out in float16."""
    checkpoint = static_int8_checkpoint(tmp_path / "c")
    options = ExportOptions("int8", vision_precision="int8", target=target, max_tokens=CAPACITY)
    export_bundle(checkpoint, tmp_path / "b", options)
    bundle = Bundle.open(tmp_path / "b")
    assert bundle.precision == "vision int8, decoder int8" and lint_bundle_graphs(bundle) == []
    plans = build_plans(bundle, SM86).plans
    assert lint_plans(bundle, plans) == []
    for role in ("vision", "decoder"):
        for program in read_programs(plans.path(role)):
            products = [k for k in program.kernels if any(program.types.get(n) == "int8" for n in k.inputs)]
            assert len(products) >= 4 * (6 if role == "vision" else 4)


# ---------------------------------------------------------------------- what a build leaves


def test_plans_are_described(standard: Bundle, report: tensorrt_build.BuildReport) -> None:
    plans = report.plans
    assert find_plans(standard).sets == (plans,) and plans.stale(standard) is None
    plans.check_files(verify_hashes=True)
    assert plans.folder.name == f"tensorrt_rtx-{trt.__version__}-sm86+sm89"
    assert plans.capabilities == ((8, 6), (8, 9)) and plans.matches(trt.__version__, (8, 9), "tensorrt_rtx") is None
    assert (plans.capacity, plans.max_rows, plans.max_prefill) == (CAPACITY, 2, 64)
    decoder = plans.plans["decoder"]
    decode, prefill = (decoder.profile(n)[1].shapes for n in ("decode", "prefill"))
    assert decode["input_ids"].max == (2, 1) and prefill["input_ids"].max == (1, 64)
    assert decode["past_key_values.0.key"].max[2] == CAPACITY == prefill["attention_mask"].max[3]
    # pictures of the demo's processor, as far as the cache holds them; two frames at once
    budget = min(standard.image_processor.max_pixels // 196, 4 * CAPACITY)
    assert plans.max_patches == budget and prefill["image_embeds"].max[0] == max(64, 2 * budget // 4)
    assert plans.plans["vision"].profile("vision")[1].shapes["patches"].max == (2, budget, 1176)
    assert {p.profile for p in read_programs(plans.path("decoder"))} == {0, 1}


def test_the_header_of_a_plan_is_valid(report: tensorrt_build.BuildReport, tmp_path: Path) -> None:
    """TensorRT's own word on the file; opening it needs a GPU."""
    log = tensorrt_library.BuildLog(tensorrt_library.find_tensorrt("tensorrt_rtx"))
    runtime = trt.Runtime(log.logger)
    for role in ("vision", "decoder"):
        header = report.plans.path(role).read_bytes()[: runtime.engine_header_size]
        assert runtime.get_engine_validity(header)[1] & int(trt.EngineInvalidityDiagnostics.MALFORMED_ENGINE) == 0
        garbage = runtime.get_engine_validity(bytes(len(header)))
        assert garbage[1] & int(trt.EngineInvalidityDiagnostics.MALFORMED_ENGINE)


def test_plans_that_exist_are_not_built_again(standard: Bundle, report: tensorrt_build.BuildReport) -> None:
    options = BuildOptions(targets=("sm86", "sm89"))
    with pytest.raises(BundleError, match="exists already; pass --overwrite"):
        build_plans(standard, options)


def test_stale_and_damaged_plans_are_replaced(pair: Pair, tmp_path: Path) -> None:
    bundle = _export(pair.checkpoint, tmp_path / "b", "tensorrt", "fp16")
    first = build_plans(bundle, SM86).plans
    described = json.loads((first.folder / "plans.json").read_text())
    described["plans"]["decoder"]["sources"]["decoder.onnx"] = "0" * 64
    (first.folder / "plans.json").write_text(json.dumps(described))
    again = build_plans(bundle, SM86).plans
    assert again.stale(bundle) is None
    (again.folder / "decoder.plan").write_bytes(b"half")
    build_plans(bundle, SM86).plans.check_files(verify_hashes=True)
    assert [p.name for p in again.folder.parent.iterdir()] == [again.folder.name]


def test_a_build_that_fails_leaves_nothing(pair: Pair, tmp_path: Path) -> None:
    bundle = _export(pair.checkpoint, tmp_path / "b", "tensorrt", "fp16")
    # The vision plan is built, then the decoder's graph cannot be read.
    (tmp_path / "b" / "decoder.onnx").write_bytes(b"not a graph")
    with pytest.raises(EngineError, match=r"decoder\.onnx: TensorRT-RTX .* cannot read it"):
        build_plans(bundle, SM86)
    assert not (tmp_path / "b" / "engines").exists()


def test_a_killed_build_leaves_nothing_that_opens(pair: Pair, tmp_path: Path) -> None:
    bundle = _export(pair.checkpoint, tmp_path / "b", "tensorrt", "fp16")
    command = [sys.executable, "-m", "edgevl.runtime", "build", str(bundle.folder), "--for", "sm86"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=dict(os.environ))
    partial = bundle.path("engines") / f".tensorrt_rtx-{trt.__version__}-sm86.partial"
    deadline = time.monotonic() + 60
    while not partial.exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert partial.exists() and find_plans(bundle).sets == ()
    build_plans(bundle, SM86)  # the rest of the dead one is cleared
    assert len(find_plans(bundle).sets) == 1 and not partial.exists()


def test_a_full_disk_is_told(pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = _export(pair.checkpoint, tmp_path / "b", "tensorrt", "fp16")

    def full(self: Path, data: Any) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(BundleError, match="cannot be written \\(No space left on device\\)"):
        build_plans(bundle, SM86)
    assert not (tmp_path / "b" / "engines").exists()


def test_progress_and_cancelling(standard: Bundle) -> None:
    library = tensorrt_library.find_tensorrt("tensorrt_rtx")
    seen: list[tuple[str, int, int]] = []
    monitor = build_progress.progress_monitor(library, lambda *step: seen.append(step), lambda: len(seen) > 3)
    assert monitor is not None
    monitor.phase_start("Building", None, 5)
    assert monitor.step_complete("Building", 0) and monitor.step_complete("Building", 1)
    assert not monitor.step_complete("Building", 2)  # told to stop
    monitor.phase_finish("Building")
    assert seen == [("Building", 0, 5), ("Building", 1, 5), ("Building", 2, 5), ("Building", 3, 5), ("Building", 5, 5)]


def test_ctrl_c_ends_a_build_that_tells_nobody(
    standard: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """stderr is no terminal: no progress is shown, and TensorRT still asks whether to go on."""
    steps: list[bool] = []

    def pressed(library: Any, progress: Any, cancelled: Any) -> Any:
        def asked() -> bool:
            if len(steps) == 2:
                signal.raise_signal(signal.SIGINT)
            steps.append(cancelled())
            return steps[-1]

        return build_progress.progress_monitor(library, progress, asked)

    monkeypatch.setattr(tensorrt_build, "progress_monitor", pressed)
    folder = tmp_path / "b"
    shutil.copytree(standard.folder, folder, ignore=shutil.ignore_patterns("engines"))
    with pytest.raises(KeyboardInterrupt):
        build_plans(Bundle.open(folder), SM86, progress=None)
    assert steps[:2] == [False, False] and True in steps
    assert not (folder / "engines").exists()


def test_ctrl_c_between_the_renames_keeps_the_old_plans(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = _export(pair.checkpoint, tmp_path / "b", "tensorrt", "fp16")
    first = build_plans(bundle, SM86).plans
    rename = Path.rename

    def interrupted(self: Path, target: Path) -> Path:
        if self.name.endswith(".partial"):
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        build_plans(bundle, SM86, overwrite=True)
    assert find_plans(bundle).sets == (first,)
    assert [p.name for p in first.folder.parent.iterdir()] == [first.folder.name]


def test_weights_may_stream_and_memory_may_be_limited(pair: Pair, tmp_path: Path) -> None:
    bundle = _export(pair.checkpoint, tmp_path / "b", "tensorrt", "fp16")
    options = BuildOptions(
        targets=("sm86",), weight_streaming=True, workspace=64 << 20, timing_cache=tmp_path / "t", optimization_level=1
    )
    report = build_plans(bundle, options)
    assert lint_plans(bundle, report.plans) == [] and report.plans.weight_streaming
    assert report.notes == ("no timing cache: kernels are not timed in a build without the device",)
    assert not (tmp_path / "t").exists()


# ---------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"targets": ("sm87",)}, r"does not build for sm87; expected some of sm75, sm80, sm86, sm89, sm120, sm121"),
        ({"targets": ("ampere", "sm86")}, "does not build for ampere"),
        ({"targets": ("sm86",), "refit": True}, "plans that can be refitted are built on their GPU only"),
        ({"targets": ("sm86",), "gpu": 0}, "plans for named targets are built on no GPU; leave --for or --gpu away"),
        ({"targets": ("sm75",)}, "int4 weights have no kernels on sm75"),
        ({"targets": ("sm86",), "rows": 0}, "profile rows is 0, expected 1 to 64"),
        ({"targets": ("sm86",), "prefill": CAPACITY + 1}, f"profile prefill is 257, expected 1 to {CAPACITY}"),
        ({"targets": ("sm86",), "max_pixels": 10**9}, "the KV cache holds 256: expected at most 200,704"),
        ({"targets": ("sm86",), "min_pixels": 99999, "max_pixels": 9999}, "profile pixels from 99,999 to 9,999"),
    ],
)
def test_wrong_options_are_told(standard: Bundle, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        build_plans(standard, BuildOptions(**options))


def test_no_gpu_and_no_targets(standard: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorrt_build, "current_gpu", lambda number=0: None)
    with pytest.raises(EngineError, match=r"no GPU is found here; name what to build for with --for \(sm75, sm80"):
        build_plans(standard, BuildOptions(flavour="tensorrt_rtx"))


def test_the_gpu_that_was_asked_for_is_built_for(standard: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    gpus, used = [Gpu("Small", (7, 5), 1), Gpu("Large", (9, 0), 1)], []
    monkeypatch.setattr(tensorrt_build, "current_gpu", lambda number=0: gpus[number])
    monkeypatch.setattr(tensorrt_build, "CudaRuntime", used.append)
    library = tensorrt_library.find_tensorrt("tensorrt_rtx")
    assert tensorrt_build._device(library, BuildOptions()) == ("Small", ((7, 5),)) and used == []
    assert tensorrt_build._device(library, BuildOptions(gpu=1)) == ("Large", ((9, 0),)) and used == [1]


def test_a_broken_tensorrt_does_not_hide_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    imported, spec = tensorrt_library.importlib.import_module, tensorrt_library.importlib.util.find_spec

    def broken(name: str) -> Any:
        if name == "tensorrt":
            raise AttributeError("numpy has no attribute\n'bool'")
        return imported(name)

    monkeypatch.setattr(tensorrt_library.importlib.util, "find_spec", lambda n: spec("tensorrt_rtx"))
    monkeypatch.setattr(tensorrt_library.importlib, "import_module", broken)
    assert tensorrt_library.find_tensorrt().flavour == "tensorrt_rtx"
    assert list(tensorrt_library.installed_versions()) == ["tensorrt_rtx"]
    with pytest.raises(EngineError, match="is installed but cannot be imported: numpy has no attribute 'bool'; "):
        tensorrt_library.find_tensorrt("tensorrt")


def test_a_bundle_for_another_engine(pair: Pair) -> None:
    with pytest.raises(BundleError, match="exported for 'cpu', not for TensorRT; export with --target tensorrt"):
        build_plans(Bundle.open(pair.bundle), SM86)


@pytest.fixture
def no_tensorrt(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(tensorrt_library.importlib.util, "find_spec", lambda name: None)
    yield


@pytest.mark.parametrize(
    ("system", "machine", "jetson", "advice"),
    [
        ("linux", "x86_64", False, "pip install tensorrt-cu12"),
        ("linux", "aarch64", True, "JetPack: sudo apt install python3-libnvinfer"),
        ("linux", "riscv64", False, "there is none for riscv64"),
        ("darwin", "arm64", False, "none for macOS"),
        ("win32", "AMD64", False, "pip install tensorrt-rtx"),
    ],
)
def test_no_tensorrt_says_what_to_install(
    no_tensorrt: None, monkeypatch: pytest.MonkeyPatch, system: str, machine: str, jetson: bool, advice: str
) -> None:
    exists = Path.exists
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr(tensorrt_library.platform, "machine", lambda: machine)
    monkeypatch.setattr(Path, "exists", lambda p: jetson if "nv_tegra" in str(p) else exists(p))
    with pytest.raises(EngineError, match=f"TensorRT is not installed here; .*{advice}"):
        tensorrt_library.find_tensorrt()


def test_an_old_tensorrt_is_told(standard: Bundle) -> None:
    class Old:
        __version__ = "10.3.0"

    library = tensorrt_library.TensorRT("tensorrt", Old)
    assert library.at_least("10.3") and not library.at_least("10.15") and library.targets() == []
    with pytest.raises(
        EngineError, match=r"TensorRT 10\.3\.0 is too old .* needs 10\.15; export with --target jetpack6"
    ):
        tensorrt_build._check_version(standard, library)


# ---------------------------------------------------------------------- the command


def test_the_command(pair: Pair, tmp_path: Path) -> None:
    bundle = _export(pair.checkpoint, tmp_path / "b", "tensorrt", "fp16")
    done = CliRunner().invoke(
        build, [str(bundle.folder), "--for", "sm86", "--profile", "rows=2,prefill=32", "--lint"], standalone_mode=False
    )
    assert done.exit_code == 0 and done.return_value == 0, done.output
    assert "decode, prefill" in done.stdout and "rows up to 2, prefill up to 32" in done.stdout
    assert "fused as they should be" in done.stderr
    (plans,) = find_plans(bundle).sets
    assert plans.device == "sm86"


@pytest.mark.parametrize("profile", ["rows", "rows=x", "batch=3", "rows=2;prefill=3"])
def test_a_wrong_profile_is_told(standard: Bundle, profile: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["build", str(standard.folder), "--for", "sm86", "--profile", profile]) == 2
    assert "is not understood; expected rows=N, prefill=N" in capsys.readouterr().err


def test_the_lint_fails_the_command(pair: Pair, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A decoder without its explicit scale is told before anything is built."""
    import onnx

    bundle = _export(pair.checkpoint, tmp_path / "b", "tensorrt", "fp16")
    path = bundle.path("decoder.onnx")
    model = onnx.load(path, load_external_data=False)
    for node in model.graph.node:
        if node.op_type == "Attention":
            del node.attribute[:]
    size = path.stat().st_size
    onnx.save(model, path)
    path.write_bytes(path.read_bytes().ljust(size, b"\0")[:size]) if path.stat().st_size > size else None
    manifest = json.loads((bundle.folder / "manifest.json").read_text())
    manifest["files"]["decoder.onnx"]["size"] = path.stat().st_size
    (bundle.folder / "manifest.json").write_text(json.dumps(manifest))
    assert run(["build", str(bundle.folder), "--for", "sm86", "--lint"]) == 1
    assert "Attention_0: no explicit scale" in capsys.readouterr().err
    assert not bundle.path("engines").exists()
