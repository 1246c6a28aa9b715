"""Tables of a benchmark's report: the same cells for a terminal and for the page. Knows of a case only its names.

On a terminal that is too narrow the names of bundle and workload fold, and figures that still do not fit go to a
further table: a figure is never cut. Where the output is no terminal, a table takes the width that it needs.
"""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import click

from edgevl.benchmarks.plotting import library

__all__ = ["Piece", "Printer", "Table", "case_table", "pieces", "tail_cell"]

_NAMES = ("bundle", "workload")
_GAP = 2  # between columns
_LEAST_NAME = 8
_UNBOUNDED = 100_000


@dataclass(frozen=True)
class Table:
    """Cells of `rows` stand under `columns`: bundle, workload, then figures. `notes` explain them."""

    title: str
    notes: tuple[str, ...]
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def case_table(
    title: str,
    notes: Sequence[str],
    columns: Mapping[str, Callable[[dict[str, Any]], str]],
    cases: Sequence[dict[str, Any]],
) -> Table | None:
    """A row for each case, without the columns that are blank for all; None where no column is left."""
    made = {name: [text(case) for case in cases] for name, text in columns.items()}
    shown = {name: cells for name, cells in made.items() if any(cells)}
    if not shown:
        return None
    rows = [
        (case["bundle"], case["workload"]["name"], *row)
        for case, row in zip(cases, zip(*shown.values(), strict=True), strict=True)
    ]
    return Table(title, tuple(notes), (*_NAMES, *shown), tuple(rows))


def tail_cell(values: dict[str, float], digits: int, scale: float = 1.0) -> str:
    """p50 / p95 / p99; blank where there was nothing to measure."""
    return " / ".join(f"{values[p] * scale:.{digits}f}" for p in ("p50", "p95", "p99")) if values["n"] else ""


@dataclass(frozen=True)
class Piece:
    """A part of a table that is as wide as the terminal: the widths of both names, and which figures it shows."""

    names: tuple[int, ...]
    figures: tuple[int, ...]


def pieces(names: Sequence[int], figures: Sequence[int], room: int) -> list[Piece]:
    """Deal columns of the given widths out to tables at most `room` wide. A figure that is wider than that, with the
    names folded as far as they go, stands alone and is not cut."""
    for share in (8, 5):  # folded names are hard to read, yet easier than two tables
        least = [min(width, max(_LEAST_NAME, room // share)) for width in names]
        base = sum(least) + _GAP * (len(least) - 1)
        if base + sum(_GAP + width for width in figures) <= room:
            break
    groups: list[list[int]] = [[]]
    for index, width in enumerate(figures):
        used = base + sum(_GAP + figures[i] for i in groups[-1])
        if groups[-1] and used + _GAP + width > room:
            groups.append([])
        groups[-1].append(index)
    made = []
    for group in groups:
        spare, grown = max(0, room - base - sum(_GAP + figures[i] for i in group)), []
        for width, folded in zip(names, least):
            more = min(width - folded, spare)
            grown.append(folded + more)
            spare -= more
        made.append(Piece(tuple(grown), tuple(group)))
    return made


class Printer:
    """Collects what goes to stdout. `room`: columns of the terminal; None where there is none.

    click's echo writes to a stream of any encoding, rich's own fails.
    """

    def __init__(self, room: int | None) -> None:
        # Names of folders are not markup. The width is ours to keep to: rich cuts what does not fit.
        console = library("rich.console").Console
        self._console = console(highlight=False, markup=False, emoji=False, width=_UNBOUNDED)
        self._room = room or _UNBOUNDED
        self._texts: list[str] = []

    @classmethod
    def for_stdout(cls) -> Printer:
        return cls(library("rich.console").Console().width if sys.stdout.isatty() else None)

    def line(self, text: str) -> None:
        """A line of words, folded between them."""
        with self._console.capture() as captured:
            self._console.print(text, width=self._room)
        self._keep(captured.get())

    def table(self, table: Table | None) -> None:
        """Nothing where it is None."""
        if table is None:
            return
        length = library("rich.cells").cell_len
        widths = [max(map(length, column)) for column in zip(table.columns, *table.rows)]
        self.line(table.title)
        for number, piece in enumerate(pieces(widths[: len(_NAMES)], widths[len(_NAMES) :], self._room)):
            if number:
                self.line("")
            self._piece(table, piece, widths)
        for text in table.notes:
            self.line(text)
        self.line("")

    def echo(self) -> None:
        """Write it all."""
        click.echo("".join(self._texts), nl=False)

    def _piece(self, table: Table, piece: Piece, widths: Sequence[int]) -> None:
        rich = library("rich.table")
        box = library("rich.box").SIMPLE_HEAD
        made = rich.Table(box=box, show_edge=False, pad_edge=False, padding=(0, _GAP - 1, 0, 0))
        shown = [*range(len(_NAMES)), *(len(_NAMES) + i for i in piece.figures)]
        for index, width in zip(shown, [*piece.names, *(widths[i] for i in shown[len(_NAMES) :])], strict=True):
            is_name = index < len(_NAMES)
            how = {"overflow": "fold"} if is_name else {"justify": "right", "no_wrap": True}
            made.add_column(table.columns[index], width=width, **how)
        for row in table.rows:
            names = ("\n".join(textwrap.wrap(name, width)) for name, width in zip(row, piece.names))
            made.add_row(*names, *(row[i] for i in shown[len(_NAMES) :]))
        with self._console.capture() as captured:
            self._console.print(made)
        self._keep(captured.get())

    def _keep(self, text: str) -> None:
        """Without the blanks that fill lines up."""
        self._texts += [line.rstrip() + "\n" for line in text.splitlines()]
