"""The recipe table: conversations that calibration reads, and a whole run on few cases."""

from __future__ import annotations

import json
from pathlib import Path

from click.testing import CliRunner

from edgevl.benchmarks.recipes import main, write_conversations
from edgevl.calibration.dataset import SampleSource, read_conversations
from edgevl.tasks import TASKS

DEMO = Path(__file__).parents[1] / "demo" / "model"


def test_conversations_are_read_back(tmp_path: Path) -> None:
    path = write_conversations(tmp_path, 24)
    conversations = read_conversations(path)
    assert len(conversations) == 24 == len(path.read_text().splitlines())
    samples = SampleSource(DEMO).samples(conversations, 24, least=24)
    assert sum(len(s.vision) for s in samples) == 26  # one each, and two for two_pictures
    case = TASKS["motion"].case("calibration", 0)
    assert json.loads(path.read_text().splitlines()[11])[1]["content"] == case.truth


def test_table() -> None:
    done = CliRunner().invoke(
        main, [str(DEMO), "--samples", "12", "--cases", "4", "--recipes", "rtn-int4,w8a8,none+int8"]
    )
    assert done.exit_code == 0, done.output
    lines = [line for line in done.output.splitlines() if line.startswith("|")]  # notes go to the same place here
    assert [line.split("|")[1].strip() for line in lines[2:6]] == ["fp32", "rtn-int4", "w8a8", "none+int8"]
    kl = [float(line.split("|")[4]) for line in lines[3:6]]
    assert kl[0] > kl[1] > 0 and kl[0] > kl[2] > 0 and "48 cases" in done.output


def test_an_unknown_recipe_is_named() -> None:
    done = CliRunner().invoke(main, [str(DEMO), "--samples", "8", "--cases", "1", "--recipes", "magic"])
    assert done.exit_code == 1 and "recipe 'magic' is unknown" in done.output and "Traceback" not in done.output
