"""How far a quantized model's next-token distributions are from the original's. Pure functions and a running sum.

KL(original || quantized) and top-1 agreement over held-out positions: a per-layer output error alone misleads (the
attention sink's one token must stay exact, ordinary tokens need not; see benchmarks/LOG.md), so end to end decides.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

__all__ = ["Divergence", "DivergenceSum"]


@dataclass(frozen=True)
class Divergence:
    """kl: mean KL divergence in nats; top1: share of positions with the same most likely token; over `tokens`."""

    kl: float
    top1: float
    tokens: int


class DivergenceSum:
    """A running mean over batches of logits."""

    def __init__(self) -> None:
        self._kl, self._equal, self._tokens = 0.0, 0, 0

    def add(self, original: Tensor, quantized: Tensor) -> None:
        """Logits [n, vocab] of the same positions."""
        p, q = (F.log_softmax(x.double(), -1) for x in (original, quantized))
        self._kl += float((p.exp() * (p - q)).sum())
        self._equal += int((original.argmax(-1) == quantized.argmax(-1)).sum())
        self._tokens += len(original)

    def result(self) -> Divergence:
        """Raises ValueError where nothing was added."""
        if not self._tokens:
            raise ValueError("no positions were compared")
        return Divergence(self._kl / self._tokens, self._equal / self._tokens, self._tokens)
