"""calibration/observers.py by hand and against numpy over everything at once."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edgevl.calibration.observers import KVObserver, ModalityObserver, RangeObserver, TensorRange
from edgevl.runtime.errors import EngineError, InputError


def through_json(state: dict[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(state, allow_nan=False))


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_ranges_by_hand() -> None:
    seen = RangeObserver(3)
    assert seen.range == TensorRange(0, 0)
    seen.add(torch.tensor([[1.0, -5.0, 0.5], [2.0, 3.0, 0.0]]))
    assert seen.absmax.tolist() == [2.0, 5.0, 0.5] and seen.tokens == 2
    assert seen.range == TensorRange(-5, 3)
    seen.add(torch.tensor([[[-4.0, 0.0, 250.0]]]))
    assert seen.absmax.tolist() == [4.0, 5.0, 250.0] and seen.tokens == 3
    assert seen.range == TensorRange(-5, 250)
    assert seen.range.symmetric() == 250 / 127
    assert seen.range.affine() == (1.0, 5)


def test_zero_is_always_in_the_range() -> None:
    seen = RangeObserver(2)
    seen.add(torch.tensor([[3.0, 4.0]]))
    assert seen.range == TensorRange(0, 4)
    assert seen.range.affine() == (4 / 255, 0)
    assert TensorRange(-4, 0).affine() == (4 / 255, 255)


def test_a_tensor_of_zeros_has_scale_one() -> None:
    assert TensorRange(0, 0).symmetric() == 1.0
    assert TensorRange(0, 0).affine() == (1.0, 0)


def test_extremes_are_kept_however_rare() -> None:
    """One massive activation in ten thousand tokens: what a percentile would cut off."""
    x = noise(10_000, 4)
    x[17, 2] = 3065.0
    seen = RangeObserver(4)
    for part in x.split(999):
        seen.add(part)
    assert seen.range.high == 3065.0 and seen.absmax[2] == 3065.0
    assert seen.absmax[0] < 6


@settings(max_examples=40, deadline=None)
@given(
    parts=st.lists(st.integers(0, 5), min_size=1, max_size=6), channels=st.integers(1, 5), seed=st.integers(0, 999),
    cut=st.integers(0, 6),
)  # fmt: skip
def test_any_parts_in_any_observers_equal_numpy(parts: list[int], channels: int, seed: int, cut: int) -> None:
    x = noise(sum(parts), channels, seed=seed)
    one, two = RangeObserver(channels), RangeObserver(channels)
    for i, part in enumerate(x.split(parts)):
        (one if i < cut else two).add(part)
    resumed = RangeObserver(channels)
    resumed.load(through_json(one.state()))
    resumed.merge(two)
    everything = np.concatenate([x.numpy().astype(np.float64), np.zeros((1, channels))])
    assert resumed.absmax.tolist() == np.abs(everything).max(0).tolist()
    assert resumed.range == TensorRange(everything.min(), everything.max())
    assert resumed.tokens == sum(parts)


def test_visual_and_text_tokens_apart() -> None:
    seen = ModalityObserver(2, "layer 0, input of qkv")
    x = torch.tensor([[1.0, 2.0], [30.0, -40.0], [3.0, -4.0], [10.0, 50.0]])
    seen.add(x, torch.tensor([False, True, False, True]))
    assert seen.text.absmax.tolist() == [3.0, 4.0] and seen.text.range == TensorRange(-4, 3)
    assert seen.visual.absmax.tolist() == [30.0, 50.0] and seen.visual.range == TensorRange(-40, 50)
    both = seen.together()
    assert both.absmax.tolist() == [30.0, 50.0] and both.range == TensorRange(-40, 50) and both.tokens == 4
    other = ModalityObserver(2)
    other.load(through_json(seen.state()))
    other.merge(seen)
    assert other.text.tokens == 4 and other.visual.absmax.tolist() == [30.0, 50.0]
    seen.add(x[:1], torch.tensor([False]))  # no picture in this one
    assert (seen.text.tokens, seen.visual.tokens) == (3, 2)


def test_the_modality_mask_must_fit() -> None:
    seen = ModalityObserver(2, "here")
    with pytest.raises(ValueError, match=r"here: visual is torch.int64 \(4,\), expected torch.bool \(4,\)"):
        seen.add(torch.ones(4, 2), torch.ones(4, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"expected torch.bool \(4,\)"):
        seen.add(torch.ones(4, 2), torch.ones(3, dtype=torch.bool))
    bad = torch.ones(2, 2)
    bad[1] = torch.nan  # in the second half: the first must not be kept
    with pytest.raises(EngineError, match="2 of 4 numbers"):
        seen.add(bad, torch.tensor([False, True]))
    assert seen.together().tokens == 0


def test_cache_scales_by_hand() -> None:
    seen = KVObserver(2, 3)
    seen.add_keys(torch.tensor([[[1.27, -12.7, 0.0], [0.0, 0.0, 0.0]]]))
    seen.add_keys(torch.tensor([[[-2.54, 1.0, 0.0], [0.0, 0.0, 0.0]]]))
    seen.add_values(torch.tensor([[[1.0, 2.0, 3.0], [4.0, -5.0, 6.0]]]))
    scales = seen.scales()
    # channel 2 was never used: a thousandth of its head's largest; head 1 has no keys at all
    np.testing.assert_allclose(scales.key.numpy(), [[0.02, 0.1, 0.0001], [1, 1, 1]], rtol=1e-6)
    np.testing.assert_allclose(scales.value.numpy() * 127, [[1, 2, 3], [4, 5, 6]], rtol=1e-6)


def test_cache_codes_stay_within_half_a_step() -> None:
    """Per channel, keys with outlier channels lose little; with one scale for all of them, much more."""
    keys, values = noise(500, 2, 8), noise(500, 2, 8, seed=1)
    keys[:, :, 3] *= 12
    seen = KVObserver(2, 8)
    for part in zip(keys.split(77), values.split(77)):
        seen.add_keys(part[0])
        seen.add_values(part[1])
    scales = seen.scales()
    codes = torch.round(keys / scales.key)
    assert codes.abs().max() == 127
    assert ((codes * scales.key - keys).abs() <= scales.key * 0.5001).all()
    key, value = scales.per_tensor()
    assert (key, value) == pytest.approx((seen.key.range.symmetric(), seen.value.range.symmetric()), rel=1e-6)
    usual = [c for c in range(8) if c != 3]
    coarse = (torch.round(keys / key) * key - keys)[..., usual].square().mean()
    fine = (codes * scales.key - keys)[..., usual].square().mean()
    assert coarse > 50 * fine


def test_cache_observers_merge_and_resume() -> None:
    keys, values = noise(40, 2, 4), noise(40, 2, 4, seed=1)
    whole, left, right = (KVObserver(2, 4) for _ in range(3))
    for observer, part in ((whole, slice(None)), (left, slice(15)), (right, slice(15, None))):
        observer.add_keys(keys[part])
        observer.add_values(values[part])
    resumed = KVObserver(2, 4)
    resumed.load(through_json(left.state()))
    resumed.merge(right)
    assert torch.equal(resumed.scales().key, whole.scales().key)
    assert torch.equal(resumed.scales().value, whole.scales().value)
    assert torch.equal(whole.key.absmax.view(2, 4), keys.abs().amax(0))


def test_cache_observers_refuse_what_does_not_fit() -> None:
    seen = KVObserver(2, 4, "model.layers.1")
    with pytest.raises(EngineError, match=r"model\.layers\.1: no keys or no values"):
        seen.scales()
    seen.add_keys(torch.ones(1, 2, 4))
    with pytest.raises(EngineError, match="no keys or no values"):
        seen.scales()
    with pytest.raises(ValueError, match=r"heads \(4, 2\), expected \[\.\.\., 2, 4\]"):
        seen.add_values(torch.ones(4, 2))
    with pytest.raises(ValueError, match=r"heads \(4, 2\) to merge"):
        seen.merge(KVObserver(4, 2))  # as many channels, other heads
    with pytest.raises(EngineError, match=r"model\.layers\.1 \(values\): 8 of 8 numbers"):
        seen.add_values(torch.full((1, 2, 4), torch.nan))


def test_numbers_that_are_not_finite_name_the_layer_and_are_not_kept() -> None:
    seen = RangeObserver(2, "model.layers.7, input of down")
    with pytest.raises(EngineError, match=r"model\.layers\.7, input of down: 1 of 4 numbers are not finite"):
        seen.add(torch.tensor([[1.0, torch.inf], [1.0, 1.0]]))
    assert seen.tokens == 0 and not seen.absmax.any()
    with pytest.raises(ValueError, match=r"tokens \(2, 3\), expected \[\.\.\., 2\]"):
        seen.add(torch.ones(2, 3))
    with pytest.raises(ValueError, match="3 channels to merge, expected 2"):
        seen.merge(RangeObserver(3))


@pytest.mark.parametrize(
    "change",
    [
        {"absmax": [1.0]}, {"absmax": [1.0, -5.0]}, {"absmax": "abc"}, {"absmax": [1.0, None]}, {"low": 1.0},
        {"high": 9.0}, {"tokens": 1.5}, {"more": 1}, {"absmax": [1.0, float("inf")]},
    ],
)  # fmt: skip
def test_foreign_states_are_refused_and_change_nothing(change: dict[str, Any]) -> None:
    seen = RangeObserver(2, "here")
    seen.add(torch.tensor([[1.0, -5.0]]))
    before = seen.state()
    with pytest.raises(InputError, match=r"here: .*calibrate again"):
        seen.load({**before, **change})
    assert seen.state() == before
    with pytest.raises(InputError, match="calibrate again"):
        seen.load({k: v for k, v in before.items() if k != "low"})
    with pytest.raises(InputError, match="hold list"):
        seen.load([1, 2])  # type: ignore[arg-type]
