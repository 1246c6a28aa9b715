"""Small receipts: items with prices, a total, sometimes a shop's name."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from edgevl.tasks.cards import Page, TextLine
from edgevl.tasks.fonts import width
from edgevl.tasks.words import pick, token


def money(pence: int) -> str:
    """12.34"""
    return f"{pence // 100}.{pence % 100:02d}"


def receipt(
    rng: np.random.Generator,
    size: tuple[int, int],
    face: str,
    n: int,
    items: Sequence[str],
    words: tuple[str, ...],
) -> tuple[Page, list[str], str]:
    """A receipt of n items on a card of `size` (width, height) -> the page, its item names as printed, its total."""
    w, h = size
    case = (str.lower, str.title, str.upper)[int(rng.integers(3))]
    names = [case(pick(rng, items)) for _ in range(n)]
    prices = [int(rng.integers(5, 1900)) for _ in range(n)]
    total = money(sum(prices))
    rows = list(zip([*names, case("total")], [*map(money, prices), total]))
    shop = token(rng, words, 3, 8).upper() if rng.random() < 0.5 else ""
    lines = len(rows) + bool(shop)
    widest = max(width(face, a + "  " + b) for a, b in rows)
    em = min((w - 6) / widest, (h - 4) / (lines * 1.08))
    em = max(min(em, 12.5), em * rng.uniform(0.72, 1.0))
    pitch = min((h - 4) / lines, em * rng.uniform(1.1, 1.5))
    y = rng.uniform(0, max(0.5, h - 3 - pitch * lines)) + em * 0.92
    out = []
    if shop:
        out.append(TextLine(shop, max(2.0, (w - width(face, shop) * em) / 2), y))
        y += pitch
    for a, b in rows:
        out += [TextLine(a, 3, y), TextLine(b, w - 3 - width(face, b) * em, y)]
        y += pitch
    return Page(size, face, em, out), names, total
