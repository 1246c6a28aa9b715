"""The command line as a user meets it: processes, streams and statuses."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import USABLE, Pair
from PIL import Image

from edgevl.runtime import cli
from edgevl.runtime.bundle import Bundle
from edgevl.runtime.errors import InputError
from edgevl.runtime.image_loading import check_source


def edgevl(*arguments: object, stdin: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "edgevl.runtime", *map(str, arguments)]
    return subprocess.run(
        command, input=stdin, capture_output=True, text=True, env={**os.environ, **environment}, check=False
    )


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pictures") / "photo.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (112, 84, 3), dtype=np.uint8)).save(path)
    return path


def test_export_verify_run_inspect(tiny: Pair, tmp_path: Path, photo: Path) -> None:
    bundle = tmp_path / "bundle"
    done = edgevl("export", tiny.checkpoint, "-o", bundle, "--precision", "fp32")
    assert done.returncode == 0, done.stderr
    assert "decoder    fp32" in done.stdout and "peak memory" in done.stdout and "verified on ort-cpu" in done.stderr
    assert "\r" not in done.stderr  # no bars when not a terminal

    done = edgevl("verify", bundle)
    assert done.returncode == 0 and "prefill" in done.stdout and "DRIFTS" not in done.stdout

    done = edgevl("run", bundle, "Read the text.", "--image", photo, "--max-new-tokens", 5, "--stats")
    assert done.returncode == 0 and "engine: ort-cpu" in done.stderr and "tokens/s" in done.stderr
    answer = edgevl(
        "run", bundle, "Read the text.", "--image", photo, "--max-new-tokens", 5, "--json", "--engine", "ort-cpu"
    )
    data = json.loads(answer.stdout)
    assert answer.stderr == "" and data["text"] + "\n" == done.stdout
    assert data["usage"]["completion_tokens"] == 5 and data["finish_reason"] == "length"
    assert set(data) >= {"text", "boxes", "usage", "timings", "finish_reason"}

    done = edgevl("inspect", bundle)
    assert done.returncode == 0 and "image_embeds" in done.stdout and "M-RoPE released" in done.stdout
    assert json.loads(edgevl("inspect", bundle, "--json").stdout)["schema_version"] == 1
    listed = json.loads(edgevl("inspect", tiny.checkpoint, "--json").stdout)
    assert {"name": "model.norm.weight", "dtype": "F32", "shape": [64]} in listed["tensors"]
    assert "model.norm.weight" in edgevl("inspect", tiny.checkpoint).stdout


def test_doctor() -> None:
    done = edgevl("doctor")
    assert done.returncode == 0 and "ort-cpu" in done.stdout and "processor" in done.stdout
    engines = json.loads(edgevl("doctor", "--json").stdout)["engines"]
    assert {e["name"]: e["usable"] for e in engines} == USABLE


def test_chat(tiny: Pair, photo: Path) -> None:
    script = (
        f"/help\n/stats\n/image {photo}\nRead the text.\nAnd now?\n/stats\n/undo\nAnd now?\n"
        "/image absent.png\n/nonsense\n/reset\n/undo\n/quit\nnever\n"
    )
    done = edgevl("chat", tiny.bundle, "--max-new-tokens", 4, stdin=script)
    assert done.returncode == 0, done.stderr
    assert "/image FILE" in done.stderr and "no answer yet" in done.stderr
    assert "absent.png': not found" in done.stderr and "/nonsense is unknown" in done.stderr
    assert "took back the last question" in done.stderr and "nothing to take back" in done.stderr
    cached = [line for line in done.stderr.splitlines() if "from the cache" in line]
    assert len(cached) == 1 and ", 0 from the cache" not in cached[0]


def test_chat_repeats_itself_after_undo(tiny: Pair) -> None:
    done = edgevl("chat", tiny.bundle, "--max-new-tokens", 6, stdin="Read the text.\nHow many?\n/undo\nHow many?\n")
    once = edgevl("chat", tiny.bundle, "--max-new-tokens", 6, stdin="Read the text.\nHow many?\n")
    assert done.stdout.startswith(once.stdout) and done.returncode == once.returncode == 0


BAD = [
    (["run", "{tmp}/absent", "hi"], "no such folder"),
    (["run", "{checkpoint}", "hi"], "run `edgevl export` on it first"),
    (["run", "{bundle}", "hi", "--image", "{tmp}/absent.jpg"], "not found; check the path"),
    (["run", "{bundle}", "hi", "--image", "{tmp}"], "is a folder"),
    (["run", "{bundle}", "hi", "--image", "{text}"], "not a picture"),
    (["run", "{bundle}", "hi", "--video", "{photo}"], "is a PNG picture, not a video; pass it as a picture"),
    (["run", "{bundle}", "hi", "--engine", "abacus"], "engine 'abacus' is unknown"),
    (["run", "{bundle}", "hi", "--engine", "ort-cuda"], "engine 'ort-cuda' cannot run here"),
    (["run", "{bundle}", "hi", "--temperature", "-1"], "temperature"),
    (["run", "{bundle}", "hi", "--max-new-tokens", "0"], "max_new_tokens"),
    (["run", "{bundle}", "hi", "--max-pixels", "5", "--image", "{photo}"], "max_pixels"),
    (["run", "{bundle}", "hi", "--capacity", "9"], "the prompt is"),
    (["run", "{bundle}", "hi", "--draw-boxes", "x.png"], "--draw-boxes needs a picture"),
    (["run", "{bundle}"], "Missing argument 'PROMPT'"),
    (["run", "{bundle}", "hi", "--nonsense"], "No such option"),
    (["nonsense"], "No such command 'nonsense'"),
    (["export", "{tmp}/absent", "-o", "{tmp}/b"], "absent"),
    (["export", "{checkpoint}", "-o", "{bundle}"], "exists already"),
    (["export", "{checkpoint}", "-o", "{tmp}/b", "--precision", "int1"], "precision 'int1' is unknown"),
    (["export", "{checkpoint}"], "Missing option '-o'"),
    (["verify", "{tmp}/absent"], "no such folder"),
    (["inspect", "{tmp}/absent"], "no such folder"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=[" ".join(a)[:60] for a, _ in BAD])
def test_bad_input_is_one_line_and_status_2(
    tiny: Pair, tmp_path: Path, photo: Path, capfd: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    text = tmp_path / "notes.txt"
    text.write_text("hello")
    before = sorted(p.name for p in tmp_path.iterdir())
    names = {"tmp": tmp_path, "checkpoint": tiny.checkpoint, "bundle": tiny.bundle, "photo": photo, "text": text}
    status = cli.run([a.format(**names) for a in arguments])
    out, err = capfd.readouterr()
    assert status == 2 and out == "" and "Traceback" not in err
    errors = [line for line in err.splitlines() if line.startswith("edgevl: error:")]
    assert len(errors) == 1 and message in errors[0]
    assert sorted(p.name for p in tmp_path.iterdir()) == before


EARLY = [
    (["--image", "{tmp}/absent.png"], "absent.png': not found; check the path of the picture"),
    (["--image", "{tmp}"], "is a folder; expected a picture file"),
    (["--image", "{photo}/x.png"], "cannot be read (Not a directory); check the path of the picture"),
    (["--image", "http://x/y.png"], "edgevl fetches nothing"),
    (["--video", "{tmp}/absent.mp4"], "absent.mp4': not found; check the path of the video"),
    (["--image", "{photo}", "--max-pixels", "5"], "max_pixels is 5"),
    (["--image", "{photo}", "--min-pixels", "9000", "--max-pixels", "1000"], "min_pixels is 9000, max_pixels 1000"),
    (["--image", "{photo}", "--ttft-budget", "soon"], "a time budget of 'soon'"),
    (["--video", "{tmp}", "--fps", "-1"], "fps is -1.0"),
    (["--temperature", "-1"], "temperature is -1.0"),
    (["--top-p", "3"], "top_p is 3.0"),
    (["--seed", "-1"], "seed is -1"),
    (["--lookup", "-1"], "lookup_tokens is -1"),
    (["--stop", ""], "stop is ['']"),
    (["--system", "\udcff"], "the system prompt holds '\\udcff' at 0, half of a character"),
    (["--capacity", "0"], "capacity is 0"),
    (["--threads", "0"], "threads is 0"),
    (["--prefill-chunk", "0"], "prefill chunk is 0"),
    (["--image-cache-mb", "-1"], "image_cache_mb is -1.0"),
]


@pytest.mark.parametrize(("arguments", "message"), EARLY, ids=[ascii(" ".join(a)) for a, _ in EARLY])
def test_what_can_be_known_is_told_before_the_model_is_opened(
    tiny: Pair, tmp_path: Path, photo: Path, capfd: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    """With engine auto, whose line would come before the error."""
    names = {"tmp": tmp_path, "photo": photo}
    assert cli.run(["run", str(tiny.bundle), "hi", *(a.format(**names) for a in arguments)]) == 2
    out, err = capfd.readouterr()
    assert out == "" and err.count("\n") == 1 and message in err


def test_chat_and_watch_check_first_too(tiny: Pair, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for command in (["chat", str(tiny.bundle)], ["watch", str(tiny.bundle), "x", "--source", str(tmp_path)]):
        for arguments, message in ((["--top-p", "3"], "top_p is 3.0"), (["--system", "\udcff"], "half of a character")):
            assert cli.run([*command, *arguments]) == 2
            err = capfd.readouterr().err
            assert err.count("\n") == 1 and message in err


def test_a_picture_that_may_not_be_read(photo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may read anything
    with pytest.raises(InputError, match="Permission denied; make it readable for this user"):
        check_source(str(photo))
    check_source("data:image/png;base64,AA==")


def test_a_picture_from_a_pipe_is_read_once(tiny: Pair, photo: Path) -> None:
    command = f"{sys.executable} -m edgevl.runtime run {tiny.bundle} hi --image <(cat {photo}) --max-new-tokens 2"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_verify_without_golden_vectors(tiny: Pair) -> None:
    done = edgevl("verify", tiny.bundle)
    assert done.returncode == 2 and "--against" in done.stderr and done.stderr.count("\n") == 1


def test_an_export_that_verified_nothing_says_so(
    tiny: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    export = ["export", str(tiny.checkpoint), "--precision", "fp32", "-o"]
    assert cli.run([*export, str(tmp_path / "small"), "--max-tokens", "1"]) == 0
    err = capfd.readouterr().err
    assert err.splitlines()[-1] == (
        "nothing was verified: no golden case fits into 1 tokens; export with a larger --max-tokens"
    )
    assert "golden case 'text' left out" in err
    monkeypatch.setattr("edgevl.export.verify.host_missing", lambda: "torch not installed here")
    assert cli.run([*export, str(tmp_path / "bare")]) == 0
    err = capfd.readouterr().err
    assert err == (
        "nothing was verified: no golden vectors: torch not installed here; on a workstation: "
        f"edgevl verify BUNDLE --against {tiny.checkpoint}\n"
    )
    assert cli.run([*export, str(tmp_path / "asked"), "--no-verify"]) == 0
    assert capfd.readouterr().err == ""


def test_drift_is_status_1(tiny: Pair, tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(tiny.bundle, bundle)
    assert edgevl("verify", bundle, "--against", tiny.checkpoint).returncode == 0
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["model"]["text"]["rope_theta"] = 100.0  # a host that rotates wrongly
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    done = edgevl("verify", bundle)
    assert done.returncode == 1 and "prefill" in done.stderr and "DRIFTS" in done.stdout


def test_help_shows_examples(capfd: pytest.CaptureFixture[str]) -> None:
    for command in cli._COMMANDS:
        assert cli.run([command, "--help"]) == 0
        assert "Example" in capfd.readouterr().out
    assert cli.run(["--help"]) == 0 and "doctor" in capfd.readouterr().out
    assert cli.run(["--version"]) == 0 and "edgevl" in capfd.readouterr().out


def test_no_arguments_shows_help() -> None:
    done = edgevl()
    assert done.returncode == 2 and "Commands" in done.stderr


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    done = edgevl("run", tmp_path / "absent", "hi", EDGEVL_DEBUG="1")
    assert "Traceback" in done.stderr and "BundleError" in done.stderr


def test_broken_pipe_is_quiet(tiny: Pair) -> None:
    command = f"{sys.executable} -m edgevl.runtime inspect {tiny.bundle} | head -1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert done.stderr == "" and done.stdout.startswith("bundle")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has it")
@pytest.mark.parametrize("command", ["inspect {bundle}", "inspect {bundle} --json", "run {bundle} hi", "--help"])
def test_a_full_disk_behind_stdout_is_no_bug(tiny: Pair, command: str) -> None:
    command = f"{sys.executable} -m edgevl.runtime {command.format(bundle=tiny.bundle)} > /dev/full"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    last = done.stderr.splitlines()[-1]
    assert last == (
        "edgevl: error: standard output or an open file: No space left on device; free some space, or write elsewhere"
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr and "Exception ignored" not in done.stderr


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (OSError(errno.EIO, "Input/output error", "x.onnx"), 2, "x.onnx: Input/output error; the machine refused it"),
        (PermissionError(errno.EACCES, "Permission denied", "t"), 2, "t: Permission denied; the machine refused it"),
        (MemoryError("Unable to allocate 8 GiB"), 2, "out of memory (Unable to allocate 8 GiB); free some"),
        (IsADirectoryError(errno.EISDIR, "Is a directory", "d"), 1, "unexpected IsADirectoryError"),  # ours to foresee
    ],
)
def test_errors_of_the_machine(
    tiny: Pair,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    error: Exception,
    status: int,
    message: str,
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(Bundle, "open", fail)
    assert cli.run(["inspect", str(tiny.bundle)]) == status
    err = capfd.readouterr().err
    assert message in err and err.count("\n") == 1 and ("a bug" in err) == (status == 1)


def test_interrupt_is_130(tiny: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    from edgevl.runtime.generation import VisionLanguageModel

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(VisionLanguageModel, "open", interrupt)
    assert cli.run(["run", str(tiny.bundle), "hi"]) == 130


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux hands ru_maxrss on; others do not")
def test_peak_memory_is_this_process_own() -> None:
    """Linux's ru_maxrss is inherited by a process that a large one starts; the exported table must not show that."""
    code = "from edgevl.runtime.doctor import peak_rss_bytes; print(peak_rss_bytes())"
    large = f"x = bytearray(400_000_000); import os, sys; os.execv(sys.executable, [sys.executable, '-c', {code!r}])"
    done = subprocess.run([sys.executable, "-c", large], capture_output=True, text=True, check=True)
    assert 5e6 < int(done.stdout) < 2e8
