"""Inputs and outputs of the two graphs, declared once as data; the exporter writes them, the binder feeds them.

    vision encoder:  patches + rotary rows                              -> image_embeds
    decoder:         input_ids + image_embeds + rotary rows + KV cache  -> logits of the wanted rows + KV cache

Axes are integers (fixed) or names (dynamic). The graphs know no M-RoPE: the host computes one cos/sin row per token
(`edgevl.runtime.mrope`) and the graphs see plain rotary rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from edgevl.runtime.config import ModelConfig

__all__ = [
    "APPENDED",
    "CACHE_KEY",
    "CACHE_VALUE",
    "IN_PLACE",
    "GraphSpec",
    "TensorSpec",
    "cache_filling_spec",
    "decoder_spec",
    "tensorrt_decoder_spec",
    "vision_spec",
]

CACHE_KEY = "{kind}_key_values.{layer}.key"
CACHE_VALUE = "{kind}_key_values.{layer}.value"
# How the graph updates the cache: it writes into the buffer that past and present share, or it gives only the new
# tokens' keys and values and whoever runs it stores them at each row's length.
IN_PLACE, APPENDED = "in_place", "appended"


@dataclass(frozen=True)
class TensorSpec:
    """One graph input or output: name, numpy dtype name, axes."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]

    def to_dict(self) -> dict[str, Any]:
        return {"name": self.name, "dtype": self.dtype, "shape": list(self.shape)}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> TensorSpec:
        return cls(data["name"], data["dtype"], tuple(data["shape"]))


@dataclass(frozen=True)
class GraphSpec:
    """What one graph takes and gives; `cache` maps each past input to the present output that shares its buffer, or,
    where `cache_update` is APPENDED, to the output that holds the keys or values of the new tokens."""

    name: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    cache: tuple[tuple[str, str], ...] = ()
    cache_update: str = IN_PLACE

    def input(self, name: str) -> TensorSpec:
        return next(t for t in self.inputs if t.name == name)

    @property
    def quantized_cache(self) -> bool:
        """Whether keys and values are kept as int8 codes; the scales are inside the graph."""
        pasts = {past for past, _ in self.cache}
        return any(t.dtype == "int8" for t in self.inputs if t.name in pasts)

    def to_dict(self) -> dict[str, Any]:
        data = {
            "name": self.name,
            "inputs": [t.to_dict() for t in self.inputs],
            "outputs": [t.to_dict() for t in self.outputs],
            "cache": [list(pair) for pair in self.cache],
        }
        return data if self.cache_update == IN_PLACE else {**data, "cache_update": self.cache_update}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> GraphSpec:
        update = data.get("cache_update", IN_PLACE)
        if update not in (IN_PLACE, APPENDED):
            raise ValueError(f"cache_update {update!r} is not one of {IN_PLACE}, {APPENDED}")
        return cls(
            data["name"],
            tuple(TensorSpec.from_dict(t) for t in data["inputs"]),
            tuple(TensorSpec.from_dict(t) for t in data["outputs"]),
            tuple((past, present) for past, present in data["cache"]),
            update,
        )


def vision_spec(config: ModelConfig, dtype: str = "float32", embeds_dtype: str | None = None) -> GraphSpec:
    """The vision encoder. All frames of one call have one size; every frame attends to itself only.

    `dtype` is the type of the numbers inside (float32, float16 or bfloat16) in which pixels are given; embeddings are
    exchanged in it too, unless the decoder wants another one (`embeds_dtype`).
    """
    v = config.vision
    return GraphSpec(
        "vision",
        inputs=(
            TensorSpec("patches", dtype, ("frames", "patches", v.patch_dim)),
            TensorSpec("rotary_cos", dtype, ("frames", "patches", v.head_dim // 2)),
            TensorSpec("rotary_sin", dtype, ("frames", "patches", v.head_dim // 2)),
        ),
        outputs=(TensorSpec("image_embeds", embeds_dtype or dtype, ("image_tokens", v.hidden_size)),),
    )


def decoder_spec(
    config: ModelConfig, dtype: str = "float32", name: str = "decoder", cache_dtype: str | None = None
) -> GraphSpec:
    """The decoder with a KV cache of fixed capacity, written in place (past and present share a buffer).

    `image_slots` are flat positions in [batch × sequence] that take the rows of `image_embeds`; `logits_rows` are flat
    positions whose logits are wanted. `seqlens_k` is each row's total length less one, `total_sequence_length` the
    largest total. Several new tokens over a non-empty cache go one row at a time: a limit of GroupQueryAttention.
    `cache_dtype` is the graph's own by default; int8 are codes whose scales are inside the graph.
    """
    t = config.text
    half = t.head_dim // 2
    cache = ("batch", t.num_key_value_heads, "capacity", t.head_dim)
    pasts, presents, pairs = [], [], []
    for layer in range(t.num_hidden_layers):
        for pattern in (CACHE_KEY, CACHE_VALUE):
            past, present = (pattern.format(kind=kind, layer=layer) for kind in ("past", "present"))
            pasts.append(TensorSpec(past, cache_dtype or dtype, cache))
            presents.append(TensorSpec(present, cache_dtype or dtype, cache))
            pairs.append((past, present))
    return GraphSpec(
        name,
        inputs=(
            TensorSpec("input_ids", "int64", ("batch", "sequence")),
            TensorSpec("image_embeds", dtype, ("image_tokens", t.hidden_size)),
            TensorSpec("image_slots", "int64", ("image_tokens",)),
            TensorSpec("rotary_cos", dtype, ("batch", "sequence", half)),
            TensorSpec("rotary_sin", dtype, ("batch", "sequence", half)),
            TensorSpec("seqlens_k", "int32", ("batch",)),
            TensorSpec("total_sequence_length", "int32", (1,)),
            TensorSpec("logits_rows", "int64", ("rows",)),
            *pasts,
        ),
        outputs=(TensorSpec("logits", "float32", ("rows", t.vocab_size)), *presents),
        cache=tuple(pairs),
    )


def tensorrt_decoder_spec(
    config: ModelConfig, dtype: str, capacity: int, name: str = "decoder", cache_update: str = IN_PLACE
) -> GraphSpec:
    """The decoder as TensorRT wants it: a mask instead of lengths, no empty tensors, a cache of constant size.

    `edgevl.runtime.trt_feeds` computes these inputs. `attention_mask` is added to the scores, 0 where a new token sees
    a cached one and very negative elsewhere. `image_rows` holds, for every token, the row of `image_embeds` that takes
    its place, or -1. `logits_rows` are flat positions in [batch × sequence].

    IN_PLACE: the new keys and values go to `write_indices[row]` on, in the shared buffer, and the mask covers the
    whole capacity. APPENDED: the mask covers `attended` tokens, the first `attended - sequence` of the cache (at
    least 1) and the new ones after them.
    """
    t = config.text
    half = t.head_dim // 2
    appended = cache_update == APPENDED
    past_shape = ("batch", t.num_key_value_heads, capacity, t.head_dim)
    present_shape = ("batch", t.num_key_value_heads, "sequence", t.head_dim) if appended else past_shape
    pasts, presents, pairs = [], [], []
    for layer in range(t.num_hidden_layers):
        for pattern in (CACHE_KEY, CACHE_VALUE):
            past = pattern.format(kind="past", layer=layer)
            present = pattern.format(kind="new" if appended else "present", layer=layer)
            pasts.append(TensorSpec(past, dtype, past_shape))
            presents.append(TensorSpec(present, dtype, present_shape))
            pairs.append((past, present))
    indices = () if appended else (TensorSpec("write_indices", "int64", ("batch",)),)
    return GraphSpec(
        name,
        inputs=(
            TensorSpec("input_ids", "int64", ("batch", "sequence")),
            TensorSpec("image_embeds", dtype, ("image_tokens", t.hidden_size)),
            TensorSpec("image_rows", "int64", ("batch", "sequence")),
            TensorSpec("rotary_cos", dtype, ("batch", "sequence", half)),
            TensorSpec("rotary_sin", dtype, ("batch", "sequence", half)),
            TensorSpec("attention_mask", dtype, ("batch", 1, "sequence", "attended" if appended else capacity)),
            *indices,
            TensorSpec("logits_rows", "int64", ("rows",)),
            *pasts,
        ),
        outputs=(TensorSpec("logits", "float32", ("rows", t.vocab_size)), *presents),
        cache=tuple(pairs),
        cache_update=cache_update,
    )


def cache_filling_spec(config: ModelConfig, name: str) -> GraphSpec:
    """A prompt's keys and values, without logits; one row, float32. OpenVINO's, which takes no cache in place.

    `past_*` are the cached tokens alone, contiguous; `attention_mask` is added to the scores; `image_rows` holds, for
    every token, the row of `image_embeds` (at least one) that takes its place, or -1. The cache is APPENDED.
    """
    t = config.text
    half = t.head_dim // 2
    pasts, news, pairs = [], [], []
    for layer in range(t.num_hidden_layers):
        for pattern in (CACHE_KEY, CACHE_VALUE):
            past, new = (pattern.format(kind=kind, layer=layer) for kind in ("past", "new"))
            if layer < t.num_hidden_layers - 1:  # nothing attends in the last layer
                pasts.append(TensorSpec(past, "float32", (1, t.num_key_value_heads, "past", t.head_dim)))
            news.append(TensorSpec(new, "float32", (1, t.num_key_value_heads, "sequence", t.head_dim)))
            pairs.append((past, new))
    return GraphSpec(
        name,
        inputs=(
            TensorSpec("input_ids", "int64", (1, "sequence")),
            TensorSpec("image_embeds", "float32", ("image_tokens", t.hidden_size)),
            TensorSpec("image_rows", "int64", (1, "sequence")),
            TensorSpec("rotary_cos", "float32", (1, "sequence", half)),
            TensorSpec("rotary_sin", "float32", (1, "sequence", half)),
            TensorSpec("attention_mask", "float32", (1, 1, "sequence", "attended")),
            *pasts,
        ),
        outputs=tuple(news),
        cache=tuple(pairs),
        cache_update=APPENDED,
    )
