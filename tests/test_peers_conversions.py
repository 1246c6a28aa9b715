"""Conversions that are kept between runs: never one of another checkpoint, and never half of one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from edgevl.benchmarks.peers.conversions import convert, fingerprint, is_current, mark, marker
from edgevl.runtime.errors import CheckpointError
from edgevl.runtime.tensor_file import write_tensors

KNOWN = "565c87361ccb88c6"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """Two files of weights, one tensor of them longer than what is read of it."""
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "qwen2_vl"}')
    (folder / "tokenizer.json").write_text("{}")
    write_tensors(folder / "1.safetensors", {"b": np.arange(4000, dtype=np.float32)}, {"format": "pt"})
    write_tensors(folder / "2.safetensors", {"a": np.ones(3, np.float32), "none": np.zeros(0, np.float32)}, {})
    return folder


def change_value(file: str, name: str, index: int) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path, size = folder / file, {"b": 4000, "a": 3}[name]
        data = bytearray(path.read_bytes())
        data[len(data) - 4 * (size - index)] ^= 1
        path.write_bytes(bytes(data))

    return change


def test_a_fingerprint_is_of_what_is_in_the_folder(checkpoint: Path, tmp_path: Path) -> None:
    assert fingerprint(checkpoint) == KNOWN  # another one here has everybody convert everything anew
    shutil.copytree(checkpoint, tmp_path / "copy")
    (tmp_path / "copy" / "README.md").write_text("of no account")
    assert fingerprint(tmp_path / "copy") == KNOWN


@pytest.mark.parametrize(
    "change",
    [
        lambda c: (c / "config.json").write_text('{"model_type": "qwen2_vl" }'),
        lambda c: (c / "tokenizer.json").write_text("[]"),
        lambda c: (c / "preprocessor_config.json").write_text("{}"),
        lambda c: (c / "2.safetensors").rename(c / "3.safetensors"),
        lambda c: (c / "2.safetensors").unlink(),
        lambda c: write_tensors(
            c / "1.safetensors", {"b": np.arange(4000, dtype=np.float32).reshape(2, -1)}, {"format": "pt"}
        ),
        change_value("1.safetensors", "b", 0),
        change_value("1.safetensors", "b", 2000),
        change_value("1.safetensors", "b", 3999),
        change_value("2.safetensors", "a", 1),
    ],
    ids=["config", "tokenizer", "preprocessor", "name", "file", "shape", "first", "middle", "last", "small"],
)
def test_another_checkpoint_has_another(checkpoint: Path, change: Callable[[Path], object]) -> None:
    change(checkpoint)
    assert fingerprint(checkpoint) != KNOWN


def header(text: str) -> bytes:
    return len(text).to_bytes(8, "little") + text.encode()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "header of 0 bytes in a file of 0"),
        (b"\xff" * 8 + b"{}", "in a file of 10"),
        (header("{"), "not a safetensors file"),
        (header("[]"), "not a safetensors file"),
        (header('{"a": {}}'), "data_offsets"),
        (header('{"a": {"data_offsets": [0, 1, 2]}}'), "too many values"),
        (header('{"a": {"data_offsets": [0, 1]}}'), "a tensor lies outside of the file"),
        (header('{"a": {"data_offsets": [-1, 0]}}'), "a tensor lies outside of the file"),
    ],
)
def test_weights_that_are_none(checkpoint: Path, data: bytes, message: str) -> None:
    (checkpoint / "2.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"2\.safetensors: not a safetensors file") as raised:
        fingerprint(checkpoint)
    assert message in str(raised.value) and "copy the checkpoint again" in str(raised.value)


def test_folders_that_are_no_checkpoint(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"cannot be read \(.*config\.json.*expected the folder of a checkpoint"):
        fingerprint(tmp_path)
    for path in checkpoint.glob("*.safetensors"):
        path.unlink()
    with pytest.raises(CheckpointError, match=r"checkpoint: no \*\.safetensors in it"):
        fingerprint(checkpoint)


def write(folder: Path, text: str = "new") -> None:
    folder.mkdir()
    (folder / "model").write_text(text)


def test_a_conversion_is_taken_for_its_own_checkpoint_alone(checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "llama_cpp-Q4_0"
    assert not is_current(folder, KNOWN)
    write(folder)
    assert not is_current(folder, KNOWN)  # as made before there were markers
    for broken in ("", "{", "[]", "{}", "null", '{"fingerprint": "other"}'):
        marker(folder).write_text(broken)
        assert not is_current(folder, KNOWN), broken
    mark(folder, checkpoint)
    assert is_current(folder, KNOWN) and not is_current(folder, "other")
    said = json.loads((tmp_path / "llama_cpp-Q4_0.checkpoint.json").read_text())
    assert said == {"checkpoint": "checkpoint", "fingerprint": KNOWN}
    shutil.rmtree(folder)
    assert not is_current(folder, KNOWN)


def test_a_link_is_taken_while_it_leads_to_the_same_checkpoint(checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "transformers-bf16"
    convert(checkpoint, folder, lambda new: new.symlink_to(checkpoint))
    assert is_current(folder, KNOWN)
    change_value("2.safetensors", "a", 0)(checkpoint)
    assert not is_current(folder, KNOWN)
    (checkpoint / "2.safetensors").write_bytes(b"")
    assert not is_current(folder, KNOWN)
    checkpoint.rename(tmp_path / "moved")
    assert folder.is_symlink() and not is_current(folder, KNOWN)


def test_a_conversion_replaces_what_was_there(checkpoint: Path, tmp_path: Path) -> None:
    folder, linked = tmp_path / "m" / "mnn-int4", tmp_path / "linked"
    folder.parent.mkdir()
    write(linked, "of others")
    for old in ("nothing", "folder", "link", "broken link"):
        if old == "link":
            shutil.rmtree(folder)
            folder.symlink_to(linked)
        if old == "broken link":
            shutil.rmtree(folder)
            folder.symlink_to(tmp_path / "gone")
        convert(checkpoint, folder, lambda new, old=old: write(new, f"after {old}"))
        assert not folder.is_symlink() and (folder / "model").read_text() == f"after {old}"
        assert sorted(p.name for p in folder.parent.iterdir()) == ["mnn-int4", "mnn-int4.checkpoint.json"]
    assert (linked / "model").read_text() == "of others"


@pytest.mark.parametrize("error", [RuntimeError("no"), KeyboardInterrupt()])
def test_an_attempt_that_fails_leaves_what_was_there(checkpoint: Path, tmp_path: Path, error: BaseException) -> None:
    folder = tmp_path / "m" / "mnn-int4"
    folder.parent.mkdir()
    convert(checkpoint, folder, write)

    def fail(new: Path) -> None:
        write(new, "half")
        write(new.with_name(f"{new.name}.partial"), "half")  # where peers' modules convert
        raise error

    with pytest.raises(type(error)):
        convert(checkpoint, folder, fail)
    assert (folder / "model").read_text() == "new" and is_current(folder, KNOWN)
    assert sorted(p.name for p in folder.parent.iterdir()) == ["mnn-int4", "mnn-int4.checkpoint.json"]


def test_what_a_killed_run_left_is_in_nobodys_way(checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "mnn-int4"
    write(tmp_path / "mnn-int4.new", "half")
    write(tmp_path / "mnn-int4.new.partial", "half")
    convert(checkpoint, folder, write)
    assert (folder / "model").read_text() == "new" and not list(tmp_path.glob("*.new*"))


def test_a_conversion_of_nothing_is_none(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="the conversion wrote no mnn-int4"):
        convert(checkpoint, tmp_path / "mnn-int4", lambda new: None)
    assert not marker(tmp_path / "mnn-int4").exists()


def test_a_conversion_that_was_not_marked_is_not_taken(checkpoint: Path, tmp_path: Path) -> None:
    """Its checkpoint went away meanwhile; the marker of the conversion before must not vouch for it."""
    folder = tmp_path / "mnn-int4"
    convert(checkpoint, folder, write)

    def make(new: Path) -> None:
        write(new, "of what was there")
        checkpoint.rename(tmp_path / "away")

    with pytest.raises(CheckpointError):
        convert(checkpoint, folder, make)
    assert not is_current(folder, KNOWN)
