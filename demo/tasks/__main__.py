"""Score a bundle on the yardstick: `python -m edgevl.tasks BUNDLE`."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
from tabulate import tabulate

from edgevl.runtime.doctor import cpu_model
from edgevl.runtime.errors import EdgeVLError
from edgevl.tasks.cases import SPLITS, TASKS
from edgevl.tasks.evaluation import TaskResult, score_bundle, summarize


def _table(rows: list[TaskResult]) -> str:
    table = [(r.task, r.n, f"{r.right:.3f}", "{:.3f}–{:.3f}".format(*r.interval), f"{r.value:.3f}") for r in rows]
    right, value = (sum(v) / len(rows) for v in ([r.right for r in rows], [r.value for r in rows]))
    table.append(("mean", sum(r.n for r in rows), f"{right:.3f}", "", f"{value:.3f}"))
    headers = ("task", "cases", "right", "95 % interval", "value")
    return tabulate(table, headers=headers, tablefmt="simple", disable_numparse=True)


@click.command()
@click.argument("bundle")
@click.option("--cases", default=500, show_default=True, type=click.IntRange(1), help="Of every task.")
@click.option("--tasks", default=",".join(TASKS), help=f"Some of {', '.join(TASKS)} [default: all].")
@click.option("--split", default="test", show_default=True, type=click.Choice(SPLITS))
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0))
@click.option("--engine", default="ort-cpu", show_default=True)
@click.option("--processes", type=click.IntRange(1), help="[default: the cores this process may use]")
@click.option("--threads", default=1, show_default=True, type=click.IntRange(1), help="Of each process.")
@click.option("--json", "json_path", help="Write the scores to this file.")
def main(bundle: str, tasks: str, json_path: str | None, **options: Any) -> None:
    """Score BUNDLE (an export of the demo model) on held-out pictures."""
    names = tasks.split(",")
    if unknown := [n for n in names if n not in TASKS]:
        raise click.UsageError(f"task {unknown[0]!r} is unknown; expected {', '.join(TASKS)}")
    began = time.perf_counter()
    try:
        rows = summarize(score_bundle(bundle, names, **options))
    except EdgeVLError as e:
        raise click.UsageError(str(e)) from None
    seconds = time.perf_counter() - began
    click.echo(_table(rows))
    click.echo(f"{seconds:.1f} s on {cpu_model()}")
    if json_path is not None:
        data = {"bundle": str(bundle), "options": options, "seconds": seconds, "scores": [asdict(r) for r in rows]}
        Path(json_path).write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
