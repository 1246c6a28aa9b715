"""`make demo`: export the small trained checkpoint, run it on pictures, and show what it says and how long it took.

python demo/demo.py [FOLDER]    (FOLDER: where the bundle goes, out/demo by default)
"""

from __future__ import annotations

import json
import re
import sys
import time
from pathlib import Path

from tabulate import tabulate

from edgevl.export.exporter import ExportOptions, export_bundle
from edgevl.runtime import Completion, VisionLanguageModel
from edgevl.runtime.box_drawing import draw_boxes
from edgevl.runtime.doctor import cpu_model
from edgevl.runtime.grounding import strip_grounding
from edgevl.runtime.image_loading import load_image

HERE = Path(__file__).resolve().parent
OUT = Path(sys.argv[1]).resolve() if len(sys.argv) > 1 else HERE.parent / "out" / "demo"


def short(path: Path) -> Path:
    """The path as a person in the repository would type it."""
    return path.relative_to(HERE.parent) if path.is_relative_to(HERE.parent) else path


def message(case: dict) -> dict:
    """The chat message of one case: its pictures (a folder is a video), then its question."""
    items = []
    for name in case["pictures"]:
        path = HERE / "pictures" / name
        kind = "video" if path.is_dir() else "image"
        items.append({"type": kind, kind: path})
    return {"role": "user", "content": [*items, {"type": "text", "text": case["question"]}]}


def boxed(case: dict, answer: Completion) -> Path | None:
    """Draw the answer's boxes on the case's picture."""
    if not answer.boxes:
        return None
    path = OUT / f"boxes_{Path(case['pictures'][-1]).stem}.png"
    draw_boxes(load_image(HERE / "pictures" / case["pictures"][-1]), answer.boxes).save(path)
    return path


def overlap(answer: Completion, case: dict) -> float:
    """Intersection over union of the answer's first box and the true one, in thousandths of the picture."""
    found = [[int(n) for n in re.findall(r"\d+", text)[-4:]] for text in (answer.text, case["truth"])]
    if any(len(box) != 4 for box in found):
        return 0.0
    (ax1, ay1, ax2, ay2), (bx1, by1, bx2, by2) = found
    shared = max(0, min(ax2, bx2) - max(ax1, bx1)) * max(0, min(ay2, by2) - max(ay1, by1))
    return shared / ((ax2 - ax1) * (ay2 - ay1) + (bx2 - bx1) * (by2 - by1) - shared)


def main() -> None:
    started = time.perf_counter()
    OUT.mkdir(parents=True, exist_ok=True)
    print("A Qwen2-VL of 6 million parameters, trained for this demo (demo/README.md); precision int8.")
    report = export_bundle(HERE / "model", OUT / "bundle", ExportOptions(precision="int8"), overwrite=True)
    size = sum(p.nbytes for p in report.parts) / 1e6
    print(f"exported demo/model to {short(OUT)}/bundle: {size:.1f} MB in {report.seconds:.1f} s\n")
    cases = json.loads((HERE / "pictures" / "cases.json").read_text(encoding="utf-8"))
    rows, drawn, right = [], [], 0
    with VisionLanguageModel.open(OUT / "bundle", "ort-cpu", image_cache_mb=0) as model:
        model.generate([message(cases[0])], max_new_tokens=2)  # warm-up
        for case in cases:
            answer = model.generate([message(case)], max_new_tokens=64)
            said, truth = strip_grounding(answer.text), strip_grounding(case["truth"])
            correct = said == truth if case["task"] != "where" else overlap(answer, case) > 0.5
            right += correct
            t = answer.timings
            times = (f"{s * 1e3:.1f}" for s in (t.preprocess_s, t.vision_s, t.prefill_s, t.first_token_s))
            rate = f"{t.tokens_per_s:.0f}" if t.decode_steps else ""
            mark = "ok" if correct else "wrong"
            rows.append((case["pictures"][0], case["question"], said, truth, mark, *times, rate))
            if (path := boxed(case, answer)) is not None:
                drawn.append(path)
    headers = ("picture", "question", "answer", "truth", "", "resize ms", "vision ms", "prefill ms", "TTFT ms", "tok/s")
    print(tabulate(rows, headers=headers, tablefmt="simple", disable_numparse=True))
    print(f"\n{right} of {len(cases)} right (a box: overlaps the true one by more than half); {cpu_model()}")
    for path in drawn:
        print(f"box drawn to {short(path)}")
    command = short(Path(sys.executable).parent / "edgevl")
    print(f"""
{time.perf_counter() - started:.1f} s in all. Try next:
  {command} run {short(OUT)}/bundle "Read the text." --image demo/pictures/{cases[0]["pictures"][0]} --stats
  {command} chat {short(OUT)}/bundle
  {command} export Qwen/Qwen2-VL-2B-Instruct -o out/2b --precision hybrid   (a checkpoint folder, or a hub id)""")


if __name__ == "__main__":
    main()
