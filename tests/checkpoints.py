"""Small random Qwen2-VL checkpoints in the released layout, made with transformers' own classes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

DEMO = Path(__file__).parent.parent / "demo" / "model"
TOKENS = {"image_token_id": 429, "video_token_id": 430, "vision_start_token_id": 426, "vision_end_token_id": 427}


def random_config(**text: Any) -> Qwen2VLConfig:
    """A tiny config with the demo tokenizer's special tokens; keyword arguments override text fields."""
    fields: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 512,
        "max_position_embeddings": 2048,
        "bos_token_id": 417,
        "eos_token_id": 419,
    }
    tied = text.pop("tie_word_embeddings", True)
    fields.update(text)
    half = fields["hidden_size"] // fields["num_attention_heads"] // 2
    section = fields.pop("mrope_section", [half - 2 * (half * 3 // 8), half * 3 // 8, half * 3 // 8])
    rope = {"rope_type": "default", "mrope_section": section, "rope_theta": 10000.0}
    fields.setdefault("rope_parameters", rope)
    vision = {"depth": 2, "embed_dim": 32, "num_heads": 2, "hidden_size": fields["hidden_size"], "mlp_ratio": 4}
    options: dict[str, Any] = {"tie_word_embeddings": tied, **TOKENS}
    return Qwen2VLConfig(text_config=fields, vision_config=vision, **options)


def random_model(seed: int = 0, **text: Any) -> Qwen2VLForConditionalGeneration:
    """An fp32 model in eval mode whose weights are large enough that greedy answers vary."""
    torch.manual_seed(seed)
    model = Qwen2VLForConditionalGeneration(random_config(**text)).eval().float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or "ln_q" in name:
                parameter.copy_(
                    1 + 0.2 * torch.randn_like(parameter)
                    if name.endswith("weight")
                    else 0.2 * torch.randn_like(parameter)
                )
            else:
                scale = parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 0.1
                parameter.copy_(torch.randn_like(parameter) * scale)
    return model


def save_checkpoint(
    model: Qwen2VLForConditionalGeneration, folder: Path, generation: dict[str, Any] | None = None
) -> Path:
    """Save weights and config as transformers does, with the demo's tokenizer, template and preprocessor beside."""
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.json", "preprocessor_config.json"):
        shutil.copy(DEMO / name, folder / name)
    settings = {"eos_token_id": [419, 417], "pad_token_id": 417, **(generation or {})}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    return folder
