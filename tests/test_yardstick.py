"""That the yardstick measures: the bundle says what transformers says, and what harms a model lowers its scores.

All through the real runtime on the demo model, on held-out cases; `value` (1 - character error, IoU) moves smoothly, so
few cases tell much.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from demo.training import export as training_export
from demo.training.answer import load
from demo.training.evaluate import rounded, transformers_answers
from edgevl.export.exporter import ExportOptions, export_bundle
from edgevl.runtime import VisionLanguageModel, generation, image_processing
from edgevl.runtime.mrope import Positions
from edgevl.tasks import TASKS, Case, answer_cases, score_bundle, summarize
from edgevl.tasks.__main__ import main

DEMO = Path(__file__).parents[1] / "demo" / "model"
READING = ("read_1_line", "read_2_lines", "receipt_total")

Bundles = Callable[..., Path]


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Bundles:
    """bundles(precision, checkpoint=..., **options): the demo model exported, once for equal arguments."""
    made: dict[str, Path] = {}

    def make(precision: str = "fp32", checkpoint: Path = DEMO, **options: Any) -> Path:
        key = repr((precision, checkpoint, options))
        if key not in made:
            made[key] = tmp_path_factory.mktemp("bundles") / "b"
            export_bundle(checkpoint, made[key], ExportOptions(precision=precision, **options))
        return made[key]

    return make


def cases_of(tasks: Sequence[str], each: int, seed: int = 0) -> list[Case]:
    return [case for task in tasks for case in TASKS[task].cases("test", each, seed)]


def value(bundle: Path, cases: list[Case]) -> float:
    """Mean value of a bundle's answers."""
    with VisionLanguageModel.open(bundle, "ort-cpu", threads=1) as model:
        return float(np.mean([a.score.value for a in answer_cases(model, cases)]))


def test_the_fp32_bundle_scores_what_transformers_scores(bundles: Bundles) -> None:
    """Case by case, all tasks; videos under the position rule of the transformers that is installed."""
    cases = [c for c in cases_of(list(TASKS), 3, seed=5) if not c.video]
    videos = cases_of(["motion"], 3, seed=5)
    said = []
    for bundle, some in ((bundles(), cases), (bundles(mrope_rule="transformers-5"), videos)):
        with VisionLanguageModel.open(bundle, "ort-cpu", threads=1) as model:
            said += [(a.case.task, a.case.index, a.text, a.score) for a in answer_cases(model, some)]
    theirs = transformers_answers(DEMO, cases + videos)
    expected = [(c.task, c.index, t, TASKS[c.task].score(t, c)) for c, t in zip(cases + videos, theirs)]
    assert said == expected


def test_batches_and_processes_change_no_score(bundles: Bundles) -> None:
    names = ["read_1_line", "where", "motion"]
    cases = cases_of(names, 10)
    with VisionLanguageModel.open(bundles(), "ort-cpu", threads=1) as model:
        alone, together = answer_cases(model, cases, batch=1), answer_cases(model, cases, batch=7)
    apart = score_bundle(bundles(), names, 10, processes=2)
    texts = [a.text for a in alone]
    assert texts == [a.text for a in together] == [a.text for a in apart]
    rows = summarize(apart)
    assert [r.task for r in rows] == names and all(r.n == 10 for r in rows)
    assert rows[0].right == sum(a.score.correct for a in alone[:10]) / 10
    assert rows[0].value == pytest.approx(np.mean([a.score.value for a in alone[:10]]))


@pytest.mark.parametrize(("precision", "most"), [("int8", 0.02), ("int8-weights", 0.02), ("int4", 0.06)])
def test_precisions_keep_the_scores(bundles: Bundles, precision: str, most: float) -> None:
    """What a precision may cost of the mean value; a wrong kernel costs most of it."""
    cases = cases_of([t for t in TASKS if t != "motion"], 16)
    assert value(bundles(), cases) - value(bundles(precision), cases) < most


def test_fewer_bits_lower_the_scores(bundles: Bundles, tmp_path: Path) -> None:
    """Every bit less costs answers; at three bits many, at two nearly all."""
    cases = cases_of(READING, 40)
    values, right = [], []
    for bits in (16, 4, 3, 2):
        folder = DEMO
        if bits < 16:
            folder = tmp_path / f"{bits}"
            training_export.export(dict(rounded(load(DEMO), bits, 128).state_dict()), folder)
        with VisionLanguageModel.open(bundles(checkpoint=folder), "ort-cpu", threads=1) as model:
            scores = [a.score for a in answer_cases(model, cases)]
        values.append(float(np.mean([s.value for s in scores])))
        right.append(float(np.mean([s.correct for s in scores])))
    assert values[0] > values[1] > values[2] > values[3], values
    assert right[0] - right[2] > 0.08 and right[3] < 0.1, right


def test_plain_positions_lower_the_scores(bundles: Bundles, monkeypatch: pytest.MonkeyPatch) -> None:
    """A runtime that counts picture tokens like text reads and finds nothing."""
    cases = cases_of(["read_2_lines", "where", "two_pictures"], 12)
    right = value(bundles(), cases)

    def plain(ids: np.ndarray, *_: Any) -> Positions:
        return Positions(np.tile(np.arange(len(ids)), (3, 1)), len(ids), len(ids))

    monkeypatch.setattr(generation, "position_ids", plain)
    assert value(bundles(), cases) < right - 0.3


def test_the_resize_filter_shows(bundles: Bundles, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shrinking without anti-aliasing, as many runtimes do, costs answers on large pictures."""
    cases = cases_of(["read_reduced"], 160)
    right = value(bundles(), cases)

    def resize(self: Image.Image, size: tuple[int, int], *_: Any, **__: Any) -> Image.Image:
        pixels = torch.from_numpy(np.array(self)).permute(2, 0, 1)[None].float()
        small = torch.nn.functional.interpolate(pixels, (size[1], size[0]), mode="bilinear", antialias=False)
        return Image.fromarray(small[0].permute(1, 2, 0).round().to(torch.uint8).numpy())

    monkeypatch.setattr(image_processing.Image.Image, "resize", resize)
    assert value(bundles(), cases) < right - 0.03


def test_command_line(bundles: Bundles, tmp_path: Path) -> None:
    out = tmp_path / "scores.json"
    done = CliRunner().invoke(main, [str(bundles()), "--cases", "3", "--tasks", "colour,count", "--json", str(out)])
    assert done.exit_code == 0 and "colour" in done.output and "mean" in done.output and '"right"' in out.read_text()
    done = CliRunner().invoke(main, [str(bundles()), "--tasks", "colour,juggling"])
    assert done.exit_code == 2 and "task 'juggling' is unknown" in done.output
    done = CliRunner().invoke(main, [str(tmp_path / "absent")])
    assert done.exit_code == 2 and "no such folder" in done.output and "Traceback" not in done.output
