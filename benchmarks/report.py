"""The results of `edgevl bench`: one JSON line per case, a table, and a self-contained HTML page with plots.

JSON lines, schema `edgevl.bench/3`. One object per bundle and workload; a line may lack a field that was added later,
and null is what the machine does not tell. A distribution is {"p50", "p95", "p99", "min", "max", "n"}, and {"n": 0}
alone where there was nothing to measure.

    schema, date, system      what it was measured on (see system_info.py)
    bundle, precision, checkpoint   the bundle's name, its precision, what its weights are (as the caller says)
    loop                      "closed" (a request begins when the one before has ended) or "open" (requests arrive)
    engine, workload, seed    engine name; the fields of Workload
    describe                  the workload in words
    cold_s, open_s            per round: process start to first token, and opening the bundle
    ttft_s                    distribution over all requests; of N at once a number for each of the N
    tpot_s                    distribution
    total_s                   distribution over all requests; a closed loop's N at once are one group, until all ended
    memory_mb                 largest over rounds: {"peak", "after_open"}, the process's own; {"arena_mb"}, what the
                              engine's allocator held of it; {"peak_gpu_mb"}, in use on GPU 0, by everybody
    energy                    {"j_per_request", "j_per_picture", "sources", "absent"}: in a closed loop of N at once
                              j_per_request is of the group of N, and j_per_picture what came before the first tokens
                              over all pictures; in an open loop idle seconds count. absent: by what is not told (of
                              memory and throttling too), why
    throttled                 how often the processor throttled while measuring; where it does not count, whether its
                              clocks stayed low under load (true, false); null where it tells neither
    warm_up                   per round: the first request, measured as the others, that no distribution counts
    requests                  every request as it was measured, and "round", its process; ttft_s is a list there, a
                              number for each of N at once, and in an open loop a number

only of a closed loop (stages.py), where tpot_s is over all steps:

    tokens_per_s, detokenize_s, stages.<name>   distributions
    minutes                   of a soak, or 0
    energy                    {"j_before_first_token", "j_per_token"} too
    roofline.read_gb_s, .gemm_gop_s   the ceilings: 10^9 bytes read per second; by precision, 10^9 operations
    roofline.kind             the precision whose rate is the ceiling of prefill and vision
    roofline.absent           by ceiling, why it could not be measured
    roofline.decode, .prefill, .vision   share of its ceiling that each reached; missing where there was no such stage
    roofline.decode_bytes     that one step must read, for all N rows together

only of an open loop (open_loop.py), where ttft_s and total_s count from when a request was due, and tpot_s is the mean
gap between the tokens of a request, over requests:

    queue_s                   distribution: from when a request was due until the worker took it
    load                      the fields of Load (rates, busy share, overloaded, ...) and "verdict", the same in words

Schema 1 had closed loops only, and no "loop"; in schema 2 ttft_s was of the first of N at once.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from edgevl.benchmarks.closed_loop_report import ceiling_table, closed_plots, latency_table, stage_table
from edgevl.benchmarks.machine_report import machine_table, system_rows
from edgevl.benchmarks.open_loop_report import load_table, open_plots, verdicts, wait_table
from edgevl.benchmarks.plotting import library
from edgevl.benchmarks.report_table import Printer, Table
from edgevl.runtime.errors import InputError
from edgevl.runtime.output_file import write_output

__all__ = ["SCHEMA", "check_libraries", "html_page", "percentiles", "print_table", "read_lines", "write_lines"]

SCHEMA = "edgevl.bench/3"
_PAGE = Path(__file__).with_name("report.html.jinja")


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """p50, p95 and p99 (linear between order statistics), least and largest, and how many there were."""
    if not values:
        return {"n": 0}
    p50, p95, p99 = (float(x) for x in np.percentile(np.asarray(values, float), (50, 95, 99)))
    return {"p50": p50, "p95": p95, "p99": p99, "min": min(values), "max": max(values), "n": len(values)}


def write_lines(path: Path, cases: Sequence[dict[str, Any]]) -> None:
    """Write the cases as JSON lines, all or none.

    Raises:
        InputError: the file cannot be written.
    """
    write_output(path, "".join(json.dumps(case, ensure_ascii=False, allow_nan=False) + "\n" for case in cases))


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Cases written by `write_lines`.

    Raises:
        InputError: not such a file.
    """
    try:
        cases = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
    except (OSError, ValueError) as e:
        raise InputError(f"{path}: not a file of JSON lines ({e}); expected what `edgevl bench --json` wrote") from None
    for case in cases:
        if not isinstance(case, dict) or case.get("schema") != SCHEMA:
            got = case.get("schema") if isinstance(case, dict) else type(case).__name__
            raise InputError(f"{path}: schema {got!r}, this edgevl reads {SCHEMA!r}; measure again")
    return cases


def print_table(cases: Sequence[dict[str, Any]], printer: Printer | None = None) -> None:
    """The tables on stdout; below them what was asked."""
    printer = printer or Printer.for_stdout()
    for table in _tables(cases, tails=False):
        printer.table(table)
    for text, _ in verdicts(_by_loop(cases)[1]):
        printer.line(text)
    for names in (_workloads(cases), _bundles(cases)):
        for name, text in names:
            printer.line(f"{name}: {text}")
    printer.echo()


def _by_loop(cases: Sequence[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The closed cases, and the open ones."""
    return [c for c in cases if c["loop"] == "closed"], [c for c in cases if c["loop"] == "open"]


def _tables(cases: Sequence[dict[str, Any]], tails: bool) -> list[Table]:
    """Those that have something to show. `tails`: of the stages too."""
    closed, opened = _by_loop(cases)
    made = [load_table(opened), wait_table(opened)] if opened else []
    if closed:
        made = [latency_table(closed), stage_table(closed, tails), ceiling_table(closed), *made]
    return [table for table in (*made, machine_table(cases)) if table is not None]


def _workloads(cases: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    """Name -> what it asks, once for each."""
    return list(dict.fromkeys((case["workload"]["name"], case["describe"]) for case in cases))


def _bundles(cases: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    """Name -> precision, engine and weights, once for each."""
    return list(
        dict.fromkeys((c["bundle"], f"{c['precision']}, {c['engine']}, checkpoint: {c['checkpoint']}") for c in cases)
    )


def html_page(cases: Sequence[dict[str, Any]], fidelity: dict[str, Any] | None = None) -> str:
    """One page without references to other files. `fidelity`: bundle name -> KL, for precision against speed."""
    closed, opened = _by_loop(cases)
    plots = closed_plots(closed, fidelity) if closed else []
    if opened:
        plots += open_plots(opened)
    template = jinja2.Environment(autoescape=True).from_string(_PAGE.read_text(encoding="utf-8"))
    return template.render(
        tables=_tables(cases, tails=True), verdicts=verdicts(opened), plots=plots, workloads=_workloads(cases),
        bundles=_bundles(cases), system=cases[0]["system"], measured_on=system_rows(cases[0]["system"]),
        date=cases[0]["date"],
    )  # fmt: skip


def check_libraries(page: bool) -> None:
    """Raises EdgeVLError where the table (or the page) could not be made: better before minutes of measuring."""
    for name in ("rich", *(("matplotlib",) if page else ())):
        library(name)
