"""The command `edgevl chat`: a conversation at the terminal, or through a pipe."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from typing import Any

import click

from edgevl.runtime.chat import ON_FULL
from edgevl.runtime.commands import (
    _engine_options,
    _open,
    _sampling,
    _sampling_options,
    _stats,
    _video_options,
    video_item,
)
from edgevl.runtime.errors import EdgeVLError, InputError
from edgevl.runtime.image_loading import check_source
from edgevl.runtime.run_options import check_words, note

__all__ = ["chat"]

_CHAT_HELP = """/image FILE    add a picture to the next question (again for more)
/video FILE    add a video file, an animated GIF or a folder of frames
/undo          take back the last question and its answer
/edit TEXT     ask the last question in other words, about the same pictures (or those added since)
/reset         start over
/stats         times of the last answer
/quit          leave (or end of input)"""


@click.command()
@click.argument("bundle")
@click.option("--system", metavar="TEXT", help="System prompt.")
@click.option(
    "--on-full",
    type=click.Choice(ON_FULL),
    default=ON_FULL[0],
    show_default=True,
    help="When question and answer no longer fit the KV cache with what was said before.",
)
@_video_options
@_sampling_options
@_engine_options
def chat(bundle: str, **options: Any) -> None:
    """A conversation at the terminal; the KV cache is kept between turns. /help lists the commands.

    \b
    Example:
      edgevl chat bundle
      > /image receipt.jpg
      > What is the total?
    """
    sampling = _sampling(options)  # a bad setting is told now, not at every question
    check_words("", options["system"])
    with _open(bundle, options) as model:
        session = model.chat(options["system"], options["on_full"])
        if isinstance(sys.stdin, io.TextIOWrapper):  # a line that is no text is told like any other mistake
            sys.stdin.reconfigure(errors="surrogateescape")
        if sys.stdin.isatty():
            note("Ask something; /help lists the commands.")
        pending: dict[str, list[str]] = {"images": [], "videos": []}
        while (line := _read_line()) is not None:
            try:
                if not line:
                    continue
                videos = [video_item(v, options) for v in pending["videos"]]
                if not line.startswith("/"):
                    _answer(session, session.stream(line, pending["images"], videos, **sampling), pending)
                elif line.split()[0] == "/edit":
                    text = line.partition(" ")[2].strip()
                    if not text:
                        raise InputError("/edit needs the question's new words")
                    shown = {"images": pending["images"], "videos": videos} if any(pending.values()) else {}
                    _answer(session, session.stream_edit(text, **shown, **sampling), pending)
                elif _chat_command(line, session, pending) is False:
                    break
            except EdgeVLError as e:  # a wrong path must not end a conversation
                note(f"edgevl: error: {e}")


def _answer(session: Any, pieces: Iterator[Any], pending: dict[str, list[str]]) -> None:
    """Print an answer as it comes. The pictures that were waiting wait no longer, come what may: one that cannot be
    read would stand in the way of every later question."""
    dropped = session.dropped_turns
    try:
        for piece in pieces:
            click.echo(piece.text, nl=False)
        click.echo()
    except EdgeVLError:
        if any(pending.values()):
            note(f"put aside: {', '.join(path for waiting in pending.values() for path in waiting)}")
        raise
    finally:
        for waiting in pending.values():
            waiting.clear()
    if session.dropped_turns > dropped:
        note(f"the KV cache was full: dropped {session.dropped_turns - dropped} of the oldest turns")


def _read_line() -> str | None:
    if sys.stdin.isatty():
        click.echo("> ", nl=False, err=True)
    line = sys.stdin.readline()
    return line.strip() if line else None


def _chat_command(line: str, session: Any, pending: dict[str, list[str]]) -> bool:
    name, _, argument = line.partition(" ")
    if name in ("/quit", "/exit"):
        return False
    if name in ("/image", "/video"):
        path = argument.strip()
        if not path:
            raise InputError(f"{name} needs a path")
        if name == "/image":
            check_source(path)
        else:
            check_source(path, "video", folder=True)
        pending["images" if name == "/image" else "videos"].append(path)
        note(f"{path} goes with the next question")
    elif name == "/undo":
        note("took back the last question" if session.undo() else "nothing to take back")
    elif name == "/reset":
        session.reset()
        for waiting in pending.values():
            waiting.clear()
        note("the conversation starts over")
    elif name == "/stats":
        note(_stats(session.last) if session.last is not None else "no answer yet")
    elif name == "/help":
        note(_CHAT_HELP)
    else:
        raise InputError(f"{name} is unknown; /help lists the commands")
    return True
