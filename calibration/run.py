"""One run of the quantization: what it works on, where, and the hidden states that it carries along.

Its folder holds one shard per finished layer, the hidden states that enter the next one, and a report per layer.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from edgevl.calibration.activations import Activations
from edgevl.calibration.dataset import Sample
from edgevl.calibration.layer_report import LayerReport
from edgevl.calibration.layers import Watch, decoder_layer
from edgevl.calibration.output import shard_name
from edgevl.calibration.recipes import Recipe
from edgevl.calibration.weights import Stored
from edgevl.runtime.mrope import rotary_rows

__all__ = ["Begin", "Progress", "Run", "replace_file"]

Progress = Callable[[int, int, str], None]  # layers done, layers in all, what is being done
Begin = Callable[[Sample, Tensor, Tensor], None]  # the sample, and its rotary rows


@dataclass
class Run:
    """One run's state: where it works, on what."""

    checkpoint: Stored  # rotated, where the recipe says so
    folder: Path
    recipe: Recipe
    samples: Sequence[Sample]
    held_out: Sequence[Sample]
    progress: Progress
    rotary: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    @property
    def layers(self) -> int:
        return self.checkpoint.config.text.num_hidden_layers

    @property
    def streams(self) -> dict[str, Sequence[Sample]]:
        """Hidden states that are carried along: the samples, and the held-out ones through both models."""
        streams = {"samples": self.samples, "original": self.held_out, "quantized": self.held_out}
        if not (self.recipe.watches_decoder or self.recipe.kv_cache):
            del streams["samples"]
        return {name: some for name, some in streams.items() if some}

    def shard(self, layer: int) -> Path:
        return self.folder / shard_name(layer, self.layers)

    def hidden(self, stream: str, layer: int) -> Activations:
        """What enters `layer` (or the final norm)."""
        lengths = [len(s.ids) for s in self.streams[stream]]
        path = self.folder / f"{stream}-{layer:03d}.npy"
        return Activations(path, lengths, self.checkpoint.config.text.hidden_size)

    def outputs(
        self,
        stream: str,
        layer: int,
        weights: Mapping[str, Tensor],
        watch: Watch | None = None,
        begin: Begin | None = None,
    ) -> Iterator[Tensor]:
        """Outputs of one layer, sample by sample; `begin` is told of each before."""
        extra: dict[str, Any] = {} if watch is None else {"watch": watch}
        for sample, hidden in zip(self.streams[stream], self.hidden(stream, layer).read()):
            cos, sin = self._rows(sample)
            if begin is not None:
                begin(sample, cos, sin)
            yield decoder_layer(hidden, weights, cos, sin, self.checkpoint.config.text, **extra)

    def reports(self, layer: int) -> list[LayerReport]:
        rows = json.loads((self.folder / f"layer-{layer:03d}.json").read_text(encoding="utf-8"))
        return [LayerReport(**row) for row in rows]

    def _rows(self, sample: Sample) -> tuple[Tensor, Tensor]:
        if id(sample) not in self.rotary:
            cos, sin = rotary_rows(sample.positions, self.checkpoint.config.text)
            self.rotary[id(sample)] = torch.from_numpy(cos), torch.from_numpy(sin)
        return self.rotary[id(sample)]


def replace_file(path: Path, text: str) -> None:
    """Write a small file so that it is there whole or not at all."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
