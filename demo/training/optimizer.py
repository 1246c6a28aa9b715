"""Muon for matrices, Adam for the rest, as plain functions over explicit state.

Muon: momentum, then the update's singular values pushed to one by five Newton-Schulz steps, in bfloat16 where that is
fast (K. Jordan, "Muon: an optimizer for hidden layers in neural networks", 2024; the coefficients are from there).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Named = Sequence[tuple[str, Tensor]]
Gradient = Callable[[str], Tensor]


@torch.no_grad()
def muon_step(
    parameters: Named,
    gradient: Gradient,
    momentum: dict[str, Tensor],
    rate: float,
    decay: float = 0.02,
    compute: torch.dtype = torch.float32,
) -> None:
    """One step for 2-D parameters; equal shapes go through the iteration together. A stacked qkv (three times as many
    rows as columns) counts as three matrices."""
    groups: dict[tuple, list] = {}
    for n, p in parameters:
        g = gradient(n)
        b = momentum[n].mul_(0.95).add_(g, alpha=0.05)
        g = g.lerp(b, 0.95)
        g = g.view(3, -1, g.shape[1]) if g.shape[0] == 3 * g.shape[1] else g[None]
        tall = g.shape[1] > g.shape[2]
        groups.setdefault(tuple(sorted(g.shape[1:])), []).append((p, g.mT if tall else g, tall))
    for items in groups.values():
        x = torch.cat([g for _, g, _ in items])
        x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
        x = x.to(compute)
        for _ in range(5):
            a = x @ x.mT
            x = torch.baddbmm(x, torch.baddbmm(a, a, a, beta=-4.775, alpha=2.0315), x, beta=3.4445)
        for (p, g, tall), u in zip(items, x.split([len(g) for _, g, _ in items])):
            u = (u.mT if tall else u).float().reshape(p.shape)
            k = max(1, p.shape[0] / p.shape[1]) ** 0.5 if len(g) == 1 else 1.0
            p.mul_(1 - rate * decay).sub_(u, alpha=rate * k)


@torch.no_grad()
def adam_step(
    parameters: Named,
    gradient: Gradient,
    first: dict[str, Tensor],
    second: dict[str, Tensor],
    rate: Callable[[str], float],
    step: int,
) -> None:
    """One step of Adam (betas 0.9, 0.98) with a rate by name; step counts from 1."""
    for n, p in parameters:
        g = gradient(n)
        first[n].lerp_(g, 0.1)
        second[n].mul_(0.98).addcmul_(g, g, value=0.02)
        scale = (second[n] / (1 - 0.98**step)).sqrt_().add_(1e-8)
        p.addcdiv_(first[n], scale, value=-rate(n) / (1 - 0.9**step))
