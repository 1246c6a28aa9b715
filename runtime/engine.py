"""Engines by name: which can run a bundle on this machine, and opening one. Never falls back silently."""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from edgevl.runtime.bundle import NATIVE_DECODER, Bundle
from edgevl.runtime.errors import EdgeVLError, EngineError, InputError
from edgevl.runtime.gpu import Gpu, current_gpu
from edgevl.runtime.graph_spec import GraphSpec
from edgevl.runtime.kv_cache import CacheView, KVCache

__all__ = [
    "DEFAULT_GPU",
    "ENGINES",
    "Engine",
    "EngineLimits",
    "EngineStatus",
    "GpuOptions",
    "GraphRunner",
    "choose_engine",
    "engine_status",
    "open_engine",
    "usable_cores",
]

ENGINES = ("ort-cpu", "openvino", "ort-cuda", "tensorrt")
# Of `auto`: the fastest first. OpenVINO has to be asked for: it is faster on some processors and takes more memory.
PREFERENCE = ("tensorrt", "ort-cuda", "ort-cpu")


@dataclass(frozen=True)
class GpuOptions:
    """How a GPU is used.

    device: its number. memory: bytes that ONNX Runtime's arena may take, all by default; TensorRT takes what its plans
    need. cuda_graph: capture the decode step and replay it; None: TensorRT yes, ONNX Runtime no.
    """

    device: int = 0
    memory: int | None = None
    cuda_graph: bool | None = None

    def __post_init__(self) -> None:
        if self.device < 0:
            raise InputError(f"GPU number is {self.device}, expected 0 or more")
        if self.memory is not None and self.memory < 1:
            raise InputError(f"GPU memory limit is {self.memory} bytes, expected at least 1")


DEFAULT_GPU = GpuOptions()


@dataclass(frozen=True)
class EngineLimits:
    """The largest requests that an engine takes; None: no limit of its own."""

    capacity: int | None = None  # tokens of a KV cache, exactly
    prefill: int | None = None  # tokens of a prompt that go through at once
    rows: int | None = None  # of a batch


class GraphRunner(Protocol):
    """One graph, ready to run."""

    spec: GraphSpec

    def run(self, feeds: Mapping[str, Any], cache: CacheView | None = None) -> dict[str, Any]:
        """Run once. `feeds` has every input but the cache's; the cache is updated in place and not returned.

        Values are numpy arrays; an engine on a GPU gives image embeddings as a DeviceTensor, and takes them.
        """
        ...


class Engine(Protocol):
    """The graphs of one bundle on one device. `prefill` is `decoder` where the bundle has no graph for prefill."""

    limits: EngineLimits

    @property
    def name(self) -> str: ...

    @property
    def vision(self) -> GraphRunner: ...

    @property
    def decoder(self) -> GraphRunner: ...

    @property
    def prefill(self) -> GraphRunner: ...

    def new_cache(self, capacity: int, batch: int = 1) -> KVCache:
        """An empty KV cache where this engine wants it: host or device memory.

        Raises:
            CapacityError: more rows, or another capacity, than the engine takes.
            EngineError: too little memory.
        """
        ...

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


def engine_status(bundle: Bundle | None = None, gpu: int = 0) -> list[EngineStatus]:
    """Which engines could run here, on GPU number `gpu` where they need one, and `bundle` if one is given, in the order
    of ENGINES; for `edgevl doctor`, for `auto` and for errors. Imports an engine library where installed."""
    checks: dict[str, Callable[[Bundle | None], str]] = {
        "ort-cpu": _ort_cpu,
        "openvino": _openvino,
        "ort-cuda": lambda of: _ort_cuda(of, gpu),
        "tensorrt": lambda of: _tensorrt(of, gpu),
    }
    found = []
    for name in ENGINES:
        try:
            found.append(EngineStatus(name, True, checks[name](bundle)))
        except EdgeVLError as e:
            found.append(EngineStatus(name, False, str(e)))
    return found


def open_engine(
    bundle: Bundle,
    name: str = "auto",
    threads: int | None = None,
    notice: Callable[[str], None] | None = None,
    gpu: GpuOptions = DEFAULT_GPU,
) -> Engine:
    """Open the engine `name` for `bundle`; `auto` takes TensorRT plans that fit this machine, then CUDA, then the CPU,
    and tells `notice` which it took and why not those before it.

    Raises:
        EngineError: unknown name, or an engine that cannot run this bundle here.
    """
    if name != "auto" and name not in ENGINES:
        raise EngineError(f"engine {name!r} is unknown; expected auto, {', '.join(ENGINES)}")
    if threads is not None and threads < 1:  # before `auto` says anything
        raise InputError(f"threads is {threads}, expected at least 1")
    status = {s.name: s for s in engine_status(bundle, gpu.device)}
    if name == "auto":
        name = _first_usable(bundle, status, notice)
    elif not status[name].usable:
        raise EngineError(f"engine {name!r} cannot run here: {status[name].detail}; `edgevl doctor` lists what can")
    if name == "tensorrt":
        from edgevl.runtime.trt_engine import TrtEngine

        return TrtEngine(bundle, gpu, notice)
    if name == "ort-cuda":
        from edgevl.runtime.ort_cuda_engine import OrtCudaEngine

        return OrtCudaEngine(bundle, gpu)
    if name == "openvino":
        from edgevl.runtime.openvino_engine import OpenVinoEngine

        return OpenVinoEngine(bundle, threads)
    from edgevl.runtime.ort_engine import OrtEngine

    return OrtEngine(bundle, threads=threads)


def choose_engine(bundle: Bundle, notice: Callable[[str], None] | None = None, gpu: int = 0) -> str:
    """The engine that `auto` stands for on GPU number `gpu`; `notice` is told which, and why not those before it.

    Raises:
        EngineError: none can run this bundle here.
    """
    return _first_usable(bundle, {s.name: s for s in engine_status(bundle, gpu)}, notice)


def _first_usable(bundle: Bundle, status: Mapping[str, EngineStatus], notice: Callable[[str], None] | None) -> str:
    ordered = [status[name] for name in PREFERENCE]
    usable = [s for s in ordered if s.usable]
    if not usable:
        reasons = "; ".join(f"{s.name}: {s.detail}" for s in ordered)
        raise EngineError(f"{bundle.folder}: no engine is usable here: {reasons}")
    chosen = usable[0]
    if notice is not None:
        skipped = [f"not {s.name}: {s.detail}" for s in ordered[: ordered.index(chosen)]]
        notice("; ".join([f"engine: {chosen.name} ({chosen.detail})", *skipped]))
    return chosen.name


# ---------------------------------------------------------------------- one engine each: a detail, or why not


def _onnxruntime() -> str:
    version = _version("onnxruntime", "onnxruntime-gpu")
    if version is None:
        raise EngineError("onnxruntime is not installed; pip install 'edgevl[ort]'")
    return version


def _ort_cpu(bundle: Bundle | None) -> str:
    version = _onnxruntime()
    if bundle is not None and "onnxruntime" not in bundle.requires:
        raise EngineError(
            f"the bundle was exported for {bundle.target!r}, not for ONNX Runtime; export with --target cpu"
        )
    return f"onnxruntime {version}, {usable_cores()} cores{_kernels(bundle)}"


def _kernels(bundle: Bundle | None) -> str:
    """`, own kernels (avx512-vnni)`, or why a decoder that could use them does not."""
    from edgevl.runtime.native_kernels import kernel_instructions

    if bundle is not None and NATIVE_DECODER not in bundle.graphs:
        return ""
    try:
        return f", own kernels ({kernel_instructions()})"
    except EngineError as e:
        return f"; {e}"


def _openvino(bundle: Bundle | None) -> str:
    from edgevl.runtime.openvino_engine import openvino_version, prompts_on_openvino, vision_on_openvino

    if bundle is not None and bundle.target != "cpu":
        raise EngineError(f"the bundle was exported for {bundle.target!r}; export with --target cpu")
    parts = [
        ("vision", bundle is None or vision_on_openvino(bundle)),
        ("prompts", bundle is None or prompts_on_openvino(bundle)),
    ]
    what = " and ".join(name for name, there in parts if there) or "nothing here"
    return f"openvino {openvino_version()} for {what}, onnxruntime {_onnxruntime()} for the rest{_kernels(bundle)}"


def _ort_cuda(bundle: Bundle | None, number: int) -> str:
    if bundle is not None and bundle.target != "cuda":
        raise EngineError(f"the bundle was exported for {bundle.target!r}; export with --target cuda")
    gpu, version = _gpu(number), _onnxruntime()
    import onnxruntime

    from edgevl.runtime.ort_cuda_engine import provider_problem

    providers = onnxruntime.get_available_providers()
    if "CUDAExecutionProvider" not in providers:
        raise EngineError(
            f"onnxruntime {version} has {', '.join(providers)}; pip uninstall onnxruntime, then "
            "pip install 'edgevl[ort-gpu]' for CUDA"
        )
    problem = provider_problem()
    if problem is not None:
        raise EngineError(f"onnxruntime {version}: {problem}")
    return f"onnxruntime {version} with CUDA on {_described(gpu)}"


def _tensorrt(bundle: Bundle | None, number: int) -> str:
    from edgevl.runtime.plan_choice import choose_plans
    from edgevl.runtime.plans import find_plans
    from edgevl.runtime.tensorrt_library import find_tensorrt, installed_versions

    if bundle is not None and "tensorrt" not in bundle.requires:
        raise EngineError(
            f"the bundle was exported for {bundle.target!r}; export with --target tensorrt (10.15 or newer) or jetpack6"
        )
    library = find_tensorrt()
    gpu = _gpu(number)
    if bundle is None:
        return f"{library.name} on {_described(gpu)}"
    chosen, reasons = choose_plans(bundle, find_plans(bundle), installed_versions(), gpu.capability)
    if chosen is None:
        if not reasons:
            raise EngineError("the bundle has no TensorRT plans; run `edgevl build` on it here")
        raise EngineError(f"no plans of the bundle fit: {'; '.join(reasons)}; run `edgevl build` here")
    return f"{chosen.flavour} {chosen.version}, plans {chosen.folder.name}, on {_described(gpu)}"


def _gpu(number: int) -> Gpu:
    """GPU `number`. Raises EngineError where there is none, or CUDA's runtime is missing."""
    from edgevl.runtime.cuda_memory import CudaRuntime

    gpu = current_gpu(number)
    if gpu is None and (number == 0 or current_gpu() is None):
        raise EngineError("no NVIDIA GPU is found (libcuda, the driver's library, is missing or has no device)")
    CudaRuntime(number)  # says how many there are
    if gpu is None:
        raise EngineError(f"GPU {number} does not answer; try another --gpu")
    return gpu


def _described(gpu: Gpu) -> str:
    """`NVIDIA H100 (9.0)`."""
    return "{} ({}.{})".format(gpu.name, *gpu.capability)


def _version(*packages: str) -> str | None:
    for package in packages:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None
