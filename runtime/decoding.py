"""The decoder loop: token ids in, logits out, over a KV cache. It knows purely tokens and positions, no text.

Prefill goes one row at a time (GroupQueryAttention takes several new tokens over a filled cache at batch 1 only),
over a view of that row of the cache and in chunks, which bounds the memory of activations; decode goes all rows
together, each at its own length.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from edgevl.runtime.config import ModelConfig
from edgevl.runtime.device_tensor import Rows
from edgevl.runtime.engine import Engine
from edgevl.runtime.errors import InputError
from edgevl.runtime.kv_cache import CacheView, KVCache
from edgevl.runtime.mrope import rotary_rows
from edgevl.runtime.pauses import pause

__all__ = ["DEFAULT_PREFILL_CHUNK", "Decoder"]

DEFAULT_PREFILL_CHUNK = 2048


class Decoder:
    """Prefill and decode steps of the rows of one cache.

    Args:
        prefill_chunk: most tokens of a prompt that go through the graph at once.
    """

    def __init__(
        self, engine: Engine, config: ModelConfig, cache: KVCache, prefill_chunk: int = DEFAULT_PREFILL_CHUNK
    ) -> None:
        if prefill_chunk < 1:
            raise InputError(f"prefill chunk is {prefill_chunk}, expected at least 1 token")
        most = engine.limits.prefill
        self._engine, self._config, self.cache = engine, config, cache
        self._chunk = prefill_chunk if most is None else min(prefill_chunk, most)
        self._no_images = np.zeros((0, config.text.hidden_size), np.float32)
        self._placeholders = (config.tokens.image_token_id, config.tokens.video_token_id)

    def prefill(self, row: int, ids: np.ndarray, positions: np.ndarray, embeds: Rows | None = None) -> np.ndarray:
        """Append a prompt (or the rest of one) to `row`.

        Args:
            ids: int64 [n].
            positions: int64 [3, n], t / h / w of every token.
            embeds: [m, hidden], float32 or on the engine's device, one row per placeholder among `ids`, in order.

        Returns:
            Logits float32 [vocab] of the last token.

        Raises:
            CapacityError: the tokens do not fit the cache.
        """
        self.cache.reserve(row, len(ids))
        embeds = self._no_images if embeds is None else embeds
        slots = np.flatnonzero(np.isin(ids, self._placeholders)) if len(embeds) else np.zeros(0, np.int64)
        if len(slots) != len(embeds):
            raise InputError(f"{len(embeds)} image embeddings for {len(slots)} placeholders")
        logits = np.zeros((0, 0), np.float32)
        for start in range(0, len(ids), self._chunk):
            pause()
            stop = min(start + self._chunk, len(ids))
            here = slice(*np.searchsorted(slots, (start, stop)))
            last = stop == len(ids)
            feeds = self._feeds(
                ids[None, start:stop], positions[:, None, start:stop], self.cache.lengths[row : row + 1]
            )
            feeds["image_slots"], feeds["image_embeds"] = slots[here] - start, embeds[here]
            feeds["logits_rows"] = np.array([stop - start - 1] if last else [], np.int64)
            logits = self._engine.prefill.run(feeds, self.cache.view(row, row + 1))["logits"]
            self.cache.advance(row, stop - start)
        return logits[0]

    def step(self, ids: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """One token for each of the first `len(ids)` rows.

        Args:
            ids: int64 [rows]. positions: int64 [rows], the same for t, h and w.

        Returns:
            Logits float32 [rows, vocab].
        """
        rows = len(ids)
        for row in range(rows):
            self.cache.reserve(row, 1)
        view: CacheView = self.cache.view(0, rows)
        feeds = self._feeds(ids[:, None], np.broadcast_to(positions[:, None], (3, rows, 1)), self.cache.lengths[:rows])
        feeds["image_slots"], feeds["image_embeds"] = np.zeros(0, np.int64), self._no_images
        feeds["logits_rows"] = np.arange(rows)
        logits = self._engine.decoder.run(feeds, view)["logits"]
        for row in range(rows):
            self.cache.advance(row, 1)
        return logits

    def score(self, ids: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """Append several tokens to row 0, by the graph of single steps, with the logits of every one.

        Args:
            ids: int64 [n]. positions: int64 [n], the same for t, h and w.

        Returns:
            Logits float32 [n, vocab].
        """
        self.cache.reserve(0, len(ids))
        feeds = self._feeds(ids[None], np.broadcast_to(positions[None, None], (3, 1, len(ids))), self.cache.lengths[:1])
        feeds["image_slots"], feeds["image_embeds"] = np.zeros(0, np.int64), self._no_images
        feeds["logits_rows"] = np.arange(len(ids))
        logits = self._engine.decoder.run(feeds, self.cache.view(0, 1))["logits"]
        self.cache.advance(0, len(ids))
        return logits

    def fork(self) -> Decoder:
        """A decoder over an independent copy of the cache."""
        return Decoder(self._engine, self._config, self.cache.fork(), self._chunk)

    def _feeds(self, ids: np.ndarray, positions: np.ndarray, past: np.ndarray) -> dict[str, Any]:
        """ids [B, S], positions [3, B, S], past lengths [B] -> the inputs that prefill and decode share."""
        cos, sin = rotary_rows(positions, self._config.text)
        total = past + ids.shape[1]
        return {
            "input_ids": ids,
            "rotary_cos": cos,
            "rotary_sin": sin,
            "seqlens_k": (total - 1).astype(np.int32),
            "total_sequence_length": np.array([total.max()], np.int32),
        }
