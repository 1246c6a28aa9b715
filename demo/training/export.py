"""A run's weights as a checkpoint folder in the Hugging Face Qwen2-VL layout (bfloat16).

python -m demo.training.export RUN demo/model
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer

from demo.training import tokenizer as recipe
from demo.training.model import CONFIG, MEAN, STD
from edgevl.tasks import MAX_PIXELS

# Qwen2-VL's chat template: a default system prompt, placeholders for pictures and videos, optional picture numbers.
TEMPLATE = (
    "{% set image_count = namespace(value=0) %}{% set video_count = namespace(value=0) %}{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "{% endif %}<|im_start|>{{ message['role'] }}\n{% if message['content'] is string %}{{ message['content'] }}"
    "<|im_end|>\n{% else %}{% for content in message['content'] %}{% if content['type'] == 'image' or 'image' in "
    "content or 'image_url' in content %}{% set image_count.value = image_count.value + 1 %}{% if add_vision_id %}"
    "Picture {{ image_count.value }}: {% endif %}<|vision_start|><|image_pad|><|vision_end|>{% elif content['type'] =="
    " 'video' or 'video' in content %}{% set video_count.value = video_count.value + 1 %}{% if add_vision_id %}"
    "Video {{ video_count.value }}: {% endif %}<|vision_start|><|video_pad|><|vision_end|>{% elif 'text' in content %}"
    "{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endif %}{% endfor %}{% if add_generation_prompt %}"
    "<|im_start|>assistant\n{% endif %}"
)


def model_config(c: dict, t: Tokenizer) -> dict[str, Any]:
    """config.json, in the released (flat) layout."""
    i = t.token_to_id
    vision = dict(model_type="qwen2_vl", depth=c["vit_layers"], embed_dim=c["vit_dim"], mlp_ratio=4)
    vision |= dict(num_heads=c["vit_heads"], in_chans=3, in_channels=3, hidden_size=c["dim"], patch_size=c["patch"])
    vision |= dict(spatial_merge_size=2, spatial_patch_size=c["patch"], temporal_patch_size=2, hidden_act="quick_gelu")
    return dict(
        architectures=["Qwen2VLForConditionalGeneration"],
        model_type="qwen2_vl",
        torch_dtype="bfloat16",
        attention_dropout=0.0,
        bos_token_id=i("<|endoftext|>"),
        eos_token_id=i("<|im_end|>"),
        vision_start_token_id=i("<|vision_start|>"),
        vision_end_token_id=i("<|vision_end|>"),
        vision_token_id=i("<|vision_pad|>"),
        image_token_id=i("<|image_pad|>"),
        video_token_id=i("<|video_pad|>"),
        hidden_act="silu",
        hidden_size=c["dim"],
        initializer_range=0.02,
        intermediate_size=c["inter"],
        max_position_embeddings=4096,
        max_window_layers=c["layers"],
        num_attention_heads=c["heads"],
        num_hidden_layers=c["layers"],
        num_key_value_heads=c["kv_heads"],
        rms_norm_eps=c["eps"],
        rope_theta=c["theta"],
        sliding_window=4096,
        tie_word_embeddings=True,
        use_cache=True,
        use_sliding_window=False,
        vocab_size=c["vocab"],
        vision_config=vision,
        rope_scaling=dict(type="mrope", mrope_section=c["mrope"]),
    )


def tokenizer_config(t: Tokenizer) -> dict[str, Any]:
    """tokenizer_config.json"""
    plain = dict(lstrip=False, normalized=False, rstrip=False, single_word=False, special=True)
    return dict(
        tokenizer_class="Qwen2Tokenizer",
        add_prefix_space=False,
        bos_token=None,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token=None,
        errors="replace",
        split_special_tokens=False,
        clean_up_tokenization_spaces=False,
        model_max_length=4096,
        chat_template=TEMPLATE,
        additional_special_tokens=recipe.SPECIAL[1:],
        added_tokens_decoder={str(t.token_to_id(s)): dict(content=s, **plain) for s in recipe.SPECIAL},
    )


def export(weights: dict[str, torch.Tensor], out: Path) -> None:
    """Writes the folder: weights, tokenizer (fast and slow files), template, configs."""
    out.mkdir(parents=True, exist_ok=True)

    def put(name: str, value: Any) -> None:
        (out / name).write_text(json.dumps(value, indent=2, ensure_ascii=False), encoding="utf8")

    save_file({k: v.bfloat16().contiguous() for k, v in weights.items()}, out / "model.safetensors", {"format": "pt"})
    t = recipe.build()
    t.save(str(out / "tokenizer.json"))
    bpe = json.loads((out / "tokenizer.json").read_text(encoding="utf8"))["model"]
    put("vocab.json", bpe["vocab"])
    merges = "\n".join(" ".join(x) for x in bpe["merges"])
    (out / "merges.txt").write_text(f"#version: 0.2\n{merges}\n", encoding="utf8")
    put("tokenizer_config.json", tokenizer_config(t))
    put("chat_template.json", dict(chat_template=TEMPLATE))
    put("config.json", model_config(CONFIG, t))
    pad, end = t.token_to_id("<|endoftext|>"), t.token_to_id("<|im_end|>")
    put("generation_config.json", dict(bos_token_id=pad, pad_token_id=pad, do_sample=False, eos_token_id=[end, pad]))
    sizes = dict(min_pixels=784, max_pixels=MAX_PIXELS, patch_size=14, temporal_patch_size=2, merge_size=2)
    kind = dict(image_processor_type="Qwen2VLImageProcessor", processor_class="Qwen2VLProcessor")
    put("preprocessor_config.json", dict(**sizes, image_mean=MEAN, image_std=STD, **kind))


def main() -> None:
    """See the module."""
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("run", type=Path)
    ap.add_argument("out", type=Path)
    o = ap.parse_args()
    state = torch.load(o.run / "state.pt", weights_only=False, map_location="cpu")
    export(state["model"], o.out)
    print(f"{o.out}: step {state['step']}, {state['used']:.1f} minutes of training")


if __name__ == "__main__":
    main()
