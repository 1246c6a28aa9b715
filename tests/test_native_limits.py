"""Our own operators at their limits: numbers that are none, inputs that change between calls, sizes that overflow."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from native_oracle import random_tokens, usable_instructions
from onnx import TensorProto, helper, numpy_helper

from edgevl.runtime.native_kernels import SWITCH, native_library

USABLE = usable_instructions()
INT8 = usable_instructions(int8=True)
pytestmark = pytest.mark.skipif(not USABLE, reason="no library, or it knows no instructions of this processor")
NUMBERS = pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
RNG = np.random.default_rng(0)
CODES = RNG.integers(-127, 128, (64, 40), dtype=np.int8)
NIBBLES = RNG.integers(0, 256, (40, 1, 64), dtype=np.uint8)
INT8_SIZES = {"K": 64, "N": 40, "quick_gelu": 0, "affine": 0}
NBITS_SIZES = {"K": 128, "N": 40, "bits": 4, "block_size": 128}


def session(
    op: str, names: list[str], constants: dict[str, np.ndarray], outputs: int = 1, **attributes: int
) -> ort.InferenceSession:
    """Of a graph with one node; what is no constant is an input of any shape, float but for "last"."""
    said: dict[str, Any] = dict(attributes)
    results = [f"y{i}" for i in range(outputs)]
    node = helper.make_node(op, names, results, domain="edgevl", **said)
    kinds = {n: TensorProto.INT32 if n == "last" else TensorProto.FLOAT for n in names if n and n not in constants}
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info(name, kind, None) for name, kind in kinds.items()],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in results],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("edgevl", 1)]
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.register_custom_ops_library(str(native_library()))
    content = helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
    return ort.InferenceSession(content, options, providers=["CPUExecutionProvider"])


def first(found: ort.InferenceSession, feeds: dict[str, np.ndarray]) -> np.ndarray:
    return np.asarray(found.run(None, feeds)[0])


# ---------------------------------------------------------------------- numbers that are none


@pytest.mark.parametrize("name", INT8)
@pytest.mark.parametrize("affine", [0, 1])
@NUMBERS
def test_an_int8_product_of_no_number_is_none(
    name: str, affine: int, number: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row with NaN or infinity in it, wherever, comes out as NaN and the others as without it: what looks for them
    behind the encoder finds them."""
    monkeypatch.setenv(SWITCH, name)
    constants = {"w": CODES, "s": np.ones(40, np.float32)}
    run = session("MatMulInt8", ["x", *constants], constants, **{**INT8_SIZES, "affine": affine})
    for rows in (3, 29):
        x = np.random.default_rng(rows).standard_normal((rows, 64)).astype(np.float32)
        good = first(run, {"x": x})
        for column in (0, 17, 63):
            bad = x.copy()
            bad[1, column] = number
            y = first(run, {"x": bad})
            assert np.isnan(y[1]).all()
            np.testing.assert_array_equal(np.delete(y, 1, 0), np.delete(good, 1, 0))


@pytest.mark.parametrize("name", INT8)
@pytest.mark.parametrize("part", ["q", "k", "v"])
@NUMBERS
def test_attention_of_frames_with_no_number_is_none(
    name: str, part: str, number: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a query its row, of a key all rows of the head, of a value its channel; in a block that is full or not."""
    monkeypatch.setenv(SWITCH, name)
    run = session("FrameAttention", ["qkv", "cos", "sin"], {}, num_heads=2)
    for patches in (40, 128, 200):
        rng = np.random.default_rng(patches)
        angles = rng.uniform(0.1, 1.4, (2, patches, 16))
        feeds = {"cos": np.cos(angles).astype(np.float32), "sin": np.sin(angles).astype(np.float32)}
        qkv = rng.standard_normal((2, patches, 3, 2, 32)).astype(np.float32)
        good = first(run, {**feeds, "qkv": qkv.reshape(2, patches, -1)})
        for place in (0, 15, 16, 31):
            bad = qkv.copy()
            bad[1, 7, "qkv".index(part), 1, place] = number
            y = first(run, {**feeds, "qkv": bad.reshape(2, patches, -1)})
            wrong = np.zeros((2, patches, 2, 32), bool)
            wrong[1, 7 if part == "q" else slice(None), 1, place if part == "v" else slice(None)] = True
            np.testing.assert_array_equal(np.isnan(y), wrong.reshape(y.shape))
            np.testing.assert_array_equal(np.where(wrong.reshape(y.shape), 0, y - good), 0)


@pytest.mark.parametrize("name", USABLE)
@NUMBERS
def test_a_product_in_blocks_and_causal_attention_of_no_number_are_none(
    name: str, number: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(SWITCH, name)
    constants = {"w": NIBBLES, "s": np.ones((40, 1), np.float32)}
    x = np.ones((3, 128), np.float32)
    x[1, 100] = number
    y = first(session("MatMulNBits", ["x", *constants], constants, **NBITS_SIZES), {"x": x})
    assert np.isnan(y[1]).all() and np.isfinite(y[[0, 2]]).all()
    for count in (1, 20):
        t = random_tokens(4, 2, 32, count, [70], 128)
        t.q[0, -1, 1, 5] = number
        names = ["q", "k", "v", "cos", "sin", "keys", "values", "last"]
        flat = {n: getattr(t, n).reshape(1, count, -1) for n in "qkv"}
        run = session("CausalAttention", names, {}, outputs=3, num_heads=4, kv_num_heads=2)
        y = first(run, {**flat, **{n: getattr(t, n) for n in names[3:]}}).reshape(count, 4, 32)
        assert np.isnan(y[-1, 1]).all() and np.isfinite(y[-1, [0, 2, 3]]).all() and np.isfinite(y[:-1]).all()


# ---------------------------------------------------------------------- inputs that change


@pytest.mark.parametrize("op", ["MatMulInt8", "MatMulNBits"])
@pytest.mark.parametrize("changing", ["bias", "norm_weight", "norm_bias", "norm_epsilon", "s"])
def test_an_input_that_shrinks_between_calls_is_refused(op: str, changing: str) -> None:
    """What is no constant may be of another size with every call: beyond it lies somebody else's memory."""
    if op == "MatMulInt8" and not INT8:
        pytest.skip("no products of int8 for this processor")
    columns = 64 if op == "MatMulInt8" else 128
    constants = {"w": CODES, "s": np.ones(40, np.float32)}
    if op == "MatMulNBits":
        if changing == "s":
            pytest.skip("scales of blocks are constants, or refused")
        constants = {"w": NIBBLES, "s": np.ones((40, 1), np.float32)}
    sizes = {"bias": 40, "norm_weight": columns, "norm_bias": columns, "norm_epsilon": 1, "s": 40}
    given = {name: np.ones(size, np.float32) for name, size in sizes.items() if name != "s" or changing == "s"}
    constants |= {name: value for name, value in given.items() if name != changing}
    constants = {name: value for name, value in constants.items() if name != changing}
    norms = ["norm_weight", "norm_bias", "norm_epsilon"]
    names = ["x", "w", "s", *(["bias", "", ""] if op == "MatMulInt8" else ["", "", "bias", "", ""]), *norms]
    run = session(op, names, constants, **(INT8_SIZES if op == "MatMulInt8" else NBITS_SIZES))
    x = np.random.default_rng(1).standard_normal((2, columns)).astype(np.float32)
    good = first(run, {"x": x, changing: given[changing]})
    for wrong in (given[changing][:0], np.ones(given[changing].size + 1, np.float32)):
        with pytest.raises(Exception, match=r"edgevl.*(has not|is not of the size)"):
            first(run, {"x": x, changing: wrong})
    np.testing.assert_array_equal(first(run, {"x": x, changing: given[changing]}), good)


# ---------------------------------------------------------------------- sizes


def test_sizes_whose_product_wraps_are_refused() -> None:
    """N × blocks is 1 modulo 2^64, so that a weight of 64 bytes and one scale seemed to be all of it."""
    n, blocks = 1851199388415, 1695624278967551
    assert n * blocks % 2**64 == 1
    constants = {"w": np.zeros(64, np.uint8), "s": np.zeros(1, np.float32)}
    for rows, columns in ((n, blocks * 128), (2**30 + 1, 128), (40, 2**30 + 1)):
        with pytest.raises(Exception, match=r"edgevl.MatMulNBits: .* N and K of 1 to 2"):
            session("MatMulNBits", ["x", *constants], constants, N=rows, K=columns, bits=4, block_size=128)


@pytest.mark.skipif(not INT8, reason="no products of int8 for this processor")
def test_columns_whose_sums_would_not_fit_are_refused() -> None:
    """65,536 × 255 × 127 is under 2^31 and comes out; the sums of more columns would come back negative."""
    sizes = {**INT8_SIZES, "N": 2, "affine": 1}
    for k in (65536, 65537):
        constants = {"w": np.repeat(np.array([[127, -127]], np.int8), k, 0), "s": np.ones(2, np.float32)}
        if k > 65536:
            with pytest.raises(Exception, match="K of 1 to 65536, whose sums fit into 32 bits"):
                session("MatMulInt8", ["x", *constants], constants, **{**sizes, "K": k})
            continue
        for name in INT8:
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv(SWITCH, name)
                run = session("MatMulInt8", ["x", *constants], constants, **{**sizes, "K": k})
                y = first(run, {"x": np.full((1, k), 255, np.float32)})
                assert y.tolist() == [[float(np.float32(255 * 127 * k)), float(np.float32(-255 * 127 * k))]]
