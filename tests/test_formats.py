"""calibration/formats.py against slow loops and against ONNX Runtime's own reading of the packed bytes."""

from __future__ import annotations

import numpy as np
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgevl.calibration.formats import (
    BlockQuantized,
    dequantize_blocks,
    explicit_zero_points,
    pack_codes,
    pack_zero_points,
    quantize_blocks,
    quantize_channels,
    split_blocks,
)


def slow_quantize(weight: np.ndarray, bits: int, block: int, symmetric: bool) -> np.ndarray:
    """The weight after rounding, entry by entry, in float64."""
    out = np.zeros_like(weight, dtype=np.float64)
    for n in range(weight.shape[0]):
        for start in range(0, weight.shape[1], block):
            w = [float(x) for x in weight[n, start : start + block]]
            if symmetric:
                extreme = max(w, key=abs)
                scale, zero = (extreme / -(2 ** (bits - 1)) or 1.0), 2 ** (bits - 1)
            else:
                low, high = min(0.0, *w), max(0.0, *w)
                scale = (high - low) / (2**bits - 1) or 1.0
                zero = round(-low / scale)
            for i, x in enumerate(w):
                code = min(max(round(x / scale) + zero, 0), 2**bits - 1)
                out[n, start + i] = (code - zero) * scale
    return out


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("columns", [64, 50])
def test_blocks_equal_the_slow_oracle(bits: int, symmetric: bool, columns: int) -> None:
    weight = np.random.default_rng(bits + columns).standard_normal((7, columns)).astype(np.float32)
    weight[3] = 0
    weight[4] = np.abs(weight[4])
    q = quantize_blocks(weight, bits, 32, symmetric)
    expected = slow_quantize(weight, bits, 32, symmetric)
    # float32 against float64: a value in the middle of two codes may round to the other one
    error = np.abs(dequantize_blocks(q) - expected)
    assert (error < 1e-6).mean() > 0.99
    assert error.max() < np.abs(q.scales).max() * 1.01
    assert np.all(dequantize_blocks(q)[3] == 0)


def test_symmetric_grid_by_hand() -> None:
    weight = np.zeros((1, 16), np.float32)
    weight[0, :4] = [-4.0, 2.0, 0.26, -0.24]
    q = quantize_blocks(weight, 4, 16)
    assert q.scales.tolist() == [[0.5]]  # -4 sits on code 0 = -8 steps
    assert q.codes[0, 0, :5].tolist() == [0, 12, 9, 8, 8]
    assert q.zero_points is None


def test_packing_by_hand() -> None:
    codes = np.array([[1, 2, 3, 4], [15, 0, 7, 8]], np.uint8)
    assert pack_codes(codes, 4).tolist() == [[0x21, 0x43], [0x0F, 0x87]]
    assert pack_codes(codes, 8) is codes
    assert pack_zero_points(np.array([[1, 2, 3]], np.uint8), 4).tolist() == [[0x21, 0x03]]


def test_channels_by_hand() -> None:
    q = quantize_channels(np.array([[1.27, -0.635, 0.004], [0, 0, 0]], np.float32))
    assert q.codes.tolist() == [[127, -64, 0], [0, 0, 0]]  # -63.5 rounds half to even
    np.testing.assert_allclose(q.scales, [0.01, 1.0], rtol=1e-6)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("columns", "block"), [(128, 32), (96, 64), (200, 128)])
def test_onnxruntime_reads_the_same_weight(bits: int, symmetric: bool, columns: int, block: int) -> None:
    rng = np.random.default_rng(columns + bits)
    weight = rng.standard_normal((24, columns)).astype(np.float32)
    q = quantize_blocks(weight, bits, block, symmetric)
    inits = {"B": pack_codes(q.codes, bits), "s": q.scales}
    names = ["x", "B", "s"]
    if q.zero_points is not None:
        inits["z"] = pack_zero_points(q.zero_points, bits)
        names.append("z")
    node = helper.make_node(
        "MatMulNBits", names, ["y"], domain="com.microsoft", K=columns, N=24, bits=bits, block_size=block
    )
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, columns])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(v, k) for k, v in inits.items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    session = ort.InferenceSession(
        helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString(),
        providers=["CPUExecutionProvider"],
    )
    x = rng.standard_normal((5, columns)).astype(np.float32)
    np.testing.assert_allclose(np.asarray(session.run(None, {"x": x})[0]), x @ dequantize_blocks(q).T, atol=1e-4)


@pytest.mark.parametrize(("bits", "block"), [(3, 32), (4, 24), (4, 8)])
def test_wrong_formats_are_refused(bits: int, block: int) -> None:
    with pytest.raises(ValueError, match="expected"):
        quantize_blocks(np.zeros((2, 32), np.float32), bits, block)


def weight_of(rows: int, groups: list[list[int]], columns: int, bits: int, zeros: bool) -> BlockQuantized:
    """Random codes with the given columns in each group."""
    rng = np.random.default_rng(rows)
    size = max(len(g) for g in groups)
    codes = rng.integers(0, 2**bits, (rows, len(groups), size)).astype(np.uint8)
    z = rng.integers(0, 2**bits, (rows, len(groups))).astype(np.uint8) if zeros else None
    scales = rng.random((rows, len(groups))).astype(np.float32)
    order = np.array([k for g in groups for k in g])
    return BlockQuantized(codes, scales, z, bits, columns, None if np.all(np.diff(order) > 0) else order)


def slow_dequantize(q: BlockQuantized, groups: list[list[int]]) -> np.ndarray:
    out = np.zeros((len(q.codes), q.columns), np.float32)
    for n in range(len(q.codes)):
        for g, columns in enumerate(groups):
            zero = 2 ** (q.bits - 1) if q.zero_points is None else int(q.zero_points[n, g])
            for place, k in enumerate(columns):
                out[n, k] = np.float32(int(q.codes[n, g, place]) - zero) * q.scales[n, g]
    return out


def test_columns_go_where_the_order_says() -> None:
    groups = [[5, 0, 3], [1, 2, 4]]
    q = weight_of(2, groups, 6, 4, True)
    assert np.array_equal(dequantize_blocks(q), slow_dequantize(q, groups))


@pytest.mark.parametrize("zeros", [True, False])
@pytest.mark.parametrize(("columns", "size", "smaller"), [(96, 48, 16), (64, 64, 32), (70, 70, 32), (70, 70, 128)])
def test_smaller_blocks_are_the_same_weight(zeros: bool, columns: int, size: int, smaller: int) -> None:
    groups = [list(range(at, at + size)) for at in range(0, columns, size)]
    q = weight_of(3, groups, columns, 4, zeros)
    split = split_blocks(q, smaller)
    assert split.block_size == smaller and split.codes.shape[1] == -(-columns // smaller)
    assert np.array_equal(dequantize_blocks(split), dequantize_blocks(q))
    padding = split.codes.reshape(3, -1)[:, columns:]
    assert np.array_equal(padding, np.repeat(explicit_zero_points(split)[:, -1:], padding.shape[1], 1))


def test_smaller_blocks_must_divide() -> None:
    with pytest.raises(ValueError, match="block_size is 32, expected a divisor of 48"):
        split_blocks(weight_of(2, [list(range(48)), list(range(48, 96))], 96, 4, False), 32)
