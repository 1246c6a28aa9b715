"""runtime/grounding.py and locate.py: boxes by hand, every malformed kind, crops, asking where."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from edgevl.export.exporter import ExportOptions, export_bundle
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
        demo.locate(Image.new("RGB", (40, 30)), **arguments)
