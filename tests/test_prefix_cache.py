"""Blocks of keys and values: what is restored must be what was stored, for every pair of sequences."""

from __future__ import annotations

import numpy as np
import pytest

from edgevl.runtime.errors import CapacityError, InputError
from edgevl.runtime.graph_spec import GraphSpec, TensorSpec
from edgevl.runtime.image_processing import VisionGrid
from edgevl.runtime.kv_cache import KVCache
from edgevl.runtime.prefix_cache import BLOCK, PrefixCache, common_prefix, token_identity
from edgevl.runtime.vision import EncodedImage

HEADS, DIM, CAPACITY = 2, 4, 600
SPEC = GraphSpec(
    "decoder",
    tuple(TensorSpec(n, t, ("batch", HEADS, "capacity", DIM)) for n, t in (("k", "float32"), ("v", "int8"))),
    (),
    (("k", "pk"), ("v", "pv")),
)
TOKEN_BYTES = HEADS * DIM * (4 + 1) + 3 * 8


def encoded(key: str, tokens: int) -> EncodedImage:
    """As much of one as an identity needs."""
    return EncodedImage(np.zeros((tokens, 8), np.float32), VisionGrid(1, 2, 2 * tokens), (1, 1), (1, 1), key, 0.0, 0.0)


def text(*ids: int) -> np.ndarray:
    return token_identity(np.array(ids, np.int64))


def compute(cache: KVCache, row: int, identity: np.ndarray) -> None:
    """What a decoder would do: keys and values that depend on the token and on all before it, oracle for `restored`."""
    start = int(cache.lengths[row])
    cache.reserve(row, len(identity) - start)
    values = np.cumsum(identity[:, 0] * 31 + identity[:, 1] % 97)[start:]
    for name, b in cache._buffers.items():
        scaled = values if name == "k" else values % 100
        b[row, :, start : len(identity)] = scaled[None, :, None] + np.arange(DIM)
    cache.lengths[row] = len(identity)


def held(cache: KVCache, row: int) -> dict[str, np.ndarray]:
    return cache.read(row, 0, int(cache.lengths[row]))


def expected(identity: np.ndarray, length: int) -> dict[str, np.ndarray]:
    cache = KVCache(SPEC, CAPACITY)
    compute(cache, 0, identity)
    return cache.read(0, 0, length)


def restored(prefixes: PrefixCache, identity: np.ndarray, have: int = 0) -> int:
    """Restore into a cache that has the first `have` tokens; what it then holds must be right."""
    cache = KVCache(SPEC, CAPACITY, 2)
    compute(cache, 1, identity[:have])
    added = prefixes.restore(identity, cache, 1)
    assert cache.lengths.tolist() == [0, have + added]
    for name, values in held(cache, 1).items():
        np.testing.assert_array_equal(values, expected(identity, have + added)[name])
    return added


def stored(prefixes: PrefixCache, identity: np.ndarray) -> None:
    cache = KVCache(SPEC, CAPACITY, 3)
    compute(cache, 2, identity)
    prefixes.store(identity, cache, 2)


def test_identity_tells_pictures_apart() -> None:
    ids = np.array([1, 9, 9, 9, 2, 9, 3])
    a, b, c = encoded("a", 3), encoded("b", 1), encoded("c", 3)
    ab = token_identity(ids, [a, b], (9,))
    assert ab[:, 0].tolist() == ids.tolist() and not ab[[0, 4, 6], 1:].any()
    assert (ab[1:4, 1:] == ab[1, 1:]).all() and (ab[5, 1:] != ab[1, 1:]).any()
    assert common_prefix(ab, token_identity(ids, [c, b], (9,))) == 1
    assert common_prefix(ab, token_identity(ids, [a, encoded("d", 1)], (9,))) == 5
    assert common_prefix(ab, token_identity(ids, [a, b], (9,))) == 7
    assert common_prefix(ab, token_identity(ids)) == 1  # the same ids as text
    assert common_prefix(ab, ab[:3]) == 3 and common_prefix(ab[:0], ab) == 0


def test_random_sequences_against_brute_force() -> None:
    """With no limit, what is restored is the longest prefix shared with anything stored, less the last token."""
    rng = np.random.default_rng(0)
    prefixes, before = PrefixCache(10**9), []
    base = rng.integers(0, 3, 500)
    for _ in range(120):
        cut, length = rng.integers(0, 400), rng.integers(1, 500)
        ids = np.concatenate([base[:cut], rng.integers(0, 3, 500)])[:length]
        identity = token_identity(ids)
        best = max((common_prefix(identity, other) for other in before), default=0)
        have = int(rng.integers(0, length)) if rng.random() < 0.3 else 0
        assert restored(prefixes, identity, have) == max(0, min(best, length - 1) - have)
        stored(prefixes, identity)
        before.append(identity)
    assert prefixes.nbytes == prefixes.tokens * TOKEN_BYTES
    prefixes.clear()
    assert prefixes.nbytes == prefixes.tokens == 0 and restored(prefixes, before[0]) == 0


def test_a_shared_beginning_is_kept_once() -> None:
    prefixes = PrefixCache(10**9)
    base = list(range(3 * BLOCK))
    for tail in range(5):
        stored(prefixes, text(*base, 1000 + tail))
    assert prefixes.tokens == 3 * BLOCK + 5
    stored(prefixes, text(*base, 1000, 7, 8))  # a longer end takes the place of the shorter
    assert prefixes.tokens == 3 * BLOCK + 5 + 2
    stored(prefixes, text(*base, 1000, 7))  # and holds this one
    assert prefixes.tokens == 3 * BLOCK + 5 + 2
    assert restored(prefixes, text(*base, 1000, 7, 8, 9)) == 3 * BLOCK + 3


def test_nothing_is_copied_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    prefixes, read = PrefixCache(10**9), []
    real = KVCache.read
    monkeypatch.setattr(KVCache, "read", lambda self, row, a, b: read.append((a, b)) or real(self, row, a, b))
    base = text(*range(BLOCK * 2 + 10))
    stored(prefixes, base[: BLOCK + 5])
    stored(prefixes, base)
    stored(prefixes, base)
    assert read == [(0, BLOCK), (BLOCK, BLOCK + 5), (BLOCK, 2 * BLOCK), (2 * BLOCK, 2 * BLOCK + 10)]


def test_the_limit_drops_the_least_recently_used() -> None:
    prefixes = PrefixCache(4 * BLOCK * TOKEN_BYTES)
    a, b, c = (text(*range(n, n + 2 * BLOCK)) for n in (0, 1000, 2000))
    stored(prefixes, a)
    stored(prefixes, b)
    assert restored(prefixes, a) == 2 * BLOCK - 1  # a is the younger now
    stored(prefixes, c)
    assert restored(prefixes, a) == 2 * BLOCK - 1 and restored(prefixes, c) == 2 * BLOCK - 1
    assert restored(prefixes, b) == 0 and prefixes.nbytes == 4 * BLOCK * TOKEN_BYTES


def test_the_end_of_a_long_prompt_goes_and_the_limit_holds() -> None:
    prefixes = PrefixCache(3 * BLOCK * TOKEN_BYTES + 100)
    old, long = text(*range(5000, 5000 + BLOCK)), text(*range(5 * BLOCK))
    stored(prefixes, old)
    stored(prefixes, long)
    assert restored(prefixes, long) == 3 * BLOCK and restored(prefixes, old) == 0
    stored(prefixes, long)
    assert prefixes.nbytes <= prefixes.limit_bytes
    tiny = PrefixCache(BLOCK)  # less than a block
    stored(tiny, long)
    assert tiny.nbytes == 0 and restored(tiny, long) == 0


def test_random_use_keeps_the_limit() -> None:
    rng, prefixes = np.random.default_rng(1), PrefixCache(7 * BLOCK * TOKEN_BYTES)
    for _ in range(200):
        ids = np.concatenate([np.arange(rng.integers(0, 200)), rng.integers(0, 4, rng.integers(1, 200))])
        restored(prefixes, token_identity(ids))
        stored(prefixes, token_identity(ids))
        assert 0 < prefixes.nbytes <= prefixes.limit_bytes
        assert prefixes.nbytes == prefixes.tokens * TOKEN_BYTES


def test_read_and_append_check_their_bounds() -> None:
    cache = KVCache(SPEC, 8)
    compute(cache, 0, text(1, 2, 3, 4, 5))
    with pytest.raises(ValueError, match="cannot read tokens 2 to 6 of row 0, it holds 5"):
        cache.read(0, 2, 6)
    part = cache.read(0, 1, 5)
    with pytest.raises(CapacityError, match="9 tokens are needed, the KV cache holds 8"):
        cache.append(0, part, 4)
    cache.append(0, part, 3)
    assert cache.lengths[0] == 8 and (cache.read(0, 5, 8)["k"] == part["k"][:, :3]).all()
    part["k"][:] = -1  # a copy
    assert (cache.read(0, 1, 5)["k"] >= 0).all()


def test_bad_limit() -> None:
    with pytest.raises(InputError, match="prefix cache is 0 bytes"):
        PrefixCache(0)
