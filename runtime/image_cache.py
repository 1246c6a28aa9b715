"""Vision features kept by content, least recently used first out; knows no pictures, only keys and arrays.

A key is a hash of decoded pixels, the size they are resized to and the processor's settings, never of a path: a file
that was overwritten gives new features, and the same picture under two names is encoded once.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image

from edgevl.runtime.device_tensor import Rows, freeze
from edgevl.runtime.errors import InputError
from edgevl.runtime.image_processing import ImageProcessorConfig

__all__ = ["DEFAULT_IMAGE_CACHE_MB", "ImageCache", "cached_rows", "content_key", "join_keys", "picture_key"]

DEFAULT_IMAGE_CACHE_MB = 128  # at 2B, 20,000 image tokens: a dozen pages of print, or eighty 448 x 448 pictures


class ImageCache:
    """Embeddings by content.

    Args:
        limit_bytes: what the kept arrays may add up to; 0 keeps nothing.
    """

    def __init__(self, limit_bytes: int) -> None:
        if limit_bytes < 0:
            raise InputError(f"the image cache is {limit_bytes} bytes, expected 0 (off) or more")
        self.limit_bytes = limit_bytes
        self.nbytes = self.hits = self.misses = 0
        self._kept: OrderedDict[str, Rows] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, key: str) -> Rows | None:
        """What was kept under `key` (read-only, shared between all who ask); None when it was not, or no longer."""
        found = self._kept.get(key)
        if found is None:
            self.misses += 1
            return None
        self._kept.move_to_end(key)
        self.hits += 1
        return found

    def put(self, key: str, embeds: Rows) -> None:
        """Keep an array that owns its memory, and drop the least recently used beyond the limit. One that is larger
        than the limit is not kept."""
        self.discard(key)
        if embeds.nbytes > self.limit_bytes:
            return
        freeze(embeds)
        self._kept[key] = embeds
        self.nbytes += embeds.nbytes
        while self.nbytes > self.limit_bytes:
            self.nbytes -= self._kept.popitem(last=False)[1].nbytes

    def discard(self, key: str) -> None:
        """Forget one key, if it is there."""
        old = self._kept.pop(key, None)
        if old is not None:
            self.nbytes -= old.nbytes

    def clear(self) -> None:
        """Forget everything."""
        self._kept.clear()
        self.nbytes = 0


def cached_rows(
    cache: ImageCache, keys: Sequence[str], encode: Callable[[list[int]], np.ndarray]
) -> tuple[np.ndarray, int]:
    """Embeddings of the frame groups of a video, each kept for itself: a window that slides encodes what is new.

    Args:
        keys: of the groups in order; equal ones are encoded once.
        encode: indices of groups -> float32 [their number, tokens, hidden].

    Returns:
        float32 [groups × tokens, hidden], and how many of the groups needed no encoding.
    """
    found = {key: cache.get(key) for key in dict.fromkeys(keys)}
    missing = [key for key, rows in found.items() if rows is None]
    if missing:
        first = {key: i for i, key in reversed(list(enumerate(keys)))}
        for key, rows in zip(missing, encode([first[key] for key in missing])):
            found[key] = rows
            cache.put(key, rows.copy())  # a copy: a slice would keep its whole base alive
    parts = [np.asarray(rows) for key in keys if (rows := found[key]) is not None]
    return np.concatenate(parts), sum(key not in missing for key in keys)


def picture_key(picture: Image.Image, config: ImageProcessorConfig, resized: tuple[int, int]) -> str:
    """Identity of an upright RGB picture as the vision encoder will see it: its pixels, the size (width, height) that
    it is resized to, and the processor's settings. Together they determine the features."""
    settings = (config.patch_size, config.temporal_patch_size, config.merge_size, config.rescale_factor)
    return content_key(np.asarray(picture), "picture", resized, settings, config.image_mean, config.image_std)


def content_key(values: np.ndarray, *about: object) -> str:
    """Identity of an array of pixels and of what else determines the features, 128 bits: nobody who chooses a picture
    can make it pass for another one (as with a checksum or 64 bits)."""
    digest = hashlib.blake2b(repr((values.shape, values.dtype.str, about)).encode(), digest_size=16)
    digest.update(np.ascontiguousarray(values).data)
    return digest.hexdigest()


def join_keys(kind: str, keys: Sequence[str]) -> str:
    """Identity of what consists of the contents behind `keys`, in this order."""
    return hashlib.blake2b(repr((kind, tuple(keys))).encode(), digest_size=16).hexdigest()
