"""What bundles are called in a report: the end of their paths that tells them apart, mostly the folder's name."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from edgevl.runtime.errors import InputError

__all__ = ["bundle_labels", "find_bundle"]


def bundle_labels(bundles: Sequence[str]) -> list[str]:
    """As few last parts of each path as no other path ends with: `A/m` and `B/m` for two folders `m`.

    Raises:
        InputError: the same bundle twice.
    """
    paths = [_parts(b) for b in bundles]
    for i, path in enumerate(paths):
        if path in paths[:i]:
            raise InputError(f"{bundles[i]}: the same bundle twice; give each once (--rounds measures it more often)")
    return [_label(path, [p for p in paths if p != path]) for path in paths]


def find_bundle(name: str, bundles: Sequence[str]) -> int:
    """Which of the bundles `name` is: a path, or the end of one.

    Raises:
        InputError: none, or several.
    """
    exact = [i for i, b in enumerate(bundles) if _parts(b) == _parts(name)]
    wanted = Path(name).parts
    found = exact or [i for i, b in enumerate(bundles) if wanted and _parts(b)[-len(wanted) :] == wanted]
    if len(found) != 1:
        problem = f"{len(found)} of the bundles are called {name!r}" if found else f"no bundle is called {name!r}"
        raise InputError(f"{problem}; expected one of {', '.join(bundle_labels(bundles))}")
    return found[0]


def _parts(path: str) -> tuple[str, ...]:
    return Path(path).resolve().parts


def _label(path: tuple[str, ...], others: Sequence[tuple[str, ...]]) -> str:
    count = 1
    while any(other[-count:] == path[-count:] for other in others):
        count += 1
    return str(Path(*path[-count:]))
