"""A prompt that is ready to be answered, and the stream of its answer."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from edgevl.runtime.results import Completion, Piece
from edgevl.runtime.vision import EncodedImage

if TYPE_CHECKING:
    from edgevl.runtime.row import Row

__all__ = ["PreparedPrompt", "Stream"]


@dataclass(frozen=True)
class PreparedPrompt:
    """A prompt ready for prefill: everything about it is known but the answer."""

    ids: np.ndarray  # int64 [S]
    positions: np.ndarray  # int64 [3, S]
    next_position: int
    identity: np.ndarray  # int64 [S, 3], see token_identity
    images: tuple[EncodedImage, ...]
    preprocess_s: float
    vision_s: float

    @property
    def image_tokens(self) -> int:
        return sum(len(i.embeds) for i in self.images)


class Stream(Iterator[Piece]):
    """Pieces of one answer; `completion` is there when it has ended."""

    def __init__(self, pieces: Generator[Piece, None, None], row: Row) -> None:
        self._pieces, self._row = pieces, row

    def __iter__(self) -> Stream:
        return self

    def close(self) -> None:
        """Leave the stream before its end."""
        self._pieces.close()

    def __next__(self) -> Piece:
        return next(self._pieces)

    @property
    def identity(self) -> np.ndarray:
        """Of the prompt and the answer so far (with prompt lookup it may be ahead of the pieces); the cache holds a
        beginning of it."""
        return self._row.identity

    @property
    def completion(self) -> Completion:
        """The whole answer; runs the stream to its end if it has not been read."""
        for _ in self._pieces:
            pass
        return self._row.completion()
