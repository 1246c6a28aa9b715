"""Questions, answers and picture sizes -> token ids, positions and targets, in Qwen2-VL's chat format."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from demo.training.tokenizer import SPECIAL, build

TOKENIZER = build()


def token_id(token: str) -> int:
    """Of a token that must exist.

    Raises:
        KeyError: it does not.
    """
    found = TOKENIZER.token_to_id(token)
    if found is None:
        raise KeyError(token)
    return found


ID = {s: token_id(s) for s in SPECIAL}
PREFIX = TOKENIZER.encode(
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|>"
).ids
P = len(PREFIX)


@lru_cache(maxsize=4096)
def question_ids(question: str) -> tuple[int, ...]:
    """The question and the head of the answer's turn."""
    return tuple(TOKENIZER.encode(question + "<|im_end|>\n<|im_start|>assistant\n").ids)


def answer_ids(answer: str) -> list[int]:
    """The answer and its end."""
    return [*TOKENIZER.encode(answer).ids, ID["<|im_end|>"]]


def collate(
    shapes: list[tuple[int, ...]], questions: list[str], answers: list[list[int]], time_counts: bool = True
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """shapes of the picture batches ([B, H, W, 3] or [B, F, H, W, 3]) -> ids [B, L], pos [3, L], columns of the
    pictures' tokens [n], targets [B, L]: the token that should follow, -1 where none is asked.

    time_counts: the text goes on after the largest of all three positions of the pictures (the rule Qwen2-VL was
    released with); False: after the larger of rows and columns (transformers 5). They differ for clips of more
    temporal patches than rows and columns; training uses both, so that the weights serve either runtime."""
    head, cols, at = list(PREFIX), [], P
    pos = [np.tile(np.arange(P), (3, 1))]
    for i, s in enumerate(shapes):
        clip = len(s) == 5
        t, h, w = (s[1] // 2 if clip else 1), s[-3] // 28, s[-2] // 28
        if i:
            head.append(ID["<|vision_start|>"])
            pos.append(np.full((3, 1), at))
            at += 1
        cols += range(len(head), len(head) + t * h * w)
        head += [ID["<|video_pad|>" if clip else "<|image_pad|>"]] * (t * h * w)
        pos.append(np.stack(np.meshgrid(np.arange(t), np.arange(h), np.arange(w), indexing="ij")).reshape(3, -1) + at)
        at += max(t if time_counts else 1, h, w)
        head.append(ID["<|vision_end|>"])
        pos.append(np.full((3, 1), at))
        at += 1
    rows = [(question_ids(q), a) for q, a in zip(questions, answers)]
    n, longest = len(head), max(len(u) + len(v) for u, v in rows)
    ids = np.full((len(rows), n + longest), ID["<|endoftext|>"])
    targets = np.full((len(rows), n + longest), -1)
    ids[:, :n] = head
    for i, (u, v) in enumerate(rows):
        ids[i, n : n + len(u) + len(v)] = [*u, *v]
        targets[i, n + len(u) - 1 : n + len(u) + len(v) - 1] = v
    pos.append(np.tile(np.arange(longest) + at, (3, 1)))
    f = torch.from_numpy
    return f(ids), f(np.concatenate(pos, 1)), torch.tensor(cols), f(targets)
