"""Engines by name: which can run a bundle on this machine, and opening one. Never falls back silently."""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from edgevl.runtime.bundle import Bundle
from edgevl.runtime.errors import EngineError
from edgevl.runtime.graph_spec import GraphSpec
from edgevl.runtime.kv_cache import CacheView

__all__ = ["ENGINES", "Engine", "EngineStatus", "GraphRunner", "engine_status", "open_engine", "usable_cores"]

ENGINES = ("ort-cpu", "ort-cuda", "tensorrt")


class GraphRunner(Protocol):
    """One graph, ready to run."""

    spec: GraphSpec

    def run(self, feeds: Mapping[str, np.ndarray], cache: CacheView | None = None) -> dict[str, np.ndarray]:
        """Run once. `feeds` has every input but the cache's; the cache is updated in place and not returned."""
        ...


class Engine(Protocol):
    """The graphs of one bundle on one device. `prefill` is `decoder` where the bundle has no graph for prefill."""

    @property
    def name(self) -> str: ...

    @property
    def vision(self) -> GraphRunner: ...

    @property
    def decoder(self) -> GraphRunner: ...

    @property
    def prefill(self) -> GraphRunner: ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class EngineStatus:
    name: str
    usable: bool
    detail: str  # version and providers, or why not and what to do


def usable_cores() -> int:
    """Cores that this process may use (its affinity, not the machine's count)."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not Linux
        return os.cpu_count() or 1


def engine_status() -> list[EngineStatus]:
    """Which engines could run here, for `edgevl doctor` and for errors; imports an engine library where installed."""
    found: list[EngineStatus] = []
    version = _version("onnxruntime", "onnxruntime-gpu")
    if version is None:
        missing = "onnxruntime is not installed; pip install 'edgevl[ort]'"
        found += [EngineStatus("ort-cpu", False, missing), EngineStatus("ort-cuda", False, missing)]
    else:
        import onnxruntime

        providers = onnxruntime.get_available_providers()
        found.append(EngineStatus("ort-cpu", True, f"onnxruntime {version}, {usable_cores()} cores"))
        cuda = "CUDAExecutionProvider" in providers
        detail = f"onnxruntime {version} has the CUDA provider, but this edgevl exports no bundle for it yet"
        missing = f"onnxruntime {version} has {', '.join(providers)}; pip install 'edgevl[ort-gpu]' for CUDA"
        found.append(EngineStatus("ort-cuda", False, detail if cuda else missing))
    trt = _version("tensorrt", "tensorrt-cu12", "tensorrt-cu13", "tensorrt-rtx")
    detail = "tensorrt is not installed" if trt is None else f"tensorrt {trt} is here"
    found.append(EngineStatus("tensorrt", False, f"{detail}; this edgevl builds no TensorRT plans yet"))
    return found


def open_engine(
    bundle: Bundle, name: str = "auto", threads: int | None = None, notice: Callable[[str], None] | None = None
) -> Engine:
    """Open the engine `name` for `bundle`; `auto` takes the first that is usable and tells `notice` which and why.

    Raises:
        EngineError: unknown name, or an engine that cannot run this bundle here.
    """
    if name != "auto" and name not in ENGINES:
        raise EngineError(f"engine {name!r} is unknown; expected auto, {', '.join(ENGINES)}")
    status = {s.name: s for s in engine_status()}
    if name == "auto":
        usable = [s for s in status.values() if s.usable]
        if not usable:
            raise EngineError(
                "no engine is usable here: " + "; ".join(f"{s.name}: {s.detail}" for s in status.values())
            )
        name = usable[0].name
        if notice is not None:
            notice(f"engine: {name} ({status[name].detail}); the only one usable for this bundle, see `edgevl doctor`")
    elif not status[name].usable:
        raise EngineError(f"engine {name!r} cannot run here: {status[name].detail}; `edgevl doctor` lists what can")
    from edgevl.runtime.ort_engine import OrtEngine

    return OrtEngine(bundle, threads=threads)


def _version(*packages: str) -> str | None:
    for package in packages:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None
