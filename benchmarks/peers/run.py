"""Our bundles beside the other programs, on one checkpoint, in one run.

Method: a round starts every contender once for every workload, each in a process of its own on the same cores, and the
order rotates, so that what else the machine does hits all alike. A process opens its model, answers once to warm up
and then `--repeats` times about new pictures (JPEG bytes in, tokens out; greedy; end tokens are not heeded). Ratios
are taken round by round. Results are appended to `OUT/results.jsonl` as they come: a run that was killed goes on where
it stopped, and only figures of one machine and one day are put together.
"""

from __future__ import annotations

import datetime
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
from tqdm import tqdm

from edgevl.benchmarks.peers.by_turns import turns
from edgevl.benchmarks.peers.contract import Measured, ending
from edgevl.benchmarks.peers.conversions import convert, fingerprint, is_current
from edgevl.benchmarks.peers.entrants import ENGINE, PEERS, Entrant, entrants, folder_name
from edgevl.benchmarks.peers.plot import plot
from edgevl.benchmarks.peers.results import append_row, merged_head, output_folder, read_rows
from edgevl.benchmarks.peers.table import Row, tables
from edgevl.benchmarks.plotting import library
from edgevl.benchmarks.turns import environment, in_turn
from edgevl.benchmarks.workloads import WORKLOADS, Workload, question, workload
from edgevl.runtime import VisionLanguageModel
from edgevl.runtime.bundle import MANIFEST, Bundle, file_sha256
from edgevl.runtime.doctor import cpu_flags, cpu_model
from edgevl.runtime.errors import EdgeVLError
from edgevl.runtime.output_file import check_output_file, write_output

__all__ = ["PEERS", "WITHOUT_VIDEO", "Entrant", "WorkerError", "entrants", "main"]

WITHOUT_VIDEO = [name for name, work in WORKLOADS.items() if not work.frames]
HEAD, ROWS, TABLE, PLOT = "run.json", "results.jsonl", "table.md", "peers.png"


class WorkerError(Exception):
    """A contender's process failed; the message says how, for the table."""


def _run(what: str, command: list[str], threads: int, task: str = "") -> str:
    """What the process printed.

    Raises:
        WorkerError: it failed, or could not be started; `what`, and the last line that it wrote.
    """
    try:
        done = subprocess.run(
            command,
            input=task,
            capture_output=True,
            text=True,
            errors="replace",
            env=environment(threads),
            check=False,
        )
    except OSError as e:
        raise WorkerError(f"{what} could not begin: {command[0]}: {e.strerror}") from None
    if done.returncode:
        raise WorkerError(f"{what} {ending(done.returncode, done.stderr)}")
    return done.stdout


def _prepare(listed: Sequence[Entrant], checkpoint: Path, made_of: str, threads: int) -> dict[str, str]:
    """Convert the checkpoint for the peers that have no conversion of it; of those that cannot, name and reason."""
    failed: dict[str, str] = {}
    for entrant in listed:
        if entrant.ours or is_current(entrant.folder, made_of):
            continue
        click.echo(f"{entrant.name}: converting {checkpoint.name}", err=True)

        def make(folder: Path, entrant: Entrant = entrant) -> None:
            _run("the conversion", entrant.worker("prepare", str(checkpoint), str(folder)), threads)

        try:
            convert(checkpoint, entrant.folder, make)
        except (WorkerError, EdgeVLError, OSError) as e:
            failed[entrant.name] = str(e)
            click.echo(f"{entrant.name} is not measured: {e}", err=True)
    return failed


def _measure(entrant: Entrant, task: dict[str, Any]) -> Measured:
    try:
        command = entrant.worker("measure", str(entrant.folder))
        printed = _run("the measurement", command, task["threads"], json.dumps(task))
    except WorkerError as e:
        return Measured(entrant.name, unsupported=str(e))
    return Measured(**{**json.loads(printed.splitlines()[-1]), "contender": entrant.name})


@click.command()
@click.argument("checkpoint", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("bundles", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--peers", "chosen", default="all", show_default=True, help="all, none, or NAME[:VARIANT],...")
@click.option(
    "--models",
    type=click.Path(path_type=Path),
    default=Path("out/peers"),
    show_default=True,
    help="Where the peers' converted models are kept.",
)
@click.option(
    "--environments",
    type=click.Path(path_type=Path),
    default=Path(".venv-peers"),
    show_default=True,
    help="Where `make peers` put them.",
)
@click.option(
    "--results",
    type=click.Path(path_type=Path),
    default=Path("out/peers/results"),
    show_default=True,
    help="Folder of results.jsonl, table.md and peers.png.",
)
@click.option(
    "--workload",
    "names",
    multiple=True,
    default=("picture", "document", "batch-4"),
    show_default=True,
    type=click.Choice(WITHOUT_VIDEO),
    help="May be given several times. Videos are not measured.",
)
@click.option("--new-tokens", type=click.IntRange(2), help="Of every answer [default: the workload's].")
@click.option("--engines", default=ENGINE, show_default=True, help="Of the bundles: ort-cpu, openvino.")
@click.option("--rounds", default=3, show_default=True, type=click.IntRange(1))
@click.option("--repeats", default=2, show_default=True, type=click.IntRange(1), help="Measured answers per process.")
@click.option("--by-turns", is_flag=True, help="All stay open, which takes memory for all; a round is a turn of each.")
@click.option("--threads", default=2, show_default=True, type=click.IntRange(1))
def main(checkpoint: Path, bundles: tuple[Path, ...], **options: Any) -> None:
    """Measure BUNDLES beside the other programs on CHECKPOINT; ratios are to the first bundle."""
    try:
        click.echo(_main(checkpoint, bundles, options))
    except EdgeVLError as e:
        raise click.UsageError(str(e)) from None
    except KeyboardInterrupt:
        click.echo(err=True)
        sys.exit(130)


def _main(checkpoint: Path, bundles: Sequence[Path], options: dict[str, Any]) -> str:
    """The tables. Everything that was asked is looked at before a folder is made or a process begun."""
    results, models, threads = options["results"], options["models"], options["threads"]
    listed = entrants(options["chosen"], bundles, models, options["environments"], options["engines"])
    opened = [Bundle.open(b) for b in bundles]
    works = [workload(name, new_tokens=options["new_tokens"]) for name in options["names"]]
    library("matplotlib.figure")
    made_of = fingerprint(checkpoint)
    head = {
        "processor": cpu_model(), "flags": cpu_flags(), "threads": threads, "checkpoint": folder_name(checkpoint),
        "fingerprint": made_of, "date": datetime.date.today().isoformat(), "repeats": options["repeats"],
        "by_turns": options["by_turns"],
        "workloads": {w.name: w.describe for w in works},
        "bundles": {folder_name(b): file_sha256(b / MANIFEST)[:16] for b in bundles},
    }  # fmt: skip
    rows = read_rows(results / ROWS)
    head = merged_head(results / HEAD, head, bool(rows))
    folders = [output_folder(models, "--models"), output_folder(results, "--results")]
    with VisionLanguageModel.open(opened[0], ENGINE) as model:
        texts = {w.name: question(model, w.prompt_tokens) for w in works}
    for make in folders:
        make()
    for name in (HEAD, ROWS, TABLE, PLOT):
        check_output_file(results / name)
    write_output(results / HEAD, json.dumps(head, indent=1) + "\n")
    failed = _prepare(listed, checkpoint, made_of, threads)
    racing = [e for e in listed if e.name not in failed]
    cores = sorted(os.sched_getaffinity(0))[:threads]
    task = {"threads": threads, "cores": cores, "repeats": options["repeats"]}
    asked = [{"work": asdict(w), "text": texts[w.name], **task} for w in works]
    done = {(r.workload, r.round, r.measured.contender) for r in rows}
    order = _order(list(zip(works, asked)), racing, options["rounds"])
    missing = [(n, one, entrant) for n, one, entrant in order if (one[0].name, n, entrant.name) not in done]
    found = _by_turns(missing, racing) if options["by_turns"] else _by_processes(missing)
    rows += _race(found, len(missing), results / ROWS)
    # Not kept: the next run tries these conversions again.
    rows += [Row(w.name, 0, Measured(name, unsupported=reason)) for name, reason in failed.items() for w in works]
    head = {**head, "contenders": {e.name: e.kind for e in listed if e.kind}}
    names = list(dict.fromkeys([*(e.name for e in listed), *(r.measured.contender for r in rows)]))
    text = tables(rows, head, names)
    write_output(results / TABLE, text + "\n")
    plot(rows, head, names, results / PLOT)
    return text


_Asked = tuple[Workload, dict[str, Any]]
_Turn = tuple[int, _Asked, Entrant]


def _race(found: Iterator[Row], count: int, path: Path) -> list[Row]:
    """All `count` rows; each is appended to the file as it comes."""
    rows: list[Row] = []
    with tqdm(total=count, unit="result", file=sys.stderr, disable=None) as bar:
        for row in found:
            rows.append(row)
            append_row(path, row)
            bar.set_postfix_str(f"{row.workload}, {row.measured.contender}")
            bar.update()
    return rows


def _by_processes(missing: Sequence[_Turn]) -> Iterator[Row]:
    for number, (work, task), entrant in missing:
        yield Row(work.name, number, _measure(entrant, task))


def _by_turns(missing: Sequence[_Turn], racing: Sequence[Entrant]) -> Iterator[Row]:
    """In a round of which something is missing all have their turns, so that each ratio is of one round."""
    wanted = {(work.name, number, entrant.name) for number, (work, _), entrant in missing}
    for work, task in {work.name: (work, task) for _, (work, task), _ in missing}.values():
        rounds = sorted({number for name, number, _ in wanted if name == work.name})
        for number, measured in turns(racing, task, rounds):
            if (work.name, number, measured.contender) in wanted:
                yield Row(work.name, number, measured)


def _order(asked: Sequence[_Asked], racing: Sequence[Entrant], rounds: int) -> Iterator[_Turn]:
    for number in range(rounds):
        for one in asked:
            for entrant in in_turn(racing, number):
                yield number, one, entrant
