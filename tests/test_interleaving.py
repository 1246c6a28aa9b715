"""benchmarks/interleaving.py on the demo model: what it measures is what happens."""

from __future__ import annotations

from pathlib import Path

import pytest
from checkpoints import DEMO
from click.testing import CliRunner
from native_oracle import usable_library

from edgevl.benchmarks.interleaving import Overtaking, Turn, main, measure, measure_overtaking
from edgevl.export.exporter import ExportOptions, export_bundle
from edgevl.runtime import VisionLanguageModel
from edgevl.runtime import pauses as pauses_module
from edgevl.runtime.errors import InputError


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    usable_library()
    folder = tmp_path_factory.mktemp("interleaving") / "bundle"
    export_bundle(DEMO, folder, ExportOptions(precision="int8"))
    return folder


def test_steps_come_in_turns_with_pauses_alone(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pauses_module, "PASS_SHARE", 0)
    with VisionLanguageModel.open(bundle, "ort-cpu", threads=1, image_cache_mb=0) as model:
        turns = measure(model, (224, 224), answers=2, turns=2)
    assert [t.interleaved for t in turns] == [False, True] * 2
    assert [t.steps > 0 for t in turns] == [False, True] * 2
    assert all(t.gap_s > t.first_token_s for t in turns if not t.interleaved)  # they waited for all of it
    assert all(t.gap_s > 0 for t in turns)


def test_a_text_overtakes_in_its_turns_alone(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pauses_module, "PASS_SHARE", 0)
    with VisionLanguageModel.open(bundle, "ort-cpu", threads=1, image_cache_mb=0) as model:
        turns = measure_overtaking(model, (224, 224), turns=2)
    assert [t.overtakes for t in turns] == [False, True] * 2
    assert all(t.text_first == t.overtakes for t in turns)


def test_answers_that_end_too_soon_are_told_of(bundle: Path) -> None:
    with (
        VisionLanguageModel.open(bundle, "ort-cpu", threads=1, image_cache_mb=0, capacity=420) as model,
        pytest.raises(InputError, match="have ended: fewer turns"),
    ):
        measure(model, (224, 224), answers=1, turns=20)


def test_the_table(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def measured(*_: object) -> list[Turn]:
        return [Turn(False, 2.0, 0, 2.1), Turn(True, 3.0, 10, 0.21), Turn(False, 4.0, 0, 4.2), Turn(True, 4.0, 12, 2.1)]

    monkeypatch.setattr("edgevl.benchmarks.interleaving.measure", measured)
    overtaking = [
        Overtaking(False, 2.0, 3.0, False),
        Overtaking(True, 1.0, 3.6, True),
        Overtaking(False, 4.0, 5.0, False),
    ]
    monkeypatch.setattr(
        "edgevl.benchmarks.interleaving.measure_overtaking", lambda *_: [*overtaking, Overtaking(True, 1.0, 5.0, True)]
    )
    result = CliRunner().invoke(main, [str(bundle)])
    assert result.exit_code == 0, result.output
    rows = [" ".join(line.split()) for line in result.stdout.splitlines()]
    assert rows[3:6] == [
        "one after the other 3.15 (2.10–4.20) 3.00 (2.00–4.00) 0 (0–0)",
        "steps in the pauses 1.16 (0.21–2.10) 3.50 (3.00–4.00) 11 (10–12)",
        "ratio 0.30 (0.10–0.50) 1.25 (1.00–1.50)",
    ]
    assert rows[10:] == [
        "in order 3.00 (2.00–4.00) 4.00 (3.00–5.00)",
        "the text overtakes 1.00 (1.00–1.00) 4.30 (3.60–5.00)",
        "ratio 0.38 (0.25–0.50) 1.10 (1.00–1.20)",
    ]


def test_no_bundle_is_one_line_and_status_2(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, [str(tmp_path)])
    assert result.exit_code == 2 and result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
