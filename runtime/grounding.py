"""Boxes and points of an answer's text to pixels of the original picture; knows no model and no tokenizer.

Three ways of writing them are read, wherever they stand in a text:

    <|object_ref_start|>name<|object_ref_end|><|box_start|>(x1,y1),(x2,y2)<|box_end|>     a box
    <|box_start|>(x,y)<|box_end|>, <|point_start|>(x,y)<|point_end|>                      a point
    {"bbox_2d": [x1, y1, x2, y2], "label": "name"}, {"point_2d": [x, y], "label": "name"} JSON, fenced or not

Coordinates are thousandths of the picture's width and height in all of them: Qwen2-VL's convention (arXiv:2409.12191,
section 2.2.1), which needs no knowledge of the resize. Qwen2.5-VL writes JSON in pixels of the resized picture; that
is another model and is not guessed at. A box or point outside 0..1000 by more than 1 is malformed: to clamp it would
invent an edge which nobody saw. What is malformed stays text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from edgevl.runtime.errors import InputError

__all__ = ["Box", "Point", "parse_boxes", "parse_grounding", "strip_grounding"]

SCALE = 1000
SLACK = 1  # a coordinate this far outside 0..SCALE is a rounding of the model's, and is moved to the edge
# A name (group 1) or what stands between box or point tokens (groups 2, 3); none may hold another token.
_ITEM = re.compile(
    r"<\|object_ref_start\|>((?:(?!<\|).)*)<\|object_ref_end\|>|<\|box_start\|>((?:(?!<\|).)*)<\|box_end\|>"
    r"|<\|point_start\|>((?:(?!<\|).)*)<\|point_end\|>",
    re.DOTALL,
)
_NUMBER = r"\s*(-?[0-9]{1,4}(?:\.[0-9]{1,6})?)\s*"
_POINT = re.compile(rf"\s*\({_NUMBER},{_NUMBER}\)\s*")
_CORNERS = re.compile(rf"\s*\({_NUMBER},{_NUMBER}\)\s*,\s*\({_NUMBER},{_NUMBER}\)\s*")
_BETWEEN = re.compile(r"[\s,;、，；]*(?:and\s+|&\s*|和)?")  # may stand between a name and the boxes it covers
_TOKENS = re.compile(r"(?:<\|(?:object_ref|box|quad|point)_(?:start|end)\|>)+")
# The innermost objects of a text, strings skipped whole; bounded, so that no text takes quadratic time.
_OBJECT = re.compile(r"\{(?:[^{}\"]|\"(?:[^\"\\]|\\.){0,500}\"){0,500}\}")
_JSON_KEYS = {"bbox_2d": 4, "point_2d": 2}
# "Picture 2" (as the chat template numbers pictures): what follows is about that one.
_PICTURE = re.compile(r"\b(?:picture|image|photo)\s*#?\s*([0-9]{1,4})\b|图片?\s*([0-9]{1,4})", re.IGNORECASE)

_OPENING, _CLOSING = "([{（「", ".,;:!?)]}。，；：、！？）」"  # no space after, or before, one of these

# EXIF orientation (EXIF 2.3, 4.6.4) -> where the upright point (x, y) of a w × h picture lies in the stored pixels.
_STORED = {
    1: lambda x, y, w, h: (x, y),
    2: lambda x, y, w, h: (w - x, y),
    3: lambda x, y, w, h: (w - x, h - y),
    4: lambda x, y, w, h: (x, h - y),
    5: lambda x, y, w, h: (y, x),
    6: lambda x, y, w, h: (y, w - x),
    7: lambda x, y, w, h: (h - y, w - x),
    8: lambda x, y, w, h: (h - y, x),
}


@dataclass(frozen=True)
class Box:
    """A box in pixels of the original picture (upright, before any resize); `image` is its index in the prompt."""

    label: str
    x1: float
    y1: float
    x2: float
    y2: float
    image: int = 0

    def moved(self, dx: float, dy: float) -> Box:
        """The same in a larger picture, of which this one was the crop whose left upper corner is (dx, dy)."""
        return replace(self, x1=self.x1 + dx, y1=self.y1 + dy, x2=self.x2 + dx, y2=self.y2 + dy)

    def stored(self, size: tuple[int, int], orientation: int) -> Box:
        """The same in the pixels as a file stores them, for readers that ignore its EXIF orientation.

        Args:
            size: (width, height) of the upright picture. orientation: the EXIF tag, 1 to 8.

        Raises:
            InputError: another orientation.
        """
        ax, ay = _stored(self.x1, self.y1, size, orientation)
        bx, by = _stored(self.x2, self.y2, size, orientation)
        return replace(self, x1=min(ax, bx), y1=min(ay, by), x2=max(ax, bx), y2=max(ay, by))


@dataclass(frozen=True)
class Point:
    """A point in pixels of the original picture, like a Box."""

    label: str
    x: float
    y: float
    image: int = 0

    def moved(self, dx: float, dy: float) -> Point:
        """See Box.moved."""
        return replace(self, x=self.x + dx, y=self.y + dy)

    def stored(self, size: tuple[int, int], orientation: int) -> Point:
        """See Box.stored."""
        x, y = _stored(self.x, self.y, size, orientation)
        return replace(self, x=x, y=y)


def _stored(x: float, y: float, size: tuple[int, int], orientation: int) -> tuple[float, float]:
    if orientation not in _STORED:
        raise InputError(f"EXIF orientation {orientation!r}, expected 1 to 8")
    return _STORED[orientation](x, y, *size)


def parse_boxes(text: str, image_sizes: Sequence[tuple[int, int]]) -> tuple[Box, ...]:
    """The boxes among `parse_grounding`."""
    return tuple(found for found in parse_grounding(text, image_sizes) if isinstance(found, Box))


def parse_grounding(text: str, image_sizes: Sequence[tuple[int, int]]) -> tuple[Box | Point, ...]:
    """Every well-formed box and point of `text`, in order: pixel = coordinate / 1000 × size.

    A name covers what follows it with nothing but commas, spaces or "and" between; anything else has the label "". A
    box with a token missing, of other than four numbers, with a coordinate outside 0..1000 (by more than 1, a
    rounding, which is moved to the edge) or swapped corners is not a box: it stays text. Never raises on any text.

    The formats name no picture: boxes are the last picture's, unless the text says "Picture 2" (numbered from 1 over
    pictures and videos) before them.

    Args:
        image_sizes: (width, height) in pixels of the prompt's original pictures, upright. Without a picture there are
            no boxes.
    """
    if not image_sizes:
        return ()
    mentions = [(m.start(), int(m[1] or m[2]) - 1) for m in _PICTURE.finditer(text)]
    mentions = [(at, image) for at, image in mentions if 0 <= image < len(image_sizes)]
    found = []
    for at, label, numbers in sorted([*_token_items(text), *_json_items(text)], key=lambda item: item[0]):
        image = next((i for place, i in reversed(mentions) if place < at), len(image_sizes) - 1)
        width, height = image_sizes[image]
        x1, y1, x2, y2 = (n * (height if i % 2 else width) / SCALE for i, n in enumerate((*numbers, 0.0, 0.0)[:4]))
        found.append(Box(label, x1, y1, x2, y2, image) if len(numbers) == 4 else Point(label, x1, y1, image))
    return tuple(found)


_Item = tuple[int, str, tuple[float, ...]]  # place in the text, label, two or four thousandths


def _token_items(text: str) -> Iterator[_Item]:
    label, end = "", 0  # end: how far the name, and the boxes it covers, reach
    for match in _ITEM.finditer(text):
        name, box, point = match.groups()
        if name is not None:
            label = name.strip()
        elif not _BETWEEN.fullmatch(text, end, match.start()):
            label = ""
        end = match.end()
        if name is not None:
            continue
        shape = (_CORNERS.fullmatch(box) or _POINT.fullmatch(box)) if box is not None else _POINT.fullmatch(point)
        numbers = _inside([float(n) for n in shape.groups()]) if shape is not None else None
        if numbers is not None:
            yield match.start(), label, numbers


def _json_items(text: str) -> Iterator[_Item]:
    for match in _OBJECT.finditer(text):
        if not any(key in match[0] for key in _JSON_KEYS):
            continue
        try:
            value: dict[str, Any] = json.loads(match[0])
        except ValueError:
            continue
        keys = [key for key in _JSON_KEYS if key in value]
        numbers = value[keys[0]] if len(keys) == 1 else None
        if not isinstance(numbers, list) or len(numbers) != _JSON_KEYS[keys[0]]:
            continue
        coordinates = _inside(numbers) if all(type(n) in (int, float) for n in numbers) else None
        label = value.get("label")
        if coordinates is not None:
            yield match.start(), label.strip() if isinstance(label, str) else "", coordinates


def _inside(numbers: list[float]) -> tuple[float, ...] | None:
    """Two or four coordinates moved into 0..1000; None where one is far outside, or corners are swapped."""
    if not all(-SLACK <= n <= SCALE + SLACK for n in numbers):  # so written, NaN fails too
        return None
    moved = tuple(min(max(n, 0.0), float(SCALE)) for n in numbers)
    return moved if len(moved) == 2 or (moved[0] <= moved[2] and moved[1] <= moved[3]) else None


def strip_grounding(text: str) -> str:
    """The text for people: `name (x1,y1),(x2,y2)`, coordinates as written (0..1000), without the grounding tokens.

    A box is set off by spaces from the words around it. What is malformed loses its tokens and nothing else.
    """

    def gap(tokens: re.Match[str]) -> str:
        before, after = text[max(tokens.start() - 1, 0) : tokens.start()], text[tokens.end() : tokens.end() + 1]
        apart = not before.strip() or not after.strip() or before in _OPENING or after in _CLOSING
        return "" if apart or not ("box_" in tokens[0] or "point_" in tokens[0]) else " "

    return _TOKENS.sub(gap, text)
