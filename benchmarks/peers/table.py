"""Tables of a run beside the peers."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tabulate import tabulate

from edgevl.benchmarks.peers.contract import Measured

__all__ = ["METRICS", "Row", "asked", "pooled", "ratios", "spread", "tables"]

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


def pooled(rows: Sequence[Row], workload: str, contender: str, metric: str) -> list[float]:
    """What all rounds measured of a metric."""
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
        there = asked(rows, name, contenders)
        if not there:  # of a run that was stopped before it came to this one
            continue
        rounds = len({r.round for r in rows if r.workload == name})
        how = "turns, all open together," if head.get("by_turns") else "rounds"
        title = f"### {name}: {description}; {rounds} {how} of {head['repeats']} requests"
        parts += [title, _figures(rows, name, there), _ratios(rows, name, there)]
        parts += _remarks(rows, name, there)
    return "\n\n".join(p for p in parts if p)


def asked(rows: Sequence[Row], workload: str, contenders: Sequence[str]) -> list[str]:
    """Those of the contenders that were to answer the workload, whether they could or not."""
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
    return _table([[c, *(spread(pooled(rows, workload, c, m)) for m in METRICS)] for c in contenders], headers)


def _ratios(rows: Sequence[Row], workload: str, contenders: Sequence[str]) -> str:
    headers = [f"ratio to {contenders[0]}", *(title.rsplit(" ", 1)[0] for title, _ in METRICS.values())]
    cells = [[c, *(spread(ratios(rows, workload, c, contenders[0], m)) for m in METRICS)] for c in contenders[1:]]
    return _table(cells, headers) if cells else ""


def _remarks(rows: Sequence[Row], workload: str, contenders: Sequence[str]) -> list[str]:
    """Who could not, and whose prompts were longer or shorter than ours."""
    said = []
    reference = pooled(rows, workload, contenders[0], "prompt_tokens")
    for c in contenders:
        reasons = {r.measured.unsupported for r in rows if (r.workload, r.measured.contender) == (workload, c)} - {""}
        said += [f"{c}: {reason}" for reason in sorted(reasons)]
        tokens = pooled(rows, workload, c, "prompt_tokens")
        if tokens and reference:
            mine, theirs = statistics.median(reference), statistics.median(tokens)
            if abs(theirs / mine - 1) > _TOKENS:
                said.append(f"{c}: its prompts had {theirs:.0f} tokens, ours {mine:.0f}")
    return ["\n".join(f"- {line}" for line in said)] if said else []
