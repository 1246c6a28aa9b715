"""runtime/grounding.py and box_drawing.py: boxes by hand, every malformed kind, drawn pictures pixel by pixel."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFont

from edgevl.export.exporter import ExportOptions, export_bundle
from edgevl.runtime import box_drawing
from edgevl.runtime.box_drawing import draw_boxes
from edgevl.runtime.errors import InputError
from edgevl.runtime.generation import VisionLanguageModel
from edgevl.runtime.grounding import Box, Point, parse_boxes, parse_grounding, strip_grounding
from edgevl.runtime.image_loading import load_image
from edgevl.tasks import TASKS

DEMO = Path(__file__).parents[1] / "demo" / "model"  # not from checkpoints.py, which needs torch
REF, END_REF, BOX, END_BOX = "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>", "<|box_end|>"
TOKENS = [REF, END_REF, BOX, END_BOX, "<|quad_start|>", "<|quad_end|>"]


def ref(name: str) -> str:
    return f"{REF}{name}{END_REF}"


def box(inside: str) -> str:
    return f"{BOX}{inside}{END_BOX}"


GOOD = box("(100,200),(500,750)")  # of 640×480: 64, 96, 320, 360
GOOD_PIXELS = (64.0, 96.0, 320.0, 360.0)


def corners(b: Box) -> tuple[float, float, float, float]:
    return b.x1, b.y1, b.x2, b.y2


# ---------------------------------------------------------------------------------------------------------- parsing


def test_a_named_box_in_a_picture_that_is_not_square():
    assert parse_boxes(f"Here: {ref('the cat')}{GOOD}.", [(640, 480)]) == (Box("the cat", *GOOD_PIXELS),)


def test_whole_picture_and_a_fraction_of_a_pixel():
    text = box("(0,0),(1000,1000)") + box("(1,1),(333,999)")
    whole, part = parse_boxes(text, [(448, 50)])
    assert corners(whole) == (0, 0, 448, 50)
    assert corners(part) == pytest.approx((0.448, 0.05, 149.184, 49.95), abs=1e-9)


def test_two_names_and_several_boxes():
    text = (
        f"{ref('cat')}{GOOD}, {box('(0,0),(10,10)')} and {box('(10,10),(20,20)')}; {ref(' dog ')}"
        f"{box('(500,500),(1000,1000)')}"
    )
    found = parse_boxes(text, [(1000, 100)])
    assert [b.label for b in found] == ["cat", "cat", "cat", "dog"]
    assert [corners(b) for b in found] == [(100, 20, 500, 75), (0, 0, 10, 1), (10, 1, 20, 2), (500, 50, 1000, 100)]


def test_boxes_without_a_name():
    assert [b.label for b in parse_boxes(GOOD, [(640, 480)])] == [""]
    # Words stand between: the second box is not the cat.
    text = f"{ref('cat')}{GOOD} is fed. Look here: {GOOD}{GOOD}"
    assert [b.label for b in parse_boxes(text, [(640, 480)])] == ["cat", "", ""]
    assert [b.label for b in parse_boxes(f"{REF}cat{GOOD}", [(640, 480)])] == [""]  # the name does not end


def test_chinese_text():
    assert [b.label for b in parse_boxes(f"{ref('猫')}{GOOD}和{GOOD}、{GOOD}在{GOOD}", [(9, 9)])] == [
        "猫",
        "猫",
        "猫",
        "",
    ]


def test_which_picture():
    assert parse_boxes(GOOD, []) == ()
    (found,) = parse_boxes(GOOD, [(10, 10), (20, 20), (640, 480)])
    assert (found.image, corners(found)) == (2, GOOD_PIXELS)


MALFORMED = {
    "three numbers": box("(100,200),(500)"),
    "five numbers": box("(100,200),(500,750),(1"),
    "one point": box("(100,200)"),
    "empty": box(""),
    "words": box("(a,200),(500,750)"),
    "words in it": box("(100,200) to (500,750)"),
    "no parentheses": box("100,200,500,750"),
    "exponent": box("(1e2,200),(500,750)"),
    "other digits": box("(١٠٠,200),(500,750)"),
    "above 1000": box("(100,200),(500,1002)"),
    "far above": box("(100,200),(500," + "9" * 5000 + ")"),
    "below 0": box("(-2,200),(500,750)"),
    "left and right swapped": box("(500,200),(100,750)"),
    "top and bottom swapped": box("(100,750),(500,200)"),
    "no end": f"{BOX}(100,200),(500,750)",
    "no start": f"(100,200),(500,750){END_BOX}",
    "cut off": f"{BOX}(100,200),(50",
    "quad": "<|quad_start|>(1,1),(2,1),(2,2),(1,2)<|quad_end|>",
    "tokens stripped": "cat (100,200),(500,750)",
    "inside another": f"{BOX}(100,200),{ref('x')}(500,750){END_BOX}",
}


@pytest.mark.parametrize("malformed", MALFORMED.values(), ids=MALFORMED.keys())
def test_malformed_is_not_a_box_and_survives_as_text(malformed):
    text = f"{ref('cat')}{malformed} and {ref('dog')}{GOOD}"
    assert parse_boxes(text, [(640, 480)]) == (Box("dog", *GOOD_PIXELS),)  # the good one after it is still found
    readable = strip_grounding(text)
    for word in malformed.replace("<|", "\n<|").replace("|>", "|>\n").split("\n"):
        assert "<|" in word or word in readable
    assert "<|" not in readable


def test_the_name_passes_a_malformed_box():
    found = parse_boxes(f"{ref('cat')}{box('(1,2)')}{GOOD}", [(640, 480)])
    assert found == (Box("cat", *GOOD_PIXELS),)


def test_a_rounding_outside_is_moved_to_the_edge():
    (found,) = parse_boxes(box("(-1,-0.4),(1000.5,1001)"), [(300, 200)])
    assert corners(found) == (0, 0, 300, 200)


def test_thinner_than_a_thousandth_and_spaces_are_fine():
    assert [corners(b) for b in parse_boxes(box(" (100, 200) , (100, 200) "), [(100, 100)])] == [(10, 20, 10, 20)]


@pytest.mark.parametrize(
    ("text", "readable"),
    [
        ("no boxes (1,2) <b> <|im_end|>", "no boxes (1,2) <b> <|im_end|>"),
        (f"{ref('cat')}{box('(1,2),(3,4)')}", "cat (1,2),(3,4)"),
        (f"{ref('cat')}{box('(1,2),(3,4)')}{box('(5,6),(7,8)')}.", "cat (1,2),(3,4) (5,6),(7,8)."),
        (f"The {ref('cat')}, {ref('dog')} {box('(1,2),(3,4)')} sleep", "The cat, dog (1,2),(3,4) sleep"),
        (f"{box('(1,2),(3,4)')}{ref('dog')}s", "(1,2),(3,4) dogs"),
        (f"at({box('(1,2),(3,4)')})", "at((1,2),(3,4))"),
        (f"x{BOX}(1,2", "x (1,2"),
        ("", ""),
    ],
)
def test_readable_text(text, readable):
    assert strip_grounding(text) == readable


NUMBER = st.one_of(st.integers(-3, 1003).map(str), st.text("0123456789.-e", max_size=6))
PIECES = st.one_of(
    st.sampled_from(TOKENS),
    st.builds(lambda *n: "({},{}),({},{})".format(*n), NUMBER, NUMBER, NUMBER, NUMBER),
    st.builds(lambda *n: box("({},{}),({},{})".format(*n)), NUMBER, NUMBER, NUMBER, NUMBER),
    st.text(max_size=8),
)


@settings(max_examples=400, deadline=None, derandomize=True)
@given(st.lists(PIECES, max_size=12).map("".join), st.lists(st.tuples(st.integers(1, 9999), st.integers(1, 9999))))
def test_any_text_gives_boxes_inside_the_picture_and_never_raises(text, sizes):
    found = parse_boxes(text, sizes)
    assert not found or sizes
    for b in found:
        assert b.image == len(sizes) - 1 and "<|" not in b.label
        assert 0 <= b.x1 <= b.x2 <= sizes[-1][0] and 0 <= b.y1 <= b.y2 <= sizes[-1][1]
    assert len(found) <= text.count(BOX)
    readable = strip_grounding(text)
    dropped = text
    for token in TOKENS:
        dropped = dropped.replace(token, "")
    assert "".join(readable.split()) == "".join(dropped.split())  # spaces apart, nothing but the tokens is lost


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    st.tuples(st.integers(1, 5000), st.integers(1, 5000)),
    st.lists(st.integers(0, 1000), min_size=2, max_size=2).map(sorted),
    st.lists(st.integers(0, 1000), min_size=2, max_size=2).map(sorted),
)
def test_every_box_the_format_can_say_comes_back(size, x, y):
    (found,) = parse_boxes(ref("a b") + box(f"({x[0]},{y[0]}),({x[1]},{y[1]})"), [size])
    assert found.label == "a b"
    exact = [v / 1000 * n for v, n in zip((x[0], y[0], x[1], y[1]), size * 2)]
    assert corners(found) == pytest.approx(exact, rel=1e-12, abs=1e-12)


def test_long_malformed_text_is_read_in_linear_time():
    for piece in [*TOKENS, BOX + "(1,2),", ref("a")[:-3]]:
        assert parse_boxes(piece * 50_000, [(10, 10)]) == ()


# ---------------------------------------------------------------------------------------------------------- drawing

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


def test_needs_neither_numpy_nor_pillow_to_parse():
    code = "import sys, edgevl.runtime.grounding as g; g.parse_boxes('', [(1, 1)]); print('numpy' in sys.modules, "
    result = subprocess.run([sys.executable, "-c", code + "'PIL' in sys.modules)"], capture_output=True, text=True)
    assert result.stdout.split() == ["False", "False"], result.stderr


# ---------------------------------------------------------------------------------------- points, JSON, which picture


def json_box(numbers, label=None, key="bbox_2d"):
    return json.dumps({key: numbers} | ({} if label is None else {"label": label}))


@pytest.mark.parametrize("tokens", [(BOX, END_BOX), ("<|point_start|>", "<|point_end|>")])
def test_a_point(tokens):
    text = f"{ref('nose')}{tokens[0]}(100,200){tokens[1]} and {tokens[0]}(500, 750){tokens[1]}"
    assert parse_grounding(text, [(640, 480)]) == (Point("nose", 64, 96), Point("nose", 320, 360))
    assert parse_boxes(text, [(640, 480)]) == ()
    assert strip_grounding(text) == "nose (100,200) and (500, 750)"


def test_point_tokens_hold_no_box():
    assert parse_grounding("<|point_start|>(1,2),(3,4)<|point_end|>", [(9, 9)]) == ()


@pytest.mark.parametrize("fence", ["{}", "```json\n{}\n```", "Here: {} and so on", "```\n[{}]```"])
def test_json_boxes_and_points(fence):
    listed = f"{json_box([100, 200, 500, 750], 'cat')},\n {json_box([100, 200], ' nose ', 'point_2d')}"
    found = parse_grounding(fence.format(listed), [(640, 480)])
    assert found == (Box("cat", *GOOD_PIXELS), Point("nose", 64, 96))


def test_json_strings_may_hold_braces_quotes_and_escapes():
    label = 'a "}{" \\ é'
    for ascii_only in (True, False):
        text = json.dumps([{"label": label, "bbox_2d": [0.5, 0, 1000, 1000]}], ensure_ascii=ascii_only)
        assert parse_boxes(text, [(1000, 10)]) == (Box(label, 0.5, 0, 1000, 10),)
    # A box inside a larger object, beside other keys.
    text = '{"objects": [{"bbox_2d": [0, 0, 10, 10], "score": 0.5, "label": 7}]}'
    assert parse_boxes(text, [(1000, 1000)]) == (Box("", 0, 0, 10, 10),)


@pytest.mark.parametrize(
    "malformed",
    [
        json_box([1, 2, 3]),
        json_box([1, 2, 3, 4, 5]),
        json_box(["1", "2", "3", "4"]),
        json_box([True, 2, 3, 4]),
        json_box([1, 2, None, 4]),
        json_box([500, 200, 100, 750]),
        json_box([1, 2, 3, 1002]),
        json_box([-2, 2, 3, 4]),
        json_box([1, 2, 3, 4], key="point_2d"),
        json_box([1, 2, 3, 4], key="box"),
        json_box({"x": 1}),
        '{"bbox_2d": [1, 2, 3, NaN]}',
        '{"bbox_2d": [1, 2, 3, 1e999]}',
        '{"bbox_2d": [1, 2, 3, ' + "9" * 400 + "]}",
        '{"bbox_2d": [1, 2, 3, 4], "point_2d": [1, 2]}',
        '{"bbox_2d": [1, 2, 3, 4]',
        '{"bbox_2d": [1, 2, 3, 4,]}',
        "{'bbox_2d': [1, 2, 3, 4]}",
        '{"bbox_2d": ' + "[" * 400 + "}",
    ],
)
def test_malformed_json_is_text(malformed):
    text = f"[{malformed}, {json_box([100, 200, 500, 750], 'dog')}]"
    assert parse_grounding(text, [(640, 480)]) == (Box("dog", *GOOD_PIXELS),)
    assert strip_grounding(text) == text


def test_tokens_and_json_come_in_the_order_of_the_text():
    text = json_box([0, 0, 1, 1], "a") + GOOD + json_box([0, 0, 2, 2], "b")
    assert [b.label for b in parse_boxes(text, [(10, 10)])] == ["a", "", "b"]


def test_the_text_may_say_which_picture():
    sizes = [(1000, 1000), (500, 500), (100, 100)]
    text = f"{GOOD} Picture 1: {GOOD}{json_box([0, 0, 1000, 1000])} In image #2, {GOOD}; picture 9: {GOOD} 图3 {GOOD}"
    assert [b.image for b in parse_boxes(text, sizes)] == [2, 0, 0, 1, 1, 2]
    assert parse_boxes(f"Picture 1: {GOOD}", sizes)[0] == Box("", 100, 200, 500, 750, 0)


def test_long_malformed_json_is_read_in_linear_time():
    for piece in ["{", '{"', '{"bbox_2d":', '"{', "{[", '{"\\', "picture 1 ", '{"a":"b",']:
        assert parse_grounding(piece * 50_000, [(10, 10)]) == ()


# ------------------------------------------------------------------------------------------------- crops, EXIF


def test_moved_out_of_a_crop():
    assert Box("a", 1, 2, 3, 4, 1).moved(10, 20) == Box("a", 11, 22, 13, 24, 1)
    assert Point("a", 1, 2).moved(10, 20) == Point("a", 11, 22)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_stored_pixels_of_a_turned_picture(orientation, tmp_path):
    """The oracle is Pillow: a white rectangle in the file's own pixels, read upright, found, and mapped back."""
    stored = Image.new("L", (60, 40))
    stored.paste(255, (7, 11, 31, 19))
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "a.png", exif=exif)
    upright = load_image(tmp_path / "a.png")
    found = upright.getbbox()
    assert found is not None
    x1, y1, x2, y2 = found
    there = Box("a", x1, y1, x2, y2)
    assert corners(there.stored(upright.size, orientation)) == (7, 11, 31, 19)
    corner = Point("", x1, y1).stored(upright.size, orientation)
    assert corner.x in (7, 31) and corner.y in (11, 19)


def test_an_orientation_that_does_not_exist():
    with pytest.raises(InputError, match="orientation 9, expected 1 to 8"):
        Box("", 0, 0, 1, 1).stored((9, 9), 9)


def test_a_point_is_drawn_as_a_disc_with_an_edge():
    for colour in (GREY, ORANGE, (0, 0, 0), (255, 255, 255)):
        drawn = pixels(draw_boxes(blank(100, 100, colour), [Point("", 50, 40)], width=2))
        assert tuple(drawn[40, 50]) == ORANGE and tuple(drawn[40, 50 + 5]) == ORANGE
        assert tuple(drawn[40, 50 + 7]) == box_drawing._against(ORANGE)
        assert tuple(drawn[40, 50 + 10]) == colour
    draw_boxes(blank(3, 3), [Point("far", 900, -7)])


# ------------------------------------------------------------------------------------------------- asking where


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "bundle"
    export_bundle(DEMO, folder, ExportOptions(precision="fp32"))
    with VisionLanguageModel.open(folder, "ort-cpu", threads=2) as model:
        yield model


def overlap(a: Box, b: tuple[float, float, float, float]) -> float:
    w, h = min(a.x2, b[2]) - max(a.x1, b[0]), min(a.y2, b[3]) - max(a.y1, b[1])
    shared = max(0, w) * max(0, h)
    return shared / ((a.x2 - a.x1) * (a.y2 - a.y1) + (b[2] - b[0]) * (b[3] - b[1]) - shared)


def asked(case):
    """The thing a case asks for, and its true box in pixels."""
    (picture,) = case.pictures
    truth = [v / 1000 * n for v, n in zip(case.box, picture.size * 2)]
    return picture, case.question.removeprefix("Where is ").removesuffix("?"), tuple(truth)


def test_locate_finds_what_is_there(demo):
    good = 0
    for case in TASKS["where"].cases("test", 30, seed=5):
        picture, target, truth = asked(case)
        found = demo.locate(picture, target, max_new_tokens=case.max_new_tokens)
        good += len(found) == 1 and overlap(found[0], truth) > 0.5
    assert good >= 20


def test_locate_in_a_crop_gives_boxes_of_the_whole_picture(demo):
    good = 0
    cases = TASKS["where"].cases("test", 8, seed=6)
    for case in cases:
        picture, target, truth = asked(case)
        wide = Image.new("RGB", (picture.width + 300, picture.height + 200), (40, 90, 60))
        wide.paste(picture, (170, 90))
        crop = (170, 90, 170 + picture.width, 90 + picture.height)
        found = demo.locate(wide, target, crop=crop)
        same = [b.moved(170, 90) for b in demo.locate(picture, target)]
        assert found == same
        good += any(overlap(b, (truth[0] + 170, truth[1] + 90, truth[2] + 170, truth[3] + 90)) > 0.5 for b in found)
    assert good >= 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"target": " "}, "the thing to locate is ' ', expected words"),
        ({"target": "x", "question": "Where?"}, r"expected one with \{target\}"),
        ({"target": "x", "crop": (0, 0, 500, 10)}, "crop is .*picture of 40×30"),
        ({"target": "x", "crop": (5, 5, 5, 10)}, "left < right"),
        ({"target": "x", "crop": (0, 0, 1.5, 10)}, "whole pixels"),
        ({"target": "x", "crop": (0, 0, 10)}, "left < right"),
    ],
)
def test_locate_refuses(demo, arguments, message):
    with pytest.raises(InputError, match=message):
        demo.locate(blank(40, 30), **arguments)
