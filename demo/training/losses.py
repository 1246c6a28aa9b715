"""What training minimises: the answer's tokens, and throw-away heads that teach the vision tower where things are.

The heads' features and weights are not part of the checkpoint. What each was seen to do is in README.md.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from demo.training import chat, pictures
from demo.training.model import Model
from edgevl.tasks.scenes import COLOURS, SHAPES


def _word_ids(words: tuple[str, ...] | list[str], ending: str = "") -> list[int]:
    return [chat.token_id("Ġ" + w + ending) for w in words]


KINDS, KINDS_PLURAL, HUES = _word_ids(SHAPES), _word_ids(SHAPES, "s"), _word_ids(list(COLOURS))


class Heads(nn.Module):
    """cell, patch: characters by place; idx: how many come before; thing, centre, shape, colour: shapes by place."""

    def __init__(self, c: dict) -> None:
        super().__init__()
        self.classes = len(pictures.CHARS) + 1
        self.cell = nn.Linear(c["dim"], 8 * self.classes)
        self.patch = nn.Linear(c["vit_dim"], 2 * self.classes)
        self.idx = nn.Linear(c["dim"], 48)
        self.thing = nn.Linear(c["dim"], 4 + 6 + 4 * 51)
        self.centre = nn.Linear(c["dim"], 4 * 3)
        self.shape, self.colour = nn.Linear(c["vit_dim"], 5), nn.Linear(c["vit_dim"], 7)


def _unit(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)


def character_losses(heads: Heads, labels: dict[str, Tensor], vis: Tensor, x: Tensor, out: dict) -> Tensor:
    """Characters by cell (ordered slots) and by patch (place), and the reading position. vis [B, cells, dim]."""
    weight = torch.ones(heads.classes, device=vis.device)
    weight[0] = 0.05
    loss = torch.zeros((), device=vis.device)
    for name, y in (("cell", heads.cell(vis)), ("patch", heads.patch(x))):
        y, t = y.reshape(-1, heads.classes), labels[name].reshape(-1)
        loss = loss + F.cross_entropy(y, t, weight)
        k = t > 0
        out[name] = (y[k].argmax(-1) == t[k]).float().mean().item()
    if "idx" in labels:
        loss = loss + F.cross_entropy(heads.idx(vis).reshape(-1, 48), labels["idx"].reshape(-1), ignore_index=-1)
    return loss


def shape_losses(model: Model, heads: Heads, labels: dict[str, Tensor], vis: Tensor, x: Tensor, out: dict) -> Tensor:
    """Kind, colour and box of what lies in a cell; the cell's likeness to the words for them; how many centres."""
    t = labels["thing"].reshape(-1, 6)
    k = t[:, 0] >= 0
    y, t = heads.thing(vis).reshape(len(t), -1)[k], t[k]
    parts = [F.cross_entropy(v, t[:, i]) for i, v in enumerate(y.split([4, 6, 51, 51, 51, 51], 1))]
    loss = 0.5 * (parts[0] + parts[1]) + sum(parts[2:])
    out["box"] = ((y[:, 10:].reshape(-1, 4, 51).argmax(2) - t[:, 2:]).abs() <= 1).float().mean().item()
    for i, words in ((0, KINDS), (0, KINDS_PLURAL), (1, HUES)):
        e = _unit(model.model.embed_tokens.weight[words])
        z = vis.reshape(-1, vis.shape[-1])[k] @ e.T / vis.shape[-1] ** 0.5
        loss = loss + 0.5 * F.cross_entropy(z, t[:, i])
    if "centre" in labels:
        few = torch.tensor([0.3, 1.0, 1.0], device=vis.device)
        loss = loss + F.cross_entropy(heads.centre(vis).reshape(-1, 3), labels["centre"].reshape(-1), few)
        for name, head in (("shape", heads.shape), ("colour", heads.colour)):
            t = labels[name].reshape(-1)
            loss = loss + 0.5 * F.cross_entropy(head(x).reshape(len(t), -1), t)
    return loss


def look_losses(model: Model, labels: dict[str, Tensor], ids: Tensor, cols: Tensor, targets: Tensor) -> Tensor:
    """The first head of decoder layers 1 and 2 looks from the shape's word, and from the answer, at its cells."""
    thing, asked = labels["thing"], labels["asked"][:, None]
    hit = (thing[..., 0] == asked[..., 0]) & ((asked[..., 1] < 0) | (thing[..., 1] == asked[..., 1]))
    hit &= thing[..., 0] >= 0
    words = torch.isin(ids[:, chat.P :], torch.tensor(KINDS + KINDS_PLURAL, device=ids.device))
    loss = torch.zeros((), device=ids.device)
    for layer, at in ((1, words), (2, targets[:, chat.P :] >= 0)):
        at = at & hit.any(1, keepdim=True)
        looks = (model.model.first_head(layer)[:, :, cols].float() * hit[:, None]).sum(-1)[at]
        if len(looks):
            loss = loss - (looks + 1e-4).log().mean()
    return loss


def losses(
    model: Model, heads: Heads, batch: dict, aux: float, device: torch.device, time_counts: bool = True
) -> tuple[Tensor, dict[str, float]]:
    """batch: of pictures.make; aux: weight of the heads -> loss, running figures."""
    imgs = [torch.from_numpy(i).to(device) for i in batch["imgs"]]
    labels = {k: torch.from_numpy(v).to(device) for k, v in batch.items() if k not in ("imgs", "q", "a")}
    seen = [model.vision(i) for i in imgs]
    vis, x = torch.cat([i[0] for i in seen], 1), torch.cat([i[1] for i in seen], 1)
    out: dict[str, float] = {}
    loss = torch.zeros((), device=device)
    if aux and "cell" in labels:
        loss = loss + aux * character_losses(heads, labels, _unit(vis), x, out)
    if aux and "thing" in labels:
        loss = loss + aux * shape_losses(model, heads, labels, _unit(vis), x, out)
    answers = [chat.answer_ids(a) for a in batch["a"]]
    ids, pos, cols, targets = chat.collate([i.shape for i in batch["imgs"]], batch["q"], answers, time_counts)
    ids, pos, cols, targets = (t.to(device) for t in (ids, pos, cols, targets))
    r, c = (targets >= 0).nonzero(as_tuple=True)
    y, t = model.decode(ids, pos, chat.P, vis, cols, (r, c)), targets[r, c]
    w = (targets >= 0).sum(1).float().rsqrt()[r]  # so that boxes do not drown one-word answers
    loss = loss + (F.cross_entropy(y, t, reduction="none") * w).sum() / w.sum()
    if aux and "asked" in labels:
        loss = loss + aux * look_losses(model, labels, ids, cols, targets)
    right = y.argmax(-1) == t
    row = torch.ones(len(ids), device=device).index_put_((r[~right],), torch.zeros((), device=device))
    out.update(tok=right.float().mean().item(), exact=row.mean().item())
    return loss, out
