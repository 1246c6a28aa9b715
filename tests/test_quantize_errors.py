"""What a user can get wrong at `edgevl quantize`: one line that says what to do, status 2, and nothing half-written."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import random_model, save_checkpoint
from PIL import Image
from safetensors.torch import load_file, save_file

from edgevl.calibration import commands, driver, layer_methods, report
from edgevl.calibration.driver import quantize_checkpoint
from edgevl.calibration.fidelity import Divergence
from edgevl.calibration.recipes import recipe
from edgevl.runtime import cli


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints and pictures; what is written goes elsewhere."""
    folder = tmp_path_factory.mktemp("place")
    save_checkpoint(random_model(), folder / "plain")
    quantize_checkpoint(folder / "plain", folder / "quantized", recipe("rtn-int4", 32), [])
    damaged(folder / "plain", folder / "infinite", "model.layers.1.post_attention_layernorm.weight", 3e38)
    for name, good in (("pictures", 6), ("few", 3)):
        (folder / name).mkdir()
        for i in range(good):
            pixels = np.random.default_rng(i).integers(0, 256, (56, 84, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i}.png")
        (folder / name / "text.png").write_bytes(b"no picture")
        (folder / name / "cut.png").write_bytes((folder / name / "0.png").read_bytes()[:200])
    (folder / "empty").mkdir()
    (folder / "taken").mkdir()
    (folder / "taken" / "notes.txt").write_text("mine")
    (folder / "bad.jsonl").write_text('[{"role": "user", "content": [{"type": "image"}]}]\n')
    return folder


def damaged(source: Path, target: Path, name: str, factor: float) -> None:
    shutil.copytree(source, target)
    weights = load_file(target / "model.safetensors")
    weights[name] *= factor
    save_file(weights, target / "model.safetensors", {"format": "pt"})


def failed(capfd: pytest.CaptureFixture[str], arguments: list[str], status: int = 2) -> str:
    """The one error line of a command that must fail."""
    assert cli.run(arguments) == status
    out, err = capfd.readouterr()
    assert out == "" and "Traceback" not in err
    errors = [line for line in err.splitlines() if line.startswith("edgevl: error:")]
    assert len(errors) == 1, err
    return errors[0]


GPTQ = ["--recipe", "gptq-int4", "--group-size", "32", "--images", "{place}/pictures"]
BAD = [
    ("quantized", GPTQ, "already quantized (gptq); give the original checkpoint"),
    ("plain", GPTQ[:2] + GPTQ[4:], "group size 128 does not divide hidden_size 64; choose one that does, or -1"),
    ("plain", [*GPTQ[:3], "64", *GPTQ[4:]], "group size 64 does not divide intermediate_size 96"),
    ("plain", [*GPTQ[:3], "48", *GPTQ[4:]], "group size 48 is not offered"),
    ("infinite", GPTQ, "model.layers.1"),
    ("infinite", ["--recipe", "w8a8", "--images", "{place}/pictures"], "model.layers.1"),
    ("infinite", ["--recipe", "kv-int8", "--images", "{place}/pictures"], "model.layers.1"),
    ("absent", GPTQ, "absent: no such folder"),
    ("plain", ["--recipe", "gptq-int3"], "recipe 'gptq-int3' is unknown; expected one of gptq-int4"),
    ("plain", GPTQ[:4], "pass --images with a folder of pictures or a .jsonl"),
    ("plain", [*GPTQ[:5], "{place}/nowhere"], "not found; expected a folder of pictures or a .jsonl"),
    ("plain", [*GPTQ[:5], "{place}/empty"], "no pictures inside"),
    ("plain", [*GPTQ[:5], "{place}/bad.jsonl"], "bad.jsonl, line 1"),
    ("plain", [*GPTQ[:5], "{place}/few"], "3 of 5 conversations can be used (2 skipped), expected at least 4"),
]


@pytest.mark.parametrize(("source", "options", "message"), BAD, ids=[m[:50] for *_, m in BAD])
def test_bad_input(
    place: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], source: str, options: list[str], message: str
) -> None:
    given = [o.format(place=place) for o in options]
    line = failed(capfd, ["quantize", str(place / source), "-o", str(tmp_path / "q"), *given])
    assert message in line, line
    left = [p.name for p in tmp_path.iterdir()]
    # a run that broke off in the middle may be resumed; its folder is hidden and nothing opens it
    assert left in ([], [".q.partial"]) and (left == [] or source == "infinite")


def test_pictures_that_do_not_decode_are_listed_and_left_out(
    place: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    given = [o.format(place=place) for o in GPTQ]
    assert cli.run(["quantize", str(place / "plain"), "-o", str(tmp_path / "q"), *given]) == 0
    err = capfd.readouterr().err
    skipped = [line for line in err.splitlines() if line.startswith("skipped:")]
    assert sorted(name for line in skipped for name in ("text.png", "cut.png") if name in line) == [
        "cut.png",
        "text.png",
    ]
    assert "4 conversations to calibrate on, 2 held out, 2 skipped" in err


def test_an_output_that_is_there_is_left_alone(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    rounding = ["--recipe", "rtn-int4", "--group-size", "32"]
    for output in ("taken", "empty"):
        line = failed(capfd, ["quantize", str(place / "plain"), "-o", str(place / output), *rounding])
        assert "exists already; choose another output, or remove it first" in line
    assert (place / "taken" / "notes.txt").read_text() == "mine"
    line = failed(capfd, ["quantize", str(place / "plain"), "-o", str(place / "no" / "q"), *rounding])
    assert "no such folder; create it, or choose another output" in line


def test_a_shard_that_finds_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library tells of a full disk in a class of its own (seen on a small tmpfs)."""
    from edgevl.calibration import output

    real = output.save_file

    def message(*_: Any, **__: Any) -> None:
        raise output.SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(output, "save_file", message)
    with pytest.raises(OSError) as told:
        output.save_shard(tmp_path / "x.safetensors", {"a": torch.zeros(3)})
    assert told.value.errno == errno.ENOSPC
    monkeypatch.setattr(output, "save_file", real)
    with pytest.raises(OSError):
        output.save_shard(tmp_path / "nowhere" / "x.safetensors", {"a": torch.zeros(3)})


@pytest.mark.parametrize("where", ["activations", "shard", "rest"])
def test_a_full_disk_is_told_and_the_run_goes_on_later(
    place: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """Wherever the disk is found full; the same command with --resume then ends as if nothing had been."""
    given = ["quantize", str(place / "plain"), "-o", str(tmp_path / "q"), *(o.format(place=place) for o in GPTQ)]
    calls = 0

    def full(*arguments: Any, **_: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == {"activations": 4, "shard": 2, "rest": 1}[where]:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*arguments)

    module, name = {
        "activations": (os, "posix_fallocate"),
        "shard": (layer_methods, "save_shard"),
        "rest": (driver, "write_rest"),
    }[where]
    real = getattr(module, name)
    with monkeypatch.context() as patch:
        patch.setattr(module, name, full)
        line = failed(capfd, given)
    assert line.endswith("q: the disk is full; free some space, then go on with --resume")
    assert not (tmp_path / "q").exists()
    assert cli.run([*given, "--resume"]) == 0
    capfd.readouterr()
    again = [*given[:3], str(tmp_path / "once"), *given[4:]]
    assert cli.run(again) == 0
    for path in (tmp_path / "once").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "q" / path.name).read_bytes()


# ---------------------------------------------------------------------- going on


def interrupted(source: Path, target: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The arguments of a run that was stopped after its layers."""
    given = ["quantize", str(source), "-o", str(target), *(o.format(place=place) for o in GPTQ)]

    def stopped(*_: Any) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(driver, "write_rest", stopped)
        assert cli.run(given) == 2
    return given


def test_a_run_goes_on_only_with_the_same_weights_and_config(
    place: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the same names, sizes and times: other bytes are found, touched files are the same."""
    source = tmp_path / "c"
    shutil.copytree(place / "plain", source)
    weights, config = source / "model.safetensors", source / "config.json"
    save_file(load_file(weights), weights, {"format": "pt"})
    given = interrupted(source, tmp_path / "q", place, monkeypatch)
    before, times = weights.read_bytes(), weights.stat()
    for name in ("model.layers.1.input_layernorm.weight", "model.layers.0.mlp.down_proj.weight"):
        tensors = load_file(weights)
        found = next(k for k in tensors if k.endswith(name.removeprefix("model.")))
        tensors[found] *= 1.01
        save_file(tensors, weights, {"format": "pt"})
        os.utime(weights, ns=(times.st_atime_ns, times.st_mtime_ns))
        assert weights.stat().st_size == times.st_size
        capfd.readouterr()
        line = failed(capfd, [*given, "--resume"])
        assert ".q.partial: was begun with other weights; run without --resume to start over" in line
        weights.write_bytes(before)
    said = config.read_text()
    changed = json.loads(said)
    changed["text_config"]["rms_norm_eps"] *= 2
    config.write_text(json.dumps(changed))
    assert "was begun with other config; run without --resume" in failed(capfd, [*given, "--resume"])
    config.write_text(said)
    line = failed(capfd, [*given, "--held-out", "3", "--resume"])
    assert "was begun with other samples, held-out samples; run without" in line
    (tmp_path / ".q.partial" / "state.json").rename(tmp_path / "state.json")
    (tmp_path / ".q.partial" / "state.json").write_text("{")
    assert "state.json: cannot be read" in failed(capfd, [*given, "--resume"])
    (tmp_path / "state.json").replace(tmp_path / ".q.partial" / "state.json")
    os.utime(weights)
    assert cli.run([*given, "--resume"]) == 0


def test_something_that_comes_to_lie_at_the_output(
    place: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An empty folder is not replaced, a full one costs nothing: the same command with --resume ends as it should."""
    real, target = driver.write_rest, tmp_path / "q"

    def meanwhile(*given: Any) -> None:
        target.mkdir()
        real(*given)

    given = ["quantize", str(place / "plain"), "-o", str(target), *(o.format(place=place) for o in GPTQ)]
    with monkeypatch.context() as patch:
        patch.setattr(driver, "write_rest", meanwhile)
        line = failed(capfd, given)
    assert "was made by something else in the meantime; the result waits in" in line and "--resume" in line
    assert not list(target.iterdir()) and (tmp_path / ".q.partial" / "state.json").exists()
    target.rmdir()

    def never(*_: Any) -> None:
        raise AssertionError("the layers are done")

    monkeypatch.setattr(driver, "quantize_layer", never)
    assert cli.run([*given, "--resume"]) == 0
    assert not [p.name for p in target.iterdir() if p.suffix == ".npy" or p.name == "state.json"]
    assert [p.name for p in tmp_path.iterdir()] == ["q"]


def test_something_that_comes_to_lie_at_the_output_of_a_search(
    place: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real, target = commands.write_report, tmp_path / "q"

    def meanwhile(*given: Any) -> None:
        target.mkdir()
        real(*given)

    given = ["quantize", str(place / "plain"), "-o", str(target), *(o.format(place=place) for o in GPTQ)]
    given += ["--auto", "--max-kl", "1000"]
    with monkeypatch.context() as patch:
        patch.setattr(commands, "write_report", meanwhile)
        assert "was made by something else in the meantime; the result waits in" in failed(capfd, given)
    assert not list(target.iterdir())
    target.rmdir()
    assert cli.run([*given, "--resume"]) == 0
    assert [p.name for p in tmp_path.iterdir()] == ["q"] and (target / "model.safetensors.index.json").exists()


def test_a_divergence_that_is_no_number_is_never_small_enough(
    place: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    nowhere = Divergence(float("nan"), 0.0, 10)
    monkeypatch.setattr(driver, "_divergence", lambda _: nowhere)
    given = ["quantize", str(place / "plain"), "-o", str(tmp_path / "q"), *(o.format(place=place) for o in GPTQ)]
    line = failed(capfd, [*given, "--max-kl", "1000"], status=1)
    assert "KL to the original is nan, at most 1000.0 was asked; nothing was written" in line
    assert list(tmp_path.iterdir()) == []
    # and of the report's own measurement
    monkeypatch.undo()
    monkeypatch.setattr(report, "combined", lambda _: nowhere)
    pair = ["fidelity", str(place / "plain"), str(place / "quantized"), "--images", str(place / "pictures")]
    assert cli.run([*pair, "--max-kl", "1000"]) == 1
    assert "KL is nan, at most 1000 was asked" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("good", "samples", "calibrated", "held"),
    [(4, 64, 3, 1), (5, 64, 4, 1), (6, 64, 4, 2), (9, 64, 7, 2), (6, 3, 3, 2), (3, 1, 1, 2), (2, 1, 1, 1)],
)
def test_how_many_are_held_out(
    place: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], good: int, samples: int, calibrated: int, held: int
) -> None:
    """Two where enough are left, since one gives no interval."""
    pictures = tmp_path / "p"
    pictures.mkdir()
    for i in range(good):
        Image.new("RGB", (56, 56), (20 * i, 0, 0)).save(pictures / f"{i}.png")
    options = ["--images", str(pictures), "--samples", str(samples), "--recipe", "rtn-int4", "--group-size", "32"]
    assert cli.run(["quantize", str(place / "plain"), "-o", str(tmp_path / "q"), *options]) == 0
    out, err = capfd.readouterr()
    assert f"{calibrated} conversations to calibrate on, {held} held out" in err
    assert ("one conversation, too few for an interval" in out) == (held == 1) and ("(95 % " in out) == (held > 1)
