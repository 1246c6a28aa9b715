"""Files that commands write: refused before the work, whole or not at all after it."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Pair
from PIL import Image

from edgevl.benchmarks import gpu, language_model, memory
from edgevl.calibration import page
from edgevl.runtime import cli
from edgevl.runtime.errors import InputError
from edgevl.runtime.output_file import check_output_file, replacing, write_output
from edgevl.runtime.profile import Machine, Profile


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "d").mkdir()
    (tmp_path / "f").write_text("old")
    os.mkfifo(tmp_path / "p")
    return tmp_path


WRONG = [
    ("", "the name of an output is empty; expected the name of a page"),
    ("d", "d: a folder, expected the name of a page; choose a name inside it"),
    ("d/", "a folder, expected"),
    ("p", "a device or pipe, expected the name of a page"),
    ("/dev/null", "/dev/null: a device or pipe"),
    ("no/r", "no: no such folder; create it, or choose another output"),
    ("f/r", "f: no such folder"),
    ("n" * 250, "cannot be written (File name too long); choose another name"),
]


@pytest.mark.parametrize(("name", "message"), WRONG, ids=[n[:9] or "empty" for n, _ in WRONG])
def test_names_that_cannot_be(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, message: str) -> None:
    monkeypatch.chdir(folder)
    with pytest.raises(InputError) as raised:
        check_output_file(name, "a page")
    assert message in str(raised.value) and "\n" not in str(raised.value)
    assert Path("/dev/null").is_char_device()


def test_names_that_can_be(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    for name in ("r", "f", "d/r", "./r", str(folder / "r"), "n" * 200):
        check_output_file(name)
    assert sorted(p.name for p in folder.iterdir()) == ["d", "f", "p"]  # it looks, and writes nothing


def test_a_folder_where_nothing_may_be_written(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write anywhere
    with pytest.raises(InputError, match="nothing may be written in this folder; change its mode"):
        check_output_file(folder / "r")


def test_written_whole(folder: Path) -> None:
    write_output(folder / "f", "new é\n")
    assert (folder / "f").read_text(encoding="utf-8") == "new é\n"
    before = os.umask(0o027)
    try:
        write_output(folder / "r", "x")
    finally:
        os.umask(before)
    assert stat.S_IMODE((folder / "r").stat().st_mode) == 0o640


@pytest.mark.parametrize(
    ("error", "raised", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), InputError, r"f: cannot be written \(No space.*; free some"),
        (OSError(errno.EIO, "Input/output error"), InputError, r"\(Input/output error\); choose another output"),
        (KeyboardInterrupt("stop"), KeyboardInterrupt, "stop"),
    ],
)
def test_a_failure_leaves_what_was_there(
    folder: Path, error: BaseException, raised: type[BaseException], message: str
) -> None:
    with pytest.raises(raised, match=message), replacing(folder / "f") as partial:
        partial.write_text("half")
        raise error
    assert (folder / "f").read_text() == "old" and sorted(p.name for p in folder.iterdir()) == ["d", "f", "p"]


def test_a_folder_that_came_meanwhile(folder: Path) -> None:
    with pytest.raises(InputError, match="d: cannot be written"):
        write_output(folder / "d", "x")
    with pytest.raises(InputError, match="d: cannot be written"):
        page.write_output(folder / "d", "x")
    assert sorted(p.name for p in folder.iterdir()) == ["d", "f", "p"]


def test_profiles_are_saved_whole(folder: Path) -> None:
    profile = Profile("b", Machine("cpu", "ort-cpu", 1, "1"), *([(1.0, 1.0, 1.0)] for _ in range(3)))  # type: ignore
    with pytest.raises(InputError, match="d: cannot be written"):
        profile.save(folder / "d")
    with pytest.raises(InputError, match="f: cannot be made"):
        profile.save(folder / "f" / "p.json")
    assert sorted(p.name for p in folder.iterdir()) == ["d", "f", "p"]


# every option that names a file


@pytest.mark.parametrize(
    "arguments",
    [
        ["bench", "{bundle}", "--json"],
        ["bench", "{bundle}", "--report"],
        ["fidelity", "{checkpoint}", "{checkpoint}", "--tasks", "1", "--json"],
        ["fidelity", "{checkpoint}", "{checkpoint}", "--tasks", "1", "--report"],
        ["quantize", "{checkpoint}", "-o", "{tmp}/q", "--recipe", "rtn-int4", "--report"],
        ["build", "{bundle}", "--timing-cache"],
    ],
    ids=lambda a: f"{a[0]} {a[-1]}",
)
def test_commands_refuse_a_folder_before_the_work(
    tiny: Pair, folder: Path, capfd: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    names = {"bundle": tiny.bundle, "checkpoint": tiny.checkpoint, "tmp": folder}
    assert cli.run([*(a.format(**names) for a in arguments), str(folder / "d")]) == 2
    out, err = capfd.readouterr()
    assert out == "" and "d" in err and err.count("\n") == 1 and "bug" not in err, err
    assert sorted(p.name for p in folder.iterdir()) == ["d", "f", "p"] and not list((folder / "d").iterdir())


@pytest.mark.parametrize(
    ("command", "arguments"),
    [(gpu.main, ["out"]), (memory.main, ["bundle"]), (language_model.main, ["out"])],
    ids=["gpu", "memory", "language_model"],
)
def test_benchmarks_refuse_a_folder(
    folder: Path, capsys: pytest.CaptureFixture[str], command: Callable[..., Any], arguments: list[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        command([*(str(folder / a) for a in arguments), "--json", str(folder / "d")])
    assert left.value.code == 2 and "a folder, expected the name of the file" in capsys.readouterr().err
    assert sorted(p.name for p in folder.iterdir()) == ["d", "f", "p"]


def modes(folder: Path) -> dict[str, int]:
    return {str(p.relative_to(folder)): stat.S_IMODE(p.stat().st_mode) for p in folder.rglob("*") if p.is_file()}


def test_all_outputs_obey_the_umask(tiny: Pair, tmp_path: Path) -> None:
    """safetensors renames a temporary file of its own, of mode 0600."""
    photos = tmp_path / "photos"
    photos.mkdir()
    before = os.umask(0o027)
    try:
        for i in range(6):
            Image.new("RGB", (84, 56), (40 * i, 90, 200)).save(photos / f"{i}.png")
        quantize = ["quantize", str(tiny.checkpoint), "--recipe", "rtn-int4", "--group-size", "32"]
        assert cli.run([*quantize, "-o", str(tmp_path / "q")]) == 0
        spoken = ["--images", str(photos), "--samples", "2"]
        assert cli.run([*quantize, "-o", str(tmp_path / "v"), "--vision", "int8", *spoken]) == 0
        assert cli.run(["export", str(tiny.checkpoint), "-o", str(tmp_path / "b"), "--precision", "fp32"]) == 0
    finally:
        os.umask(before)
    found = modes(tmp_path)
    assert any("model-00001" in name for name in found) and any("golden/" in name for name in found)
    assert {name: oct(mode) for name, mode in found.items() if mode != 0o640} == {}
    assert not any("partial" in name or ".mode" in name for name in found)
