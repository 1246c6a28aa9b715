"""edgevl.MatMulNBits through ONNX Runtime, beside com.microsoft's; its refusals; and the library that has it."""

from __future__ import annotations

import ctypes
import gc
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from conftest import MakePair
from native_oracle import Weights, norm, product, random_weights, resident_kb, usable_instructions, usable_library
from onnx import TensorProto, helper, numpy_helper

from edgevl.runtime import cli, native_kernels, openvino_engine
from edgevl.runtime import doctor as runtime_doctor
from edgevl.runtime.bundle import Bundle
from edgevl.runtime.engine import engine_status, open_engine
from edgevl.runtime.errors import EngineError, InputError
from edgevl.runtime.native_kernels import SWITCH, kernel_instructions, native_library
from edgevl.runtime.ttft import machine_of

OURS, THEIRS = "edgevl", "com.microsoft"


def model(domain: str, w: Weights, *, axis: int | str | None = None, g_idx: bool = False, **attributes: int) -> bytes:
    """y = MatMulNBits(x) with one of its formats, K of x being `axis`."""
    initializers = {"codes": w.packed_codes(), "scales": w.scales, "zeros": w.packed_zeros()}
    initializers |= {"order": np.arange(w.columns, dtype=np.int32) // w.block if g_idx else None, "bias": w.bias}
    names = ["x", *(name if array is not None else "" for name, array in initializers.items())]
    said: dict[str, Any] = {"N": len(w.codes), "K": w.columns, "bits": w.bits, "block_size": w.block}
    said |= {"accuracy_level": 4, **attributes}
    node = helper.make_node("MatMulNBits", names, ["y"], domain=domain, **said)
    shape = ["batch", "sequence", w.columns if axis is None else axis]
    graph = helper.make_graph(
        [node],
        "product",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", "sequence", "outputs"])],
        [numpy_helper.from_array(np.ascontiguousarray(a), n) for n, a in initializers.items() if a is not None],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(domain, 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()


@pytest.fixture(scope="module")
def library() -> Path:
    return usable_library()


def run(content: bytes, x: np.ndarray, library: Path, threads: int = 1, **beside: np.ndarray) -> np.ndarray:
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 4
    options.register_custom_ops_library(str(library))
    session = ort.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"x": x, **beside})[0])


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("block", [32, 64, 128, 256])
@pytest.mark.parametrize("extras", [False, True], ids=["plain", "zero points and bias"])
def test_it_is_onnx_runtimes_own(library: Path, bits: int, block: int, extras: bool) -> None:
    """The same codes of x, summed in another order; one task and several, of which the last is short."""
    for n, k in ((70, 97), (150, 4096)):
        w = random_weights(bits, block, n, k, zeros=extras, bias=extras)
        for shape in ((1, 1), (2, 3), (1, 29)):
            x = np.random.default_rng(shape).normal(size=(*shape, k)).astype(np.float32)
            expected, off = product(w, x.reshape(-1, k))
            found = [run(model(OURS, w), x, library, threads) for threads in (1, 2)]
            assert found[0].shape == (*shape, n)
            np.testing.assert_array_equal(found[0], found[1])
            for y in (found[0], run(model(THEIRS, w), x, library)):
                assert (np.abs(y.reshape(-1, n) - expected) <= off).all(), (n, k, shape)


@pytest.mark.parametrize("which", [("gate",), ("residual",), ("gate", "residual")])
@pytest.mark.parametrize("rows", [1, 29])
def test_a_gate_and_a_residual(library: Path, rows: int, which: tuple[str, ...]) -> None:
    """y × gate × sigmoid(gate) + residual; several tasks, of which the last is short."""
    w = random_weights(4, 128, 150, 4096, zeros=True, bias=True)
    rng = np.random.default_rng(rows)
    x = rng.normal(size=(1, rows, 4096)).astype(np.float32)
    beside = {name: (rng.normal(size=(1, rows, 150)) * 4).astype(np.float32) for name in which}
    if "gate" in which:
        beside["gate"][0, 0, :5] = [-200, 200, 0, -0.5, 88]
    expected, off = product(w, x[0])
    gate = beside["gate"][0].astype(np.float64) if "gate" in which else None
    factor = 1 if gate is None else gate / (1 + np.exp(-np.maximum(gate, -700)))
    residual = beside["residual"][0] if "residual" in which else 0
    content = with_inputs(model(OURS, w), beside)
    for threads in (1, 2):
        y = run(content, x, library, threads, **beside)[0]
        bound = (
            off * np.abs(factor) + 5e-7 * (np.abs(expected * factor) + np.abs(residual)) + 1e-30
        )  # 2^-126 is the least
        assert (np.abs(y - (expected * factor + residual)) <= bound).all()
    with pytest.raises(Exception, match="gate or residual is not of the output's shape"):
        run(content, x, library, 1, **{name: value[:, :, :40] for name, value in beside.items()})


def with_inputs(content: bytes, beside: dict[str, np.ndarray]) -> bytes:
    """The model with its product's last inputs."""
    found = onnx.load_from_string(content)
    names = [name if name in beside else "" for name in ("gate", "residual")]
    found.graph.node[0].input.extend(names if names[1] else names[:1])
    shape = ["batch", "sequence", "columns"]
    found.graph.input.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in beside)
    return found.SerializeToString()


@pytest.mark.parametrize("bias", [False, True], ids=["RMSNorm", "LayerNorm"])
@pytest.mark.parametrize("rows", [1, 4, 29])
def test_rows_are_normalized_first(library: Path, rows: int, bias: bool) -> None:
    """What float32 is off by in the norm may move a code: a step of 1/127 of the largest number, once or twice."""
    w, rng = random_weights(4, 128, 150, 1000, zeros=True, bias=True), np.random.default_rng(rows)
    x = (rng.normal(size=(1, rows, 1000)) * 30 + 5).astype(np.float32)
    norms = {"norm_weight": rng.normal(size=1000), "norm_bias": rng.normal(size=1000) if bias else None}
    given = {name: array.astype(np.float32) for name, array in norms.items() if array is not None}
    given["norm_epsilon"] = np.array([1e-5], np.float32)
    rows_of = norm(x[0], given["norm_weight"], given.get("norm_bias"), 1e-5).astype(np.float32)
    expected, off = product(w, rows_of)
    for threads in (1, 2):
        y = run(with_constants(model(OURS, w), given), x, library, threads)[0]
        steps = np.abs(rows_of).max() / 127 * np.abs(w.scales).max() * 15
        assert (np.abs(y - expected) <= off + 2 * steps).all()
        assert np.median(np.abs(y - expected)) < np.median(np.abs(expected)) * 1e-5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"norm_epsilon": None}, "norm_weight and norm_epsilon go together"),
        ({"norm_weight": None}, "norm_weight and norm_epsilon go together"),
        ({"norm_weight": None, "norm_epsilon": None}, "and norm_bias with them"),
        ({"norm_weight": 63}, "norm_weight or norm_bias has not K numbers, or norm_epsilon not one"),
        ({"norm_bias": 65}, "norm_weight or norm_bias has not K numbers, or norm_epsilon not one"),
        ({"norm_epsilon": 2}, "norm_weight or norm_bias has not K numbers, or norm_epsilon not one"),
    ],
)
def test_half_a_norm_is_refused(library: Path, changes: dict[str, int | None], message: str) -> None:
    sizes = {"norm_weight": 64, "norm_bias": 64, "norm_epsilon": 1, **changes}
    given = {name: np.ones(size, np.float32) for name, size in sizes.items() if size is not None}
    content = with_constants(model(OURS, random_weights(4, 32, 40, 64, zeros=False, bias=True)), given)
    with pytest.raises(Exception, match=message):
        run(content, np.ones((1, 1, 64), np.float32), library)


def with_constants(content: bytes, given: dict[str, np.ndarray]) -> bytes:
    """The model with its product's norm: the inputs behind gate and residual."""
    found = onnx.load_from_string(content)
    names = ("norm_weight", "norm_bias", "norm_epsilon")
    found.graph.node[0].input.extend(["", "", *(name if name in given else "" for name in names)])
    found.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in given.items())
    return found.SerializeToString()


@pytest.mark.parametrize("shape", [(0, 3), (2, 0)])
def test_no_rows_are_no_outputs(library: Path, shape: tuple[int, int]) -> None:
    w = random_weights(4, 32, 40, 64, zeros=False, bias=True)
    for threads in (1, 2):
        assert run(model(OURS, w), np.zeros((*shape, 64), np.float32), library, threads).shape == (*shape, 40)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bits": 3}, "expected bits 4 or 8"),
        ({"block_size": 48}, "a block_size of 32, 64 or a multiple of 128"),
        ({"block_size": 16}, "a block_size of 32, 64 or a multiple of 128"),
        ({"block_size": 0}, "a block_size of 32, 64 or a multiple of 128"),
        ({"block_size": -128}, "a block_size of 32, 64 or a multiple of 128"),
        ({"N": 0}, "N and K of 1 to"),
        ({"K": 0}, "N and K of 1 to"),
        ({"N": 80}, "B, scales, zero_points or bias is not of the size"),
        ({"block_size": 64}, "B, scales, zero_points or bias is not of the size"),
        ({"axis": "width"}, "the last axis of A is not K"),
        ({"g_idx": True}, "takes no g_idx; reorder A's columns"),
    ],
)
def test_what_it_refuses(library: Path, changes: dict[str, Any], message: str) -> None:
    w = random_weights(4, 32, 40, 96, zeros=False, bias=False)
    width = 64 if "axis" in changes else 96
    with pytest.raises(Exception, match=f"edgevl.MatMulNBits: .*{message}"):  # onnxruntime's own class
        run(model(OURS, w, **changes), np.zeros((1, 2, width), np.float32), library)


def test_an_attribute_that_is_absent(library: Path) -> None:
    content = onnx.load_from_string(model(OURS, random_weights(4, 32, 40, 96, zeros=False, bias=False)))
    attributes = content.graph.node[0].attribute
    attributes.remove(next(a for a in attributes if a.name == "bits"))
    with pytest.raises(Exception, match="bits"):
        run(content.SerializeToString(), np.zeros((1, 2, 96), np.float32), library)


def test_sessions_share_the_domain(library: Path) -> None:
    """Registered again and again, and used after another session has gone."""
    w = random_weights(4, 32, 40, 96, zeros=False, bias=False)
    x = np.ones((1, 2, 96), np.float32)
    first = run(model(OURS, w), x, library)
    for _ in range(3):
        np.testing.assert_array_equal(run(model(OURS, w), x, library), first)


@pytest.mark.parametrize("name", ["codes", "scales", "zeros"])
def test_a_weight_that_is_not_a_constant(library: Path, name: str) -> None:
    """It is laid out as a session opens, so it must be there."""
    found = onnx.load_from_string(model(OURS, random_weights(4, 32, 40, 96, zeros=True, bias=False)))
    (moved,) = (i for i in found.graph.initializer if i.name == name)
    found.graph.input.append(helper.make_tensor_value_info(name, moved.data_type, list(moved.dims)))
    given = numpy_helper.to_array(moved)
    found.graph.initializer.remove(moved)
    with pytest.raises(Exception, match=r"edgevl.MatMulNBits: B, scales or zero_points is not a constant"):
        run(found.SerializeToString(), np.zeros((1, 2, 96), np.float32), library, 1, **{name: given})


# --------------------------------------------------------------------------------------- memory of weights


def opened(path: Path, library: Path) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.register_custom_ops_library(str(library))
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def in_file(w: Weights, folder: Path) -> Path:
    onnx.save(onnx.load_from_string(model(OURS, w)), folder / "m.onnx", save_as_external_data=True, location="m.data")
    return folder / "m.onnx"


def anonymous_kb() -> int:
    """Without what malloc keeps of freed memory, which depends on the tests before."""
    gc.collect()
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)
    (line,) = (x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("RssAnon:"))
    return int(line.split()[1])


@pytest.mark.skipif(not Path("/proc/self/pagemap").exists(), reason="pages are given back on Linux alone")
def test_a_weight_is_in_memory_once(library: Path, tmp_path: Path) -> None:
    """Its file's pages are given back when it is laid out, and sessions share what was laid out, whoever goes first."""
    w = random_weights(4, 32, 4096, 12288, zeros=True, bias=True)
    path, size_kb = in_file(w, tmp_path), 4096 * 12288 // 2048
    x = np.random.default_rng(0).normal(size=(1, 2, 12288)).astype(np.float32)
    before = anonymous_kb()
    first = opened(path, library)
    one = anonymous_kb()
    assert (tmp_path / "m.data").stat().st_size > size_kb * 1024
    assert resident_kb(tmp_path / "m.data") < 200
    assert one - before > size_kb
    second = opened(path, library)
    assert anonymous_kb() - one < size_kb // 4
    y = np.asarray(first.run(None, {"x": x})[0])
    del first
    assert resident_kb(tmp_path / "m.data") < 200
    np.testing.assert_array_equal(np.asarray(second.run(None, {"x": x})[0]), y)
    del second
    assert anonymous_kb() - before < size_kb // 4
    np.testing.assert_array_equal(np.asarray(opened(path, library).run(None, {"x": x})[0]), y)


@pytest.mark.parametrize("part", ["codes", "scales", "zeros"])
@pytest.mark.parametrize("row", [0, 69])
def test_weights_that_differ_in_one_number_are_two(library: Path, tmp_path: Path, part: str, row: int) -> None:
    """In their first tile or their last; both are open."""
    w = random_weights(8, 128, 70, 416, zeros=True, bias=False)
    array = getattr(w, part).copy()
    array.reshape(70, -1)[row, 1] += 1
    other = replace(w, **{part: array})
    x = np.random.default_rng(0).normal(size=(1, 1, 416)).astype(np.float32)
    sessions = []
    for name, weights in (("a", w), ("b", other)):
        (tmp_path / name).mkdir()
        sessions.append(opened(in_file(weights, tmp_path / name), library))
    for session, weights in zip(sessions, (w, other), strict=True):
        expected, off = product(weights, x[0])
        assert (np.abs(np.asarray(session.run(None, {"x": x})[0])[0] - expected) <= off).all()
    y, z = (np.asarray(s.run(None, {"x": x})[0])[0, 0] for s in sessions)
    assert y[row] != z[row] and (np.delete(y, row) == np.delete(z, row)).all()


# --------------------------------------------------------------------------------------- whether there is a library


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where the library is looked for, empty."""
    monkeypatch.delenv(SWITCH, raising=False)
    monkeypatch.setattr(native_kernels, "__file__", str(tmp_path / "native_kernels.py"))
    native_kernels._find.cache_clear()
    yield tmp_path
    native_kernels._find.cache_clear()


@pytest.fixture(scope="module")
def bundle(make_pair: MakePair) -> Bundle:
    return Bundle.open(make_pair("int4").bundle)


def said(bundle: Bundle | None, engine: str = "ort-cpu") -> str:
    status = next(s for s in engine_status(bundle) if s.name == engine)
    assert status.usable
    return status.detail


def told(bundle: Bundle) -> str:
    """What a user of `auto` reads."""
    notices: list[str] = []
    open_engine(bundle, threads=1, notice=notices.append).close()
    (notice,) = notices
    return notice


def doctor(capsys: pytest.CaptureFixture[str]) -> tuple[str, str]:
    """(its fact about the kernels, the detail of ort-cpu)."""
    assert cli.run(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    return found["machine"]["own kernels"], next(e["detail"] for e in found["engines"] if e["name"] == "ort-cpu")


def check_reason(reason: str, bundle: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    """It is said wherever somebody may look, and everything works without the kernels."""
    with pytest.raises(EngineError, match=rf"own kernels are not used: .*{reason}"):
        native_library()
    with pytest.raises(EngineError, match=reason):
        kernel_instructions()
    fact, detail = doctor(capsys)
    for text in (fact, detail, said(None), said(bundle), told(bundle)):
        assert re.search(reason, text), text
    assert fact.startswith("none: ")


def test_where_no_library_was_built(folder: Path, bundle: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    check_reason(r"not built \(no C compiler as edgevl was installed\); install gcc or clang", bundle, capsys)


@pytest.mark.parametrize("content", [b"", b"\x7fELF and no more", b"no library at all" * 100])
def test_a_damaged_library(folder: Path, content: bytes, bundle: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "_kernels.abi3.so").write_bytes(content)
    check_reason(r"_kernels.abi3.so cannot be loaded \(.*\); install edgevl again", bundle, capsys)


def test_a_library_of_something_else(folder: Path, bundle: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "_kernels.abi3.so").symlink_to(next(Path(ort.__file__).parent.glob("capi/onnxruntime_pybind11_state*")))
    check_reason(r"_kernels.abi3.so cannot be loaded \(.*\); install edgevl again", bundle, capsys)


def test_a_library_of_before(
    library: Path, folder: Path, bundle: Bundle, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Built from older sources, as where a clone was updated and not installed again."""
    (folder / "_kernels.abi3.so").symlink_to(library)
    monkeypatch.setattr(native_kernels, "_NEWEST", "edgevl_of_tomorrow")
    reason = r"cannot be loaded \(.*undefined symbol: edgevl_of_tomorrow\); install edgevl again"
    check_reason(reason, bundle, capsys)


def test_a_processor_without_the_instructions(
    library: Path, folder: Path, bundle: Bundle, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "_kernels.abi3.so").symlink_to(library)
    monkeypatch.setattr(native_kernels, "_instructions", lambda *_: "")
    check_reason("this processor has none of the instructions that they know", bundle, capsys)


def test_switched_off(
    library: Path, bundle: Bundle, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(SWITCH, "off")
    check_reason(f"{SWITCH} is off", bundle, capsys)


def test_instructions_that_are_not_here(
    library: Path, bundle: Bundle, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    name = next(name for name in ("neon-dotprod", "avx2") if name not in usable_instructions())
    monkeypatch.setenv(SWITCH, name)
    check_reason(f"{SWITCH} is {name}, which this processor does not have or the library does not know", bundle, capsys)


def test_instructions_by_name(library: Path, bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine has those that the switch names, and with none named the best."""
    usable = usable_instructions()
    for name in usable:
        monkeypatch.setenv(SWITCH, name)
        assert f"own kernels ({name})" in said(bundle)
    monkeypatch.delenv(SWITCH)
    assert f"own kernels ({usable[0]})" in said(bundle)


@pytest.mark.parametrize("switch", [None, "", "on"])
def test_switched_on(
    library: Path,
    bundle: Bundle,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    switch: str | None,
) -> None:
    monkeypatch.delenv(SWITCH, raising=False)
    if switch is not None:
        monkeypatch.setenv(SWITCH, switch)
    fact, detail = doctor(capsys)
    assert fact == kernel_instructions()
    for text in (detail, said(None), said(bundle), told(bundle)):
        assert f"own kernels ({fact})" in text


def test_a_switch_that_is_neither(
    bundle: Bundle, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(SWITCH, "maybe")
    message = f"{SWITCH} is 'maybe', expected on, off or one of avx512-vnni, avx-vnni, avx2, neon-dotprod"
    with pytest.raises(InputError, match=message):
        native_library()
    for name in ("auto", "ort-cpu"):
        with pytest.raises(EngineError, match=message):
            open_engine(bundle, name, threads=1)
    assert all(message in text for text in doctor(capsys))
    assert cli.run(["run", str(bundle.folder), "x"]) == 2
    assert message in capsys.readouterr().err
    assert cli.run(["inspect", str(bundle.folder), "--plan"]) == 2
    assert message in capsys.readouterr().err


def test_a_profile_is_of_a_machine_with_the_kernels_or_without(
    library: Path, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {}
    for switch in ("on", "off"):
        monkeypatch.setenv(SWITCH, switch)
        engine = open_engine(bundle, "ort-cpu", threads=1)
        found[switch] = machine_of(engine)
        engine.close()
    monkeypatch.setenv(SWITCH, "on")
    assert found["off"].engine == "ort-cpu"
    assert found["on"].engine == f"ort-cpu, own kernels ({kernel_instructions()})"


def test_a_bundle_without_a_native_decoder_says_nothing_of_them(
    make_pair: MakePair, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = Bundle.open(make_pair("fp32").bundle)
    for switch in ("on", "off", "maybe"):
        monkeypatch.setenv(SWITCH, switch)
        assert "own kernels" not in said(opened) + told(opened)


@pytest.mark.parametrize(
    ("flags", "said"),
    [("avx2 fma", True), ("avx2 avx_vnni", False), ("avx2 avx512f avx512_vnni", False), ("asimddp", False)],
)
def test_doctor_says_where_int8_products_of_onnx_runtime_overflow(
    flags: str, said: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runtime_doctor, "_cpuinfo", lambda: f"model name\t: Some CPU\nflags\t\t: fpu {flags}\n")
    facts = runtime_doctor.machine()
    assert ("in 16 bits" in facts.get("int8 products", "")) == said


@pytest.mark.parametrize("name", ["avx512-vnni", "avx2"])
def test_openvino_keeps_its_encoder_where_ours_was_not_seen_to_be_faster(
    library: Path, bundle: Bundle, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name not in usable_instructions(int8=True):
        pytest.skip(f"this processor has no {name}")
    monkeypatch.setenv(SWITCH, name)
    for tiles in (False, True):
        monkeypatch.setattr(openvino_engine, "has_int8_tiles", lambda tiles=tiles: tiles)
        assert openvino_engine.vision_on_openvino(bundle) == (tiles or name != "avx512-vnni")
