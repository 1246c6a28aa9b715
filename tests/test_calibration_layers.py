"""calibration/layers.py against transformers' own layers, and what the watchers see."""

from __future__ import annotations

import numpy as np
import torch
from checkpoints import random_model

from edgevl.calibration import layers
from edgevl.runtime.config import ModelConfig
from edgevl.runtime.mrope import rotary_rows, vision_rotary_rows

MODEL = random_model(num_key_value_heads=2)
CONFIG = ModelConfig.from_hf(MODEL.config.to_dict(), {})


def test_decoder_layer_equals_transformers() -> None:
    text = MODEL.model.language_model
    positions = np.stack([np.arange(9), [0, 1, 2, 2, 3, 3, 4, 5, 6], [0, 1, 2, 3, 2, 3, 4, 5, 6]])
    cos, sin = (torch.from_numpy(a) for a in rotary_rows(positions, CONFIG.text))
    x = torch.randn(9, CONFIG.text.hidden_size, generator=torch.Generator().manual_seed(1))
    seen: dict[str, torch.Tensor] = {}
    weights = dict(text.layers[1].named_parameters())
    assert set(weights) == set(layers.DECODER_TENSORS)
    with torch.no_grad():
        ours = layers.decoder_layer(x, weights, cos, sin, CONFIG.text, seen.__setitem__)
        theirs = text.layers[1](
            x[None],
            position_embeddings=text.rotary_emb(x[None], torch.from_numpy(positions)[:, None]),
            attention_mask=torch.full((9, 9), -torch.inf).triu(1)[None, None],
        )
    theirs = (theirs[0] if isinstance(theirs, tuple) else theirs).view(9, -1)
    assert (ours - theirs).abs().max() < 1e-5
    assert list(seen) == ["qkv", "k", "v", "o", "gate_up", "down"]
    for point, names in layers.DECODER_GROUPS.items():
        assert all(weights[f"{n}.weight"].shape[1] == seen[point].shape[1] for n in names)
    assert seen["k"].shape == (9, 2, CONFIG.text.head_dim)
    k = torch.nn.functional.linear(seen["qkv"], weights["self_attn.k_proj.weight"], weights["self_attn.k_proj.bias"])
    assert (seen["k"].flatten(1)[0] - k[0]).abs().max() < 1e-6, "position 0 turns nothing"
    assert (seen["k"].flatten(1)[5] - k[5]).abs().max() > 0.1


def test_vision_tower_equals_transformers() -> None:
    tower, vision = MODEL.model.visual, CONFIG.vision
    pixels = torch.randn(3 * 24, vision.patch_dim, generator=torch.Generator().manual_seed(2))
    cos, sin = (torch.from_numpy(np.array(a)) for a in vision_rotary_rows(4, 6, 2, vision.head_dim))
    seen: list[str] = []
    with torch.no_grad():
        theirs = tower(pixels, grid_thw=torch.tensor([[3, 4, 6]]))
        x = tower.patch_embed(pixels).view(3, 24, -1)
        for block in tower.blocks:
            weights = dict(block.named_parameters())
            assert set(weights) == set(layers.VISION_TENSORS)
            x = layers.vision_block(x, weights, cos, sin, vision, lambda point, _: seen.append(point))
        merger = dict(tower.merger.named_parameters())
        ours = layers.merge(x, merger, vision, lambda point, _: seen.append(point))
    theirs = theirs if isinstance(theirs, torch.Tensor) else theirs.pooler_output
    assert (ours - theirs).abs().max() < 1e-5
    assert seen == [*layers.VISION_GROUPS] * len(tower.blocks) + [*layers.MERGER_GROUPS]
