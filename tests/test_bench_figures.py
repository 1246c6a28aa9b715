"""Figures of `edgevl bench` held against what they should be: sizes, seconds, joules, clocks; and its options."""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from conftest import MakePair, Pair

from edgevl.benchmarks import commands, device_memory, stages, system_info
from edgevl.benchmarks.bundle_names import bundle_labels, find_bundle
from edgevl.benchmarks.cases import energy, throttled_in
from edgevl.benchmarks.device_memory import DeviceMemory, absences
from edgevl.benchmarks.energy import EnergyMeter, Heat
from edgevl.benchmarks.report import read_lines
from edgevl.benchmarks.request_size import prompt_tokens
from edgevl.benchmarks.roofline import Ceilings
from edgevl.benchmarks.stages import Job, Runner, StageClock, run_job
from edgevl.benchmarks.throttling import ClockWatch, throttled
from edgevl.benchmarks.workloads import Workload
from edgevl.runtime import VisionLanguageModel
from edgevl.runtime.bundle import Bundle
from edgevl.runtime.cli import run
from edgevl.runtime.errors import InputError

SMALL = ("--size", "56x56", "--new-tokens", "2", "--requests", "1", "--rounds", "1", "--threads", "1")


def put(path: Path, text: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{text}\n")


# ---------------------------------------------------------------- sizes


@pytest.fixture(scope="module")
def released(tiny: Pair, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with the released limits of pixels: those of a video's frames are others."""
    folder = tmp_path_factory.mktemp("released") / "bundle"
    shutil.copytree(tiny.bundle, folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["image_processor"] |= {"min_pixels": 3136, "max_pixels": 12845056}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


@pytest.mark.parametrize(
    ("changes", "tokens"),
    [
        ({"frames": 4}, 2 * 10 * 14),  # 320×240 is raised to 128 tokens a pair; pictures of that size have 9 × 11
        ({"frames": 1}, 10 * 14),
        ({"frames": 5, "width": 448, "height": 448}, 3 * 16 * 16),
        ({"frames": 40}, None),  # more than the cache holds: fitted
        ({"frames": 12, "pictures": 2}, None),
        ({"frames": 80, "prompt_tokens": 1700}, None),  # frames are dropped
    ],
)
def test_a_video_has_the_runtimes_tokens(released: Path, changes: dict[str, int], tokens: int | None):
    """The same frames in a message, as `edgevl run --video` sends them: same prompt, same features; and what the check
    before a measurement counts."""
    work = Workload("w", **{"width": 320, "height": 240, "pictures": 0, "new_tokens": 8, **changes})
    with VisionLanguageModel.open(released, "ort-cpu", threads=2) as model:
        runner = Runner(model, Job(str(released), work))
        pictures, frames = runner.files(3)
        got = runner.prompt(pictures, frames, StageClock())
        content: list[dict[str, Any]] = [{"type": "image", "image": p} for p in pictures]
        content += [{"type": "video", "video": frames}, {"type": "text", "text": runner._text}]
        expected = model.prepare([{"role": "user", "content": content}], work.new_tokens)
    assert got.image_tokens == expected.image_tokens and tokens in (None, got.image_tokens)
    np.testing.assert_array_equal(got.ids, expected.ids)
    np.testing.assert_array_equal(got.positions, expected.positions)
    for a, b in zip(got.images, expected.images, strict=True):
        assert a.grid == b.grid and a.resized_size == b.resized_size
        np.testing.assert_allclose(np.asarray(a.embeds), np.asarray(b.embeds), atol=1e-5)
    assert prompt_tokens(Bundle.open(released), work, 2048) == len(expected.ids)


def test_a_requests_grids_are_those_of_its_pictures_and_its_video(released: Path):
    """The vision encoder's operations are counted over them."""
    work = Workload("w", 112, 84, pictures=2, frames=6, new_tokens=1, concurrency=2)
    done = run_job(Job(str(released), work, threads=1, requests=1)).requests[0]
    video = done.grids[-1]
    assert done.grids == [[1, 6, 8], [1, 6, 8], [3, 20, 28]] and video[1] * video[2] // 4 >= 128
    assert done.image_tokens == 2 * sum(t * h * w // 4 for t, h, w in done.grids)


# ---------------------------------------------------------------- seconds


def test_what_a_benchmark_makes_for_itself_is_no_part_of_the_cold_start(tiny: Pair, monkeypatch):
    """Pictures that take 1.5 s each to make, twice, and a question that takes 1 s."""
    real, asked = Workload.picture, stages.question

    def slowly(call: Callable[..., Any], seconds: float) -> Callable[..., Any]:
        def slow(*arguments: Any) -> Any:
            time.sleep(seconds)
            return call(*arguments)

        return slow

    monkeypatch.setattr(Workload, "picture", slowly(real, 1.5))
    monkeypatch.setattr(stages, "question", slowly(asked, 1.0))
    began = time.time()
    done = run_job(Job(str(tiny.bundle), Workload("w", 56, 56, new_tokens=2), threads=1, requests=1, spawned=began))
    assert 0 < done.open_s < done.cold_s <= time.time() - began - 4.0
    assert done.requests[0].total_s < 1.5


def test_every_row_of_a_group_has_a_first_token_of_its_own(tiny: Pair):
    work = Workload("w", 56, 56, new_tokens=2, concurrency=3)
    for r in run_job(Job(str(tiny.bundle), work, threads=1, requests=2)).requests:
        assert len(set(r.ttft_s)) == 3 and r.ttft_s == sorted(r.ttft_s)
        before = sum(v for k, v in r.stages.items() if k != "prefill_s")
        assert before < r.ttft_s[0] and r.ttft_s[-1] == pytest.approx(sum(r.stages.values()), abs=2e-2)


# ---------------------------------------------------------------- energy, clocks, memory


def test_joules_per_token_are_those_of_the_tokens_behind_the_first_ones():
    """Two groups of three rows, 5 and 7 new tokens a row: 12 and 18 tokens were decoded, 90 joules went into them."""
    rounds = [{"energy_sources": ["rapl"], "absent": {}}]
    requests = [
        {"joules": 50.0, "joules_before_decode": 20.0, "new_tokens": 15},
        {"joules": 100.0, "joules_before_decode": 40.0, "new_tokens": 21},
        {"joules": None, "joules_before_decode": None, "new_tokens": 15},
    ]
    found = energy(rounds, requests, Workload("w", pictures=2, concurrency=3))
    assert (found["j_per_request"], found["j_before_first_token"]) == (75.0, 30.0)
    assert found["j_per_token"] == 90 / 30 and found["j_per_picture"] == 60 / 12
    text = energy(rounds, requests, Workload("w", pictures=0, frames=4, concurrency=3))
    assert text["j_per_picture"] is None and text["j_per_token"] == 3
    alone = [{"joules": 5.0, "joules_before_decode": 5.0, "new_tokens": 1}]
    assert energy(rounds, alone, Workload("w"))["j_per_token"] is None
    nothing = energy(rounds, requests[2:], Workload("w"))
    assert {nothing[k] for k in ("j_per_request", "j_before_first_token", "j_per_token", "j_per_picture")} == {None}


def _clocks(root: Path, core: int, now: int, most: int | None, hardware: int = 2_000_000) -> None:
    folder = root / f"devices/system/cpu/cpu{core}/cpufreq"
    put(folder / "scaling_cur_freq", now)
    put(folder / "cpuinfo_max_freq", hardware)
    if most is not None:
        put(folder / "scaling_max_freq", most)


@pytest.mark.parametrize(
    ("clocks", "most", "low"),
    [
        ((1_900_000, 1_900_000), 2_000_000, False),
        ((1_700_000, 1_750_000), 2_000_000, True),
        ((600_000, 1_900_000), 2_000_000, False),  # a core that waits
        ((1_350_000, 1_350_000), 1_400_000, False),  # all that the power mode allows
        ((1_350_000, 1_350_000), None, True),  # no such limit: the hardware's
    ],
)
def test_clocks_that_stay_low_under_load_are_throttling(tmp_path: Path, clocks, most, low):
    for core, now in enumerate(clocks):
        _clocks(tmp_path, core, now, most)
    _clocks(tmp_path, 2, 100_000, 2_000_000)  # a core that is not in use
    watch = ClockWatch((0, 1), tmp_path, 0.01)
    assert watch.low is None
    with watch.loaded():
        time.sleep(0.2)
    uncounted = Heat(None, None, None)
    assert watch.low is low and throttled(uncounted, uncounted, watch) is low
    # where the processor counts, its count stands
    assert throttled(Heat(None, None, 4), Heat(None, None, 9), watch) == 5


def test_a_limit_that_falls_with_the_heat_hides_nothing(tmp_path: Path):
    """What is allowed is read at the start."""
    _clocks(tmp_path, 0, 2_000_000, 2_000_000)
    watch = ClockWatch((0,), tmp_path, 0.01)
    _clocks(tmp_path, 0, 1_000_000, 1_000_000)
    with watch.loaded():
        time.sleep(0.2)
    assert watch.low is True


def test_clocks_are_sampled_under_load_only_and_most_samples_decide(tmp_path: Path):
    _clocks(tmp_path, 0, 2_000_000, 2_000_000)
    watch = ClockWatch((0,), tmp_path, 60)  # one sample at the end of each block
    for number in range(9):
        _clocks(tmp_path, 0, 1_000_000 if number < 4 else 1_950_000, 2_000_000)
        with watch.loaded():
            pass
        _clocks(tmp_path, 0, 300_000, 2_000_000)  # between them it idles
        assert watch.low is (None if number < 4 else 2 * min(number + 1, 4) > number + 1)
    assert watch.low is False
    nothing = ClockWatch((0,), tmp_path / "absent", 0.01)
    with nothing.loaded():
        time.sleep(0.1)
    assert nothing.low is None and "throttling" in absences(DeviceMemory("ort-cpu"), nothing.low)


@pytest.mark.parametrize(
    ("told", "expected"),
    [([None, None], None), ([2, 0, 3], 5), ([False, None, True], True), ([False, False], False), ([0, 0], 0)],
)
def test_throttling_over_rounds(told: list[Any], expected: Any):
    found = throttled_in([{"throttled": t} for t in told])
    assert found == expected and type(found) is type(expected)


def test_the_gpus_peak_is_the_largest_that_was_seen(monkeypatch):
    used = iter((3e9, 5e9, 4e9))
    monkeypatch.setattr(device_memory, "gpu_used", lambda: next(used))
    memory = DeviceMemory("tensorrt")
    for _ in range(3):
        memory.look()
    assert memory.peak_mb == 5000 and "GPU memory" not in absences(memory, 0)
    monkeypatch.setattr(device_memory, "gpu_used", lambda: None)
    for engine, reason in (("ort-cuda", "CUDA's runtime library"), ("ort-cpu", "the engine ort-cpu uses no GPU")):
        memory = DeviceMemory(engine)
        memory.look()
        assert memory.peak_mb is None and absences(memory, 0)["GPU memory"].startswith(reason)


def test_a_driver_without_a_gpu_is_said_to_be_absent(tmp_path: Path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", SimpleNamespace(nvmlInit=lambda: None, nvmlDeviceGetCount=lambda: 0))
    with EnergyMeter(tmp_path) as meter:
        assert meter.sources == () and meter.absent["NVML"] == "no NVIDIA GPU is found"


def test_the_load_is_read_before_anything_adds_to_it(tiny: Pair, monkeypatch):
    order: list[str] = []

    def step(name: str, result: Any) -> Callable[..., Any]:
        def called(*_: Any) -> Any:
            order.append(name)
            return result

        return called

    monkeypatch.setattr(system_info.os, "getloadavg", step("load", (1.234, 0, 0)))
    monkeypatch.setattr(system_info, "_gpus", step("gpus", []))
    monkeypatch.setattr(commands, "_keep_profile", step("profile", None))
    monkeypatch.setattr(commands, "measure_ceilings", step("ceilings", Ceilings(1.0, {"int8": 1.0}, {})))
    monkeypatch.setattr(commands, "measure_all", step("cases", ([[]], [])))
    assert run(["bench", str(tiny.bundle), "--profile", *SMALL]) == 0
    assert order == ["load", "gpus", "profile", "ceilings", "cases"]
    assert system_info.system_info(1)["load_before"] == 1.23


# ---------------------------------------------------------------- names of bundles


def test_labels_are_the_shortest_that_tell_apart(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert bundle_labels(["int4", "x/int8"]) == ["int4", "int8"]
    assert bundle_labels(["A/m", "B/m", "B/n"]) == ["A/m", "B/m", "n"]
    assert bundle_labels(["A/x/m", "B/x/m"]) == ["A/x/m", "B/x/m"]
    assert bundle_labels([".", "m"]) == [tmp_path.name, "m"]
    for pair in (["m", "./m"], ["m", "A/../m"]):
        with pytest.raises(InputError, match="the same bundle twice"):
            bundle_labels(pair)
    bundles = ["A/m", "B/m", "n"]
    assert [find_bundle(n, bundles) for n in ("A/m", str(tmp_path / "B/m"), "n", "./B/m")] == [0, 1, 2, 1]
    for name, problem in (
        ("m", "2 of the bundles are called 'm'"),
        ("q", "no bundle is called 'q'"),
        ("", "no bundle"),
    ):
        with pytest.raises(InputError, match=f"{problem}.*expected one of A/m, B/m, n"):
            find_bundle(name, bundles)


def test_bundles_with_one_name_keep_their_own_figures(tiny: Pair, make_pair: MakePair, tmp_path: Path, capsys):
    """Two folders `m`: each has its own precision, its own fidelity, and its name in the table."""
    for folder, pair in (("A", tiny), ("B", make_pair("int4"))):
        shutil.copytree(pair.bundle, tmp_path / folder / "m")
        (tmp_path / f"{folder}.json").write_text(json.dumps({"divergence": {"kl": ord(folder) / 1000}}))
    bundles, out = [str(tmp_path / "A/m"), str(tmp_path / "B/m")], tmp_path / "r.jsonl"
    told = [f"{b}={tmp_path / f}" for b, f in zip(bundles, ("A.json", "B.json"))]
    assert commands._divergences(told, bundles, bundle_labels(bundles)) == {"A/m": 0.065, "B/m": 0.066}
    assert commands._divergences(["B/m=" + str(tmp_path / "B.json")], bundles, ["A/m", "B/m"]) == {"B/m": 0.066}
    assert run(["bench", *bundles, *SMALL, "--json", str(out)]) == 0
    cases = read_lines(out)
    assert [c["bundle"] for c in cases] == ["A/m", "B/m"]
    assert ["fp32" in c["precision"] for c in cases] == [True, False]
    printed = capsys.readouterr().out
    assert "A/m" in printed and "B/m" in printed
    for case in cases:
        assert case["memory_mb"]["arena_mb"] is None and case["memory_mb"]["peak_gpu_mb"] is None
        assert {"arena memory", "GPU memory"} <= set(case["energy"]["absent"])
        assert case["roofline"]["kind"] == "int8" and case["energy"]["j_per_picture"] is None
    assert run(["bench", bundles[0], bundles[0], *SMALL]) == 2
    assert run(["bench", *bundles, *SMALL, "--fidelity", f"m={tmp_path / 'A.json'}"]) == 2
    assert "with one of A/m, B/m" in capsys.readouterr().err.splitlines()[-1]


# ---------------------------------------------------------------- options


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--minutes", "nan"], "--minutes nan: expected a number of minutes"),
        (["--minutes", "inf"], "--minutes inf: expected a number of minutes"),
        (["--json", "F", "--report", "F"], "--json and --report both name F; expected two files"),
        (["--json", "F", "--report", "./F"], "both name ./F"),
        *[
            (["--operators", *given], f"--operators traces one request of each case; leave {given[0]} away")
            for given in (
                ["--json", "F"],
                ["--report", "F"],
                ["--profile"],
                ["--rounds", "3"],
                ["--requests", "5"],
                ["--minutes", "0"],
                ["--seed", "1"],
                ["--checkpoint", "real"],
                ["--fidelity", "a=b"],
            )
        ],
        (["--operators", "--json", "F", "--rounds", "2"], "leave --json, --rounds away"),
    ],
)
def test_options_that_cannot_be(tiny: Pair, tmp_path: Path, monkeypatch, capsys, arguments: list[str], message: str):
    monkeypatch.chdir(tmp_path)
    assert run(["bench", str(tiny.bundle), *arguments]) == 2
    told = capsys.readouterr()
    assert message in told.err and len(told.err.splitlines()) == 1 and told.out == "" and not list(tmp_path.iterdir())


def test_numbers_that_json_has_not_are_an_error(tiny: Pair, monkeypatch):
    job = Job(str(tiny.bundle), Workload("w"))
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(read=lambda: json.dumps(asdict(job))))
    with pytest.raises(ValueError, match="not JSON compliant"):
        stages.answer_job(lambda _: Ceilings(float("nan"), {}, {}))
