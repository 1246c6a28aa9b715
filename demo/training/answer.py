"""Greedy answers of the training model to yardstick cases: processor, prompt, decoding. One picture layout per batch.

`right_under_truth` asks a cheaper question first: is every argmax right under the true prefix? Then greedy decoding
gives the truth, and only the other cases need to be generated.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file

from demo.training import chat
from demo.training.model import Model
from edgevl.runtime.image_processing import smart_resize
from edgevl.tasks import Case


@dataclass(frozen=True)
class Reading:
    """How pictures and positions reach the model; the defaults are Qwen2-VL's."""

    min_pixels: int = 784
    max_pixels: int = 100_352
    resize: str = "bicubic"
    plain_positions: bool = False
    time_counts: bool = True


def resize(picture: Image.Image, size: tuple[int, int], how: str) -> np.ndarray:
    """uint8 [height, width, 3]. how: "bicubic" (Pillow's, anti-aliased: the reference), "bilinear" (anti-aliased),
    "bicubic, no antialias", "bilinear, no antialias"."""
    h, w = size
    filters = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
    if how in filters:
        return np.asarray(picture.convert("RGB").resize((w, h), filters[how]))
    x = torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)[None].float()
    x = F.interpolate(x, (h, w), mode=how.split(",")[0], align_corners=False, antialias=False)
    return x[0].permute(1, 2, 0).round().clamp(0, 255).to(torch.uint8).numpy()


def prepare(case: Case, reading: Reading) -> tuple[np.ndarray, ...]:
    """The case's pictures as the model takes them: one array per picture, or one [frames, H, W, 3] for a video."""
    out = []
    for p in case.pictures:
        high = case.max_pixels or reading.max_pixels
        size = smart_resize(p.height, p.width, 28, min(reading.min_pixels, high), high)
        out.append(resize(p, size, reading.resize))
    return (np.stack(out),) if case.video else tuple(out)


def load(folder: Path) -> Model:
    """The checkpoint, in float32."""
    m = Model()
    m.load_state_dict({k: v.float() for k, v in load_file(folder / "model.safetensors").items()})
    return m.eval()


def reading_of(folder: Path) -> Reading:
    """The pixel limits of a checkpoint's preprocessor."""
    c = json.loads((folder / "preprocessor_config.json").read_text())
    return Reading(c["min_pixels"], c["max_pixels"])


def _groups(cases: Sequence[Case], reading: Reading, most: int = 16) -> list[tuple[list[int], list[np.ndarray]]]:
    by: dict[tuple, list] = {}
    for i, c in enumerate(cases):
        arrays = prepare(c, reading)
        key = (tuple(a.shape for a in arrays), len(chat.question_ids(c.question)))
        by.setdefault(key, []).append((i, arrays))
    out = []
    for rows in by.values():
        for a in range(0, len(rows), most):
            part = rows[a : a + most]
            out.append(([i for i, _ in part], [np.stack(x) for x in zip(*(arrays for _, arrays in part))]))
    return out


def _positions(pos: torch.Tensor, reading: Reading) -> torch.Tensor:
    return torch.arange(pos.shape[1]).expand(3, -1) if reading.plain_positions else pos


@torch.no_grad()
def answers(model: Model, cases: Sequence[Case], reading: Reading, limit: int = 64) -> tuple[list[str], np.ndarray]:
    """-> greedy answers; and per case (tokens of the truth that are the argmax under the true prefix, tokens)."""
    out, counts = [""] * len(cases), np.zeros((len(cases), 2), np.int64)
    for rows, imgs in _groups(cases, reading):
        vis = torch.cat([model.vision(torch.from_numpy(i))[0] for i in imgs], 1)
        asked = [cases[i].question for i in rows]
        truth = [chat.answer_ids(cases[i].truth) for i in rows]
        shapes = [i.shape for i in imgs]
        ids, pos, cols, targets = chat.collate(shapes, asked, truth, reading.time_counts)
        best = model.decode(ids, _positions(pos, reading), chat.P, vis, cols).argmax(-1)
        wrong = []
        for j, i in enumerate(rows):
            k = targets[j] >= 0
            counts[i] = int((best[j][k] == targets[j][k]).sum()), int(k.sum())
            if counts[i, 0] == counts[i, 1]:
                out[i] = cases[i].truth
            else:
                wrong.append(j)
        if wrong:
            texts = generate(model, shapes, [asked[j] for j in wrong], vis[wrong], reading, limit)
            for j, text in zip(wrong, texts):
                out[rows[j]] = text
    return out, counts


@torch.no_grad()
def generate(
    model: Model, shapes: list, questions: list[str], vis: torch.Tensor, reading: Reading, limit: int
) -> list[str]:
    """Greedy decoding of rows with equally long questions, the whole prompt anew for every token."""
    ids, pos, cols, _ = chat.collate(shapes, questions, [[] for _ in questions], reading.time_counts)
    pos = _positions(pos, reading)
    n, end = len(questions), chat.ID["<|im_end|>"]
    done, new = torch.zeros(n, dtype=torch.bool), []
    for _ in range(limit):
        want = (torch.arange(n), torch.full((n,), ids.shape[1] - 1))
        t = model.decode(ids, pos, chat.P, vis, cols, want).argmax(-1)
        done |= t == end
        new.append(torch.where(done, end, t))
        if done.all():
            break
        ids, pos = torch.cat((ids, new[-1][:, None]), 1), torch.cat((pos, pos[:, -1:] + 1), 1)
    rows = torch.stack(new, 1).tolist()
    rows = [r[: r.index(end)] if end in r else r for r in rows]
    return [chat.TOKENIZER.decode(r, skip_special_tokens=False) for r in rows]
