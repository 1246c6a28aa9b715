"""The runner for a machine with a GPU, driven here with the engine that every machine has."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from conftest import Pair

from edgevl.benchmarks import gpu
from edgevl.benchmarks.gpu import Contender, Figures, summary
from edgevl.benchmarks.workloads import Workload
from edgevl.export.exporter import ExportOptions, export_bundle
from edgevl.runtime.gpu import current_gpu


def test_it_measures_what_is_usable_and_tells_what_is_not(tiny: Pair, tmp_path: Path) -> None:
    export_bundle(tiny.checkpoint, tmp_path / "ort-cpu-fp16", ExportOptions(precision="fp16"))
    engines = "ort-cpu" if current_gpu() else "ort-cpu,ort-cuda"
    arguments = [str(tmp_path), "--checkpoint", str(tiny.checkpoint), "--engines", engines, "--precisions", "fp16"]
    arguments += ["--sizes", "112x84", "--new-tokens", "3", "--requests", "2", "--rounds", "1", "--no-peers"]
    done = CliRunner().invoke(gpu.main, [*arguments, "--json", str(tmp_path / "figures.jsonl")])
    assert done.exit_code == 1, done.output  # something was left out
    assert "gpu: " in done.output and "| ort-cpu fp16 |" in done.output
    assert "ort-cpu-fp16: not verified, it has no golden vectors" in done.output
    if not current_gpu():
        assert "ort-cuda: no NVIDIA GPU is found" in done.output
    (line,) = [json.loads(text) for text in (tmp_path / "figures.jsonl").read_text().splitlines()]
    assert line["contender"] == "ort-cpu fp16" and line["size"] == "112x84"
    measured = line["measured"]
    assert len(measured["vision_s"]) == len(measured["decode_tokens_per_s"]) == 2  # warm-ups are not among them
    assert all(0 < v <= t for v, t in zip(measured["prefill_s"], measured["ttft_s"]))


@pytest.mark.skipif(current_gpu() is not None, reason="a GPU is here")
def test_without_a_gpu_it_says_so_and_does_nothing(tmp_path: Path) -> None:
    done = CliRunner().invoke(gpu.main, [str(tmp_path / "out")])
    assert done.exit_code == 1 and done.output.count("no NVIDIA GPU") >= 1 and not list((tmp_path / "out").iterdir())
    done = CliRunner().invoke(gpu.main, [str(tmp_path / "out"), "--engines", "abacus"])
    assert done.exit_code == 2 and "engine 'abacus' is unknown" in done.output


def test_a_contender_that_dies_is_told_of_once_and_the_rest_goes_on(tiny: Pair) -> None:
    options = {"requests": 1, "rounds": 2}
    works = [Workload("112x84", 112, 84, prompt_tokens=8, new_tokens=3)]
    failures: list[str] = []
    contenders = [Contender("absent", "ort-cpu", "/absent"), Contender("here", "ort-cpu", str(tiny.bundle))]
    figures = gpu._measure(contenders, str(tiny.bundle), works, options, failures)
    assert [f.contender for f in figures] == ["here", "here"]
    assert len(failures) == 1 and failures[0].startswith("absent at 112x84: ") and "no such folder" in failures[0]


def test_the_table_has_medians_and_spread() -> None:
    figures = [Figures("a", "1x1", {"ttft_s": [t], "decode_tokens_per_s": [50.0]}) for t in (1.0, 3.0, 2.0)]
    text = summary(figures, ["1x1"])
    assert "2.00 (1.00–3.00)" in text and "50.0 (50.0–50.0)" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sizes", "large"], "--sizes: size 'large': expected WIDTHxHEIGHT, such as 448x448"),
        (["--sizes", "448x448,9000x28"], "width is 9000, expected 28 to 8192"),
        (["--rounds", "0"], "0 is not in the range x>=1"),
        (["--requests", "-1"], "-1 is not in the range x>=1"),
        (["--new-tokens", "0"], "0 is not in the range x>=1"),
    ],
)
def test_what_cannot_be_measured_is_told_before_anything_is_exported(
    arguments: list[str], message: str, tmp_path: Path
) -> None:
    done = CliRunner().invoke(gpu.main, [str(tmp_path / "out"), *arguments])
    assert done.exit_code == 2 and message in " ".join(done.output.split()) and not (tmp_path / "out").exists()
