"""Tables and the plot of a run beside the peers."""

from __future__ import annotations

import importlib
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tabulate import tabulate

from edgevl.benchmarks.peers.contract import Measured

__all__ = ["Row", "plot", "ratios", "spread", "tables"]

# field of Measured: header, and whether more is better
METRICS = {
    "vision_s": ("vision s", False),
    "prefill_s": ("prefill s", False),
    "ttft_s": ("TTFT s", False),
    "decode_tokens_per_s": ("decode tok/s", True),
    "total_tokens_per_s": ("all in all tok/s", True),
    "peak_mb": ("peak MB", False),
}
_TOKENS = 0.03  # prompts whose lengths differ by more are told of
_OURS, _THEIRS = "#1b4f72", "#b9b3a7"


@dataclass(frozen=True)
class Row:
    """What one process measured in round `round` of a workload."""

    workload: str
    round: int
    measured: Measured


def spread(values: Sequence[float]) -> str:
    """median (least–most), or nothing where there is nothing."""
    if not values:
        return ""
    middle = statistics.median(values)
    digits = 0 if middle > 100 else 2 if middle < 10 else 1
    return f"{middle:.{digits}f} ({min(values):.{digits}f}–{max(values):.{digits}f})"


def _values(measured: Measured, metric: str) -> list[float]:
    found = getattr(measured, metric)
    return ([found] if found else []) if metric == "peak_mb" else list(found)


def _pooled(rows: Sequence[Row], workload: str, contender: str, metric: str) -> list[float]:
    chosen = [r.measured for r in rows if (r.workload, r.measured.contender) == (workload, contender)]
    return [v for m in chosen if not m.unsupported for v in _values(m, metric)]


def ratios(rows: Sequence[Row], workload: str, contender: str, baseline: str, metric: str) -> list[float]:
    """`contender`'s median over the baseline's, one ratio per round in which both have one. Of nothing, as of the time
    for no picture, there is no ratio."""
    by_round: dict[int, dict[str, float]] = {}
    for r in rows:
        if r.workload == workload and r.measured.contender in (contender, baseline) and not r.measured.unsupported:
            values = _values(r.measured, metric)
            if values:
                by_round.setdefault(r.round, {})[r.measured.contender] = statistics.median(values)
    pairs = [(f[contender], f[baseline]) for f in by_round.values() if {contender, baseline} <= set(f)]
    return [theirs / ours for theirs, ours in pairs if ours > 0]


def tables(rows: Sequence[Row], head: dict[str, Any], contenders: Sequence[str]) -> str:
    """Markdown: for every workload the figures, the ratios to the first contender, and what could not be done."""
    parts = [_head(rows, head, contenders)]
    for name, description in head["workloads"].items():
        there = _asked(rows, name, contenders)
        rounds = len({r.round for r in rows if r.workload == name})
        title = f"### {name}: {description}; {rounds} rounds of {head['repeats']} requests"
        parts += [title, _figures(rows, name, there), _ratios(rows, name, there)]
        parts += _remarks(rows, name, there)
    return "\n\n".join(p for p in parts if p)


def _asked(rows: Sequence[Row], workload: str, contenders: Sequence[str]) -> list[str]:
    there = {r.measured.contender for r in rows if r.workload == workload}
    return [c for c in contenders if c in there]


def _head(rows: Sequence[Row], head: dict[str, Any], contenders: Sequence[str]) -> str:
    versions = {c: next((r.measured.versions for r in rows if r.measured.contender == c), {}) for c in contenders}
    said = sorted({f"{package} {version}" for v in versions.values() for package, version in v.items()})
    return (
        f"{head['date']}, {head['processor']} ({', '.join(head['flags'])}), {head['threads']} threads, checkpoint "
        f"{head['checkpoint']}; median (min–max).\n{', '.join(said)}."
        + "".join(f"\n- {name}: {kind}" for name, kind in head.get("contenders", {}).items())
    )


def _table(rows: list[list[str]], headers: list[str]) -> str:
    """Columns that nobody filled are left out."""
    keep = [i for i in range(len(headers)) if i == 0 or any(row[i] for row in rows)]
    cells = [[row[i] for i in keep] for row in rows]
    return tabulate(cells, [headers[i] for i in keep], tablefmt="github", disable_numparse=True)


def _figures(rows: Sequence[Row], workload: str, contenders: Sequence[str]) -> str:
    headers = ["", *(title for title, _ in METRICS.values())]
    return _table([[c, *(spread(_pooled(rows, workload, c, m)) for m in METRICS)] for c in contenders], headers)


def _ratios(rows: Sequence[Row], workload: str, contenders: Sequence[str]) -> str:
    headers = [f"ratio to {contenders[0]}", *(title.rsplit(" ", 1)[0] for title, _ in METRICS.values())]
    cells = [[c, *(spread(ratios(rows, workload, c, contenders[0], m)) for m in METRICS)] for c in contenders[1:]]
    return _table(cells, headers) if cells else ""


def _remarks(rows: Sequence[Row], workload: str, contenders: Sequence[str]) -> list[str]:
    """Who could not, and whose prompts were longer or shorter than ours."""
    said = []
    reference = _pooled(rows, workload, contenders[0], "prompt_tokens")
    for c in contenders:
        reasons = {r.measured.unsupported for r in rows if (r.workload, r.measured.contender) == (workload, c)} - {""}
        said += [f"{c}: {reason}" for reason in sorted(reasons)]
        tokens = _pooled(rows, workload, c, "prompt_tokens")
        if tokens and reference:
            mine, theirs = statistics.median(reference), statistics.median(tokens)
            if abs(theirs / mine - 1) > _TOKENS:
                said.append(f"{c}: its prompts had {theirs:.0f} tokens, ours {mine:.0f}")
    return ["\n".join(f"- {line}" for line in said)] if said else []


def plot(rows: Sequence[Row], head: dict[str, Any], contenders: Sequence[str], path: Path) -> None:
    """Bars of medians with whiskers from least to most: a line of panels per workload, ours darker.

    Raises:
        ImportError: matplotlib is not installed.
    """
    pyplot = importlib.import_module("matplotlib.figure")
    shown = ("ttft_s", "decode_tokens_per_s", "total_tokens_per_s", "peak_mb")
    works = list(head["workloads"])
    heights = [1.1 + 0.24 * len(_asked(rows, w, contenders)) for w in works]
    figure = pyplot.Figure(figsize=(15, sum(heights)), layout="constrained")
    axes = figure.subplots(len(works), len(shown), squeeze=False, height_ratios=heights)
    for line, work in zip(axes, works):
        for axis, metric in zip(line, shown):
            _bars(axis, {c: _pooled(rows, work, c, metric) for c in _asked(rows, work, contenders)})
            title, more = METRICS[metric]
            axis.set_title(f"{work}: {title} ({'more' if more else 'less'} is better)", fontsize=9)
            if axis is not line[0]:
                axis.set_yticklabels([])
    caption = f"Qwen2-VL, {head['checkpoint']}; {head['processor']}, {head['threads']} threads, {head['date']}"
    figure.suptitle(caption, fontsize=10)
    partial = path.with_name(f".{path.name}")
    figure.savefig(partial, dpi=110, format="png")
    partial.replace(path)


def _bars(axis: Any, values: dict[str, list[float]]) -> None:
    names = list(values)
    middles = [statistics.median(v) if v else 0.0 for v in values.values()]
    low = [m - min(v) if v else 0.0 for m, v in zip(middles, values.values())]
    high = [max(v) - m if v else 0.0 for m, v in zip(middles, values.values())]
    colours = [_OURS if n.startswith("edgevl ") else _THEIRS for n in names]
    axis.barh(range(len(names)), middles, xerr=[low, high], color=colours, ecolor="#555555", capsize=2)
    for i, (name, middle) in enumerate(zip(names, middles)):
        digits = 0 if middle >= 100 else 1 if middle >= 1 else 2
        text = f" {middle:.{digits}f}" if values[name] else " –"
        axis.text(middle + high[i], i, text, va="center", fontsize=7)
    axis.set_yticks(range(len(names)), names, fontsize=8)
    axis.invert_yaxis()
    axis.margins(x=0.15)
    axis.tick_params(axis="x", labelsize=7)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
