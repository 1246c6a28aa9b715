"""The model's configuration, read from a Hugging Face `config.json`; knows no framework.

Field names are those of the checkpoint. Both layouts are read: flat (as released: text fields at the top level) and
nested (`text_config`, as transformers 5 saves it). Keys that change the arithmetic and are missing, or hold a value
that the graphs do not implement, raise; keys that only concern training are ignored.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from edgevl.runtime.errors import CheckpointError

__all__ = ["ModelConfig", "SpecialTokens", "TextConfig", "VisionConfig"]

MODEL_TYPE = "qwen2_vl"
_MOST = 1e15  # beyond it a number is a mistake, and products of such have no float
VISION_ROPE_THETA = 10000.0  # fixed in the reference, modeling_qwen2_vl.py VisionRotaryEmbedding


@dataclass(frozen=True)
class TextConfig:
    """The decoder: Qwen2 with M-RoPE."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    rms_norm_eps: float
    rope_theta: float
    mrope_section: tuple[int, int, int]  # how many of the head_dim / 2 frequencies turn with t, h and w
    tie_word_embeddings: bool
    max_position_embeddings: int


@dataclass(frozen=True)
class VisionConfig:
    """The vision encoder and its merger."""

    depth: int
    embed_dim: int
    num_heads: int
    mlp_ratio: float
    in_channels: int
    patch_size: int
    temporal_patch_size: int
    spatial_merge_size: int
    hidden_size: int  # of the merger's output: the decoder's hidden_size
    layer_norm_eps: float = 1e-6  # fixed in the reference, modeling_qwen2_vl.py Qwen2VLVisionBlock

    @property
    def head_dim(self) -> int:
        return self.embed_dim // self.num_heads

    @property
    def intermediate_size(self) -> int:
        return int(self.embed_dim * self.mlp_ratio)

    @property
    def merged_dim(self) -> int:
        """Width of one merger row: spatial_merge_size² patches side by side."""
        return self.embed_dim * self.spatial_merge_size**2

    @property
    def patch_dim(self) -> int:
        """Numbers in one flattened patch: channels × temporal × patch × patch (1176 as released)."""
        return self.in_channels * self.temporal_patch_size * self.patch_size**2


@dataclass(frozen=True)
class SpecialTokens:
    """Token ids with a meaning to the runtime, from config.json and generation_config.json."""

    image_token_id: int
    video_token_id: int
    vision_start_token_id: int
    vision_end_token_id: int
    eos_token_ids: tuple[int, ...]


@dataclass(frozen=True)
class ModelConfig:
    text: TextConfig
    vision: VisionConfig
    tokens: SpecialTokens
    generation: dict[str, Any] = field(default_factory=dict)  # sampling defaults of generation_config.json

    @classmethod
    def from_folder(cls, folder: str | Path) -> ModelConfig:
        """Read `config.json` and, where present, `generation_config.json` of a checkpoint folder.

        Raises:
            CheckpointError: no or malformed config.json, another architecture, a missing or unsupported value.
        """
        path = Path(folder) / "config.json"
        generation = Path(folder) / "generation_config.json"
        return cls.from_hf(_read_json(path), _read_json(generation) if generation.exists() else {}, where=str(path))

    @classmethod
    def from_hf(cls, config: dict[str, Any], generation: dict[str, Any], where: str = "config.json") -> ModelConfig:
        """Parse the Hugging Face dictionaries; `where` names the file in errors."""
        model_type = config.get("model_type")
        if model_type != MODEL_TYPE:
            raise CheckpointError(
                f"{where}: model_type is {model_type!r}, expected {MODEL_TYPE!r}: edgevl reads Qwen2-VL only"
            )
        text = config.get("text_config", config)
        if not isinstance(text, dict) or not isinstance(config.get("vision_config"), dict):
            raise CheckpointError(f"{where}: text_config and vision_config must be objects; re-download the checkpoint")
        vision = config["vision_config"]
        return cls(
            text=_text_config(text, config, where),
            vision=_vision_config(vision, text, where),
            tokens=_special_tokens(config, text, generation, where),
            generation={k: generation[k] for k in _GENERATION_KEYS if k in generation},
        )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> ModelConfig:
        """The inverse of `to_dict`, strict: an unknown or missing key raises `TypeError` or `KeyError`."""
        text = dict(data["text"])
        text["mrope_section"] = tuple(text["mrope_section"])
        tokens = dict(data["tokens"])
        tokens["eos_token_ids"] = tuple(tokens["eos_token_ids"])
        unknown = set(data) - {"text", "vision", "tokens", "generation"}
        if unknown:
            raise KeyError(f"unknown keys {sorted(unknown)}")
        return cls(
            TextConfig(**text), VisionConfig(**data["vision"]), SpecialTokens(**tokens), dict(data["generation"])
        )


_GENERATION_KEYS = ("do_sample", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "max_new_tokens")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"{path}: not found; a Qwen2-VL checkpoint folder has config.json and *.safetensors"
        ) from None
    except (OSError, ValueError, RecursionError) as e:
        raise CheckpointError(f"{path}: not readable as JSON ({e}); re-download the checkpoint") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def _number(source: dict[str, Any], key: str, where: str, kind: type = int) -> Any:
    if key not in source:
        raise CheckpointError(f"{where}: {key!r} is missing; expected a number")
    value = source[key]
    # JSON as Python reads it has NaN and Infinity, and integers that no float holds.
    ok = isinstance(value, (int, float)) and not isinstance(value, bool) and -_MOST <= value <= _MOST
    if not ok or (kind is int and value != int(value)):
        expected = "an integer" if kind is int else "a number"
        raise CheckpointError(f"{where}: {key} is {value!r:.60}, expected {expected} of at most {_MOST:.0e}")
    if value <= 0:
        raise CheckpointError(f"{where}: {key} is {value!r}, expected a positive number")
    return kind(value)


def _text_config(text: dict[str, Any], config: dict[str, Any], where: str) -> TextConfig:
    hidden, heads = _number(text, "hidden_size", where), _number(text, "num_attention_heads", where)
    kv_heads = heads if text.get("num_key_value_heads") is None else _number(text, "num_key_value_heads", where)
    head_dim = _number(text, "head_dim", where) if text.get("head_dim") else hidden // heads
    if head_dim * heads != hidden or heads % kv_heads:
        raise CheckpointError(
            f"{where}: {heads} heads of {head_dim} over hidden_size {hidden} with {kv_heads} key/value heads "
            "do not divide"
        )
    if text.get("hidden_act", "silu") != "silu":
        raise CheckpointError(f"{where}: hidden_act is {text['hidden_act']!r}, expected 'silu'")
    if text.get("use_sliding_window"):
        raise CheckpointError(f"{where}: use_sliding_window is true; sliding-window attention is not supported")
    kinds = text.get("layer_types") or []
    if not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds):
        raise CheckpointError(f"{where}: layer_types is {kinds!r:.200}; only 'full_attention' is supported")
    rope = text.get("rope_scaling") or text.get("rope_parameters") or config.get("rope_scaling") or {}
    section = rope.get("mrope_section") if isinstance(rope, dict) else None
    if not isinstance(section, list) or rope.get("rope_type", rope.get("type", "default")) not in ("mrope", "default"):
        raise CheckpointError(f"{where}: rope_scaling is {rope!r}, expected type 'mrope' with an mrope_section")
    if len(section) != 3 or any(type(s) is not int or s < 0 for s in section) or sum(section) * 2 != head_dim:
        raise CheckpointError(
            f"{where}: mrope_section {section} must be three counts that add up to head_dim / 2 = {head_dim / 2:g}"
        )
    theta = _number(rope if "rope_theta" in rope else text, "rope_theta", where, float)
    # transformers 5 writes tie_word_embeddings at the top level, the released config has only one level.
    tied = config.get("tie_word_embeddings", text.get("tie_word_embeddings", False))
    if not isinstance(tied, bool):
        raise CheckpointError(f"{where}: tie_word_embeddings is {tied!r}, expected true or false")
    return TextConfig(
        hidden_size=hidden,
        intermediate_size=_number(text, "intermediate_size", where),
        num_hidden_layers=_number(text, "num_hidden_layers", where),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=_number(text, "vocab_size", where),
        rms_norm_eps=_number(text, "rms_norm_eps", where, float),
        rope_theta=theta,
        mrope_section=(section[0], section[1], section[2]),
        tie_word_embeddings=tied,
        max_position_embeddings=_number(text, "max_position_embeddings", where),
    )


def _vision_config(vision: dict[str, Any], text: dict[str, Any], where: str) -> VisionConfig:
    where = f"{where}: vision_config"
    if vision.get("hidden_act", "quick_gelu") != "quick_gelu":
        raise CheckpointError(f"{where}: hidden_act is {vision['hidden_act']!r}, expected 'quick_gelu'")
    channels = {"in_channels": vision.get("in_channels", vision.get("in_chans", 3))}
    rope = vision.get("rope_parameters") or {}
    if not isinstance(rope, dict) or rope.get("rope_theta", VISION_ROPE_THETA) != VISION_ROPE_THETA:
        raise CheckpointError(f"{where}: rope_parameters {rope!r}, expected rope_theta {VISION_ROPE_THETA:g}")
    out = VisionConfig(
        depth=_number(vision, "depth", where),
        embed_dim=_number(vision, "embed_dim", where),
        num_heads=_number(vision, "num_heads", where),
        mlp_ratio=_number(vision, "mlp_ratio", where, float),
        in_channels=_number(channels, "in_channels", where),
        patch_size=_number(vision, "patch_size", where),
        temporal_patch_size=_number(vision, "temporal_patch_size", where),
        spatial_merge_size=_number(vision, "spatial_merge_size", where),
        hidden_size=_number(vision, "hidden_size", where),
    )
    if out.embed_dim % out.num_heads or out.head_dim % 4:
        raise CheckpointError(
            f"{where}: embed_dim {out.embed_dim} over {out.num_heads} heads must give a multiple of 4"
        )
    if out.intermediate_size < 1:
        raise CheckpointError(
            f"{where}: mlp_ratio {out.mlp_ratio:g} of embed_dim {out.embed_dim} is less than 1; expected some 4"
        )
    if out.hidden_size != text.get("hidden_size"):
        raise CheckpointError(
            f"{where}: hidden_size {out.hidden_size} differs from the decoder's "
            f"{text.get('hidden_size')}; they must be equal"
        )
    return out


def _special_tokens(
    config: dict[str, Any], text: dict[str, Any], generation: dict[str, Any], where: str
) -> SpecialTokens:
    def checked(key: str, value: Any) -> int:
        if type(value) is not int or value < 0:
            raise CheckpointError(f"{where}: {key} is {value!r}, expected a token id")
        return value

    def one(key: str, default: int) -> int:
        value = config.get(key, text.get(key))
        return default if value is None else checked(key, value)

    eos = generation.get("eos_token_id", config.get("eos_token_id", text.get("eos_token_id")))
    ids = eos if isinstance(eos, list) else [] if eos is None else [eos]
    if not ids:
        raise CheckpointError(
            f"{where}: no eos_token_id here or in generation_config.json; generation could never stop"
        )
    # Defaults are those of transformers' Qwen2VLConfig: a checkpoint that leaves them out means these.
    return SpecialTokens(
        image_token_id=one("image_token_id", 151655),
        video_token_id=one("video_token_id", 151656),
        vision_start_token_id=one("vision_start_token_id", 151652),
        vision_end_token_id=one("vision_end_token_id", 151653),
        eos_token_ids=tuple(dict.fromkeys(checked("eos_token_id", i) for i in ids)),
    )
