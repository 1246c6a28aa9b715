"""The command `edgevl watch`: one JSON line for every answer."""

from __future__ import annotations

import json
import re
import signal
from contextlib import closing
from typing import Any

import click

from edgevl.runtime.commands import _engine_options, _open, _sampling, _sampling_options, note
from edgevl.runtime.errors import InputError
from edgevl.runtime.run_options import check_words
from edgevl.runtime.stop_signals import StopSignals

__all__ = ["watch"]

_UNITS = {"ms": 0.001, "s": 1.0, "": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0}


class _Seconds(click.ParamType):
    """1s, 500ms, 2m, 1.5"""

    name = "TIME"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        if isinstance(value, float):
            return value
        found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(ms|s|min|m|h|)", str(value).strip())
        if found is None:
            self.fail(f"{value!r} is not a time; expected for example 1s, 500ms or 2m", param, ctx)
        return float(found[1]) * _UNITS[found[2]]


@click.command()
@click.argument("bundle")
@click.argument("prompt")
@click.option(
    "--source",
    required=True,
    metavar="SOURCE",
    help="A video file, a folder that fills with pictures, a camera (/dev/video0) or an address (rtsp://...).",
)
@click.option("--every", type=_Seconds(), default="1s", show_default=True, help="Between answers (not of a folder).")
@click.option(
    "--max-frames-per-answer",
    type=int,
    default=1,
    show_default=True,
    metavar="N",
    help="Above 1: an answer sees up to N frames of the time since the last one, as a video.",
)
@click.option(
    "--skip-unchanged",
    type=float,
    metavar="THRESHOLD",
    help="No answer where the picture changed less than this since the last one, 0 to 1; 0.03 is a good start.",
)
@click.option("--realtime", is_flag=True, help="Play a file at its own pace, and drop frames as with a camera.")
@click.option("--timeout", type=_Seconds(), default="10s", show_default=True, help="For a camera to give a picture.")
@click.option("--retries", type=int, metavar="N", help="Give a lost camera up after N tries [default: never].")
@click.option("--idle", type=_Seconds(), help="End when a folder got nothing new for so long [default: never].")
@click.option("--max-answers", type=int, metavar="N", help="End after N answers.")
@click.option("--input-format", metavar="F", help="FFmpeg's input format, for other devices.")
@click.option("--system", metavar="TEXT", help="System prompt.")
@click.option("--min-pixels", type=int, help="Enlarge pictures to at least this many pixels.")
@click.option("--max-pixels", type=int, help="Shrink pictures to at most this many pixels: fewer tokens, faster.")
@_sampling_options
@_engine_options
def watch(bundle: str, prompt: str, source: str, **options: Any) -> int:
    """Answer PROMPT about a camera, stream, video or folder again and again: one JSON line for every answer.

    A camera is never queued: where the model is slower, frames are dropped. A lost one is connected again. The
    pictures of a folder are taken in order, each once. SIGTERM ends it with status 0, Ctrl-C with 130; the answer
    being written then is given up.

    \b
    Example:
      edgevl watch bundle "Is the gate open?" --source rtsp://camera/stream --every 2s --skip-unchanged 0.03
    """
    from edgevl.runtime.watch import WatchOptions
    from edgevl.runtime.watch import watch as answers
    from edgevl.runtime.watch_sources import open_source

    check_words(prompt, options["system"])
    picture = {k: options[k] for k in ("min_pixels", "max_pixels") if options[k] is not None}
    frames, every = options["max_frames_per_answer"], options["every"]
    wanted = WatchOptions(
        prompt, every, frames, options["skip_unchanged"], options["system"], picture, _sampling(options)
    )
    limit = options["max_answers"]
    if limit is not None and limit < 1:
        raise InputError(f"--max-answers is {limit}, expected at least 1")
    if options["timeout"] <= 0:
        raise InputError("--timeout is 0, expected more")
    names = {"timeout_s": "timeout", "retries": "retries", "idle_s": "idle", "form": "input_format"}
    chosen = {k: options[v] for k, v in names.items()}
    opened = open_source(source, note, every / frames, realtime=options["realtime"], **chosen)
    stop = _Stop()
    count = 0
    with _open(bundle, options) as model, stop, closing(answers(model, opened, wanted, stop.event, note)) as stream:
        for answer in stream:
            click.echo(json.dumps(answer.to_dict(), ensure_ascii=False))
            count += 1
            if count == limit:
                break
    note(f"watch: {count} answers")
    return stop.status


class _Stop(StopSignals):
    """A second SIGINT interrupts at once."""

    def _handle(self, number: int, _: Any) -> None:
        super()._handle(number, _)
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
