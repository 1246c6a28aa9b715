"""One block of Qwen2-VL at a time in torch: what calibration runs its samples through, and where it looks.

Plain functions over dictionaries of float32 weights, named as in the checkpoint without the layer's prefix, so that one
layer is in memory at a time. `watch` sees the input of every group of linear layers (and the keys after the rotary,
and the values), and may give another tensor to go on with: rounded activations, say. Equal to transformers' layers
(modeling_qwen2_vl.py), which the tests hold them to.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from edgevl.runtime.config import TextConfig, VisionConfig

__all__ = [
    "DECODER_GROUPS",
    "DECODER_TENSORS",
    "MERGER_GROUPS",
    "VISION_GROUPS",
    "VISION_TENSORS",
    "Watch",
    "decoder_layer",
    "merge",
    "rms_norm",
    "vision_block",
]

Weights = Mapping[str, Tensor]
Watch = Callable[[str, Tensor], Tensor | None]  # point, [tokens, channels] -> what to go on with; None: the same

# Point -> linear layers that share that input.
DECODER_GROUPS: dict[str, tuple[str, ...]] = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "o": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}
VISION_GROUPS: dict[str, tuple[str, ...]] = {
    "qkv": ("attn.qkv",),
    "proj": ("attn.proj",),
    "fc1": ("mlp.fc1",),
    "fc2": ("mlp.fc2",),
}
MERGER_GROUPS: dict[str, tuple[str, ...]] = {"mlp.0": ("mlp.0",), "mlp.2": ("mlp.2",)}
DECODER_TENSORS = (
    "input_layernorm.weight",
    *(f"self_attn.{p}_proj.{part}" for p in "qkv" for part in ("weight", "bias")),
    "self_attn.o_proj.weight",
    "post_attention_layernorm.weight",
    *(f"mlp.{p}_proj.weight" for p in ("gate", "up", "down")),
)
VISION_TENSORS = tuple(
    f"{name}.{part}"
    for name in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
    for part in ("weight", "bias")
)


def _ignore(point: str, x: Tensor) -> None:
    pass


def _seen(watch: Watch, point: str, x: Tensor) -> Tensor:
    """`x`, or what `watch` gives instead; the watcher sees tokens as one axis."""
    other = watch(point, x.flatten(0, -2) if point not in ("k", "v") else x)
    return x if other is None else other.view(x.shape)


def _linear(x: Tensor, weights: Weights, name: str) -> Tensor:
    return F.linear(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"))


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """x [..., H] over the root of its mean square, times `weight`."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + epsilon) * weight


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [tokens, heads, d]; cos, sin [tokens, d / 2], the same for both halves."""
    a, b = x.chunk(2, -1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


def decoder_layer(
    x: Tensor, weights: Weights, cos: Tensor, sin: Tensor, config: TextConfig, watch: Watch = _ignore
) -> Tensor:
    """One decoder layer over one whole sequence.

    Args:
        x: float32 [S, hidden].
        weights: DECODER_TENSORS.
        cos, sin: float32 [S, head_dim / 2], `edgevl.runtime.mrope.rotary_rows` of the sequence's positions.
        watch: called with the points of DECODER_GROUPS, and "k" and "v" as [S, kv_heads, head_dim].
    """
    h = rms_norm(x, weights["input_layernorm.weight"], config.rms_norm_eps)
    h = _seen(watch, "qkv", h)
    q, k, v = (
        _linear(h, weights, f"self_attn.{p}_proj").view(len(x), heads, config.head_dim)
        for p, heads in zip("qkv", (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads))
    )
    q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
    k, v = _seen(watch, "k", k), _seen(watch, "v", v)
    q, k, v = (t.transpose(0, 1)[None] for t in (q, k, v))
    attended = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)[0]
    attended = attended.transpose(0, 1).reshape(len(x), -1)
    x = x + _linear(_seen(watch, "o", attended), weights, "self_attn.o_proj")
    h = rms_norm(x, weights["post_attention_layernorm.weight"], config.rms_norm_eps)
    h = _seen(watch, "gate_up", h)
    h = F.silu(_linear(h, weights, "mlp.gate_proj")) * _linear(h, weights, "mlp.up_proj")
    return x + _linear(_seen(watch, "down", h), weights, "mlp.down_proj")


def vision_block(
    x: Tensor, weights: Weights, cos: Tensor, sin: Tensor, config: VisionConfig, watch: Watch = _ignore
) -> Tensor:
    """One block of the vision encoder; every frame attends to itself.

    Args:
        x: float32 [frames, patches, embed_dim].
        weights: VISION_TENSORS.
        cos, sin: float32 [patches, head_dim / 2], `edgevl.runtime.mrope.vision_rotary_rows` of the grid.
        watch: called with the points of VISION_GROUPS, frames and patches as one axis.
    """
    frames, patches, width = x.shape
    h = F.layer_norm(x, (width,), weights["norm1.weight"], weights["norm1.bias"], config.layer_norm_eps)
    h = _seen(watch, "qkv", h)
    q, k, v = _linear(h, weights, "attn.qkv").view(frames, patches, 3, config.num_heads, -1).unbind(2)
    q, k = (_rotate_frames(t, cos, sin) for t in (q, k))
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(frames, patches, width)
    x = x + _linear(_seen(watch, "proj", attended), weights, "attn.proj")
    h = F.layer_norm(x, (width,), weights["norm2.weight"], weights["norm2.bias"], config.layer_norm_eps)
    h = _linear(_seen(watch, "fc1", h), weights, "mlp.fc1")
    h = h * torch.sigmoid(1.702 * h)
    return x + _linear(_seen(watch, "fc2", h), weights, "mlp.fc2")


def _rotate_frames(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [frames, patches, heads, d]"""
    frames, patches, heads, d = x.shape
    flat = x.reshape(frames * patches, heads, d)
    return _rotate(flat, cos.repeat(frames, 1), sin.repeat(frames, 1)).view(frames, patches, heads, d)


def merge(x: Tensor, weights: Weights, config: VisionConfig, watch: Watch = _ignore) -> Tensor:
    """The merger: [frames, patches, embed_dim] -> [tokens, hidden]; weights `ln_q`, `mlp.0`, `mlp.2`."""
    h = F.layer_norm(x, (x.shape[-1],), weights["ln_q.weight"], weights["ln_q.bias"], config.layer_norm_eps)
    h = h.reshape(-1, config.merged_dim)
    h = F.gelu(_linear(_seen(watch, "mlp.0", h), weights, "mlp.0"))
    return _linear(_seen(watch, "mlp.2", h), weights, "mlp.2")
