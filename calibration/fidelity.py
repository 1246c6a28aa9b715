"""How far a quantized model's next-token distributions are from the original's. Pure functions and a running sum.

KL(original || quantized) and top-1 agreement over held-out positions (`dataset.Sample.measured`): a per-layer output
error alone misleads (the attention sink's one token must stay exact, ordinary tokens need not; see benchmarks/LOG.md),
so end to end decides.
Tokens of one conversation resemble each other, so intervals come from drawing whole conversations.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch.nn.functional as F
from torch import Tensor

__all__ = ["Divergence", "DivergenceSum", "Interval", "bootstrap", "combined"]

Interval = tuple[float, float]
_DRAWS = 2000  # of a bootstrap: ends of a 95 % interval move by a few percent of its width


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


def combined(parts: Sequence[Divergence]) -> Divergence:
    """The divergence over the positions of all parts together.

    Raises:
        ValueError: no parts.
    """
    tokens = sum(d.tokens for d in parts)
    if not tokens:
        raise ValueError("no positions were compared")
    return Divergence(
        sum(d.kl * d.tokens for d in parts) / tokens, sum(d.top1 * d.tokens for d in parts) / tokens, tokens
    )


def bootstrap(values: Sequence[float], weights: Sequence[float] | None = None, level: float = 0.95) -> Interval:
    """Percentile interval of the weighted mean of `values`, from redrawing them with their weights (Efron and
    Tibshirani, An Introduction to the Bootstrap, section 13.3). Always the same for the same input.

    With weights the mean is sum(w v) / sum(w) of what was drawn: of conversations, say, weighted with their tokens.

    Raises:
        ValueError: a single value, which can only be drawn again and says nothing of how far others are; or weights
            that do not belong to them.
    """
    v = np.asarray(values, np.float64)
    w = np.ones_like(v) if weights is None else np.asarray(weights, np.float64)
    if v.size < 2 or w.shape != v.shape:
        raise ValueError(f"{v.size} values with {w.size} weights, expected at least two and as many")
    drawn = np.random.default_rng(0).integers(0, len(v), (_DRAWS, len(v)))
    means = (v * w)[drawn].sum(1) / w[drawn].sum(1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
