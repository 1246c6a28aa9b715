"""calibration/gptq.py and grids.py against the textbook: explicit inverses, loops and brute force in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edgevl.calibration.formats import dequantize_blocks, quantize_blocks
from edgevl.calibration.gptq import (
    GptqResult,
    HessianAccumulator,
    gptq_quantize,
    output_error,
    round_to_nearest,
    token_weights,
)
from edgevl.calibration.grids import CLIP_FACTORS, Grid
from edgevl.calibration.packing import pack_gptq, unpack_gptq
from edgevl.runtime.errors import EngineError, InputError

GRIDS = [(True, False), (True, True), (False, False)]  # symmetric, signed


def data(rows: int, columns: int, seed: int, tokens: int = 256) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight [rows, columns] and inputs [tokens, columns] that are correlated and of unequal size."""
    rng = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=rng) / columns**0.5
    sizes = torch.logspace(-1, 1, columns)[torch.randperm(columns, generator=rng)]
    x = torch.randn(tokens, columns, generator=rng) @ mix * sizes
    return torch.randn(rows, columns, generator=rng) * 0.05, x


# ---------------------------------------------------------------------- oracles


def slow_grid(w: np.ndarray, bits: int, symmetric: bool, signed: bool, factor: float) -> tuple[float, float]:
    """Scale, as fp16 stores it, and zero point of one group, number by number."""
    top = 2**bits - 1
    low, high, extreme = min(0.0, *w), max(0.0, *w), max(w, key=abs)
    if symmetric:
        scale = extreme * factor / -(2 ** (bits - 1)) if signed else abs(extreme) * factor * 2 / top
    else:
        scale = (high - low) * factor / top
    stored = float(np.float16(np.float32(scale))) if scale else 1.0
    if symmetric:
        return stored, 2.0 ** (bits - 1)
    return stored, float(np.clip(np.rint(-low * factor / stored), 0, top))


def slow_encode(w: float, scale: float, zero: float, bits: int) -> float:
    return float(np.clip(np.rint(w / scale) + zero, 0, 2**bits - 1))


def slow_fit(
    w: np.ndarray, bits: int, symmetric: bool, signed: bool, factors: tuple[float, ...], importance: np.ndarray
) -> tuple[float, float]:
    """The best of all factors, each tried in full."""
    best, found = np.inf, (1.0, 0.0)
    for factor in factors:
        scale, zero = slow_grid(w, bits, symmetric, signed, factor)
        error = sum(i * ((slow_encode(x, scale, zero, bits) - zero) * scale - x) ** 2 for x, i in zip(w, importance))
        if error < best * (1 - 2e-7):  # equal but for float32's rounding: the wider range stays
            best, found = error, (scale, zero)
    return found


def textbook(
    weight: torch.Tensor, hessian: torch.Tensor, bits: int, group: int, symmetric: bool, signed: bool,
    act_order: bool, clip: bool, damp: float,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """Optimal Brain Surgeon, column by column (arXiv 2210.17323 eq. 2): for every column the inverse Hessian of the
    columns still free is derived anew. -> codes and scales [N, K] per column."""
    w, h = weight.double().numpy().copy(), hessian.double().numpy()
    rows, columns = w.shape
    diagonal = np.diag(h).copy()
    damped = h + np.eye(columns) * damp * diagonal.mean()
    factors = CLIP_FACTORS if clip else (1.0,)
    order = np.argsort(-diagonal, kind="stable") if act_order else np.arange(columns)
    original = w.copy()
    codes, scales, zeros = np.zeros((3, rows, columns))
    for step, column in enumerate(order):
        if step == 0 if act_order else column % group == 0:
            for start in range(0, columns, group) if act_order else [column]:
                end = min(start + group, columns)
                for n in range(rows):
                    source = (original if act_order else w)[n, start:end]
                    fitted = slow_fit(source, bits, symmetric, signed, factors, diagonal[start:end])
                    scales[n, start:end], zeros[n, start:end] = fitted
        free = order[step:]
        inverse = np.linalg.inv(damped[np.ix_(free, free)])
        for n in range(rows):
            s, z = scales[n, column], zeros[n, column]
            codes[n, column] = slow_encode(w[n, column], s, z, bits)
            error = (w[n, column] - (codes[n, column] - z) * s) / inverse[0, 0]
            w[n, free] -= error * inverse[0]
    return codes, scales


def flat_codes(result: GptqResult) -> np.ndarray:
    q = result.weight
    return q.codes.reshape(len(q.codes), -1)[:, : q.columns]


# ---------------------------------------------------------------------- GPTQ


@pytest.mark.parametrize(("symmetric", "signed"), GRIDS)
@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize(("columns", "group", "block"), [(24, 8, 5), (22, 8, 16), (20, -1, 128), (9, 6, 4)])
def test_codes_equal_the_textbook(
    symmetric: bool, signed: bool, act_order: bool, clip: bool, columns: int, group: int, block: int
) -> None:
    weight, x = data(4, columns, seed=columns)
    hessian = x.T @ x
    options = {"bits": 4, "symmetric": symmetric, "signed": signed, "act_order": act_order, "clip": clip}
    result = gptq_quantize(weight, hessian, group_size=group, block=block, damp=0.01, **options)
    width = columns if group == -1 else group
    codes, scales = textbook(weight, hessian, 4, width, symmetric, signed, act_order, clip, 0.01)
    # corrected weights are float32 here and float64 there, so a scale may round to fp16's next number
    found = np.repeat(result.weight.scales, width, 1)[:, :columns]
    np.testing.assert_allclose(found, scales, rtol=0 if act_order else 1e-3)
    assert np.array_equal(flat_codes(result), codes)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    rows=st.integers(1, 5), columns=st.integers(1, 20), group=st.sampled_from([-1, 1, 4, 7, 16]),
    block=st.integers(1, 24), bits=st.sampled_from([2, 3, 4, 8]), act_order=st.booleans(), seed=st.integers(0, 999),
)  # fmt: skip
def test_codes_equal_the_textbook_for_any_size(
    rows: int, columns: int, group: int, block: int, bits: int, act_order: bool, seed: int
) -> None:
    weight, x = data(rows, columns, seed)
    options = {"act_order": act_order, "clip": True, "damp": 0.05}
    result = gptq_quantize(weight, x.T @ x, bits=bits, group_size=group, block=block, **options)
    width = columns if group == -1 else group
    codes, _ = textbook(weight, x.T @ x, bits, width, True, False, **options)
    assert np.array_equal(flat_codes(result), codes)


def test_two_by_two_by_hand() -> None:
    """H = [[2, 1], [1, 2]], no damping. The right column, rounded first or second, moves by -error * h01 / h11."""
    weight = torch.tensor([[7.5, 1.4], [-7.5, 3.4]])  # scale 7.5 * 2 / 15 = 1
    hessian = torch.tensor([[2.0, 1.0], [1.0, 2.0]])
    result = gptq_quantize(weight, hessian, bits=4, group_size=-1, damp=0, clip=False, act_order=False)
    # row 0: 7.5 -> clamp(8 + 8) = 15, worth 7, error 0.5; H⁻¹ = [[2, -1], [-1, 2]] / 3, so the second column becomes
    #        1.4 + 0.5 / 2 = 1.65 -> 2, where rounding to nearest says 1
    # row 1: -7.5 -> -8 (half to even), error 0.5; 3.4 + 0.25 = 3.65 -> 4
    assert flat_codes(result).tolist() == [[15, 10], [0, 12]]
    assert result.weight.scales.tolist() == [[1.0], [1.0]]
    # E = [[.5, -.6], [.5, -.6]]: .5² * 2 + .6² * 2 - 2 * .5 * .6 = 0.62 a row
    assert result.loss == pytest.approx(1.24, rel=1e-5)
    total = 2 * 7.5**2 + 2 * 1.4**2 + 2 * 7.5 * 1.4 + 2 * 7.5**2 + 2 * 3.4**2 - 2 * 7.5 * 3.4
    assert result.error == pytest.approx(1.24 / total, rel=1e-5)
    plain = [[0.5, 0.4], [0.5, 0.4]]
    assert result.rtn_error == pytest.approx(sum(2 * a * a + 2 * b * b + 2 * a * b for a, b in plain) / total, rel=1e-5)
    assert (result.damping, result.weight.zero_points) == (0, None)


def test_errors_fall_on_correlated_data() -> None:
    weight, x = data(64, 256, seed=0, tokens=2048)
    hessian = x.T @ x
    rtn = output_error(weight, dequantized(round_to_nearest(weight, bits=4, group_size=128)), hessian)
    found = {
        (act, clip): gptq_quantize(weight, hessian, bits=4, group_size=128, act_order=act, clip=clip).error
        for act in (False, True)
        for clip in (False, True)
    }
    assert found[False, False] < 0.75 * rtn
    assert found[True, False] < 0.5 * rtn
    assert found[True, True] < 0.9 * found[True, False]
    assert found[True, True] < 0.45 * rtn
    asymmetric = gptq_quantize(weight, hessian, bits=4, group_size=128, symmetric=False)
    assert asymmetric.error < found[True, True]


def dequantized(q: object) -> torch.Tensor:
    return torch.from_numpy(dequantize_blocks(q))  # type: ignore[arg-type]


@pytest.mark.parametrize("act_order", [True, False])
def test_diagnostics_are_those_of_the_result(act_order: bool) -> None:
    weight, x = data(8, 48, seed=5)
    hessian = x.T @ x
    result = gptq_quantize(weight, hessian, bits=4, group_size=16, act_order=act_order, damp=0.02)
    e = (weight - dequantized(result.weight)).double()
    h = hessian.double()
    damped = h + torch.eye(48) * 0.02 * h.diagonal().mean()
    assert result.loss == pytest.approx(float(((e @ damped) * e).sum()), rel=1e-4)
    total = ((x.double() @ weight.double().T) ** 2).sum()
    assert result.error == pytest.approx(float(((x.double() @ e.T) ** 2).sum() / total), rel=1e-4)
    rtn = round_to_nearest(weight, bits=4, group_size=16, importance=hessian.diagonal())
    assert result.rtn_error == pytest.approx(output_error(weight, dequantized(rtn), hessian), rel=1e-4)


def test_blocks_change_nothing_and_runs_are_equal() -> None:
    weight, x = data(16, 96, seed=9)
    before = x.T @ x
    hessian = before.clone()
    runs = [gptq_quantize(weight, hessian, bits=4, group_size=32, block=b) for b in (128, 128, 1, 7)]
    assert torch.equal(hessian, before)
    assert runs[0].loss == runs[1].loss and runs[0].weight.codes.tobytes() == runs[1].weight.codes.tobytes()
    for other in runs[2:]:  # the sums have another order
        assert np.mean(other.weight.codes != runs[0].weight.codes) < 0.01


def test_a_singular_hessian_raises_the_damping() -> None:
    weight, _ = data(4, 32, seed=1)
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(1))
    hessian = x.T @ x  # rank 3
    result = gptq_quantize(weight, hessian, bits=4, group_size=16, damp=0)
    assert 0 < result.damping <= 1e-4
    assert result.error < result.rtn_error
    assert gptq_quantize(weight, hessian, bits=4, group_size=16, damp=0.01).damping == 0.01


def test_what_is_no_hessian_is_refused() -> None:
    weight = torch.ones(2, 2)
    with pytest.raises(EngineError, match="2 channels cannot be factored"):
        gptq_quantize(weight, torch.tensor([[1.0, 100.0], [100.0, 1.0]]), bits=4, group_size=2)
    with pytest.raises(EngineError, match="not finite"):
        gptq_quantize(weight, torch.full((2, 2), torch.inf), bits=4, group_size=2)
    with pytest.raises(ValueError, match="expected \\(2, 2\\)"):
        gptq_quantize(weight, torch.eye(3), bits=4, group_size=2)
    with pytest.raises(InputError, match="damp is -1"):
        gptq_quantize(weight, torch.eye(2), bits=4, group_size=2, damp=-1)


def test_dead_columns_are_rounded_to_nearest() -> None:
    """An input that was always zero: its weights do not count, take no error from others and pass none on."""
    weight, x = data(6, 32, seed=3)
    x[:, [4, 17]] = 0
    weight[:, 4] = 0.4
    hessian = x.T @ x
    result = gptq_quantize(weight, hessian, bits=4, group_size=16).weight
    scales = result.scales.repeat(16, 1)
    for column in (4, 17):
        expected = np.rint(weight[:, column].numpy() / scales[:, column]).clip(-8, 7) + 8
        assert result.codes.reshape(6, 32)[:, column].tolist() == expected.tolist()
    assert np.all(result.scales[:, 0] < 0.8 * 0.4 * 2 / 15)  # the others' error decides
    live = torch.tensor([c for c in range(32) if c not in (4, 17)])
    fixed = {"bits": 4, "group_size": -1, "clip": False, "damp": 0}
    weight[:, [4, 17]] = 0  # so that a row's scale is that of its other columns
    with_dead = gptq_quantize(weight, hessian + 1e-3 * torch.diag((hessian.diagonal() == 0).float()), **fixed).weight
    without = gptq_quantize(weight[:, live], hessian[live][:, live], **fixed).weight
    assert np.array_equal(with_dead.codes[:, 0, live], without.codes[:, 0])


def test_no_input_at_all_means_rounding_to_nearest() -> None:
    weight, _ = data(6, 20, seed=4)
    result = gptq_quantize(weight, torch.zeros(20, 20), bits=4, group_size=8)
    plain = round_to_nearest(weight, bits=4, group_size=8)
    assert np.array_equal(result.weight.codes, plain.codes)
    assert (result.error, result.rtn_error) == (0, 0)


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_ragged_last_group(symmetric: bool) -> None:
    weight, x = data(8, 40, seed=2)
    result = gptq_quantize(weight, x.T @ x, bits=4, group_size=32, symmetric=symmetric).weight
    assert result.codes.shape == (8, 2, 32) and result.scales.shape == (8, 2) and result.columns == 40
    zero = np.full((8, 2), 8) if result.zero_points is None else result.zero_points
    assert (result.codes[:, 1, 8:] == zero[:, 1, None]).all()  # padding is the code of zero
    assert dequantize_blocks(result).shape == (8, 40)


def test_scales_are_what_a_checkpoint_stores() -> None:
    weight, x = data(16, 64, seed=6)
    result = gptq_quantize(weight, x.T @ x, bits=4, group_size=32)
    packed = pack_gptq(result.weight)  # raises where fp16 does not hold a scale exactly
    assert packed["scales"].dtype == np.float16
    back = unpack_gptq(packed["qweight"], packed["qzeros"], packed["scales"], packed["g_idx"], 4, 32)
    assert np.array_equal(dequantize_blocks(back), dequantize_blocks(result.weight))


# ---------------------------------------------------------------------- grids


@pytest.mark.parametrize(("symmetric", "signed"), GRIDS)
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("weighted", [True, False])
def test_grid_and_clip_search_equal_brute_force(symmetric: bool, signed: bool, bits: int, weighted: bool) -> None:
    weight, x = data(9, 40, seed=bits)
    weight[3] = 0
    weight[4] = weight[4].abs()
    weight[5] = -weight[5].abs()
    weight[6, 7] = 3.0  # an outlier
    importance = x.square().sum(0)
    q = round_to_nearest(
        weight,
        bits=bits,
        group_size=16,
        symmetric=symmetric,
        signed=signed,
        importance=importance if weighted else None,
    )
    factors = CLIP_FACTORS if weighted else (1.0,)
    w, weights = weight.double().numpy(), importance.double().numpy()
    for n in range(9):
        for g, start in enumerate(range(0, 40, 16)):
            part = slice(start, min(start + 16, 40))
            scale, zero = slow_fit(w[n, part], bits, symmetric, signed, factors, weights[part])
            assert q.scales[n, g] == scale
            assert (2 ** (bits - 1) if q.zero_points is None else q.zero_points[n, g]) == zero
            expected = [slow_encode(v, scale, zero, bits) for v in w[n, part]]
            assert q.codes[n, g, : len(expected)].tolist() == expected


@pytest.mark.parametrize(("symmetric", "signed"), [(True, True), (False, False)])
def test_without_a_search_the_grids_are_those_of_formats(symmetric: bool, signed: bool) -> None:
    weight, _ = data(8, 96, seed=8)
    ours = round_to_nearest(
        weight, bits=4, group_size=32, symmetric=symmetric, signed=signed, scale_dtype=torch.float32
    )
    theirs = quantize_blocks(weight.numpy(), 4, 32, symmetric)
    assert np.allclose(ours.scales, theirs.scales, rtol=1e-6)
    assert np.mean(ours.codes != theirs.codes) < 0.01


def test_grids_by_hand() -> None:
    w = torch.tensor([[-4.0, 2.0, 0.26, -0.24]])
    scale, zero = Grid(4).range(w, 1.0)
    assert (scale.tolist(), zero.tolist()) == ([float(np.float16(8 / 15))], [8.0])
    scale, zero = Grid(4, signed=True).range(w, 1.0)
    assert (scale.tolist(), zero.tolist()) == ([0.5], [8.0])
    assert Grid(4).encode(w, scale[:, None], zero[:, None]).tolist() == [[0, 12, 9, 8]]
    scale, zero = Grid(4, symmetric=False).range(w * 2.5, 0.5)  # -10 .. 5 becomes -5 .. 2.5
    assert (scale.tolist(), zero.tolist()) == ([0.5], [10.0])


def test_the_clip_search_follows_importance() -> None:
    """One outlier among small weights: kept if its input is large, cut down to the search's end if it is small."""
    weight = torch.tensor([[3.0] + [0.1, -0.15, 0.2, 0.05, -0.1, 0.12, -0.2] * 2])
    importance = torch.ones(15)
    importance[0] = 1e6
    assert round_to_nearest(weight, bits=4, group_size=-1, importance=importance).scales[0, 0] > 0.39
    importance[0] = 1e-6
    clipped = round_to_nearest(weight, bits=4, group_size=-1, importance=importance).scales[0, 0]
    assert clipped == np.float16(3.0 * CLIP_FACTORS[-1] * 2 / 15)


def test_tiny_and_large_weights_have_scales() -> None:
    tiny = round_to_nearest(torch.full((1, 4), 1e-9), bits=4, group_size=4)
    assert tiny.scales[0, 0] == 2.0**-24 and np.all(tiny.codes == 8)
    assert np.all(round_to_nearest(torch.zeros(1, 4), bits=4, group_size=4).scales == 1)
    with pytest.raises(EngineError, match=r"no scale in torch\.float16"):
        round_to_nearest(torch.full((1, 4), 1e6), bits=4, group_size=4)
    wide = round_to_nearest(torch.full((1, 4), 1e6), bits=4, group_size=4, scale_dtype=torch.float32)
    assert wide.scales[0, 0] == pytest.approx(1e6 / 7.5)


def test_wrong_arguments_are_refused() -> None:
    weight = torch.ones(2, 4)
    with pytest.raises(InputError, match="bits is 9"):
        round_to_nearest(weight, bits=9, group_size=4)
    with pytest.raises(InputError, match="group_size is 0"):
        round_to_nearest(weight, bits=4, group_size=0)
    with pytest.raises(ValueError, match=r"importance has shape \(3,\)"):
        round_to_nearest(weight, bits=4, group_size=4, importance=torch.ones(3))
    with pytest.raises(ValueError, match="expected \\[N, K\\]"):
        round_to_nearest(torch.ones(4), bits=4, group_size=4)
    with pytest.raises(EngineError, match="not finite"):
        round_to_nearest(torch.full((2, 2), torch.nan), bits=4, group_size=2)


# ---------------------------------------------------------------------- Hessian


def test_hessian_is_the_sum_over_all_tokens() -> None:
    x = torch.randn(3, 50, 12, generator=torch.Generator().manual_seed(0))
    x[:, 0] *= 100  # attention sinks
    found = HessianAccumulator(12, "layer 0")
    found.add(x[0])
    found.add(x[1:])
    expected = np.zeros((12, 12))
    for token in x.reshape(-1, 12).double().numpy():
        expected += np.outer(token, token)
    np.testing.assert_allclose(found.hessian.numpy(), expected, rtol=1e-5, atol=1e-2)
    assert found.tokens == 150
    assert torch.equal(found.absmax, x.abs().amax((0, 1)))
    without = sum(np.outer(t, t) for t in x[:, 1:].reshape(-1, 12).double().numpy())
    assert np.abs(np.diag(found.hessian.numpy())).sum() > 100 * np.diag(without).sum()  # the first tokens are in


def test_many_tokens_go_in_parts() -> None:
    x = torch.randn(9000, 5, generator=torch.Generator().manual_seed(0))
    weights = torch.rand(9000, generator=torch.Generator().manual_seed(1))
    found = HessianAccumulator(5)
    found.add(x, weights)
    expected = (x.double() * weights.double()[:, None]).T @ x.double()
    assert torch.allclose(found.hessian.double(), expected, rtol=1e-4, atol=1e-1)
    assert found.tokens == 9000


def test_weights_turn_visual_tokens_down_but_not_the_first() -> None:
    visual = torch.tensor([True, True, False, True])
    assert token_weights(visual, 0.25).tolist() == [1.0, 0.25, 1.0, 0.25]
    x = torch.eye(4)
    found = HessianAccumulator(4)
    found.add(x, token_weights(visual, 0.25))
    assert found.hessian.diagonal().tolist() == [1.0, 0.25, 1.0, 0.25]


def test_merged_is_as_if_seen_together() -> None:
    x = torch.randn(64, 7, generator=torch.Generator().manual_seed(2))
    whole, left, right = (HessianAccumulator(7) for _ in range(3))
    whole.add(x)
    left.add(x[:20])
    right.add(x[20:])
    left.merge(right)
    assert torch.allclose(left.hessian, whole.hessian, rtol=1e-5, atol=1e-4)
    assert torch.equal(left.absmax, whole.absmax) and left.tokens == whole.tokens == 64
    with pytest.raises(ValueError, match="8 channels to merge, expected 7"):
        left.merge(HessianAccumulator(8))


def test_activations_that_are_not_finite_name_the_layer() -> None:
    found = HessianAccumulator(4, "model.layers.3, input of down")
    x = torch.ones(5, 4)
    x[2, 1], x[3, 0] = torch.nan, torch.inf
    with pytest.raises(EngineError, match=r"model\.layers\.3, input of down: 2 of 20 numbers"):
        found.add(x)
    assert found.tokens == 0 and not found.hessian.any()


def test_wrong_tokens_and_weights_are_refused() -> None:
    found = HessianAccumulator(4, "here")
    with pytest.raises(ValueError, match=r"here: tokens \(2, 3\)"):
        found.add(torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"weights \(3,\)"):
        found.add(torch.ones(2, 4), torch.ones(3))
    with pytest.raises(ValueError, match="not negative"):
        found.add(torch.ones(2, 4), torch.tensor([1.0, -1.0]))
