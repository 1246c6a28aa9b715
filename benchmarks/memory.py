"""Predicted memory (edgevl.runtime.preflight) beside the measured peak, case by case.

Method: every case is a process of its own that opens the bundle and answers the request twice (the second time on top
of what the engine's arenas kept). Measured are its VmHWM when the bundle has opened and, reset there, when it has
answered, since opening alone would hide small requests; predicted are Plan.opening and the larger of Plan.picture and
Plan.answer, from the bundle's files alone. A fresh bundle is synced to disk first: pages not yet written back cannot
be given back by the runtime.

    python -m edgevl.benchmarks.memory BUNDLE... [--case 672x672,1,40,8,1] [--json FILE]
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
from tabulate import tabulate
from tqdm import tqdm

from edgevl.benchmarks.output_option import OutputFile
from edgevl.runtime.bundle import Bundle
from edgevl.runtime.doctor import machine
from edgevl.runtime.errors import EdgeVLError, InputError
from edgevl.runtime.image_processing import VisionGrid
from edgevl.runtime.output_file import write_output
from edgevl.runtime.preflight import Plan, Planner

__all__ = ["Case", "main", "measure"]

TOLERANCE = 0.15
DEFAULT_CASES = ("224x224,1,40,8,1", "672x448,1,40,8,1", "448x448,2,40,8,1", "224x224,1,1200,8,1", "448x448,1,40,8,3")


@dataclass(frozen=True)
class Case:
    """`images` pictures of width × height (multiples of 28), `words` of text, `new` tokens of answer, `batch` rows."""

    width: int
    height: int
    images: int
    words: int
    new: int
    batch: int

    @classmethod
    def parse(cls, text: str) -> Case:
        try:
            size, *rest = text.split(",")
            width, height = size.split("x")
            case = cls(int(width), int(height), *map(int, rest))
        except (TypeError, ValueError):
            raise InputError(f"case {text!r}, expected WIDTHxHEIGHT,IMAGES,WORDS,NEW,BATCH") from None
        if case.images < 0 or min(case.words, case.new, case.batch) < 1:
            raise InputError(f"case {text!r}, expected 0 or more IMAGES, and WORDS, NEW and BATCH of at least 1")
        return case

    def check_size(self, factor: int) -> None:
        """Raises InputError for pictures that would be resized: what is predicted were those of another size."""
        if any(side < factor or side % factor for side in (self.width, self.height)):
            raise InputError(f"case {self}: expected width and height to be multiples of {factor}")

    def __str__(self) -> str:
        return f"{self.images}×{self.width}×{self.height}, {self.words} words, batch {self.batch}"


@dataclass(frozen=True)
class Measured:
    """Peaks in bytes while opening and while answering, and the tokens of one prompt."""

    opening: int
    answering: int
    prompt_tokens: int
    image_tokens: int


def _child(bundle: str, case: Case) -> None:
    """Runs in its own process; prints a Measured as JSON."""
    import numpy as np
    from PIL import Image

    from edgevl.runtime import VisionLanguageModel
    from edgevl.runtime.doctor import peak_rss_bytes

    rng = np.random.default_rng(0)
    answers = []
    with VisionLanguageModel.open(bundle, "ort-cpu", threads=2, memory_limit="off") as model:
        opening = peak_rss_bytes()
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again (Linux, proc(5))
        for _ in range(2):
            conversations = []
            for _ in range(case.batch):
                pictures = [
                    Image.fromarray(rng.integers(0, 256, (case.height, case.width, 3), dtype=np.uint8))
                    for _ in range(case.images)
                ]
                content: list[dict[str, Any]] = [
                    {"type": "image", "image": p, "max_pixels": case.width * case.height} for p in pictures
                ]
                content.append({"type": "text", "text": " ".join(["a"] * case.words)})
                conversations.append([{"role": "user", "content": content}])
            answers = model.generate_batch(conversations, max_new_tokens=case.new, eos_token_ids=(-1,), temperature=0)
    usage = answers[0].usage
    print(json.dumps(asdict(Measured(opening, peak_rss_bytes(), usage.prompt_tokens, usage.image_tokens))))


def measure(bundle: str, case: Case) -> Measured:
    """The case in a process of its own.

    Raises:
        InputError: it failed; says how.
    """
    code = f"from edgevl.benchmarks import memory as m; m._child({bundle!r}, m.{case!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if done.returncode:
        raise InputError(f"{bundle}, {case}: the run failed: {(done.stderr.strip().splitlines() or ['?'])[-1]}")
    return Measured(**json.loads(done.stdout))


def predict(bundle: Bundle, case: Case, measured: Measured) -> Plan:
    """The plan of a case; the measurement only tells how many tokens its words are."""
    patch = bundle.image_processor.patch_size
    grid = VisionGrid(1, case.height // patch, case.width // patch)
    text = measured.prompt_tokens - measured.image_tokens
    return Planner(bundle).plan([grid] * case.images, text, case.new, case.batch)


@click.command(
    help="Compare predicted with measured peak memory of BUNDLES; status 1 when one is off by more than 15 %."
)
@click.argument("bundles", nargs=-1, required=True)
@click.option("--case", "cases", multiple=True, metavar="WxH,IMAGES,WORDS,NEW,BATCH", help="Instead of the usual ones.")
@click.option("--json", "json_file", type=OutputFile(), help="Write every number to FILE.")
def main(bundles: tuple[str, ...], cases: tuple[str, ...], json_file: Path | None) -> None:
    try:
        chosen = [Case.parse(c) for c in cases or DEFAULT_CASES]
        opened = {name: Bundle.open(name) for name in bundles}
        for bundle in opened.values():
            for case in chosen:
                case.check_size(bundle.image_processor.factor)
        os.sync()
        rows, records = [], []
        for name, case in tqdm([(n, c) for n in bundles for c in chosen], file=sys.stderr, disable=None):
            measured = measure(name, case)
            plan = predict(opened[name], case, measured)
            pairs = [(measured.opening, plan.opening), (measured.answering, max(plan.picture, plan.answer))]
            numbers = [n for m, p in pairs for n in (m / 1e6, p / 1e6, 100 * (p / m - 1))]
            rows.append((Path(name).name, str(case), *numbers))
            records.append({"bundle": name, "case": asdict(case), "measured": asdict(measured), "plan": plan.to_dict()})
    except EdgeVLError as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(e.exit_status)
    headers = ("bundle", "case", "opening MB", "predicted", "error %", "answering MB", "predicted", "error %")
    formats = ("", "", ".0f", ".0f", "+.1f", ".0f", ".0f", "+.1f")
    print(tabulate(rows, headers=headers, tablefmt="simple", floatfmt=formats))
    off = [r for r in rows if max(abs(r[4]), abs(r[7])) > 100 * TOLERANCE]
    print(f"{len(rows) - len(off)} of {len(rows)} within {100 * TOLERANCE:.0f} %")
    if json_file is not None:
        write_output(json_file, json.dumps({"machine": machine(), "cases": records}, indent=1) + "\n")
    sys.exit(1 if off else 0)


if __name__ == "__main__":
    main()
