"""Our own products with weights in blocks, kernel by kernel, against a slow oracle."""

from __future__ import annotations

import ctypes
import mmap
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from native_oracle import (
    EPSILON,
    KERNELS,
    Weights,
    library_path,
    multiply,
    norm,
    normalize,
    product,
    random_weights,
    try_to_multiply,
)

ROWS = (1, 2, 3, 4, 5, 6, 7, 12, 13, 29)  # of x: where kernels change their way, and around
MANY_ROWS = 400  # more than a tile's rows are kept for
SHAPES = ((1, 1), (37, 320), (70, 97), (33, 416), (64, 256), (5, 2100))  # [N, K], of which few are whole blocks

each_kernel = pytest.mark.parametrize("kernel", KERNELS)
each_format = pytest.mark.parametrize(("bits", "block"), [(b, s) for b in (4, 8) for s in (32, 64, 128, 256)])
with_zeros_and_bias = pytest.mark.parametrize("extras", [False, True], ids=["plain", "zero points and bias"])


def activations(rows: int, columns: int) -> np.ndarray:
    """Rows of several magnitudes, float32 [rows, columns]."""
    rng = np.random.default_rng([rows, columns])
    return (rng.normal(size=(rows, columns)) * 10.0 ** rng.integers(-3, 3, (rows, 1))).astype(np.float32)


@each_kernel
def test_a_product_by_hand(kernel: str) -> None:
    """Scales of x are 1 and 2: codes 127 -64 0 | 4, and 127 1 | 0 (254, 2 and 0 in steps of 2)."""
    first, second = np.zeros(32, np.uint8), np.zeros(32, np.uint8)
    first[:3], second[0] = [9, 15, 3], 10
    w = Weights(4, 33, np.array([[first, second], [second, first]]), np.array([[0.5, 2], [1, 0.25]], np.float32))
    x = np.zeros((2, 33), np.float32)
    x[0, :3], x[0, 32] = [127, -64, 0], 508
    x[1, :2] = [254, 2]
    # Weights are code - 8. Of the first output 0.5 × (1, 7, -5, -8, ...), then 2 × 2; of the second (2, -8, ...), 0.25.
    by_hand = [
        [0.5 * (127 * 1 - 64 * 7) + 508 * 2 * 2, 127 * 2 + 64 * 8 + 508 * 0.25 * 1],
        [0.5 * (254 * 1 + 2 * 7), 254 * 2 - 2 * 8],
    ]
    assert by_hand == [[1871.5, 893.0], [134.0, 492.0]]
    assert multiply(kernel, w, x).tolist() == by_hand
    half = np.zeros((1, 33), np.float32)
    half[0, :4] = [127, 0.5, 1.5, 2.5]  # ties go to even: 127 0 2 2
    assert multiply(kernel, w, half).tolist() == [[0.5 * (127 - 2 * 5 - 2 * 8), 127 * 2 - 2 * 8 - 2 * 8]]


@each_kernel
@each_format
@with_zeros_and_bias
def test_products_are_the_oracles(kernel: str, bits: int, block: int, extras: bool) -> None:
    for shape in SHAPES:
        w = random_weights(bits, block, *shape, zeros=extras, bias=extras)
        for rows in (*ROWS, MANY_ROWS) if shape == SHAPES[2] else ROWS:
            x = activations(rows, w.columns)
            expected, off = product(w, x)
            found = multiply(kernel, w, x)
            assert (np.abs(found - expected) <= off).all(), (shape, rows, np.abs(found - expected).max())


@each_kernel
@pytest.mark.parametrize(("block", "columns"), [(32, 32 * 1010), (256, 128 * 1030)], ids=["blocks", "chunks"])
def test_long_rows(kernel: str, block: int, columns: int) -> None:
    """Of a thousand blocks, and of as many chunks of 128 columns."""
    w = random_weights(4, block, 3, columns, zeros=True, bias=False)
    x = activations(2, columns)
    expected, off = product(w, x)
    assert (np.abs(multiply(kernel, w, x) - expected) <= off).all()


@each_kernel
@each_format
@with_zeros_and_bias
def test_whole_numbers_come_out_exactly(kernel: str, bits: int, block: int, extras: bool) -> None:
    """Scales are powers of two and all sums have less than 24 bits, so that nothing is rounded: not one code is off."""
    for shape in SHAPES:
        w = random_weights(
            bits, block, *shape, zeros=extras, bias=False, scales=lambda rng, size: 2.0 ** rng.integers(-2, 0, size)
        )
        for rows in (*ROWS, MANY_ROWS) if shape == SHAPES[1] else ROWS:
            x = np.random.default_rng(rows).integers(-3, 4, (rows, w.columns)).astype(np.float32)
            x[:, ::block] = 127  # every block's largest, for a scale of 1
            expected, _ = product(w, x)
            np.testing.assert_array_equal(multiply(kernel, w, x), expected, str((shape, rows)))


@each_kernel
@each_format
@pytest.mark.parametrize("code", ["all 0", "all 1"])
def test_sums_do_not_saturate(kernel: str, bits: int, block: int, code: str) -> None:
    """The largest codes of both sides: two products of 255 × 127 leave the range of int16."""
    top = 2**bits - 1
    for rows in ROWS:
        x = np.full((rows, 416), 127, np.float32)
        x[1::2] = -127
        codes = np.full((35, -(-416 // block), block), 0 if code == "all 0" else top, np.uint8)
        for zero in (None, 0, top):
            zeros = None if zero is None else np.full(codes.shape[:2], zero, np.uint8)
            w = Weights(bits, 416, codes, np.ones(codes.shape[:2], np.float32), zeros)
            each = int(codes[0, 0, 0]) - w.zero(0, 0)
            assert (multiply(kernel, w, x) == 416 * each * x[:, :1]).all(), (rows, zero)


@each_kernel
@each_format
def test_extreme_rows(kernel: str, bits: int, block: int) -> None:
    """Of zeros, of huge values, of denormal ones and of those whose scale has no inverse, each among ordinary ones."""
    w = random_weights(bits, block, 37, 320, zeros=True, bias=False)
    for rows in ROWS:
        x = activations(rows, 320)
        x[0] = 0
        if rows > 1:
            x[1] *= np.float32(1e32)
        if rows > 2:
            x[2] = 1e-40
        if rows > 3:
            x[3] = np.where(np.arange(320) < 32, 1e-29, x[3])
        expected, off = product(w, x)
        found = multiply(kernel, w, x)
        assert (np.abs(found - expected) <= off).all(), rows
        assert not found[[0, 2] if rows > 2 else [0]].any(), rows


def half_scales(rng: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
    """Of every magnitude that 16 bits hold in full, both signs, and 0."""
    scales = (2.0 ** rng.uniform(-14, 15, size) * rng.choice([-1, 1], size)).astype(np.float16)
    return np.where(rng.random(size) < 0.1, np.float16(0), scales)


@each_kernel
@each_format
@with_zeros_and_bias
def test_scales_of_16_bits(kernel: str, bits: int, block: int, extras: bool) -> None:
    """Kept so where that is exact; the products are those of the same scales in 32 bits, bit for bit."""
    for shape in SHAPES:
        w = random_weights(bits, block, *shape, zeros=extras, bias=extras, scales=half_scales)
        zeros, bias = (None if part is None else np.concatenate([part, part[:1]]) for part in (w.zeros, w.bias))
        codes, scales = (np.concatenate([part, part[:1]]) for part in (w.codes, w.scales))
        for rows in ROWS:
            x = activations(rows, w.columns)
            found = multiply(kernel, w, x, half=True)
            expected, off = product(w, x)
            assert (np.abs(found - expected) <= off).all(), (shape, rows)
            for inexact in (1 / 3, 65520, 2.0**-15, np.inf, np.nan):  # of 11 bits, too large, too small, no numbers
                scales[-1, -1] = inexact
                more = Weights(bits, w.columns, codes, scales, zeros, bias)
                wide = multiply(kernel, more, x, half=False)
                np.testing.assert_array_equal(wide[:, : shape[0]], found, str((shape, rows, inexact)))


@each_kernel
@each_format
def test_a_row_has_the_same_product_among_others(kernel: str, bits: int, block: int) -> None:
    """Bit for bit, however many they are: one row, few or many are added up in one order."""
    w = random_weights(bits, block, 70, 416, zeros=True, bias=True)
    x = activations(29, 416)
    together = multiply(kernel, w, x)
    np.testing.assert_array_equal(together[::-1], multiply(kernel, w, x[::-1]))
    for count in (1, 2, 3, 4, 5, 6, 7, 8, 9, 13, 29):
        parts = [multiply(kernel, w, x[i : i + count]) for i in range(0, len(x), count)]
        np.testing.assert_array_equal(np.concatenate(parts), together, str(count))


# --------------------------------------------------------------------------------------- bounds


def between_guards(array: np.ndarray, at_end: bool) -> np.ndarray:
    """A copy that ends (or begins) where a page begins (or ends) that nobody may touch."""
    page = mmap.PAGESIZE
    size = -(-array.nbytes // page) * page
    region = mmap.mmap(-1, size + 2 * page)
    protect = ctypes.CDLL(None, use_errno=True).mprotect
    protect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    whole = np.frombuffer(region, np.uint8)
    start = page + (size - array.nbytes if at_end else 0)
    placed = whole[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    placed[...] = array
    for guard in (0, size + page):
        assert protect(whole.ctypes.data + guard, page, 0) == 0, "mprotect failed"
    return placed


def products_between_guards(kernel: str) -> None:
    """Runs in a process of its own, which a forbidden access ends. Weights are read out of a mapped file, whose end
    may be a page's."""
    for at_end in (True, False):
        for bits, block in ((b, s) for b in (4, 8) for s in (32, 64, 128, 256)):
            for n, k in SHAPES:
                w = random_weights(bits, block, n, k, zeros=True, bias=True)
                for rows in (1, 3, 7, 29):
                    multiply(kernel, w, activations(rows, k), lambda a, end=at_end: between_guards(a, end))


@each_kernel
@pytest.mark.parametrize("bias", [False, True], ids=["RMSNorm", "LayerNorm"])
@pytest.mark.parametrize("columns", [1, 15, 16, 97, 1280])
def test_norms(kernel: str, columns: int, bias: bool) -> None:
    """Small, plain and large rows, and one far from 0, whose variance a sum of squares alone would lose. A mean is off
    by what its sum is: 3 √n units for n additions, as in `product`."""
    rng = np.random.default_rng(columns)
    weight, added = rng.normal(size=(2, columns)).astype(np.float32)
    for size, middle in ((1e-4, 0), (1, 0), (1e4, 0), (1, 1000)):
        x = (rng.normal(size=columns) * size + middle).astype(np.float32)
        expected = norm(x, weight, added if bias else None, 1e-6)
        found = normalize(kernel, x, weight, added if bias else None, 1e-6)
        mean = 3 * (columns / 16 + 16) ** 0.5 * EPSILON * middle if bias else 0
        off = 1e-6 * (np.abs(expected) + np.abs(weight) + 1e-3) + mean * np.abs(weight) / max(x.std(), 1e-3)
        assert (np.abs(found - expected) <= off).all(), (size, middle, np.abs(found - expected).max())


@each_kernel
def test_norms_by_hand(kernel: str) -> None:
    x = np.array([3, 4, 0, 0], np.float32)  # the mean square is 6.25, the mean 1.75
    weight, bias = np.array([1, 2, 3, 4], np.float32), np.array([0, 0, 0, 7], np.float32)
    np.testing.assert_allclose(normalize(kernel, x, weight, None, 0), [1.2, 3.2, 0, 0], rtol=1e-6)
    np.testing.assert_allclose(normalize(kernel, x, weight, None, 93.75), [0.3, 0.8, 0, 0], rtol=1e-6)
    by_hand = np.array([1.25, 2 * 2.25, 3 * -1.75, 4 * -1.75]) / 3.1875**0.5 + bias
    np.testing.assert_allclose(normalize(kernel, x, weight, bias, 0), by_hand, rtol=1e-6)


@pytest.mark.skipif(sys.platform != "linux", reason="mprotect through ctypes is written for Linux")
@each_kernel
def test_nothing_beside_the_arrays_is_touched(kernel: str) -> None:
    multiply(kernel, random_weights(4, 32, 1, 32, zeros=False, bias=False), np.ones((1, 32)))  # or is skipped
    code = f"import test_native_kernels as t; t.products_between_guards({kernel!r})"
    path = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:0] = {path!r}; {code}"], capture_output=True, text=True
    )
    assert done.returncode == 0, f"signal {-done.returncode}" if done.returncode < 0 else done.stderr


def test_the_chosen_kernels_are_the_best_that_there_are() -> None:
    instructions = ctypes.CDLL(str(library_path())).edgevl_instructions
    instructions.restype = ctypes.c_char_p
    w, x = random_weights(4, 32, 1, 32, zeros=False, bias=False), np.ones((1, 32))
    assert try_to_multiply("abacus", w, x) is None
    usable = [name for name in KERNELS if try_to_multiply(name, w, x) is not None]
    assert (instructions() or b"").decode() == (usable[0] if usable else "")
