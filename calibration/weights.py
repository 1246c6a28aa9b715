"""A checkpoint's tensors as torch tensors, by layer, and its samples as the decoder's first hidden states."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from edgevl.calibration.dataset import Sample
from edgevl.calibration.layers import DECODER_TENSORS, rms_norm
from edgevl.calibration.vision import Tower
from edgevl.runtime.config import ModelConfig

__all__ = ["Head", "Stored", "Tensors", "embed_samples", "layer_weights", "same_head"]

_ROWS = 4096  # of two tables that are compared


class Tensors(Protocol):
    """Float tensors by their released names: `Checkpoint`, or `FloatCheckpoint` where some are stored quantized."""

    @property
    def config(self) -> ModelConfig: ...
    def names(self) -> list[str]: ...
    def read(self, name: str) -> np.ndarray: ...
    def rows(self, name: str, start: int, stop: int) -> np.ndarray: ...


class Stored(Tensors, Protocol):
    """Plain tensors that will be written as they are, in the dtypes that they have: `Checkpoint`, or a
    `RotatedCheckpoint` made from it. read and rows give float32 numbers that their dtype holds exactly."""

    @property
    def folder(self) -> Path: ...
    def dtype(self, name: str) -> str: ...


def layer_weights(checkpoint: Tensors, layer: int) -> dict[str, Tensor]:
    """The tensors of decoder layer `layer`, float32, by their names within it."""
    return {n: torch.from_numpy(checkpoint.read(f"model.layers.{layer}.{n}")) for n in DECODER_TENSORS}


def _table_name(checkpoint: Tensors) -> str:
    """The tensor that the head multiplies with."""
    return "model.embed_tokens.weight" if checkpoint.config.text.tie_word_embeddings else "lm_head.weight"


def embed_samples(
    checkpoint: Tensors, samples: Sequence[Sample], scratch: Path, embeds: Iterator[Tensor] | None = None
) -> Iterator[Tensor]:
    """Hidden states [S, hidden] that enter the first decoder layer, sample by sample.

    Args:
        scratch: a file for the vision encoder's own.
        embeds: image embeddings of every picture, in order; by default the checkpoint's vision encoder makes them.
    """
    if embeds is None:
        embeds = Tower(checkpoint, samples).embeds(scratch)
    for sample in samples:
        ids, inverse = np.unique(sample.ids, return_inverse=True)
        table = np.concatenate([checkpoint.rows("model.embed_tokens.weight", int(i), int(i) + 1) for i in ids])
        x = torch.from_numpy(table[inverse])
        if sample.vision:
            x[torch.from_numpy(sample.visual)] = torch.cat([next(embeds) for _ in sample.vision])
        yield x


class Head:
    """The final norm and the head: final hidden states [n, hidden] -> logits float32 [n, vocab]."""

    def __init__(self, checkpoint: Tensors) -> None:
        self._epsilon = checkpoint.config.text.rms_norm_eps
        self._norm = torch.from_numpy(checkpoint.read("model.norm.weight"))
        self._table = torch.from_numpy(checkpoint.read(_table_name(checkpoint)))

    def __call__(self, hidden: Tensor) -> Tensor:
        return F.linear(rms_norm(hidden, self._norm, self._epsilon), self._table)


def same_head(a: Tensors, b: Tensors) -> bool:
    """Whether two checkpoints have the same final norm and head, so that one `Head` serves both."""
    if not np.array_equal(a.read("model.norm.weight"), b.read("model.norm.weight")):
        return False
    vocab = a.config.text.vocab_size
    ranges = ((i, min(i + _ROWS, vocab)) for i in range(0, vocab, _ROWS))
    names = _table_name(a), _table_name(b)
    return all(np.array_equal(a.rows(names[0], *r), b.rows(names[1], *r)) for r in ranges)
