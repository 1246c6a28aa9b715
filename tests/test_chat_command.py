"""`edgevl chat` through a pipe: its commands, and what they leave in the conversation."""

from __future__ import annotations

import io
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import Pair
from PIL import Image

from edgevl.runtime import cli

Chat = Callable[..., tuple[list[str], str]]


@pytest.fixture
def chat(tiny: Pair, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Chat:
    """chat(lines, *options) -> the answers and stderr."""

    def run(lines: list[str], *options: str, status: int = 0) -> tuple[list[str], str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines) + "\n"))
        arguments = ["chat", str(tiny.bundle), "--engine", "ort-cpu", "--threads", "1", "--max-new-tokens", "6"]
        assert cli.run([*arguments, *options]) == status
        out, err = capsys.readouterr()
        return out.splitlines(), err

    return run


def save(path: Path, seed: int) -> Path:
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (112, 84, 3), dtype=np.uint8)).save(path)
    return path


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    return save(tmp_path / "photo.png", 1)


@pytest.fixture
def film(tmp_path: Path) -> Path:
    (tmp_path / "film").mkdir()
    for seed in range(4):
        save(tmp_path / "film" / f"{seed}.png", seed)
    return tmp_path / "film"


def test_edit_is_undo_and_ask(chat: Chat, photo: Path) -> None:
    start = [f"/image {photo}", "Read the text.", "And now?"]
    edited, _ = chat([*start, "/edit How many?", "Why?"])
    asked, _ = chat([*start[:2], "How many?", "Why?"])
    assert edited[0] == asked[0] and edited[2:] == asked[1:] and len(edited) == 4


def test_edit_keeps_the_pictures_or_takes_those_waiting(chat: Chat, photo: Path, film: Path) -> None:
    kept, err = chat([f"/image {photo}", "Read it.", "/edit How many?", "/stats"])
    asked, _ = chat([f"/image {photo}", "How many?"])
    assert kept[1:] == asked and "1 of 1 pictures encoded before" in err
    other, _ = chat([f"/image {photo}", "Read it.", f"/video {film}", "/edit How many?"])
    asked, _ = chat([f"/video {film}", "How many?"])
    assert other[1:] == asked
    _, err = chat(["/edit", "/edit Why?"])
    assert "/edit needs the question's new words" in err and "nothing was asked yet" in err


def test_undo_takes_pictures_back_and_reset_those_waiting(chat: Chat, photo: Path) -> None:
    plain, _ = chat(["How many?", "Why?"])
    undone, _ = chat(["How many?", f"/image {photo}", "Read it.", "/undo", "Why?"])
    assert [undone[0], undone[2]] == plain
    reset, _ = chat(["Read it.", f"/image {photo}", "/reset", "How many?", "Why?"])
    assert reset[1:] == plain


def test_an_overwritten_picture_is_seen_anew(tiny: Pair, photo: Path) -> None:
    """In one process, the file replaced between two questions."""
    command = [sys.executable, "-m", "edgevl.runtime", "chat", str(tiny.bundle), "--max-new-tokens", "6"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        to, out = process.stdin, process.stdout

        def ask(*lines: str) -> str:
            to.write("".join(f"{line}\n" for line in lines))
            to.flush()
            return out.readline()

        first = ask(f"/image {photo}", "Read it.")
        ask("/undo", f"/image {photo}", "Read it.")
        save(photo, 2)
        second = ask("/stats", "/undo", f"/image {photo}", "Read it.")
        save(photo, 1)
        third = ask("/stats", "/undo", f"/image {photo}", "Read it.")
        _, err = process.communicate("/stats\n")
    assert process.returncode == 0 and first == third != second
    assert re.findall(r"(\d) of 1 pictures encoded before", err) == ["1", "0", "1"]


def test_a_picture_that_cannot_be_read_is_put_aside(chat: Chat, tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n nothing")
    answers, err = chat([f"/image {tmp_path / 'broken.png'}", "Read it.", "How many?"])
    plain, _ = chat(["How many?"])
    assert answers == plain and f"put aside: {tmp_path / 'broken.png'}" in err and "damaged or truncated" in err


def test_what_is_no_picture_and_no_text_does_not_end_it(
    chat: Chat, tmp_path: Path, tiny: Pair, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [f"/image {'x' * 300}", "/image", f"/image {tmp_path}", "/video a\0b", "Read the text."]
    out, err = chat(lines)
    assert len(out) == 1 and err.count("edgevl: error:") == 4
    for told in (
        "cannot be read (File name too long)",
        "/image needs a path",
        "is a folder",
        "cannot be read (embedded",
    ):
        assert told in err, err
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9?\nRead the text.\n"), "utf-8"))
    arguments = ["chat", str(tiny.bundle), "--engine", "ort-cpu", "--threads", "1", "--max-new-tokens", "6"]
    assert cli.run(arguments) == 0
    answers, err = capsys.readouterr()
    assert answers.splitlines() == out and "half of a character" in err


def test_full(chat: Chat, photo: Path) -> None:
    lines = [f"/image {photo}", "Read it.", f"/image {photo}", "And this?", "/undo", "Why?"]
    refused, err = chat(lines, "--capacity", "80")
    assert "more than the KV cache of 80 takes" in err and "on_full drop-oldest-turn" in err and len(refused) == 2
    dropped, err = chat(lines, "--capacity", "80", "--on-full", "drop-oldest-turn")
    alone, _ = chat([f"/image {photo}", "And this?"])
    assert "dropped 1 of the oldest turns" in err and dropped[1] == alone[0] and len(dropped) == 3


def test_lookup_and_cache_options_change_no_word(chat: Chat, photo: Path) -> None:
    lines = [f"/image {photo}", "Read it.", f"/image {photo}", "Read it.", "/stats", "Read it."]
    plain, err = chat(lines)
    assert "2 of 2 pictures encoded before" in err
    other, err = chat(lines, "--lookup", "5", "--image-cache-mb", "0", "--prefill-chunk", "5")
    assert other == plain and "1 of 2 pictures encoded before" in err  # the first turn's stays encoded


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--image-cache-mb", "-1"), "image_cache_mb is -1.0, expected 0 (off) or more megabytes"),
        (("--image-cache-mb", "nan"), "image_cache_mb is nan"),
        (("--on-full", "explode"), "'explode' is not one of 'refuse', 'drop-oldest-turn'"),
        (("--lookup", "-1"), "lookup_tokens is -1, expected a whole number of at least 0"),
        (("--temperature", "-1"), "temperature is -1.0"),  # once, at the start, not at every question
        (("--lookup", "many"), "'many' is not a valid integer"),
    ],
)
def test_bad_options(chat: Chat, options: tuple[str, ...], message: str) -> None:
    assert message in chat(["Hi"], *options, status=2)[1]
