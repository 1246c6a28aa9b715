"""The plot of a run beside the peers."""

from __future__ import annotations

import importlib
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edgevl.benchmarks.peers.table import METRICS, Row, asked, pooled, ratios
from edgevl.runtime.output_file import replacing

__all__ = ["plot"]

_OURS, _THEIRS = "#1b4f72", "#b9b3a7"
_COLUMNS = 4  # panels beside each other; the ratios take what the metrics leave of the last line
# marker and colour of a metric's ratios, told apart by both
_MARKS = {
    "vision_s": ("o", "#1b4f72"),
    "prefill_s": ("s", "#b9770e"),
    "ttft_s": ("D", "#7d3c98"),
    "decode_tokens_per_s": ("^", "#27ae60"),
    "total_tokens_per_s": ("v", "#2e86c1"),
    "peak_mb": ("X", "#c0392b"),
}


def plot(rows: Sequence[Row], head: dict[str, Any], contenders: Sequence[str], path: Path) -> None:
    """For every workload a panel per metric (bars of medians with whiskers from least to most, ours darker) and one of
    the ratios to the first contender.

    Raises:
        ImportError: matplotlib is not installed.
        InputError: the file cannot be written.
    """
    works = {name: there for name in head["workloads"] if (there := asked(rows, name, contenders))}
    lines = -(-(len(METRICS) + 1) // _COLUMNS)
    heights = [0.9 + 0.24 * len(there) for there in works.values() for _ in range(lines)]
    figure = importlib.import_module("matplotlib.figure").Figure(figsize=(15, 0.6 + sum(heights)), layout="constrained")
    grid = figure.add_gridspec(len(heights), _COLUMNS, height_ratios=heights)
    for number, (work, there) in enumerate(works.items()):
        for i, (metric, (title, more)) in enumerate(METRICS.items()):
            axis = figure.add_subplot(grid[number * lines + i // _COLUMNS, i % _COLUMNS])
            _bars(axis, {c: pooled(rows, work, c, metric) for c in there})
            _label(axis, f"{work}: {title} ({'more' if more else 'less'} is better)", there, i % _COLUMNS == 0)
        last = number * lines + lines - 1
        axis = figure.add_subplot(grid[last, len(METRICS) % _COLUMNS :])
        _ratios(axis, rows, work, there)
        _label(axis, f"{work}: ratio to {there[0]}", there, False)
    caption = f"Qwen2-VL, {head['checkpoint']}; {head['processor']}, {head['threads']} threads, {head['date']}"
    figure.suptitle(caption, fontsize=10)
    with replacing(path) as partial:
        figure.savefig(partial, dpi=110, format="png")


def _bars(axis: Any, values: dict[str, list[float]]) -> None:
    if not any(values.values()):  # stages of several requests at once, or of no picture
        axis.set_xticks([])
        axis.text(0.5, 0.5, "no figures", transform=axis.transAxes, ha="center", va="center", fontsize=8)
        return
    for i, (name, found) in enumerate(values.items()):
        if not found:
            axis.text(0, i, " –", va="center", fontsize=7)
            continue
        middle, most = statistics.median(found), max(found)
        colour = _OURS if name.startswith("edgevl ") else _THEIRS
        whiskers = [[middle - min(found)], [most - middle]]
        axis.barh(i, middle, xerr=whiskers, color=colour, ecolor="#555555", capsize=2)
        digits = 0 if middle >= 100 else 1 if middle >= 1 else 2
        axis.text(most, i, f" {middle:.{digits}f}", va="center", fontsize=7)
    axis.margins(x=0.15)


def _ratios(axis: Any, rows: Sequence[Row], work: str, there: Sequence[str]) -> None:
    """A mark per metric: the median of the ratios of the rounds, on a logarithmic scale about 1."""
    axis.axvline(1, color="#555555", linewidth=0.8)
    for metric, (title, more) in METRICS.items():
        found = [(i, ratios(rows, work, c, there[0], metric)) for i, c in enumerate(there) if i]
        points = [(statistics.median(values), i) for i, values in found if values]
        if points:
            mark, colour = _MARKS[metric]
            name = f"{title.rsplit(' ', 1)[0]} ({'more' if more else 'less'} is better)"
            axis.plot(*zip(*points), mark, color=colour, markersize=5, alpha=0.85, label=name, linestyle="none")
    axis.set_xscale("log")
    axis.xaxis.set_major_locator(importlib.import_module("matplotlib.ticker").LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_major_formatter("{x:g}")
    axis.xaxis.set_minor_locator(importlib.import_module("matplotlib.ticker").NullLocator())
    axis.grid(color="#dddddd", linewidth=0.5)
    if len(axis.lines) > 1:
        axis.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=7, frameon=False)


def _label(axis: Any, title: str, names: Sequence[str], named: bool) -> None:
    axis.set_title(title, fontsize=9)
    axis.set_yticks(range(len(names)), names if named else [""] * len(names), fontsize=8)
    axis.set_ylim(len(names) - 0.5, -0.5)  # the first on top
    axis.tick_params(axis="x", labelsize=7)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
