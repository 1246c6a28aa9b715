"""A contact sheet of held-out pictures with the model's answers, taken at random, mistakes included.

python -m demo.training.sheet demo/model demo/sheet.png [--each 2] [--seed 3]
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from PIL import Image, ImageDraw

from demo.training.answer import answers, load, reading_of
from edgevl.tasks import TASKS, Case, fonts, parse_box

CELL = (330, 212)


def shown(text: str) -> str:
    """On one line, without grounding tokens."""
    return re.sub(r"<\|(object_ref|box)_(start|end)\|>", " ", text).replace("\n", " / ").strip()


def draw_cell(case: Case, answer: str, right: bool) -> Image.Image:
    """The pictures (of a video the first, middle and last frame), the question, the answer, the truth if it differs."""
    cell = Image.new("RGB", CELL, "white")
    draw, face = ImageDraw.Draw(cell), fonts.font(fonts.faces("calibration")[0], 12)
    pictures = list(case.pictures)
    if case.video:
        pictures = [pictures[0], pictures[len(pictures) // 2], pictures[-1]]
    scale = min(1.0, (CELL[0] - 16 - 4 * len(pictures)) / sum(p.width for p in pictures))
    scale = min(scale, 136 / max(p.height for p in pictures))
    x = 8
    for p in pictures:
        small = p.resize((max(1, round(p.width * scale)), max(1, round(p.height * scale))))
        if case.box and (box := parse_box(answer)):
            edges = [v * n / 1000 for v, n in zip(box, small.size * 2)]
            ImageDraw.Draw(small).rectangle(edges, outline=(255, 0, 255), width=2)
        cell.paste(small, (x, 8))
        draw.rectangle((x, 8, x + small.width, 8 + small.height), outline=(170, 170, 170))
        x += small.width + 4
    draw.text((8, 150), f"{case.task}: {case.question}", "black", font=face)
    draw.text((8, 168), "model: " + shown(answer), (0, 110, 30) if right else (190, 0, 0), font=face)
    if not right:
        draw.text((8, 186), "truth: " + shown(case.truth), (90, 90, 90), font=face)
    return cell


def main() -> None:
    """See the module."""
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("folder", type=Path)
    ap.add_argument("out", type=Path)
    ap.add_argument("--each", type=int, default=2)
    ap.add_argument("--seed", type=int, default=3)
    o = ap.parse_args()
    cases = [c for t in TASKS.values() for c in t.cases("test", o.each, o.seed)]
    said, _ = answers(load(o.folder), cases, reading_of(o.folder))
    columns = 4
    sheet = Image.new("RGB", (CELL[0] * columns, CELL[1] * -(-len(cases) // columns)), "white")
    for i, (case, answer) in enumerate(zip(cases, said)):
        right = TASKS[case.task].score(answer, case).correct
        sheet.paste(draw_cell(case, answer, right), (i % columns * CELL[0], i // columns * CELL[1]))
    sheet.save(o.out, optimize=True)


if __name__ == "__main__":
    main()
