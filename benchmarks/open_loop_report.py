"""The open-loop cases of a report (open_loop.py): tables and plots of load, queueing and latency."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from edgevl.benchmarks.plotting import COLOURS, by_round, case_names, colour_cycle, figure, rate_text, svg, table

__all__ = ["LOAD", "SPANS", "load_row", "open_plots", "print_open_tables", "tail_cell"]

# Of a request, all from when it was due: field, what it reaches to, colour.
SPANS = (
    ("queue_s", "waiting", COLOURS[2]),
    ("ttft_s", "first token", COLOURS[1]),
    ("total_s", "last token", COLOURS[0]),
)
LOAD = ("offered /s", "served /s", "tokens / s", "batch", "busy %", "in queue", "peak MB")


def tail_cell(values: dict[str, float]) -> str:
    return " / ".join(f"{values[p]:.2f}" for p in ("p50", "p95", "p99"))


def load_row(case: dict[str, Any]) -> tuple[str, ...]:
    """What the columns `LOAD` show of a case."""
    load = case["load"]
    return (
        rate_text(load["offered_per_s"]),
        rate_text(load["served_per_s"]),
        f"{load['tokens_per_s']:.1f}",
        f"{load['batch_size']:.1f}",
        f"{100 * load['busy']:.0f}",
        f"{load['waiting']:.1f}",
        f"{case['memory_mb']['peak']:,.0f}",
    )


def print_open_tables(cases: Sequence[dict[str, Any]], console: Any) -> None:
    """Load and latency, and in words whether the machine kept up."""
    loads = table("open loop: requests that came and were served", LOAD)
    latency = table("seconds from when a request was due: p50 / p95 / p99", ("waiting", "first token", "last token"))
    for case in cases:
        head = (case["bundle"], case["workload"]["name"])
        loads.add_row(*head, *load_row(case))
        latency.add_row(*head, *(tail_cell(case[key]) for key, _, _ in SPANS))
    console.print(loads)
    console.print(latency)
    for case in cases:
        console.print(f"{case['bundle']}, {case['workload']['name']}: {case['load']['verdict']}", soft_wrap=True)


def open_plots(cases: Sequence[dict[str, Any]]) -> list[tuple[str, str, str]]:
    """(title, note, svg) of every plot."""
    plots = [
        (
            "Open loop: latency",
            "Every request, from when it was due; lines are p50, p95 (dashed) and p99 (dotted).",
            _latency(cases),
        ),
        (
            "Open loop: the queue",
            "How long every request waited for the worker. A machine that keeps up comes back to zero; under more "
            "than it serves the wait grows for as long as requests come.",
            _queue(cases),
        ),
    ]
    if len({case["load"]["offered_per_s"] for case in cases}) > 1:
        note = "Time to first token against the rate of arrivals: p50, and p95 (dashed). Hollow: overloaded."
        plots.append(("Open loop: load and latency", note, _curve(cases)))
    return plots


def _latency(cases: Sequence[dict[str, Any]]) -> str:
    drawn, axes = figure(1.0 + 0.8 * len(cases))
    rng = np.random.default_rng(0)
    for i, case in enumerate(cases):
        for k, (key, label, colour) in enumerate(SPANS):
            values, at = np.array([r[key] for r in case["requests"]]), i + 0.27 * (k - 1)
            shown = values if len(values) <= 400 else rng.choice(values, 400, replace=False)
            spread = at + rng.uniform(-0.09, 0.09, len(shown))
            name = label if i == 0 else None
            axes.plot(shown, spread, ".", color=colour, alpha=0.6, markersize=4, label=name)
            for p, style in (("p50", "-"), ("p95", "--"), ("p99", ":")):
                axes.plot([case[key][p]] * 2, [at - 0.13, at + 0.13], style, color=COLOURS[7])
    axes.set_yticks(range(len(cases)), case_names(cases))
    axes.set_ylim(len(cases) - 0.5, -0.5)
    axes.set_xlim(left=0)
    axes.set_xlabel("seconds")
    drawn.legend(ncols=len(SPANS), loc="outside upper center", frameon=False)
    return svg(drawn)


def _queue(cases: Sequence[dict[str, Any]]) -> str:
    drawn, axes = figure()
    for case, colour, name in zip(cases, colour_cycle(len(cases)), case_names(cases)):
        for n, requests in enumerate(by_round(case)):
            label = name.replace("\n", ", ") if n == 0 else None
            waited = [r["queue_s"] for r in requests]
            axes.plot(range(1, len(waited) + 1), waited, "o-", markersize=2.5, linewidth=0.8, color=colour, label=label)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("request of each process, in the order of arrival")
    axes.set_ylabel("waited, s")
    drawn.legend(ncols=2, loc="outside upper center", frameon=False)
    return svg(drawn)


def _curve(cases: Sequence[dict[str, Any]]) -> str:
    drawn, axes = figure()
    # The rate is the last word of a workload's name, and all that the cases of one line differ in.
    lines: dict[str, list[dict[str, Any]]] = {}
    for case in sorted(cases, key=lambda c: c["load"]["offered_per_s"]):
        base = case["workload"]["name"].rpartition(" ")[0]
        lines.setdefault(f"{case['bundle']}, {base}", []).append(case)
    for (name, line), colour in zip(lines.items(), colour_cycle(len(lines))):
        rates = [case["load"]["offered_per_s"] for case in line]
        for p, style in (("p50", "-"), ("p95", "--")):
            values = [case["ttft_s"][p] for case in line]
            axes.plot(rates, values, style, color=colour, label=name if p == "p50" else None)
            for rate, value, case in zip(rates, values, line):
                inside = "white" if case["load"]["overloaded"] else colour
                axes.plot(rate, value, "o", markersize=4, color=colour, markerfacecolor=inside)
    axes.set_ylim(bottom=0)
    axes.set_xlim(left=0)
    axes.set_xlabel("requests per second offered")
    axes.set_ylabel("TTFT, s")
    drawn.legend(ncols=2, loc="outside upper center", frameon=False)
    return svg(drawn)
