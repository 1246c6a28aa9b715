"""Keys and values of earlier prompts, kept in blocks: a request that begins like an earlier one prefills only the rest.

A token of a prompt is known by its id and, where it stands for a part of a picture, by the picture's content. The
blocks form a tree in which a path from the root spells a prefix: what lies on it was computed from exactly these tokens
and pictures at exactly these positions (positions follow from the tokens and the pictures' sizes before them), so it is
right for every request that begins so. Conversations that share a beginning share its blocks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from edgevl.runtime.errors import InputError
from edgevl.runtime.kv_cache import KVCache

if TYPE_CHECKING:
    from edgevl.runtime.vision import EncodedImage

__all__ = ["PrefixCache", "common_prefix", "token_identity"]

BLOCK = 64  # tokens; the last block of a path may be shorter


def token_identity(
    ids: np.ndarray, images: Sequence[EncodedImage] = (), placeholders: tuple[int, ...] = ()
) -> np.ndarray:
    """What makes two cached tokens the same.

    Args:
        ids: int64 [S].
        images: what the placeholders among `ids` stand for, in order, one row of embeddings each.

    Returns:
        int64 [S, 3]: the id, and for placeholders 128 bits of the picture's key, else zeros. Which part of the picture
        a token is need not be told: equal prefixes have the same parts at the same places.
    """
    out = np.zeros((len(ids), 3), np.int64)
    out[:, 0] = ids
    slots = np.flatnonzero(np.isin(ids, placeholders)) if images else np.zeros(0, np.int64)
    start = 0
    for image in images:
        digest = hashlib.blake2b(image.key.encode(), digest_size=16).digest()
        out[slots[start : start + len(image.embeds)], 1:] = np.frombuffer(digest, np.int64)
        start += len(image.embeds)
    return out


def common_prefix(a: np.ndarray, b: np.ndarray) -> int:
    """How many leading tokens two identities [S, 3] have in common."""
    size = min(len(a), len(b))
    different = np.flatnonzero((a[:size] != b[:size]).any(axis=1))
    return int(different[0]) if len(different) else size


class _Block:
    """Some tokens after those of `parent`, with their keys and values; a full one may have followers."""

    def __init__(self, parent: _Block | None, identity: np.ndarray, tokens: dict[str, np.ndarray]) -> None:
        self.parent, self.identity, self.tokens = parent, identity, tokens
        self.followers: dict[bytes, _Block] = {}
        self.used = 0
        self.nbytes = identity.nbytes + sum(t.nbytes for t in tokens.values())


class PrefixCache:
    """Prefixes of prompts and answers for one model, within a memory limit; least recently used blocks go first.

    Args:
        limit_bytes: what all blocks may add up to.
    """

    def __init__(self, limit_bytes: int) -> None:
        if limit_bytes < 1:
            raise InputError(f"the prefix cache is {limit_bytes} bytes, expected more than 0")
        self.limit_bytes = limit_bytes
        self.nbytes = 0
        self._clock = 0
        self._root = _Block(None, np.zeros((0, 3), np.int64), {})

    @property
    def tokens(self) -> int:
        """Tokens kept, each once however many prompts share it."""
        return sum(len(block.identity) for block in self._blocks())

    def clear(self) -> None:
        """Forget everything."""
        self._root.followers.clear()
        self.nbytes = 0

    def restore(self, identity: np.ndarray, cache: KVCache, row: int) -> int:
        """Append to `row`, which holds the first tokens of the prompt `identity` [S, 3] or none, what is kept of those
        after them; gives how many. The prompt's last token is left out: its logits are needed and not kept."""
        have, at, last = int(cache.lengths[row]), 0, len(identity) - 1
        self._clock += 1
        added = 0
        for block, count in self._path(identity[: max(0, last)]):
            block.used = self._clock
            skip = max(0, have - at)
            if skip < count:
                part = {name: t[:, skip:count] for name, t in block.tokens.items()}
                cache.append(row, part, count - skip)
                added += count - skip
            at += count
        return added

    def store(self, identity: np.ndarray, cache: KVCache, row: int) -> None:
        """Keep what `row` holds, which must be the tokens `identity` [S, 3]; what is kept already is not copied.

        Of a prompt beyond the limit the beginning is kept, as much as fits."""
        length = min(len(identity), int(cache.lengths[row]))
        self._clock += 1
        at, parent = 0, self._root
        for block, count in self._path(identity[:length]):
            block.used = self._clock
            if count < BLOCK:  # a beginning in common: the rest gets a block of its own, which includes it
                break
            at, parent = at + count, block
        for start in range(at, length, BLOCK):
            here = identity[start : start + BLOCK][: length - start].copy()
            near = [(b, common_prefix(b.identity, here)) for b in parent.followers.values()]
            if any(count == len(here) for _, count in near):
                return  # all of it is kept, in a longer block
            for block in [b for b, count in near if count == len(b.identity)]:  # this one takes its place
                self._remove(block)
            block = _Block(parent, here, cache.read(row, start, start + len(here)))
            if not self._make_room(block.nbytes):
                return
            block.used = self._clock
            parent.followers[here.tobytes()] = block
            self.nbytes += block.nbytes
            parent = block

    def _path(self, identity: np.ndarray) -> Iterator[tuple[_Block, int]]:
        """The blocks that `identity` begins with, and how many tokens of each; only the last may be used in part."""
        at, parent = 0, self._root
        while at < len(identity):
            exact = parent.followers.get(identity[at : at + BLOCK].tobytes())
            if exact is not None:
                count = len(exact.identity)
            else:
                exact, count = max(
                    ((b, common_prefix(b.identity, identity[at:])) for b in parent.followers.values()),
                    key=lambda found: found[1],
                    default=(None, 0),
                )
            if exact is None or count == 0:
                return
            yield exact, count
            if count < BLOCK:
                return
            at, parent = at + count, exact

    def _blocks(self) -> Iterator[_Block]:
        waiting = list(self._root.followers.values())
        while waiting:
            block = waiting.pop()
            yield block
            waiting += block.followers.values()

    def _remove(self, block: _Block) -> None:
        if block.parent is not None:
            del block.parent.followers[block.identity.tobytes()]
        self.nbytes -= block.nbytes

    def _make_room(self, nbytes: int) -> bool:
        """Drop blocks that nothing follows, least recently used first, until `nbytes` more fit; False where they
        cannot. Those of the request being stored stay: a block is used whenever one behind it is."""
        while self.nbytes + nbytes > self.limit_bytes:
            leaves = [b for b in self._blocks() if not b.followers and b.used < self._clock]
            if not leaves:
                return False
            self._remove(min(leaves, key=lambda b: b.used))
        return True
