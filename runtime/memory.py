"""How much memory this process uses and how much more it may have: the machine's, and its cgroup's. Linux; where the
system does not tell, the answer is None. Knows no model."""

from __future__ import annotations

import os
import re
from pathlib import Path

from edgevl.runtime.errors import InputError

__all__ = ["available_bytes", "parse_size", "resident_bytes", "shown"]

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "KI": 2**10, "MI": 2**20, "GI": 2**30}
_SIZE = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([KMG]I?)?B?\s*", re.IGNORECASE)
_UNLIMITED = 1 << 60  # cgroup v1 writes a page-rounded 2^63 for "no limit"


def parse_size(text: int | str) -> int:
    """Bytes of 4000000000, "4GB", "512 MB" or "1.5GiB".

    Raises:
        InputError: anything else, or nothing at all.
    """
    if isinstance(text, int) and not isinstance(text, bool):
        size = text
    else:
        match = _SIZE.fullmatch(text) if isinstance(text, str) else None
        size = 0 if match is None else int(float(match[1]) * _UNITS[(match[2] or "").upper()])
    if size < 1:
        raise InputError(f"memory {text!r}, expected a size such as 4GB, 512MB or 1.5GiB")
    return size


def shown(size: float) -> str:
    """A size for people, in decimal units."""
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"


def resident_bytes() -> int | None:
    """What of this process is in memory now."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, ValueError, IndexError):
        return None
    return pages * os.sysconf("SC_PAGE_SIZE")


def available_bytes(root: Path = Path("/")) -> int | None:
    """What can still be taken without pushing something out: the kernel's MemAvailable and free swap, or what is left
    in the tightest memory cgroup around this process (page cache does not count as used), whichever is less.

    Args:
        root: where proc and sys are, for tests.
    """
    found = [n for n in (_machine(root), *_cgroups(root)) if n is not None]
    return max(0, min(found)) if found else None


def _machine(root: Path) -> int | None:
    values: dict[str, int] = {}
    for line in _read(root / "proc/meminfo").splitlines():
        name, _, rest = line.partition(":")
        if name in ("MemAvailable", "SwapFree") and rest.split()[:1]:
            values[name] = int(rest.split()[0]) * 1024
    return values["MemAvailable"] + values.get("SwapFree", 0) if "MemAvailable" in values else None


def _cgroups(root: Path) -> list[int | None]:
    """What is left in each memory cgroup from this process's own up to the top, version 2 or 1."""
    left: list[int | None] = []
    for line in _read(root / "proc/self/cgroup").splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0":
            base, names, cache = "sys/fs/cgroup", ("memory.max", "memory.current"), "inactive_file"
        elif "memory" in controllers.split(","):
            base, names = "sys/fs/cgroup/memory", ("memory.limit_in_bytes", "memory.usage_in_bytes")
            cache = "total_inactive_file"
        else:
            continue
        # In a container the path may be the host's, which is not there: then only the mounted top counts.
        parts = [p for p in path.split("/") if p not in ("", "..")]
        for depth in range(len(parts), -1, -1):
            left.append(_left(root.joinpath(base, *parts[:depth]), names, cache))
    return left


def _left(folder: Path, names: tuple[str, str], cache: str) -> int | None:
    limit, used = (_read(folder / name).strip() for name in names)
    if not limit.isdigit() or not used.isdigit() or int(limit) >= _UNLIMITED:  # "max", or no such group
        return None
    reclaimable = 0
    for line in _read(folder / "memory.stat").splitlines():
        name, _, value = line.partition(" ")
        if name == cache and value.isdigit():
            reclaimable = int(value)
    return int(limit) - int(used) + reclaimable


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
