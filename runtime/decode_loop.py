"""The loop over the rows of one batch: prefill each, decode all together, let the ended ones go. Knows no messages."""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from edgevl.runtime.decoding import Decoder
from edgevl.runtime.device_tensor import join_rows
from edgevl.runtime.lookup import PromptLookup
from edgevl.runtime.prefix_cache import PrefixCache
from edgevl.runtime.results import Piece
from edgevl.runtime.row import Row

if TYPE_CHECKING:
    from edgevl.runtime.generation import PreparedPrompt

__all__ = ["DecodeLoop"]


class DecodeLoop:
    """Answers prepared prompts over the rows of a decoder's cache.

    Args:
        placeholders: ids of pictures' and videos' tokens.
        prefixes: where beginnings of prompts are kept for later requests; None keeps none.
    """

    def __init__(self, decoder: Decoder, placeholders: tuple[int, ...], prefixes: PrefixCache | None = None) -> None:
        self._decoder, self._placeholders, self._prefixes = decoder, placeholders, prefixes

    def run(self, rows: Sequence[Row], prompts: Sequence[PreparedPrompt]) -> Generator[tuple[Row, Piece], None, None]:
        """Prefill every row, then decode the rows that go on together; a row that ends gives its place to the last.

        Row i of the cache holds the first `rows[i].cached` tokens of `prompts[i]`."""
        active: list[Row] = []
        try:
            for slot, (row, prompt) in enumerate(zip(rows, prompts)):
                piece = self._prefill(slot, row, prompt)
                active.append(row)
                self._keep(slot, row)  # at once: the next row may begin like this one
                yield row, piece
            active = self._compact(active)
            lookups = {row: PromptLookup(row.config.lookup_tokens, self._placeholders) for row in active}
            while active:
                row = active[0]
                # GroupQueryAttention takes several new tokens over a filled cache at batch 1 only.
                draft = self._draft(row, lookups[row]) if len(active) == 1 else np.zeros(0, np.int64)
                yield from self._check(row, draft, lookups[row]) if len(draft) else self._step(active, lookups)
                active = self._compact(active)
        except GeneratorExit:  # a stream that is left: what it computed is right and worth keeping
            for slot, row in enumerate(active):
                self._keep(slot, row)
            raise

    def _prefill(self, slot: int, row: Row, prompt: PreparedPrompt) -> Piece:
        began = time.perf_counter()
        if self._prefixes is not None:
            row.cached += self._prefixes.restore(prompt.identity, self._decoder.cache, slot)
        rest = None
        if prompt.images:
            placeholders = int(np.isin(prompt.ids[: row.cached], self._placeholders).sum())
            rest = join_rows([i.embeds for i in prompt.images])[placeholders:]
        logits = self._decoder.prefill(slot, prompt.ids[row.cached :], prompt.positions[:, row.cached :], rest)
        row.prefill_s = time.perf_counter() - began
        return row.accept(logits, room=self._room(slot))

    def _step(self, rows: Sequence[Row], lookups: dict[Row, PromptLookup]) -> list[tuple[Row, Piece]]:
        """One token for every row."""
        began = time.perf_counter()
        ids = np.array([row.token for row in rows], np.int64)
        logits = self._decoder.step(ids, np.array([row.position for row in rows], np.int64))
        pieces = [(row, row.accept(logits[i], room=self._room(i))) for i, row in enumerate(rows)]
        elapsed = time.perf_counter() - began
        for row in rows:
            row.decode_s += elapsed
        if len(rows) == 1:
            lookups[rows[0]].stepped(elapsed)
        return pieces

    def _draft(self, row: Row, lookup: PromptLookup) -> np.ndarray:
        """Tokens that may come next; no more than the answer and the cache have room for, after the one to be fed."""
        if not lookup.tokens:
            return np.zeros(0, np.int64)
        cache = self._decoder.cache
        room = min(row.config.max_new_tokens - len(row.tokens), cache.capacity - int(cache.lengths[0])) - 1
        return lookup.propose(row.sequence, room)

    def _check(self, row: Row, draft: np.ndarray, lookup: PromptLookup) -> list[tuple[Row, Piece]]:
        """The next tokens of the only row, by one call over its last token and a draft of those after it: row i of
        the logits is the model's say on token i of the draft, and counts while all before it were right."""
        began = time.perf_counter()
        cache = self._decoder.cache
        start = int(cache.lengths[0])
        ids = np.concatenate([[row.token], draft])
        logits = self._decoder.score(ids, row.position + np.arange(len(ids)))
        pieces: list[tuple[Row, Piece]] = []
        for i in range(len(ids)):
            pieces.append((row, row.accept(logits[i], room=start + i + 1 < cache.capacity)))
            if row.finish_reason is not None or i == len(draft) or row.token != draft[i]:
                break
        cache.rewind(0, start + len(pieces))
        elapsed = time.perf_counter() - began
        row.decode_s += elapsed
        lookup.checked(len(draft), len(pieces) - 1, elapsed, len(row.sequence))
        row.drafted, row.accepted = lookup.drafted, lookup.accepted
        return pieces

    def _room(self, slot: int) -> bool:
        """Whether the token just chosen could still be fed."""
        return bool(self._decoder.cache.lengths[slot] < self._decoder.cache.capacity)

    def _keep(self, slot: int, row: Row) -> None:
        if self._prefixes is not None:
            self._prefixes.store(row.identity, self._decoder.cache, slot)

    def _compact(self, active: Sequence[Row]) -> list[Row]:
        """Drop ended rows; the last row's cache moves into the gap, so that the rows stay contiguous."""
        rows = list(active)
        slot = 0
        while slot < len(rows):
            if rows[slot].finish_reason is None:
                slot += 1
                continue
            self._keep(slot, rows[slot])
            last = len(rows) - 1
            if last != slot:
                self._decoder.cache.move(last, slot)
                rows[slot] = rows[last]
            rows.pop()
        return rows
