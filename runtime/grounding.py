"""Boxes in an answer's text to pixels of the original picture, and drawing them.

Qwen2-VL writes `<|object_ref_start|>name<|object_ref_end|><|box_start|>(x1,y1),(x2,y2)<|box_end|>` with coordinates
0..1000 relative to the picture (Qwen2-VL paper, arXiv:2409.12191, section 2.2). The format names no picture: boxes
refer to the last one of the prompt. Pillow is needed for drawing only.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image, ImageDraw, ImageFont

__all__ = ["Box", "draw_boxes", "parse_boxes", "strip_grounding"]

SCALE = 1000
_BOX = re.compile(r"<\|box_start\|>\((\d{1,4}),(\d{1,4})\),\((\d{1,4}),(\d{1,4})\)<\|box_end\|>")
_ITEM = re.compile(r"<\|object_ref_start\|>(?P<label>(?:(?!<\|).)*)<\|object_ref_end\|>|" + _BOX.pattern, re.DOTALL)
_TOKEN = re.compile(r"<\|(?:object_ref|box|quad)_(?:start|end)\|>")
# Distinct on light and dark pictures; after Okabe and Ito's palette for all kinds of colour vision.
_COLOURS = ("#d55e00", "#0072b2", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")


@dataclass(frozen=True)
class Box:
    """A box in pixels of the original picture (upright, before any resize); `image` is its index in the prompt."""

    label: str
    x1: float
    y1: float
    x2: float
    y2: float
    image: int = 0


def parse_boxes(text: str, image_sizes: Sequence[tuple[int, int]]) -> tuple[Box, ...]:
    """Every well-formed box of `text`, in order; a name stands for all boxes until the next name.

    Args:
        image_sizes: (width, height) in pixels of the prompt's pictures. Without one there are no boxes.

    A box with other than four numbers, a coordinate above 1000 or its corners swapped is not a box: it stays text.
    """
    if not image_sizes:
        return ()
    image = len(image_sizes) - 1
    width, height = image_sizes[image]
    boxes = []
    for label, (x1, y1, x2, y2) in _items(text):
        boxes.append(
            Box(label, x1 * width / SCALE, y1 * height / SCALE, x2 * width / SCALE, y2 * height / SCALE, image)
        )
    return tuple(boxes)


def _items(text: str) -> Iterator[tuple[str, tuple[int, int, int, int]]]:
    label = ""
    for match in _ITEM.finditer(text):
        if match["label"] is not None:
            label = match["label"].strip()
        elif (corners := _corners(match.groups()[1:])) is not None:
            yield label, corners


def _corners(numbers: Sequence[str]) -> tuple[int, int, int, int] | None:
    x1, y1, x2, y2 = map(int, numbers)
    return (x1, y1, x2, y2) if max(x1, y1, x2, y2) <= SCALE and x1 < x2 and y1 < y2 else None


def strip_grounding(text: str) -> str:
    """The text for people: `name (x1,y1),(x2,y2)` without the tokens; what is malformed is left but for its tokens."""
    spaced = re.sub(r"(<\|object_ref_end\|>)(<\|box_start\|>)", r"\1 \2", text)
    return _TOKEN.sub("", spaced)


def draw_boxes(image: Image.Image, boxes: Sequence[Box], width: int | None = None) -> Image.Image:
    """A copy of `image` (RGB) with boxes and their labels, one colour per label.

    Args:
        width: of the lines in pixels; by default it grows with the picture. Lines have a dark and a light edge and
            labels a filled background, so that both can be seen on any picture.
    """
    from PIL import ImageDraw, ImageFont

    canvas = image.convert("RGB")
    if canvas is image:
        canvas = image.copy()
    draw = ImageDraw.Draw(canvas)
    line = max(1, round(max(canvas.size) / 300)) if width is None else width
    font = ImageFont.load_default(max(10, round(max(canvas.size) / 35)))
    labels = list(dict.fromkeys(b.label for b in boxes))
    for box in boxes:
        colour = _COLOURS[labels.index(box.label) % len(_COLOURS)]
        corners = _inside(box, canvas.size)
        # A white halo, then the colour: one of the two differs from whatever lies below.
        draw.rectangle(_grown(corners, line, canvas.size), outline="white", width=line * 3)
        draw.rectangle(corners, outline=colour, width=line)
    for box in boxes:
        if box.label:
            colour = _COLOURS[labels.index(box.label) % len(_COLOURS)]
            _label(draw, box.label, _inside(box, canvas.size), canvas.size, colour, font, line)
    return canvas


def _inside(box: Box, size: tuple[int, int]) -> tuple[int, int, int, int]:
    x1, x2 = (min(max(round(x), 0), size[0] - 1) for x in (box.x1, box.x2))
    y1, y2 = (min(max(round(y), 0), size[1] - 1) for y in (box.y1, box.y2))
    return x1, y1, max(x1, x2), max(y1, y2)


def _grown(c: tuple[int, int, int, int], by: int, size: tuple[int, int]) -> tuple[int, int, int, int]:
    return max(c[0] - by, 0), max(c[1] - by, 0), min(c[2] + by, size[0] - 1), min(c[3] + by, size[1] - 1)


def _label(
    draw: ImageDraw.ImageDraw,
    text: str,
    corners: tuple[int, int, int, int],
    size: tuple[int, int],
    colour: str,
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
    line: int,
) -> None:
    """Above the box where there is room, else inside it; never beyond the picture where it can fit."""
    left, top, right, bottom = draw.textbbox((0, 0), text, font=font)
    pad = max(2, line)
    width, height = round(right - left) + 2 * pad, round(bottom - top) + 2 * pad
    x = max(0, min(corners[0], size[0] - width))
    y = corners[1] - height - line
    if y < 0:
        y = min(corners[1] + line, max(0, size[1] - height))
    draw.rectangle((x, y, x + width - 1, y + height - 1), fill=colour)
    draw.text((x + pad - left, y + pad - top), text, fill="white", font=font)
