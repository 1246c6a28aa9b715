"""--auto: the most sensitive layers at more bits, until the gate holds; and gates that publish nothing."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import random_model, save_checkpoint
from safetensors.torch import load_file
from test_fidelity import SIZE, conversations, save_conversations
from test_quantize import DEMO, demo_samples

from edgevl.calibration import auto, driver, report
from edgevl.calibration.auto import Trial, ladder, quantize_auto
from edgevl.calibration.dataset import Sample, SampleSource
from edgevl.calibration.driver import quantize_checkpoint
from edgevl.calibration.output import quantization_config
from edgevl.calibration.recipes import PLAIN, RECIPES, Recipe, recipe
from edgevl.calibration.sensitivity import Sensitivity
from edgevl.export.exporter import ExportOptions, export_bundle
from edgevl.runtime import cli
from edgevl.runtime.checkpoint import Checkpoint
from edgevl.runtime.errors import CheckFailedError, CheckpointError, InputError
from edgevl.tasks import score_bundle, summarize

QKV = tuple(f"model.layers.0.self_attn.{k}_proj" for k in "qkv")
DOWN = ("model.layers.0.mlp.down_proj",)


def unit(name: str, modules: Sequence[str], kl: float, parameters: int) -> Sensitivity:
    return Sensitivity(name, "group", tuple(modules), kl, 0.9, parameters, parameters // 2)


# ---------------------------------------------------------------------- which layers, in which order


def test_the_ladder_by_hand() -> None:
    """KL saved per bit of weight: 8 bits leave 1/289 of it; the end is where everything has 8 bits."""
    found = [
        unit("a", ["model.layers.0.mlp.up_proj"], 0.02, 1_000_000),
        unit("b", DOWN, 0.03, 4_000_000),
        unit("c", QKV, 0.000001, 1_000_000),
    ]
    steps = ladder(found, RECIPES["gptq-int4"])
    assert [(s.name, s.bits) for s in steps] == [("a", 8), ("b", 8), ("a", PLAIN), ("c", 8)]
    assert steps[0].saved_per_mbit == pytest.approx(0.02 * (1 - 1 / 289) / 4)
    assert steps[1].saved_per_mbit == pytest.approx(0.03 * (1 - 1 / 289) / 16)
    assert steps[2].saved_per_mbit == pytest.approx(0.02 / 289 / 8) and steps[2].kl == pytest.approx(0.02 / 289)
    assert [s.added_bits for s in steps] == [4_000_000, 16_000_000, 8_000_000, 4_000_000]


def test_the_ladder_of_8_bits_leaves_half_plain() -> None:
    found = [unit(n, [f"model.layers.{i}.mlp.up_proj"], 0.1 - i / 100, 100) for i, n in enumerate("abcd")]
    assert [(s.name, s.bits) for s in ladder(found, RECIPES["int8"])] == [("a", PLAIN), ("b", PLAIN)]
    mixed = ladder([unit("q", QKV, 0.1, 100), unit("d", DOWN, 0.3, 100)], RECIPES["gptq-int4-down8"])
    assert [(s.name, s.bits) for s in mixed] == [("d", PLAIN), ("q", 8)]
    assert [(s.name, s.bits) for s in ladder([unit("q", QKV, 0.0, 9)], RECIPES["gptq-int4"])] == [("q", 8)]


def test_guesses() -> None:
    left = [1.0, 0.5, 0.25, 0.1, 0.05, 0.0]
    low = Trial(0, 2.0)  # measured: twice the sum
    assert auto._guess(left, low, None, 0.5, False) == 2
    assert auto._guess(left, low, None, 1e-9, False) == 5
    assert auto._guess(left, Trial(2, 0.6), None, 0.59, False) == 3, "not the same again"
    assert auto._guess(left, low, Trial(4, 0.2), 0.5, True) == 2, "halves"
    assert auto._guess(left, low, Trial(2, 0.2), 0.5, False) == 1, "between the ends"


def test_readers_of_gptq_find_the_bits_of_every_layer() -> None:
    """GPTQModel's rule: the first pattern that re.match finds; `-:` leaves the module plain. vLLM asks for products."""
    modules = [
        f"model.layers.{i}.{n}"
        for i in (1, 11)
        for n in (
            *(f"self_attn.{k}_proj" for k in "qkvo"),
            *(f"mlp.{k}_proj" for k in ("gate", "up", "down")),
        )
    ]
    overrides = {
        **{f"model.layers.1.self_attn.{k}_proj": 8 for k in "qkv"},
        "model.layers.1.mlp.down_proj": PLAIN,
        "model.layers.11.mlp.gate_proj": 8,
    }
    chosen = Recipe("x", "gptq", 4, 128, down_bits=8, overrides=overrides)
    dynamic = quantization_config(chosen)["dynamic"]

    def bits(name: str) -> int:
        for pattern, changes in dynamic.items():
            if re.match(pattern[2:], name):
                return PLAIN if pattern[0] == "-" else changes["bits"]
        return 4

    for prefix in ("model.layers.", "model.language_model.layers."):
        for name in modules:
            assert bits(name.replace("model.layers.", prefix)) == chosen.bits_of(name), name
        assert bits(f"{prefix}1.self_attn.qkv_proj") == 8 and bits(f"{prefix}11.self_attn.qkv_proj") == 4
        assert bits(f"{prefix}11.mlp.gate_up_proj") == 4, "only one of the two was raised"


# ---------------------------------------------------------------------- mixed checkpoints


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Sample]]:
    folder = save_checkpoint(random_model(**SIZE), tmp_path_factory.mktemp("tiny") / "tiny")
    source = SampleSource(folder)
    return folder, [source.sample(c) for c in conversations(10)]


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for f in sorted(folder.glob("*.safetensors")) for k, v in load_file(f).items()}


def test_export_carries_4_8_and_plain_layers(tiny: tuple[Path, list[Sample]], tmp_path: Path) -> None:
    """What stays plain is not rounded by the export, whatever the others are."""
    import onnx

    folder, samples = tiny
    overrides = {QKV[0]: 8, "model.layers.0.self_attn.o_proj": PLAIN, "model.layers.1.mlp.down_proj": 8}
    mixed = Recipe("mixed", "gptq", 4, 64, overrides=overrides)
    quantize_checkpoint(folder, tmp_path / "q", mixed, samples[:4])
    original, tensors = tensors_of(folder), tensors_of(tmp_path / "q")
    plain = "model.layers.0.self_attn.o_proj.weight"
    name = plain.replace("model.", "model.language_model.") if plain not in original else plain
    assert torch.equal(tensors[plain], original[name])
    with Checkpoint.open(tmp_path / "q") as checkpoint:
        assert {checkpoint.layer(n).bits if checkpoint.layer(n) else 16 for n in overrides} == {8, 16}  # type: ignore[union-attr]
    export_bundle(tmp_path / "q", tmp_path / "b", ExportOptions(vision_precision="fp32"))
    model = onnx.load(tmp_path / "b" / "decoder.onnx")
    bits = {
        n.input[1]: next(a.i for a in n.attribute if a.name == "bits") for n in model.graph.node if "NBits" in n.op_type
    }
    assert {b for k, b in bits.items() if k.startswith((QKV[0] + ".", "model.layers.1.mlp.down_proj"))} == {8}
    assert {b for k, b in bits.items() if "up_proj" in k or k.startswith(QKV[1])} == {4}
    (kept,) = [onnx.numpy_helper.to_array(i) for i in model.graph.initializer if i.name.startswith(plain)]
    assert torch.equal(torch.from_numpy(kept.copy()).T, original[name].float())


# ---------------------------------------------------------------------- the search


def digest(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name != driver.REPORT}


def test_the_demo_model_under_the_gate(tmp_path: Path) -> None:
    samples, held_out = demo_samples(5), demo_samples(3, "test")
    base = quantize_checkpoint(DEMO, tmp_path / "base", RECIPES["rtn-int4-clip"], samples, held_out)
    assert base.divergence is not None
    limit = base.divergence.kl / 3
    done, chosen = quantize_auto(DEMO, tmp_path / "q", RECIPES["rtn-int4-clip"], samples, held_out, limit)
    assert done.divergence is not None and done.divergence.kl <= limit
    assert chosen.trials[0].kl == base.divergence.kl and 0 < len(chosen.steps) < 16
    raised = {m: s.bits for s in chosen.steps for m in s.modules}
    with Checkpoint.open(tmp_path / "q") as checkpoint:
        for layer in done.layers:
            assert layer.bits == raised.get(layer.name, 4)
            stored = checkpoint.layer(layer.name)
            assert (stored.bits if stored else PLAIN) == layer.bits
    written = json.loads((tmp_path / "q" / driver.REPORT).read_text())
    assert written["output"] == str(tmp_path / "q") and written["divergence"]["kl"] == done.divergence.kl
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "q"]
    assert all(a.saved_per_mbit >= b.saved_per_mbit for a, b in zip(chosen.steps, chosen.steps[1:]))
    fewer = [t for t in chosen.trials if t.steps < len(chosen.steps)]
    assert all(t.kl > limit for t in fewer), "no run with fewer steps held"
    assert cli.run(["export", str(tmp_path / "q"), "-o", str(tmp_path / "b"), "--no-verify"]) == 0
    assert cli.run(["run", str(tmp_path / "b"), "What is this?", "--max-new-tokens", "3"]) == 0


def test_killed_searches_go_on_to_the_same_bytes(tiny: tuple[Path, list[Sample]], tmp_path: Path) -> None:
    folder, samples = tiny
    given = (RECIPES["gptq-int4"], samples[:5], samples[5:8])
    base = quantize_checkpoint(folder, tmp_path / "base", *given)
    assert base.divergence is not None
    limit = base.divergence.kl / 2
    _, whole = quantize_auto(folder, tmp_path / "whole", *given, limit)
    assert len(whole.trials) >= 3
    code = (
        "import sys; sys.path[:0] = ['tests', '.']\n"
        "from test_auto import *\n"
        f"torch.set_num_threads({torch.get_num_threads()})\n"
        "source = SampleSource(sys.argv[1])\n"
        "s = [source.sample(c) for c in conversations(10)]\n"
        "def progress(done, layers, what): print(done, what, flush=True)\n"
        f"quantize_auto(sys.argv[1], sys.argv[2], RECIPES['gptq-int4'], s[:5], s[5:8], {limit!r}, progress=progress)"
    )
    command = [sys.executable, "-c", code, str(folder), str(tmp_path / "killed")]
    root = Path(__file__).parents[1]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=root, env={**os.environ})
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("1 run 2") and "mlp.gate" in line:
            break
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed").exists() and (tmp_path / ".killed.auto" / "sensitivities.json").exists()
    with pytest.raises(InputError, match="was begun with other max_kl; run without --resume"):
        quantize_auto(folder, tmp_path / "killed", *given, 2 * limit, resume=True)
    seen: list[str] = []
    _, again = quantize_auto(
        folder, tmp_path / "killed", *given, limit, resume=True, progress=lambda *p: seen.append(p[2])
    )
    assert not [s for s in seen if "run 1" in s or "through layer" in s], "what was done was not done again"
    assert again == whole
    assert digest(tmp_path / "killed") == digest(tmp_path / "whole")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "killed", "whole"]


def test_what_cannot_be_reached(tiny: tuple[Path, list[Sample]], tmp_path: Path) -> None:
    folder, samples = tiny
    with pytest.raises(
        CheckFailedError, match=r"with 8 bits everywhere and .* alone, at most 1e-12 was asked; nothing"
    ):
        quantize_auto(folder, tmp_path / "q", RECIPES["rtn-int4"], samples[:2], samples[2:4], 1e-12)
    with pytest.raises(InputError, match="has 8 bits everywhere"):
        quantize_auto(folder, tmp_path / "q", RECIPES["w8a8"], samples[:2], samples[2:4], 1.0)
    with pytest.raises(InputError, match="pass pictures or conversations"):
        quantize_auto(folder, tmp_path / "q", RECIPES["rtn-int4"], samples[:2], [], 1.0)
    done, chosen = quantize_auto(folder, tmp_path / "easy", RECIPES["rtn-int4"], samples[:2], samples[2:4], 100.0)
    assert chosen.steps == () and len(chosen.trials) == 1 and {r.bits for r in done.layers} == {4}
    with pytest.raises(InputError, match="already quantized"):
        quantize_auto(tmp_path / "easy", tmp_path / "q", RECIPES["rtn-int4"], samples[:2], samples[2:4], 1.0)
    with pytest.raises(InputError, match="exists already"):
        quantize_auto(folder, tmp_path / "easy", RECIPES["rtn-int4"], samples[:2], samples[2:4], 1.0)
    assert [p.name for p in tmp_path.iterdir()] == ["easy"]


def test_a_full_disk(tiny: tuple[Path, list[Sample]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, samples = tiny

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(auto, "sensitivities", full)
    given = (RECIPES["gptq-int4"], samples[:2], samples[2:4], 1e-6)
    with pytest.raises(CheckpointError, match="the disk is full; free some space, then go on with --resume"):
        quantize_auto(folder, tmp_path / "q", *given)
    assert not (tmp_path / "q").exists() and (tmp_path / ".q.auto" / "trial-0000").exists()


# ---------------------------------------------------------------------- the command line


def run(*arguments: object) -> int:
    return cli.run([str(a) for a in arguments])


def test_gates_on_scores(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A model of random weights answers nothing right: the gate trips, and nothing is left."""
    folder = save_checkpoint(random_model(**SIZE), tmp_path / "tiny")
    spoken = save_conversations(tmp_path / "c", 10)
    given = ("quantize", folder, "-o", tmp_path / "q", "--recipe", "gptq-int4", "--images", spoken, "--samples", 6)
    scored = (*given, "--tasks", 3, "--task", "count", "--task", "where")
    assert run(*scored, "--min-score", "count=0.4", "--min-score", "0.3") == 1
    err = capfd.readouterr().err
    assert "score count is 0.0000, at least 0.4 was asked (95 % interval 0.000 to 0.562 over 3 cases" in err
    assert "score mean is 0.0000, at least 0.3 was asked" in err and "nothing was written" in err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c", "tiny"]
    assert run(*scored, "--min-score", "0", "--report", tmp_path / "r.html") == 0
    assert "count" in capfd.readouterr().out
    data = report.read_report(tmp_path / "q")
    assert [(s["task"], s["n"]) for s in data["scores"]] == [("count", 3), ("where", 3), ("mean", 6)]
    assert data["gates"] == [{**data["gates"][0], "name": "score mean", "limit": 0.0, "held": True}]
    assert data["provenance"]["recipe"]["name"] == "gptq-int4" and data["provenance"]["seed"] == 0
    assert data["quantized"]["name"] == "q" and "Task scores before and after" in (tmp_path / "r.html").read_text()
    # the same model exported and scored by hand
    export_bundle(tmp_path / "q", tmp_path / "b", ExportOptions(vision_precision="fp32"))
    by_hand = summarize(score_bundle(tmp_path / "b", ["count", "where"], 3, processes=1))
    assert [r.right for r in by_hand] == [s["after"] for s in data["scores"][:2]]
    assert not [p for p in (tmp_path / "q").iterdir() if "partial" in p.name or p.suffix == ".npy"]


def test_a_report_that_was_cut_short(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk fills up while hidden states are measured: nothing is published, and --resume ends in the same bytes."""
    folder = save_checkpoint(random_model(**SIZE), tmp_path / "tiny")
    spoken = save_conversations(tmp_path / "c", 10)
    given = ("quantize", folder, "--recipe", "rtn-int4", "--images", spoken, "--samples", 6)
    assert run(*given, "-o", tmp_path / "whole") == 0
    with monkeypatch.context() as patched:

        def full(*_: Any, **__: Any) -> None:
            (tmp_path / ".q.partial" / "fidelity.partial" / "rest.npy").write_bytes(b"0")
            raise OSError(28, "No space left on device")

        patched.setattr(report, "compare", full)
        assert run(*given, "-o", tmp_path / "q") == 2
    assert "the disk is full; free some space, then go on with --resume" in capfd.readouterr().err
    assert not (tmp_path / "q").exists()
    left = tmp_path / ".q.partial" / "fidelity.partial"
    left.mkdir()  # as after a kill
    (left / "rest.npy").write_bytes(b"0")
    assert run(*given, "-o", tmp_path / "q", "--resume") == 0
    ours, theirs = digest(tmp_path / "q"), digest(tmp_path / "whole")
    assert ours.pop("fidelity.json") == theirs.pop("fidelity.json").replace(b'"name": "whole"', b'"name": "q"')
    assert ours == theirs


def test_auto_at_the_command_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = save_checkpoint(random_model(**SIZE), tmp_path / "tiny")
    spoken = save_conversations(tmp_path / "c", 10)
    given = ("quantize", folder, "-o", tmp_path / "q", "--recipe", "gptq-int4", "--images", spoken, "--samples", 6)
    assert run(*given, "--held-out", 3, "--auto", "--max-kl", 0.004, "--report", tmp_path / "r.html") == 0
    out = capfd.readouterr().out
    data = report.read_report(tmp_path / "q")
    assert data["divergence"]["kl"] <= 0.004 and data["gates"][0]["held"]
    assert data["auto"]["trials"][-1]["kl"] > 0 and data["auto"]["steps"]
    for step in data["auto"]["steps"]:
        assert step["name"] in out and step["name"] in (tmp_path / "r.html").read_text()
    held = [t for t in data["auto"]["trials"] if t["steps"] == len(data["auto"]["steps"])]
    assert held[0]["kl"] == pytest.approx(data["divergence"]["kl"], rel=1e-6), "measured again, from the files"
    shutil.rmtree(tmp_path / "q")
    assert run(*given, "--auto", "--max-kl", 1e-12) == 1 and "8 bits everywhere" in capfd.readouterr().err
    for extra, message in (
        (("--auto",), "pass --max-kl with the limit"),
        (("--held-out", 30), "10 conversations can be used, 30 are to be held out"),
        (("--min-score", "nosuch=1"), "task 'nosuch' is unknown"),
        (("--recipe", "w8a8", "--sensitivity", "linear"), "ask for --sensitivity layer"),
        (("--report", tmp_path / "no" / "r.html"), "no such folder"),
    ):
        assert run(*given, *extra) == 2, extra
        assert message in capfd.readouterr().err
    bare = ("quantize", folder, "-o", tmp_path / "q", "--recipe", "rtn-int4", "--group-size", 64)
    assert run(*bare, "--sensitivity", "layer") == 2 and "pass --images" in capfd.readouterr().err
    assert run(*bare) == 0
    data = report.read_report(tmp_path / "q")
    assert data["divergence"] is None and len(data["layers"]) == 14 and data["layers"][0]["bits"] == 4
    assert run(*bare) == 2 and "exists already" in capfd.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c", "q", "r.html", "tiny"]
    assert recipe("rtn-int4", 64).bits_of(QKV[0]) == 4
