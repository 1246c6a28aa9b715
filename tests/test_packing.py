"""calibration/packing.py: words worked out by hand, slow loops, and round trips of every layout bit for bit."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from quantized import Layer, awq_tensors, gptq_tensors, int8_tensors, packed_tensors

from edgevl.calibration.formats import BlockQuantized, ChannelQuantized, dequantize_blocks
from edgevl.calibration.packing import (
    AWQ_ORDER,
    group_order,
    pack_awq,
    pack_compressed,
    pack_gptq,
    pack_int8,
    unpack_awq,
    unpack_compressed,
    unpack_gptq,
    unpack_gptq_zeros,
    unpack_int8,
)

N, K = 24, 256


def random_layer(bits: int, group: int, symmetric: bool, act_order: bool = False, least_zero: int = 1) -> Layer:
    rng = np.random.default_rng(bits + group)
    size = K if group == -1 else group
    g_idx = np.arange(K) // size
    if act_order:
        g_idx = rng.permutation(g_idx)
    shape = (K // size, N)
    z = np.full(shape, 2 ** (bits - 1)) if symmetric else rng.integers(least_zero, 2**bits, shape)
    return Layer(bits, rng.integers(0, 2**bits, (K, N)), z, rng.random(shape).astype(np.float16), g_idx)


def as_blocks(layer: Layer) -> BlockQuantized:
    """By hand: the columns of each group side by side."""
    groups = [np.flatnonzero(layer.g_idx == g) for g in range(len(layer.z))]
    codes = np.stack([layer.q[g].T for g in groups], 1).astype(np.uint8)
    order = np.concatenate(groups)
    said = (layer.z != 2 ** (layer.bits - 1)).any()
    return BlockQuantized(
        codes,
        layer.s.T.astype(np.float32),
        layer.z.T.astype(np.uint8) if said else None,
        layer.bits,
        K,
        None if np.array_equal(order, np.arange(K)) else order,
    )


def check_equal(ours: BlockQuantized, theirs: BlockQuantized) -> None:
    assert (ours.bits, ours.columns) == (theirs.bits, theirs.columns)
    for a, b in ((ours.codes, theirs.codes), (ours.scales, theirs.scales)):
        assert a.dtype == b.dtype and np.array_equal(a, b)
    for a, b in ((ours.zero_points, theirs.zero_points), (ours.order, theirs.order)):
        if a is None or b is None:
            assert a is None and b is None
        else:
            assert np.array_equal(a, b)


def check_tensors(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> None:
    assert set(ours) == set(theirs)
    for name, value in theirs.items():
        assert ours[name].dtype == value.dtype and ours[name].shape == value.shape, name
        assert np.array_equal(ours[name], value) and ours[name].flags.c_contiguous, name


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group", [32, 64, 128, -1])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("version", [1, 2])
def test_gptq(bits: int, group: int, symmetric: bool, act_order: bool, version: int) -> None:
    layer = random_layer(bits, group, symmetric, act_order, least_zero=version == 1)
    q, theirs = as_blocks(layer), gptq_tensors(layer, version)
    check_tensors(pack_gptq(q, version), theirs)
    size = K if group == -1 else group
    back = unpack_gptq(**theirs, bits=bits, group_size=size, version=version)
    check_equal(back, q)
    assert np.array_equal(dequantize_blocks(back), layer.weight())
    if not act_order:
        check_equal(unpack_gptq(**{**theirs, "g_idx": None}, bits=bits, group_size=size, version=version), q)


@pytest.mark.parametrize("group", [32, 64, 128, -1])
@pytest.mark.parametrize("symmetric", [True, False])
def test_awq(group: int, symmetric: bool) -> None:
    layer = random_layer(4, group, symmetric, least_zero=0)
    q, theirs = as_blocks(layer), awq_tensors(layer)
    check_tensors(pack_awq(q), theirs)
    back = unpack_awq(**theirs, group_size=K if group == -1 else group)
    check_equal(back, q)
    assert np.array_equal(dequantize_blocks(back), layer.weight())


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group", [32, 64, 128, -1])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("act_order", [True, False])
def test_pack_quantized(bits: int, group: int, symmetric: bool, act_order: bool) -> None:
    layer = random_layer(bits, group, symmetric, act_order, least_zero=0)
    q, theirs = as_blocks(layer), packed_tensors(layer)
    ours = pack_compressed(q)
    check_tensors(ours, {k: np.ascontiguousarray(v) for k, v in theirs.items()})
    zeros, g_idx = theirs.get("weight_zero_point"), theirs.get("weight_g_idx")
    size = K if group == -1 else group
    back = unpack_compressed(theirs["weight_packed"], theirs["weight_scale"], zeros, g_idx, bits, K, size)
    check_equal(back, q)
    assert np.array_equal(dequantize_blocks(back), layer.weight())


def test_pack_quantized_ragged() -> None:
    """Inputs and outputs that do not fill a word: its rest is empty."""
    layer = Layer(
        4, np.arange(26).reshape(13, 2) % 16, np.full((1, 2), 3), np.ones((1, 2), np.float16), np.zeros(13, int)
    )
    codes = np.ascontiguousarray(layer.q.T.astype(np.uint8)).reshape(2, 1, 13)
    zeros = np.full((2, 1), 3, np.uint8)
    q = BlockQuantized(codes, np.ones((2, 1), np.float32), zeros, 4, 13)
    ours = pack_compressed(q)
    assert ours["weight_packed"].shape == (2, 2) and ours["weight_zero_point"].tolist() == [[0x33]]
    assert ours["weight_packed"].tolist()[0] == [int(np.array(0xECA86420, np.uint32).view(np.int32)), 0x86420]
    parts = (ours["weight_packed"], ours["weight_scale"], ours["weight_zero_point"], None)
    check_equal(unpack_compressed(*parts, 4, 13, 13), q)


def test_int8_channels() -> None:
    layer = random_layer(8, -1, True)
    q = ChannelQuantized((layer.q - 128).T.astype(np.int8), layer.s[0].astype(np.float32))
    theirs = int8_tensors(layer)
    check_tensors(pack_int8(q, np.float16), theirs)
    for scale in (theirs["weight_scale"], theirs["weight_scale"][:, 0]):
        back = unpack_int8(theirs["weight"], scale)
        assert np.array_equal(back.codes, q.codes) and np.array_equal(back.scales, q.scales)


# ---------------------------------------------------------------------- by hand


def constant(bits: int, zero: int | None = None) -> BlockQuantized:
    zeros = None if zero is None else np.full((8, 1), zero, np.uint8)
    return BlockQuantized(np.zeros((8, 1, 32), np.uint8), np.ones((8, 1), np.float32), zeros, bits, 32)


@pytest.mark.parametrize(
    ("bits", "version", "word"), [(4, 1, 0x77777777), (4, 2, 0x88888888), (8, 1, 0x7F7F7F7F), (8, 2, 0x80808080)]
)
def test_symmetric_zero_points_by_hand(bits: int, version: int, word: int) -> None:
    qzeros = pack_gptq(constant(bits), version)["qzeros"]
    assert qzeros.dtype == np.int32 and set(qzeros.view(np.uint32).ravel().tolist()) == {word}


def test_version_1_adds_one_per_code() -> None:
    """0xFFFFFFFF + 1 per word would be 0; a code of 15 is followed by one of 0 without a carry."""
    word = np.array([[0x0000_00F3]], np.uint32).view(np.int32)
    assert unpack_gptq_zeros(word, 4, 8)[:, 0].tolist() == [4, 0, 1, 1, 1, 1, 1, 1]
    assert unpack_gptq_zeros(word, 4, 8, 2)[:, 0].tolist() == [3, 15, 0, 0, 0, 0, 0, 0]


def test_gptq_words_by_hand() -> None:
    """Inputs 0..7 of an output with codes 1..8: the first in the low bits."""
    codes = np.zeros((8, 1, 32), np.uint8)
    codes[0, 0, :8] = range(1, 9)
    q = BlockQuantized(codes, np.ones((8, 1), np.float32), None, 4, 32)
    words = pack_gptq(q)["qweight"].view(np.uint32)
    assert words.shape == (4, 8) and words[0, 0] == 0x87654321 and words[0, 1] == 0


def test_awq_words_by_hand() -> None:
    """Outputs 0..7 of an input with codes 0..7: nibble i holds output (0, 2, 4, 6, 1, 3, 5, 7)[i]."""
    codes = np.zeros((8, 1, 32), np.uint8)
    codes[:, 0, 5] = range(8)
    words = pack_awq(BlockQuantized(codes, np.ones((8, 1), np.float32), None, 4, 32))["qweight"].view(np.uint32)
    assert words.shape == (32, 1) and words[5, 0] == 0x75316420
    assert AWQ_ORDER == (0, 2, 4, 6, 1, 3, 5, 7)


def test_group_order_by_hand() -> None:
    assert group_order(np.array([0, 0, 1, 1, 2]), 2) is None
    order = group_order(np.array([1, 0, 2, 0, 1]), 2)
    assert order is not None and order.tolist() == [1, 3, 0, 4, 2]
    for wrong in ([0, 0, 0, 1], [0, 0, 2, 2], [-1, -1, 0, 0]):
        with pytest.raises(ValueError, match="does not put 2 columns into every group"):
            group_order(np.array(wrong), 2)


# ---------------------------------------------------------------------- what has no code


def test_version_1_has_no_code_for_zero() -> None:
    with pytest.raises(ValueError, match=r"has no code for 0: use version 2 \(checkpoint_format \"gptq_v2\"\)"):
        pack_gptq(constant(4, 0))
    assert (pack_gptq(constant(4, 0), version=2)["qzeros"] == 0).all()
    assert (pack_gptq(constant(4, 1))["qzeros"] == 0).all()


def inexact() -> BlockQuantized:
    q = constant(4)
    return BlockQuantized(q.codes, q.scales + np.float32(1e-5), None, 4, 32)


@pytest.mark.parametrize("pack", [pack_gptq, pack_awq, pack_compressed])
def test_scales_must_be_exact(pack: Callable) -> None:
    with pytest.raises(ValueError, match="scales are not exact in float16: round them"):
        pack(inexact())
    name = "weight_scale" if pack is pack_compressed else "scales"
    assert pack(inexact(), scale_dtype=np.float32)[name].dtype == np.float32


def test_shapes_that_do_not_fill_words() -> None:
    q = constant(4)
    few = BlockQuantized(q.codes[:5], q.scales[:5], None, 4, 32)
    for pack in (pack_gptq, pack_awq):
        with pytest.raises(ValueError, match="packs 8 codes of 4 bits to a word, got 5 outputs"):
            pack(few)
    with pytest.raises(ValueError, match="packs 8 codes of 4 bits to a word, got 30 inputs"):
        pack_gptq(BlockQuantized(q.codes, q.scales, None, 4, 30))


def test_bits_and_orders_that_are_not_held() -> None:
    with pytest.raises(ValueError, match="AWQ holds 4 bits here, got 8"):
        pack_awq(constant(8))
    for pack in (pack_gptq, pack_compressed):
        with pytest.raises(ValueError, match="holds 4 or 8 bits here, got 2"):
            pack(constant(2))
    q = constant(4)
    with pytest.raises(ValueError, match="AWQ has no g_idx"):
        pack_awq(BlockQuantized(q.codes, q.scales, None, 4, 32, np.arange(32)[::-1].copy()))
