"""The yardstick: deterministic cases, splits that share nothing, scores worked out by hand."""

from __future__ import annotations

import json
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest

from edgevl.tasks import (
    MAX_PIXELS,
    SPLITS,
    TASKS,
    Case,
    character_error,
    edit_distance,
    fonts,
    iou,
    parse_box,
    scenes,
    scoring,
    words,
)
from edgevl.tasks.scoring import Score, score_box, score_text, wilson

DEMO = Path(__file__).parents[1] / "demo"
NAMES = [
    "read_1_line",
    "read_2_lines",
    "read_3_lines",
    "read_any_size",
    "read_reduced",
    "colour",
    "count",
    "where",
    "receipt_total",
    "receipt_items",
    "two_pictures",
    "motion",
]


def digest(case: Case) -> int:
    """Of all that a case consists of."""
    crc = zlib.crc32(repr((case.question, case.truth, case.box, case.note, case.max_pixels)).encode())
    for p in case.pictures:
        crc = zlib.crc32(np.asarray(p).tobytes(), crc)
    return crc


def test_names():
    assert list(TASKS) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_same_seed_same_cases(name):
    task = TASKS[name]
    first = [digest(c) for c in task.cases("test", 4)]
    assert first == [digest(c) for c in task.cases("test", 4)]
    assert first[3] == digest(task.case("test", 3)), "a case must not depend on those before it"
    assert len({*first, *map(digest, task.cases("test", 4, seed=1)), *map(digest, task.cases("calibration", 4))}) == 12


def test_a_fresh_process_draws_the_same():
    code = (
        "import zlib; from edgevl.tasks import TASKS; import numpy as np\n"
        "print([zlib.crc32(np.asarray(t.case('test', 5).pictures[-1]).tobytes()) for t in TASKS.values()])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=DEMO.parent)
    here = [zlib.crc32(np.asarray(t.case("test", 5).pictures[-1]).tobytes()) for t in TASKS.values()]
    assert out.stdout.strip() == str(here)


def test_splits_share_no_words_items_faces():
    a, b = (set(words.pool(s)) for s in SPLITS)
    assert len(a) > 3000 and len(b) > 3000 and not a & b
    assert all(words.is_test_word(w) for w in b) and not any(words.is_test_word(w) for w in a)
    assert not set(words.ITEMS) & set(words.TEST_ITEMS)
    a, b = (set(fonts.faces(s)) for s in SPLITS)
    assert len(a) >= 10 and len(b) >= 10 and not a & b


def test_dictionary_words_in_test_cases_are_test_words():
    known = set(words.pool("calibration"))
    for name in ("read_1_line", "read_3_lines", "two_pictures"):
        for case in TASKS[name].cases("test", 60):
            for w in case.truth.split():
                assert len(w) < 5 or w.lower() not in known, (name, case.index, w)


def test_unknown_split_is_refused():
    with pytest.raises(ValueError, match=r"'train'.*expected one of calibration, test"):
        TASKS["count"].case("train", 0)


@pytest.mark.parametrize("name", NAMES)
def test_cases_are_well_formed(name):
    task = TASKS[name]
    for case in task.cases("test", 30):
        assert case.truth and case.truth.isascii()
        perfect = task.score(case.truth, case)
        assert perfect.correct and perfect.value > 0.5
        for wrong in ("", "no idea", "(1,2),(3", "\x00", "<|box_start|>(900,900),(100,100)<|box_end|>"):
            assert not task.score(wrong, case).correct, (case.truth, wrong)
        content = case.messages[0]["content"]
        assert content[-1] == {"type": "text", "text": case.question}
        assert [c["type"] for c in content[:-1]] == (["video"] if case.video else ["image"] * len(case.pictures))
        if name == "read_reduced":
            assert case.max_pixels and all(p.width * p.height > 5 * case.max_pixels for p in case.pictures)
        else:
            assert all(784 <= p.width * p.height <= MAX_PIXELS for p in case.pictures)


def test_sizes_cover_what_is_promised():
    cases = TASKS["read_any_size"].cases("test", 200)
    heights = [int(c.note.split("capitals ")[1].split(" ")[0]) for c in cases]
    assert min(heights) <= 11 and max(heights) >= 60
    strips = [c for c in cases if c.note.startswith("5:1")]
    assert len(strips) > 40 and all(abs(c.pictures[0].width / c.pictures[0].height - 5) < 0.15 for c in strips)
    assert {"x0.5", "x1", "x2"} <= {c.note.split(",")[0] for c in cases}
    assert {"own", "oblique", "heavy"} <= {c.note.split(", ")[-1] for c in cases}
    assert {len(c.pictures) for c in TASKS["motion"].cases("test", 100)} == {4, 6, 8, 10, 12, 14, 16}


def test_truth_of_scenes_against_the_pixels():
    """The asked shape's box holds its colour, and what moves goes where it is said to go."""
    tones = scenes.COLOURS
    for case in TASKS["where"].cases("test", 20):
        assert case.box
        colour = case.question.split(" ")[3]
        a = np.asarray(case.pictures[0], np.float32)
        near = np.abs(a - tones[colour]).max(-1) < 40
        x0, y0, x1, y1 = (v * n / 1000 for v, n in zip(case.box, case.pictures[0].size * 2))
        inside = near[round(y0) : round(y1), round(x0) : round(x1)]
        assert inside.mean() > 0.25, case.question
    for case in TASKS["motion"].cases("test", 20):
        first, last = (np.asarray(p, np.float32) for p in (case.pictures[0], case.pictures[-1]))
        ground = np.median(first.reshape(-1, 3), 0)
        (ya, xa), (yb, xb) = (np.argwhere(np.abs(f - ground).max(-1) > 60).mean(0) for f in (first, last))
        step = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}[case.truth]
        assert (xb - xa) * step[0] + (yb - ya) * step[1] > 8


def test_receipt_totals_add_up():
    assert scoring.Score(True, 1.0) == score_text(" 12.30\n", "12.30")
    from edgevl.tasks.receipts import money, receipt

    rng = np.random.default_rng(0)
    page, names, total = receipt(rng, (150, 140), fonts.faces("test")[0], 3, words.TEST_ITEMS, words.pool("test"))
    prices = [float(line.text) for line in page.lines if line.text.replace(".", "").isdigit()]
    assert len(names) == 3 and len(prices) == 4
    assert round(sum(prices[:3]), 2) == prices[3] == float(total)
    assert money(1905) == "19.05" and money(7) == "0.07"


def test_edit_distance_and_character_error_by_hand():
    assert edit_distance("kitten", "sitting") == 3
    assert edit_distance("", "abc") == 3 and edit_distance("abc", "abc") == 0
    assert character_error("helo", "hello") == pytest.approx(0.2)
    assert character_error("", "") == 0 and character_error("x", "") == 1
    assert score_text("hello world", "hello") == Score(False, 0.0)
    assert score_text("hellp", "hello").value == pytest.approx(0.8)


def test_iou_by_hand():
    assert iou((0, 0, 10, 10), (5, 0, 15, 10)) == pytest.approx(50 / 150)
    assert iou((0, 0, 10, 10), (2, 2, 8, 8)) == pytest.approx(0.36)
    assert iou((0, 0, 10, 10), (10, 0, 20, 10)) == 0
    assert iou((3, 3, 3, 3), (3, 3, 3, 3)) == 0, "an empty box overlaps nothing"


def test_boxes_parse():
    text = "<|object_ref_start|>red star<|object_ref_end|><|box_start|>(320,760),(660,980)<|box_end|>"
    assert parse_box(text) == (320, 760, 660, 980)
    assert parse_box("red star(320,760),(660,980)") == (320, 760, 660, 980)
    assert score_box(text, (320, 760, 660, 980)) == Score(True, 1.0)
    half = score_box(text, (320, 760, 490, 980))
    assert not half.correct and half.value == pytest.approx(0.5)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "(1,2),(3)",
        "(-1,2),(3,4)",
        "(500,0),(400,100)",
        "(0,100),(100,100)",
        "(0,0),(1001,100)",
        "(0,0),(99999,100)",
        "(a,b),(c,d)",
        "(1,1),(2,2) or (3,3),(4,4)",
    ],
)
def test_malformed_boxes_score_nothing(text):
    assert parse_box(text) is None
    assert score_box(text, (0, 0, 1000, 1000)) == Score(False, 0.0)


def test_wilson_interval_against_published_values():
    # Newcombe 1998 (Statistics in Medicine 17), table I: 81 of 263, and 15 of 148
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert wilson(15, 148) == pytest.approx((0.0624, 0.1605), abs=1e-4)
    assert wilson(0, 20)[0] == 0 and wilson(20, 20)[1] == 1 and wilson(0, 0) == (0, 1)


def test_ambiguous_strings_are_not_asked():
    rng = np.random.default_rng(0)
    for _ in range(500):
        s = words.token(rng, words.pool("test"), 2, 8)
        assert 2 <= len(s) <= 8 and not set(s) <= words.SAME_IN_BOTH_CASES


def test_demo_pictures_are_reproduced(tmp_path):
    """The shipped pictures are the generator's, pixel for pixel."""
    subprocess.run([sys.executable, str(DEMO / "pictures" / "make.py"), str(tmp_path)], check=True, cwd=DEMO.parent)
    shipped = json.loads((DEMO / "pictures" / "cases.json").read_text())
    assert json.loads((tmp_path / "cases.json").read_text()) == shipped
    from PIL import Image

    names = [str(p.relative_to(DEMO / "pictures")) for p in (DEMO / "pictures").rglob("*.png")]
    assert sorted(names) == sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*.png")) and len(names) > 12
    for name in names:
        a, b = (np.asarray(Image.open(f / name)) for f in (DEMO / "pictures", tmp_path))
        assert np.array_equal(a, b), name
    for row in shipped:
        case = TASKS[row["task"]].case("test", row["index"], row["seed"])
        assert (case.question, case.truth) == (row["question"], row["truth"])
