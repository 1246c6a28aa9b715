"""runtime/trt_feeds.py against the same, token by token."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from conftest import Pair

from edgevl.runtime.bundle import Bundle
from edgevl.runtime.errors import CapacityError
from edgevl.runtime.graph_spec import APPENDED, IN_PLACE, GraphSpec, decoder_spec, tensorrt_decoder_spec
from edgevl.runtime.kv_cache import KVCache
from edgevl.runtime.trt_feeds import MASKED, as_dtype, is_tensorrt_spec, store_appended, tensorrt_feeds

CAPACITY = 12


@pytest.fixture
def specs(tiny: Pair) -> dict[str, GraphSpec]:
    config = Bundle.open(tiny.bundle).model
    return {u: tensorrt_decoder_spec(config, "float16", CAPACITY, cache_update=u) for u in (IN_PLACE, APPENDED)}


def _feeds(
    past: list[int], sequence: int, spec: GraphSpec, pictures: int = 0, wanted: int = 1
) -> dict[str, np.ndarray]:
    rows, hidden = len(past), int(spec.input("image_embeds").shape[1])
    half = int(spec.input("rotary_cos").shape[2])
    random = np.random.default_rng(0)
    return {
        "input_ids": random.integers(0, 99, (rows, sequence)),
        "rotary_cos": random.standard_normal((rows, sequence, half)).astype(np.float32),
        "rotary_sin": random.standard_normal((rows, sequence, half)).astype(np.float32),
        "seqlens_k": np.array(past, np.int32) + sequence - 1,
        "total_sequence_length": np.array([max(past) + sequence], np.int32),
        "image_slots": np.arange(1, 1 + pictures),
        "image_embeds": random.standard_normal((pictures, hidden)).astype(np.float32),
        "logits_rows": np.arange(wanted),
    }


@pytest.mark.parametrize(("past", "sequence"), [([0], 5), ([4], 1), ([3, 0, 7], 1), ([7], 5), ([2, 6], 3)])
def test_the_mask_lets_a_token_see_what_stands_before_it(
    specs: dict[str, GraphSpec], past: list[int], sequence: int
) -> None:
    inside = tensorrt_feeds(_feeds(past, sequence, specs[IN_PLACE]), specs[IN_PLACE])
    mask = inside["attention_mask"]
    assert mask.shape == (len(past), 1, sequence, CAPACITY) and mask.dtype == np.float16
    for row, length in enumerate(past):
        for i in range(sequence):
            for slot in range(CAPACITY):
                seen = slot <= length + i  # slots that hold tokens not later than this one
                assert mask[row, 0, i, slot] == (0 if seen else MASKED)
    assert inside["write_indices"].tolist() == past
    appended = tensorrt_feeds(_feeds(past, sequence, specs[APPENDED]), specs[APPENDED])
    visible = max(1, *past) if len(past) > 1 else max(1, past[0])
    assert appended["attention_mask"].shape == (len(past), 1, sequence, visible + sequence)
    assert "write_indices" not in appended
    for row, length in enumerate(past):
        for i in range(sequence):
            expected = [j < length for j in range(visible)] + [j <= i for j in range(sequence)]
            assert (appended["attention_mask"][row, 0, i] == 0).tolist() == expected


def test_a_fixed_number_of_visible_tokens(specs: dict[str, GraphSpec]) -> None:
    found = tensorrt_feeds(_feeds([3, 1], 1, specs[APPENDED]), specs[APPENDED], visible=8)["attention_mask"]
    assert (found[:, 0, 0] == 0).sum(-1).tolist() == [4, 2] and found.shape[-1] == 9


def test_pictures_are_named_per_token(specs: dict[str, GraphSpec]) -> None:
    feeds = _feeds([0], 5, specs[IN_PLACE], pictures=3)
    found = tensorrt_feeds(feeds, specs[IN_PLACE])
    assert found["image_rows"].tolist() == [[-1, 0, 1, 2, -1]]
    np.testing.assert_allclose(found["image_embeds"], feeds["image_embeds"], rtol=1e-3)


def test_nothing_is_empty(specs: dict[str, GraphSpec]) -> None:
    found = tensorrt_feeds(_feeds([4], 2, specs[IN_PLACE], wanted=0), specs[IN_PLACE])
    assert all(value.size for value in found.values())
    assert (found["image_rows"] == -1).all() and found["logits_rows"].tolist() == [0]


def test_all_inputs_but_the_cache_are_given(specs: dict[str, GraphSpec]) -> None:
    for spec in specs.values():
        assert is_tensorrt_spec(spec)
        found = tensorrt_feeds(_feeds([1], 2, spec), spec)
        pasts = {past for past, _ in spec.cache}
        assert set(found) == {t.name for t in spec.inputs} - pasts
        for name, value in found.items():
            assert value.ndim == len(spec.input(name).shape) and value.dtype == np.dtype(spec.input(name).dtype)


def test_a_full_cache_is_told(specs: dict[str, GraphSpec]) -> None:
    for spec in specs.values():
        with pytest.raises(CapacityError, match=f"13 tokens are needed, the KV cache holds {CAPACITY}"):
            tensorrt_feeds(_feeds([8], 5, spec), spec)


def test_new_keys_are_stored_at_each_rows_length(specs: dict[str, GraphSpec]) -> None:
    spec = specs[APPENDED]
    cache = KVCache(spec, CAPACITY, 2)
    random = np.random.default_rng(1)
    heads, dim = int(spec.input(spec.cache[0][0]).shape[1]), int(spec.input(spec.cache[0][0]).shape[3])
    new = {n: random.standard_normal((2, heads, 3, dim)).astype(np.float16) for _, n in spec.cache}
    store_appended(cache.view(0, 2).buffers, new, np.array([5, 0]), spec)
    for past, name in spec.cache:
        buffer = cache.view(0, 2).buffers[past]
        assert (buffer[0, :, 5:8] == new[name][0]).all() and (buffer[1, :, :3] == new[name][1]).all()
        assert not buffer[0, :, :5].any() and not buffer[0, :, 8:].any() and not buffer[1, :, 3:].any()


def test_a_cache_of_another_capacity_than_the_graphs_is_told(specs: dict[str, GraphSpec]) -> None:
    with pytest.raises(CapacityError, match="exported for exactly 12; export with --max-tokens 99"):
        KVCache(specs[IN_PLACE], 99)


def test_bfloat16_rounds_as_ml_dtypes_does() -> None:
    random = np.random.default_rng(2)
    bits = random.integers(0, 2**32, 20_000, dtype=np.uint64).astype(np.uint32)
    values = np.concatenate(
        [bits.view(np.float32), np.array([0, -0.0, np.inf, -np.inf, 1 + 2**-8, 1 + 3 * 2**-8], np.float32)]
    )
    with np.errstate(all="ignore"):
        expected = values.astype(ml_dtypes.bfloat16)
    got = as_dtype(values, "bfloat16").view(ml_dtypes.bfloat16)
    numbers = ~np.isnan(values)
    assert (got.view(np.uint16)[numbers] == expected.view(np.uint16)[numbers]).all()
    assert np.isnan(got[~numbers].astype(np.float32)).all()
    assert as_dtype(got.view(np.uint16), "bfloat16").tolist() == got.view(np.uint16).tolist()


def test_lengths_are_not_taken_for_a_mask(tiny: Pair) -> None:
    assert not is_tensorrt_spec(decoder_spec(Bundle.open(tiny.bundle).model))


def test_specs_survive_the_manifest(specs: dict[str, GraphSpec]) -> None:
    for spec in specs.values():
        assert GraphSpec.from_dict(spec.to_dict()) == spec
    with pytest.raises(ValueError, match="cache_update 'sideways'"):
        GraphSpec.from_dict({**specs[APPENDED].to_dict(), "cache_update": "sideways"})
