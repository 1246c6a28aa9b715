"""The device side's subcommands run, verify and doctor, and what the others share with them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
from tabulate import tabulate

from edgevl.runtime.bundle import Bundle
from edgevl.runtime.engine import ENGINES, GpuOptions, engine_status
from edgevl.runtime.errors import EdgeVLError
from edgevl.runtime.image_cache import DEFAULT_IMAGE_CACHE_MB
from edgevl.runtime.results import Completion
from edgevl.runtime.run_options import (
    budget_options,
    check_drawing,
    check_request,
    check_words,
    draw,
    guide_options,
    guide_settings,
    note,
    within_budget,
)
from edgevl.runtime.sampling import GenerationConfig

__all__ = ["doctor", "run", "verify"]

_Command = Callable[..., Any]


def _engine_options(command: _Command) -> _Command:
    for option in (
        click.option("--verify-hashes", is_flag=True, help="Check every file's sha256 before running."),
        click.option(
            "--memory-limit",
            metavar="SIZE",
            help="Refuse what would take this process past 4GB, 512MB, ... [default: what the machine has left; off].",
        ),
        click.option(
            "--prefill-chunk",
            type=int,
            default=2048,
            show_default=True,
            metavar="N",
            help="Prompt tokens that go through the decoder at once; fewer need less memory.",
        ),
        click.option(
            "--image-cache-mb",
            type=float,
            default=DEFAULT_IMAGE_CACHE_MB,
            show_default=True,
            metavar="MB",
            help="Memory for the features of pictures seen before, kept by content; 0: none.",
        ),
        click.option(
            "--capacity", type=int, metavar="N", help="Tokens that the KV cache holds [default: the bundle's]."
        ),
        click.option(
            "--threads", type=int, metavar="N", help="Worker threads [default: the cores this process may use]."
        ),
        click.option("--cuda-graph/--no-cuda-graph", default=None, help="Capture the decode step [TensorRT: yes]."),
        click.option("--gpu-memory", type=click.IntRange(min=1), metavar="MB", help="Most GPU memory of ort-cuda."),
        click.option("--gpu", type=click.IntRange(min=0), default=0, show_default=True, metavar="N", help="Which GPU."),
        click.option("--engine", default="auto", show_default=True, metavar="E", help=f"auto, {', '.join(ENGINES)}."),
    ):
        command = option(command)
    return command


def _sampling_options(command: _Command) -> _Command:
    for option in (
        click.option(
            "--lookup",
            "lookup_tokens",
            type=int,
            metavar="N",
            help="Draft up to N tokens where an answer repeats what was said; the tokens stay the same.",
        ),
        click.option("--stop", multiple=True, metavar="TEXT", help="End the answer before this text (repeatable)."),
        click.option("--seed", type=int, help="Seed of the draws."),
        click.option("--repetition-penalty", type=float, help="Above 1: lowers what was said before."),
        click.option("--min-p", type=float, help="Drop tokens less likely than this share of the likeliest."),
        click.option("--top-k", type=int, help="Draw from the K likeliest tokens."),
        click.option("--top-p", type=float, help="Draw from the likeliest tokens that add up to this probability."),
        click.option("--temperature", type=float, help="0: greedy. Above 0: draw."),
        click.option("--max-new-tokens", type=int, default=128, show_default=True, help="Longest answer."),
    ):
        command = option(command)
    return command


_SAMPLING = (
    "max_new_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "seed",
    "stop",
    "lookup_tokens",
)
_ENGINE = ("engine", "threads", "capacity", "prefill_chunk", "image_cache_mb", "memory_limit", "verify_hashes")


def _open(bundle: str | Bundle, options: dict[str, Any]) -> Any:
    from edgevl.runtime.generation import VisionLanguageModel

    chosen = {k: options[k] for k in _ENGINE}
    memory = options["gpu_memory"]
    gpu = GpuOptions(options["gpu"], None if memory is None else memory * 1_000_000, options["cuda_graph"])
    chosen["prefix_cache_mb"] = options.get("prefix_cache_mb", 0)  # of the server alone: its requests come again
    return VisionLanguageModel.open(bundle, chosen.pop("engine"), gpu=gpu, notice=note, **chosen)


def _sampling(options: dict[str, Any]) -> dict[str, Any]:
    """The settings that were given, each in range: told before a model is opened."""
    given = {k: options[k] for k in _SAMPLING if options[k] is not None and options[k] != ()}
    GenerationConfig.from_defaults({}, **given)
    return given


def _video_options(command: _Command) -> _Command:
    for option in (
        click.option("--max-frames", type=int, metavar="N", help="At most this many frames of a video [default: 768]."),
        click.option("--fps", type=float, metavar="N", help="Frames per second of a video to look at [default: 2]."),
    ):
        command = option(command)
    return command


def _content(text: str, images: Sequence[str], videos: Sequence[str], options: dict[str, Any]) -> list[dict[str, Any]]:
    limits = {k: options[k] for k in ("min_pixels", "max_pixels")}
    items: list[dict[str, Any]] = [{"type": "image", "image": f, **limits} for f in images]
    items += [video_item(f, options) | limits for f in videos]
    return [*items, {"type": "text", "text": text}]


def video_item(path: str, options: dict[str, Any]) -> dict[str, Any]:
    """A video in a message, with the command's --fps and --max-frames."""
    return {"type": "video", "video": path, "fps": options["fps"], "max_frames": options["max_frames"]}


def _stats(completion: Completion) -> str:
    t, u = completion.timings, completion.usage
    hits = f", {u.cached_images} of {u.images} pictures encoded before" if u.images else ""
    rows = [
        ("preprocess", f"{t.preprocess_s * 1e3:.1f} ms", ""),
        ("vision", f"{t.vision_s * 1e3:.1f} ms", f"{u.image_tokens} image tokens{hits}"),
        (
            "prefill",
            f"{t.prefill_s * 1e3:.1f} ms",
            f"{u.prompt_tokens - u.cached_tokens} tokens, {u.cached_tokens} from the cache",
        ),
        ("first token", f"{t.first_token_s * 1e3:.1f} ms", "from the request"),
        ("decode", f"{t.decode_s * 1e3:.1f} ms", f"{t.decode_steps} steps, {t.tokens_per_s:.1f} tokens/s"),
        *(
            ("video", f"{v.frames} frames", f"{v.resized_size[0]}×{v.resized_size[1]}, {v.tokens} tokens, {v.source}")
            for v in completion.videos
        ),
    ]
    if u.drafted_tokens:
        rows.append(("lookup", "", f"{u.accepted_tokens} of {u.drafted_tokens} drafted tokens were right"))
    return tabulate(rows, tablefmt="plain", colalign=("left", "right", "left"))


@click.command()
@click.argument("bundle")
@click.argument("prompt")
@click.option(
    "--image", "images", multiple=True, metavar="FILE", help="A picture (repeatable; placed before the text)."
)
@click.option(
    "--video",
    "videos",
    multiple=True,
    metavar="FILE",
    help="A video file, an animated GIF, or a folder of frames in the order of their names (repeatable).",
)
@_video_options
@click.option("--system", metavar="TEXT", help="System prompt.")
@click.option("--min-pixels", type=int, help="Enlarge pictures and frames to at least this many pixels.")
@click.option("--max-pixels", type=int, help="Shrink them to at most this many pixels: fewer tokens, faster.")
@click.option("--draw-boxes", metavar="OUT.png", help="Draw the answer's boxes and points on their picture.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object: text, boxes, tokens, timings, finish_reason.")
@click.option("--stats", is_flag=True, help="The stages' times on stderr.")
@budget_options
@guide_options
@_sampling_options
@_engine_options
def run(bundle: str, prompt: str, images: tuple[str, ...], videos: tuple[str, ...], **options: Any) -> None:
    """Answer PROMPT about pictures and videos; the answer streams to stdout.

    \b
    Example:
      edgevl run bundle "What is the total?" --image receipt.jpg --max-new-tokens 32
      edgevl run bundle "What happens here?" --video clip.mp4 --fps 1 --max-frames 64
    """
    from edgevl.runtime.grounding import strip_grounding

    if options["draw_boxes"] is not None:
        check_drawing(images, options["draw_boxes"])
    content = _content(prompt, images, videos, options)
    system = options["system"]
    messages = [{"role": "system", "content": system}] if system is not None else []
    messages.append({"role": "user", "content": content})
    forms, sampling = guide_settings(options), _sampling(options)
    check_words(prompt, system)
    opened = Bundle.open(bundle, options["verify_hashes"])
    check_request(messages, opened, options)
    with _open(opened, options) as model:
        messages, started = within_budget(model, messages, options)
        stream = model.stream(messages, started=started, **sampling, **forms)
        if not options["as_json"]:
            for piece in stream:
                click.echo(piece.text, nl=False)
            click.echo()
        completion = stream.completion
    if options["as_json"]:
        data = {**completion.to_dict(), "readable": strip_grounding(completion.text)}
        click.echo(json.dumps(data, ensure_ascii=False))
    if options["stats"]:
        note(_stats(completion))
    if forms and completion.finish_reason == "length":
        note("the answer was cut before it was complete; raise --max-new-tokens")
    if options["draw_boxes"] is not None:
        draw(images, completion, Path(options["draw_boxes"]))


@click.command()
@click.argument("bundle")
@click.option("--engine", default="auto", show_default=True, metavar="E", help=f"auto, {', '.join(ENGINES)}.")
@click.option(
    "--against", metavar="CHECKPOINT", help="First write golden vectors from this checkpoint (needs 'edgevl[host]')."
)
@click.option("--threads", type=int, metavar="N", help="Worker threads.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of the table.")
def verify(bundle: str, engine: str, against: str | None, threads: int | None, as_json: bool) -> int:
    """Replay a bundle's golden vectors; status 1 and the first bad stage named when it drifts.

    \b
    Example:
      edgevl verify bundle
    """
    from edgevl.runtime.golden import replay
    from edgevl.runtime.golden_seen import record_seen

    if against is not None:
        _add_golden(bundle, against)
    opened = Bundle.open(bundle)
    report = replay(opened, engine, threads=threads, notice=note)
    if as_json:
        click.echo(json.dumps(report.to_dict()))
    else:
        click.echo(report_table(report))
    if report.first_drift is not None:
        note(f"edgevl: verify: {report.first_drift}")
        return 1
    if against is not None:
        record_seen(Path(bundle), report)
    return 0


def report_table(report: Any) -> str:
    """The table of a VerifyReport."""
    rows = [(r.case, r.stage, r.detail, "ok" if r.passed else "DRIFTS") for r in report.results]
    return tabulate(rows, headers=("case", "stage", "result", ""), tablefmt="simple")


def _add_golden(bundle: str, checkpoint: str) -> None:
    import importlib

    try:
        module = importlib.import_module("edgevl.export.verify")
    except ModuleNotFoundError as e:
        raise EdgeVLError(
            f"--against needs the package {e.name!r}; pip install 'edgevl[host]' on a workstation"
        ) from None
    module.add_golden(Path(bundle), checkpoint, notice=note, progress=lambda case: note(f"golden: {case}"))
    note(f"golden vectors written to {bundle}")


@click.command()
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
def doctor(as_json: bool) -> None:
    """Which engines, providers and versions are usable here, and why the others are not.

    \b
    Example:
      edgevl doctor
    """
    from edgevl.runtime.doctor import machine

    facts, status = machine(), engine_status()
    if as_json:
        engines = [{"name": s.name, "usable": s.usable, "detail": s.detail} for s in status]
        click.echo(json.dumps({"machine": facts, "engines": engines}))
        return
    click.echo(tabulate(list(facts.items()), tablefmt="plain"))
    click.echo()
    click.echo(
        tabulate(
            [(s.name, "yes" if s.usable else "no", s.detail) for s in status],
            headers=("engine", "usable", "why"),
            tablefmt="simple",
        )
    )
