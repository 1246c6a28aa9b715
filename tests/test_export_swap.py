"""An export over an existing bundle: symbolic links, Ctrl-C between two renames, what cannot be removed."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import pytest
from conftest import Pair

from edgevl.export.exporter import ExportOptions, export_bundle
from edgevl.export.swap import swap
from edgevl.runtime import cli
from edgevl.runtime.bundle import Bundle
from edgevl.runtime.errors import BundleError


def folders(root: Path) -> tuple[Path, Path]:
    """A new folder, and the old one whose place it is to take."""
    new, old = root / ".b.partial", root / "b"
    for folder in (new, old):
        folder.mkdir(parents=True)
        (folder / "name").write_text(folder.name)
    return new, old


def test_a_link_stays_and_what_it_leads_to_is_replaced(
    tiny: Pair, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "b", target_is_directory=True)  # of nothing yet
    arguments = ["export", str(tiny.checkpoint), "-o", str(tmp_path / "link"), "--no-verify"]
    assert cli.run([*arguments, "--precision", "fp32"]) == 0
    assert cli.run([*arguments, "--precision", "int4"]) == 2
    assert "exists already" in capsys.readouterr().err
    assert cli.run([*arguments, "--precision", "int4", "--overwrite"]) == 0
    assert "error" not in capsys.readouterr().err
    assert (tmp_path / "link").is_symlink()
    assert Bundle.open(tmp_path / "link", verify_hashes=True).precision.endswith("decoder int4")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["disk", "link"]
    assert [p.name for p in (tmp_path / "disk").iterdir()] == ["b"]


def test_a_link_to_itself_is_told(tiny: Pair, tmp_path: Path) -> None:
    (tmp_path / "b").symlink_to(tmp_path / "b")
    with pytest.raises(BundleError, match="b: a symbolic link that leads to itself; choose another output"):
        export_bundle(tiny.checkpoint, tmp_path / "b", overwrite=True)


@pytest.mark.parametrize("moment", ["after the first rename", "instead of the second"])
def test_ctrl_c_between_the_renames_keeps_the_old_bundle(
    tiny: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    target = tmp_path / "b"
    export_bundle(tiny.checkpoint, target, ExportOptions(precision="fp32"))
    rename = Path.rename

    def interrupted(self: Path, to: Path) -> Path:
        if self.name == ".b.partial" and moment == "instead of the second":
            raise KeyboardInterrupt
        done = rename(self, to)
        if self.name == "b" and moment == "after the first rename":
            signal.raise_signal(signal.SIGINT)
        return done

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export_bundle(tiny.checkpoint, target, overwrite=True)
    assert Bundle.open(target, verify_hashes=True).precision == "vision fp32, decoder fp32"
    assert [p.name for p in tmp_path.iterdir()] == ["b"]


def test_ctrl_c_after_the_renames_leaves_the_new_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    new, old = folders(tmp_path)
    rename = Path.rename

    def interrupted(self: Path, to: Path) -> Path:
        done = rename(self, to)
        if self.name == ".b.partial":
            raise KeyboardInterrupt
        return done

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        swap(new, old)
    assert (old / "name").read_text() == ".b.partial" and [p.name for p in tmp_path.iterdir()] == ["b"]


def test_an_old_folder_that_cannot_be_removed_is_no_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The new one is in its place by then."""
    new, old = folders(tmp_path)

    def busy(path: str, *_: object, **__: object) -> None:
        raise OSError(16, "Device or resource busy")

    monkeypatch.setattr(os, "unlink", busy)
    swap(new, old)
    monkeypatch.undo()
    assert (old / "name").read_text() == ".b.partial" and (tmp_path / ".b.old" / "name").read_text() == "b"


def test_what_earlier_swaps_left_is_removed(tmp_path: Path) -> None:
    """A kill between the renames leaves only the old folder, under another name; a version of before, a link."""
    new, old = folders(tmp_path)
    shutil.copytree(old, tmp_path / ".b.old")
    shutil.rmtree(old)
    swap(new, old)
    assert [p.name for p in tmp_path.iterdir()] == ["b"]
    new, old = folders(tmp_path / "other")
    (tmp_path / "other" / ".b.old").symlink_to(tmp_path / "b", target_is_directory=True)
    swap(new, old)
    assert [p.name for p in (tmp_path / "other").iterdir()] == ["b"] and (tmp_path / "b" / "name").exists()


def test_a_folder_that_takes_nothing_is_one_line(
    tiny: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    mkdir = Path.mkdir

    def refused(self: Path, *arguments: object, **options: object) -> None:
        if self.name == ".b.partial":
            raise PermissionError(13, "Permission denied")
        mkdir(self, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(Path, "mkdir", refused)
    assert cli.run(["export", str(tiny.checkpoint), "-o", str(tmp_path / "b"), "--no-verify"]) == 2
    err = capsys.readouterr().err
    assert "b: cannot be written (" in err and "Permission denied" in err and "Traceback" not in err
