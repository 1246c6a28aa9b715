"""Inputs of the TensorRT graphs out of those of the decoder loop: mask, cache slots, picture rows. numpy only.

The decoder loop (edgevl.runtime.decoding) speaks of lengths (`seqlens_k`) and of slots that pictures take; TensorRT's
graphs want a mask and a row for every token, and no empty tensor. Shared by the TensorRT engine, by ONNX Runtime
where it runs a TensorRT bundle for its numbers, and by tests.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from edgevl.runtime.errors import CapacityError
from edgevl.runtime.graph_spec import APPENDED, GraphSpec

__all__ = [
    "MASKED",
    "NO_IMAGE",
    "appended_mask",
    "as_dtype",
    "attention_mask",
    "is_tensorrt_spec",
    "rows_of_images",
    "store_appended",
    "tensorrt_feeds",
]

# Added to a score that must not count. Not -inf, nor float16's lowest, which becomes -inf with a negative score added:
# a kernel that goes by blocks of keys would give NaN where a whole block is masked.
MASKED = -30000.0
NO_IMAGE = -1


def is_tensorrt_spec(spec: GraphSpec) -> bool:
    """Whether `spec` is a decoder that takes what `tensorrt_feeds` gives."""
    return any(t.name == "attention_mask" for t in spec.inputs)


def attention_mask(past: np.ndarray, sequence: int, capacity: int) -> np.ndarray:
    """Additive mask float32 [B, 1, S, capacity]: token i of row b sees the cache up to its own slot past[b] + i."""
    slots = np.arange(capacity)
    own = past[:, None] + np.arange(sequence)
    return np.where(slots <= own[:, None, :, None], np.float32(0), np.float32(MASKED))


def appended_mask(past: np.ndarray, sequence: int, visible: int) -> np.ndarray:
    """Additive mask float32 [B, 1, S, visible + S]: the first past[b] of `visible` cached tokens, then the new ones."""
    cached = np.broadcast_to(np.arange(visible) < past[:, None, None, None], (len(past), 1, sequence, visible))
    new = np.broadcast_to(np.tri(sequence, dtype=bool), (len(past), 1, sequence, sequence))
    return np.where(np.concatenate([cached, new], -1), np.float32(0), np.float32(MASKED))


def rows_of_images(feeds: Mapping[str, np.ndarray]) -> np.ndarray:
    """int64 [B, S]: for every token of `input_ids` the row of `image_embeds` that takes its place, or NO_IMAGE."""
    slots = np.asarray(feeds["image_slots"], np.int64)
    found = np.full(np.size(feeds["input_ids"]), NO_IMAGE, np.int64)
    found[slots] = np.arange(len(feeds["image_embeds"]))
    return found.reshape(np.shape(feeds["input_ids"]))


def tensorrt_feeds(
    feeds: Mapping[str, np.ndarray], spec: GraphSpec, visible: int | None = None
) -> dict[str, np.ndarray]:
    """What the graph `spec` takes (without the cache) for one call of the decoder loop.

    Args:
        feeds: input_ids [B, S], rotary_cos / rotary_sin [B, S, d / 2], seqlens_k [B], image_slots [n], image_embeds
            [n, hidden], logits_rows [r]: see `edgevl.runtime.graph_spec.decoder_spec`.
        visible: for an APPENDED cache, how many cached tokens the graph looks at; the longest row's by default. An
            engine with a fixed set of shapes gives more.

    Returns:
        Arrays in the dtypes of `spec` (bfloat16 as uint16). Where no logits are wanted, `logits_rows` names row 0
        all the same: keep the first len(feeds["logits_rows"]) rows of the result.

    Raises:
        CapacityError: the tokens do not fit the cache.
    """
    ids = np.asarray(feeds["input_ids"])
    sequence = ids.shape[1]
    past = np.asarray(feeds["seqlens_k"], np.int64) + 1 - sequence
    capacity = int(spec.input(spec.cache[0][0]).shape[2])
    longest = int(past.max()) + sequence
    if longest > capacity:
        raise CapacityError(f"{longest} tokens are needed, the KV cache holds {capacity}")
    hidden = int(spec.input("image_embeds").shape[1])
    embeds, wanted = np.asarray(feeds["image_embeds"]), np.asarray(feeds["logits_rows"], np.int64)
    out = {
        "input_ids": ids,
        "image_embeds": embeds if len(embeds) else np.zeros((1, hidden), np.float32),
        "image_rows": rows_of_images(feeds),
        "rotary_cos": feeds["rotary_cos"],
        "rotary_sin": feeds["rotary_sin"],
        "logits_rows": wanted if len(wanted) else np.zeros(1, np.int64),
    }
    if spec.cache_update == APPENDED:
        visible = max(int(past.max()), 1) if visible is None else visible
        out["attention_mask"] = appended_mask(past, sequence, visible)
    else:
        out["attention_mask"] = attention_mask(past, sequence, capacity)
        out["write_indices"] = past
    return {name: as_dtype(value, spec.input(name).dtype) for name, value in out.items()}


def store_appended(
    buffers: Mapping[str, np.ndarray], new: Mapping[str, np.ndarray], past: np.ndarray, spec: GraphSpec
) -> None:
    """Write the new tokens' keys and values of an APPENDED graph into the cache, each row at its length.

    Args:
        buffers: past input name -> [B, kv_heads, capacity, d]. new: output name -> [B, kv_heads, S, d].
        past: [B], lengths before this call.
    """
    for past_name, new_name in spec.cache:
        value = new[new_name]
        for row, start in enumerate(past):
            buffers[past_name][row, :, int(start) : int(start) + value.shape[2]] = value[row]


def as_dtype(array: np.ndarray, dtype: str) -> np.ndarray:
    """C-ordered `array` in `dtype`; bfloat16, which numpy does not have, as its bits in uint16, rounded to even."""
    if dtype != "bfloat16":
        return np.ascontiguousarray(array, np.dtype(dtype))
    if array.dtype == np.uint16:
        return np.ascontiguousarray(array)
    bits = np.ascontiguousarray(array, np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    # Rounding would carry a NaN of small payload into infinity.
    return np.where(np.isnan(array), np.uint32(0x7FC0), rounded).astype(np.uint16)
