"""What `edgevl run` takes beyond sampling: forms that hold the answer, a time budget, boxes to draw."""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from edgevl.runtime.bundle import Bundle
from edgevl.runtime.errors import InputError
from edgevl.runtime.image_loading import check_source
from edgevl.runtime.output_file import check_output_file, replacing
from edgevl.runtime.prompt import collect_vision
from edgevl.runtime.results import Completion
from edgevl.runtime.tokenizer import check_text

__all__ = [
    "budget_options",
    "check_drawing",
    "check_request",
    "check_words",
    "draw",
    "guide_options",
    "guide_settings",
    "note",
    "within_budget",
]

_Command = Callable[..., Any]


def note(message: str) -> None:
    """One line for the person at the terminal; stdout stays for results."""
    click.echo(message, err=True)


def guide_options(command: _Command) -> _Command:
    """--json-schema, --regex, --choices."""
    for option in (
        click.option("--choices", metavar="A,B,C", help="The answer is one of these."),
        click.option("--regex", metavar="R", help="The whole answer matches this regular expression."),
        click.option("--json-schema", metavar="FILE", help="The answer is JSON that follows the schema in FILE."),
    ):
        command = option(command)
    return command


def guide_settings(options: dict[str, Any]) -> dict[str, Any]:
    """The form that was given, as a setting of `generate`.

    Raises:
        InputError: a schema's file that cannot be read.
    """
    found: dict[str, Any] = {}
    if options["json_schema"] is not None:
        path = Path(options["json_schema"])
        try:
            found["json_schema"] = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as e:
            raise InputError(f"--json-schema {path}: not readable as text ({e}); expected a JSON schema") from None
    if options["regex"] is not None:
        found["regex"] = options["regex"]
    if options["choices"] is not None:
        found["choices"] = [c.strip() for c in options["choices"].split(",") if c.strip()]
    return found


def budget_options(command: _Command) -> _Command:
    """--ttft-budget, --profile."""
    for option in (
        click.option("--profile", metavar="FILE", help="Measured speed to plan with [default: this machine's own]."),
        click.option(
            "--ttft-budget", metavar="TIME", help="Shrink pictures until the first token comes within 800ms, 1.5s, ..."
        ),
    ):
        command = option(command)
    return command


def within_budget(model: Any, messages: list[dict[str, Any]], options: dict[str, Any]) -> tuple[Any, float]:
    """The messages, with pictures sized for --ttft-budget where it was given, and when the request began."""
    from edgevl.runtime.ttft import parse_seconds

    started = time.perf_counter()
    if options["ttft_budget"] is None:
        return messages, started
    choice = model.choose_pixels(messages, parse_seconds(options["ttft_budget"]), options["profile"], started)
    note(f"max_pixels {choice.max_pixels}: first token expected after {choice.predicted_s * 1e3:.0f} ms")
    return choice.messages, started


def check_words(prompt: str, system: str | None) -> None:
    """Refuse a prompt or system prompt that is no text, before the model is opened."""
    check_text(prompt, "the prompt")
    if system is not None:
        check_text(system, "the system prompt")


def check_request(messages: list[dict[str, Any]], bundle: Bundle, options: dict[str, Any]) -> None:
    """What can be known of a request before the model is opened: that its files are there, and its sizes and times in
    range.

    Raises:
        InputError: says which is not.
    """
    from edgevl.runtime.ttft import parse_seconds
    from edgevl.runtime.vision import check_options

    for item in collect_vision(messages):
        check_source(item.source, "picture" if item.kind == "image" else "video", folder=item.kind == "video")
        check_options(item, bundle.image_processor)
    if options["ttft_budget"] is not None:
        parse_seconds(options["ttft_budget"])


def check_drawing(images: Sequence[str], output: str) -> None:
    """Whether `draw` can write its pictures: asked before the model is opened.

    Raises:
        InputError: no picture to draw on, a name that `check_output_file` refuses, or of no picture's format.
    """
    from PIL import Image

    if not images:
        raise InputError("--draw-boxes needs a picture; pass one with --image")
    check_output_file(output, "a picture")
    path = Path(output)
    for index in range(len(images) if len(images) > 1 else 0):
        check_output_file(_numbered(path, index), "a picture")
    try:  # Pillow knows suffixes that it cannot write, and formats without colours
        Image.new("RGB", (8, 8)).save(io.BytesIO(), _format(path))
    except (OSError, ValueError, KeyError):
        raise InputError(
            f"{path}: no colour pictures are written with the suffix {path.suffix!r}; expected a name such as out.png"
        ) from None


def _format(path: Path) -> str:
    """Pillow's name of the format that a suffix stands for; KeyError where it knows none."""
    from PIL import Image

    return Image.registered_extensions()[path.suffix.lower()]


def _numbered(path: Path, index: int) -> Path:
    return path.with_name(f"{path.stem}-{index + 1}{path.suffix}")


def draw(images: Sequence[str], completion: Completion, output: Path) -> None:
    """Boxes and points on the pictures that they are about: `output`, or one file per picture, out-1.png, out-2.png,
    where the answer is about several.

    Raises:
        InputError: a picture cannot be written.
    """
    from edgevl.runtime.box_drawing import draw_boxes
    from edgevl.runtime.image_loading import load_image

    found = [f for f in (*completion.boxes, *completion.points) if f.image < len(images)]
    if not found:
        note(f"no boxes in the answer; {output} was not written")
        return
    shown = sorted({f.image for f in found})
    for index in shown:
        path = output if len(shown) == 1 else _numbered(output, index)
        ours = [f for f in found if f.image == index]
        picture = draw_boxes(load_image(images[index]), ours)
        with replacing(path) as partial:
            try:
                picture.save(partial, _format(path))
            except ValueError as e:  # too large for the format
                raise InputError(f"{path}: cannot be written ({e}); write another format, such as out.png") from None
        note(f"wrote {path} with {len(ours)} boxes")
