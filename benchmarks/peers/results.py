"""The folder of a run's results: what it was measured on, and a line for every process that has ended."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from edgevl.benchmarks.peers.contract import Measured
from edgevl.benchmarks.peers.table import Row
from edgevl.runtime.errors import InputError

__all__ = ["append_row", "merged_head", "output_folder", "read_rows"]

_GROWING = ("workloads", "bundles")  # later runs may add to these, and change none


def output_folder(path: Path, option: str) -> Callable[[], None]:
    """Looks whether the folder can be had, and returns what makes it.

    Raises:
        InputError: something on the way is no folder, or nothing may be written there; the returned function: it
            cannot be made after all.
    """
    try:
        there = next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())
    except OSError as e:
        raise InputError(f"{option} {path}: cannot be a folder ({e.strerror}); choose another") from None
    if not there.is_dir():
        raise InputError(f"{option} {path}: {there} is a file, expected a folder; choose another")
    if not os.access(there, os.W_OK | os.X_OK):
        raise InputError(f"{option} {path}: nothing may be written in {there}; change its mode, or choose another")

    def make() -> None:
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise InputError(f"{option} {path}: cannot be made ({e.strerror}); choose another") from None

    return make


def read_rows(path: Path) -> list[Row]:
    """The rows of an earlier run; none where there is no file.

    Raises:
        InputError: the file cannot be read, or a line of it is no result.
    """
    rows = []
    for number, line in enumerate(_text(path).splitlines(), 1):
        try:
            d = json.loads(line)
            rows.append(Row(d["workload"], d["round"], Measured(**d["measured"])))
        except (ValueError, KeyError, TypeError):
            raise InputError(f"{path}: line {number} is no result (cut off?); remove it to go on") from None
    return rows


def append_row(path: Path, row: Row) -> None:
    """
    Raises:
        InputError: the file cannot be written.
    """
    try:
        with path.open("a", encoding="utf-8") as out:
            out.write(json.dumps(asdict(row)) + "\n")
    except OSError as e:
        raise InputError(f"{path}: cannot be written ({e.strerror}); mend that and run again to go on") from None


def merged_head(path: Path, now: dict[str, Any], measured: bool) -> dict[str, Any]:
    """What the results in this folder were measured on; workloads and bundles may be added.

    Args:
        measured: whether there are results.

    Raises:
        InputError: they are of another machine, day, checkpoint, bundle or setting, which are not mixed, or it is not
            known of which.
    """
    advice = "choose another --results"
    if not path.exists():
        if measured:
            raise InputError(f"{path.parent} holds results, and no {path.name} that says of what; {advice}")
        return now
    try:
        before = json.loads(_text(path))
        if not isinstance(before["workloads"], dict) or not isinstance(before.get("bundles", {}), dict):
            raise TypeError("expected names and descriptions")
    except (ValueError, TypeError, KeyError, AttributeError):
        raise InputError(f"{path}: not what a run was measured on (cut off?); {advice}") from None
    other = [f"{k} was {before.get(k)!r}, is {v!r}" for k, v in now.items() if k not in _GROWING and before.get(k) != v]
    merged = dict(now)
    for group in _GROWING:
        old = before.get(group, {})
        merged[group] = {**old, **now[group]}
        other += [f"{group[:-1]} {k} was {v!r}, is {now[group][k]!r}" for k, v in old.items() if merged[group][k] != v]
    if other:
        raise InputError(f"{path.parent} holds results of another run: {'; '.join(other)}; {advice}")
    return merged


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8") if path.exists() else ""
    except (OSError, UnicodeDecodeError) as e:
        raise InputError(f"{path}: cannot be read ({e}); choose another --results") from None
