"""MatMulInt8 and FrameAttention, our own operators of W8A8, through ONNX Runtime against slow oracles."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from native_oracle import norm, resident_kb, usable_instructions
from onnx import TensorProto, helper, numpy_helper

from edgevl.runtime.native_kernels import SWITCH, kernel_instructions, native_library

USABLE = usable_instructions(int8=True)
pytestmark = pytest.mark.skipif(not USABLE, reason="no library was built, or it has no int8 for this processor")


@pytest.fixture(autouse=True, params=USABLE)
def instructions(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every test by every set of instructions that this processor has."""
    monkeypatch.setenv(SWITCH, request.param)
    assert kernel_instructions() == request.param
    return request.param


def session(
    op: str, inputs: dict[str, list[Any]], constants: dict[str, np.ndarray], threads: int = 1, **attributes: int
) -> ort.InferenceSession:
    names = [*inputs, *constants]
    given: dict[str, Any] = dict(attributes)
    node = helper.make_node(op, names, ["y"], domain="edgevl", **given)
    return opened(node, inputs, constants, threads)


def opened(
    node: onnx.NodeProto, inputs: dict[str, list[Any]], constants: dict[str, np.ndarray], threads: int
) -> ort.InferenceSession:
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in inputs.items()],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("edgevl", 1)]
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    options.register_custom_ops_library(str(native_library()))
    model: onnx.ModelProto = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    return ort.InferenceSession(model.SerializeToString(), options)


def answer(opened: ort.InferenceSession, feeds: dict[str, np.ndarray]) -> np.ndarray:
    y = opened.run(None, feeds)[0]
    assert isinstance(y, np.ndarray)
    return y


@pytest.mark.skipif(not Path("/proc/self/pagemap").exists(), reason="pages are given back on Linux alone")
@pytest.mark.parametrize("mapped", [True, False], ids=["a mapped file", "memory"])
def test_a_weight_is_not_resident_twice(tmp_path: Path, mapped: bool) -> None:
    """Of a mapped file the pages that were packed are given back, of memory nothing is: two products share this one."""
    rng, (k, n) = np.random.default_rng(0), (1000, 4096)
    w, s = rng.integers(-127, 128, (k, n), dtype=np.int8), np.ones(n, np.float32)
    said: dict[str, Any] = {"K": k, "N": n, "quick_gelu": 0, "affine": 0}
    nodes = [helper.make_node("MatMulInt8", ["x", "w", "s"], [y], domain="edgevl", **said) for y in "ab"]
    nodes.append(helper.make_node("Cast", ["w"], ["c"], to=TensorProto.FLOAT))  # what else reads the weight
    outputs = [helper.make_tensor_value_info(y, TensorProto.FLOAT, None) for y in "abc"]
    given = helper.make_tensor_value_info("x", TensorProto.FLOAT, [3, k])
    weights = [numpy_helper.from_array(w, "w"), numpy_helper.from_array(s, "s")]
    graph = helper.make_graph(nodes, "g", [given], outputs, weights)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("edgevl", 1)]
    model: onnx.ModelProto = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    onnx.save(model, tmp_path / "m.onnx", save_as_external_data=mapped, location="m.data")
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL  # else the Cast is folded
    options.register_custom_ops_library(str(native_library()))
    found = ort.InferenceSession(tmp_path / "m.onnx", options)
    if mapped:
        assert (tmp_path / "m.data").stat().st_size > w.nbytes
        assert resident_kb(tmp_path / "m.data") < 200
    x = rng.normal(size=(3, k)).astype(np.float32)
    a, b, c = (np.asarray(y) for y in found.run(None, {"x": x}))
    np.testing.assert_array_equal(c, w.astype(np.float32))
    np.testing.assert_allclose(a, rounded(x, False) @ w.astype(np.float64), rtol=1e-5, atol=1e-2)
    np.testing.assert_array_equal(a, b)


# ---------------------------------------------------------------------- products


def rounded(x: np.ndarray, affine: bool) -> np.ndarray:
    """Rows of x as 8 bits have them: 255 codes around 0, or 256 between the row's extremes."""
    if not affine:
        scale = np.maximum(np.abs(x).max(-1, keepdims=True) / np.float32(127), np.float32(1e-30))
        return np.rint(x * (1 / scale)).astype(np.float64) * scale
    low, high = np.minimum(x.min(-1, keepdims=True), 0), np.maximum(x.max(-1, keepdims=True), 0)
    scale = np.maximum((high - low) / np.float32(255), np.float32(1e-30))
    zero = np.rint(-low / scale)
    return (np.clip(np.rint(x * (1 / scale)) + zero, 0, 255).astype(np.float64) - zero) * scale


def product(
    x: np.ndarray, codes: np.ndarray, scales: np.ndarray, bias: np.ndarray | None, gelu: bool, affine: bool
) -> np.ndarray:
    y = rounded(x, affine) @ codes.astype(np.float64) * scales + (0 if bias is None else bias)
    return y / (1 + np.exp(-1.702 * y)) if gelu else y


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("rows", [1, 3, 4, 12, 29, 400])
@pytest.mark.parametrize("size", [(64, 32), (130, 70), (513, 33), (1030, 4)])
def test_a_product_is_that_of_rounded_rows(rows: int, size: tuple[int, int], gelu: bool, affine: bool) -> None:
    k, n = size
    rng = np.random.default_rng(rows * k + n)
    codes = rng.integers(-127, 128, (k, n), dtype=np.int8)
    constants = {
        "w": codes,
        "s": (rng.random(n) * 0.01).astype(np.float32),
        "b": rng.standard_normal(n).astype(np.float32),
    }
    x = (rng.standard_normal((rows, k)) + (1 if affine else 0)).astype(np.float32)
    run = session("MatMulInt8", {"x": ["m", k]}, constants, threads=2, K=k, N=n, quick_gelu=gelu, affine=affine)
    expected = product(x, codes, constants["s"], constants["b"], gelu, affine)
    assert np.abs(answer(run, {"x": x}) - expected).max() < 2e-6 * np.abs(expected).max()


@pytest.mark.parametrize("rows", [1, 30])
def test_a_gate_and_a_residual_come_behind(rows: int) -> None:
    rng = np.random.default_rng(rows)
    constants = {
        "w": rng.integers(-127, 128, (96, 40), dtype=np.int8),
        "s": (rng.random(40) * 0.01).astype(np.float32),
        "b": rng.standard_normal(40).astype(np.float32),
    }
    x, gate, residual = (rng.standard_normal((rows, n)).astype(np.float32) * 4 for n in (96, 40, 40))
    gate[0, :4] = [-200, 200, 0, -0.5]
    plain = product(x, constants["w"], constants["s"], constants["b"], False, False)
    node = helper.make_node(
        "MatMulInt8", ["x", *constants, "gate", "residual"], ["y"], domain="edgevl", K=96, N=40, quick_gelu=0, affine=0
    )
    run = opened(node, {"x": ["m", 96], "gate": ["m", 40], "residual": ["m", 40]}, constants, 2)
    with np.errstate(over="ignore"):
        expected = plain * gate / (1 + np.exp(-gate.astype(np.float64))) + residual
    y = answer(run, {"x": x, "gate": gate, "residual": residual})
    assert np.abs(y - expected).max() < 2e-6 * np.abs(expected).max()
    with pytest.raises(Exception, match="not of the output's shape"):
        answer(run, {"x": x, "gate": gate[:, :1].repeat(40, 1)[:0], "residual": residual})


@pytest.mark.parametrize("bias", [False, True], ids=["RMSNorm", "LayerNorm"])
@pytest.mark.parametrize("rows", [1, 40])
def test_rows_are_normalized_first(rows: int, bias: bool) -> None:
    rng = np.random.default_rng(rows)
    x = (rng.standard_normal((rows, 96)) * 30 + 5).astype(np.float32)
    weight, added = rng.standard_normal((2, 96)).astype(np.float32)
    constants = {"w": rng.integers(-127, 128, (96, 40), dtype=np.int8), "s": (rng.random(40) * 0.01).astype(np.float32)}
    norms = {"norm_weight": weight, "norm_bias": added, "norm_epsilon": np.array([1e-5], np.float32)}
    if not bias:
        del norms["norm_bias"]
    names = ["x", *constants, "", "", "", *(name if name in norms else "" for name in ("norm_weight", "norm_bias"))]
    node = helper.make_node(
        "MatMulInt8", [*names, "norm_epsilon"], ["y"], domain="edgevl", K=96, N=40, quick_gelu=0, affine=0
    )
    given = norm(x, weight, added if bias else None, 1e-5).astype(np.float32)
    expected = product(given, constants["w"], constants["s"], None, False, False)
    off = np.abs(answer(opened(node, {"x": ["m", 96]}, constants | norms, 2), {"x": x}) - expected)
    step = np.abs(given).max() / 127 * np.abs(constants["s"]).max() * 127  # of one code that float32 has moved
    assert off.max() < 2 * step and np.median(off) < 1e-5 * np.median(np.abs(expected))
    wrong = constants | norms | {"norm_weight": weight[:95]}
    with pytest.raises(Exception, match="norm_weight or norm_bias has not K numbers"):
        answer(opened(node, {"x": ["m", 96]}, wrong, 2), {"x": x})


def test_a_product_by_hand() -> None:
    """x = (127, -64, 0.4) has scale 1 and codes (127, -64, 0); x = 0 stays 0."""
    codes = np.array([[1, -2], [3, 4], [100, 100]], np.int8)
    constants = {"w": codes, "s": np.array([1, 0.5], np.float32)}
    run = session("MatMulInt8", {"x": [1, 2, 3]}, constants, K=3, N=2, quick_gelu=0, affine=0)
    y = answer(run, {"x": np.array([[[127, -64, 0.4], [0, 0, 0]]], np.float32)})
    assert y.tolist() == [[[127 - 192, (-254 - 256) / 2], [0, 0]]]


def test_the_largest_sums_fit() -> None:
    """All codes at their ends over the longest input of any Qwen2-VL (29,568): 29,568 × 255 × 127 is under 2^31."""
    k = 29568
    codes = np.repeat(np.array([[127, -127]], np.int8), k, 0)
    constants = {"w": codes, "s": np.ones(2, np.float32)}
    run = session("MatMulInt8", {"x": [1, k]}, constants, K=k, N=2, quick_gelu=0, affine=1)
    y = answer(run, {"x": np.full((1, k), 255, np.float32)})
    assert y.tolist() == [[255 * 127 * k, -255 * 127 * k]]


def test_no_rows_give_no_rows() -> None:
    constants = {"w": np.ones((8, 4), np.int8), "s": np.ones(4, np.float32)}
    run = session("MatMulInt8", {"x": ["m", 8]}, constants, K=8, N=4, quick_gelu=0, affine=0)
    assert answer(run, {"x": np.zeros((0, 8), np.float32)}).shape == (0, 4)


def test_a_product_refuses_what_it_cannot_multiply() -> None:
    constants = {"w": np.ones((8, 4), np.int8), "s": np.ones(4, np.float32)}
    run = session("MatMulInt8", {"x": [1, "k"]}, constants, K=8, N=4, quick_gelu=0, affine=0)
    with pytest.raises(Exception, match="the last axis of A is not K"):
        run.run(None, {"x": np.zeros((1, 9), np.float32)})
    with pytest.raises(Exception, match=r"expected N of 1 to 2\^30, and K of 1 to 65536"):
        session("MatMulInt8", {"x": [1, 8]}, constants, K=0, N=4, quick_gelu=0, affine=0)
    with pytest.raises(Exception, match=r"B is not \[K, N\]"):
        session("MatMulInt8", {"x": [1, 8]}, constants, K=8, N=5, quick_gelu=0, affine=0)
    short = session(
        "MatMulInt8", {"x": [1, 8]}, constants | {"s": np.ones(3, np.float32)}, K=8, N=4, quick_gelu=0, affine=0
    )
    with pytest.raises(Exception, match="scales or bias has not N numbers"):
        answer(short, {"x": np.zeros((1, 8), np.float32)})
    with pytest.raises(Exception, match="B is not a constant"):
        nodes = [
            helper.make_node("Cast", ["u"], ["w"], to=TensorProto.INT8),
            helper.make_node("MatMulInt8", ["x", "w", "s"], ["y"], domain="edgevl", K=8, N=4, quick_gelu=0, affine=0),
        ]
        ins = [
            helper.make_tensor_value_info(n, TensorProto.FLOAT, s)
            for n, s in (("x", [1, 8]), ("u", [8, 4]), ("s", [4]))
        ]
        graph = helper.make_graph(nodes, "g", ins, [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)])
        opsets = [helper.make_opsetid("", 21), helper.make_opsetid("edgevl", 1)]
        options = ort.SessionOptions()
        options.log_severity_level = 4
        options.register_custom_ops_library(str(native_library()))
        ort.InferenceSession(helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString(), options)


# ---------------------------------------------------------------------- attention


def rotate(x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    """x [frames, patches, heads, d], in halves."""
    half = x.shape[-1] // 2
    a, b, cos, sin = x[..., :half], x[..., half:], cos[:, :, None], sin[:, :, None]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


def attention(qkv: np.ndarray, cos: np.ndarray, sin: np.ndarray, heads: int) -> np.ndarray:
    frames, patches, width = qkv.shape
    q, k, v = np.moveaxis(qkv.astype(np.float64).reshape(frames, patches, 3, heads, -1), 2, 0)
    q, k = rotate(q, cos, sin), rotate(k, cos, sin)
    scores = np.einsum("fqhd,fkhd->fhqk", q, k) / np.sqrt(q.shape[-1])
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return np.einsum("fhqk,fkhd->fqhd", weights, v).reshape(frames, patches, width // 3)


def frames_session(heads: int, threads: int = 1) -> ort.InferenceSession:
    shapes = {"qkv": ["f", "p", "w"], "cos": ["f", "q", "h"], "sin": ["f", "r", "i"]}
    return session("FrameAttention", shapes, {}, threads, num_heads=heads)


def given(frames: int, patches: int, heads: int, dim: int, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    angles = rng.random((frames, patches, dim // 2)) * 6
    qkv = rng.standard_normal((frames, patches, 3 * heads * dim)).astype(np.float32)
    return {"qkv": qkv, "cos": np.cos(angles).astype(np.float32), "sin": np.sin(angles).astype(np.float32)}


SIZES = [
    (1, 1, 1, 2),
    (1, 4, 2, 16),
    (2, 70, 3, 32),
    (1, 128, 2, 64),
    (3, 129, 2, 80),
    (1, 300, 1, 128),
    (1, 65, 2, 36),
]


@pytest.mark.parametrize("size", SIZES)
def test_attention_is_near_to_that_in_float64(size: tuple[int, int, int, int]) -> None:
    """8 bits leave about 2 % of Gaussian noise's own attention, which is the worst case: nothing adds up in it."""
    feeds = given(*size)
    y = answer(frames_session(size[2], threads=2), feeds)
    expected = attention(feeds["qkv"], feeds["cos"], feeds["sin"], size[2])
    assert np.linalg.norm(y - expected) < 0.03 * np.linalg.norm(expected)


def test_what_all_keys_share_costs_nothing() -> None:
    """Keys far from 0 in one direction: without their mean taken away, 8 bits would see that alone."""
    feeds = given(1, 200, 2, 32)
    feeds["cos"][:], feeds["sin"][:] = 1, 0
    feeds["qkv"][..., 64:128] += 30
    y = answer(frames_session(2), feeds)
    expected = attention(feeds["qkv"], feeds["cos"], feeds["sin"], 2)
    assert np.linalg.norm(y - expected) < 0.03 * np.linalg.norm(expected)


def test_one_value_everywhere_comes_out_as_it_is() -> None:
    """Weights sum to one whatever they are, also over a last block that is not full."""
    feeds = given(1, 131, 1, 16)
    feeds["qkv"][..., 32:] = np.linspace(-2, 5, 16)
    y = answer(frames_session(1), feeds)
    assert np.abs(y - np.linspace(-2, 5, 16)).max() < 1e-5


def test_a_key_that_outweighs_all_others_is_all_that_is_seen() -> None:
    """Scores hundreds apart, in a later block than the first: no overflow, and nothing is left of what came before."""
    feeds = given(1, 260, 1, 16)
    feeds["cos"][:], feeds["sin"][:] = 1, 0
    feeds["qkv"][0, :, :16] = 20
    feeds["qkv"][0, :, 16:32] = 0
    feeds["qkv"][0, 200, 16:32] = 20
    y = answer(frames_session(1), feeds)
    value = feeds["qkv"][0, 200, 32:]
    assert np.abs(y[0] - value).max() < 0.005 * np.abs(feeds["qkv"][0, 128:256, 32:]).max()


def test_frames_do_not_see_each_other() -> None:
    feeds = given(3, 50, 2, 16)
    together = answer(frames_session(2), feeds)
    for frame in range(3):
        alone = {name: value[frame : frame + 1] for name, value in feeds.items()}
        assert np.array_equal(answer(frames_session(2), alone)[0], together[frame])


def test_no_patches_give_no_patches() -> None:
    assert answer(frames_session(2), given(1, 0, 2, 16)).shape == (1, 0, 32)


@pytest.mark.parametrize(
    ("heads", "change", "said"),
    [
        (5, {}, "expected qkv"),
        (1, {"qkv": np.zeros((1, 8, 3 * 130), np.float32)}, "at most 128"),
        (2, {"cos": np.zeros((1, 7, 8), np.float32)}, "expected cos"),
        (2, {"cos": np.zeros((1, 8, 4), np.float32)}, "expected cos"),
        (2, {"sin": np.zeros((1, 8, 4), np.float32)}, "expected cos and sin"),
    ],
)
def test_attention_refuses_what_does_not_fit(heads: int, change: dict[str, np.ndarray], said: str) -> None:
    with pytest.raises(Exception, match=said):
        frames_session(heads).run(None, given(1, 8, 2, 16) | change)


def test_attention_needs_a_head() -> None:
    with pytest.raises(Exception, match="num_heads of at least 1"):
        frames_session(0)


def test_the_library_is_beside_the_package() -> None:
    assert Path(native_library()).parent.name == "runtime"
