"""calibration/smooth.py on transformers' own layers in float64: outputs stay, inputs of the linear layers shrink."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from itertools import combinations

import numpy as np
import pytest
import torch
from checkpoints import random_model
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from edgevl.calibration.formats import quantize_channels
from edgevl.calibration.layers import DECODER_GROUPS, MERGER_GROUPS, VISION_GROUPS
from edgevl.calibration.smooth import (
    ALPHAS,
    column_absmax,
    kv_share,
    merger_share,
    search_alpha,
    smooth_decoder_layer,
    smooth_factors,
    smooth_merger,
    smooth_vision_block,
    w8a8_error,
)
from edgevl.runtime.config import ModelConfig
from edgevl.runtime.errors import EngineError, InputError

MODEL = random_model(seed=3, num_attention_heads=4, num_key_value_heads=2).double()
CONFIG = ModelConfig.from_hf(MODEL.config.to_dict(), {})
Run = Callable[[nn.Module], torch.Tensor]


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def run_decoder(layer: nn.Module) -> torch.Tensor:
    x = noise(1, 13, CONFIG.text.hidden_size, seed=1)
    x[:, 0] *= 20
    positions = torch.arange(13).expand(3, 1, 13)
    mask = torch.full((13, 13), -torch.inf, dtype=torch.float64).triu(1)[None, None]
    rotary = tuple(t.double() for t in MODEL.model.language_model.rotary_emb(x, positions))
    out = layer(x, position_embeddings=rotary, attention_mask=mask)
    return out[0] if isinstance(out, tuple) else out


def run_vision(block: nn.Module) -> torch.Tensor:
    angles = noise(20, CONFIG.vision.head_dim // 2, seed=2).repeat(1, 2)
    bounds = torch.tensor([0, 8, 20])  # two frames
    return block(
        noise(20, CONFIG.vision.embed_dim), cu_seqlens=bounds, position_embeddings=(angles.cos(), angles.sin())
    )


def run_merger(merger: nn.Module) -> torch.Tensor:
    return merger(noise(20, CONFIG.vision.embed_dim))


LOUD = [1, 6]  # channels
OUTLIERS = {  # producer -> layers that read it, and the columns of LOUD there
    "decoder": [
        ("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), LOUD),
        ("self_attn.v_proj", ("self_attn.o_proj",), [*LOUD, *(CONFIG.text.head_dim + c for c in LOUD)]),  # two heads
        ("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj"), LOUD),
        ("mlp.up_proj", ("mlp.down_proj",), LOUD),
    ],
    "vision": [("norm1", ("attn.qkv",), LOUD), ("norm2", ("mlp.fc1",), LOUD)],
    "merger": [("ln_q", ("mlp.0",), [CONFIG.vision.embed_dim * i + c for i in range(4) for c in LOUD])],
}


@torch.no_grad()
def layer_of(kind: str, outliers: bool = False) -> nn.Module:
    """A fresh copy; with `outliers`, some channels are 60 times as large, and read with smaller weights: as in real
    models, where channels with massive activations do not drown the others."""
    visual = MODEL.model.visual
    found = {"decoder": MODEL.model.language_model.layers[0], "vision": visual.blocks[0], "merger": visual.merger}[kind]
    layer = copy.deepcopy(found)
    for producer, readers, columns in OUTLIERS[kind] if outliers else ():
        layer.get_parameter(f"{producer}.weight")[LOUD] *= 60
        for reader in readers:
            layer.get_parameter(f"{reader}.weight")[:, columns] /= 40
    return layer


RUNS: dict[str, Run] = {"decoder": run_decoder, "vision": run_vision, "merger": run_merger}
GROUPS = {"decoder": DECODER_GROUPS, "vision": VISION_GROUPS, "merger": MERGER_GROUPS}


def smooth(kind: str, layer: nn.Module, absmax: Mapping[str, torch.Tensor], alpha: float) -> dict[str, torch.Tensor]:
    weights = {name: value.data for name, value in layer.named_parameters()}
    if kind == "decoder":
        return smooth_decoder_layer(weights, absmax, alpha, CONFIG.text)
    return (smooth_vision_block if kind == "vision" else smooth_merger)(weights, absmax, alpha, CONFIG.vision)


@torch.no_grad()
def inputs_of(kind: str, layer: nn.Module) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The layer's output, and the input [T, K] of every group of its linear layers."""
    seen: dict[str, torch.Tensor] = {}
    hooks = []
    for point, names in GROUPS[kind].items():

        def keep(module: nn.Module, args: tuple[torch.Tensor, ...], point: str = point) -> None:
            seen[point] = args[0].reshape(-1, args[0].shape[-1])

        hooks.append(layer.get_submodule(names[0]).register_forward_pre_hook(keep))
    out = RUNS[kind](layer)
    for hook in hooks:
        hook.remove()
    return out, seen


def subsets(points: Iterable[str]) -> list[tuple[str, ...]]:
    points = tuple(points)
    return [c for size in range(1, len(points) + 1) for c in combinations(points, size)]


SMOOTHABLE = {"decoder": ("qkv", "o", "gate_up", "down"), "vision": ("qkv", "proj", "fc1"), "merger": ("mlp.0",)}


# ---------------------------------------------------------------------- exactness


@pytest.mark.parametrize(("kind", "points"), [(k, s) for k, v in SMOOTHABLE.items() for s in subsets(v)])
@pytest.mark.parametrize("alpha", [0.5, 0.8])
def test_the_output_stays_and_inputs_are_divided(kind: str, points: tuple[str, ...], alpha: float) -> None:
    layer = layer_of(kind, outliers=True)
    before, inputs = inputs_of(kind, layer)
    original = {name: value.clone() for name, value in layer.state_dict().items()}
    factors = smooth(kind, layer, {p: inputs[p].abs().amax(0) for p in points}, alpha)
    after, smoothed = inputs_of(kind, layer)
    assert (after - before).abs().max() <= 1e-6 * before.abs().max()
    assert set(factors) == set(points)
    for point in GROUPS[kind]:
        expected = inputs[point] / factors[point] if point in points else inputs[point]
        assert (smoothed[point] - expected).abs().max() <= 1e-6 * expected.abs().max(), point
    changed = {name for name, value in layer.state_dict().items() if not torch.equal(value, original[name])}
    for point in points:
        assert {f"{name}.weight" for name in GROUPS[kind][point]} <= changed
        assert not torch.equal(factors[point], torch.ones_like(factors[point]))


def test_biases_follow_where_there_are_any() -> None:
    layer = layer_of("decoder")
    bias = layer.get_parameter("self_attn.v_proj.bias").clone()
    _, inputs = inputs_of("decoder", layer)
    factors = smooth("decoder", layer, {"o": inputs["o"].abs().amax(0)}, 0.5)["o"]
    heads = factors.view(kv_share(CONFIG.text))
    assert torch.equal(heads, heads[:, :1].expand_as(heads))  # the query heads of one kv head agree
    assert torch.allclose(layer.get_parameter("self_attn.v_proj.bias"), bias / heads[:, 0].flatten(), rtol=1e-12)

    block = layer_of("vision")
    before = {n: p.clone() for n, p in block.named_parameters()}
    _, inputs = inputs_of("vision", block)
    factors = smooth("vision", block, {p: inputs[p].abs().amax(0) for p in ("proj", "fc1")}, 0.5)
    qkv, width = block.get_parameter("attn.qkv.bias"), CONFIG.vision.embed_dim
    assert torch.equal(qkv[: 2 * width], before["attn.qkv.bias"][: 2 * width])  # q and k stay
    assert torch.allclose(qkv[2 * width :], before["attn.qkv.bias"][2 * width :] / factors["proj"], rtol=1e-12)
    assert torch.allclose(block.get_parameter("norm2.bias"), before["norm2.bias"] / factors["fc1"], rtol=1e-12)
    assert torch.equal(block.get_parameter("mlp.fc2.weight"), before["mlp.fc2.weight"])


def test_patches_of_one_merged_row_share_their_factors() -> None:
    merger = layer_of("merger")
    _, inputs = inputs_of("merger", merger)
    factors = smooth("merger", merger, {"mlp.0": inputs["mlp.0"].abs().amax(0)}, 0.5)["mlp.0"]
    outer, patches, width = merger_share(CONFIG.vision)
    assert (outer, patches, width) == (1, 4, CONFIG.vision.embed_dim)
    assert torch.equal(factors, factors[:width].repeat(4))


def test_every_point_may_have_its_own_alpha() -> None:
    layer, again = layer_of("decoder"), layer_of("decoder")
    _, inputs = inputs_of("decoder", layer)
    absmax = {p: inputs[p].abs().amax(0) for p in ("qkv", "down")}
    columns = column_absmax({n: p.data for n, p in layer.named_parameters()}, DECODER_GROUPS["qkv"])
    found = smooth_decoder_layer(
        {n: p.data for n, p in layer.named_parameters()}, absmax, {"qkv": 0.3, "down": 0.9}, CONFIG.text
    )
    assert torch.allclose(found["qkv"], smooth_factors(absmax["qkv"], columns, 0.3))
    same = smooth("decoder", again, absmax, 0.3)
    assert torch.allclose(found["qkv"], same["qkv"]) and not torch.allclose(found["down"], same["down"])


def test_points_without_a_fold_are_refused() -> None:
    block = layer_of("vision")
    before = {n: p.clone() for n, p in block.named_parameters()}
    with pytest.raises(InputError, match=r"points \['fc2'\] have no fold"):
        smooth("vision", block, {"fc2": torch.ones(128)}, 0.5)
    layer = layer_of("decoder")
    weights = {n: p.data for n, p in layer.named_parameters()}
    with pytest.raises(InputError, match=r"points \['o'\] have no fold or no alpha"):
        smooth_decoder_layer(weights, {"o": torch.ones(64)}, {"qkv": 0.5}, CONFIG.text)
    assert all(torch.equal(p, before[n]) for n, p in block.named_parameters())


# ---------------------------------------------------------------------- factors


def test_factors_by_hand() -> None:
    x, w = torch.tensor([16.0, 4.0, 1.0, 9.0]), torch.tensor([1.0, 4.0, 0.25, 1.0])
    assert smooth_factors(x, w, 0.5).tolist() == [4.0, 1.0, 2.0, 3.0]
    assert smooth_factors(x, w, 1.0).tolist() == x.tolist()
    assert smooth_factors(x, w, 0.0).tolist() == [1.0, 0.25, 4.0, 1.0]
    # channels 0, 1 and 2, 3 are heads; channel 0 goes with 2, 1 with 3: maxima 16, 9 and 1, 4
    assert smooth_factors(x, w, 0.5, (1, 2, 2)).tolist() == [4.0, 1.5, 4.0, 1.5]
    # 0 goes with 1, 2 with 3
    assert smooth_factors(x, w, 0.5, (2, 2, 1)).tolist() == [2.0, 2.0, 3.0, 3.0]


def test_balance_at_one_half() -> None:
    """At alpha 0.5 activations and weights end with equal maxima in every channel (the paper's section 4)."""
    x, w = noise(64).abs() + 0.01, noise(64, seed=1).abs() + 0.01
    factors = smooth_factors(x, w, 0.5)
    assert torch.allclose(x / factors, w * factors)


def test_channels_without_activations_or_weights() -> None:
    x, w = torch.tensor([0.0, 4.0, 1e9, 1e-9]), torch.tensor([1.0, 0.0, 1e-9, 1.0])
    factors = smooth_factors(x, w, 0.5)
    assert factors[0] == 1  # never used
    assert factors[1] == pytest.approx(2 / 1e-5**0.5, rel=1e-5)  # no weight: as if 1e-5 of the largest
    assert factors[2] == 1e4  # the bounds
    assert smooth_factors(x, w, 1.0)[3] == pytest.approx(1e-4)
    assert smooth_factors(x, torch.zeros(4), 0.5).tolist() == [1.0] * 4
    assert smooth_factors(torch.zeros(4), w, 0.5).tolist() == [1.0] * 4


def test_wrong_arguments_are_refused() -> None:
    one = torch.ones(4)
    with pytest.raises(InputError, match=r"alpha is 1\.5"):
        smooth_factors(one, one, 1.5)
    with pytest.raises(ValueError, match="for channels"):
        smooth_factors(one, torch.ones(3), 0.5)
    with pytest.raises(ValueError, match=r"for channels \(1, 2, 3\)"):
        smooth_factors(one, one, 0.5, (1, 2, 3))
    for bad in (-one, one * torch.nan, one * torch.inf):
        with pytest.raises(EngineError, match="negative or not finite"):
            smooth_factors(bad, one, 0.5)
    with pytest.raises(InputError, match="at least one"):
        search_alpha(torch.ones(2, 4), torch.ones(3, 4), alphas=())


# ---------------------------------------------------------------------- int8


def slow_codes(x: np.ndarray, activations: str) -> tuple[np.ndarray, np.ndarray]:
    """Whole numbers [T, K] and what they are multiplied with [T], one token at a time: one scale for all tokens; 256
    codes between the extremes of all tokens divided by their largest magnitude; or between those of each token."""
    unit = [token / np.abs(token).max() for token in x]
    low, high = min(0, *(u.min() for u in unit)), max(0, *(u.max() for u in unit))
    codes, scales = np.zeros(x.shape), np.zeros(len(x))
    for t, token in enumerate(x):
        scale, zero, bounds = np.abs(x).max() / 127, 0, (-128, 127)
        if activations == "token":
            scale, zero, bounds = (high - low) / 255 * np.abs(token).max(), round(-low / ((high - low) / 255)), (0, 255)
        elif activations == "affine":
            least, most = min(0, token.min()), max(0, token.max())
            scale = (most - least) / 255
            zero, bounds = round(-least / scale), (0, 255)
        codes[t] = [max(bounds[0], min(bounds[1], round(v / scale) + zero)) - zero for v in token]
        scales[t] = scale
    return codes, scales


def slow_w8a8(x: np.ndarray, weight: np.ndarray, activations: str) -> float:
    q = quantize_channels(weight.astype(np.float32))
    codes, scales = slow_codes(x, activations)
    found = np.zeros((len(x), len(weight)))
    for t in range(len(x)):
        for n in range(len(weight)):
            found[t, n] = sum(c * scales[t] * int(k) * float(q.scales[n]) for c, k in zip(codes[t], q.codes[n]))
    exact = x @ weight.T
    return float(((found - exact) ** 2).sum() / (exact**2).sum())


@pytest.mark.parametrize("activations", ["token", "affine", "tensor"])
def test_int8_error_equals_a_slow_loop(activations: str) -> None:
    x, weight = noise(7, 12), noise(5, 12, seed=1)
    x[2, 3], x[4] = 40.0, x[4].abs()
    found = w8a8_error(x, weight, activations=activations)  # type: ignore[arg-type]
    assert found == pytest.approx(slow_w8a8(x.numpy(), weight.numpy(), activations), rel=1e-4)
    factors = noise(12, seed=2).abs() + 0.1
    folded = w8a8_error(x, weight, factors, activations=activations)  # type: ignore[arg-type]
    assert folded == pytest.approx(slow_w8a8((x / factors).numpy(), (weight * factors).numpy(), activations), rel=1e-4)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 9999), loud=st.integers(1, 3), activations=st.sampled_from(["token", "tensor"]))
def test_smoothing_helps_where_channels_are_outliers(seed: int, loud: int, activations: str) -> None:
    x, weight = noise(64, 48, seed=seed), noise(32, 48, seed=seed + 1) * 0.1
    x[:, :loud] *= 100
    found = search_alpha(x, weight, activations=activations)  # type: ignore[arg-type]
    assert found.error < 0.35 * found.unsmoothed
    assert set(found.errors) == set(ALPHAS)
    assert found.error == min(found.errors.values()) == found.errors[found.best]


def test_the_search_uses_the_factors_that_are_folded() -> None:
    x, weight = noise(32, 16), noise(8, 16, seed=1)
    x[:, 5] *= 30
    wide = x.abs().amax(0) * 2
    found = search_alpha(x, weight, activations="tensor", alphas=(0.6,), share=(2, 2, 4), absmax=wide)
    factors = smooth_factors(wide, weight.abs().amax(0), 0.6, (2, 2, 4))
    assert found.error == w8a8_error(x, weight, factors, activations="tensor", absmax=wide)
    assert found.unsmoothed == w8a8_error(x, weight, activations="tensor", absmax=wide)
    assert found.best == 0.6
    assert w8a8_error(torch.zeros(2, 16).double(), weight) == 0


@torch.no_grad()
def int8_output(kind: str, layer: nn.Module, points: Iterable[str]) -> torch.Tensor:
    """The layer with its linear layers at `points` in W8A8: int8 weights per channel, one scale for activations."""
    hooks = []
    for point in points:
        for name in GROUPS[kind][point]:
            weight = layer.get_parameter(f"{name}.weight")
            q = quantize_channels(weight.float().numpy())
            weight.copy_(torch.from_numpy(q.codes * q.scales[:, None]))

            def rounded(module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
                scale = args[0].abs().max() / 127
                return (torch.round(args[0] / scale) * scale,)

            hooks.append(layer.get_submodule(name).register_forward_pre_hook(rounded))
    out = RUNS[kind](layer)
    for hook in hooks:
        hook.remove()
    return out


@pytest.mark.parametrize("kind", list(RUNS))
def test_one_scale_per_tensor_costs_less_after_smoothing(kind: str) -> None:
    points = SMOOTHABLE[kind]
    plain, smoothed = layer_of(kind, outliers=True), layer_of(kind, outliers=True)
    exact, inputs = inputs_of(kind, plain)
    smooth(kind, smoothed, {p: inputs[p].abs().amax(0) for p in points}, 0.7)
    before = (int8_output(kind, plain, points) - exact).square().mean()
    after = (int8_output(kind, smoothed, points) - exact).square().mean()
    assert after < 0.25 * before, after / before
