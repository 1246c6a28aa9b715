"""Reads the codes of a checkpoint's quantized layers, some outputs at a time; nothing is dequantized.

Knows files and layers (edgevl.runtime.quantized_layers), not graphs; the layouts themselves are in
edgevl.calibration.packing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from edgevl.calibration.formats import BlockQuantized, ChannelQuantized, explicit_zero_points, split_blocks
from edgevl.calibration.packing import (
    group_order,
    unpack_awq,
    unpack_awq_zeros,
    unpack_compressed,
    unpack_compressed_zeros,
    unpack_gptq,
    unpack_gptq_zeros,
    unpack_int8,
)
from edgevl.runtime.checkpoint import Checkpoint
from edgevl.runtime.quantized_layers import QuantizedLayer

__all__ = ["LayerGrid", "QuantizedReader"]

_CHUNK_CODES = 1 << 22  # unpacked at once
_KEPT_GRIDS = 8  # of the layers of one block: asked for when layers are merged and again when they are written


@dataclass(frozen=True)
class LayerGrid:
    """What a layer has beside its codes."""

    scales: np.ndarray  # float32 [N, G]
    zero_points: np.ndarray | None  # uint8 [N, G]; None: 2^(bits-1) everywhere
    order: np.ndarray | None  # int64 [K]: the columns by group, where they do not lie so


class QuantizedReader:
    """The quantized layers of one checkpoint. Every method raises CheckpointError for values that cannot be."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._files = checkpoint.files
        self._grids: dict[str, LayerGrid] = {}

    def grid(self, layer: QuantizedLayer) -> LayerGrid:
        """Scales, zero points and activation order: small, so whole."""
        if layer.name not in self._grids:
            while len(self._grids) >= _KEPT_GRIDS:
                del self._grids[next(iter(self._grids))]
            self._check_shape(layer)
            self._grids[layer.name] = LayerGrid(self._scales(layer), self._zero_points(layer), self._order(layer))
        return self._grids[layer.name]

    def blocks(self, layer: QuantizedLayer) -> Iterator[BlockQuantized]:
        """A weight-only layer in blocks of `layer.block_size`, some outputs at a time.

        Zero points are given for all outputs or for none.
        """
        grid = self.grid(layer)
        for part in self._parts(layer, grid):
            if grid.zero_points is not None:
                part = BlockQuantized(
                    part.codes, part.scales, explicit_zero_points(part), part.bits, part.columns, part.order
                )
            yield split_blocks(part, layer.block_size)

    def channels(self, layer: QuantizedLayer) -> ChannelQuantized:
        """A W8A8 layer, whole."""
        return unpack_int8(self._files.integers(layer.entries["weight"]), self.grid(layer).scales)

    # ------------------------------------------------------------------ the parts

    def _parts(self, layer: QuantizedLayer, grid: LayerGrid) -> Iterator[BlockQuantized]:
        rows, columns = layer.shape
        group = layer.group
        per_word = 32 // layer.bits
        step = max(1, _CHUNK_CODES // columns // per_word) * per_word  # a slice starts on a word
        index = None
        if grid.order is not None:
            index = np.empty(columns, np.int64)
            index[grid.order] = np.arange(columns) // group
        integers = {s: self._integers(layer, s) for s in _CODED[layer.kind] if s in layer.entries}
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            scales = grid.scales[start:stop]
            words = slice(start // per_word, -(-stop // per_word))
            if layer.kind == "gptq":
                codes, zeros = integers["qweight"], integers["qzeros"]
                args = (index, layer.bits, group, layer.version)
                yield unpack_gptq(codes[:, start:stop], zeros[:, words], scales.T, *args)
            elif layer.kind == "awq":
                codes, zeros = integers["qweight"], integers["qzeros"]
                yield unpack_awq(codes[:, words], zeros[:, words], scales.T, group)
            else:
                zeros = integers.get("weight_zero_point")
                if zeros is not None:
                    zeros = zeros[start:stop] if zeros.dtype == np.int8 else zeros[words]
                codes = integers["weight_packed"]
                yield unpack_compressed(codes[start:stop], scales, zeros, index, layer.bits, columns, group)

    def _integers(self, layer: QuantizedLayer, suffix: str) -> np.ndarray:
        return self._files.integers(layer.entries[suffix])

    def _scales(self, layer: QuantizedLayer) -> np.ndarray:
        suffix = "scales" if "scales" in layer.entries else "weight_scale"
        entry = layer.entries[suffix]
        scales = self._files.floats(entry.stored_name, entry, 0, int(np.prod(entry.shape))).reshape(entry.shape)
        if scales.min() < 0:
            position = [int(i) for i in np.unravel_index(int(scales.argmin()), scales.shape)]
            raise layer.error(suffix, f"holds {scales.min():g} at {position}; scales must not be negative")
        return np.ascontiguousarray(scales.T) if suffix == "scales" else scales

    def _zero_points(self, layer: QuantizedLayer) -> np.ndarray | None:
        rows = layer.shape[0]
        if layer.kind in ("gptq", "awq"):
            words = self._integers(layer, "qzeros")
            gptq = layer.kind == "gptq"
            zeros = unpack_gptq_zeros(words, layer.bits, rows, layer.version) if gptq else unpack_awq_zeros(words, rows)
        elif "weight_zero_point" not in layer.entries:
            zeros = None
        else:
            zeros = unpack_compressed_zeros(self._integers(layer, "weight_zero_point"), layer.bits, rows)
        if zeros is None or (zeros == 2 ** (layer.bits - 1)).all():
            return None
        if layer.kind == "int8":
            raise layer.error("weight_zero_point", "is not zero; W8A8 is read with symmetric weights only")
        return zeros

    def _check_shape(self, layer: QuantizedLayer) -> None:
        if "weight_shape" in layer.entries:
            shape = [int(n) for n in self._integers(layer, "weight_shape")]
            if shape != list(layer.shape):
                raise layer.error("weight_shape", f"holds {shape}, expected {list(layer.shape)} by config.json")

    def _order(self, layer: QuantizedLayer) -> np.ndarray | None:
        suffix = "g_idx" if "g_idx" in layer.entries else "weight_g_idx"
        if suffix not in layer.entries:
            return None
        index = self._integers(layer, suffix)
        if suffix == "weight_g_idx" and (index == -1).all():  # compressed-tensors' word for "as they lie"
            return None
        try:
            return group_order(index, layer.group)
        except ValueError as e:
            raise layer.error(suffix, f"cannot be used: {e}") from None


_CODED = {
    "gptq": ("qweight", "qzeros"),
    "awq": ("qweight", "qzeros"),
    "packed": ("weight_packed", "weight_zero_point"),
}
