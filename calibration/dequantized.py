"""Any checkpoint as plain float32 tensors: layers that are stored quantized are multiplied out as they are read.

What is measured against the original is then what the files hold, whoever wrote them.
"""

from __future__ import annotations

from pathlib import Path
from types import TracebackType

import numpy as np

from edgevl.calibration.formats import dequantize_blocks
from edgevl.calibration.quantized import QuantizedReader
from edgevl.runtime.checkpoint import Checkpoint
from edgevl.runtime.config import ModelConfig
from edgevl.runtime.quantized_layers import QuantizedLayer

__all__ = ["FloatCheckpoint"]


class FloatCheckpoint:
    """The tensors of `Checkpoint` under the released names, quantized ones dequantized. A context manager."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.stored = checkpoint
        self._reader = QuantizedReader(checkpoint)

    @classmethod
    def open(cls, source: str | Path) -> FloatCheckpoint:
        """Raises CheckpointError as `Checkpoint.open`."""
        return cls(Checkpoint.open(source))

    @property
    def config(self) -> ModelConfig:
        return self.stored.config

    @property
    def folder(self) -> Path:
        return self.stored.folder

    def names(self) -> list[str]:
        return self.stored.names()

    def layer(self, name: str) -> QuantizedLayer | None:
        """How the layer `name` is stored; None where it is plain."""
        return self.stored.layer(name)

    def symmetric(self, layer: QuantizedLayer) -> bool:
        """Whether every zero point of the layer is the middle code."""
        return self._reader.grid(layer).zero_points is None

    def read(self, name: str) -> np.ndarray:
        """The whole tensor, float32. Raises CheckpointError for values that cannot be, KeyError for no such tensor."""
        layer = self.stored.layer(name) if name.endswith(".weight") else None
        if layer is None:
            return self.stored.read(name)
        if layer.kind == "int8":
            q = self._reader.channels(layer)
            weight = q.codes.astype(np.float32) * q.scales[:, None]
            # The weight of the input as it comes, before the factors that the engine multiplies it with.
            return weight if (factors := self.factors(layer)) is None else weight * factors
        return np.concatenate([dequantize_blocks(part) for part in self._reader.blocks(layer)])

    def factors(self, layer: QuantizedLayer) -> np.ndarray | None:
        """[K]: pre_quant_scale of a W8A8 layer, None where it has none."""
        entry = layer.entries.get("pre_quant_scale")
        if entry is None:
            return None
        return self.stored.files.floats(entry.stored_name, entry, 0, entry.shape[0]).astype(np.float32)

    def rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows of a plain tensor, as `Checkpoint.rows`."""
        return self.stored.rows(name, start, stop)

    def close(self) -> None:
        self.stored.close()

    def __enter__(self) -> FloatCheckpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
