"""The device side's subcommands: run, chat, verify, inspect, doctor."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import click
from tabulate import tabulate

from edgevl.runtime.bundle import MANIFEST, Bundle
from edgevl.runtime.chat import ON_FULL
from edgevl.runtime.engine import ENGINES, GpuOptions, engine_status
from edgevl.runtime.errors import EdgeVLError, InputError
from edgevl.runtime.image_cache import DEFAULT_IMAGE_CACHE_MB
from edgevl.runtime.results import Completion

__all__ = ["chat", "doctor", "inspect", "run", "verify"]

_Command = Callable[..., Any]


def note(message: str) -> None:
    """One line for the person at the terminal; stdout stays for results."""
    click.echo(message, err=True)


def _engine_options(command: _Command) -> _Command:
    for option in (
        click.option("--verify-hashes", is_flag=True, help="Check every file's sha256 before running."),
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
_ENGINE = ("engine", "threads", "capacity", "prefill_chunk", "image_cache_mb", "verify_hashes")


def _open(bundle: str, options: dict[str, Any]) -> Any:
    from edgevl.runtime.generation import VisionLanguageModel

    chosen = {k: options[k] for k in _ENGINE}
    memory = options["gpu_memory"]
    gpu = GpuOptions(options["gpu"], None if memory is None else memory * 1_000_000, options["cuda_graph"])
    return VisionLanguageModel.open(bundle, chosen.pop("engine"), gpu=gpu, notice=note, **chosen)


def _sampling(options: dict[str, Any]) -> dict[str, Any]:
    return {k: options[k] for k in _SAMPLING if options[k] is not None and options[k] != ()}


def _content(
    text: str, images: Sequence[str], videos: Sequence[str], min_pixels: int | None, max_pixels: int | None
) -> list[dict[str, Any]]:
    limits = {k: v for k, v in (("min_pixels", min_pixels), ("max_pixels", max_pixels)) if v is not None}
    items = [{"type": "image", "image": f, **limits} for f in images]
    return [*items, *({"type": "video", "video": f, **limits} for f in videos), {"type": "text", "text": text}]


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
    "--video", "videos", multiple=True, metavar="FOLDER", help="A folder of frames, in the order of their names."
)
@click.option("--system", metavar="TEXT", help="System prompt.")
@click.option("--min-pixels", type=int, help="Enlarge pictures to at least this many pixels.")
@click.option("--max-pixels", type=int, help="Shrink pictures to at most this many pixels: fewer tokens, faster.")
@click.option("--draw-boxes", metavar="OUT.png", help="Draw the boxes of the answer on the last picture.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object: text, boxes, tokens, timings, finish_reason.")
@click.option("--stats", is_flag=True, help="The stages' times on stderr.")
@_sampling_options
@_engine_options
def run(bundle: str, prompt: str, images: tuple[str, ...], videos: tuple[str, ...], **options: Any) -> None:
    """Answer PROMPT about pictures; the answer streams to stdout.

    \b
    Example:
      edgevl run bundle "What is the total?" --image receipt.jpg --max-new-tokens 32
    """
    from edgevl.runtime.grounding import strip_grounding

    if options["draw_boxes"] is not None and not images:
        raise InputError("--draw-boxes needs a picture; pass one with --image")
    content = _content(prompt, images, videos, options["min_pixels"], options["max_pixels"])
    system = options["system"]
    messages = [{"role": "system", "content": system}] if system is not None else []
    messages.append({"role": "user", "content": content})
    with _open(bundle, options) as model:
        stream = model.stream(messages, **_sampling(options))
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
    if options["draw_boxes"] is not None:
        _draw(images, completion, Path(options["draw_boxes"]))


def _draw(images: Sequence[str], completion: Completion, output: Path) -> None:
    from edgevl.runtime.grounding import draw_boxes
    from edgevl.runtime.image_loading import load_image

    if not completion.boxes:
        note(f"no boxes in the answer; {output} was not written")
        return
    picture = draw_boxes(load_image(images[-1]), [b for b in completion.boxes if b.image == len(images) - 1])
    partial = output.with_name(f".{output.name}.partial{output.suffix}")
    try:
        picture.save(partial)
    except (OSError, ValueError) as e:
        partial.unlink(missing_ok=True)
        raise InputError(f"{output}: cannot be written ({e}); expected a picture name such as out.png") from None
    partial.replace(output)
    note(f"wrote {output} with {len(completion.boxes)} boxes")


_CHAT_HELP = """/image FILE    add a picture to the next question (again for more)
/video FOLDER  add a folder of frames
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
    with _open(bundle, options) as model:
        sampling = _sampling(options)
        model.generation_config(**sampling)  # a bad setting is told now, not at every question
        session = model.chat(options["system"], options["on_full"])
        if sys.stdin.isatty():
            note("Ask something; /help lists the commands.")
        pending: dict[str, list[str]] = {"images": [], "videos": []}
        while (line := _read_line()) is not None:
            try:
                if not line:
                    continue
                if not line.startswith("/"):
                    _answer(session, session.stream(line, **pending, **sampling), pending)
                elif line.split()[0] == "/edit":
                    text = line.partition(" ")[2].strip()
                    if not text:
                        raise InputError("/edit needs the question's new words")
                    shown = pending if any(pending.values()) else {}
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
        if not Path(path).exists() or not path:
            raise InputError(
                f"{name} {path}: not found; expected a {'picture' if name == '/image' else 'folder of frames'}"
            )
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
@click.argument("path")
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
def inspect(path: str, as_json: bool) -> None:
    """What a BUNDLE or CHECKPOINT holds: model, graphs, tensors, precision, sizes, rules, hashes.

    \b
    Example:
      edgevl inspect bundle --json
    """
    folder = Path(path)
    if (folder / MANIFEST).exists() or not (folder / "config.json").exists():
        bundle = Bundle.open(folder)
        click.echo(json.dumps(bundle.manifest(), ensure_ascii=False) if as_json else _describe(bundle))
        return
    from edgevl.runtime.checkpoint import Checkpoint

    with Checkpoint.open(folder) as checkpoint:
        tensors = [
            {"name": n, "dtype": checkpoint.dtype(n), "shape": list(checkpoint.shape(n))} for n in checkpoint.names()
        ]
        if as_json:
            quantization = checkpoint.describe_quantization()
            click.echo(
                json.dumps({"model": checkpoint.config.to_dict(), "quantization": quantization, "tensors": tensors})
            )
            return
        click.echo(_model_lines(checkpoint.config, checkpoint.describe_quantization()))
        click.echo(
            tabulate(
                [(t["name"], t["dtype"], "×".join(map(str, t["shape"]))) for t in tensors],
                headers=("tensor", "dtype", "shape"),
                tablefmt="simple",
            )
        )


def _model_lines(config: Any, quantization: dict[str, Any] | None = None) -> str:
    t, v = config.text, config.vision
    rows = [
        (
            "decoder",
            f"{t.num_hidden_layers} layers, hidden {t.hidden_size}, mlp {t.intermediate_size}, "
            f"{t.num_attention_heads}/{t.num_key_value_heads} heads of {t.head_dim}, vocabulary {t.vocab_size}",
        ),
        (
            "",
            f"M-RoPE sections {list(t.mrope_section)}, theta {t.rope_theta:g}, "
            f"{'tied' if t.tie_word_embeddings else 'untied'} head, {t.max_position_embeddings} positions",
        ),
        (
            "vision",
            f"{v.depth} blocks, width {v.embed_dim}, {v.num_heads} heads, patch {v.patch_size}, "
            f"merge {v.spatial_merge_size}, temporal {v.temporal_patch_size}",
        ),
    ]
    if quantization is not None:
        q = {k: "/".join(map(str, v)) if isinstance(v, list) else v for k, v in quantization.items()}
        groups = q["group_size"].replace("-1", "whole rows")
        rows.append(
            (
                "quantized",
                f"{q['method']} ({q['format']}), {q['layers']} layers of {q['bits']} bits, groups {groups}; "
                f"decoder precision {q['precision']}",
            )
        )
    return tabulate(rows, tablefmt="plain")


def _describe(bundle: Bundle) -> str:
    head = [
        ("bundle", f"{bundle.folder} (edgevl {bundle.edgevl_version})"),
        ("target", f"{bundle.target}, needs " + ", ".join(f"{k} >= {v}" for k, v in bundle.requires.items())),
        ("precision", bundle.precision),
        ("rules", f"M-RoPE {bundle.mrope_rule}, up to {bundle.max_tokens} tokens"),
    ]
    lines = [tabulate(head, tablefmt="plain"), _model_lines(bundle.model)]
    for role, graph in bundle.graphs.items():
        cache = {n for pair in graph.spec.cache for n in pair}
        rows = [
            (kind, t.name, t.dtype, "×".join(map(str, t.shape)))
            for kind, tensors in (("in", graph.spec.inputs), ("out", graph.spec.outputs))
            for t in tensors
            if t.name not in cache
        ]
        if graph.spec.cache:
            t = graph.spec.input(graph.spec.cache[0][0])
            rows.append(("cache", f"{len(graph.spec.cache)} tensors", t.dtype, "×".join(map(str, t.shape))))
        lines.append(f"{role}: {graph.file}, {graph.precision}\n" + tabulate(rows, tablefmt="plain"))
    files = [(n, f"{f.size:,}", f.sha256[:16]) for n, f in sorted(bundle.files.items())]
    lines.append(
        tabulate(files, headers=("file", "bytes", "sha256"), tablefmt="simple", colalign=("left", "right", "left"))
    )
    return "\n\n".join(lines)


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
