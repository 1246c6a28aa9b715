"""Samples on their way through the decoder, as several variants of one model compute them: hidden states in files.

Every variant is a stream: one file that each layer replaces, so memory does not grow with samples, layers or variants.
Knows hidden states and weights, not where weights come from.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from edgevl.calibration.activations import Activations
from edgevl.calibration.dataset import Sample
from edgevl.calibration.fidelity import Divergence, DivergenceSum
from edgevl.calibration.layers import Watch, decoder_layer
from edgevl.calibration.vision import BlockWatch, Tower
from edgevl.calibration.weights import Head, Tensors, embed_samples
from edgevl.runtime.config import TextConfig
from edgevl.runtime.errors import EngineError
from edgevl.runtime.mrope import rotary_rows

__all__ = ["Streams"]

_ROWS = 32  # of logits at once: 20 MB with the released vocabulary


class Streams:
    """Named streams over the same samples, in `folder`, which exists."""

    def __init__(self, samples: Sequence[Sample], config: TextConfig, folder: Path) -> None:
        self._samples, self._config, self._folder = samples, config, folder
        self._lengths = [len(s.ids) for s in samples]
        self._rows: list[tuple[Tensor, Tensor]] = []
        for sample in samples:
            cos, sin = rotary_rows(sample.positions, config)
            self._rows.append((torch.from_numpy(cos), torch.from_numpy(sin)))

    def _file(self, name: str) -> Activations:
        return Activations(self._folder / f"stream-{name}.npy", self._lengths, self._config.hidden_size)

    def start(self, name: str, tensors: Tensors, rounds: BlockWatch | None = None) -> None:
        """What enters the first layer of a checkpoint: token embeddings, pictures through its vision encoder, whose
        inputs `rounds` rounds."""
        scratch = self._folder / f"vision-{name}.npy"
        embeds = Tower(tensors, self._samples).embeds(scratch, rounds)
        self._file(name).write(embed_samples(tensors, self._samples, scratch, embeds))
        scratch.unlink(missing_ok=True)

    def read(self, name: str) -> Iterator[Tensor]:
        """Hidden states [S, hidden], sample by sample."""
        return self._file(name).read()

    def advance(
        self,
        name: str,
        weights: Mapping[str, Tensor],
        watch: Watch | None = None,
        *,
        source: str | None = None,
        where: str = "",
    ) -> None:
        """Run a stream (or what `source` holds now, which stays) through one layer.

        Raises:
            EngineError: hidden states that are not finite; `where` names the layer.
        """
        options = {} if watch is None else {"watch": watch}

        def outputs() -> Iterator[Tensor]:
            for (cos, sin), hidden in zip(self._rows, self.read(source or name)):
                out = decoder_layer(hidden, weights, cos, sin, self._config, **options)
                if not bool(torch.isfinite(out).all()):
                    raise EngineError(f"{where or name}: its output is not finite; check the checkpoint's tensors")
                yield out

        self._file(name).write(outputs())

    def remove(self, name: str) -> None:
        self._file(name).remove()

    def divergences(self, original: str, other: str, heads: tuple[Head, Head]) -> list[Divergence]:
        """Of the finished stream `other` from `original`, one per sample, over its `measured` positions."""
        found = []
        for sample, *hidden in zip(self._samples, self.read(original), self.read(other)):
            wanted, total = torch.from_numpy(sample.measured), DivergenceSum()
            for pair in zip(*(h[wanted].split(_ROWS) for h in hidden)):
                total.add(*(head(part) for head, part in zip(heads, pair)))
            found.append(total.result())
        return found
