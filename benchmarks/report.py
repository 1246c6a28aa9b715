"""The results of `edgevl bench`: one JSON line per case, a table, and a self-contained HTML page with plots.

JSON lines, schema `edgevl.bench/2`. One object per bundle and workload:

    schema, date, system      what it was measured on (see system_info.py)
    bundle, precision, checkpoint   the bundle's folder name, its precision, what its weights are (as the caller says)
    loop                      "closed" (a request begins when the one before has ended) or "open" (requests arrive)
    engine, workload, seed    engine name; the fields of Workload
    cold_s, open_s            per round: process start to first token, and opening the bundle
    ttft_s, tpot_s, total_s   {"p50", "p95", "p99", "min", "max", "n"} over all requests
    memory_mb                 {"peak", "after_open"}: the process's own, largest over rounds
    energy                    {"j_per_request", "sources", "absent"}; in an open loop idle seconds count
    throttled                 how often the processor throttled while measuring, null where it does not count
    requests                  every request as it was measured

only of a closed loop (stages.py), where tpot_s is over all steps:

    tokens_per_s, detokenize_s, stages.<name>   as ttft_s
    minutes                   of a soak, or 0
    energy                    {"j_before_first_token", "j_per_token"} too
    roofline                  {"read_gb_s", "gemm_gop_s", "decode", "prefill", "vision"}: ceilings and shares reached

only of an open loop (open_loop.py), where ttft_s and total_s count from when a request was due, and tpot_s is the mean
gap between the tokens of a request, over requests:

    queue_s                   as ttft_s: from when a request was due until the worker took it
    load                      the fields of Load (rates, busy share, overloaded, ...) and "verdict", the same in words

Schema 1 had closed loops only, and no "loop".
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import jinja2
import numpy as np

from edgevl.benchmarks.open_loop_report import LOAD, SPANS, load_row, open_plots, print_open_tables, tail_cell
from edgevl.benchmarks.plotting import COLOURS, by_round, case_names, cell, colour_cycle, figure, library, svg, table
from edgevl.benchmarks.stages import STAGES
from edgevl.runtime.errors import InputError
from edgevl.runtime.output_file import write_output

__all__ = ["SCHEMA", "check_libraries", "html_page", "percentiles", "print_table", "read_lines", "write_lines"]

SCHEMA = "edgevl.bench/2"
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
    write_output(path, "".join(json.dumps(case, ensure_ascii=False) + "\n" for case in cases))


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Cases written by `write_lines`.

    Raises:
        InputError: not such a file.
    """
    try:
        cases = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]
    except (OSError, ValueError) as e:
        raise InputError(f"{path}: not a file of JSON lines ({e}); expected what `edgevl bench --json` wrote") from None
    for case in cases:
        if not isinstance(case, dict) or case.get("schema") != SCHEMA:
            got = case.get("schema") if isinstance(case, dict) else type(case).__name__
            raise InputError(f"{path}: schema {got!r}, this edgevl reads {SCHEMA!r}; measure again")
    return cases


def print_table(cases: Sequence[dict[str, Any]]) -> None:
    """Two tables on stdout for closed loops (latency and memory; the stages), two for open ones; below them what was
    asked."""
    console = library("rich.console").Console(highlight=False)
    if not console.is_terminal:  # 80 columns would cut every header
        console.width = 120
    closed, opened = _by_loop(cases)
    with console.capture() as captured:  # click's echo writes to a stream of any encoding, rich's own fails
        if closed:
            _print_closed_tables(closed, console)
        if opened:
            print_open_tables(opened, console)
        for text in dict.fromkeys(f"{c['workload']['name']}: {c['describe']}" for c in cases):
            console.print(text)
        for text in dict.fromkeys(f"{c['bundle']}: {c['precision']}, {c['engine']}" for c in cases):
            console.print(text)
    click.echo(captured.get(), nl=False)


def _by_loop(cases: Sequence[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The closed cases, and the open ones."""
    return [c for c in cases if c["loop"] == "closed"], [c for c in cases if c["loop"] == "open"]


def _print_closed_tables(cases: Sequence[dict[str, Any]], console: Any) -> None:
    latency = table("latency: p50 (p95)", ("cold s", "TTFT s", "ms / token", "tokens / s", "peak MB", "J / token"))
    for case in cases:
        latency.add_row(
            case["bundle"],
            case["workload"]["name"],
            f"{statistics.median(case['cold_s']):.2f}",
            cell(case["ttft_s"], 3),
            cell(case["tpot_s"], 1, 1e3),
            f"{case['tokens_per_s']['p50']:.1f}" if case["tokens_per_s"]["n"] else "",
            f"{case['memory_mb']['peak']:,.0f}",
            "no sensor" if case["energy"]["j_per_token"] is None else f"{case['energy']['j_per_token']:.2f}",
        )
    kinds = ("vision", "prefill", "decode")
    names = (*(s.removesuffix("_s") for s in STAGES), *(f"{k} %" for k in kinds))
    stages = table("stages before the first token: ms, p50; and % of what the machine could do at most", names)
    for case in cases:
        times = [f"{case['stages'][s]['p50'] * 1e3:.1f}" for s in STAGES]
        shares = [case["roofline"].get(k) for k in kinds]
        shown = ["" if x is None else f"{100 * x:.0f}" for x in shares]
        stages.add_row(case["bundle"], case["workload"]["name"], *times, *shown)
    console.print(latency)
    console.print(stages)


# ---------------------------------------------------------------------- the page


def html_page(cases: Sequence[dict[str, Any]], fidelity: dict[str, Any] | None = None) -> str:
    """One page without references to other files. `fidelity`: bundle name -> KL, for precision against speed."""
    closed, opened = _by_loop(cases)
    plots = _closed_plots(closed, fidelity) if closed else []
    if opened:
        plots += open_plots(opened)
    template = jinja2.Environment(autoescape=True).from_string(_PAGE.read_text(encoding="utf-8"))
    return template.render(
        closed=closed, opened=opened, plots=plots, system=cases[0]["system"], date=cases[0]["date"],
        absent=cases[0]["energy"]["absent"], cell=cell, median=statistics.median,
        spans=SPANS, load_columns=LOAD, load_row=load_row, tail_cell=tail_cell,
    )  # fmt: skip


def _closed_plots(cases: Sequence[dict[str, Any]], fidelity: dict[str, Any] | None) -> list[tuple[str, str, str]]:
    """(title, note, svg) of every plot."""
    plots = [("Before the first token", "Where the time of a request goes, median of each stage.", _stage_bars(cases))]
    plots.append(
        ("Time to first token", "Every measured request; pictures differ.", _distribution(cases, "ttft_s", 1.0, "s"))
    )
    plots.append(("Time per token", "Every step after the first token.", _distribution(cases, "steps_s", 1e3, "ms")))
    plots.append(("Memory", "Resident memory after every request.", _memory(cases)))
    if any(case["roofline"].get("decode") is not None for case in cases):
        plots.append(
            (
                "Against the machine's ceilings",
                "Share of measured bandwidth (decode) and int8 GEMM rate.",
                _roofline(cases),
            )
        )
    if any(len(case["requests"]) > 1 and case["minutes"] for case in cases):
        plots.append(("Over time", "Time to first token while the machine heats up.", _soak(cases)))
    if fidelity:
        plots.append(("What precision costs", "KL to the original against speed.", _precision(cases, fidelity)))
    return plots


def _stage_bars(cases: Sequence[dict[str, Any]]) -> str:
    drawn, axes = figure(1.0 + 0.5 * len(cases))
    left = np.zeros(len(cases))
    for stage, colour in zip(STAGES, COLOURS):
        width = np.array([case["stages"][stage]["p50"] for case in cases])
        axes.barh(range(len(cases)), width, left=left, color=colour, label=stage.removesuffix("_s"), height=0.6)
        left += width
    axes.set_yticks(range(len(cases)), case_names(cases))
    axes.invert_yaxis()
    axes.set_xlabel("seconds")
    drawn.legend(ncols=len(STAGES), loc="outside upper center", frameon=False)
    return svg(drawn)


def _distribution(cases: Sequence[dict[str, Any]], key: str, scale: float, unit: str) -> str:
    drawn, axes = figure(1.0 + 0.5 * len(cases))
    rng = np.random.default_rng(0)
    for i, case in enumerate(cases):
        if key == "steps_s":
            values = np.array([s for r in case["requests"] for s in r["steps_s"]])
        else:
            values = np.array([r[key] for r in case["requests"]])
        if not len(values):
            continue
        shown = values if len(values) <= 400 else rng.choice(values, 400, replace=False)
        axes.plot(shown * scale, i + rng.uniform(-0.2, 0.2, len(shown)), ".", color=COLOURS[1], alpha=0.5, markersize=4)
        for q, style in ((50, "-"), (95, "--"), (99, ":")):
            at = float(np.percentile(values, q)) * scale
            axes.plot([at, at], [i - 0.35, i + 0.35], style, color=COLOURS[7], label=f"p{q}" if i == 0 else None)
    axes.set_yticks(range(len(cases)), case_names(cases))
    axes.set_ylim(len(cases) - 0.5, -0.5)
    axes.set_xlim(left=0)
    axes.set_xlabel(unit)
    drawn.legend(ncols=3, loc="outside upper center", frameon=False)
    return svg(drawn)


def _memory(cases: Sequence[dict[str, Any]]) -> str:
    drawn, axes = figure()
    for case, colour, name in zip(cases, colour_cycle(len(cases)), case_names(cases)):
        for n, requests in enumerate(by_round(case)):
            seconds, resident = [r["at_s"] + r["total_s"] for r in requests], [r["rss_mb"] for r in requests]
            label = name.replace("\n", ", ") if n == 0 else None
            axes.plot(seconds, resident, "o-", markersize=3, color=colour, label=label)
        axes.axhline(case["memory_mb"]["peak"], color=colour, linestyle=":", linewidth=0.8)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("seconds since the first measured request of each process (dotted: peak)")
    axes.set_ylabel("MB")
    drawn.legend(ncols=2, loc="outside upper center", frameon=False)
    return svg(drawn)


def _roofline(cases: Sequence[dict[str, Any]]) -> str:
    drawn, axes = figure(1.0 + 0.6 * len(cases))
    kinds = ("vision", "prefill", "decode")
    for k, (kind, colour) in enumerate(zip(kinds, COLOURS)):
        shares = [100 * (case["roofline"].get(kind) or 0) for case in cases]
        axes.barh(np.arange(len(cases)) + 0.25 * (k - 1), shares, height=0.22, color=colour, label=kind)
    axes.axvline(100, color="black", linewidth=0.8)
    axes.set_yticks(range(len(cases)), case_names(cases))
    axes.invert_yaxis()
    axes.set_xlabel("% of the ceiling")
    drawn.legend(ncols=3, loc="outside upper center", frameon=False)
    return svg(drawn)


def _soak(cases: Sequence[dict[str, Any]]) -> str:
    drawn, axes = figure()
    for case, colour, name in zip(cases, colour_cycle(len(cases)), case_names(cases)):
        for n, requests in enumerate(by_round(case)):
            label = name.replace("\n", ", ") if n == 0 else None
            axes.plot([r["at_s"] / 60 for r in requests], [r["ttft_s"] for r in requests], color=colour, label=label)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("minutes")
    axes.set_ylabel("TTFT, s")
    hot = [(r["at_s"] / 60, r["celsius"]) for r in by_round(cases[0])[0] if r["celsius"] is not None]
    if hot:
        other = axes.twinx()
        other.plot(*zip(*hot), color=COLOURS[7], linewidth=0.8)
        other.set_ylabel("°C", color=COLOURS[7])
    drawn.legend(ncols=2, loc="outside upper center", frameon=False)
    return svg(drawn)


def _precision(cases: Sequence[dict[str, Any]], fidelity: dict[str, Any]) -> str:
    drawn, axes = figure()
    for case, colour in zip(cases, colour_cycle(len(cases))):
        if case["bundle"] in fidelity and case["tokens_per_s"]["n"]:
            kl = fidelity[case["bundle"]]
            axes.plot(case["tokens_per_s"]["p50"], kl, "o", color=colour)
            axes.annotate(case["bundle"], (case["tokens_per_s"]["p50"], kl), xytext=(6, 4), textcoords="offset points")
    axes.set_xlabel("tokens per second")
    axes.set_ylabel("KL to the original")
    axes.set_ylim(bottom=0)
    return svg(drawn)


def check_libraries(page: bool) -> None:
    """Raises EdgeVLError where the table (or the page) could not be made: better before minutes of measuring."""
    for name in ("rich", *(("matplotlib",) if page else ())):
        library(name)
