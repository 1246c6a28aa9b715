"""What measuring processes have in common: whose turn it is, and the environment that they run in."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TypeVar

__all__ = ["environment", "in_turn"]

T = TypeVar("T")


def in_turn(contenders: Sequence[T], number: int) -> list[T]:
    """The order of round `number`: it begins with another one than the round before, so that what else the machine does
    hits all alike."""
    first = number % len(contenders) if contenders else 0
    return [*contenders[first:], *contenders[:first]]


def environment(threads: int) -> dict[str, str]:
    """Of a process that may use so many threads. The C library asks for huge pages for what it allocates, which every
    contender decodes 4 to 15 % faster with, unless GLIBC_TUNABLES says otherwise."""
    settings = {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
    return {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1", **os.environ, **settings}
