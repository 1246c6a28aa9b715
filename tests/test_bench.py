"""`edgevl bench` measures what it says, on tiny bundles and a made-up sysfs; nothing here asserts how long it takes."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from conftest import Pair
from PIL import Image
from test_cli import edgevl

from edgevl.benchmarks import check
from edgevl.benchmarks.check import compare
from edgevl.benchmarks.energy import EnergyMeter, heat
from edgevl.benchmarks.instructions import count_instructions
from edgevl.benchmarks.report import SCHEMA, html_page, percentiles, read_lines
from edgevl.benchmarks.roofline import decode_bytes, measure_ceilings, prefill_work, vision_work
from edgevl.benchmarks.stages import STAGES, Job, run_job
from edgevl.benchmarks.workloads import WORKLOADS, Workload, question, workload
from edgevl.runtime import VisionLanguageModel
from edgevl.runtime.bundle import Bundle
from edgevl.runtime.errors import InputError

# ---------------------------------------------------------------- workloads


def test_pictures_are_unlike_and_the_same_with_the_same_seed():
    work = Workload("w", 112, 84, pictures=2)
    made = [work.picture(seed, request, i) for seed in (0, 1) for request in (0, 1) for i in (0, 1)]
    assert len(set(made)) == 8
    assert made == [work.picture(seed, request, i) for seed in (0, 1) for request in (0, 1) for i in (0, 1)]
    image = Image.open(io.BytesIO(made[0]))
    assert image.size == (112, 84) and image.format == "JPEG" and np.asarray(image).std() > 10


def test_frames_of_a_video_move():
    frames = Workload("w", 112, 84, pictures=0, frames=4).video(0, 0)
    assert len(frames) == 4 == len(set(frames))
    assert all(Image.open(io.BytesIO(f)).size == (112, 84) for f in frames)


@pytest.mark.parametrize("tokens", [1, 7, 100])
def test_the_question_has_as_many_tokens_as_asked(tiny: Pair, tokens):
    with VisionLanguageModel.open(tiny.bundle, "ort-cpu", threads=1) as model:
        assert len(model.tokenizer.encode(question(model, tokens), specials=False)) == tokens


def test_changed_workloads_say_so():
    assert workload("picture").name == "picture" and workload("picture", width=None) is not None
    changed = workload("batch-4", width=84, new_tokens=3)
    assert (changed.name, changed.width, changed.concurrency, changed.new_tokens) == ("batch-4*", 84, 4, 3)
    assert changed.describe == "1 × 84×448, 16 text tokens, 3 new, 4 at once"
    assert len({w.describe for w in WORKLOADS.values()}) == len(WORKLOADS)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"width": 4}, "width is 4, expected 28"), ({"concurrency": 0}, "concurrency"), ({"new_tokens": 0}, "new_tokens")],
)
def test_workloads_out_of_range(changes, message):
    with pytest.raises(InputError, match=message):
        workload("picture", **changes)
    with pytest.raises(InputError, match="'paint' is unknown; expected one of picture"):
        workload("paint")


# ---------------------------------------------------------------- one process


@pytest.mark.parametrize(
    "changes",
    [
        {"pictures": 1},
        {"pictures": 2, "concurrency": 3},
        {"pictures": 0, "frames": 4},
        {"pictures": 0, "prompt_tokens": 20},
        {"new_tokens": 1},
    ],
)
def test_every_stage_of_every_request_is_measured(tiny: Pair, changes):
    work = Workload("w", **{"width": 84, "height": 56, "new_tokens": 4, **changes})
    done = run_job(Job(str(tiny.bundle), work, threads=1, requests=2, spawned=time.time()))
    assert len(done.requests) == 2 and done.engine == "ort-cpu"
    assert 0 < done.open_s < done.cold_s and 0 < done.rss_open_mb <= 1.02 * done.peak_mb
    for r in (done.warm_up, *done.requests):
        assert tuple(r.stages) == STAGES
        used = {s for s, seconds in r.stages.items() if seconds > 0}
        seen = {"file_s", "resize_s", "patches_s", "vision_s"} if work.pictures or work.frames else set()
        assert used == seen | {"prompt_s", "prefill_s"}
        assert len(r.steps_s) == work.new_tokens - 1 and all(s > 0 for s in r.steps_s)
        assert r.new_tokens == work.new_tokens * work.concurrency
        # the stages add up to the first token, and with the steps to the whole
        assert len(r.ttft_s) == work.concurrency and r.ttft_s == sorted(r.ttft_s)
        assert sum(r.stages.values()) == pytest.approx(r.ttft_s[-1], abs=2e-2)  # another process may come between
        assert sum(r.stages.values()) + sum(r.steps_s) <= r.total_s + 1e-6
        grid = 2 * 3  # 56 × 84 pixels, merged patches of 28
        per_row = grid * (work.pictures + work.frames // 2)
        assert r.image_tokens == per_row * work.concurrency


def test_the_timed_path_gives_the_runtimes_answer(tiny: Pair, monkeypatch):
    """Stage by stage is the same computation as `generate` on the same files."""
    from edgevl.benchmarks import stages

    work = Workload("w", 120, 70, new_tokens=5, prompt_tokens=8)
    seen = []
    original = stages.Runner._answer

    def answer(self, *arguments):
        seen.append(original(self, *arguments))
        return seen[-1]

    monkeypatch.setattr(stages.Runner, "_answer", answer)
    run_job(Job(str(tiny.bundle), work, threads=1, requests=1))
    with VisionLanguageModel.open(tiny.bundle, "ort-cpu", threads=1) as model:
        for request in (0, 1):
            content = [
                {"type": "image", "image": work.picture(0, request, 0)},
                {"type": "text", "text": question(model, 8)},
            ]
            done = model.generate(
                [{"role": "user", "content": content}],
                max_new_tokens=5, do_sample=False, repetition_penalty=1.0, eos_token_ids=(-1,),
            )  # fmt: skip
            assert seen[request] == [done.token_ids]


def test_a_soak_goes_on_until_its_time_is_over(tiny: Pair):
    work = Workload("w", 56, 56, new_tokens=2)
    done = run_job(Job(str(tiny.bundle), work, threads=1, requests=1, minutes=0.02))
    assert len(done.requests) > 1
    last = done.requests[-1]
    assert last.at_s < 1.2 <= last.at_s + 60
    assert [r.at_s for r in done.requests] == sorted(r.at_s for r in done.requests)


# ---------------------------------------------------------------- what the machine could do


def test_work_by_counting_products(tiny: Pair):
    """Against multiplications counted layer by layer."""
    config = Bundle.open(tiny.bundle).model
    t, v = config.text, config.vision
    tokens, linear = 11, 0
    for _ in range(t.num_hidden_layers):
        for rows, columns in (
            (t.num_attention_heads * t.head_dim, t.hidden_size),
            (t.num_key_value_heads * t.head_dim, t.hidden_size),
            (t.num_key_value_heads * t.head_dim, t.hidden_size),
            (t.hidden_size, t.num_attention_heads * t.head_dim),
            (t.intermediate_size, t.hidden_size),
            (t.intermediate_size, t.hidden_size),
            (t.hidden_size, t.intermediate_size),
        ):
            linear += 2 * tokens * rows * columns
    work = prefill_work(config, tokens)
    assert work.gemm == linear + 2 * t.vocab_size * t.hidden_size
    # scores and values: 2 products of head_dim per pair, half of the pairs
    assert work.attention == t.num_hidden_layers * t.num_attention_heads * 4 * t.head_dim * tokens**2 / 2
    frames, patches, linear = 2, 24, 0
    for _ in range(v.depth):
        for rows, columns in ((3 * v.embed_dim, v.embed_dim), (v.embed_dim, v.embed_dim)):
            linear += 2 * frames * patches * rows * columns
        linear += 2 * 2 * frames * patches * v.embed_dim * v.intermediate_size
    linear += 2 * frames * patches * v.patch_dim * v.embed_dim
    linear += 2 * (frames * patches // 4) * (v.merged_dim**2 + v.merged_dim * v.hidden_size)
    vision = vision_work(config, frames, patches)
    assert vision.gemm == linear
    assert vision.attention == v.depth * frames * v.num_heads * 4 * v.head_dim * patches**2


def test_decode_reads_the_weights_that_the_file_holds(tiny: Pair):
    """fp32: the data file less the embedding's rows that no step reads (here tied to the head, so none), norms and
    biases, which are not counted."""
    bundle = Bundle.open(tiny.bundle)
    counted, stored = decode_bytes(bundle, 0), bundle.files["decoder.onnx.data"].size
    assert 0.97 * stored < counted <= stored
    t = bundle.model.text
    per_token = 2 * t.num_hidden_layers * t.num_key_value_heads * t.head_dim * 4
    assert decode_bytes(bundle, 10) - counted == 10 * per_token


def test_ceilings_are_of_the_right_order():
    found = measure_ceilings(1, megabytes=64)
    assert 0.5 < found.read_gb_s < 2000 and found.absent == {}
    assert set(found.gemm_gop_s) == {"fp32", "int8"} and all(1 < v < 1e6 for v in found.gemm_gop_s.values())


# ---------------------------------------------------------------- energy and heat, on a sysfs made here


def put(path: Path, text: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{text}\n")


def test_rapl_counts_packages_and_wraps(tmp_path):
    zone = tmp_path / "class/powercap/intel-rapl:0"
    for path, name in (
        (zone, "package-0"),
        (zone.with_name("intel-rapl:0:0"), "core"),
        (zone.with_name("intel-rapl:1"), "psys"),
    ):
        put(path / "name", name)
        put(path / "energy_uj", 9_000_000)
        put(path / "max_energy_range_uj", 9_999_999)
    with EnergyMeter(tmp_path) as meter:
        assert meter.sources == ("rapl package-0",) and "RAPL" not in meter.absent
        assert meter.read() == pytest.approx(0)
        put(zone / "energy_uj", 9_600_000)
        assert meter.read() == pytest.approx(0.6)
        put(zone / "energy_uj", 100_000)  # past its range
        assert meter.read() == pytest.approx(1.1)


def test_jetson_rails_are_watts_over_time_and_the_whole_board_counts_once(tmp_path):
    chip = tmp_path / "class/hwmon/hwmon3"
    put(chip / "name", "ina3221")
    for number, label, millivolts, milliamperes in ((1, "VDD_IN", 5000, 2000), (2, "VDD_CPU_GPU_CV", 5000, 900)):
        put(chip / f"in{number}_label", label)
        put(chip / f"in{number}_input", millivolts)
        put(chip / f"curr{number}_input", milliamperes)
    with EnergyMeter(tmp_path) as meter:
        assert meter.sources == ("rail VDD_IN",)
        began = time.monotonic()
        threading.Event().wait(0.3)
        joules, seconds = meter.read(), time.monotonic() - began
        assert joules == pytest.approx(10 * seconds, rel=0.2)


def test_absent_sensors_are_said_to_be_absent(tmp_path):
    with EnergyMeter(tmp_path) as meter:
        assert meter.read() is None and meter.sources == ()
        assert set(meter.absent) == {"RAPL", "INA", "NVML"} and all(meter.absent.values())
    assert heat(tmp_path).mhz is None and heat(tmp_path).throttled is None


def test_heat(tmp_path):
    for core, khz, count in ((0, 1_500_000, 2), (1, 2_500_000, 3)):
        put(tmp_path / f"devices/system/cpu/cpu{core}/cpufreq/scaling_cur_freq", khz)
        put(tmp_path / f"devices/system/cpu/cpu{core}/thermal_throttle/core_throttle_count", count)
    put(tmp_path / "class/thermal/thermal_zone0/temp", 41_000)
    put(tmp_path / "class/thermal/thermal_zone1/temp", 67_500)
    found = heat(tmp_path)
    assert (found.mhz, found.celsius, found.throttled) == (2000, 67.5, 5)


# ---------------------------------------------------------------- the command


def test_percentiles_are_those_of_sorted_values():
    values = [float(v) for v in np.random.default_rng(0).permutation(101)]
    assert percentiles(values) == {"p50": 50, "p95": 95, "p99": 99, "min": 0, "max": 100, "n": 101}
    assert percentiles([]) == {"n": 0}


@pytest.fixture(scope="module")
def measured(tiny: Pair, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    done = edgevl(
        *("bench", tiny.bundle, "--workload", "picture", "--workload", "batch-4", "--size", "56x84"),
        *("--new-tokens", 3, "--requests", 2, "--rounds", 2, "--threads", 1, "--checkpoint", "tiny, random"),
        *("--json", folder / "r.jsonl", "--report", folder / "r.html"),
    )
    assert done.returncode == 0, done.stderr
    return done, folder


def test_json_lines_hold_what_the_schema_says(measured, tiny: Pair):
    cases = read_lines(measured[1] / "r.jsonl")
    assert [c["workload"]["name"] for c in cases] == ["picture*", "batch-4*"]
    for case in cases:
        assert case["loop"] == "closed" and case["workload"]["arrivals_per_s"] == 0
        assert case["schema"] == SCHEMA and case["checkpoint"] == "tiny, random" and case["bundle"] == tiny.bundle.name
        assert case["system"]["processor"] and case["system"]["threads"] == 1
        assert len(case["requests"]) == 4 and [r["round"] for r in case["requests"]] == [0, 0, 1, 1]
        assert len(case["cold_s"]) == 2 == len(case["warm_up"])
        assert {len(r["ttft_s"]) for r in case["requests"]} == {case["workload"]["concurrency"]}
        times = sorted(s for r in case["requests"] for s in r["ttft_s"])
        middle = len(times) // 2
        assert case["ttft_s"]["n"] == len(times) == 4 * case["workload"]["concurrency"]
        assert case["ttft_s"]["p50"] == pytest.approx((times[middle - 1] + times[middle]) / 2)
        assert case["ttft_s"]["max"] == times[-1] and case["total_s"]["n"] == 4
        assert case["tpot_s"]["n"] == 8
        assert 0 < case["roofline"]["decode"] < 5 and 0 < case["roofline"]["vision"] < 5
        assert (case["energy"]["j_per_token"] is None) == (not case["energy"]["sources"])
        assert case["energy"]["sources"] or case["energy"]["absent"]


def test_the_table_is_on_stdout_and_nothing_else(measured):
    out = measured[0].stdout
    assert "TTFT s" in out and "picture*" in out and "batch-4*: 1 × 56×84, 16 text tokens, 3 new, 4 at once" in out
    assert "ceilings" not in out and "ceilings" in measured[0].stderr
    assert max(map(len, out.splitlines())) <= 120


def test_auto_is_told_once_for_a_bundle(tiny: Pair, tmp_path):
    """Not once for each process, and the processes are told what was chosen."""
    other = tmp_path / "other"
    shutil.copytree(tiny.bundle, other)
    sizes = ("--size", "56x56", "--new-tokens", 2, "--requests", 1, "--rounds", 2, "--threads", 1)
    done = edgevl("bench", tiny.bundle, other, "--engine", "auto", *sizes, "--json", tmp_path / "r.jsonl")
    assert done.returncode == 0, done.stderr
    for name in (tiny.bundle.name, "other"):
        told = [line for line in done.stderr.splitlines() if line.startswith(f"{name}: engine: ort-cpu (")]
        assert len(told) == 1 and "; not tensorrt: " in told[0]
    assert {c["engine"] for c in read_lines(tmp_path / "r.jsonl")} == {"ort-cpu"}
    shown = edgevl("bench", "--help").stdout
    assert "auto, ort-cpu" in " ".join(shown.split())


@pytest.mark.parametrize("encoding", ["ascii", "iso8859-5"])  # neither has the sign of multiplication
def test_tables_print_with_any_encoding(measured, encoding):
    """In a process of its own: the encoding is that of its stdout."""
    code = (
        "import sys; from pathlib import Path; from edgevl.runtime.cli import forgive_encodings; forgive_encodings()\n"
        "from edgevl.benchmarks.report import print_table, read_lines; print_table(read_lines(Path(sys.argv[1])))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, measured[1] / "r.jsonl"],
        capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": encoding},
        check=False,
    )
    assert done.returncode == 0 and b"TTFT s" in done.stdout and b"16 text tokens" in done.stdout, done.stderr


def test_the_page_needs_nothing_beside_it(measured):
    page = (measured[1] / "r.html").read_text()
    assert page.count("<svg") >= 4 and "picture*" in page and "tiny, random" in page
    assert not re.findall(r"""(?:src|href)=["'](?!#)""", page)
    assert "nan" not in page.lower().split()
    cases = read_lines(measured[1] / "r.jsonl")
    assert "What precision costs" in html_page(cases, {cases[0]["bundle"]: 0.01})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--workload", "paint"], "workload 'paint' is unknown"),
        (["--size", "big"], "expected WIDTHxHEIGHT"),
        (["--new-tokens", "0"], "new_tokens is 0"),
        (["--json", "/nowhere/at/all.jsonl"], "no such folder"),
        (["--engine", "abacus"], "engine 'abacus' is unknown"),
        (["--fidelity", "other=f.json"], "expected BUNDLE=F.json with one of"),
    ],
)
def test_bad_input_is_one_line(tiny: Pair, arguments, message):
    done = edgevl("bench", tiny.bundle, "--requests", 1, "--rounds", 1, "--threads", 1, *arguments)
    assert done.returncode == 2 and done.stdout == ""
    assert message in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr


def test_a_prompt_that_does_not_fit_is_told_by_name(tiny: Pair):
    sizes = ("--size", "56x56", "--requests", 1, "--rounds", 1, "--threads", 1)
    done = edgevl("bench", tiny.bundle, "--workload", "long-prompt", "--prompt-tokens", 9000, *sizes)
    assert done.returncode != 0 and "Traceback" not in done.stderr
    last = done.stderr.splitlines()[-1]
    assert "long-prompt*" in last and "KV cache" in last


def test_a_file_of_another_schema_is_refused(tmp_path):
    (tmp_path / "r.jsonl").write_text(json.dumps({"schema": "edgevl.bench/9"}) + "\n")
    with pytest.raises(InputError, match=r"schema 'edgevl.bench/9', this edgevl reads 'edgevl.bench/3'"):
        read_lines(tmp_path / "r.jsonl")


def test_without_the_extra_the_remedy_is_named(tiny: Pair):
    code = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "rich":
            raise ModuleNotFoundError("blocked", name="rich")
sys.meta_path.insert(0, Block())
from edgevl.runtime.cli import main
main(sys.argv[1:])
"""
    sizes = ["--size", "56x56", "--new-tokens", "1", "--requests", "1", "--rounds", "1", "--threads", "1"]
    done = subprocess.run(
        [sys.executable, "-c", code, "bench", str(tiny.bundle), *sizes], capture_output=True, text=True
    )
    assert done.returncode == 2 and "pip install 'edgevl[bench]'" in done.stderr.splitlines()[-1]


# ---------------------------------------------------------------- the guard against regressions


def test_the_guard_tells_more_work_from_noise():
    before = {"vision": 200, "prefill": 100, "step": 50, "patches": 100, "prompt": 100}
    found = {"vision": 219, "prefill": 111, "step": 10, "patches": 110, "prompt": 90}  # 10 % is not over 10 %
    verdicts = {"vision": "ok", "prefill": "MORE", "step": "FEWER", "patches": "ok", "prompt": "ok"}
    assert {s: verdict for s, _, verdict in compare(found, before)} == verdicts
    assert [change for _, change, _ in compare(found, before)][:3] == pytest.approx([0.095, 0.11, -0.8])


def test_the_guard_without_a_baseline_says_what_to_do(tmp_path):
    (tmp_path / "b.json").write_text(json.dumps({"another machine": {}}))
    done = CliRunner().invoke(check.main, ["--baseline", str(tmp_path / "b.json")])
    assert done.exit_code == 2 and "no baseline of hybrid, fp32 for" in done.output and "UPDATE=1" in done.output


@pytest.mark.skipif(shutil.which("valgrind") is None, reason="valgrind is not here")
def test_instructions_between_marks_are_counted():
    work = "import os\nfor n in (0, 20000, 40000):\n    os.getloadavg()\n    for i in range(n): i * i\nos.getloadavg()"
    (_, empty, once, twice), printed = count_instructions([sys.executable, "-c", work + "\nprint('out')"])
    assert printed == "out\n"
    assert twice - empty == pytest.approx(2 * (once - empty), rel=0.02) and once - empty > 20000
    with pytest.raises(RuntimeError, match=r"status 1 in valgrind: .*ZeroDivisionError"):
        count_instructions([sys.executable, "-c", "1 / 0"])


def test_the_guard_writes_reads_and_trips(tiny: Pair, tmp_path, monkeypatch):
    path = tmp_path / "baseline.json"
    counted = {"open": 5000, "vision": 300, "step": 200}
    monkeypatch.setattr(check, "measure", lambda job: counted if Path(job.bundle, "manifest.json").exists() else {})
    arguments = ["--checkpoint", str(tiny.checkpoint), "--precision", "fp32", "--baseline", str(path)]
    assert CliRunner().invoke(check.main, [*arguments, "--update"]).exit_code == 0
    assert json.loads(path.read_text()) == {f"{check.setting()}, 230×230": {"fp32": counted}}
    assert CliRunner().invoke(check.main, [*arguments, "--size", "56"]).exit_code == 2  # that is another baseline
    for step, status, said in ((200, 0, ""), (219, 0, ""), (221, 1, "MORE"), (181, 0, ""), (179, 1, "FEWER")):
        monkeypatch.setattr(check, "measure", lambda job, step=step: {**counted, "step": step})
        done = CliRunner().invoke(check.main, arguments)
        assert done.exit_code == status, done.output
        assert [word for word in ("MORE", "FEWER") if word in done.output] == [said] * status
        assert ("renew the baseline with `make bench-check UPDATE=1` if this is meant" in done.output) == (step == 179)


@pytest.mark.skipif(shutil.which("valgrind") is None, reason="valgrind is not here")
def test_the_guard_trips_where_a_stage_does_more_than_before(tiny: Pair, tmp_path):
    path = tmp_path / "baseline.json"
    planted = {"open": 1, "vision": 10**15, "prefill": 1, "step": 10**15}
    path.write_text(json.dumps({f"{check.setting()}, 56×56": {"fp32": planted}}))
    small = ["--checkpoint", str(tiny.checkpoint), "--precision", "fp32", "--size", "56", "--baseline", str(path)]
    done = CliRunner().invoke(check.main, small)
    assert done.exit_code == 1, done.output
    said = {line.split()[1]: line.split()[-1] for line in done.output.splitlines() if line.startswith("fp32")}
    assert said == {"open": "MORE", "vision": "FEWER", "prefill": "MORE", "step": "FEWER"}


def test_the_guard_without_valgrind_says_what_to_install(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(FileNotFoundError, match="apt install valgrind"):
        count_instructions(["true"])


def test_a_fidelity_report_gives_precision_against_speed(tiny: Pair, tmp_path):
    (tmp_path / "f.json").write_text(json.dumps({"divergence": {"kl": 0.0123}}))
    (tmp_path / "bad.json").write_text(json.dumps({"divergence": None}))
    sizes = ("--size", "56x56", "--new-tokens", 2, "--requests", 1, "--rounds", 1, "--threads", 1)
    done = edgevl("bench", tiny.bundle, *sizes, "--fidelity", f"{tiny.bundle}={tmp_path / 'bad.json'}")
    assert done.returncode == 2 and "no fidelity report with a divergence" in done.stderr
    page = tmp_path / "r.html"
    done = edgevl("bench", tiny.bundle, *sizes, "--report", page, "--fidelity", f"{tiny.bundle}={tmp_path / 'f.json'}")
    assert done.returncode == 0, done.stderr
    assert "What precision costs" in page.read_text()


def test_the_profile_is_kept_where_the_runtime_finds_it(tiny: Pair, tmp_path):
    sizes = ("--size", "56x56", "--new-tokens", 2, "--requests", 1, "--rounds", 1, "--threads", 1)
    done = edgevl("bench", tiny.bundle, *sizes, "--profile", XDG_CACHE_HOME=str(tmp_path))
    assert done.returncode == 0, done.stderr
    kept = [line.partition("profile: ")[2] for line in done.stderr.splitlines() if line.startswith("profile: ")]
    assert len(kept) == 1 and Path(kept[0]).is_relative_to(tmp_path)
    assert json.loads(Path(kept[0]).read_text())
