"""What is measured of a quantized checkpoint with scales of an INT8 KV cache has that cache: KL, gates and scores."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import random_model, save_checkpoint
from safetensors.torch import load_file, save_file
from test_fidelity import kl, save_conversations
from test_kv_int8 import emulate, tokens
from transformers import Qwen2VLForConditionalGeneration

from edgevl.calibration import scores
from edgevl.calibration.comparison import compare
from edgevl.calibration.dataset import Sample
from edgevl.calibration.dequantized import FloatCheckpoint
from edgevl.calibration.report import read_report
from edgevl.runtime import cli
from edgevl.runtime.bundle import Bundle

SIZE = {"hidden_size": 128, "intermediate_size": 256}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain checkpoint, conversations, and the plain checkpoint with scales of a cache, by the command line."""
    folder = tmp_path_factory.mktemp("cache")
    save_checkpoint(random_model(**SIZE), folder / "plain")
    save_conversations(folder / "c", 10)
    assert quantize(folder, folder / "kv", "kv-int8") == 0
    return folder


def quantize(place: Path, output: Path, recipe: str, *options: str) -> int:
    arguments = ["quantize", str(place / "plain"), "-o", str(output), "--recipe", recipe, "--samples", "6"]
    return cli.run([*arguments, "--images", str(place / "c" / "c.jsonl"), *options])


def edited(source: Path, target: Path, change: Callable[[str, torch.Tensor], torch.Tensor], **scheme: Any) -> Path:
    """A copy with other scales, and another word about them in config.json."""
    shutil.copytree(source, target)
    for path in target.glob("*.safetensors"):
        save_file({k: change(k, v).contiguous() for k, v in load_file(path).items()}, path, {"format": "pt"})
    config = json.loads((target / "config.json").read_text())
    config["quantization_config"]["kv_cache_scheme"].update(scheme)
    (target / "config.json").write_text(json.dumps(config))
    return target


@pytest.mark.parametrize(
    "recipe, options, bits",
    [
        ("kv-int8", (), 32),
        ("none", ("--kv-cache", "int8"), 32),
        ("none", ("--kv-cache", "int8", "--rotate", "r1+r2"), 32),
        ("rtn-int4", ("--kv-cache", "int8", "--group-size", "32"), 4.8),
    ],
)
def test_the_report_is_of_the_cache_too(
    place: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], recipe: str, options: tuple[str, ...], bits: float
) -> None:
    """The report from the files is the divergence that the run carried along with its rounded cache."""
    assert quantize(place, tmp_path / "q", recipe, *options, "--report", str(tmp_path / "r.html")) == 0
    assert "INT8 KV cache" in capfd.readouterr().out
    run = json.loads((tmp_path / "q" / "edgevl_quantize.json").read_text())["divergence"]
    data = read_report(tmp_path / "q")
    assert data["divergence"]["kl"] == pytest.approx(run["kl"], rel=1e-3) and data["divergence"]["kl"] > 1e-6
    assert (data["original"]["kv_cache"], data["quantized"]["kv_cache"]) == ("float", "int8")
    assert data["quantized"]["decoder_bits"] == pytest.approx(bits, abs=0.3)
    assert "KV cache of the quantized" in (tmp_path / "r.html").read_text()


def test_the_divergence_is_the_oracles(place: Path, tmp_path: Path) -> None:
    """Coarse scales, so that little else counts, in float64 one query at a time against transformers."""
    coarse = edited(place / "kv", tmp_path / "kv", lambda k, v: 20 * v if k.endswith("_scale") else v)
    joined = {k: v for f in sorted(coarse.glob("*.safetensors")) for k, v in load_file(f).items()}
    (tmp_path / "all").mkdir()
    save_file(joined, tmp_path / "all" / "all.safetensors")
    shutil.copy(coarse / "config.json", tmp_path / "all")
    ids, positions = tokens(40)
    sample = Sample(ids, positions, (), np.zeros(40, bool))
    model = Qwen2VLForConditionalGeneration.from_pretrained(place / "plain", dtype=torch.float32).eval()
    given = {"input_ids": torch.from_numpy(ids)[None], "position_ids": torch.from_numpy(positions)[:, None]}
    with torch.no_grad():
        plain = model(**given, use_cache=False).logits[0]
    expected = kl(plain, torch.from_numpy(emulate(tmp_path / "all", ids, positions)[0])).mean()
    (tmp_path / "s").mkdir()
    with FloatCheckpoint.open(place / "plain") as a, FloatCheckpoint.open(coarse) as b:
        (found,) = compare(a, b, [sample], tmp_path / "s").conversations
    assert found.kl == pytest.approx(expected, rel=0.03) and expected > 0.01  # a number on an edge goes the other way


def test_the_gate_sees_the_cache(place: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    coarse = edited(place / "kv", tmp_path / "kv", lambda k, v: 20 * v if k.endswith("_scale") else v)
    given = ["--images", str(place / "c" / "c.jsonl"), "--max-kl", "0.005"]
    assert cli.run(["fidelity", str(place / "plain"), str(place / "kv"), *given]) == 0
    assert cli.run(["fidelity", str(place / "plain"), str(coarse), *given]) == 1
    assert "at most 0.005 was asked" in capfd.readouterr().err
    assert cli.run(["fidelity", str(place / "kv"), str(place / "plain"), *given]) == 2
    assert "not quantized; give the original checkpoint first" in capfd.readouterr().err


def test_scores_are_of_bundles_with_the_cache(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Also where the original checkpoint has scales: it is scored as it was, with a float cache."""
    seen: list[tuple[bool, str]] = []
    real = scores.score_bundle

    def watched(bundle: Path, *given: Any) -> Any:
        opened = Bundle.open(bundle)
        seen.append((opened.graphs["decoder"].spec.quantized_cache, opened.precision))
        return real(bundle, *given)

    monkeypatch.setattr(scores, "score_bundle", watched)
    found = scores.score_pair(place / "kv", place / "kv", ["count"], 2, tmp_path)
    assert [cache for cache, _ in seen] == [False, True] and "KV cache int8" in seen[1][1]
    assert [row.n for row in found] == [2, 2] and not list(tmp_path.iterdir())


def test_scales_of_another_kind_of_cache(place: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """FP8 scales are for engines that edgevl lacks: beside quantized layers they are told of, alone they are wrong."""
    images = ["--images", str(place / "c" / "c.jsonl")]
    assert quantize(place, tmp_path / "q", "rtn-int4", "--group-size", "32", "--kv-cache", "int8") == 0
    other = edited(tmp_path / "q", tmp_path / "fp8", lambda k, v: 20 * v if k.endswith("_scale") else v, type="float")
    assert cli.run(["fidelity", str(place / "plain"), str(other), *images, "--json", str(tmp_path / "f.json")]) == 0
    out, err = capfd.readouterr()
    assert "not an INT8 cache's; measured with a float KV cache" in err and "INT8 KV cache" not in out.splitlines()[-2:]
    assert read_report(tmp_path / "f.json")["quantized"]["kv_cache"] == "float"
    alone = edited(place / "kv", tmp_path / "alone", lambda _, v: v, type="float")
    assert cli.run(["fidelity", str(place / "plain"), str(alone), *images]) == 2
    assert "kv_cache_scheme has {'type': 'float'}, an INT8 KV cache needs {'type': 'int'}" in capfd.readouterr().err


def test_a_cache_has_no_sensitivity(place: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Said before the work, not by an empty table after it."""
    assert quantize(place, tmp_path / "q", "kv-int8", "--sensitivity", "layer") == 2
    assert "recipe 'kv-int8' quantizes no linear layer of the decoder" in capfd.readouterr().err
    pair = ["fidelity", str(place / "plain"), str(place / "kv"), "--images", str(place / "c" / "c.jsonl")]
    assert cli.run([*pair, "--sensitivity", "layer"]) == 2
    assert "no linear layer of its decoder is quantized" in capfd.readouterr().err
    assert not list(tmp_path.iterdir())


def test_scales_are_not_lost_on_the_way(place: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Of a checkpoint whose weights are plain but whose cache is calibrated: new scales, or none of it."""
    images = ["--images", str(place / "c" / "c.jsonl"), "--samples", "4"]
    given = ["quantize", str(place / "kv"), "-o", str(tmp_path / "q"), "--recipe", "rtn-int4", "--group-size", "32"]
    assert cli.run([*given, *images]) == 2
    assert "has scales of a KV cache, which belong to its weights as they are" in capfd.readouterr().err
    assert not list(tmp_path.iterdir())
    assert cli.run([*given, *images, "--kv-cache", "int8"]) == 0
    assert read_report(tmp_path / "q")["quantized"]["kv_cache"] == "int8"
