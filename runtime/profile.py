"""A machine's measured speed with one bundle, and the largest pictures that a time to first token allows.

    seconds = picture: c0 + c1 · source pixels + c2 · resized pixels     (load, resize, patches)
            + vision:  c0 + c1 · patches + c2 · patches²                 (layers are linear, attention quadratic)
            + prefill: c0 + c1 · tokens  + c2 · tokens²

`edgevl.benchmarks.profile` measures and writes the file, this module reads it, fits the coefficients (non-negative
least squares on relative errors) and solves for pixels. It knows numbers and files, no engine.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from edgevl.runtime.bundle import Bundle
from edgevl.runtime.errors import InputError
from edgevl.runtime.output_file import write_output

__all__ = ["Machine", "Profile", "bundle_id", "fit", "profile_path"]

SCHEMA_VERSION = 1
REMEDY = "measure one: python -m edgevl.benchmarks.profile {bundle}"
_STAGES = {"picture": 3, "vision": 2, "prefill": 2}  # numbers in one measured point: sizes, then seconds


@dataclass(frozen=True)
class Machine:
    """What a measurement holds for: on another one it says nothing."""

    processor: str
    engine: str
    threads: int
    onnxruntime: str


@dataclass(frozen=True)
class Profile:
    """Measured points: picture (source pixels, resized pixels, seconds), vision (patches, seconds), prefill (tokens,
    seconds)."""

    bundle: str  # bundle_id
    machine: Machine
    picture: tuple[tuple[float, ...], ...]
    vision: tuple[tuple[float, ...], ...]
    prefill: tuple[tuple[float, ...], ...]

    @classmethod
    def load(cls, path: Path, bundle: Bundle, machine: Machine) -> Profile:
        """Read a profile and check that it is of this bundle on this machine.

        Raises:
            InputError: no such file, malformed, of another bundle or machine; says how to measure one.
        """
        remedy = REMEDY.format(bundle=bundle.folder)
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise InputError(f"{path}: no profile of this bundle on this machine; {remedy}") from None
        except (OSError, ValueError) as e:
            raise InputError(f"{path}: not readable as JSON ({e}); {remedy}") from None
        try:
            profile = cls._parse(data)
        except (KeyError, TypeError, ValueError) as e:
            raise InputError(f"{path}: malformed ({type(e).__name__}: {e}); {remedy}") from None
        if profile.bundle != bundle_id(bundle):
            raise InputError(f"{path}: measured with another bundle; {remedy}")
        for name, here in asdict(machine).items():
            there = getattr(profile.machine, name)
            if there != here:
                raise InputError(f"{path}: measured with {name} {there}, this is {here}; {remedy}")
        return profile

    def save(self, path: Path) -> None:
        """Write the file, all of it or nothing, and its folder where there is none.

        Raises:
            InputError: it cannot be written.
        """
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise InputError(f"{path.parent}: cannot be made ({e.strerror}); choose another output") from None
        write_output(path, json.dumps({"schema_version": SCHEMA_VERSION, **asdict(self)}, indent=1) + "\n")

    @classmethod
    def _parse(cls, data: dict[str, Any]) -> Profile:
        if data["schema_version"] != SCHEMA_VERSION:
            raise ValueError(f"schema version {data['schema_version']}, this edgevl reads {SCHEMA_VERSION}")
        stages = {}
        for stage, numbers in _STAGES.items():
            points = tuple(tuple(float(n) for n in point) for point in data[stage])
            if len(points) < 3 or any(len(p) != numbers or not all(n > 0 < math.inf for n in p) for p in points):
                raise ValueError(f"{stage} must be at least three points of {numbers} positive numbers")
            stages[stage] = points
        return cls(bundle=str(data["bundle"]), machine=Machine(**data["machine"]), **stages)

    @cached_property
    def _coefficients(self) -> dict[str, np.ndarray]:
        """Of the columns 1, n, n² (vision, prefill) or 1, source, resized (picture)."""
        return {stage: fit(_columns(stage, getattr(self, stage)), [p[-1] for p in getattr(self, stage)])
                for stage in _STAGES}  # fmt: skip

    def seconds(self, stage: str, *sizes: float) -> float:
        """Predicted seconds of one stage: "picture" (source pixels, resized pixels), "vision" (patches of a call) or
        "prefill" (tokens)."""
        return float((_columns(stage, [(*sizes, 0.0)]) @ self._coefficients[stage])[0])


def _columns(stage: str, points: Sequence[Sequence[float]]) -> np.ndarray:
    sizes = np.array([p[:-1] for p in points], np.float64)
    ones = np.ones((len(sizes), 1))
    return np.concatenate([ones, sizes if stage == "picture" else np.concatenate([sizes, sizes**2], axis=1)], axis=1)


def fit(columns: np.ndarray, seconds: Sequence[float]) -> np.ndarray:
    """Coefficients >= 0 that minimise the sum of squared relative errors; float64 [k].

    Non-negative least squares over every subset of the few columns (Lawson and Hanson's problem, solved by trying
    all): a cost cannot be negative, and a fit that says otherwise goes wrong just outside its points.
    """
    target = np.array(seconds, np.float64)
    scaled = np.asarray(columns, np.float64) / target[:, None]
    size = scaled.shape[1]
    best, least = np.zeros(size), math.inf
    for count in range(1, size + 1):
        for chosen in itertools.combinations(range(size), count):
            part = scaled[:, chosen]
            norms = np.linalg.norm(part, axis=0)  # columns differ by many orders of magnitude
            solution = np.linalg.lstsq(part / norms, np.ones(len(target)), rcond=None)[0] / norms
            error = float(((part @ solution - 1) ** 2).sum())
            if (solution >= 0).all() and error < least:
                best, least = np.zeros(size), error
                best[list(chosen)] = solution
    return best


def bundle_id(bundle: Bundle) -> str:
    """Identity of the graphs and weights, whatever the folder is called; golden vectors do not count."""
    engines = {name: f.sha256 for name, f in bundle.files.items() if ".onnx" in name}
    return hashlib.sha256(json.dumps(engines, sort_keys=True).encode()).hexdigest()[:16]


def profile_path(bundle: Bundle, machine: Machine) -> Path:
    """Where the profile of a bundle on a machine is kept: $EDGEVL_CACHE, else $XDG_CACHE_HOME/edgevl, else
    ~/.cache/edgevl, in the folder `profiles`."""
    own, system = os.environ.get("EDGEVL_CACHE"), os.environ.get("XDG_CACHE_HOME")
    cache = Path(own) if own else (Path(system) if system else Path.home() / ".cache") / "edgevl"
    key = hashlib.sha256(json.dumps(asdict(machine), sort_keys=True).encode()).hexdigest()[:8]
    return cache / "profiles" / f"{bundle_id(bundle)}-{key}.json"
