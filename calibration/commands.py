"""The host side's subcommand `quantize`."""

from __future__ import annotations

import sys
import time
from typing import Any

import click
from tabulate import tabulate
from tqdm import tqdm

from edgevl.calibration.dataset import Sample, SampleSource, read_conversations
from edgevl.calibration.driver import QuantizeReport, quantize_checkpoint
from edgevl.calibration.recipes import RECIPES, VISION_RECIPES, Recipe, recipe
from edgevl.runtime.checkpoint import Checkpoint
from edgevl.runtime.commands import note
from edgevl.runtime.errors import InputError

__all__ = ["quantize"]

_KINDS = (
    *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    *("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "merger.mlp.0", "merger.mlp.2"),
)
_HELD_OUT = 8  # samples on which the divergence is measured, never calibrated on


@click.command()
@click.argument("checkpoint")
@click.option("-o", "--output", required=True, metavar="QCHECKPOINT", help="Folder to write.")
@click.option("--recipe", "recipe_name", required=True, metavar="R", help=", ".join(RECIPES) + ".")
@click.option("--images", metavar="DIR|FILE.jsonl", help="Pictures, or conversations about pictures, to calibrate on.")
@click.option(
    "--samples", default=64, show_default=True, type=click.IntRange(1), metavar="N", help="Conversations used."
)
@click.option(
    "--vision", metavar="V", help=f"Vision encoder: {', '.join(VISION_RECIPES)} [default: none, left as it is]."
)
@click.option("--alpha", metavar="A", help="Smoothing of W8A8: auto, or 0 to 1 [default: the recipe's].")
@click.option("--group-size", type=int, metavar="N", help="32, 64, 128, or -1 for whole rows [default: the recipe's].")
@click.option("--asymmetric", is_flag=True, help="Zero points: a little better, not for TensorRT (gptq_v2 is written).")
@click.option("--true-sequential", is_flag=True, help="GPTQ sees every group's inputs as quantized so far; slower.")
@click.option("--visual-weight", type=float, metavar="X", help="Of a picture's token in GPTQ's Hessian [default: 1].")
@click.option(
    "--kv-cache", default="float", show_default=True, metavar="K", help="int8 adds the scales of an INT8 KV cache."
)
@click.option("--max-pixels", type=int, help="Shrink pictures to at most this many pixels.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0), help="Which pictures, in which order.")
@click.option("--max-kl", type=float, metavar="X", help="Publish nothing when the KL to the original is larger.")
@click.option("--resume", is_flag=True, help="Go on with a run that was killed.")
def quantize(checkpoint: str, output: str, recipe_name: str, images: str | None, **options: Any) -> None:
    """CHECKPOINT becomes a quantized checkpoint in GPTQ's or compressed-tensors' format, calibrated layer by layer.

    \b
    Example:
      edgevl quantize Qwen2-VL-2B-Instruct -o 2b-gptq --recipe gptq-int4 --images photos
    """
    keys = ("asymmetric", "true_sequential", "visual_weight", "kv_cache", "vision", "alpha")
    chosen = recipe(recipe_name, options["group_size"], **{k: options[k] for k in keys})
    samples, held_out = _samples(checkpoint, chosen, images, options)
    with tqdm(unit="layer", file=sys.stderr, disable=None, leave=False) as bar:

        def progress(done: int, layers: int, what: str) -> None:
            bar.total = layers
            bar.set_postfix_str(what, refresh=False)
            bar.update(done - bar.n)
            bar.refresh()

        limits = {"resume": options["resume"], "max_kl": options["max_kl"]}
        report = quantize_checkpoint(checkpoint, output, chosen, samples, held_out, progress=progress, **limits)
    click.echo(_summary(report))


def _samples(
    checkpoint: str, chosen: Recipe, images: str | None, options: dict[str, Any]
) -> tuple[list[Sample], list[Sample]]:
    """Samples to calibrate on, and others held out: an eighth, at most 8."""
    if images is None:
        if chosen.needs_samples:
            raise InputError(
                f"recipe {chosen.name!r} calibrates on pictures; pass --images with a folder of pictures or a .jsonl"
            )
        return [], []
    conversations = read_conversations(images)
    began = time.monotonic()
    skipped: list[str] = []

    def skip(message: str) -> None:
        skipped.append(message)
        note(message)

    with Checkpoint.open(checkpoint) as opened:  # a hub id becomes a folder
        source = SampleSource(opened.folder, max_pixels=options["max_pixels"], skipped=skip)
    held = min(_HELD_OUT, max(1, len(conversations) // 8))
    found = source.samples(conversations, options["samples"] + held, options["seed"])
    held = min(held, len(found) - 1)
    tokens = sum(len(s.ids) for s in found)
    note(
        f"{len(found) - held} conversations to calibrate on, {held} held out, {len(skipped)} skipped; {tokens:,} "
        f"tokens in {time.monotonic() - began:.1f} s"
    )
    return found[held:], found[:held]


def _summary(report: QuantizeReport) -> str:
    rows = []
    for kind in _KINDS:
        layers = [r for r in report.layers if r.name.endswith(f".{kind}")]
        if not layers:
            continue
        known = [(r.error, r.rtn_error) for r in layers if r.error is not None and r.rtn_error is not None]
        errors = [f"{sum(e) / len(known):.2e}" for e in zip(*known)] or ["", ""]
        rows.append((kind, layers[0].bits, len(layers), *errors))
    headers = ("layers", "bits", "count", "output error", "without the method")
    lines = []
    if rows:
        align = ("left", *["right"] * 4)
        lines.append(tabulate(rows, headers=headers, tablefmt="simple", disable_numparse=True, colalign=align))
    if report.divergence is not None:
        d = report.divergence
        lines.append(f"KL to the original {d.kl:.4f}, same top token {d.top1:.1%}, over {d.tokens:,} held-out tokens")
    lines.append(f"{report.output}: {report.nbytes / 1e6:,.1f} MB in {report.seconds:.1f} s")
    return "\n".join(lines)
