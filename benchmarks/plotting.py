"""What the tables and plots of a benchmark's report are made with. Knows no benchmark but the names of its cases."""

from __future__ import annotations

import importlib
import io
from collections.abc import Sequence
from typing import Any

from edgevl.runtime.errors import EdgeVLError

__all__ = [
    "COLOURS",
    "by_round",
    "case_names",
    "cell",
    "colour_cycle",
    "figure",
    "library",
    "rate_text",
    "svg",
    "table",
]

# Picked apart by lightness too, for readers who see few colours.
COLOURS = ("#1b4f72", "#2e86c1", "#85c1e9", "#b9770e", "#f5b041", "#7d3c98", "#27ae60", "#c0392b")


def table(title: str, numbers: Sequence[str]) -> Any:
    made = library("rich.table").Table(title=title, title_justify="left", box=library("rich.box").SIMPLE_HEAD)
    for name in ("bundle", "workload"):
        made.add_column(name, no_wrap=True)
    for name in numbers:
        made.add_column(name, justify="right", no_wrap=True)
    return made


def cell(values: dict[str, float], digits: int, scale: float = 1.0) -> str:
    if not values["n"]:
        return ""
    return f"{values['p50'] * scale:.{digits}f} ({values['p95'] * scale:.{digits}f})"


def rate_text(per_s: float) -> str:
    """Three digits, and never as a power of ten."""
    return f"{per_s:.3g}" if per_s < 1000 else f"{per_s:,.0f}"


def figure(height: float = 3.2) -> tuple[Any, Any]:
    matplotlib = library("matplotlib")
    matplotlib.use("Agg")
    pyplot = library("matplotlib.pyplot")
    matplotlib.rcParams.update(
        {"svg.fonttype": "none", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    )
    return pyplot.subplots(figsize=(8, height), layout="constrained")


def svg(drawn: Any) -> str:
    out = io.StringIO()
    drawn.savefig(out, format="svg", metadata={"Date": None})
    library("matplotlib.pyplot").close(drawn)
    text = out.getvalue()
    return text[text.index("<svg") :]


def case_names(cases: Sequence[dict[str, Any]]) -> list[str]:
    several = len({case["workload"]["name"] for case in cases}) > 1
    return [case["bundle"] + (f"\n{case['workload']['name']}" if several else "") for case in cases]


def by_round(case: dict[str, Any]) -> list[list[dict[str, Any]]]:
    """The requests of each process: every one counts its seconds anew."""
    numbers = sorted({r["round"] for r in case["requests"]})
    return [[r for r in case["requests"] if r["round"] == n] for n in numbers]


def colour_cycle(count: int) -> list[str]:
    return [COLOURS[i % len(COLOURS)] for i in range(count)]


def library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as e:
        raise EdgeVLError(f"`edgevl bench` needs the package {e.name!r}; pip install 'edgevl[bench]'") from None
