"""The faces that pictures are drawn with, by split; knows nothing of tasks.

Every split has faces of its own: `test` faces are drawn by nothing else, so reading them is reading unseen type.
The shipped files are ASCII subsets under new family names (licences beside them); training adds whatever families
the machine has, except the test split's.
"""

from __future__ import annotations

from functools import cache, lru_cache
from pathlib import Path

from PIL import ImageFont

FOLDER = Path(__file__).parent / "fonts"
SPLITS = ("calibration", "test")
# Families of the test split (and close relatives): never to be trained on, wherever they are installed.
HELD_OUT_FAMILIES = ("go-", "cantarell", "oxygen", "notos", "cabin")


@cache
def faces(split: str) -> tuple[str, ...]:
    """Paths of the faces of a split, sorted, so that an index means the same everywhere."""
    return tuple(sorted(str(p) for p in FOLDER.iterdir() if p.name.startswith(split + "-")))


@lru_cache(maxsize=4096)
def font(face: str, size: float) -> ImageFont.FreeTypeFont:
    """A face at `size` pixels per em; the basic layout engine, which every Pillow has."""
    return ImageFont.truetype(face, size, layout_engine=ImageFont.Layout.BASIC)


@cache
def cap_ratio(face: str) -> float:
    """Height of a capital H over the em."""
    _, top, _, bottom = font(face, 200.0).getbbox("H", anchor="ls")
    return (bottom - top) / 200.0


def width(face: str, text: str) -> float:
    """Width of a line at one pixel per em (unhinted, near enough for planning)."""
    return font(face, 100.0).getlength(text) / 100.0
