"""Pixels of many pictures in one file instead of memory: a photograph is tens of megabytes of float32 patches.

The file has no name, so a run that ends in any way leaves nothing. Knows samples, not where their pictures come from.
"""

from __future__ import annotations

import errno
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import numpy as np

from edgevl.runtime.errors import CheckpointError

if TYPE_CHECKING:
    from edgevl.calibration.dataset import Sample

__all__ = ["PixelStore"]


class PixelStore:
    """Takes samples one by one, and gives them back together with their pixels mapped from the file. A context manager.

    Args:
        folder: on whose disk they lie.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._width = folder, 0
        with self._told():
            self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - closed by `close`

    def taken(self, sample: Sample) -> Sample:
        """The sample without its pixels, which are in the file now.

        Raises:
            CheckpointError: the disk is full, or cannot be written.
        """
        kept = []
        for picture in sample.vision:
            pixels = np.ascontiguousarray(picture.pixel_values, np.float32)
            self._width = pixels.shape[1]
            with self._told():
                self._file.write(pixels.data)
            kept.append(replace(picture, pixel_values=pixels[:0].copy()))
        return replace(sample, vision=tuple(kept))

    def mapped(self, samples: Sequence[Sample]) -> list[Sample]:
        """All samples that were taken, in their order, with their pixels: read-only arrays that the file backs for as
        long as one of them is used.

        Raises:
            CheckpointError: as `taken`.
        """
        rows = sum(picture.grid.patches for sample in samples for picture in sample.vision)
        with self._told():
            self._file.flush()
            shape = (rows, self._width)
            whole = np.memmap(self._file, np.float32, "r", shape=shape) if rows else np.empty(shape, np.float32)
        out, start = [], 0
        for sample in samples:
            pictures = []
            for picture in sample.vision:
                stop = start + picture.grid.patches
                pictures.append(replace(picture, pixel_values=whole[start:stop]))
                start = stop
            out.append(replace(sample, vision=tuple(pictures)))
        return out

    def close(self) -> None:
        """What is mapped stays."""
        self._file.close()

    def __enter__(self) -> PixelStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except OSError as e:
            if e.errno == errno.ENOSPC:
                raise CheckpointError(
                    f"{self._folder}: the disk is full; the pictures' pixels lie there: free some space, or pass a "
                    "smaller --max-pixels"
                ) from None
            raise CheckpointError(f"{self._folder}: cannot be written ({e})") from None
