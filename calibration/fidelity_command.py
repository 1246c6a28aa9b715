"""The host side's subcommand `fidelity`, and what `quantize` shares with it."""

from __future__ import annotations

import errno
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
from tabulate import tabulate
from tqdm import tqdm

from edgevl.calibration.auto import AutoReport
from edgevl.calibration.cache_rounding import has_int8_cache
from edgevl.calibration.comparison import Progress, check_pair
from edgevl.calibration.dataset import Sample, SampleSource, read_conversations
from edgevl.calibration.dequantized import FloatCheckpoint
from edgevl.calibration.page import check_page, write_page
from edgevl.calibration.recipes import PLAIN
from edgevl.calibration.report import FidelityReport, Wanted, check_gates, measure, report_text
from edgevl.calibration.scores import check_scoring, parse_min_scores
from edgevl.calibration.sensitivity import GRANULARITIES
from edgevl.runtime.commands import note
from edgevl.runtime.errors import CheckpointError, InputError
from edgevl.runtime.output_file import check_output_file, write_output
from edgevl.tasks import TASKS

__all__ = ["fidelity", "measure_options", "progress_bar", "summary", "wanted"]

_CASES = 100  # of every task, where only a limit or the tasks were given
_MOST_ROWS = 12  # of sensitivities at the terminal


def measure_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """What is measured, its limits, and the page: the same for `quantize` and `fidelity`."""
    for option in (
        click.option("--report", metavar="FILE.html", help="Write a page with plots (needs the extra `report`)."),
        click.option(
            "--min-score",
            multiple=True,
            metavar="[TASK=]X",
            help=f"Fail when the share of right answers is smaller, of a task or the mean; implies --tasks {_CASES}.",
        ),
        click.option("--max-kl", type=float, metavar="X", help="Fail when the KL to the original is larger."),
        click.option(
            "--task",
            multiple=True,
            metavar="NAME",
            help=f"Score only this task (repeatable) [default: all]; implies --tasks {_CASES}.",
        ),
        click.option(
            "--tasks",
            type=click.IntRange(1),
            metavar="N",
            help="Score both checkpoints, exported, on N cases of every task of the yardstick.",
        ),
        click.option(
            "--sensitivity",
            multiple=True,
            type=click.Choice(GRANULARITIES),
            help="Measure what each part costs when quantized alone (repeatable): all linear layers of a kind, decoder "
            "layers, groups over one input, single linear layers. The work is about half a run of the model for each.",
        ),
    ):
        command = option(command)
    return command


def wanted(options: dict[str, Any]) -> Wanted:
    """The options of `measure_options`, checked; nothing that can be known beforehand fails later.

    Raises:
        InputError, EdgeVLError: an option that cannot be, or a package that is missing.
    """
    limits = parse_min_scores(options["min_score"])
    tasks = tuple(dict.fromkeys(options["task"])) or tuple(TASKS)
    cases = options["tasks"] or (_CASES if limits or options["task"] else 0)
    if options["max_kl"] is not None and not options["max_kl"] >= 0:
        raise InputError(f"--max-kl is {options['max_kl']}, expected 0 or more")
    if cases:
        check_scoring(tasks, limits)
    if options["report"] is not None:
        check_page(options["report"])
    granularities = tuple(dict.fromkeys(options["sensitivity"]))
    return Wanted(granularities, cases, tasks, options["max_kl"], limits)


@contextmanager
def progress_bar(unit: str) -> Iterator[Progress]:
    """A bar on a terminal's stderr, told (done, in all, what)."""
    with tqdm(unit=unit, file=sys.stderr, disable=None, leave=False) as bar:

        def progress(done: int, total: int, what: str) -> None:
            bar.total = total
            bar.set_postfix_str(what, refresh=False)
            bar.update(done - bar.n)
            bar.refresh()

        yield progress


@click.command()
@click.argument("original")
@click.argument("quantized")
@click.option("--images", metavar="DIR|FILE.jsonl", help="Pictures, or conversations about pictures, to measure on.")
@click.option(
    "--samples",
    default=16,
    show_default=True,
    type=click.IntRange(1),
    metavar="N",
    help="Conversations used: the first of the seed's order, of which `quantize` holds its first ones out.",
)
@click.option("--max-pixels", type=int, help="Shrink pictures to at most this many pixels.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0), help="Which pictures, in which order.")
@click.option("--json", "json_path", metavar="FILE", help="Write the report as JSON.")
@measure_options
def fidelity(original: str, quantized: str, images: str | None, json_path: str | None, **options: Any) -> None:
    """What quantization did to a model: QUANTIZED (GPTQ, AWQ or compressed-tensors, by any tool) against ORIGINAL.

    \b
    Example:
      edgevl fidelity Qwen2-VL-2B-Instruct 2b-gptq --images photos --sensitivity layer --report fidelity.html
    """
    asked = wanted(options)
    if images is None and not asked.cases:
        raise InputError("nothing to measure on; pass --images for the divergence, --tasks N for scores, or both")
    if json_path is not None:
        check_output_file(json_path, "a JSON file")
    samples = _checked_samples(original, quantized, images, asked, options)
    known = {"images": images and Path(images).name, "seed": options["seed"], "max_pixels": options["max_pixels"]}
    try:
        with tempfile.TemporaryDirectory() as temporary, progress_bar("step") as progress:
            scratch = Path(temporary) / "fidelity"
            given = {"provenance": known, "progress": progress, "notice": note}
            report = measure(original, quantized, samples, asked, scratch, **given)
        if json_path is not None:
            write_output(json_path, report_text(report))
        if options["report"] is not None:
            write_page(options["report"], report.to_dict())
    except OSError as e:
        if e.errno != errno.ENOSPC:
            raise
        raise CheckpointError(
            f"the disk is full ({e.filename or tempfile.gettempdir()}); free some space, or set TMPDIR"
        ) from None
    click.echo(summary(report))
    check_gates(report)


def _checked_samples(
    original: str, quantized: str, images: str | None, asked: Wanted, options: dict[str, Any]
) -> list[Sample]:
    """What to measure on; whether the two belong together, and have what is asked for."""
    with FloatCheckpoint.open(original) as a, FloatCheckpoint.open(quantized) as b:
        check_pair(a, b)
        if b.stored.cache.entries and not has_int8_cache(b.stored):
            note(f"{quantized}: the scales of its KV cache are not an INT8 cache's; measured with a float KV cache")
        if asked.granularities and not any(name.startswith("model.layers.") for name in b.stored.layers):
            raise InputError(
                f"{quantized}: no linear layer of its decoder is quantized, so none has a sensitivity; leave "
                "--sensitivity away"
            )
        if images is None:
            return []
        source = SampleSource(
            a.folder, max_pixels=options["max_pixels"], skipped=note, notice=note, scratch=tempfile.gettempdir()
        )
    return source.samples(read_conversations(images), options["samples"], options["seed"])


def summary(report: FidelityReport) -> str:
    """What a person at the terminal wants to know of a report."""
    before, after = report.original, report.quantized
    lines = [
        f"{after.nbytes / 1e6:,.1f} MB of {before.nbytes / 1e6:,.1f}, the decoder's linear layers in "
        f"{after.decoder_bits:.2f} bits a weight{', INT8 KV cache' if after.kv_cache == 'int8' else ''}"
    ]
    if report.divergence is not None:
        d = report.divergence
        kl = "" if d.kl_interval is None else " (95 % {:.4f} to {:.4f})".format(*d.kl_interval)
        top1 = "" if d.top1_interval is None else " ({:.1%} to {:.1%})".format(*d.top1_interval)
        count = len(d.conversations)
        told = f"{count} conversations" if count > 1 else "one conversation, too few for an interval"
        lines.append(
            f"KL to the original {d.kl:.4f}{kl}, same top token {d.top1:.1%}{top1}, over {d.tokens:,} tokens of {told}"
        )
    if report.auto is not None:
        lines += _auto(report.auto)
    if report.sensitivities:
        rows = sorted(report.sensitivities, key=lambda s: -s.kl)
        table = [(s.name, f"{s.kl:.2e}", f"{s.top1:.1%}", f"{s.nbytes / 1e6:,.2f}") for s in rows[:_MOST_ROWS]]
        more = len(rows) - len(table)
        lines += ["", _table(("quantized alone", "KL", "same top token", "MB"), table)]
        lines += [f"and {more} less sensitive ones"] if more else []
    if report.scores:
        table = [
            (
                *(s.task, s.n, f"{s.before:.3f}", f"{s.after:.3f}", "{:.3f}–{:.3f}".format(*s.after_interval)),
                *(f"{100 * s.change:+.1f}", "{:+.1f} to {:+.1f}".format(*(100 * c for c in s.change_interval))),
            )
            for s in report.scores
        ]
        headers = ("task", "cases", "before", "after", "95 % interval", "points", "95 % interval")
        lines += ["", _table(headers, table)]
    return "\n".join(lines)


def _auto(auto: AutoReport) -> list[str]:
    runs = ", ".join(f"{t.kl:.4g} with {t.steps}" for t in auto.trials)
    lines = [f"--auto: held-out KL by groups raised: {runs}; at most {auto.max_kl:g} was asked"]
    if auto.steps:
        rows = [
            (s.name, "as it was" if s.bits == PLAIN else s.bits, f"{s.kl:.2e}", f"{s.saved_per_mbit:.2e}")
            for s in auto.steps
        ]
        lines += ["", _table(("raised, in this order", "bits", "KL alone", "saved per Mbit"), rows)]
    return lines


def _table(headers: tuple[str, ...], rows: list[tuple[Any, ...]]) -> str:
    align = ("left", *["right"] * (len(headers) - 1))
    return tabulate(rows, headers=headers, tablefmt="simple", disable_numparse=True, colalign=align)
