"""The host side's subcommands: export."""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from typing import Any

import click
from tabulate import tabulate
from tqdm import tqdm

from edgevl.export.exporter import (
    DEFAULT_MAX_TOKENS,
    DEFAULT_PRECISION,
    KV_CACHES,
    PRECISIONS,
    TARGETS,
    ExportOptions,
    ExportReport,
    export_bundle,
)
from edgevl.export.precision import BLOCK_SIZES, DECODER_PRECISIONS, VISION_PRECISIONS
from edgevl.runtime.bundle import Bundle, FileEntry
from edgevl.runtime.commands import note, report_table
from edgevl.runtime.mrope import MROPE_RULES

__all__ = ["export"]

_NO_GOLDEN = "no golden vectors"  # how the reason begins why none are written at all


@click.command()
@click.argument("checkpoint")
@click.option("-o", "--output", required=True, metavar="BUNDLE", help="Folder to write.")
@click.option("--target", default="cpu", show_default=True, metavar="T", help=f"Where it runs: {', '.join(TARGETS)}.")
@click.option(
    "--precision",
    metavar="P",
    help=f"{', '.join(PRECISIONS)} [default: {DEFAULT_PRECISION}, or what a quantized checkpoint is].",
)
@click.option(
    "--vision-precision", metavar="P", help=f"{', '.join(VISION_PRECISIONS)} [default: what --precision implies]."
)
@click.option("--decoder-precision", metavar="P", help=f"{', '.join(DECODER_PRECISIONS)} [default: likewise].")
@click.option(
    "--block-size",
    type=int,
    default=128,
    show_default=True,
    metavar="N",
    help=f"Weights that share a scale where they are rounded to int4 or int8-weights: "
    f"{', '.join(map(str, BLOCK_SIZES))}.",
)
@click.option("--asymmetric", is_flag=True, help="Zero points in int4 and int8-weights.")
@click.option(
    "--head-bits",
    type=int,
    metavar="N",
    help="Embedding and head of quantized decoders: 8 or 4; for TensorRT 16 or 4 [default: the larger].",
)
@click.option(
    "--kv-cache",
    default="float",
    show_default=True,
    metavar="K",
    help=f"{' or '.join(KV_CACHES)}: int8 takes its scales from a checkpoint of `edgevl quantize --kv-cache int8`.",
)
@click.option(
    "--prefill-from",
    metavar="ORIGINAL",
    help="Makes a GPTQ or AWQ checkpoint hybrid: prefill in int8, rounded from the checkpoint that was quantized.",
)
@click.option(
    "--max-tokens",
    type=int,
    metavar="N",
    help=f"Capacity of the KV cache [default: {DEFAULT_MAX_TOKENS}, or what the model has].",
)
@click.option(
    "--mrope-rule",
    default="released",
    show_default=True,
    metavar="NAME",
    help=f"Positions after a video: {', '.join(MROPE_RULES)}.",
)
@click.option("--overwrite", is_flag=True, help="Replace an existing bundle.")
@click.option("--no-verify", is_flag=True, help="Write no golden vectors and run no check.")
def export(checkpoint: str, output: str, asymmetric: bool, overwrite: bool, no_verify: bool, **options: Any) -> int:
    """CHECKPOINT (a folder, or a hub id) becomes the bundle BUNDLE, which verifies itself where torch is installed.

    \b
    Example:
      edgevl export Qwen2-VL-2B-Instruct -o bundle --precision hybrid
    """
    chosen = ExportOptions(symmetric=not asymmetric, **options)
    told: list[str] = []
    finish = None if no_verify else functools.partial(_golden, chosen.prefill_from or checkpoint, told)
    with tqdm(unit="B", unit_scale=True, desc="weights", file=sys.stderr, disable=None, leave=False) as bar:

        def progress(name: str, size: int, total: int) -> None:
            bar.total = max(total, bar.n + size)
            bar.set_postfix_str(name[-40:], refresh=False)
            bar.update(size)

        report = export_bundle(checkpoint, output, chosen, overwrite=overwrite, progress=progress, finish=finish)
    click.echo(_table(report))
    if no_verify:
        return 0
    bundle = Bundle.open(output)
    if not any(name.startswith("golden/") for name in bundle.files):
        none_fits = f"no golden case fits into {bundle.max_tokens} tokens; export with a larger --max-tokens"
        note(f"nothing was verified: {next((t for t in told if t.startswith(_NO_GOLDEN)), none_fits)}")
        return 0
    return _check(Path(output))


def _golden(checkpoint: str, told: list[str], folder: Path, bundle: Bundle) -> dict[str, FileEntry]:
    """Golden vectors, if they can be written here; `told` gets the reason where none can, which ends the command."""
    from edgevl.export.verify import host_missing, write_golden

    def notice(text: str) -> None:
        told.append(text)
        if not text.startswith(_NO_GOLDEN):
            note(text)

    reason = host_missing()
    if reason is not None:
        notice(f"{_NO_GOLDEN}: {reason}; on a workstation: edgevl verify BUNDLE --against {checkpoint}")
        return {}
    return write_golden(folder, bundle, checkpoint, notice=notice, progress=lambda case: note(f"golden: {case}"))


def _check(folder: Path) -> int:
    from edgevl.runtime.golden import replay
    from edgevl.runtime.golden_seen import record_seen

    bundle = Bundle.open(folder)
    if "onnxruntime" not in bundle.requires:
        note(f"not verified here: only {' or '.join(bundle.requires)} runs these graphs; edgevl verify, on the device")
        return 0
    report = replay(bundle, "ort-cpu")
    if report.first_drift is None:
        record_seen(folder, report)
        note(f"verified on {report.engine}: {len(report.results)} stages hold")
        return 0
    click.echo(report_table(report))
    note(f"edgevl: verify: {report.first_drift}; the bundle was kept for a look")
    return 1


def _table(report: ExportReport) -> str:
    rows = [(p.part, p.precision, f"{p.nbytes / 1e6:,.1f}") for p in report.parts]
    rows.append(("total", "", f"{sum(p.nbytes for p in report.parts) / 1e6:,.1f}"))
    table = tabulate(rows, headers=("part", "precision", "MB"), tablefmt="simple", colalign=("left", "left", "right"))
    tail = f"{report.bundle} in {report.seconds:.1f} s, peak memory {report.peak_rss_bytes / 1e6:,.0f} MB"
    return f"{table}\n{tail}"
