"""Measure how fast this machine runs one bundle, for `edgevl run --ttft-budget`; and check what it then promises.

Method: pictures of noise of growing size go through load, resize and the vision encoder, random prompts of growing
length through prefill; every point is the median of `--repeats` runs after one that is thrown away (the first touches
memory). Sizes stop growing when `--seconds` are spent, never before four. The file goes where the runtime looks for
it (or to `--output`). `--check N` then asks N questions about pictures of other sizes with a budget of half of
what the largest takes, and counts how many first tokens come within 20 % of it.

    python -m edgevl.benchmarks.profile BUNDLE [--max-pixels N] [--check 10]
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
from PIL import Image
from tabulate import tabulate

from edgevl.runtime import VisionLanguageModel
from edgevl.runtime.errors import EdgeVLError, InputError
from edgevl.runtime.output_file import check_output_file
from edgevl.runtime.preflight import picture_of
from edgevl.runtime.profile import Profile, bundle_id, profile_path
from edgevl.runtime.prompt import VisionInput
from edgevl.runtime.ttft import machine_of

__all__ = ["check", "main", "measure_profile"]

DEFAULT_MAX_PIXELS = 1_003_520  # 1,280 image tokens
_SHARES = (0.02, 0.06, 0.12, 0.25, 0.5, 1.0)  # of the largest size
_LEAST_POINTS = 4
TOLERANCE = 0.2


def _median(repeats: int, work: Callable[[], object]) -> float:
    work()
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def _noise(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def measure_profile(
    model: Any, max_pixels: int = DEFAULT_MAX_PIXELS, repeats: int = 3, seconds: float = 120.0
) -> Profile:
    """Points of all three stages on an open model.

    Raises:
        InputError: a limit below one tile.
    """
    processor, rng = model.bundle.image_processor, np.random.default_rng(0)
    stage, most = model._vision, min(max_pixels, processor.max_pixels)
    least = max(processor.min_pixels, processor.factor**2)
    sizes = sorted({picture_of(max(least, int(most * share)), processor.factor) for share in _SHARES})
    started = time.perf_counter()
    picture, vision, prefill = [], [], []
    for count, (height, width) in enumerate(sizes):
        if count >= _LEAST_POINTS and time.perf_counter() - started > seconds * 0.7:
            break
        for scale in (1, 2, 3):  # sources of 1, 4 and 9 times the pixels
            source = VisionInput("image", _noise(rng, width * scale, height * scale), {"max_pixels": width * height})
            spent = _median(repeats, lambda item=source: stage.preprocess(item))
            picture.append((width * height * scale**2, width * height, spent))
        processed = stage.preprocess(source)
        vision.append((processed.grid.patches, _median(repeats, lambda p=processed: stage.run(p))))
    tokens = model.config.tokens
    longest = min(model.capacity - 1, most // processor.factor**2 + 256)
    for count, length in enumerate(sorted({max(8, int(longest * share)) for share in _SHARES})):
        if count >= _LEAST_POINTS and time.perf_counter() - started > seconds:
            break
        ids = rng.integers(0, min(256, model.config.text.vocab_size), length)
        ids = np.where(np.isin(ids, (tokens.image_token_id, tokens.video_token_id)), 0, ids)
        positions = np.broadcast_to(np.arange(length), (3, length))
        prefill.append((length, _median(repeats, lambda i=ids, p=positions: model.decoder().prefill(0, i, p))))
    profile = Profile(bundle_id(model.bundle), machine_of(model.engine), tuple(picture), tuple(vision), tuple(prefill))
    if min(len(profile.vision), len(profile.prefill)) < 3:
        raise InputError(f"max_pixels {max_pixels} leaves too few sizes to measure; give more")
    return profile


def check(model: Any, profile: Profile, count: int, max_pixels: int, budget_s: float | None = None) -> list[Any]:
    """Rows (picture, budget, max_pixels chosen, predicted, measured, error) of `count` questions."""
    rng = np.random.default_rng(1)
    processor = model.bundle.image_processor
    if budget_s is None:
        patches = max(p[0] for p in profile.vision)
        tokens = patches // (processor.factor // processor.patch_size) ** 2
        whole = profile.seconds("vision", patches) + profile.seconds("prefill", tokens + 32)
        budget_s = (whole + profile.seconds("picture", 3 * max_pixels, max_pixels)) / 2
    rows = []
    for i in range(-1, count):  # the first one warms up
        ratio = float(np.exp(rng.uniform(-0.7, 0.7)))
        area = max_pixels * float(rng.uniform(1.0, 4.0))
        image = _noise(rng, int((area * ratio) ** 0.5), int((area / ratio) ** 0.5))
        content = [{"type": "image", "image": image}, {"type": "text", "text": "What is this?"}]
        messages = [{"role": "user", "content": content}]
        began = time.perf_counter()
        choice = model.choose_pixels(messages, budget_s, profile, began)
        answer = model.generate(choice.messages, max_new_tokens=1, started=began)
        spent = answer.timings.first_token_s
        if i >= 0:
            rows.append((f"{image.width}×{image.height}", budget_s * 1e3, choice.max_pixels, choice.predicted_s * 1e3,
                         spent * 1e3, 100 * (spent / budget_s - 1)))  # fmt: skip
    return rows


@click.command(help="Measure this machine's speed with BUNDLE, for edgevl run --ttft-budget.")
@click.argument("bundle")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="[default: where the runtime looks for it]")
@click.option(
    "--max-pixels", type=click.IntRange(1), default=DEFAULT_MAX_PIXELS, show_default=True, help="Largest picture."
)
@click.option("--repeats", type=click.IntRange(1), default=3, show_default=True)
@click.option(
    "--seconds", type=click.FloatRange(0), default=120.0, show_default=True, help="Stop growing after so long."
)
@click.option("--threads", type=click.IntRange(1), help="As for edgevl run [default: the cores this process may use].")
@click.option(
    "--check",
    "questions",
    type=click.IntRange(1),
    metavar="N",
    help="Then ask N questions; status 1 under 9 of 10 right.",
)
def main(
    bundle: str, output: Path | None, max_pixels: int, repeats: int, seconds: float, threads: int | None,
    questions: int | None,
) -> None:  # fmt: skip
    try:
        if output is not None and output.parent.is_dir():  # another is made
            check_output_file(output, "a JSON file")
        with VisionLanguageModel.open(bundle, "ort-cpu", threads=threads) as model:
            profile = measure_profile(model, max_pixels, repeats, seconds)
            path = output or profile_path(model.bundle, profile.machine)
            profile.save(path)
            rows = check(model, profile, questions, max_pixels) if questions else []
    except EdgeVLError as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(e.exit_status)
    measured = [(stage, "×".join(f"{n:,.0f}" for n in p[:-1]), p[-1] * 1e3, profile.seconds(stage, *p[:-1]) * 1e3)
                for stage in ("picture", "vision", "prefill") for p in getattr(profile, stage)]  # fmt: skip
    print(tabulate(measured, headers=("stage", "size", "measured ms", "fit ms"), floatfmt=".1f"))
    print(f"wrote {path}")
    if rows:
        headers = ("picture", "budget ms", "max_pixels", "predicted ms", "measured ms", "error %")
        print(tabulate(rows, headers=headers, floatfmt=("", ".0f", "", ".0f", ".0f", "+.0f")))
        good = sum(abs(r[-1]) <= 100 * TOLERANCE for r in rows)
        print(f"{good} of {len(rows)} within {100 * TOLERANCE:.0f} % of the budget")
        sys.exit(0 if good >= 0.9 * len(rows) else 1)


if __name__ == "__main__":
    main()
