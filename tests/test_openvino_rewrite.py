"""Rewrites of an openvino.Model: the numbers are those of a formula in numpy, and the kernels are the wanted ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgevl.export.exporter import ExportOptions, export_bundle
from edgevl.runtime import openvino_rewrite
from edgevl.runtime.doctor import cpu_flags
from edgevl.runtime.openvino_rewrite import (
    has_int8_tiles,
    join_transposes,
    round_rows,
    slow_bfloat16,
    without_row_scales,
)

openvino = pytest.importorskip("openvino")

from openvino import opset13 as op  # noqa: E402  (needs openvino)

DEMO = Path(__file__).parent.parent / "demo" / "model"
EXACT = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
WIDTH, INNER = 64, 96
RNG = np.random.default_rng(3)
CODES = [RNG.integers(-127, 128, shape).astype(np.int8) for shape in ((INNER, WIDTH), (INNER, WIDTH), (WIDTH, INNER))]
SCALES = [RNG.uniform(0.001, 0.01, (len(c), 1)).astype(np.float32) for c in CODES]


@pytest.fixture(scope="module")
def vision(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rewrite") / "demo"
    export_bundle(DEMO, folder, ExportOptions(precision="int8"))
    return folder / "vision.onnx"


def scaled_product(x: Any, largest: Any, divided: Any, layer: int) -> Any:
    weight = op.multiply(op.convert(op.constant(CODES[layer]), "f32"), op.constant(SCALES[layer]))
    return op.multiply(op.matmul(divided, weight, False, True), largest)


def rows(x: Any) -> tuple[Any, Any]:
    largest = op.maximum(op.reduce_max(op.absolute(x), op.constant([-1]), True), op.constant(np.float32(1e-30)))
    return largest, op.divide(x, largest)


def small_model() -> Any:
    """x [1, rows, WIDTH]: two products over one input, their difference times a third weight."""
    x = op.parameter([1, -1, WIDTH], np.float32, name="x")
    a, b = (scaled_product(x, *rows_of_x, layer) for rows_of_x in [rows(x)] for layer in (0, 1))
    inner = op.subtract(a, b)
    return openvino.Model([op.result(scaled_product(inner, *rows(inner), 2))], [x], "small")


def rounded_product(x: np.ndarray, layer: int) -> np.ndarray:
    """float64: every row to 255 levels of its largest magnitude."""
    step = np.maximum(np.abs(x).max(-1, keepdims=True), 1e-30) / 127
    return np.rint(x / step) * step @ (CODES[layer] * SCALES[layer].astype(np.float64)).T


def run(model: Any, x: np.ndarray) -> tuple[np.ndarray, list[str]]:
    """The output, and the precisions in which its products ran."""
    compiled = openvino.Core().compile_model(model, "CPU", EXACT)
    ran = []
    for node in compiled.get_runtime_model().get_ordered_ops():
        info = {key: getattr(value, "value", value) for key, value in node.get_rt_info().items()}
        if info["layerType"] == "FullyConnected":
            ran.append(str(info["runtimePrecision"]))
    return np.array(compiled.create_infer_request().infer({0: x})[0]), ran


def count(model: Any, kind: str) -> int:
    return sum(node.get_type_name() == kind for node in model.get_ops())


def test_rows_are_rounded_one_by_one() -> None:
    """Rows of sizes far apart, one of zeros: within a hair of the formula (a value on the edge between two levels may
    fall to either side), and far from what float gives."""
    x = RNG.normal(0, 1, (1, 9, WIDTH)).astype(np.float32) * np.float32(10.0) ** np.arange(-4, 5)[None, :, None]
    x[0, 4] = 0
    model = small_model()
    assert round_rows(model) == 3 and count(model, "FakeQuantize") == 2  # one for both products over x
    got, ran = run(model, x)
    exact = x.astype(np.float64)
    expected = rounded_product(rounded_product(exact, 0) - rounded_product(exact, 1), 2)
    plain = [(c * s.astype(np.float64)).T for c, s in zip(CODES, SCALES)]
    unrounded = (exact @ plain[0] - exact @ plain[1]) @ plain[2]
    size = np.linalg.norm(expected, axis=-1)
    off, apart = (np.linalg.norm(e - expected, axis=-1)[size > 0] / size[size > 0] for e in (got, unrounded))
    assert off.max() < 0.25 * apart.min() and apart.min() > 2e-3
    assert np.all(got[0, 4] == 0)
    if "avx512_vnni" in cpu_flags():
        assert ran.count("i8") == 3  # else OpenVINO may compute in floats what stands here


def test_the_last_products_rows_do_not_keep_the_graph_in_float32(vision: Path) -> None:
    """Only the magnitudes that lead to an output are multiplied by one."""
    model = small_model()
    round_rows(model)
    assert count(model, "MatMul") == 3 + 1
    encoder = openvino.Core().read_model(str(vision))
    products = count(encoder, "MatMul")
    assert round_rows(encoder) == 26
    assert count(encoder, "MatMul") == products + 1


def test_row_scales_are_taken_out_again(vision: Path) -> None:
    """qkv, proj, fc1, fc2 of six blocks, and the merger's two; nothing else divides or finds a largest."""
    model = openvino.Core().read_model(str(vision))
    assert without_row_scales(model) == 6 * 4 + 2
    assert not {"Divide", "ReduceMax"} & {node.get_type_name() for node in model.get_ordered_ops()}
    assert without_row_scales(model) == round_rows(model) == 0


def test_plain_products_stay() -> None:
    x = op.parameter([1, -1, WIDTH], np.float32, name="x")
    divided = op.divide(x, op.maximum(op.abs(x), op.constant(np.float32(1))))  # not what is multiplied back
    product = op.matmul(divided, op.constant(np.ones((8, WIDTH), np.float32)), False, True)
    model = openvino.Model([op.result(op.multiply(product, op.constant(np.float32(2))))], [x], "plain")
    assert round_rows(model) == without_row_scales(model) == 0
    assert count(model, "FakeQuantize") == 0 and count(model, "Divide") == 1


def test_transposes_that_undo_each_other(vision: Path) -> None:
    """q and k of six blocks; every number stays what it was."""
    rng, results = np.random.default_rng(0), []
    angles = rng.uniform(0, 6, (1, 24, 16)).astype(np.float32)
    for joins in (False, True):
        model = openvino.Core().read_model(str(vision))
        before = count(model, "Transpose")
        if joins:
            assert join_transposes(model) == 2 * 6
            model.validate_nodes_and_infer_types()
            assert count(model, "Transpose") == before - 4 * 6
        feeds: dict[str, np.ndarray] = {}
        for given in model.inputs:
            shape = [d.get_length() if d.is_static else n for d, n in zip(given.get_partial_shape(), (1, 24, 1))]
            name = given.get_any_name()
            rotary = {"rotary_cos": np.cos, "rotary_sin": np.sin}.get(name)
            patches = np.random.default_rng(1).normal(size=shape).astype(np.float32)
            feeds[name] = patches if rotary is None else rotary(angles[..., : shape[2]])
        request = openvino.Core().compile_model(model, "CPU", EXACT).create_infer_request()
        results.append(np.array(next(iter(request.infer(feeds).values()))))
    np.testing.assert_array_equal(*results)


@pytest.mark.parametrize(("heads", "order"), [(8, [0, 2, 1, 3]), (4, [0, 1, 3, 2])])
def test_other_transposes_stay(heads: int, order: list[int]) -> None:
    """Taken apart into other heads, or in another order, they undo nothing."""
    x = op.parameter([1, 4, -1, 16], np.float32, name="x")
    flat = op.reshape(op.transpose(x, op.constant([0, 2, 1, 3])), op.constant([0, 0, 64]), True)
    apart = op.reshape(flat, op.constant([0, 0, heads, -1]), True)
    model = openvino.Model([op.result(op.transpose(apart, op.constant(order)))], [x], "other")
    assert join_transposes(model) == 0 and count(model, "Transpose") == 2


@pytest.mark.parametrize(("flags", "has"), [(["avx512_vnni", "amx_int8"], True), (["avx512_vnni", "amx_bf16"], False)])
def test_who_has_tiles(monkeypatch: pytest.MonkeyPatch, flags: list[str], has: bool) -> None:
    monkeypatch.setattr(openvino_rewrite, "cpu_flags", lambda: flags)
    assert has_int8_tiles() == has


@pytest.mark.parametrize(
    ("model", "flags", "slow"),
    [
        ("Intel(R) Xeon(R) Processor", ["avx512_vnni", "avx512_bf16"], True),
        ("Intel(R) Xeon(R) Processor", ["avx512_bf16", "amx_int8", "amx_bf16"], False),
        ("Intel(R) Xeon(R) Platinum 8275CL CPU", ["avx512_vnni"], False),  # float32 anyway
        ("AMD EPYC", ["avx512_vnni", "avx512_bf16"], False),
    ],
)
def test_who_multiplies_bfloat16_slowly(
    monkeypatch: pytest.MonkeyPatch, model: str, flags: list[str], slow: bool
) -> None:
    monkeypatch.setattr(openvino_rewrite, "cpu_flags", lambda: flags)
    monkeypatch.setattr(openvino_rewrite, "cpu_model", lambda: model)
    assert slow_bfloat16() == slow
