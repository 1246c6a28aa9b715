"""The vision encoder over all pictures, block by block: as it is, or quantized to W8A8 on the way.

One block is in memory at a time, the patches of all pictures lie on disk between two blocks. A quantized run leaves one
file of tensors and one report per block (`vision-000.block`, `.json`) in its folder, and goes on where it was stopped.
Knows checkpoints and samples, not the decoder.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from edgevl.calibration.activations import Activations
from edgevl.calibration.dataset import Sample
from edgevl.calibration.layer_report import LayerReport
from edgevl.calibration.layers import Watch, merge, vision_block
from edgevl.calibration.output import save_shard
from edgevl.calibration.w8a8 import Int8Block, Int8Scheme, Statistics, merger_points, quantize_block, vision_points
from edgevl.runtime.errors import InputError
from edgevl.runtime.mrope import vision_rotary_rows
from edgevl.runtime.output_file import whole

if TYPE_CHECKING:
    from edgevl.calibration.weights import Stored, Tensors

__all__ = ["BlockWatch", "Tower", "block_file", "quantize_tower", "tower_reports", "vision_prefix"]

BlockWatch = Callable[[int], Watch | None]  # of block `layer`, the merger being layer `depth`
_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


class Tower:
    """The vision encoder over the pictures of some samples, in their order."""

    def __init__(self, checkpoint: Tensors, samples: Sequence[Sample]) -> None:
        self.config = checkpoint.config.vision
        self.pictures = [p for s in samples for p in s.vision]
        self.lengths = [p.grid.patches for p in self.pictures]
        self._checkpoint = checkpoint
        self._rows: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    def patches(self) -> Iterator[Tensor]:
        """What enters the first block: [patches, embed_dim] of every picture."""
        patch = torch.from_numpy(self._checkpoint.read("visual.patch_embed.proj.weight")).flatten(1)
        return (F.linear(torch.from_numpy(np.array(p.pixel_values)), patch) for p in self.pictures)

    def run(self, layer: int, x: Iterator[Tensor], weights: Mapping[str, Tensor], watch: Watch) -> Iterator[Tensor]:
        """Outputs of block `layer` for every picture: [patches, embed_dim], or [tokens, hidden] of the merger, which
        is layer `depth`."""
        for flat, picture in zip(x, self.pictures):
            frames = flat.view(picture.grid.t, -1, self.config.embed_dim)
            if layer == self.config.depth:
                yield merge(frames, weights, self.config, watch)
            else:
                cos, sin = self._rotary(picture.grid.h, picture.grid.w)
                yield vision_block(frames, weights, cos, sin, self.config, watch).flatten(0, 1)

    def _rotary(self, h: int, w: int) -> tuple[Tensor, Tensor]:
        if (h, w) not in self._rows:
            rows = vision_rotary_rows(h, w, self.config.spatial_merge_size, self.config.head_dim)
            self._rows[h, w] = tuple(torch.from_numpy(np.array(t)) for t in rows)  # pyright: ignore
        return self._rows[h, w]

    def embeds(self, scratch: Path, rounds: BlockWatch | None = None) -> Iterator[Tensor]:
        """Image embeddings [tokens, hidden] of every picture through the checkpoint's own weights; `scratch`: a file
        for what lies between two blocks; `rounds`: gives what rounds the inputs of a block."""
        if not self.pictures:
            return
        x = Activations(scratch, self.lengths, self.config.embed_dim)
        x.write(self.patches())
        for block in range(self.config.depth + 1):
            watch = (rounds and rounds(block)) or _ignore
            out = self.run(block, x.read(), _block_weights(self._checkpoint, block), watch)
            if block == self.config.depth:
                yield from out
            else:
                x.write(out)
        x.remove()


def _ignore(point: str, x: Tensor) -> None:
    pass


def vision_prefix(checkpoint: Tensors, layer: int) -> str:
    return "visual.merger" if layer == checkpoint.config.vision.depth else f"visual.blocks.{layer}"


def _block_weights(checkpoint: Tensors, layer: int) -> dict[str, Tensor]:
    """The tensors of block `layer` (the merger is layer `depth`), float32, by their names within it."""
    prefix = f"{vision_prefix(checkpoint, layer)}."
    names = [n for n in checkpoint.names() if n.startswith(prefix)]
    return {n.removeprefix(prefix): torch.from_numpy(checkpoint.read(n)) for n in names}


# ---------------------------------------------------------------------- quantized


def block_file(folder: Path, layer: int) -> Path:
    """The tensors of a quantized block, in safetensors' format; the merger is the last one."""
    return folder / f"vision-{layer:03d}.block"


def tower_reports(folder: Path, depth: int) -> list[LayerReport]:
    """Of all blocks and the merger."""
    rows = [
        json.loads(block_file(folder, i).with_suffix(".json").read_text(encoding="utf-8")) for i in range(depth + 1)
    ]
    return [LayerReport(**row) for some in rows for row in some]


def quantize_tower(
    checkpoint: Stored,
    folder: Path,
    scheme: Int8Scheme,
    streams: Mapping[str, Sequence[Sample]],
    progress: Callable[[str], None],
) -> dict[str, Activations]:
    """Quantize all blocks and the merger to W8A8, each on the outputs of the quantized ones before it.

    Args:
        folder: where the blocks' files go, and are found by a run that goes on.
        streams: samples by name; "samples" are calibrated on, "original" goes through the original weights, any other
            through the quantized ones.
        progress: told what is being done.

    Returns:
        Image embeddings by stream, one sequence per picture; streams without pictures are left out.

    Raises:
        InputError: no calibration sample has a picture.
        EngineError: an activation that is not finite; the block is named.
    """
    depth = checkpoint.config.vision.depth
    towers = {name: Tower(checkpoint, samples) for name, samples in streams.items()}
    towers = {name: tower for name, tower in towers.items() if tower.pictures}
    if "samples" not in towers:
        raise InputError("INT8 vision calibrates on pictures, but no sample has one; give pictures with --images")
    for layer in range(depth + 1):
        if block_file(folder, layer).exists():
            continue
        progress(f"vision block {layer + 1} of {depth + 1}")
        inputs = {name: _between(folder, name, tower, layer) for name, tower in towers.items()}
        for name, x in inputs.items():
            if layer == 0 and not x.exists:
                x.write(towers[name].patches())
        weights = _block_weights(checkpoint, layer)
        points = merger_points(checkpoint.config.vision) if layer == depth else vision_points(checkpoint.config.vision)
        seen = Statistics(points, vision_prefix(checkpoint, layer))
        for _ in towers["samples"].run(layer, inputs["samples"].read(), weights, seen):
            pass
        block = quantize_block(weights, seen, points, scheme, vision_prefix(checkpoint, layer))
        for name, tower in towers.items():
            how = (weights, _ignore) if name == "original" else (block.weights, block.watch)
            _between(folder, name, tower, layer + 1).write(tower.run(layer, inputs[name].read(), *how))
        _save(checkpoint, folder, layer, weights, block)
        for x in inputs.values():
            x.remove()
    return {name: _between(folder, name, tower, depth + 1) for name, tower in towers.items()}


def _between(folder: Path, name: str, tower: Tower, layer: int) -> Activations:
    """What enters `layer`; after the last one, the image embeddings."""
    path = folder / f"vision-{name}-{layer:03d}.npy"
    if layer <= tower.config.depth:
        return Activations(path, tower.lengths, tower.config.embed_dim)
    tokens = [n // tower.config.spatial_merge_size**2 for n in tower.lengths]
    return Activations(path, tokens, tower.config.hidden_size)


def _save(checkpoint: Stored, folder: Path, layer: int, weights: Mapping[str, Tensor], block: Int8Block) -> None:
    """The report, then the tensors: their file says that the block is done."""
    prefix = vision_prefix(checkpoint, layer)
    tensors = {f"{prefix}.{name}": value for name, value in block.tensors.items()}
    for name, value in block.weights.items():
        if name not in block.tensors:  # what smoothing has changed keeps its precision: bfloat16 has 8 bits too
            full = f"{prefix}.{name}"
            same = torch.equal(value, weights[name])
            tensors[full] = value.to(_DTYPES[checkpoint.dtype(full)]) if same else value
    path = block_file(folder, layer)
    with whole(path.with_suffix(".json")) as partial:
        partial.write_text(json.dumps([asdict(r) for r in block.reports]), encoding="utf-8")
    save_shard(path, tensors)
