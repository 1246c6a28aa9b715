"""The host side's subcommand `quantize`."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
from tabulate import tabulate

from edgevl.calibration.auto import AutoReport, quantize_auto
from edgevl.calibration.dataset import LEAST_SAMPLES, Sample, SampleSource, read_conversations
from edgevl.calibration.driver import QuantizeReport, check_output, quantize_checkpoint
from edgevl.calibration.fidelity_command import measure_options, progress_bar, summary, wanted
from edgevl.calibration.page import write_page
from edgevl.calibration.recipes import RECIPES, ROTATIONS, VISION_RECIPES, Recipe, recipe
from edgevl.calibration.report import FIDELITY, FidelityReport, Wanted, check_gates, measure, write_report
from edgevl.runtime.checkpoint import Checkpoint
from edgevl.runtime.commands import note
from edgevl.runtime.errors import InputError

__all__ = ["quantize"]

_KINDS = (
    *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    *("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "merger.mlp.0", "merger.mlp.2"),
)
_HELD_OUT = 8  # samples on which the divergence is measured, never calibrated on
_LEAST_HELD_OUT = 2  # a single one gives no interval
_SCRATCH = "fidelity.partial"  # inside the unpublished folder: hidden states and bundles


@click.command()
@click.argument("checkpoint")
@click.option("-o", "--output", required=True, metavar="QCHECKPOINT", help="Folder to write.")
@click.option("--recipe", "recipe_name", required=True, metavar="R", help=", ".join(RECIPES) + ".")
@click.option("--images", metavar="DIR|FILE.jsonl", help="Pictures, or conversations about pictures, to calibrate on.")
@click.option(
    "--samples", default=64, show_default=True, type=click.IntRange(1), metavar="N", help="Conversations used."
)
@click.option(
    "--held-out",
    type=click.IntRange(1),
    metavar="N",
    help=f"Other conversations, to measure on [default: an eighth, 2 to {_HELD_OUT}].",
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
@click.option(
    "--rotate", default="none", show_default=True, metavar="R", help=f"First, exactly: {', '.join(ROTATIONS[1:])}."
)
@click.option("--max-pixels", type=int, help="Shrink pictures to at most this many pixels.")
@click.option(
    "--seed",
    default=0,
    show_default=True,
    type=click.IntRange(0),
    help="Which pictures, in which order; and of --rotate.",
)
@click.option("--auto", is_flag=True, help="Keep the most sensitive layers at more bits until --max-kl holds.")
@click.option("--resume", is_flag=True, help="Go on with a run that was killed.")
@measure_options
def quantize(checkpoint: str, output: str, recipe_name: str, images: str | None, **options: Any) -> None:
    """CHECKPOINT becomes a quantized checkpoint in GPTQ's or compressed-tensors' format, calibrated layer by layer.

    What that did to the model is measured on conversations that were held out, and written beside the weights as
    fidelity.json. Where a limit (--max-kl, --min-score) does not hold, nothing is written and the status is 1.

    \b
    Example:
      edgevl quantize Qwen2-VL-2B-Instruct -o 2b-gptq --recipe gptq-int4 --images photos
    """
    keys = ("asymmetric", "true_sequential", "visual_weight", "kv_cache", "vision", "alpha", "rotate", "seed")
    chosen = recipe(recipe_name, options["group_size"], **{k: options[k] for k in keys})
    asked = wanted(options)
    _check(chosen, asked, images, options["auto"])
    check_output(Path(output).absolute())
    samples, held_out = _samples(checkpoint, images, {**options, "output": output})
    made = {"recipe": asdict(chosen), "images": images and Path(images).name, "samples": len(samples)}
    made |= {key: options[key] for key in ("seed", "max_pixels")}
    measured: list[FidelityReport] = []
    with progress_bar("layer") as progress:

        def judge(folder: Path, auto: AutoReport | None = None) -> None:
            given = {"provenance": made, "name": Path(output).name, "auto": auto, "progress": progress, "notice": note}
            report = measure(checkpoint, folder, held_out, asked, folder / _SCRATCH, **given)
            check_gates(report, "nothing was written")
            write_report(folder / FIDELITY, report)
            measured.append(report)

        given = (checkpoint, output, chosen, samples, held_out)
        if options["auto"]:
            done, _ = quantize_auto(*given, options["max_kl"], resume=options["resume"], progress=progress, judge=judge)
        else:
            limits = {"resume": options["resume"], "max_kl": options["max_kl"]}
            done = quantize_checkpoint(*given, progress=progress, judge=judge, **limits)
    if options["report"] is not None:
        write_page(options["report"], measured[0].to_dict())
    click.echo(f"{_summary(done)}\n{summary(measured[0])}\n{done.output}: {done.seconds:.1f} s")


def _check(chosen: Recipe, asked: Wanted, images: str | None, auto: bool) -> None:
    """What would fail only after the work."""
    if images is None and chosen.needs_samples:
        raise InputError(
            f"recipe {chosen.name!r} calibrates on pictures; pass --images with a folder of pictures or a .jsonl"
        )
    if auto and asked.max_kl is None:
        raise InputError(
            "--auto raises layers until the KL to the original is small enough; pass --max-kl with the limit"
        )
    if images is None and (asked.granularities or asked.max_kl is not None):
        raise InputError("--max-kl and --sensitivity measure on held-out conversations; pass --images")
    if chosen.method == "none" and asked.granularities:
        raise InputError(
            f"recipe {chosen.name!r} quantizes no linear layer of the decoder, so none has a sensitivity; leave "
            "--sensitivity away"
        )
    if chosen.method == "w8a8" and set(asked.granularities) - {"layer"}:
        raise InputError(
            f"recipe {chosen.name!r} folds factors between linear layers, which means nothing for a part of a decoder "
            "layer alone; ask for --sensitivity layer"
        )


def _samples(checkpoint: str, images: str | None, options: dict[str, Any]) -> tuple[list[Sample], list[Sample]]:
    """Samples to calibrate on, and others held out: an eighth, 2 to 8, but one where few are left to calibrate on."""
    if images is None:
        return [], []
    conversations = read_conversations(images)
    began = time.monotonic()
    skipped: list[str] = []

    def skip(message: str) -> None:
        skipped.append(message)
        note(message)

    scratch = Path(options["output"]).absolute().parent
    with Checkpoint.open(checkpoint) as opened:  # a hub id becomes a folder
        source = SampleSource(
            opened.folder, max_pixels=options["max_pixels"], skipped=skip, notice=note, scratch=scratch
        )
    count, given = options["samples"], options["held_out"]
    held = given or min(_HELD_OUT, max(_LEAST_HELD_OUT, len(conversations) // 8))
    found = source.samples(conversations, count + held, options["seed"], min(LEAST_SAMPLES, count + 1))
    if given and held >= len(found):
        raise InputError(
            f"{len(found)} conversations can be used, {held} are to be held out; give more, or hold out less"
        )
    if not given:
        held = min(held, max(1, len(found) - min(count, LEAST_SAMPLES)))
    held = min(held, len(found) - 1)
    tokens = sum(len(s.ids) for s in found)
    note(
        f"{len(found) - held} conversations to calibrate on, {held} held out, {len(skipped)} skipped; {tokens:,} "
        f"tokens in {time.monotonic() - began:.1f} s"
    )
    return found[held:], found[:held]


def _summary(report: QuantizeReport) -> str:
    """Errors on the samples that were calibrated on, by kind of layer."""
    rows = []
    for kind in _KINDS:
        layers = [r for r in report.layers if r.name.endswith(f".{kind}")]
        if not layers:
            continue
        known = [(r.error, r.rtn_error) for r in layers if r.error is not None and r.rtn_error is not None]
        errors = [f"{sum(e) / len(known):.2e}" for e in zip(*known)] or ["", ""]
        bits = "/".join(str(b) for b in sorted({r.bits for r in layers}))
        rows.append((kind, bits, len(layers), *errors))
    headers = ("layers", "bits", "count", "output error", "without the method")
    align = ("left", *["right"] * 4)
    return tabulate(rows, headers=headers, tablefmt="simple", disable_numparse=True, colalign=align) if rows else ""
