"""Our own attention over a cache: kernel by kernel against a slow oracle, and the operator through ONNX Runtime."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from native_oracle import KERNELS, Tokens, attend, attention, random_tokens, usable_library
from onnx import TensorProto, helper

each_kernel = pytest.mark.parametrize("kernel", KERNELS)
NAMES = ("keys", "values")


def check(found: tuple[np.ndarray, ...], t: Tokens) -> None:
    """The output, and the cache: rotated new keys and new values in their places, all else as it was."""
    out, keys, values, off = attention(t)
    wrong = np.abs(found[0] - out) / off
    assert found[0].shape == out.shape and (wrong <= 1).all(), wrong.max()
    np.testing.assert_allclose(found[1], keys, rtol=1e-6, atol=1e-6 * np.nanmax(np.abs(keys)))
    np.testing.assert_array_equal(found[2], values.astype(np.float32))


@each_kernel
def test_attention_by_hand(kernel: str) -> None:
    """Scores apart by ln 2 are weights of 2 to 1; a turn by 90 degrees takes a query's number to the other half."""
    dim = 16
    t = random_tokens(1, 1, dim, 1, [2], 8)
    t.cos[:], t.sin[:] = 0, 1
    t.q[:], t.k[:] = 0, 0
    t.q[0, 0, 0, 3] = math.sqrt(dim)  # turned, at 3 + 8
    t.keys[0, 0, :2] = 0
    t.keys[0, 0, 1, 11] = math.log(2)
    t.values[0, 0, 0], t.values[0, 0, 1], t.v[0, 0, 0] = 1, 10, 5
    out, keys, values = attend(kernel, t)
    np.testing.assert_allclose(out, np.full((1, 1, 1, dim), (1 + 2 * 10 + 5) / 4), rtol=1e-6)
    assert keys[0, 0, 2].tolist() == [0.0] * dim and values[0, 0, 2].tolist() == [5.0] * dim
    t.k[0, 0, 0, 8 + 2] = 3  # of the second half: turned to -3 in the first
    assert attend(kernel, t)[1][0, 0, 2].tolist() == [0.0, 0.0, -3.0] + [0.0] * 13


@each_kernel
@pytest.mark.parametrize("dim", [16, 32, 48, 80, 96, 112, 128])
@pytest.mark.parametrize(("heads", "groups"), [(1, 1), (12, 2), (7, 1), (4, 4), (13, 1)])
def test_it_is_the_oracles(kernel: str, dim: int, heads: int, groups: int) -> None:
    """Few tokens and many, by themselves and behind others, at the ends of blocks of keys and around."""
    for count, past, capacity in (
        (1, [0], 1),
        (1, [63, 5], 64),
        (1, [64, 0, 300], 301),
        (8, [0, 505], 520),
        (9, [56], 70),
        (33, [0], 40),
        (70, [130], 200),
    ):
        check(attend(kernel, t := random_tokens(heads, groups, dim, count, past, capacity)), t)


@each_kernel
def test_a_long_context(kernel: str) -> None:
    """Several parts of keys, of which a short row has but one."""
    for count, past in ((1, [1600, 3]), (5, [1023, 255]), (40, [900])):
        check(attend(kernel, t := random_tokens(6, 2, 32, count, past, 1700)), t)


@each_kernel
@pytest.mark.parametrize("size", [1e-3, 30.0])
def test_scores_that_are_all_alike_or_far_apart(kernel: str, size: float) -> None:
    """Of thousands, one key takes all the weight; no sum overflows and none is 0 / 0."""
    for count, past in ((1, [300]), (20, [0])):
        check(attend(kernel, t := random_tokens(2, 1, 64, count, past, 320, size)), t)


@each_kernel
def test_a_large_group(kernel: str) -> None:
    """More heads than a task has rows for tokens of: one token at a time."""
    check(attend(kernel, t := random_tokens(96, 1, 16, 3, [100], 128)), t)
    check(attend(kernel, t := random_tokens(64, 1, 16, 11, [2], 20)), t)


# ----------------------------------------------------------------------------------------------------- the operator


@pytest.fixture(scope="module")
def library() -> Path:
    return usable_library()


def session(library: Path, heads: tuple[int, int], threads: int = 1, merged: bool = False, absent: str = "") -> Any:
    """Of a graph with the operator alone, all of whose axes are open."""
    floats = ["q", "cos", "sin", *NAMES] if merged else ["q", "k", "v", "cos", "sin", *NAMES]
    axes = {name: 4 if name in NAMES else 3 for name in floats}
    values = {
        n: helper.make_tensor_value_info(n, TensorProto.FLOAT, [f"{n}_{i}" for i in range(a)]) for n, a in axes.items()
    }
    values["last"] = helper.make_tensor_value_info("last", TensorProto.INT32, ["rows"])
    names = ["q", *(["", ""] if merged else ["k", "v"]), "cos", "sin", *NAMES, "last"]
    names = ["" if n == absent else n for n in names]
    outputs = ["y", "present_keys", "present_values"]
    node = helper.make_node(
        "CausalAttention", names, outputs, domain="edgevl", num_heads=heads[0], kv_num_heads=heads[1]
    )
    given = [values[n] for n in names if n]
    shaped = [
        helper.make_tensor_value_info(n, TensorProto.FLOAT, [f"{n}_{i}" for i in range(3 if n == "y" else 4)])
        for n in outputs
    ]
    graph = helper.make_graph([node], "attention", given, shaped)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("edgevl", 1)]
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 4
    options.register_custom_ops_library(str(library))
    content = helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
    return ort.InferenceSession(content, options, providers=["CPUExecutionProvider"])


def feeds(t: Tokens, merged: bool = False) -> dict[str, np.ndarray]:
    arrays = {name: getattr(t, name) for name in "qkv"}
    flat = {name: a.reshape(*a.shape[:2], a.shape[2] * a.shape[3]) for name, a in arrays.items()}
    given = {"q": np.concatenate(list(flat.values()), -1)} if merged else flat
    return {**given, "cos": t.cos, "sin": t.sin, "keys": t.keys, "values": t.values, "last": t.last}


def heads_of(t: Tokens) -> tuple[int, int]:
    return t.q.shape[2], t.k.shape[2]


@pytest.mark.parametrize("merged", [False, True], ids=["three inputs", "one input"])
@pytest.mark.parametrize("count", [1, 3, 50])
def test_through_onnx_runtime(library: Path, count: int, merged: bool) -> None:
    """On several threads as on one, and the cache of before is left as it was where it is not the output's, too."""
    t = random_tokens(12, 2, 48, count, [0, 700, 260], 800)
    before, found = t.keys.copy(), []
    for threads in (1, 2, 3):
        given = feeds(t, merged)
        found.append(session(library, heads_of(t), threads, merged).run(None, given))
        np.testing.assert_array_equal(given["keys"], before)
    check((found[0][0].reshape(t.q.shape), *found[0][1:]), t)
    for other in found[1:]:
        for a, b in zip(found[0], other):
            np.testing.assert_array_equal(a, b)


def test_the_cache_is_written_in_place(library: Path) -> None:
    t = random_tokens(4, 2, 32, 2, [5], 64)
    given, run = feeds(t), session(library, heads_of(t))
    binding = run.io_binding()
    kept = {name: given.pop(name).copy() for name in NAMES}
    for name, array in given.items():
        binding.bind_cpu_input(name, array)
    for name, array in kept.items():
        where = ("cpu", 0, np.float32, array.shape, array.ctypes.data)
        binding.bind_input(name, *where)
        binding.bind_output(f"present_{name}", *where)
    binding.bind_output("y", "cpu")
    run.run_with_iobinding(binding)
    y = binding.get_outputs()[-1].numpy().reshape(t.q.shape)
    check((y, kept["keys"], kept["values"]), t)


def test_no_tokens_are_no_outputs(library: Path) -> None:
    t = random_tokens(4, 2, 32, 0, [5], 64)
    y, keys, _ = session(library, heads_of(t)).run(None, feeds(t))
    assert y.shape == (1, 0, 128)
    np.testing.assert_array_equal(keys, t.keys)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"last": np.array([64], np.int32)}, "the new tokens are not within the cache"),
        ({"last": np.array([2**31 - 1], np.int32)}, "the new tokens are not within the cache"),
        ({"last": np.array([0], np.int32)}, "the new tokens are not within the cache"),
        ({"last": np.array([-1], np.int32)}, "the new tokens are not within the cache"),
        ({"last": np.array([5, 6], np.int32)}, "expected a length of every row"),
        ({"keys": np.zeros((1, 2, 64, 24), np.float32)}, "dim being a multiple of 16 of at most 128"),
        ({"keys": np.zeros((1, 2, 64, 144), np.float32)}, "dim being a multiple of 16 of at most 128"),
        ({"keys": np.zeros((2, 2, 64, 32), np.float32)}, r"expected q \[batch, count, …\] and a cache"),
        ({"keys": np.zeros((1, 4, 64, 32), np.float32)}, r"expected q \[batch, count, …\] and a cache"),
        ({"values": np.zeros((1, 2, 63, 32), np.float32)}, "past keys and values differ in shape"),
        ({"q": np.zeros((1, 2, 127), np.float32)}, "is not of the size that the heads say"),
        ({"k": np.zeros((1, 2, 128), np.float32)}, "is not of the size that the heads say"),
        ({"v": np.zeros((1, 3, 64), np.float32)}, "is not of the size that the heads say"),
        ({"cos": np.zeros((1, 2, 32), np.float32)}, "is not of the size that the heads say"),
        ({"sin": np.zeros((1, 1, 16), np.float32)}, "is not of the size that the heads say"),
    ],
)
def test_what_it_refuses(library: Path, changes: dict[str, np.ndarray], message: str) -> None:
    t = random_tokens(4, 2, 32, 2, [5], 64)
    run = session(library, heads_of(t))
    with pytest.raises(Exception, match=f"edgevl.CausalAttention: .*{message}"):  # onnxruntime's own class
        run.run(None, {**feeds(t), **changes})
    run.run(None, feeds(t))


@pytest.mark.parametrize("heads", [(0, 0), (4, 0), (0, 4), (5, 2), (97, 1), (-4, -2)])
def test_heads_that_it_refuses(library: Path, heads: tuple[int, int]) -> None:
    with pytest.raises(Exception, match="expected num_heads to be kv_num_heads of at least 1, up to 96 times"):
        session(library, heads)


@pytest.mark.parametrize("absent", ["k", "v"])
def test_one_of_k_and_v(library: Path, absent: str) -> None:
    t = random_tokens(4, 2, 32, 2, [5], 64)
    given = feeds(t)
    del given[absent]
    with pytest.raises(Exception, match="has one of k and v, not both"):
        session(library, heads_of(t), absent=absent).run(None, given)


def test_merged_heads_of_another_size(library: Path) -> None:
    t = random_tokens(4, 2, 32, 2, [5], 64)
    given = feeds(replace(t, v=t.v[:, :, :, :30]), merged=True)
    with pytest.raises(Exception, match="is not of the size that the heads say"):
        session(library, heads_of(t), merged=True).run(None, given)
