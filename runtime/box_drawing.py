"""Boxes, points and their names drawn on a picture, to be seen on any background. Needs Pillow."""

from __future__ import annotations

import colorsys
import math
import unicodedata
from collections.abc import Sequence
from typing import TYPE_CHECKING

from edgevl.runtime.errors import InputError
from edgevl.runtime.grounding import Box, Point

if TYPE_CHECKING:
    from PIL import Image, ImageDraw, ImageFont

__all__ = ["draw_boxes"]

Pixels = tuple[int, int, int, int]  # left, top, right, bottom; right and bottom are the last ones inside
Colour = tuple[int, int, int]

# After Okabe and Ito's palette, which all kinds of colour vision can tell apart.
_PALETTE: tuple[Colour, ...] = (
    (213, 94, 0),
    (0, 114, 178),
    (0, 158, 115),
    (204, 121, 167),
    (240, 228, 66),
    (86, 180, 233),
)
_GOLDEN = (math.sqrt(5) - 1) / 2  # multiples of it, modulo 1, never come close: hues after the palette's
_LABEL_LETTERS = 200  # nobody reads more on a picture


def draw_boxes(image: Image.Image, boxes: Sequence[Box | Point], *, width: int | None = None) -> Image.Image:
    """A copy of `image` (RGB, upright, transparency on white) with boxes, points (as discs) and their labels, a colour
    per label.

    All `boxes` are drawn, whatever picture they name. Lines have a black or white edge on both sides, labels a
    filled background, so that they can be seen on any picture. Labels stay inside the picture: too long ones are
    shortened, and one that has no room at all is left out. Pillow's own font draws them, which has ASCII only:
    accents are dropped, and letters of other scripts show as an empty rectangle.

    Args:
        width: of the lines in pixels; by default lines and letters grow with the picture.

    Raises:
        InputError: a width below 1.
    """
    from PIL import ImageDraw, ImageFont

    if width is not None and width < 1:
        raise InputError(f"lines of width {width}; expected at least 1 pixel, or None to follow the picture's size")
    canvas = _upright_rgb(image)
    side = math.sqrt(canvas.width * canvas.height)
    line = max(1, round(side / 180)) if width is None else width
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(max(10, round(side / 36)))
    labels = {label: i for i, label in enumerate(dict.fromkeys(b.label for b in boxes))}
    outlines = [_outline(box, canvas.size, line) for box in boxes]
    for box, outline in zip(boxes, outlines):
        colour, edge = _colour(labels[box.label]), max(1, line // 2)
        if isinstance(box, Point):
            draw.ellipse(_grown(outline, edge), fill=_against(colour))
            draw.ellipse(outline, fill=colour)
            continue
        _ring(draw, _grown(outline, edge), line + 2 * edge, _against(colour))
        _ring(draw, outline, line, colour)
    taken: list[Pixels] = []
    for box, outline in zip(boxes, outlines):
        pad = max(2, line)
        text = _shortened(_drawable(box.label), font, canvas.width - 2 * pad)
        if text and (place := _place(outline, _extent(text, font, pad), canvas.size, taken)) is not None:
            taken.append(place)
            colour = _colour(labels[box.label])
            draw.rectangle(place, fill=colour)
            draw.text((place[0] + pad, place[1] + pad // 2), text, fill=_against(colour), font=font)
    return canvas


def _upright_rgb(image: Image.Image) -> Image.Image:
    """A new RGB image; `load_image`'s pictures are this already, others may be turned or transparent."""
    from PIL import Image, ImageOps

    upright = ImageOps.exif_transpose(image)
    if not upright.has_transparency_data:
        return upright.convert("RGB")
    rgba = upright.convert("RGBA")
    canvas = Image.new("RGB", rgba.size, "white")
    canvas.paste(rgba, mask=rgba.getchannel("A"))
    return canvas


def _outline(box: Box | Point, size: tuple[int, int], line: int) -> Pixels:
    """Outer edge of the line, centred on the box's edge; at the picture's edge the whole line stays inside. A point's
    disc is three lines in radius."""
    if isinstance(box, Point):
        x, y = (min(max(round(v), 0), n - 1) for v, n in zip((box.x, box.y), size))
        return x - 3 * line, y - 3 * line, x + 3 * line, y + 3 * line
    left, top = (min(max(round(v) - line // 2, 0), n - 1) for v, n in zip((box.x1, box.y1), size))
    right, bottom = (min(max(round(v) - 1 + line // 2, 0), n - 1) for v, n in zip((box.x2, box.y2), size))
    return left, top, max(left, right), max(top, bottom)


def _grown(p: Pixels, by: int) -> Pixels:
    return p[0] - by, p[1] - by, p[2] + by, p[3] + by


def _ring(draw: ImageDraw.ImageDraw, p: Pixels, line: int, colour: Colour) -> None:
    """The outermost `line` pixels of `p`; a thicker line than half of it would be drawn beyond it by Pillow."""
    draw.rectangle(p, outline=colour, width=min(line, (min(p[2] - p[0], p[3] - p[1]) + 2) // 2))


def _colour(index: int) -> Colour:
    if index < len(_PALETTE):
        return _PALETTE[index]
    hue = (index - len(_PALETTE)) * _GOLDEN % 1
    red, green, blue = colorsys.hsv_to_rgb(hue, 1, 0.85 if index % 2 else 0.6)
    return round(255 * red), round(255 * green), round(255 * blue)


def _luminance(colour: Colour) -> float:
    """Relative luminance, 0..1 (WCAG 2.1)."""
    red, green, blue = (c / 3294.6 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in colour)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def _against(colour: Colour) -> Colour:
    """Black or white, whichever has the higher contrast ratio (L1 + 0.05) / (L2 + 0.05) (WCAG 2.1): at least 4.5, so
    whatever lies below, one of the two can be told from it."""
    return (0, 0, 0) if _luminance(colour) + 0.05 > math.sqrt(1.05 * 0.05) else (255, 255, 255)


def _drawable(label: str) -> str:
    """On one line, without accents (é as e)."""
    plain = "".join(c for c in unicodedata.normalize("NFKD", label) if not unicodedata.combining(c))
    return " ".join(plain.split())


def _shortened(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, room: int) -> str:
    """`text`, or as much of its beginning with an ellipsis as is at most `room` pixels wide; "" where nothing fits."""
    if len(text) <= _LABEL_LETTERS and font.getlength(text) <= room:
        return text
    text = text[:_LABEL_LETTERS]
    while text and font.getlength(text + "…") > room:
        text = text[:-1].rstrip()
    return text + "…" if text else ""


def _extent(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, pad: int) -> tuple[int, int]:
    """Width and height of a label; the height is the same for all texts, with or without descenders."""
    bottom = font.getbbox("Agjlpy|")[3]  # below the point where the text is drawn
    return math.ceil(font.getlength(text)) + 2 * pad, math.ceil(bottom) + 2 * (pad // 2)


def _place(outline: Pixels, extent: tuple[int, int], size: tuple[int, int], taken: Sequence[Pixels]) -> Pixels | None:
    """Above the box, inside at its top, below it, inside at its bottom: the first that is inside the picture and on
    no other label, else the first inside the picture. None where the label is larger than the picture."""
    (left, top, _, bottom), (width, height) = outline, extent
    if width > size[0] or height > size[1]:
        return None
    x = min(left, size[0] - width)
    rows = [y for y in (top - height, top, bottom + 1, bottom + 1 - height) if 0 <= y <= size[1] - height]
    places = [(x, y, x + width - 1, y + height - 1) for y in rows or [size[1] - height]]
    return next((p for p in places if not any(_overlap(p, t) for t in taken)), places[0])


def _overlap(a: Pixels, b: Pixels) -> bool:
    return a[0] <= b[2] and b[0] <= a[2] and a[1] <= b[3] and b[1] <= a[3]
