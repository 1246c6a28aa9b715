"""The loop over the rows of one batch: prefill each, decode all together, let the ended ones go. Knows no messages.

Rows may join and leave between steps (continuous batching; Yu et al., "Orca", OSDI 2022, section 3.1): the server joins
requests as they come, `run` joins a fixed batch before its first step.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from edgevl.runtime.decoding import Decoder
from edgevl.runtime.device_tensor import join_rows
from edgevl.runtime.errors import EdgeVLError, InputError
from edgevl.runtime.lookup import PromptLookup
from edgevl.runtime.prefix_cache import PrefixCache, common_prefix
from edgevl.runtime.results import Piece
from edgevl.runtime.row import Row

if TYPE_CHECKING:
    from edgevl.runtime.answer_stream import PreparedPrompt

__all__ = ["DecodeLoop"]

_STEPS_WHILE_JOINING = 256  # most tokens of a row while another's prompt is read


class DecodeLoop:
    """Answers prepared prompts over the rows of a decoder's cache.

    Args:
        placeholders: ids of pictures' and videos' tokens.
        prefixes: where beginnings of prompts are kept for later requests; None keeps none.
    """

    def __init__(self, decoder: Decoder, placeholders: tuple[int, ...], prefixes: PrefixCache | None = None) -> None:
        self._decoder, self._placeholders, self._prefixes = decoder, placeholders, prefixes
        self._active: list[Row] = []  # row i of the cache belongs to row i here
        self._lookups: dict[Row, PromptLookup] = {}
        self._reading: list[int] = []  # lengths of prompts; the second is read in the pauses of the first, aside
        self._aside = False

    @property
    def rows(self) -> tuple[Row, ...]:
        """The answers being written."""
        return tuple(self._active)

    @property
    def spare(self) -> int:
        """Tokens that more rows may have without more memory: answers that have ended had them."""
        cache = self._decoder.cache
        return max(0, cache.held - int(cache.lengths[: len(self._active)].sum()) - sum(self._reading))

    @property
    def capacity(self) -> int:
        """Rows that can be active at once."""
        return self._decoder.cache.batch

    def run(self, rows: Sequence[Row], prompts: Sequence[PreparedPrompt]) -> Generator[tuple[Row, Piece], None, None]:
        """Prefill every row, then decode the rows that go on together, to the end of all.

        The first row of the cache holds the first `rows[0].cached` tokens of `prompts[0]`; the others hold nothing."""
        try:
            for row, prompt in zip(rows, prompts):
                yield row, self.join(row, prompt)
            while self._active:
                yield from self.step()
                for row in rows:
                    if row.error is not None:
                        raise row.error
        except GeneratorExit:  # a stream that is left: what it computed is right and worth keeping
            for slot, row in enumerate(self._active):
                self._keep(slot, row)
            raise

    def may_join(self, tokens: int) -> bool:
        """Whether a prompt of so many tokens may join now, which may be a pause of another's (`join` with `aside`)."""
        if not self._reading:
            return len(self._active) < self.capacity
        if not self._aside or len(self._reading) > 1 or len(self._active) + 1 >= self.capacity:
            return False
        # It takes steps there, too: where one row has no room, none goes on.
        cache, slot = self._decoder.cache, len(self._active)
        return cache.has_room(slot, min(tokens + _STEPS_WHILE_JOINING, cache.capacity) - int(cache.lengths[slot]))

    def join(self, row: Row, prompt: PreparedPrompt, aside: bool = False) -> Piece:
        """Prefill a row and let it take part in the steps that follow, unless its first token was its last.

        Where it fails, the other rows go on as if nothing had been. In its pauses (`pauses`) they may step, end and
        leave.

        Args:
            aside: one other at a time may join in its pauses, if `may_join`. It takes the last row of the cache, and is
                moved when it has been read: its memory is taken twice.

        Raises:
            InputError: as many rows as the cache has are active already, or another is read that is not aside.
            EngineError: numbers that cannot be right.
        """
        if len(self._active) + len(self._reading) == self.capacity:
            raise InputError(f"{self.capacity} rows are active, as many as the KV cache has; wait for one to end")
        if self._reading and (aside or not self.may_join(len(prompt.ids))):
            raise InputError("another prompt is being read; wait for its end")
        slot = self.capacity - 1 if aside else len(self._active)
        cache = self._decoder.cache
        if not self._reading:
            self._make_room(slot, row.cached)
            self._aside = aside
        cache.rewind(slot, row.cached)  # an earlier row may have left its tokens there
        self._reading.append(len(prompt.ids))
        try:
            piece = self._prefill(slot, row, prompt)
        finally:
            self._reading.pop()
        if len(self._active) < slot:  # rows stay contiguous: some have ended meanwhile, or it was aside
            cache.move(slot, len(self._active))
            slot = len(self._active)
        self._keep(slot, row)  # at once: the next row may begin like this one
        if row.finish_reason is None:
            self._active.append(row)
            self._lookups[row] = PromptLookup(row.config.lookup_tokens, self._placeholders)
        return piece

    def _make_room(self, slot: int, cached: int) -> None:
        """Before a row is read into `slot`: the cache must not move while graphs write to it."""
        cache = self._decoder.cache
        if not self._active:  # a long answer has moved the heads apart, and steps go over all the room between them
            for other in range(self.capacity):
                cache.rewind(other, cached if other == slot else 0)
            cache.narrow()
        for other in range(len(self._active)):
            cache.reserve(other, min(_STEPS_WHILE_JOINING, cache.capacity - int(cache.lengths[other])))

    def step(self) -> list[tuple[Row, Piece]]:
        """The next token of every active row, or several of an only one whose draft was right; rows that end leave.

        A row whose numbers cannot be right leaves without a piece, its `error` set; its neighbours go on. In the pauses
        of a row that joins there may be no room for them, and nothing comes."""
        row, cache = self._active[0], self._decoder.cache
        if self._reading:
            if not all(cache.has_room(i, 1) for i in range(len(self._active))):
                return []
            pieces = self._step(self._active)
            self._compact()
            return pieces
        # GroupQueryAttention takes several new tokens over a filled cache at batch 1 only.
        draft = self._draft(row, self._lookups[row]) if len(self._active) == 1 else np.zeros(0, np.int64)
        pieces = self._check(row, draft, self._lookups[row]) if len(draft) else self._step(self._active)
        self._compact()
        return pieces

    def leave(self, row: Row) -> None:
        """Give up an active row before its end; nothing happens to one that has left."""
        if row in self._lookups:
            self._drop(self._active.index(row))

    def _prefill(self, slot: int, row: Row, prompt: PreparedPrompt) -> Piece:
        began = time.perf_counter()
        if self._prefixes is not None:
            row.cached += self._prefixes.restore(prompt.identity, self._decoder.cache, slot)
        row.cached += self._copy_beginning(slot, prompt.identity)
        rest = None
        if prompt.images:
            placeholders = int(np.isin(prompt.ids[: row.cached], self._placeholders).sum())
            rest = join_rows([i.embeds for i in prompt.images])[placeholders:]
        logits = self._decoder.prefill(slot, prompt.ids[row.cached :], prompt.positions[:, row.cached :], rest)
        row.prefill_s = time.perf_counter() - began
        return row.accept(logits, room=self._room(slot))

    def _copy_beginning(self, slot: int, identity: np.ndarray) -> int:
        """Append to `slot` the keys and values of what the prompt `identity` [S, 3] begins with in common with that of
        another row; gives how many tokens. The last one is left out: its logits are needed. What a row has answered is
        not copied: a decoder may say tokens in other kernels than it reads them."""
        cache = self._decoder.cache
        have, last = int(cache.lengths[slot]), len(identity) - 1
        shared = [min(common_prefix(row.prompt_identity, identity), last) for row in self._active]
        if (count := max(shared, default=0)) <= have:
            return 0
        cache.append(slot, cache.read(shared.index(count), have, count), count - have)
        return count - have

    def _step(self, rows: Sequence[Row]) -> list[tuple[Row, Piece]]:
        """One token for every row."""
        began = time.perf_counter()
        ids = np.array([row.token for row in rows], np.int64)
        logits = self._decoder.step(ids, np.array([row.position for row in rows], np.int64))
        pieces: list[tuple[Row, Piece]] = []
        for i, row in enumerate(rows):
            try:
                pieces.append((row, row.accept(logits[i], room=self._room(i))))
            except EdgeVLError as e:
                row.error = e
        elapsed = time.perf_counter() - began
        for row in rows:
            row.decode_s += elapsed
        if len(rows) == 1:
            self._lookups[rows[0]].stepped(elapsed)
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
            try:
                pieces.append((row, row.accept(logits[i], room=start + i + 1 < cache.capacity)))
            except EdgeVLError as e:
                row.error = e
                break
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

    def _compact(self) -> None:
        """Drop ended rows."""
        slot = 0
        while slot < len(self._active):
            if self._active[slot].finish_reason is None and self._active[slot].error is None:
                slot += 1
            else:
                self._drop(slot)

    def _drop(self, slot: int) -> None:
        """Take a row out; the last row's cache moves into the gap, so that the rows stay contiguous."""
        row = self._active[slot]
        if row.error is None:
            self._keep(slot, row)
        last = len(self._active) - 1
        if last != slot:
            self._decoder.cache.move(last, slot)
            self._active[slot] = self._active[last]
        self._active.pop()
        del self._lookups[row]
