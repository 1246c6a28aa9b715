"""Plots of a fidelity report as SVG texts. Needs matplotlib (the extra `report`), imported when a plot is drawn.

Works on the document (a dictionary as `fidelity.json` holds it), so a report made elsewhere can be drawn here.
"""

from __future__ import annotations

import importlib.util
import io
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from edgevl.runtime.errors import EdgeVLError

__all__ = ["Plot", "check_matplotlib", "draw_plots"]

_KINDS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_OURS, _OTHER, _INK, _FAINT = "#1d5fa8", "#d98324", "#1f2933", "#d5dae0"
_STYLE = {
    "font.family": "DejaVu Sans",  # comes with matplotlib: the same everywhere
    "font.size": 9,
    "axes.edgecolor": "#8a94a0",
    "axes.labelcolor": _INK,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e8ebef",
    "grid.linewidth": 0.8,
    "xtick.color": "#5b6672",
    "ytick.color": "#5b6672",
    "text.color": _INK,
    "legend.frameon": False,
    "svg.fonttype": "path",
}


@dataclass(frozen=True)
class Plot:
    """title, what one sees (a sentence or two), and the drawing."""

    title: str
    caption: str
    svg: str


def check_matplotlib() -> None:
    """Raises EdgeVLError where matplotlib is missing: asked before hours are spent."""
    if importlib.util.find_spec("matplotlib") is None:
        raise EdgeVLError("--report needs the package 'matplotlib', not installed here; pip install 'edgevl[report]'")


def draw_plots(data: dict[str, Any]) -> list[Plot]:
    """All plots that the document has numbers for, most important first."""
    check_matplotlib()
    import matplotlib
    from matplotlib.figure import Figure

    plots: list[Plot] = []

    def add(title: str, caption: str, figure: Figure | None) -> None:
        if figure is None:
            return
        buffer = io.StringIO()
        # without a date and with ids of its own: the same report gives the same page
        with matplotlib.rc_context({"svg.hashsalt": title}):
            figure.savefig(buffer, format="svg", metadata={"Date": None}, bbox_inches="tight", pad_inches=0.06)
        plots.append(Plot(title, caption, _inline(buffer.getvalue())))

    with matplotlib.rc_context(_STYLE):
        add(
            "Task scores before and after",
            "Share of right answers with its 95 % interval; both bundles in the real runtime, the same cases.",
            _scores(data["scores"]),
        )
        add(
            "Divergence of each held-out conversation",
            "Mean KL(original || quantized) of a conversation's words from its first picture on, least first; dashed: "
            "the mean over positions, shaded: its 95 % interval.",
            _conversations(data["divergence"]),
        )
        add(
            "Output error of every linear layer",
            "Squared error of a layer's output as a share of the squared output, on held-out inputs. Small errors of "
            "ordinary tokens need not mean a good model: the divergence decides.",
            _errors(data["layers"]),
        )
        add("Bits of every linear layer", "As stored, without scales.", _bits(data["layers"]))
        add(
            "Hidden states after each decoder layer",
            "How far the quantized model has moved from the original: mean over tokens of the squared difference, as a "
            "share of the squared size.",
            _hidden(data["hidden_errors"]),
        )
        for granularity, title in (
            ("layer", "Sensitivity of each decoder layer"),
            ("kind", "Sensitivity by kind of linear layer"),
            ("group", "Sensitivity of layers over one input"),
            ("linear", "Sensitivity of every linear layer"),
        ):
            rows = [s for s in data["sensitivities"] if s["granularity"] == granularity]
            draw = _sensitivity_map if granularity in ("group", "linear") else _sensitivity_bars
            caption = "KL to the original when only this part is quantized, all else as it was."
            add(title, caption, draw(rows) if rows else None)
    return plots


def _inline(svg: str) -> str:
    """Without the XML prologue."""
    return svg[svg.index("<svg") :]


def _figure(width: float, height: float, *args: int, **options: Any) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(*args, **options)


def _layer_of(name: str) -> int:
    return int(name.split("layers.", 1)[1].split(".", 1)[0])


def _whole_ticks(axis: Any) -> None:
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(integer=True, nbins=8))


# ---------------------------------------------------------------------- the plots


def _errors(layers: Sequence[dict[str, Any]]) -> Any:
    """One panel per kind: the method against rounding to nearest, over depth."""
    if not any(row["error"] for row in layers):
        return None
    figure, axes = _figure(9.6, 4.3, 2, 4, sharex=True, sharey=True)
    panels = list(axes.flat)
    for axis, kind in zip(panels, _KINDS):
        for key, color, label, marker in (
            ("rtn_error", _OTHER, "rounded to nearest", "s"),
            ("error", _OURS, "as quantized", "o"),
        ):
            points = [(_layer_of(r["name"]), r[key]) for r in layers if r["name"].endswith(kind) and r[key]]
            if points:
                x, y = zip(*points)
                axis.plot(x, y, marker=marker, ms=3.5, lw=1.3, color=color, label=label)
        axis.set_yscale("log")
        axis.set_title(kind)
        _whole_ticks(axis.xaxis)
    handles, labels = max((axis.get_legend_handles_labels() for axis in panels), key=lambda h: len(h[0]))
    panels[7].axis("off")
    panels[7].legend(handles, labels, loc="center left")
    figure.supxlabel("decoder layer", fontsize=9)
    figure.supylabel("relative squared error", fontsize=9)
    return figure


def _bits(layers: Sequence[dict[str, Any]]) -> Any:
    """A map, only where not all layers have the same."""
    found = sorted({row["bits"] or 16 for row in layers})
    if len(found) < 2:
        return None
    from matplotlib.colors import BoundaryNorm, ListedColormap
    from matplotlib.patches import Patch

    grid = _grid(layers, lambda row: row["name"].rsplit(".", 1)[-1], _KINDS, lambda row: row["bits"] or 16)
    colors = {4: "#cfe0f3", 8: "#6fa1d6", 16: "#173f6d"}
    figure, axis = _figure(max(4.8, 1.6 + 0.27 * len(grid[0])), 2.5)
    shades = [colors.get(bits, "#999999") for bits in found]
    edges = [found[0] - 1, *((a + b) / 2 for a, b in itertools.pairwise(found)), found[-1] + 1]
    axis.pcolormesh(
        _edges(len(grid[0])),
        _edges(7),
        grid,
        cmap=ListedColormap(shades),
        norm=BoundaryNorm(edges, len(shades)),
        edgecolors="white",
        linewidth=1.2,
    )
    _map_axes(axis, _KINDS)
    names = {4: "4 bits", 8: "8 bits", 16: "not quantized"}
    axis.legend(
        handles=[Patch(color=shade, label=names.get(bits, str(bits))) for bits, shade in zip(found, shades)],
        loc="upper left",
        bbox_to_anchor=(1.01, 1),
    )
    return figure


def _hidden(errors: Sequence[float]) -> Any:
    if not errors:
        return None
    figure, axis = _figure(6.4, 2.7)
    axis.plot(range(len(errors)), errors, marker="o", ms=4, lw=1.5, color=_OURS)
    axis.set_yscale("log")
    axis.set_xlabel("decoder layer")
    axis.set_ylabel("relative squared difference")
    _whole_ticks(axis.xaxis)
    return figure


def _conversations(divergence: dict[str, Any] | None) -> Any:
    if divergence is None:
        return None
    values = sorted(d["kl"] for d in divergence["conversations"])
    figure, axis = _figure(6.4, 2.7)
    if divergence["kl_interval"] is not None:
        axis.axhspan(*divergence["kl_interval"], color=_OURS, alpha=0.12, lw=0)
    axis.axhline(divergence["kl"], color=_OURS, ls="--", lw=1.2)
    axis.plot(range(1, len(values) + 1), values, "o", ms=5, color=_OURS)
    if values[0] > 0 and values[-1] / values[0] > 20:
        axis.set_yscale("log")
    else:
        axis.set_ylim(bottom=0)
    axis.set_xlabel("conversation, by divergence")
    axis.set_ylabel("KL in nats")
    _whole_ticks(axis.xaxis)
    return figure


def _sensitivity_bars(rows: Sequence[dict[str, Any]]) -> Any:
    """By depth for decoder layers, the largest first for kinds."""
    by_layer = rows[0]["granularity"] == "layer"
    values = [row["kl"] for row in rows]
    if by_layer:
        figure, axis = _figure(max(5.0, min(9.6, 1.4 + 0.28 * len(rows))), 2.7)
        axis.bar([_layer_of(row["name"]) for row in rows], values, width=0.6, color=_OURS)
        axis.set_xlabel("decoder layer")
        axis.set_ylabel("KL in nats, alone")
        axis.grid(False, axis="x")
        _whole_ticks(axis.xaxis)
        return figure
    order = sorted(range(len(rows)), key=values.__getitem__)
    figure, axis = _figure(6.4, 0.7 + 0.27 * len(rows))
    axis.barh([rows[i]["name"] for i in order], [values[i] for i in order], height=0.68, color=_OURS)
    axis.set_xlabel("KL in nats, alone")
    axis.grid(False, axis="y")
    return figure


def _sensitivity_map(rows: Sequence[dict[str, Any]]) -> Any:
    """Layer by kind, on a logarithmic scale."""
    from matplotlib.colors import LogNorm

    positive = [row["kl"] for row in rows if row["kl"] > 0]
    if not positive:
        return None
    kinds = list(dict.fromkeys(row["name"].rsplit(".", 1)[-1] for row in rows))
    grid = _grid(
        rows, lambda row: row["name"].rsplit(".", 1)[-1], kinds, lambda row: row["kl"] if row["kl"] > 0 else math.nan
    )
    figure, axis = _figure(max(5.2, 2.2 + 0.27 * len(grid[0])), 0.9 + 0.24 * len(kinds))
    norm = LogNorm(min(positive) / 2, max(positive))  # the least is a colour too
    mesh = axis.pcolormesh(
        _edges(len(grid[0])), _edges(len(kinds)), grid, cmap="Blues", norm=norm, edgecolors="white", linewidth=1.2
    )
    _map_axes(axis, kinds)
    figure.colorbar(mesh, ax=axis, label="KL in nats, alone", pad=0.02)
    return figure


def _scores(scores: Sequence[dict[str, Any]]) -> Any:
    if not scores:
        return None
    figure, axis = _figure(7.6, 0.8 + 0.34 * len(scores))
    for place, row in enumerate(reversed(scores)):
        for key, color, shift, marker in (("before", _OTHER, 0.14, "s"), ("after", _OURS, -0.14, "o")):
            low, high = row[f"{key}_interval"]
            label = {"before": "original", "after": "quantized"}[key] if place == 0 else None
            axis.plot([low, high], [place + shift] * 2, color=color, lw=2, alpha=0.45, solid_capstyle="round")
            axis.plot(row[key], place + shift, marker, ms=5, color=color, label=label)
    axis.set_yticks(range(len(scores)), [row["task"] for row in reversed(scores)])
    axis.set_ylim(-0.6, len(scores) - 0.4)
    axis.set_xlim(-0.02, 1.02)
    axis.set_xlabel("share of right answers")
    axis.grid(False, axis="y")
    axis.legend(loc="upper left", bbox_to_anchor=(1.01, 1))
    return figure


# ---------------------------------------------------------------------- maps


def _grid(rows: Sequence[dict[str, Any]], kind_of: Any, kinds: Sequence[str], value: Any) -> list[list[float]]:
    """[kind][layer]; nan where there is none."""
    names = [row["name"] for row in rows]
    depth = 1 + max(map(_layer_of, names))
    grid = [[math.nan] * depth for _ in kinds]
    for row in rows:
        grid[list(kinds).index(kind_of(row))][_layer_of(row["name"])] = value(row)
    return grid


def _edges(count: int) -> list[float]:
    return [i - 0.5 for i in range(count + 1)]


def _map_axes(axis: Any, kinds: Sequence[str]) -> None:
    axis.set_yticks(range(len(kinds)), kinds)
    axis.invert_yaxis()
    axis.set_xlabel("decoder layer")
    axis.grid(False)
    axis.spines[:].set_visible(False)
    axis.tick_params(length=0)
    _whole_ticks(axis.xaxis)
