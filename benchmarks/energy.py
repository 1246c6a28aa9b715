"""Energy and heat of this machine, where it tells them.

    RAPL    /sys/class/powercap/intel-rapl:*/energy_uj (Intel and AMD): counters of joules, often root only
    INA     hwmon power sensors of Jetson boards (ina3221: in*_input millivolts x curr*_input milliamperes)
    NVML    total energy of NVIDIA GPUs, through nvidia-ml-py where installed

A sensor that is not there is said to be absent, with the reason; nothing is estimated.
"""

from __future__ import annotations

import contextlib
import importlib
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["EnergyMeter", "Heat", "heat", "number_in"]

_INTERVAL_S = 0.05


@dataclass(frozen=True)
class _Counter:
    """A counter in microjoules that starts again at `wraps`."""

    path: Path
    wraps: int

    def read(self) -> int:
        return int(self.path.read_text())


class EnergyMeter:
    """Joules used since it was started, by source. `root` is where sysfs is mounted (tests give another).

    `absent` tells of each kind of sensor that cannot be read here, and why.
    """

    def __init__(self, root: Path = Path("/sys")) -> None:
        self.absent: dict[str, str] = {}
        self._root = root
        self._counters = self._rapl()
        self._rails = self._ina()
        self._gpus = self._nvml()
        self._joules: dict[str, float] = {}
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._last: dict[str, float] = {}
        self._at: dict[str, float] = {}

    @property
    def sources(self) -> tuple[str, ...]:
        return (*self._counters, *self._rails, *self._gpus)

    def __enter__(self) -> EnergyMeter:
        self._joules = dict.fromkeys(self.sources, 0.0)
        self._last = {**{n: c.read() for n, c in self._counters.items()}, **{n: g() for n, g in self._gpus.items()}}
        self._at = dict.fromkeys(self._rails, time.monotonic())
        if self.sources:
            self._thread = threading.Thread(target=self._sample, daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def read(self) -> float | None:
        """Joules since the start, all sources together; None where there is no sensor."""
        if not self.sources:
            return None
        self._update()
        with self._lock:
            return sum(self._joules.values())

    def _sample(self) -> None:
        while not self._stop.wait(_INTERVAL_S):
            self._update()

    def _update(self) -> None:
        """A sensor that is busy is passed over: the next reading makes up for it, of a rail with the watts of then."""
        with self._lock:
            for name, counter in self._counters.items():
                with contextlib.suppress(OSError, ValueError):
                    now = counter.read()
                    self._joules[name] += ((now - self._last[name]) % counter.wraps) / 1e6
                    self._last[name] = now
            for name, gpu in self._gpus.items():
                with contextlib.suppress(Exception):  # the library's own classes
                    now = gpu()
                    self._joules[name] += now - self._last[name]
                    self._last[name] = now
            at = time.monotonic()
            for name, watts in self._rails.items():
                with contextlib.suppress(OSError, ValueError):
                    self._joules[name] += watts() * (at - self._at[name])
                    self._at[name] = at

    # ------------------------------------------------------------------ sensors

    def _rapl(self) -> dict[str, _Counter]:
        found: dict[str, _Counter] = {}
        zones = sorted((self._root / "class/powercap").glob("intel-rapl:[0-9]*"))
        # Packages only: their sub-zones (core, uncore) are parts of them. psys would count everything twice.
        for zone in zones:
            try:
                if zone.name.count(":") != 1 or (zone / "name").read_text().strip() == "psys":
                    continue
                counter = _Counter(zone / "energy_uj", int((zone / "max_energy_range_uj").read_text()) + 1)
                counter.read()
                found[f"rapl {(zone / 'name').read_text().strip()}"] = counter
            except PermissionError:
                self.absent["RAPL"] = f"{zone / 'energy_uj'} is readable by root only"
            except (OSError, ValueError) as e:
                self.absent["RAPL"] = str(e)
        if not found:
            self.absent.setdefault("RAPL", "this machine has no readable powercap zones")
        return found

    def _ina(self) -> dict[str, Callable[[], float]]:
        rails: dict[str, Callable[[], float]] = {}
        for chip in sorted((self._root / "class/hwmon").glob("hwmon*")):
            name = chip / "name"
            if not name.is_file() or not name.read_text().strip().startswith("ina"):
                continue
            # Three channels: what is numbered on is the sum of the currents, and the voltages over the shunts.
            for current in sorted(chip.glob("curr[1-3]_input")):
                number = current.name[4]
                volts, label = chip / f"in{number}_input", chip / f"in{number}_label"
                watts = _watts(volts, current)
                with contextlib.suppress(OSError, ValueError):  # of a channel that is switched off
                    watts()
                    rail = label.read_text().strip() if label.is_file() else f"{chip.name} {number}"
                    rails[f"rail {rail}"] = watts
        # VDD_IN is the whole board: the other rails are parts of it.
        whole = [r for r in rails if r in ("rail VDD_IN", "rail POM_5V_IN")]
        if whole:
            rails = {r: rails[r] for r in whole}
        if not rails:
            self.absent["INA"] = "no ina3221 power sensors (Jetson boards have them)"
        return rails

    def _nvml(self) -> dict[str, Callable[[], float]]:
        try:
            nvml: Any = importlib.import_module("pynvml")
        except ModuleNotFoundError:
            self.absent["NVML"] = "nvidia-ml-py is not installed"
            return {}
        try:
            nvml.nvmlInit()
            handles = [nvml.nvmlDeviceGetHandleByIndex(i) for i in range(nvml.nvmlDeviceGetCount())]
            read = {f"gpu {i}": _gpu_joules(nvml, h) for i, h in enumerate(handles)}
            for gpu in read.values():
                gpu()
            if not read:
                self.absent["NVML"] = "no NVIDIA GPU is found"
            return read
        except Exception as e:  # the library's own classes
            self.absent["NVML"] = f"{type(e).__name__}: {e}"
            return {}


def _watts(volts: Path, current: Path) -> Callable[[], float]:
    return lambda: int(volts.read_text()) * int(current.read_text()) / 1e6


def _gpu_joules(nvml: Any, handle: Any) -> Callable[[], float]:
    return lambda: nvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3


@dataclass(frozen=True)
class Heat:
    """mhz: mean current clock of the cores, None where it cannot be read. celsius: hottest zone. throttled: how often
    the processor says that it throttled since it was started, None where it does not count."""

    mhz: float | None
    celsius: float | None
    throttled: int | None


def heat(root: Path = Path("/sys")) -> Heat:
    """Clocks, temperature and throttling counts of now."""
    cpu = root / "devices/system/cpu"
    clocks = [number_in(p) for p in cpu.glob("cpu[0-9]*/cpufreq/scaling_cur_freq")]
    zones = [number_in(p) for p in (root / "class/thermal").glob("thermal_zone*/temp")]
    counts = [number_in(p) for p in cpu.glob("cpu[0-9]*/thermal_throttle/core_throttle_count")]
    known = [c for c in clocks if c is not None]
    hot = [z for z in zones if z is not None]
    counted = [c for c in counts if c is not None]
    return Heat(
        sum(known) / len(known) / 1e3 if known else None,
        max(hot) / 1e3 if hot else None,
        int(sum(counted)) if counted else None,
    )


def number_in(path: Path) -> float | None:
    """The number that a file of sysfs holds; None where it cannot be read."""
    try:
        return float(path.read_text())
    except (OSError, ValueError):
        return None
