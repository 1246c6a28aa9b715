"""A fidelity report as one HTML page that needs nothing else: no script, no font, no picture from elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jinja2

from edgevl.calibration.plots import check_matplotlib, draw_plots
from edgevl.runtime.output_file import check_output_file, write_output

__all__ = ["check_page", "render_page", "write_page"]

_TEMPLATE = Path(__file__).with_name("fidelity.html.jinja")


def check_page(path: str | Path) -> None:
    """Whether a page can be written there: asked before hours are spent.

    Raises:
        InputError: see `check_output_file`.
        EdgeVLError: matplotlib is missing.
    """
    check_output_file(path, "an HTML file")
    check_matplotlib()


def render_page(data: dict[str, Any]) -> str:
    """The page of a document as `fidelity.json` holds it.

    Raises:
        EdgeVLError: matplotlib is missing.
    """
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters.update(number=_number, percent=_percent, bytes=_bytes, signed=_signed)
    template = environment.from_string(_TEMPLATE.read_text(encoding="utf-8"))
    recipe = data["provenance"]["recipe"]
    rows = list(_provenance(data))
    return template.render(data=data, plots=draw_plots(data), recipe=recipe, provenance=rows) + "\n"


def write_page(path: str | Path, data: dict[str, Any]) -> None:
    """Write the page, all of it or nothing.

    Raises:
        InputError: the file cannot be written.
    """
    write_output(path, render_page(data))


def _provenance(data: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for what in ("original", "quantized"):
        said = data[what]["quantization"]
        if said:
            yield f"format of the {what}", ", ".join(f"{key} {value}" for key, value in said.items())
        if data[what].get("kv_cache", "float") != "float":
            yield f"KV cache of the {what}", data[what]["kv_cache"]
    for key, value in data["provenance"].items():
        if isinstance(value, dict):
            yield from ((f"{key}: {k}", str(v)) for k, v in value.items() if v not in (None, {}))
        elif value is not None:
            yield key.replace("_", " "), str(value)


def _number(value: float | None) -> str:
    """Three significant digits."""
    return "" if value is None else f"{value:.3g}"


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _signed(value: float) -> str:
    return f"{value:+.1f}".replace("-", "\u2212")


def _bytes(value: float) -> str:
    for unit in ("B", "kB", "MB"):
        if value < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.2f} GB"
