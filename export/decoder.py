"""The decoder: Qwen2 as an architecture over the dialect's vocabulary.

Reference: Qwen2VLTextModel in transformers' modeling_qwen2_vl.py. M-RoPE is the host's: the graph sees plain rotary
rows (see edgevl.runtime.mrope).
"""

from __future__ import annotations

from edgevl.export.dialect import Dialect
from edgevl.runtime.config import TextConfig

__all__ = ["write_decoder"]


def write_decoder(write: Dialect, config: TextConfig) -> None:
    """Write the whole decoder: input_ids and image_embeds to the logits of the wanted rows.

    Nothing reads the other rows behind the last attention: in a prompt, that spares nearly all of one layer's MLP. A
    dialect that fills the cache alone ends there.
    """
    x = write.place_images(write.embedding(write.input("input_ids"), "model.embed_tokens"))
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}"
        h = write.rms_norm(x, f"{prefix}.input_layernorm", config.rms_norm_eps)
        q, k, v = write.linears(h, [f"{prefix}.self_attn.{p}_proj" for p in "qkv"], bias=True)
        attended = write.causal_attention(q, k, v, layer)
        if attended is None:
            return
        if layer == config.num_hidden_layers - 1 and write.narrows_last_layer:
            wanted = write.input("logits_rows")
            x, attended = (write.take_rows(rows, wanted) for rows in (x, attended))
        x = write.add(x, write.linear(attended, f"{prefix}.self_attn.o_proj"))
        h = write.rms_norm(x, f"{prefix}.post_attention_layernorm", config.rms_norm_eps)
        x = write.add(x, write.gated_mlp(h, *(f"{prefix}.mlp.{p}_proj" for p in ("gate", "up", "down"))))
    if not write.narrows_last_layer:
        x = write.take_rows(x, write.input("logits_rows"))
    x = write.rms_norm(x, "model.norm", config.rms_norm_eps)
    table = "model.embed_tokens" if config.tie_word_embeddings else "lm_head"
    write.output("logits", write.lm_head(x, table))
