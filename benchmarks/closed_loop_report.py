"""The closed-loop cases of a report (stages.py): tables and plots of latency, stages, ceilings, memory and heat."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from edgevl.benchmarks.plotting import (
    COLOURS,
    by_round,
    case_labels,
    case_styles,
    figure,
    legend,
    row_figure,
    svg,
)
from edgevl.benchmarks.report_table import Table, case_table, tail_cell
from edgevl.benchmarks.stages import STAGES

__all__ = ["ceiling_table", "ceiling_texts", "closed_plots", "first_tokens", "latency_table", "stage_table"]

_KINDS = ("vision", "prefill", "decode")
_QUANTILES = (("p50", "-"), ("p95", "--"), ("p99", ":"))
_SHOWN = 400  # points of a case


def first_tokens(request: dict[str, Any]) -> list[float]:
    """Seconds to the first token of every row of a request; lines written before had the first row's alone."""
    found = request["ttft_s"]
    return found if isinstance(found, list) else [found]


# ---------------------------------------------------------------------- tables


def latency_table(cases: Sequence[dict[str, Any]]) -> Table | None:
    columns: dict[str, Callable[[dict[str, Any]], str]] = {
        "cold s": lambda c: f"{statistics.median(c['cold_s']):.2f}",
        "TTFT s": lambda c: tail_cell(c["ttft_s"], 3),
        "ms / token": lambda c: tail_cell(c["tpot_s"], 1, 1e3),
        "tokens / s": lambda c: f"{c['tokens_per_s']['p50']:.1f}" if c["tokens_per_s"]["n"] else "",
        "last token s": lambda c: tail_cell(c["total_s"], 2),
    }
    together = any(case["workload"]["concurrency"] > 1 for case in cases)
    notes = ["TTFT of each of the requests answered together, the last token of the last of them"] if together else []
    return case_table("latency: p50 / p95 / p99", notes, columns, cases)


def stage_table(cases: Sequence[dict[str, Any]], tails: bool) -> Table | None:
    """`tails`: p95 and p99 on a line of their own, below the median."""

    def shown(values: dict[str, float], digits: int) -> str:
        if not values["n"] or not values["max"]:  # a prompt without pictures has no such stage
            return ""
        p50, p95, p99 = (f"{values[p] * 1e3:.{digits}f}" for p in ("p50", "p95", "p99"))
        return f"{p50}\n{p95} / {p99}" if tails else p50

    columns: dict[str, Callable[[dict[str, Any]], str]] = {
        s.removesuffix("_s"): lambda c, s=s: shown(c["stages"][s], 1) for s in STAGES
    }
    columns["detokenize"] = lambda c: shown(c["detokenize_s"], 2)
    title = "stages before the first token, and detokenizing the answer: ms, " + ("p50, p95 / p99" if tails else "p50")
    together = any(case["workload"]["concurrency"] > 1 for case in cases)
    notes = ["of requests answered together: the work for all of them, but one answer detokenized"] if together else []
    return case_table(title, notes, columns, cases)


def ceiling_table(cases: Sequence[dict[str, Any]]) -> Table | None:
    def share(kind: str) -> Callable[[dict[str, Any]], str]:
        return lambda c: "" if c["roofline"].get(kind) is None else f"{100 * c['roofline'][kind]:.0f}"

    def rate(case: dict[str, Any]) -> str:
        found = case["roofline"]
        return "" if found.get("decode") is None else f"{found['decode'] * found['read_gb_s']:.1f}"

    def moved(case: dict[str, Any]) -> str:
        found = case["roofline"].get("decode_bytes")
        return "" if found is None else f"{found / case['workload']['concurrency'] / 1e6:,.1f}"

    columns = {f"{kind} %": share(kind) for kind in _KINDS}
    columns |= {"decode GB/s": rate, "MB read / token": moved}
    return case_table("of what this machine could do at most", ceiling_texts(cases), columns, cases)


def ceiling_texts(cases: Sequence[dict[str, Any]]) -> list[str]:
    """What the shares are shares of, once for each measurement of the machine."""
    texts = [text for case in cases for text in _ceilings(case["roofline"], case["system"].get("threads"))]
    return list(dict.fromkeys(texts))


def _ceilings(roofline: Mapping[str, Any], threads: int | None) -> list[str]:
    rates = roofline["gemm_gop_s"]
    used = roofline.get("kind") or ("int8" if "int8" in rates else "fp32")  # lines written before do not say
    others = ", ".join(f"{name}: {rate:,.0f}" for name, rate in rates.items() if name != used)
    return [
        f"the ceiling of decode: memory is read at {roofline['read_gb_s']:.1f} GB/s by {threads} threads",
        f"the ceiling of vision and prefill: {used} matrix products at {rates[used]:,.0f} GOP/s"
        + (f" ({others})" if others else ""),
        *(f"{what} absent: {why}" for what, why in (roofline.get("absent") or {}).items()),
    ]


# ---------------------------------------------------------------------- plots


def closed_plots(cases: Sequence[dict[str, Any]], fidelity: dict[str, Any] | None) -> list[tuple[str, str, str]]:
    """(title, note, svg) of every plot that has something to show."""
    plots = [
        ("Before the first token", "Where the time of a request goes, median of each stage.", _stage_bars(cases)),
        (
            "Time to first token",
            "Every measured request; pictures differ.",
            _distribution(cases, lambda r: first_tokens(r), 1.0, "s"),
        ),
    ]
    if any(case["tpot_s"]["n"] for case in cases):
        drawn = _distribution(cases, lambda r: r["steps_s"], 1e3, "ms")
        plots.append(("Time per token", "Every step after the first token.", drawn))
    plots.append(("Memory", "Resident memory after every request.", _memory(cases)))
    kinds = [k for k in _KINDS if any(case["roofline"].get(k) is not None for case in cases)]
    if kinds:
        note = "Shares of what was measured here: " + "; ".join(ceiling_texts(cases)) + "."
        plots.append(("Against the machine's ceilings", note, _roofline(cases, kinds)))
    if any(len(case["requests"]) > 1 and case["minutes"] for case in cases):
        panels = [p for p in _SOAK_PANELS if any(_soak_points(c, p[0]) for c in cases)]
        plots.append(("Over time", _soak_note(panels), _soak(cases, panels)))
    if fidelity and any(case["bundle"] in fidelity and case["tokens_per_s"]["n"] for case in cases):
        plots.append(("What precision costs", "KL to the original against speed.", _precision(cases, fidelity)))
    return plots


def _stage_bars(cases: Sequence[dict[str, Any]]) -> str:
    drawn, axes = row_figure(cases, 0.5)
    left, labels = np.zeros(len(cases)), []
    for stage, colour in zip(STAGES, COLOURS):
        width = np.array([case["stages"][stage]["p50"] for case in cases])
        if not width.any():
            continue
        labels.append(stage.removesuffix("_s"))
        axes.barh(range(len(cases)), width, left=left, color=colour, label=labels[-1], height=0.6)
        left += width
    axes.set_xlabel("seconds")
    legend(drawn, labels)
    return svg(drawn)


def _distribution(
    cases: Sequence[dict[str, Any]], values_of: Callable[[dict[str, Any]], list[float]], scale: float, unit: str
) -> str:
    drawn, axes = row_figure(cases, 0.5)
    rng = np.random.default_rng(0)
    named: set[str] = set()
    for i, case in enumerate(cases):
        values = np.array([v for r in case["requests"] for v in values_of(r)])
        if not len(values):
            continue
        shown = values if len(values) <= _SHOWN else rng.choice(values, _SHOWN, replace=False)
        axes.plot(shown * scale, i + rng.uniform(-0.2, 0.2, len(shown)), ".", color=COLOURS[1], alpha=0.5, markersize=4)
        for name, style in _QUANTILES:
            at = float(np.percentile(values, int(name[1:]))) * scale
            label = None if name in named else name
            axes.plot([at, at], [i - 0.35, i + 0.35], style, color=COLOURS[7], label=label)
            named.add(name)
    axes.set_xlim(left=0)
    axes.set_xlabel(unit)
    legend(drawn, sorted(named))
    return svg(drawn)


def _memory(cases: Sequence[dict[str, Any]]) -> str:
    labels = case_labels(cases)
    drawn, axes = figure(labels=labels)
    for case, style, label in zip(cases, case_styles(len(cases)), labels):
        for n, requests in enumerate(by_round(case)):
            seconds, resident = [r["at_s"] + r["total_s"] for r in requests], [r["rss_mb"] for r in requests]
            every = max(1, len(seconds) // 20)
            axes.plot(
                seconds, resident, markersize=4, markevery=every, label=label if n == 0 else None, **style.line
            )  # fmt: skip
        axes.axhline(case["memory_mb"]["peak"], color=style.colour, linestyle=":", linewidth=0.8)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("seconds since the first measured request of each process (dotted: peak)")
    axes.set_ylabel("MB")
    legend(drawn, labels)
    return svg(drawn)


def _roofline(cases: Sequence[dict[str, Any]], kinds: Sequence[str]) -> str:
    drawn, axes = row_figure(cases, 0.6)
    for kind in kinds:
        k = _KINDS.index(kind)
        shares = [100 * (case["roofline"].get(kind) or 0) for case in cases]
        rows = np.arange(len(cases)) + 0.25 * (k - 1)
        axes.barh(rows, shares, height=0.22, color=COLOURS[k], label=kind)
    axes.axvline(100, color="black", linewidth=0.8)
    axes.set_xlabel("% of the ceiling")
    legend(drawn, kinds)
    return svg(drawn)


# Of a request: field, axis.
_SOAK_PANELS = (("ttft_s", "TTFT, s"), ("mhz", "MHz"), ("celsius", "°C"))


def _soak_points(case: dict[str, Any], key: str) -> list[list[tuple[float, float]]]:
    """(minute, value) of each process; nothing where no request has a value."""
    found = []
    for requests in by_round(case):
        values = [(r["at_s"] / 60, first_tokens(r)[0] if key == "ttft_s" else r.get(key)) for r in requests]
        found.append([(at, v) for at, v in values if v is not None])
    return found if any(found) else []


def _soak_note(panels: Sequence[tuple[str, str]]) -> str:
    keys = {key for key, _ in panels}
    absent = [name for key, name in (("mhz", "clock"), ("celsius", "temperature")) if key not in keys]
    note = "Time to first token while the machine heats up"
    return note + (f"; it does not tell its {' or '.join(absent)}." if absent else ", its clock and its temperature.")


def _soak(cases: Sequence[dict[str, Any]], panels: Sequence[tuple[str, str]]) -> str:
    labels = case_labels(cases)
    drawn, every = figure(1.6 + 1.6 * len(panels), labels, panels=len(panels))
    for axes, (key, name) in zip(np.atleast_1d(every), panels):
        for case, style, label in zip(cases, case_styles(len(cases)), labels):
            for n, points in enumerate(_soak_points(case, key)):
                # The figure has one legend: the first panel's, which all cases are in.
                named = label if n == 0 and key == "ttft_s" else None
                step = max(1, len(points) // 12)
                axes.plot(*zip(*points), linewidth=0.8, markersize=4, markevery=step, label=named, **style.line)
        if key == "ttft_s":  # the others have no meaningful zero
            axes.set_ylim(bottom=0)
        axes.set_ylabel(name)
    np.atleast_1d(every)[-1].set_xlabel("minutes")
    legend(drawn, labels)
    return svg(drawn)


def _precision(cases: Sequence[dict[str, Any]], fidelity: dict[str, Any]) -> str:
    shown = [c for c in cases if c["bundle"] in fidelity and c["tokens_per_s"]["n"]]
    labels = case_labels(shown)
    drawn, axes = figure(labels=labels)
    for case, style, label in zip(shown, case_styles(len(shown)), labels):
        rate = case["tokens_per_s"]["p50"]
        axes.plot(rate, fidelity[case["bundle"]], linestyle="", markersize=7, label=label, **style.line)
    axes.set_xlabel("tokens per second")
    axes.set_ylabel("KL to the original")
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    legend(drawn, labels)
    return svg(drawn)
