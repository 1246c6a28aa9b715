"""What a report says of the machine beside speed: memory, energy, clock and heat of every case, and its description.

What the machine does not tell is said to be absent.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

from edgevl.benchmarks.report_table import Table, case_table

__all__ = ["absent_sensors", "machine_notes", "machine_table", "system_rows"]

_READABLE = {"cpu_flags": "cpu flags", "power_mode": "power mode", "load_before": "load before", "gpus": "GPUs"}


def machine_table(cases: Sequence[dict[str, Any]]) -> Table | None:
    def number(group: str, key: str, digits: int) -> Callable[[dict[str, Any]], str]:
        def text(case: dict[str, Any]) -> str:
            found = (case.get(group) or {}).get(key)
            return "" if found is None else f"{found:,.{digits}f}"

        return text

    columns: dict[str, Callable[[dict[str, Any]], str]] = {
        "peak MB": number("memory_mb", "peak", 0),
        "arena MB": number("memory_mb", "arena_mb", 0),
        "GPU MB": number("memory_mb", "peak_gpu_mb", 0),
        "J / request": _joules_of_request,
        "J / picture": number("energy", "j_per_picture", 2),
        "J / token": number("energy", "j_per_token", 2),
        "MHz": _clock,
        "°C": lambda case: "" if not (heat := _told(case, "celsius")) else f"{max(heat):.0f}",
        "throttled": _throttled,
    }
    return case_table("memory, energy and heat", machine_notes(cases), columns, cases)


def machine_notes(cases: Sequence[dict[str, Any]]) -> list[str]:
    """How to read the table, and what is not in it."""
    notes = []
    sources = list(dict.fromkeys(s for case in cases for s in case["energy"]["sources"]))
    if sources:
        idle = "; in an open loop idle seconds count" if any(c["loop"] == "open" for c in cases) else ""
        notes.append(f"energy of {', '.join(sources)}{idle}")
    if any(len(_told(case, "mhz")) > 1 for case in cases):
        notes.append("MHz: median (least) over requests; °C: the highest")
    by_reason: dict[str, list[str]] = {}
    for what, why in absent_sensors(cases).items():
        by_reason.setdefault(why, []).append(what)
    return notes + [f"{', '.join(names)} absent: {why}" for why, names in by_reason.items()]


def absent_sensors(cases: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Sensor -> why nothing is known of it, in any of the cases."""
    found: dict[str, str] = {}
    for case in cases:
        found |= {what: why for what, why in case["energy"]["absent"].items() if what not in found}
    requests = [r for case in cases for r in case["requests"]]
    for key, what in (("mhz", "clock"), ("celsius", "temperature")):
        if not any(_told(case, key) for case in cases):
            kept = any(key in r for r in requests)
            found[what] = "not told by this machine" if kept else "not kept in an open loop"
    if all(case.get("throttled") is None for case in cases):
        found.setdefault("throttling", "not told by this machine")
    return found


def system_rows(system: dict[str, Any]) -> dict[str, str]:
    """Name -> value, in words."""
    return {_READABLE.get(name, name): _words(value) for name, value in system.items()}


def _words(value: Any) -> str:
    if value is None:
        return "not told"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_words, value)) or "none"
    return str(value)


def _joules_of_request(case: dict[str, Any]) -> str:
    """A closed loop counts those of all that are answered together."""
    found = case["energy"]["j_per_request"]
    together = case["workload"]["concurrency"] if case["loop"] == "closed" else 1
    return "" if found is None else f"{found / together:,.2f}"


def _told(case: dict[str, Any], key: str) -> list[float]:
    return [r[key] for r in case["requests"] if r.get(key) is not None]


def _clock(case: dict[str, Any]) -> str:
    clocks = _told(case, "mhz")
    return f"{statistics.median(clocks):,.0f} ({min(clocks):,.0f})" if clocks else ""


def _throttled(case: dict[str, Any]) -> str:
    found = case.get("throttled")
    if found is None:
        return ""
    if isinstance(found, bool) or not found:
        return "yes" if found else "no"
    return f"{found} times" if found > 1 else "once"
