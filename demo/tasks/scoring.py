"""Answers against truths: exact text, character errors, boxes, and intervals of shares. Pure functions."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

Box = tuple[int, int, int, int]
_BOX = re.compile(r"\(\s*(\d{1,4})\s*,\s*(\d{1,4})\s*\)\s*,\s*\(\s*(\d{1,4})\s*,\s*(\d{1,4})\s*\)")


@dataclass(frozen=True)
class Score:
    """correct: the answer counts as right; value: 0..1, moves smoothly (1 - character error, or the boxes' IoU)."""

    correct: bool
    value: float


def edit_distance(a: str, b: str) -> int:
    """Insertions, deletions and replacements from a to b (Levenshtein)."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
    return row[-1]


def character_error(answer: str, truth: str) -> float:
    """Edits per character of the truth; may exceed 1. An empty truth: 0 for an empty answer, else 1."""
    if not truth:
        return float(bool(answer))
    return edit_distance(answer, truth) / len(truth)


def parse_box(answer: str) -> Box | None:
    """(x1, y1, x2, y2) in thousandths of the picture, or None unless the answer holds exactly one box with its
    corners in order and within 0..1000. The grounding tokens around it may have been stripped by the detokenizer."""
    found = _BOX.findall(answer)
    if len(found) != 1:
        return None
    x1, y1, x2, y2 = map(int, found[0])
    if not (x1 < x2 <= 1000 and y1 < y2 <= 1000):
        return None
    return x1, y1, x2, y2


def iou(a: Sequence[float], b: Sequence[float]) -> float:
    """Intersection over union of two boxes (x1, y1, x2, y2)."""
    w, h = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    both = max(0.0, w) * max(0.0, h)
    either = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - both
    return both / either if either > 0 else 0.0


def score_text(answer: str, truth: str) -> Score:
    """Right when equal but for white space at the ends."""
    answer = answer.strip()
    return Score(answer == truth, max(0.0, 1.0 - character_error(answer, truth)))


def score_box(answer: str, truth: Sequence[float]) -> Score:
    """Right when IoU > 0.5; an answer without a usable box scores 0. truth in thousandths of the picture."""
    box = parse_box(answer)
    value = 0.0 if box is None else iou(box, truth)
    return Score(value > 0.5, value)


def wilson(right: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """95 % interval of a share (E. B. Wilson, "Probable inference, the law of succession, and statistical inference",
    1927). n = 0 gives (0, 1)."""
    if n == 0:
        return 0.0, 1.0
    p, z2 = right / n, z * z
    middle = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = z / (1 + z2 / n) * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    return max(0.0, middle - half), min(1.0, middle + half)
