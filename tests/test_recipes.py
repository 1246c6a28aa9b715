"""The recipe table: conversations that calibration reads, and a whole run on few cases."""

from __future__ import annotations

import json
from pathlib import Path

from click.testing import CliRunner

from edgevl.benchmarks.recipe_speed import DECODERS, VISIONS, Speeds
from edgevl.benchmarks.recipes import RECIPES, main, parts, write_conversations
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


def test_table(tmp_path: Path) -> None:
    given = ["--samples", "12", "--cases", "4", "--recipes", "rtn-int4,hybrid,w8a8,none+int8"]
    done = CliRunner().invoke(main, [str(DEMO), *given, "--speed", str(DEMO), "--bundles", str(tmp_path)])
    assert done.exit_code == 0, done.output
    lines = [line for line in done.output.splitlines() if line.startswith("|")]  # notes go to the same place here
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[2:7]]
    assert [row[0] for row in cells] == ["fp32", "rtn-int4", "hybrid", "w8a8", "none+int8"]
    kl = [float(row[3]) for row in cells[1:]]
    assert kl[0] > kl[1] > kl[2] > 0 and kl[0] > kl[3] > 0 and "48 cases" in done.output
    assert float(cells[2][2]) > float(cells[1][2])  # hybrid holds the decoder twice
    speeds = [row[8:] for row in cells]
    assert speeds[0] == ["", "", ""] and speeds[4][1:] == ["", ""]
    assert all(float(value) >= 0 for row in speeds[1:4] for value in row) and float(speeds[4][0]) >= 0
    assert float(speeds[1][2]) > 0
    assert {p.name for p in tmp_path.iterdir()} == {"int4", "hybrid", "w8a8", "vision-fp32"}


def test_speeds_are_of_the_formats_that_a_recipe_leads_to() -> None:
    times = {name: float(i) for i, name in enumerate(sorted({*DECODERS.values(), *VISIONS.values()}))}
    speeds = Speeds(times, times, times, "")
    assert speeds.row("gptq-int4", "none") == (
        f"{times['vision-fp32']:.2f}",
        f"{times['int4']:.2f}",
        f"{times['int4']:.1f}",
    )
    assert speeds.row("w8a8-static", "int8-static")[0] == f"{times['w8a8-static']:.2f}"
    assert speeds.row("none", "int8")[1:] == ("", "")
    assert {parts(name)[0] for name in RECIPES} - {"none"} == set(DECODERS)
    assert {parts(name)[1] for name in RECIPES} == set(VISIONS)
    assert parts("w8a8-static+int8-static") == ("w8a8-static", "int8-static", "")
    assert parts("gptq-int4@r1+r2") == ("gptq-int4", "none", "r1+r2")


def test_an_unknown_recipe_is_named() -> None:
    done = CliRunner().invoke(main, [str(DEMO), "--samples", "8", "--cases", "1", "--recipes", "magic"])
    assert done.exit_code == 2 and "recipe 'magic' is unknown" in done.output and "Traceback" not in done.output
