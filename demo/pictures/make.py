"""Draws the pictures of this folder and cases.json: held-out cases of the yardstick, at fixed indices.

    python demo/pictures/make.py [FOLDER]

The same Pillow gives the same bytes.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from edgevl.tasks import TASKS

SEED = 2026
# file stem, task, index. The indices were taken in order; 5:1 and the large card are the first of their kind.
CHOSEN = (
    ("line", "read_1_line", 0),
    ("two-lines", "read_2_lines", 0),
    ("three-lines", "read_3_lines", 0),
    ("strip-5-to-1", "read_any_size", "5:1"),
    ("card-twice-as-large", "read_any_size", "x2"),
    ("card-half-as-large", "read_any_size", "x0.5"),
    ("colour", "colour", 0),
    ("count", "count", 0),
    ("where", "where", 0),
    ("receipt", "receipt_total", 0),
    ("receipt-items", "receipt_items", 0),
    ("two", "two_pictures", 0),
    ("motion", "motion", 0),
)


def index_of(task: str, which: int | str) -> int:
    """The first index whose note starts with `which`, if it is a text."""
    if isinstance(which, int):
        return which
    return next(i for i in range(1000) if TASKS[task].case("test", i, SEED).note.startswith(which))


def main(folder: Path) -> None:
    """Writes every picture (a folder of frames for a video) and cases.json."""
    rows: list[dict[str, Any]] = []
    for stem, task, which in CHOSEN:
        case = TASKS[task].case("test", index_of(task, which), SEED)
        if case.video:
            (folder / stem).mkdir(parents=True, exist_ok=True)
            names = [f"{stem}/{i:02d}.png" for i in range(len(case.pictures))]
        else:
            several = len(case.pictures) > 1
            names = [f"{stem}-{i + 1}.png" if several else f"{stem}.png" for i in range(len(case.pictures))]
        for name, picture in zip(names, case.pictures):
            picture.save(folder / name, optimize=True)
        row: dict[str, Any] = dict(task=task, pictures=[stem] if case.video else names, video=case.video)
        row |= dict(question=case.question, truth=case.truth, index=case.index, seed=SEED, note=case.note)
        if case.box:
            row["box"] = [round(v, 1) for v in case.box]
        rows.append(row)
    (folder / "cases.json").write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
