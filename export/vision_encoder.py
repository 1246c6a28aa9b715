"""The vision encoder and its merger, as an architecture over the dialect's vocabulary.

Reference: Qwen2VisionTransformerPretrainedModel in transformers' modeling_qwen2_vl.py. The frames of one call have
one size and attend each to itself, so there is no mask; the 2D rotary rows come from the host.
"""

from __future__ import annotations

from edgevl.export.dialect import Dialect
from edgevl.runtime.config import VisionConfig

__all__ = ["write_vision_encoder"]


def write_vision_encoder(write: Dialect, config: VisionConfig) -> None:
    """Write patches [frames, patches, 1176] -> image_embeds [frames × patches / merge², hidden]."""
    eps = config.layer_norm_eps
    x = write.patch_embedding(write.input("patches"), "visual.patch_embed.proj")
    for block in range(config.depth):
        prefix = f"visual.blocks.{block}"
        h = write.layer_norm(x, f"{prefix}.norm1", eps)
        attended = write.frame_attention(h, f"{prefix}.attn.qkv")
        x = write.add(x, write.linear(attended, f"{prefix}.attn.proj", bias=True))
        h = write.layer_norm(x, f"{prefix}.norm2", eps)
        h = write.quick_gelu(write.linear(h, f"{prefix}.mlp.fc1", bias=True))
        x = write.add(x, write.linear(h, f"{prefix}.mlp.fc2", bias=True))
    # The processor orders patches so that the merge² patches of one token are neighbours.
    x = write.merge_rows(write.layer_norm(x, "visual.merger.ln_q", eps), config.merged_dim)
    x = write.gelu(write.linear(x, "visual.merger.mlp.0", bias=True))
    write.output("image_embeds", write.linear(x, "visual.merger.mlp.2", bias=True))
