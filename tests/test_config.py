"""ModelConfig: flat equals nested, the released shapes, and every guard."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from checkpoints import random_config, random_model
from transformers import Qwen2VLConfig

from edgevl.runtime.config import ModelConfig
from edgevl.runtime.errors import CheckpointError

# hidden, intermediate, layers, heads, key/value heads, vocabulary, tied: the config.json of each release.
RELEASED = {
    "2b": (1536, 8960, 28, 12, 2, 151936, True),
    "7b": (3584, 18944, 28, 28, 4, 152064, False),
    "72b": (8192, 29568, 80, 64, 8, 152064, False),
}


def released(size: str = "2b") -> dict[str, Any]:
    hidden, inter, layers, heads, kv_heads, vocab, tied = RELEASED[size]
    return {
        "architectures": ["Qwen2VLForConditionalGeneration"],
        "attention_dropout": 0.0,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "vision_start_token_id": 151652,
        "vision_end_token_id": 151653,
        "vision_token_id": 151654,
        "image_token_id": 151655,
        "video_token_id": 151656,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "initializer_range": 0.02,
        "intermediate_size": inter,
        "max_position_embeddings": 32768,
        "max_window_layers": layers,
        "model_type": "qwen2_vl",
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": kv_heads,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "sliding_window": 32768,
        "tie_word_embeddings": tied,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "use_sliding_window": False,
        "vision_config": {
            "depth": 32,
            "embed_dim": 1280,
            "mlp_ratio": 4,
            "num_heads": 16,
            "in_chans": 3,
            "hidden_size": hidden,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "spatial_patch_size": 14,
            "temporal_patch_size": 2,
        },
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
        "vocab_size": vocab,
    }


GENERATION = {"do_sample": True, "eos_token_id": [151645, 151643], "temperature": 0.01, "top_k": 1, "pad_token_id": 0}


@pytest.mark.parametrize("size", RELEASED)
def test_released_shapes(size: str) -> None:
    config = ModelConfig.from_hf(released(size), GENERATION)
    text, vision, tokens = config.text, config.vision, config.tokens
    assert (
        text.hidden_size,
        text.intermediate_size,
        text.num_hidden_layers,
        text.num_attention_heads,
        text.num_key_value_heads,
        text.vocab_size,
        text.tie_word_embeddings,
    ) == RELEASED[size]
    assert (text.head_dim, text.rope_theta, text.rms_norm_eps, text.mrope_section) == (128, 1e6, 1e-6, (16, 24, 24))
    assert (vision.depth, vision.embed_dim, vision.num_heads, vision.head_dim) == (32, 1280, 16, 80)
    assert (vision.intermediate_size, vision.merged_dim, vision.patch_dim) == (5120, 5120, 1176)
    assert vision.hidden_size == text.hidden_size
    assert (tokens.image_token_id, tokens.video_token_id, tokens.vision_start_token_id) == (151655, 151656, 151652)
    assert (tokens.vision_end_token_id, tokens.eos_token_ids) == (151653, (151645, 151643))
    assert config.generation == {"do_sample": True, "temperature": 0.01, "top_k": 1}


@pytest.mark.parametrize("size", RELEASED)
def test_nested_as_transformers_saves_it_equals_flat(size: str, tmp_path: Any) -> None:
    flat = released(size)
    Qwen2VLConfig(**copy.deepcopy(flat)).save_pretrained(tmp_path)
    nested = json.loads((tmp_path / "config.json").read_text())
    assert "text_config" in nested and "hidden_size" not in nested  # otherwise this compares flat with flat
    (tmp_path / "generation_config.json").write_text(json.dumps(GENERATION))
    assert ModelConfig.from_folder(tmp_path) == ModelConfig.from_hf(flat, GENERATION)


def test_whole_model_saved_by_transformers(tmp_path: Any) -> None:
    random_model().save_pretrained(tmp_path)
    config = ModelConfig.from_folder(tmp_path)
    assert (config.text.head_dim, config.text.rope_theta, config.text.tie_word_embeddings) == (16, 10000.0, True)
    assert config.tokens.eos_token_ids == (419,)


@pytest.mark.parametrize("section", [[2, 3, 3], [8, 0, 0], [0, 1, 7], [3, 3, 2]])
def test_any_mrope_section(section: list[int]) -> None:
    config = random_config(mrope_section=section).to_dict()
    config["text_config"]["rope_parameters"]["rope_theta"] = 5000.0
    text = ModelConfig.from_hf(config, {}).text
    assert text.mrope_section == tuple(section) and text.rope_theta == 5000.0


def test_rope_type_as_transformers_4_saves_it() -> None:
    config = released()
    config["rope_scaling"] = {"type": "default", "rope_type": "default", "mrope_section": [16, 24, 24]}
    assert ModelConfig.from_hf(config, {}) == ModelConfig.from_hf(released(), {})


def test_defaults_where_the_reference_has_them() -> None:
    config = released()
    for key in ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id", "hidden_act"):
        del config[key]
    assert ModelConfig.from_hf(config, {}) == ModelConfig.from_hf(released(), {})
    config = released()
    config["num_key_value_heads"] = None
    assert ModelConfig.from_hf(config, {}).text.num_key_value_heads == 12


def test_round_trip_through_json() -> None:
    config = ModelConfig.from_hf(released(), GENERATION)
    data = json.loads(json.dumps(config.to_dict()))
    assert ModelConfig.from_dict(data) == config
    with pytest.raises(KeyError, match="surplus"):
        ModelConfig.from_dict({**data, "surplus": 1})
    with pytest.raises(TypeError):
        ModelConfig.from_dict({**data, "text": {**data["text"], "surplus": 1}})
    del data["text"]["hidden_size"]
    with pytest.raises(TypeError):
        ModelConfig.from_dict(data)


BAD: list[tuple[str, Any, str]] = [
    ("model_type", "llava", "model_type is 'llava', expected 'qwen2_vl'"),
    ("model_type", None, "model_type is None"),
    ("text_config", 3, "text_config and vision_config must be objects"),
    ("vision_config", None, "text_config and vision_config must be objects"),
    ("hidden_size", ..., "'hidden_size' is missing"),
    ("hidden_size", "1536", "hidden_size is '1536', expected an integer"),
    ("hidden_size", 1536.5, "hidden_size is 1536.5, expected an integer"),
    ("hidden_size", True, "hidden_size is True"),
    ("num_hidden_layers", 0, "num_hidden_layers is 0, expected a positive number"),
    ("num_hidden_layers", float("inf"), "num_hidden_layers is inf"),
    ("rms_norm_eps", float("nan"), "rms_norm_eps is nan"),
    ("rms_norm_eps", ..., "'rms_norm_eps' is missing"),
    ("num_key_value_heads", 5, "do not divide"),
    ("num_attention_heads", 7, "do not divide"),
    ("head_dim", 64, "do not divide"),
    ("hidden_act", "gelu", "hidden_act is 'gelu', expected 'silu'"),
    ("use_sliding_window", True, "use_sliding_window is true"),
    ("layer_types", ["full_attention", "sliding_attention"], "only 'full_attention'"),
    ("rope_scaling", ..., "expected type 'mrope'"),
    ("rope_scaling", "mrope", "expected type 'mrope'"),
    ("rope_scaling", {"type": "yarn", "mrope_section": [16, 24, 24]}, "expected type 'mrope'"),
    ("rope_scaling", {"type": "mrope", "mrope_section": 64}, "expected type 'mrope'"),
    ("rope_scaling", {"type": "mrope", "mrope_section": [16, 24]}, "must be three counts"),
    ("rope_scaling", {"type": "mrope", "mrope_section": [16, 24, 25]}, "must be three counts that add up to .* 64"),
    ("rope_scaling", {"type": "mrope", "mrope_section": [-16, 40, 40]}, "must be three counts"),
    ("rope_theta", ..., "'rope_theta' is missing"),
    ("tie_word_embeddings", "false", "tie_word_embeddings is 'false', expected true or false"),
    ("image_token_id", "151655", "image_token_id is '151655', expected a token id"),
    ("image_token_id", -1, "image_token_id is -1"),
    ("eos_token_id", ..., "no eos_token_id"),
    ("eos_token_id", [151645, "x"], "eos_token_id is 'x'"),
    ("vision_config.depth", ..., "vision_config: 'depth' is missing"),
    ("vision_config.hidden_act", "gelu", "vision_config: hidden_act is 'gelu', expected 'quick_gelu'"),
    ("vision_config.in_chans", "3", "in_channels is '3'"),
    ("vision_config.num_heads", 7, "must give a multiple of 4"),
    ("vision_config.embed_dim", 1248, "must give a multiple of 4"),
    ("vision_config.hidden_size", 3584, "hidden_size 3584 differs from the decoder's 1536"),
    ("vision_config.rope_parameters", {"rope_theta": 500.0}, "expected rope_theta 10000"),
]


@pytest.mark.parametrize(("key", "value", "message"), BAD)
def test_guards(key: str, value: Any, message: str) -> None:
    config = released()
    *path, last = key.split(".")
    target = config
    for part in path:
        target = target[part]
    if value is ...:
        del target[last]
    else:
        target[last] = value
    with pytest.raises(CheckpointError, match=message) as raised:
        ModelConfig.from_hf(config, {}, where="somewhere.json")
    assert str(raised.value).startswith("somewhere.json")


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe{}", b"[1]", b"[" * 100000])
def test_config_json_that_is_none(content: bytes, tmp_path: Any) -> None:
    with pytest.raises(CheckpointError, match=r"config.json: not found"):
        ModelConfig.from_folder(tmp_path)
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"config.json: (not readable as JSON|expected a JSON object)"):
        ModelConfig.from_folder(tmp_path)
