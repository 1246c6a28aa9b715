"""The open-loop cases of a report (open_loop.py): tables and plots of load, queueing and latency."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from edgevl.benchmarks.plotting import (
    COLOURS,
    by_round,
    case_labels,
    case_styles,
    figure,
    legend,
    rate_text,
    row_figure,
    svg,
)
from edgevl.benchmarks.report_table import Table, case_table, tail_cell

__all__ = ["load_table", "open_plots", "verdicts", "wait_table"]

# Of a request, all from when it was due: field, what it reaches to, colour.
_SPANS = (
    ("queue_s", "waiting", COLOURS[2]),
    ("ttft_s", "first token", COLOURS[1]),
    ("total_s", "last token", COLOURS[0]),
)


def load_table(cases: Sequence[dict[str, Any]]) -> Table | None:
    columns: dict[str, Callable[[dict[str, Any]], str]] = {
        "offered /s": lambda c: rate_text(c["load"]["offered_per_s"]),
        "served /s": lambda c: rate_text(c["load"]["served_per_s"]),
        "tokens / s": lambda c: f"{c['load']['tokens_per_s']:.1f}",
        "batch": lambda c: f"{c['load']['batch_size']:.1f}",
        "busy %": lambda c: f"{100 * c['load']['busy']:.0f}",
        "in queue": lambda c: f"{c['load']['waiting']:.1f}",
    }
    notes = ["batch: requests answered together, mean; in queue: those that wait, mean over time"]
    return case_table("open loop: requests that came and were served", notes, columns, cases)


def wait_table(cases: Sequence[dict[str, Any]]) -> Table | None:
    columns: dict[str, Callable[[dict[str, Any]], str]] = {
        name: lambda c, key=key: tail_cell(c[key], 2) for key, name, _ in _SPANS
    }
    columns["ms / token"] = lambda c: tail_cell(c["tpot_s"], 1, 1e3)
    return case_table("seconds from when a request was due: p50 / p95 / p99", (), columns, cases)


def verdicts(cases: Sequence[dict[str, Any]]) -> list[tuple[str, bool]]:
    """In words whether the machine kept up with each case, and whether it did not."""
    return [
        (f"{case['bundle']}, {case['workload']['name']}: {case['load']['verdict']}", case["load"]["overloaded"])
        for case in cases
    ]


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
    drawn, axes = row_figure(cases, 0.8)
    rng = np.random.default_rng(0)
    for i, case in enumerate(cases):
        for k, (key, label, colour) in enumerate(_SPANS):
            values, at = np.array([r[key] for r in case["requests"]]), i + 0.27 * (k - 1)
            shown = values if len(values) <= 400 else rng.choice(values, 400, replace=False)
            spread = at + rng.uniform(-0.09, 0.09, len(shown))
            name = label if i == 0 else None
            axes.plot(shown, spread, ".", color=colour, alpha=0.6, markersize=4, label=name)
            for p, style in (("p50", "-"), ("p95", "--"), ("p99", ":")):
                axes.plot([case[key][p]] * 2, [at - 0.13, at + 0.13], style, color=COLOURS[7])
    axes.set_xlim(left=0)
    axes.set_xlabel("seconds")
    legend(drawn, [label for _, label, _ in _SPANS])
    return svg(drawn)


def _queue(cases: Sequence[dict[str, Any]]) -> str:
    labels = case_labels(cases)
    drawn, axes = figure(labels=labels)
    for case, style, label in zip(cases, case_styles(len(cases)), labels):
        for n, requests in enumerate(by_round(case)):
            waited = [r["queue_s"] for r in requests]
            numbers, named = range(1, len(waited) + 1), label if n == 0 else None
            axes.plot(numbers, waited, markersize=3.5, linewidth=0.8, label=named, **style.line)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("request of each process, in the order of arrival")
    axes.set_ylabel("waited, s")
    legend(drawn, labels)
    return svg(drawn)


def _curve(cases: Sequence[dict[str, Any]]) -> str:
    # The rate is the last word of a workload's name, and all that the cases of one line differ in.
    lines: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for case in sorted(cases, key=lambda c: c["load"]["offered_per_s"]):
        lines.setdefault((case["bundle"], case["workload"]["name"].rpartition(" ")[0]), []).append(case)
    labels = case_labels([{"bundle": bundle, "workload": {"name": name}} for bundle, name in lines])
    drawn, axes = figure(labels=labels)
    for label, line, style in zip(labels, lines.values(), case_styles(len(lines))):
        rates = [case["load"]["offered_per_s"] for case in line]
        for p, dash in (("p50", "-"), ("p95", "--")):
            values = [case["ttft_s"][p] for case in line]
            named = label if p == "p50" else None
            axes.plot(rates, values, dash, color=style.colour, marker=style.marker, markersize=5, label=named)
            for rate, value, case in zip(rates, values, line):
                if case["load"]["overloaded"]:
                    hollow = {**style.line, "markerfacecolor": "white"}
                    axes.plot(rate, value, markersize=5, linestyle="", **hollow)
    axes.set_ylim(bottom=0)
    axes.set_xlim(left=0)
    axes.set_xlabel("requests per second offered")
    axes.set_ylabel("TTFT, s")
    legend(drawn, labels)
    return svg(drawn)
