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

__all__ = ["CACHE_KEY", "CACHE_VALUE", "GraphSpec", "TensorSpec", "decoder_spec", "vision_spec"]

CACHE_KEY = "{kind}_key_values.{layer}.key"
CACHE_VALUE = "{kind}_key_values.{layer}.value"


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
    """What one graph takes and gives; `cache` maps each past input to the present output that shares its buffer."""

    name: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    cache: tuple[tuple[str, str], ...] = ()

    def input(self, name: str) -> TensorSpec:
        return next(t for t in self.inputs if t.name == name)

    @property
    def quantized_cache(self) -> bool:
        """Whether keys and values are kept as int8 codes; the scales are inside the graph."""
        return any(self.input(past).dtype == "int8" for past, _ in self.cache)

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "inputs": [t.to_dict() for t in self.inputs],
            "outputs": [t.to_dict() for t in self.outputs],
            "cache": [list(pair) for pair in self.cache],
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> GraphSpec:
        return cls(
            data["name"],
            tuple(TensorSpec.from_dict(t) for t in data["inputs"]),
            tuple(TensorSpec.from_dict(t) for t in data["outputs"]),
            tuple((past, present) for past, present in data["cache"]),
        )


def vision_spec(config: ModelConfig, dtype: str = "float32") -> GraphSpec:
    """The vision encoder. All frames of one call have one size; every frame attends to itself only.

    `dtype` is the type of the numbers inside (float32 or float16); pixels and embeddings are exchanged in it.
    """
    v = config.vision
    return GraphSpec(
        "vision",
        inputs=(
            TensorSpec("patches", dtype, ("frames", "patches", v.patch_dim)),
            TensorSpec("rotary_cos", dtype, ("frames", "patches", v.head_dim // 2)),
            TensorSpec("rotary_sin", dtype, ("frames", "patches", v.head_dim // 2)),
        ),
        outputs=(TensorSpec("image_embeds", dtype, ("image_tokens", v.hidden_size)),),
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
