"""`edgevl inspect`: what a bundle or a checkpoint holds, and what requests will need in memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
from tabulate import tabulate

from edgevl.runtime.bundle import MANIFEST, Bundle
from edgevl.runtime.decoding import DEFAULT_PREFILL_CHUNK
from edgevl.runtime.errors import InputError
from edgevl.runtime.image_processing import VisionGrid
from edgevl.runtime.memory import available_bytes, parse_size, shown
from edgevl.runtime.preflight import Plan, Planner, picture_of

__all__ = ["inspect"]

_MOST = 10**12  # of any number in a plan
_SIDES = (224, 448, 672, 896, 1344, 1792, 2688, 3584)  # of the squares that --plan shows


@click.command()
@click.argument("path")
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
@click.option("--plan", is_flag=True, help="The memory that requests of several sizes will need (CPU).")
@click.option("--max-pixels", type=int, metavar="N", help="With --plan: pictures of this size only.")
@click.option("--images", type=int, metavar="N", help="With --plan: pictures in each request [default: 1].")
@click.option("--batch", type=int, metavar="N", help="With --plan: requests answered together [default: 1].")
@click.option("--max-tokens", type=int, metavar="N", help="With --plan: tokens of text and answer [default: 256].")
@click.option("--prefill-chunk", type=int, metavar="N", help="With --plan: as for run [default: 2048].")
@click.option("--memory-limit", metavar="SIZE", help="With --plan: compare with 4GB, ... [default: what is free].")
def inspect(path: str, as_json: bool, plan: bool, **options: Any) -> None:
    """What a BUNDLE or CHECKPOINT holds: model, graphs, tensors, precision, sizes, rules, hashes; or what it will need.

    \b
    Example:
      edgevl inspect bundle --json
      edgevl inspect bundle --plan --max-pixels 602112 --images 2 --memory-limit 4GB
    """
    folder = Path(path)
    given = [f"--{name.replace('_', '-')}" for name, value in options.items() if value is not None]
    if given and not plan:
        raise InputError(f"{', '.join(given)} goes with --plan; add it")
    if plan:
        click.echo(_planned(Bundle.open(folder), as_json, **options))
        return
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
                + ", ".join(
                    f"{part} precision {q[key]}"
                    for part, key in (("decoder", "precision"), ("vision", "vision_precision"))
                    if q[key] is not None
                )
                + (f", {q['static_activations']} with static activations" if q["static_activations"] else ""),
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


def _planned(
    bundle: Bundle,
    as_json: bool,
    max_pixels: int | None,
    images: int | None,
    batch: int | None,
    max_tokens: int | None,
    prefill_chunk: int | None,
    memory_limit: str | None,
) -> str:
    """The plan as a table, or as JSON."""
    count, rows = (1 if images is None else images), (1 if batch is None else batch)
    text = 256 if max_tokens is None else max_tokens
    chunk = DEFAULT_PREFILL_CHUNK if prefill_chunk is None else prefill_chunk
    numbers = (("images", count, 0), ("batch", rows, 1), ("max-tokens", text, 1), ("prefill-chunk", chunk, 1))
    for name, value, least in (*numbers, ("max-pixels", 1 if max_pixels is None else max_pixels, 1)):
        if not least <= value <= _MOST:
            limit = f"at least {least}" if value < least else f"at most {_MOST}"
            raise InputError(f"--{name} is {value}, expected {limit}")
    room = parse_size(memory_limit) if memory_limit is not None else available_bytes()
    processor, planner = bundle.image_processor, Planner(bundle, chunk)
    sizes = [max_pixels] if max_pixels is not None else [s * s for s in _SIDES if s * s <= processor.max_pixels]
    plans: list[tuple[str, Plan]] = []
    for pixels in sizes if count else [0]:
        height, width = picture_of(pixels, processor.factor) if count else (0, 0)
        grid = VisionGrid(1, height // processor.patch_size, width // processor.patch_size)
        plans.append((f"{width}×{height}" if count else "none", planner.plan([grid] * count, text, 0, rows)))
    if as_json:
        data = [{"picture": name, **plan.to_dict(), "fits": room is None or plan.peak <= room} for name, plan in plans]
        return json.dumps({"precision": bundle.precision, "available": room, "capacity": bundle.max_tokens,
                           "plans": data})  # fmt: skip
    table = [
        (name, plan.image_tokens, f"{plan.vision / 1e6:,.0f}", f"{plan.prefill / 1e6:,.0f}", f"{plan.cache / 1e6:,.0f}",
         f"{plan.peak / 1e6:,.0f}", _verdict(plan, bundle.max_tokens, room))
        for name, plan in plans
    ]  # fmt: skip
    first = plans[0][1]
    head = (
        f"{bundle.folder}: {bundle.precision}, ort-cpu; {count} pictures, {text} tokens of text and answer, "
        f"batch {rows}\n"
        f"libraries and tokenizer {shown(first.base)}, weights {shown(first.weights)}, "
        f"while opening {shown(first.opening)}"
    )
    columns = ("picture", "image tokens", "vision MB", "prefill MB", "KV cache MB", "peak MB", "")
    align = ("left", *["right"] * 5, "left")
    return f"{head}\n\n{tabulate(table, headers=columns, tablefmt='simple', colalign=align)}"


def _verdict(plan: Plan, capacity: int, room: int | None) -> str:
    if plan.cache_tokens > capacity:
        return f"needs a capacity of {plan.cache_tokens}, the bundle has {capacity}"
    if room is None:
        return ""
    return "fits" if plan.peak <= room else f"needs more than {shown(room)}"
