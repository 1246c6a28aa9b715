"""Benchmarks with odd arguments, and sensors that do not answer: one line, or a figure that is true."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
from click.testing import CliRunner
from conftest import Pair

from edgevl.benchmarks import check, gpu, guided, memory, profile, random_checkpoint, recipes
from edgevl.benchmarks.energy import EnergyMeter, Heat
from edgevl.benchmarks.report import SCHEMA, read_lines, write_lines
from edgevl.benchmarks.throttling import ClockWatch, throttled


def put(path: Path, text: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{text}\n")


def rails(root: Path, *channels: tuple[int, str, int, int]) -> Path:
    chip = root / "class/hwmon/hwmon4"
    put(chip / "name", "ina3221")
    for number, label, millivolts, milliamperes in channels:
        put(chip / f"in{number}_label", label)
        put(chip / f"in{number}_input", millivolts)
        put(chip / f"curr{number}_input", milliamperes)
    return chip


def joules_of(meter: EnergyMeter, seconds: float = 0.3) -> tuple[float | None, float]:
    began = time.monotonic()
    threading.Event().wait(seconds)
    return meter.read(), time.monotonic() - began


def test_the_sum_of_a_chips_currents_is_no_rail(tmp_path: Path) -> None:
    """docs.kernel.org/hwmon/ina3221: curr4 is the sum of the channels, in4 the µV over the first one's shunt; taken for
    a fourth rail they were 45 W that nobody used."""
    chip = rails(
        tmp_path, (1, "VDD_GPU_SOC", 5000, 2000), (2, "VDD_CPU_CV", 5000, 1000), (3, "VIN_SYS_5V0", 5000, 1500)
    )
    put(chip / "in4_input", 10_000)
    put(chip / "curr4_input", 4500)
    with EnergyMeter(tmp_path) as meter:
        assert meter.sources == ("rail VDD_GPU_SOC", "rail VDD_CPU_CV", "rail VIN_SYS_5V0")
        joules, seconds = joules_of(meter)
        assert joules == pytest.approx(22.5 * seconds, rel=0.2)


def test_a_channel_that_is_switched_off_is_no_source(tmp_path: Path) -> None:
    chip = rails(tmp_path, (1, "VDD_CPU", 5000, 1000), (2, "NC", 0, 0))
    (chip / "curr2_input").write_text("")  # as a read that fails
    with EnergyMeter(tmp_path) as meter:
        assert meter.sources == ("rail VDD_CPU",)


def test_a_sensor_that_is_busy_costs_nothing_but_its_reading(tmp_path: Path) -> None:
    """The others count on; a counter makes up for it, a rail by the watts of then. It failed a whole case."""
    chip = rails(tmp_path, (1, "VDD_A", 5000, 1000), (2, "VDD_B", 5000, 1000))
    zone = tmp_path / "class/powercap/intel-rapl:0"
    for name, text in (("name", "package-0"), ("energy_uj", 0), ("max_energy_range_uj", 10**9)):
        put(zone / name, text)
    with EnergyMeter(tmp_path) as meter:
        (chip / "curr1_input").write_text("")
        (zone / "energy_uj").write_text("")
        busy, seconds = joules_of(meter)
        assert busy == pytest.approx(5 * seconds, rel=0.2)  # of VDD_B alone
        put(chip / "curr1_input", 1000)
        put(zone / "energy_uj", 3_000_000)
        all_of_it, more = joules_of(meter)
        assert all_of_it == pytest.approx(10 * (seconds + more) + 3, rel=0.1)


def test_a_zone_whose_name_cannot_be_read_is_absent(tmp_path: Path) -> None:
    zone = tmp_path / "class/powercap/intel-rapl:0"
    put(zone / "energy_uj", 0)
    put(zone / "max_energy_range_uj", 10**9)
    meter = EnergyMeter(tmp_path)
    assert not meter.sources and "name" in meter.absent["RAPL"]


def test_a_count_that_was_not_read_before_is_no_throttling() -> None:
    """All that the processor had counted since it was started seemed to be of this run."""
    assert throttled(Heat(None, None, None), Heat(None, None, 900), ClockWatch((10**6,))) is None
    assert throttled(Heat(None, None, 890), Heat(None, None, 900), ClockWatch((10**6,))) == 10


def test_a_name_with_a_line_of_its_own_comes_back(tmp_path: Path) -> None:
    """Unicode has more ends of lines than files of JSON lines have."""
    cases = [{"schema": SCHEMA, "bundle": "a\u2028b\u0085c"}, {"schema": SCHEMA, "bundle": "d"}]
    write_lines(tmp_path / "lines.jsonl", cases)
    assert read_lines(tmp_path / "lines.jsonl") == cases


@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        (profile.main, ["--repeats", "0"]),
        (profile.main, ["--max-pixels", "-5"]),
        (profile.main, ["--threads", "0"]),
        (profile.main, ["--check", "-1"]),
        (profile.main, ["--seconds", "-1"]),
        (guided.main, ["--tokens", "0"]),
        (check.main, ["--size", "9000"]),
        (recipes.main, ["--cases", "0"]),
        (recipes.main, ["--samples", "0"]),
        (random_checkpoint.main, ["--seed", "-1"]),
        (random_checkpoint.main, ["--layers", "0"]),
    ],
)
def test_numbers_out_of_range_are_refused_by_name(command: object, arguments: list[str], tiny: Pair) -> None:
    place = [] if command is check.main else [str(tiny.bundle)]
    done = CliRunner().invoke(command, [*place, *arguments])  # type: ignore[arg-type]
    assert done.exit_code == 2 and arguments[0] in done.output and "is not in the range" in done.output


@pytest.mark.parametrize("name", ["", "gptq-int5", "int8+int9", "int8@r9"])
def test_a_recipe_that_is_unknown_is_told_of_before_anything_is_measured(name: str, tiny: Pair) -> None:
    done = CliRunner().invoke(recipes.main, [str(tiny.checkpoint), "--recipes", f"int8,{name}"])
    said = " ".join(done.output.split())
    assert done.exit_code == 2 and f"--recipes: {name!r}: " in said and "is unknown; expected one of" in said


def test_folders_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for command in (gpu.main, random_checkpoint.main):
        done = CliRunner().invoke(command, [str(tmp_path / "file" / "out")])
        assert done.exit_code == 2 and "Not a directory" in done.output and done.output.count("rror") == 1


@pytest.mark.parametrize(
    ("case", "said"),
    [
        ("240x240,1,40,8,1", "expected width and height to be multiples of 28"),
        ("0x0,1,40,8,1", "expected width and height to be multiples of 28"),
        ("224x224,-1,40,8,1", "expected 0 or more IMAGES, and WORDS, NEW and BATCH of at least 1"),
        ("224x224,1,40,8,0", "expected 0 or more IMAGES, and WORDS, NEW and BATCH of at least 1"),
        ("224x224,1,40", "expected WIDTHxHEIGHT,IMAGES,WORDS,NEW,BATCH"),
    ],
)
def test_memory_cases_that_would_be_compared_with_others(case: str, said: str, tiny: Pair) -> None:
    """A picture of 240 × 240 is resized, and what was predicted for it was of another."""
    done = CliRunner().invoke(memory.main, [str(tiny.bundle), "--case", case])
    assert done.exit_code == 2 and said in done.stderr and done.stderr.count("\n") == 1
