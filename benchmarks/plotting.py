"""What the plots of a benchmark's report are made with. Knows no benchmark but the names of its cases."""

from __future__ import annotations

import importlib
import io
import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from edgevl.runtime.errors import EdgeVLError

__all__ = [
    "COLOURS",
    "Style",
    "by_round",
    "case_labels",
    "case_styles",
    "figure",
    "legend",
    "library",
    "rate_text",
    "row_figure",
    "svg",
]

# Picked apart by lightness too, for readers who see few colours.
COLOURS = ("#1b4f72", "#2e86c1", "#85c1e9", "#b9770e", "#f5b041", "#7d3c98", "#27ae60", "#c0392b")
# One fewer than the colours: stepping through both at once, a pair comes again only after 8 x 7 cases.
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")

_STRIDE = 3  # through the colours: neighbours among them are alike

_LEGEND_CHARACTERS = 104  # of a line of the legend
_HANDLE_CHARACTERS = 8  # that the sample and the gap beside a label take
_LABEL_CHARACTERS = 90
_ROW_CHARACTERS = 28
_LINE_INCHES = 0.21


@dataclass(frozen=True)
class Style:
    """How a case is drawn."""

    colour: str
    marker: str
    hollow: bool

    @property
    def line(self) -> dict[str, Any]:
        """Arguments of matplotlib's plot."""
        inside = "white" if self.hollow else self.colour
        return {"color": self.colour, "marker": self.marker, "markerfacecolor": inside}


def case_styles(count: int) -> list[Style]:
    """Unlike each other up to 112 cases."""
    pairs = len(COLOURS) * len(_MARKERS)
    return [
        Style(COLOURS[_STRIDE * i % len(COLOURS)], _MARKERS[i % len(_MARKERS)], hollow=i // pairs % 2 == 1)
        for i in range(count)
    ]


def rate_text(per_s: float) -> str:
    """Three digits, and never as a power of ten."""
    return f"{per_s:.3g}" if per_s < 1000 else f"{per_s:,.0f}"


def figure(height: float = 3.2, labels: Sequence[str] = (), panels: int = 1) -> tuple[Any, Any]:
    """A figure whose axes are `height` inches high with a legend of `labels` above them, and its axes; several below
    one another where there are `panels`."""
    matplotlib = library("matplotlib")
    matplotlib.use("Agg")
    pyplot = library("matplotlib.pyplot")
    matplotlib.rcParams.update(
        {"svg.fonttype": "none", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    )
    rows = math.ceil(len(labels) / _legend_columns(labels))
    lines = max((label.count("\n") + 1 for label in labels), default=0)
    size = (8, height + _LINE_INCHES * rows * lines)
    return pyplot.subplots(panels, figsize=size, layout="constrained", sharex=True)


def row_figure(cases: Sequence[dict[str, Any]], inches: float) -> tuple[Any, Any]:
    """A figure with a row of `inches` for each case, the first on top; more where a name has many lines."""
    names = ["\n".join(textwrap.wrap(_plain(c["bundle"]), _ROW_CHARACTERS) + _workloads(c, cases)) for c in cases]
    lines = max(name.count("\n") + 1 for name in names)
    drawn, axes = figure(1.0 + max(inches, 0.17 * lines) * len(cases))
    axes.set_yticks(range(len(cases)), names)
    axes.set_ylim(len(cases) - 0.5, -0.5)
    return drawn, axes


def legend(drawn: Any, labels: Sequence[str]) -> None:
    """Above the axes, of what was drawn with these labels."""
    if labels:
        drawn.legend(ncols=_legend_columns(labels), loc="outside upper center", frameon=False)


def _legend_columns(labels: Sequence[str]) -> int:
    longest = max((len(line) for label in labels for line in label.splitlines()), default=0)
    return max(1, min(len(labels), _LEGEND_CHARACTERS // (longest + _HANDLE_CHARACTERS)))


def svg(drawn: Any) -> str:
    out = io.StringIO()
    drawn.savefig(out, format="svg", metadata={"Date": None})
    library("matplotlib.pyplot").close(drawn)
    text = out.getvalue()
    return text[text.index("<svg") :]


def case_labels(cases: Sequence[dict[str, Any]]) -> list[str]:
    """For a legend: the bundle, and the workload where there are several."""
    names = [_plain(", ".join([case["bundle"], *_workloads(case, cases)])) for case in cases]
    return ["\n".join(textwrap.wrap(name, _LABEL_CHARACTERS, drop_whitespace=False)) for name in names]


def _plain(name: str) -> str:
    """Not taken for a formula; and matplotlib leaves labels that begin with an underscore out of legends."""
    return (" " if name.startswith("_") else "") + name.replace("$", r"\$")


def _workloads(case: dict[str, Any], cases: Sequence[dict[str, Any]]) -> list[str]:
    return [case["workload"]["name"]] if len({c["workload"]["name"] for c in cases}) > 1 else []


def by_round(case: dict[str, Any]) -> list[list[dict[str, Any]]]:
    """The requests of each process: every one counts its seconds anew."""
    numbers = sorted({r["round"] for r in case["requests"]})
    return [[r for r in case["requests"] if r["round"] == n] for n in numbers]


def library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as e:
        raise EdgeVLError(f"`edgevl bench` needs the package {e.name!r}; pip install 'edgevl[bench]'") from None
