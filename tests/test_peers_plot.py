"""The plot beside other programs: which panels there are, and what stands in them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.figure
import pytest
from PIL import Image

from edgevl.benchmarks.peers.contract import Measured
from edgevl.benchmarks.peers.plot import plot
from edgevl.benchmarks.peers.table import Row, tables

FIGURES = {"ttft_s": [1.0, 2.0], "decode_tokens_per_s": [4.0], "total_tokens_per_s": [2.0], "peak_mb": 10.0}
HEAD = {
    "date": "2026-01-01", "processor": "P", "flags": ["f"], "threads": 2, "checkpoint": "c", "repeats": 2,
    "workloads": {"picture": "one", "batch": "four at once"},
}  # fmt: skip


def rows() -> list[Row]:
    ours = {**FIGURES, "vision_s": [1.0], "prefill_s": [2.0]}
    theirs = {**FIGURES, "vision_s": [3.0], "prefill_s": [1.0], "ttft_s": [6.0], "decode_tokens_per_s": [1.0]}
    found = [Row("picture", n, Measured(c, **v)) for n in (0, 1) for c, v in (("edgevl a", ours), ("b", theirs))]  # type: ignore[arg-type]
    found += [Row("batch", 0, Measured("edgevl a", **FIGURES)), Row("batch", 0, Measured("b", unsupported="no"))]  # type: ignore[arg-type]
    return found


def drawn(monkeypatch: pytest.MonkeyPatch, path: Path) -> dict[str, Any]:
    """The plot's panels by title."""
    panels: dict[str, Any] = {}
    save: Callable[..., None] = matplotlib.figure.Figure.savefig

    def keep(figure: Any, *arguments: Any, **named: Any) -> None:
        panels.update({axis.get_title(): axis for axis in figure.axes})
        save(figure, *arguments, **named)

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", keep)
    plot(rows(), HEAD, ["edgevl a", "b"], path)
    return panels


def test_the_plot_has_every_metric_and_the_ratio_to_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    panels = drawn(monkeypatch, tmp_path / "p.png")
    assert [title.removeprefix("picture: ") for title in panels if title.startswith("picture")] == [
        "vision s (less is better)",
        "prefill s (less is better)",
        "TTFT s (less is better)",
        "decode tok/s (more is better)",
        "all in all tok/s (more is better)",
        "peak MB (less is better)",
        "ratio to edgevl a",
    ]
    assert len(panels) == 14
    vision = panels["picture: vision s (less is better)"]
    assert [bar.get_width() for bar in vision.patches] == [1.0, 3.0]
    assert [text.get_text() for text in vision.get_yticklabels()] == ["edgevl a", "b"]
    ratios = {line.get_label(): line.get_xydata().tolist() for line in panels["picture: ratio to edgevl a"].lines[1:]}
    assert ratios == {
        "vision (less is better)": [[3.0, 1.0]],
        "prefill (less is better)": [[0.5, 1.0]],
        "TTFT (less is better)": [[4.0, 1.0]],
        "decode (more is better)": [[0.25, 1.0]],
        "all in all (more is better)": [[1.0, 1.0]],
        "peak (less is better)": [[1.0, 1.0]],
    }
    empty = panels["batch: vision s (less is better)"]
    assert not empty.patches and [text.get_text() for text in empty.texts] == ["no figures"]
    assert [text.get_text() for text in panels["batch: TTFT s (less is better)"].texts] == [" 1.5", " –"]
    with Image.open(tmp_path / "p.png") as picture:
        assert picture.width == 1650


def test_a_plot_that_fails_leaves_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "p.png").write_text("old")

    def save(figure: Any, path: Path, **_: Any) -> None:
        Path(path).write_text("half")
        raise ValueError("no")

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", save)
    with pytest.raises(ValueError):
        plot(rows(), HEAD, ["edgevl a", "b"], tmp_path / "p.png")
    assert (tmp_path / "p.png").read_text() == "old" and len(list(tmp_path.iterdir())) == 1


def test_a_row_without_figures_is_in_the_table() -> None:
    text = tables(rows(), HEAD, ["edgevl a", "b"])
    figures = [line.split("|")[1].strip() for line in text.split("### batch")[1].splitlines() if line.startswith("|")]
    assert figures.count("b") == 2 and text.endswith("- b: no")
