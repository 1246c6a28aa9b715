"""Hidden states of all samples between two layers, in one file: memory does not grow with the samples.

Knows sequences of rows, not what they mean.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from edgevl.runtime.errors import EngineError

__all__ = ["Activations"]


class Activations:
    """float32 rows of several sequences, mapped from a .npy file.

    A file appears under its name only when it is whole, so that a run that was killed finds the last complete one.
    """

    def __init__(self, path: Path, lengths: Sequence[int], width: int) -> None:
        self.path, self.width = path, width
        self._bounds = np.concatenate([[0], np.cumsum(lengths)]).astype(int)

    @property
    def exists(self) -> bool:
        return self.path.exists()

    def __len__(self) -> int:
        return len(self._bounds) - 1

    def read(self) -> Iterator[torch.Tensor]:
        """The sequences [S, width], one in memory at a time."""
        whole = np.load(self.path, mmap_mode="r")
        if whole.shape != (self._bounds[-1], self.width):
            raise EngineError(f"{self.path}: shape {whole.shape}, expected {(int(self._bounds[-1]), self.width)}")
        for start, stop in zip(self._bounds, self._bounds[1:]):
            yield torch.from_numpy(np.array(whole[start:stop]))

    def write(self, sequences: Iterator[torch.Tensor]) -> None:
        """Replace the contents by as many sequences, as they come.

        Raises:
            ValueError: a sequence of another length or width.
            OSError: the disk is full, which is found before the first is written.
        """
        partial = self.path.with_suffix(".partial")
        shape = (int(self._bounds[-1]), self.width)
        whole = np.lib.format.open_memmap(partial, mode="w+", dtype=np.float32, shape=shape)
        if hasattr(os, "posix_fallocate"):
            # The file is all holes so far: a page that finds no room on the disk would end the process by a signal.
            with partial.open("r+b") as file:
                os.posix_fallocate(file.fileno(), 0, partial.stat().st_size)
        count = 0
        for (start, stop), sequence in zip(zip(self._bounds, self._bounds[1:]), sequences):
            if sequence.shape != (stop - start, self.width):
                raise ValueError(f"sequence {count}: {tuple(sequence.shape)}, expected {(stop - start, self.width)}")
            whole[start:stop] = sequence.numpy()
            count += 1
        if count != len(self):
            raise ValueError(f"{count} sequences, expected {len(self)}")
        whole.flush()
        del whole
        partial.replace(self.path)

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)
