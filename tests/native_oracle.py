"""Slow, obvious oracles of products with weights in blocks and of attention, and the library's own through ctypes."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from edgevl.runtime import native_kernels
from edgevl.runtime.errors import EngineError
from edgevl.runtime.native_kernels import INSTRUCTIONS, SWITCH, has_int8_kernels, native_library

KERNELS = INSTRUCTIONS
EPSILON = 2.0**-24  # half a unit in the last place of float32, relative
SMALLEST_SCALE = 1e-30  # of activations: below, a block counts as zeros (runtime/native/nbits.h)


@dataclass(frozen=True)
class Weights:
    """W [N, K] = (code - zero) × scale. What stands behind column K in the last block must not matter."""

    bits: int
    columns: int
    codes: np.ndarray  # uint8 [N, blocks, block]
    scales: np.ndarray  # float32 [N, blocks]
    zeros: np.ndarray | None = None  # uint8 [N, blocks]
    bias: np.ndarray | None = None  # float32 [N]

    @property
    def block(self) -> int:
        return self.codes.shape[2]

    @property
    def blocks(self) -> int:
        return self.codes.shape[1]

    def zero(self, n: int, b: int) -> int:
        return 2 ** (self.bits - 1) if self.zeros is None else int(self.zeros[n, b])

    def packed_codes(self) -> np.ndarray:
        """uint8 [N, blocks, block × bits / 8]: of two codes in a byte the low bits come first."""
        return self.codes.copy() if self.bits == 8 else self.codes[..., 0::2] | self.codes[..., 1::2] << 4

    def packed_zeros(self) -> np.ndarray | None:
        """uint8 [N, ceil(blocks × bits / 8)]; in a half byte behind the last block stands anything."""
        if self.zeros is None or self.bits == 8:
            return self.zeros
        padded = np.pad(self.zeros, ((0, 0), (0, self.blocks % 2)), constant_values=11)
        return padded[:, 0::2] | padded[:, 1::2] << 4


def random_weights(
    bits: int,
    block: int,
    rows: int,
    columns: int,
    *,
    zeros: bool,
    bias: bool,
    scales: Callable[[np.random.Generator, tuple[int, int]], np.ndarray] | None = None,
) -> Weights:
    rng, blocks = np.random.default_rng([bits, block, rows, columns]), -(-columns // block)
    size = (rows, blocks)
    return Weights(
        bits,
        columns,
        rng.integers(0, 2**bits, (*size, block), dtype=np.uint8),
        (rng.uniform(0.002, 0.02, size) if scales is None else scales(rng, size)).astype(np.float32),
        rng.integers(0, 2**bits, size, dtype=np.uint8) if zeros else None,
        rng.normal(size=rows).astype(np.float32) if bias else None,
    )


def round_block(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """float32 [M, k] -> int64 codes [M, k] and float32 scales [M]: the largest magnitude is 127, ties go to even."""
    scales = np.abs(x).max(1) / np.float32(127)
    inverses = np.array([np.float32(1) / s if s > SMALLEST_SCALE else np.float32(0) for s in scales], np.float32)
    return np.rint(x * inverses[:, None]).astype(np.int64), scales


def product(w: Weights, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """x [M, K] Wᵀ + bias in float64 [M, N], block by block and output by output, and what float32 may be off by.

    A kernel multiplies codes as they are stored and takes the zero points away afterwards, so that rounding is relative
    to those two sums: 3 √n units for n additions (Higham and Mary, "A new approach to probabilistic rounding error
    analysis", SIAM J. Sci. Comput. 41(5), 2019), in whatever order.
    """
    y, magnitude = np.zeros((len(x), len(w.codes))), np.zeros((len(x), len(w.codes)))
    for b in range(w.blocks):
        start, stop = b * w.block, min((b + 1) * w.block, w.columns)
        codes, scales = round_block(x[:, start:stop])
        for n in range(len(w.codes)):
            stored, zero = w.codes[n, b, : stop - start].astype(np.int64), w.zero(n, b)
            factor = scales.astype(np.float64) * float(w.scales[n, b])
            y[:, n] += factor * (codes @ (stored - zero))
            magnitude[:, n] += np.abs(factor) * (np.abs(codes) @ stored + zero * np.abs(codes.sum(1)))
    if w.bias is not None:
        y, magnitude = y + w.bias, magnitude + np.abs(w.bias)
    additions = w.blocks + 2 * -(-w.columns // 128) + 10
    return y, 3 * additions**0.5 * EPSILON * magnitude


class _Weight(ctypes.Structure):
    """Of runtime/native/nbits.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("codes", "scales", "zeros", "bias")),
        *((name, ctypes.c_int64) for name in ("rows", "columns", "blocks")),
        *((name, ctypes.c_int) for name in ("bits", "block", "half")),
        ("packed", ctypes.c_void_p),
    )


def library_path() -> Path:
    """Skips the test where no library was built."""
    found = sorted(Path(native_kernels.__file__).parent.glob(native_kernels._NAME))
    if not found:
        pytest.skip("edgevl's own kernels were not built on this machine (no C compiler as edgevl was installed)")
    return found[0]


def usable_library() -> Path:
    """The library that sessions are given; skips the test where there is none that can be used."""
    library_path()
    try:
        return native_library()
    except EngineError as e:
        pytest.skip(str(e))


def usable_instructions(int8: bool = False) -> list[str]:
    """Those of KERNELS that this processor and the library have; `int8`: with products of int8 by int8."""
    found = []
    with pytest.MonkeyPatch.context() as patch:
        for name in KERNELS:
            patch.setenv(SWITCH, name)
            try:
                native_library()
                found += [name] if not int8 or has_int8_kernels() else []
            except EngineError:
                continue
    return found


def as_it_is(array: np.ndarray) -> np.ndarray:
    return array


def multiply(
    name: str,
    w: Weights,
    x: np.ndarray,
    place: Callable[[np.ndarray], np.ndarray] = as_it_is,
    half: bool | None = None,
) -> np.ndarray:
    """float32 [M, N] by the kernels `name`; skips the test where this processor has not their instructions. The other
    arguments are `try_to_multiply`'s."""
    found = try_to_multiply(name, w, x, place, half)
    if found is None:
        pytest.skip(f"this processor has no {name}, or the library was built for another kind of processor")
    return found


def try_to_multiply(
    name: str,
    w: Weights,
    x: np.ndarray,
    place: Callable[[np.ndarray], np.ndarray] = as_it_is,
    half: bool | None = None,
) -> np.ndarray | None:
    """As `multiply`; None where this processor has no kernels `name`.

    Args:
        place: where each array of the call is put in memory.
        half: whether scales are expected to be kept in 16 bits; None: either.
    """
    given = [w.packed_codes(), w.scales, w.packed_zeros(), w.bias]
    arrays = [None if a is None else place(np.ascontiguousarray(a)) for a in given]
    pointers = [None if a is None else a.ctypes.data for a in arrays]
    weight = _Weight(*pointers, len(w.codes), w.columns, w.blocks, w.bits, w.block, 0, None)
    rows = place(np.ascontiguousarray(x, np.float32))
    y = place(np.full((len(x), len(w.codes)), np.nan, np.float32))
    function = ctypes.CDLL(str(library_path())).edgevl_multiply
    function.argtypes = (ctypes.c_char_p, *[ctypes.c_void_p] * 2, ctypes.c_int64, ctypes.c_void_p)
    if function(name.encode(), ctypes.byref(weight), rows.ctypes.data, len(x), y.ctypes.data):
        return None
    assert half in (None, bool(weight.half))
    return y.copy()


def norm(x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None, epsilon: float) -> np.ndarray:
    """Of rows [M, K] in float64: RMSNorm (Zhang and Sennrich 2019, arXiv:1910.07467, 4), or LayerNorm (Ba et al. 2016,
    arXiv:1607.06450, 2) where there is a bias."""
    x = x.astype(np.float64)
    if bias is not None:
        x = x - x.mean(-1, keepdims=True)
    y = x / np.sqrt((x**2).mean(-1, keepdims=True) + epsilon) * weight
    return y if bias is None else y + bias


class _Norm(ctypes.Structure):
    """Of runtime/native/nbits.h."""

    _fields_ = (("weight", ctypes.c_void_p), ("bias", ctypes.c_void_p), ("epsilon", ctypes.c_float))


def normalize(name: str, x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None, epsilon: float) -> np.ndarray:
    """A row [K] by the kernels `name`; skips the test as `multiply` does."""
    x, weight, y = np.ascontiguousarray(x), np.ascontiguousarray(weight), np.full(len(x), np.nan, np.float32)
    call = _Norm(weight.ctypes.data, None if bias is None else bias.ctypes.data, epsilon)
    function = ctypes.CDLL(str(library_path())).edgevl_normalize
    function.argtypes = (ctypes.c_char_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p)
    if function(name.encode(), ctypes.byref(call), x.ctypes.data, len(x), y.ctypes.data):
        pytest.skip(f"this processor has no {name}, or the library was built for another kind of processor")
    return y


@dataclass
class Tokens:
    """New tokens and the cache that they are written to, float32.

    q [B, S, H, d], k and v [B, S, G, d], cos and sin [B, S, d / 2], keys and values [B, G, capacity, d], last int32
    [B]: where each row's last new token goes.
    """

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    cos: np.ndarray
    sin: np.ndarray
    keys: np.ndarray
    values: np.ndarray
    last: np.ndarray


def random_tokens(
    heads: int, groups: int, dim: int, count: int, past: Sequence[int], capacity: int, size: float = 1.0
) -> Tokens:
    """As many rows as `past` has numbers of old tokens; behind each row's tokens the cache is full of NaN."""
    rng, batch = np.random.default_rng([heads, groups, dim, count, *past]), len(past)
    angles = rng.uniform(-7, 7, (batch, count, dim // 2))
    kept = rng.normal(size=(2, batch, groups, capacity, dim)).astype(np.float32) * np.float32(size)
    for row, n in enumerate(past):
        kept[:, row, :, n:] = np.nan
    shapes = (batch, count, heads, dim), (batch, count, groups, dim), (batch, count, groups, dim)
    q, k, v = (rng.normal(size=shape).astype(np.float32) * np.float32(size) for shape in shapes)
    cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    return Tokens(q, k, v, cos, sin, kept[0], kept[1], np.array(past, np.int32) + count - 1)


def attention(t: Tokens) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(output [B, S, H, d], keys, values, all in float64, and what float32 may be off by in each row [B, S, H, 1]).

    "Attention is all you need" (Vaswani et al. 2017, 3.2.1), causal, rotated in halves (transformers' rotate_half).
    An error in a score makes as large a relative one in its weight; a sum of d products in float32 is off by some √d
    units of the sum of their magnitudes.
    """
    (batch, count, heads, dim), groups = t.q.shape, t.k.shape[2]
    q, k = rotated(t.q, t.cos, t.sin), rotated(t.k, t.cos, t.sin)
    keys, values = t.keys.astype(np.float64), t.values.astype(np.float64)
    out, off = np.zeros(q.shape), np.zeros((batch, count, heads, 1))
    for b in range(batch):
        first = int(t.last[b]) + 1 - count
        keys[b, :, first : first + count] = k[b].transpose(1, 0, 2)
        values[b, :, first : first + count] = t.v[b].transpose(1, 0, 2)
        for s in range(count):
            for h in range(heads):
                seen = keys[b, h // (heads // groups), : first + s + 1], values[b, h // (heads // groups)]
                scores = seen[0] @ q[b, s, h] / dim**0.5
                weights = np.exp(scores - scores.max())
                weights /= weights.sum()
                out[b, s, h] = weights @ seen[1][: first + s + 1]
                magnitude = (np.abs(seen[0]) @ np.abs(q[b, s, h])).max() / dim**0.5
                error = 4 * dim**0.5 * EPSILON * magnitude + 2e-6  # of a score, and of 2^x and of sums
                off[b, s, h] = error * np.abs(seen[1][: first + s + 1]).max()
    return out, keys, values, off


def rotated(x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    """x [B, S, heads, d] by cos and sin [B, S, d / 2], in float64."""
    half = x.shape[-1] // 2
    first, second = x[..., :half].astype(np.float64), x[..., half:].astype(np.float64)
    c, s = cos[:, :, None].astype(np.float64), sin[:, :, None].astype(np.float64)
    return np.concatenate([first * c - second * s, second * c + first * s], -1)


class _Causal(ctypes.Structure):
    """Of runtime/native/causal.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("q", "k", "v")),
        *((name, ctypes.c_int64) for name in ("q_stride", "k_stride", "v_stride")),
        *((name, ctypes.c_void_p) for name in ("cosine", "sine", "last", "keys", "values", "packed", "out")),
        *((name, ctypes.c_int64) for name in ("batch", "count", "groups", "heads", "capacity", "blocks", "dim")),
        ("scale", ctypes.c_float),
    )


def attend(name: str, t: Tokens) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(output [B, S, H, d], keys, values) by the kernels `name`; skips the test as `multiply` does."""
    (batch, count, heads, dim), groups, capacity = t.q.shape, t.k.shape[2], t.keys.shape[2]
    given = [np.ascontiguousarray(a) for a in (t.q, t.k, t.v, t.cos, t.sin, t.last)]
    keys, values, out = t.keys.copy(), t.values.copy(), np.full(t.q.shape, np.nan, np.float32)
    q, k, v, cos, sin, last = (a.ctypes.data for a in given)
    strides, sizes = (
        (heads * dim, groups * dim, groups * dim),
        (batch, count, groups, heads // groups, capacity, 0, dim),
    )
    places = keys.ctypes.data, values.ctypes.data, None, out.ctypes.data
    call = _Causal(q, k, v, *strides, cos, sin, last, *places, *sizes, 0)
    function = ctypes.CDLL(str(library_path())).edgevl_attend
    function.argtypes = (ctypes.c_char_p, ctypes.c_void_p)
    if function(name.encode(), ctypes.byref(call)):
        pytest.skip(f"this processor has no {name}, or the library was built for another kind of processor")
    return out, keys, values


def resident_kb(path: Path) -> int:
    """Of the process's mappings of a file."""
    found, ours = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        head = line.split(maxsplit=5)
        if "-" in head[0] and not head[0].endswith(":"):
            ours = len(head) == 6 and head[5] == str(path.resolve())
        elif ours and head[0] == "Rss:":
            found += int(head[1])
    return found
