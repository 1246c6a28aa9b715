"""Words, numbers and made-up strings, split so that what is tested was never trained or calibrated on.

The word list is a sample of SCOWL (licence: words.LICENSE.txt). A word belongs to the test split when the crc32 of its
lower case is divisible by 8: the same rule as for the weights that training started from.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TypeVar

import numpy as np

T = TypeVar("T")
UPPER, LOWER, DIGITS = "ABCDEFGHJKLMNPQRSTUVWXYZ", "abcdefghijkmnpqrstuvwxyz", "0123456789"
# Alone, these look alike in other case or as a figure; a mixed string without them can be read by anybody.
MIXED = "ABDEFGHJLMNQRTYabdefghijmnqrty23456789"
SAME_IN_BOTH_CASES = set("cosuvwxzCOSUVWXZ0 ")
ITEMS = [
    "tea",
    "coffee",
    "milk",
    "bread",
    "cake",
    "soup",
    "rice",
    "beans",
    "eggs",
    "ham",
    "salad",
    "juice",
    "water",
    "apple",
    "pasta",
    "pizza",
    "fish",
    "beer",
    "wine",
    "cocoa",
    "toast",
    "jam",
    "honey",
    "butter",
    "cheese",
    "lemon",
    "mint",
    "corn",
    "nuts",
    "plum",
    "onion",
    "garlic",
    "pepper",
    "sugar",
    "flour",
    "carrot",
    "grape",
    "melon",
    "yogurt",
    "cookie",
    "muffin",
    "waffle",
    "bagel",
    "steak",
    "shrimp",
    "turkey",
    "celery",
    "radish",
]
TEST_ITEMS = [
    "peach",
    "olive",
    "bacon",
    "cherry",
    "donut",
    "tomato",
    "mango",
    "salmon",
    "potato",
    "cider",
    "walnut",
    "spinach",
    "pretzel",
    "banana",
    "sauce",
    "leek",
]


def is_test_word(word: str) -> bool:
    """Whether a word is reserved for the test split."""
    return zlib.crc32(word.lower().encode()) % 8 == 0


@cache
def pool(split: str) -> tuple[str, ...]:
    """The shipped words of a split ("calibration" or "test"), lower case, sorted."""
    path = Path(__file__).parent / "words.txt"
    words = path.read_text(encoding="ascii").split()
    return tuple(w for w in words if is_test_word(w) == (split == "test"))


def pick(rng: np.random.Generator, items: Sequence[T]) -> T:
    """One of `items`, evenly."""
    return items[int(rng.integers(len(items)))]


def _letters(rng: np.random.Generator, alphabet: str, n: int) -> str:
    return "".join(alphabet[int(i)] for i in rng.integers(0, len(alphabet), n))


def _number(rng: np.random.Generator, n: int) -> str:
    s, u = _letters(rng, DIGITS, n), rng.random()
    if u < 0.3 and n >= 4:
        return s[:-3] + "." + s[-2:]
    if u < 0.5 and n >= 2:
        return pick(rng, "$#+-") + s[1:]
    return s[:-1] + "%" if u < 0.6 and n >= 2 else s


def token(rng: np.random.Generator, words: tuple[str, ...], low: int, high: int) -> str:
    """A word (half of the time), a number or a made-up string of low..high characters that can be told apart."""
    while True:
        kind, n = rng.random(), int(rng.integers(low, high + 1))
        if kind < 0.5 and high >= 3:
            s = pick(rng, words)
            u = rng.random()
            s = s.upper() if u < 0.3 else s.title() if u < 0.6 else s
        elif kind < 0.7:
            s = _number(rng, n)
        elif kind < 0.88:
            s = _letters(rng, UPPER if rng.random() < 0.35 else LOWER, n)
        else:
            s = _letters(rng, MIXED, n)
        if low <= len(s) <= high and not set(s) <= SAME_IN_BOTH_CASES:
            return s
