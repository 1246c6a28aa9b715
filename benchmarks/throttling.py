"""Whether the processor throttled: its own count of it, or, where it has none, clocks that stay low under load.

count     /sys/devices/system/cpu/cpu*/thermal_throttle/core_throttle_count (x86): how often
clocks    cpufreq: the fastest of the cores in use runs, in most samples, below 90 % of what it was allowed before
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

from edgevl.benchmarks.energy import Heat, number_in

__all__ = ["ClockWatch", "throttled"]

_INTERVAL_S = 0.1
_LEAST_SAMPLES = 5
_LOW = 0.9  # of what is allowed


class ClockWatch:
    """Samples the clocks of `cores` (by default those that this process may use) while there is load.

    What a core may run at is read once, at the start: a limit for heat lowers `scaling_max_freq` itself. The fastest
    core counts, since one that waits for the others clocks down without being hot.
    """

    def __init__(self, cores: Sequence[int] = (), root: Path = Path("/sys"), interval_s: float = _INTERVAL_S) -> None:
        if not cores and hasattr(os, "sched_getaffinity"):
            cores = sorted(os.sched_getaffinity(0))
        self._allowed: dict[Path, float] = {}
        for core in cores:
            folder = root / f"devices/system/cpu/cpu{core}/cpufreq"
            limits = (number_in(folder / name) for name in ("scaling_max_freq", "cpuinfo_max_freq"))
            most = next((limit for limit in limits if limit), None)
            if most and number_in(folder / "scaling_cur_freq"):
                self._allowed[folder / "scaling_cur_freq"] = most
        self._interval_s = interval_s
        self._shares: list[float] = []

    @property
    def low(self) -> bool | None:
        """Whether the clocks stayed low; None where they cannot be read, or too few samples were taken."""
        if len(self._shares) < _LEAST_SAMPLES:
            return None
        return 2 * sum(share < _LOW for share in self._shares) > len(self._shares)

    @contextlib.contextmanager
    def loaded(self) -> Iterator[None]:
        """Sample while the block runs; at its end too, so that short blocks count."""
        if not self._allowed:
            yield
            return
        stop = threading.Event()
        thread = threading.Thread(target=self._sample, args=(stop,), daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()

    def _sample(self, stop: threading.Event) -> None:
        ended = False
        while not ended:
            ended = stop.wait(self._interval_s)
            clocks = [(number_in(path), most) for path, most in self._allowed.items()]
            shares = [clock / most for clock, most in clocks if clock is not None]
            if shares:
                self._shares.append(max(shares))


def throttled(before: Heat, after: Heat, watch: ClockWatch) -> int | bool | None:
    """How often the processor throttled between two readings; where it does not count, whether its clocks stayed low
    under load; None where it tells neither."""
    if before.throttled is None or after.throttled is None:
        return watch.low
    return after.throttled - before.throttled
