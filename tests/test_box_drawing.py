"""runtime/box_drawing.py: drawn pictures pixel by pixel."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageFont

from edgevl.runtime import box_drawing
from edgevl.runtime.box_drawing import draw_boxes
from edgevl.runtime.errors import InputError
from edgevl.runtime.grounding import Box, Point

GREY = (120, 120, 120)
ORANGE, BLUE = box_drawing._PALETTE[:2]


def blank(width: int, height: int, colour: tuple[int, int, int] = GREY) -> Image.Image:
    return Image.new("RGB", (width, height), colour)


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


def test_lines_and_edges_are_where_they_should_be_and_nowhere_else():
    before = blank(60, 50)
    drawn = pixels(draw_boxes(before, [Box("", 10, 20, 40, 35)], width=1))
    expected = np.full((50, 60, 3), GREY)
    expected[19:36, 9:41] = 0  # black goes with orange: one pixel outside, one inside
    expected[20:35, 10:40] = ORANGE  # columns 10..39: the box ends before pixel 40
    expected[21:34, 11:39] = 0
    expected[22:33, 12:38] = GREY
    np.testing.assert_array_equal(drawn, expected)
    assert (pixels(before) == GREY).all()  # the original is untouched


def test_thick_lines_are_centred_on_the_edge():
    drawn = pixels(draw_boxes(blank(100, 100), [Box("", 40, 30, 80, 90)], width=4))
    row = drawn[60]
    assert [tuple(p) for p in row[35:47]] == [GREY, *[(0, 0, 0)] * 2, *[ORANGE] * 4, *[(0, 0, 0)] * 2, *[GREY] * 3]


def test_at_the_border_the_whole_line_stays_visible():
    drawn = pixels(draw_boxes(blank(50, 40), [Box("", 0, 0, 50, 40)], width=3))
    for band in (drawn[:3], drawn[-3:], drawn[:, :3], drawn[:, -3:]):
        assert (band == ORANGE).all()
    assert (drawn[5:-5, 5:-5] == GREY).all()


@pytest.mark.parametrize("beyond", [(-90, -90, -40, -50), (300, 10, 400, 20), (-5, -5, 500, 500), (20, 20, 20, 20)])
def test_boxes_beyond_the_picture_or_without_area_leave_a_mark(beyond):
    drawn = draw_boxes(blank(64, 48), [Box("a", *beyond)])
    assert drawn.size == (64, 48) and (pixels(drawn) != GREY).any()


@pytest.mark.parametrize("colour", [(0, 0, 0), (255, 255, 255), GREY, *box_drawing._PALETTE])
def test_lines_stand_out_on_any_background(colour):
    boxes = [Box(str(i), 20, 20, 80, 80) for i in range(12)]
    for i, b in enumerate(boxes):
        # The colour of the i-th label alone: those before it are drawn at one far corner.
        others = [Box(o.label, 98, 98, 99, 99) for o in boxes[:i]]
        drawn = pixels(draw_boxes(blank(100, 100, colour), [*others, b], width=2))[70, 15:30]
        below = box_drawing._luminance(colour) + 0.05
        ratios = [max(c, below) / min(c, below) for c in (box_drawing._luminance(tuple(p)) + 0.05 for p in drawn)]
        assert max(ratios) > 2, (colour, b.label, ratios)


def test_colours_are_one_per_label_and_distinct():
    colours = [box_drawing._colour(i) for i in range(20)]
    assert len(set(colours)) == 20
    for c in colours:
        a, b = sorted((box_drawing._luminance(c) + 0.05, box_drawing._luminance(box_drawing._against(c)) + 0.05))
        assert b / a >= 4.5, c
    drawn = pixels(draw_boxes(blank(90, 30), [Box("", x, 5, x + 20, 25) for x in (5, 35, 65)], width=1))
    assert all(tuple(drawn[15, x]) == ORANGE for x in (5, 35, 65))
    named = [Box("a", 5, 60, 25, 90), Box("b", 35, 60, 55, 90), Box("a", 65, 60, 85, 90)]
    drawn = pixels(draw_boxes(blank(90, 100), named, width=1))
    assert [tuple(drawn[80, x]) for x in (5, 35, 65)] == [ORANGE, BLUE, ORANGE]


def test_luminance_is_that_of_wcag():
    assert box_drawing._luminance((255, 255, 255)) == pytest.approx(1)
    assert box_drawing._luminance((255, 0, 0)) == pytest.approx(0.2126)
    assert box_drawing._luminance((10, 10, 10)) == pytest.approx(10 / 255 / 12.92, rel=1e-4)
    assert box_drawing._luminance((128, 128, 128)) == pytest.approx(0.21586, abs=1e-5)


SIZES = [(448, 448), (120, 90), (2000, 1500), (1200, 100), (100, 900)]
PLACES = [(0, 0, 0.2, 0.2), (0.8, 0, 1, 0.2), (0, 0.8, 0.2, 1), (0.95, 0.95, 1, 1), (0, 0, 1, 1), (0.5, 0.4, 0.6, 0.6)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("place", PLACES)
def test_labels_are_whole_and_inside_the_picture(size, place, monkeypatch):
    """The label's rectangle lies inside, with a margin of its colour around the letters, and no letter is cut."""
    at = Box("gypsy", *(v * n for v, n in zip(place, size * 2)))
    seen = []
    place_of = box_drawing._place

    def watched(*arguments):
        seen.append(place_of(*arguments))
        return seen[-1]

    monkeypatch.setattr(box_drawing, "_place", watched)
    drawn = draw_boxes(blank(*size), [at])
    (found,) = seen
    assert found is not None and 0 <= found[0] <= found[2] < size[0] and 0 <= found[1] <= found[3] < size[1]
    inside = pixels(drawn)[found[1] : found[3] + 1, found[0] : found[2] + 1]
    assert (inside[[0, -1]] == ORANGE).all() and (inside[:, [0, -1]] == ORANGE).all()  # a margin all around the text
    side = (size[0] * size[1]) ** 0.5
    font = ImageFont.load_default(max(10, round(side / 36)))
    ink = (1 - inside[..., 0] / ORANGE[0]).sum()  # black on orange: how much of each pixel the letters cover
    mask = font.getmask("gypsy")
    whole = sum(mask.getpixel((x, y)) for x in range(mask.size[0]) for y in range(mask.size[1]))
    assert ink == pytest.approx(whole / 255, rel=0.02)


def test_places_of_labels():
    """Above, inside at the top, below, inside at the bottom; the first that is free."""
    outline, extent, size = (50, 40, 99, 89), (30, 10), (200, 150)
    order = [(50, 30, 79, 39), (50, 40, 79, 49), (50, 90, 79, 99), (50, 80, 79, 89)]
    for n in range(4):
        assert box_drawing._place(outline, extent, size, order[:n]) == order[n]
    assert box_drawing._place(outline, extent, size, order) == order[0]  # no room left: on top of another
    assert box_drawing._place((50, 5, 99, 89), extent, size, []) == (50, 5, 79, 14)  # none above
    assert box_drawing._place((190, 40, 199, 89), extent, size, []) == (170, 30, 199, 39)  # moved left
    assert box_drawing._place((0, 2, 9, 8), extent, (200, 12), []) == (0, 2, 29, 11)
    assert box_drawing._place((0, 4, 9, 8), extent, (200, 12), []) == (0, 2, 29, 11)  # none of the four fits
    assert box_drawing._place(outline, (201, 10), size, []) is None
    assert box_drawing._place(outline, (30, 151), size, []) is None


@pytest.mark.parametrize("size", [(1, 1), (3, 200), (200, 3), (12, 12), (28, 28)])
@pytest.mark.parametrize("label", ["a", "W" * 5000, "two\nlines\tand\0more", "猫", "\ud800", "é", " \n"])
def test_tiny_pictures_and_odd_labels(size, label):
    before = blank(*size)
    drawn = draw_boxes(before, [Box(label, 0, 0, *size)])
    assert drawn.size == size and drawn.mode == "RGB"
    assert (pixels(drawn) != GREY).any() and (pixels(before) == GREY).all()


def test_a_long_label_is_shortened_to_the_picture():
    font = ImageFont.load_default(20)
    assert box_drawing._shortened("short", font, 200) == "short"
    cut = box_drawing._shortened("a very long name of a thing", font, 100)
    assert cut.endswith("…") and "a very long".startswith(cut[:-1]) and 70 < font.getlength(cut) <= 100
    assert box_drawing._shortened("W", font, 3) == ""


def test_line_and_letters_grow_with_the_picture():
    def line_width(side: int) -> int:
        middle = pixels(draw_boxes(blank(side, side), [Box("", side / 4, side / 4, side * 3 / 4, side * 3 / 4)]))
        return int((middle[side // 2, : side // 2] == ORANGE).all(-1).sum())

    assert [line_width(s) for s in (100, 448, 1000, 3000)] == [1, 2, 6, 17]


def test_accents_are_dropped_since_the_font_has_none():
    boxes = [[Box(name, 10, 60, 90, 90)] for name in ("école à", "ecole a")]
    one, other = (pixels(draw_boxes(blank(100, 100), b)) for b in boxes)
    np.testing.assert_array_equal(one, other)


def test_other_modes_are_upright_rgb_on_white():
    transparent = Image.new("RGBA", (40, 30), (200, 0, 0, 0))
    drawn = draw_boxes(transparent, [])
    assert drawn.mode == "RGB" and (pixels(drawn) == 255).all() and transparent.getpixel((0, 0)) == (200, 0, 0, 0)
    assert draw_boxes(Image.new("L", (40, 30), 7), []).getpixel((3, 3)) == (7, 7, 7)
    turned = blank(40, 30)
    turned.getexif()[0x0112] = 6
    assert draw_boxes(turned, []).size == (30, 40)


def test_no_boxes_is_a_copy_of_its_own():
    before = blank(20, 20)
    after = draw_boxes(before, [])
    assert after is not before and (pixels(after) == GREY).all()
    after.putpixel((0, 0), (1, 2, 3))
    assert before.getpixel((0, 0)) == GREY


@pytest.mark.parametrize("width", [0, -3])
def test_a_width_below_one_is_refused(width):
    with pytest.raises(InputError, match=r"width .*at least 1"):
        draw_boxes(blank(20, 20), [], width=width)


def test_a_point_is_drawn_as_a_disc_with_an_edge():
    for colour in (GREY, ORANGE, (0, 0, 0), (255, 255, 255)):
        drawn = pixels(draw_boxes(blank(100, 100, colour), [Point("", 50, 40)], width=2))
        assert tuple(drawn[40, 50]) == ORANGE and tuple(drawn[40, 50 + 5]) == ORANGE
        assert tuple(drawn[40, 50 + 7]) == box_drawing._against(ORANGE)
        assert tuple(drawn[40, 50 + 10]) == colour
    draw_boxes(blank(3, 3), [Point("far", 900, -7)])
