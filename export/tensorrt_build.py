"""From the graphs of a bundle to TensorRT plans: profiles, a strongly typed build, files named by version and device.

Plans are made in a folder beside the final one and renamed when all are there, so a build that dies leaves nothing
that opens. With TensorRT-RTX it needs no GPU: the compute capabilities are named.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgevl.export.build_progress import progress_monitor
from edgevl.export.plan_profiles import decoder_profiles, plan_limits, vision_profile
from edgevl.export.swap import swap
from edgevl.runtime.bundle import Bundle, file_sha256
from edgevl.runtime.cuda_memory import CudaRuntime
from edgevl.runtime.doctor import peak_rss_bytes
from edgevl.runtime.errors import BundleError, EngineError, InputError
from edgevl.runtime.gpu import current_gpu
from edgevl.runtime.plans import (
    ENGINES_FOLDER,
    PlanFile,
    PlanProfile,
    PlanSet,
    plan_folder_name,
)
from edgevl.runtime.tensorrt_library import BuildLog, TensorRT, find_tensorrt

__all__ = ["BuildOptions", "BuildReport", "PlanReport", "build_plans"]

Progress = Callable[[str, str, int, int], None]  # plan, phase, step, steps
_NO_INT4 = (7, 5)


@dataclass(frozen=True)
class BuildOptions:
    """How to build. `None` takes the default in brackets.

    targets: compute capabilities such as `sm86`, for a build without the device [the GPU of this machine].
    flavour: `tensorrt` or `tensorrt_rtx` [whichever is installed; TensorRT-RTX where targets are named].
    rows: of a batch that decodes together. prefill: tokens of a prompt that go through at once [1024, or the cache].
    frames: of a video that are encoded at once. min_pixels, max_pixels: of a frame [the bundle's, as far as the KV
    cache can hold its tokens]. workspace: bytes that kernels may use beside weights and activations [the device's].
    timing_cache: file that keeps what was timed, for the next build (not for targets without their GPU). gpu: number of
    the GPU of this machine to build on. weight_streaming: weights for which there is no room may stay in host memory.
    """

    targets: tuple[str, ...] = ()
    device_name: str | None = None
    flavour: str | None = None
    rows: int = 1
    prefill: int | None = None
    frames: int = 1
    min_pixels: int | None = None
    max_pixels: int | None = None
    workspace: int | None = None
    timing_cache: Path | None = None
    weight_streaming: bool = False
    refit: bool = False
    optimization_level: int | None = None
    gpu: int | None = None


@dataclass(frozen=True)
class PlanReport:
    role: str
    nbytes: int
    seconds: float
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class BuildReport:
    plans: PlanSet
    parts: tuple[PlanReport, ...]
    peak_rss_bytes: int
    notes: tuple[str, ...]


def build_plans(
    bundle: Bundle, options: BuildOptions = BuildOptions(), *, overwrite: bool = False, progress: Progress | None = None
) -> BuildReport:
    """Build the plans of `bundle` into `engines/<flavour>-<version>-<device>/` and describe them in `plans.json`.

    Raises:
        EngineError: no TensorRT (says what to install), no GPU and no targets, a version that is too old, a build that
            TensorRT refuses.
        InputError: an option out of range, a compute capability that cannot be built for.
        BundleError: a bundle for another engine, plans that exist already, a full disk.
    """
    _check_target(bundle)
    library = find_tensorrt(options.flavour or ("tensorrt_rtx" if options.targets else None))
    device, capabilities = _device(library, options)
    _check_version(bundle, library)
    _check_int4(bundle, capabilities)
    if options.targets and options.refit:
        raise InputError("plans that can be refitted are built on their GPU only; leave --for or --refit away")
    limits = plan_limits(bundle, options)
    folder = bundle.path(ENGINES_FOLDER) / plan_folder_name(library.flavour, library.version, device)
    _check_folder(bundle, folder, overwrite)
    profiles = {
        "vision": (vision_profile(bundle.graphs["vision"].spec, limits),),
        "decoder": decoder_profiles(bundle.graphs["decoder"].spec, limits),
    }
    plans, reports, notes = {}, [], []
    with _partial(folder) as partial:
        for role, ranges in profiles.items():
            tell = None if progress is None else _bound(progress, role)
            build = _Build(library, options, capabilities, tell)
            report = build.run(role, bundle.path(bundle.graphs[role].file), ranges, partial / f"{role}.plan")
            reports.append(report)
            notes += [n for n in build.notes if n not in notes]
            plans[role] = PlanFile(
                file=f"{role}.plan",
                size=report.nbytes,
                sha256=file_sha256(partial / f"{role}.plan"),
                dtype=bundle.graphs[role].spec.input("rotary_cos").dtype,
                sources=_sources(bundle, role),
                profiles=ranges,
            )
        PlanSet(
            folder=partial,
            flavour=library.flavour,
            version=library.version,
            device=device,
            capabilities=capabilities,
            capacity=limits.capacity,
            max_rows=limits.rows,
            max_prefill=limits.prefill,
            min_patches=limits.min_patches,
            max_patches=limits.max_patches,
            plans=plans,
            weight_streaming=options.weight_streaming,
        ).write()
    return BuildReport(PlanSet.read(folder), tuple(reports), peak_rss_bytes(), tuple(notes))


# ---------------------------------------------------------------------- one build


class _Build:
    """One plan. `targets` empty: for the GPU of this machine."""

    def __init__(
        self,
        library: TensorRT,
        options: BuildOptions,
        capabilities: Sequence[tuple[int, int]],
        progress: Callable[[str, int, int], None] | None,
    ) -> None:
        self._library, self._options, self._progress = library, options, progress
        self._named = [f"SM{major}{minor}" for major, minor in capabilities] if options.targets else []
        self.notes: list[str] = []

    def run(self, role: str, graph: Path, profiles: Sequence[PlanProfile], output: Path) -> PlanReport:
        started = time.monotonic()
        trt, log = self._library.module, BuildLog(self._library)
        builder = trt.Builder(log.logger)
        flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
        # The network must outlive the parser, which refers to it.
        network = builder.create_network(0 if flag is None else 1 << int(flag))
        parser = trt.OnnxParser(network, log.logger)
        if not parser.parse_from_file(str(graph)):
            raise EngineError(f"{graph}: {self._library.name} cannot read it: {_parse_error(parser)}")
        config = builder.create_builder_config()
        self._configure(trt, config, network)
        for ranges in profiles:
            config.add_optimization_profile(_trt_profile(builder, ranges))
        with _interruptible() as cancelled:
            # Without a progress to tell too: it is how Ctrl-C ends a build.
            monitor = progress_monitor(self._library, self._progress or _tell_nobody, cancelled)
            if monitor is not None:
                config.progress_monitor = monitor
            log.forget_errors()
            plan = builder.build_serialized_network(network, config)
            if cancelled():
                raise KeyboardInterrupt
        if plan is None:
            raise EngineError(f"{graph}: {self._library.name} cannot build it: {log.reason()}")
        output.write_bytes(memoryview(plan))
        self._save_timing(trt, config)
        del parser, network
        warnings = [w for w in log.warnings if "Int64 binding" not in w]  # meant: ids and slots are int64
        return PlanReport(role, output.stat().st_size, time.monotonic() - started, tuple(warnings))

    def _configure(self, trt: Any, config: Any, network: Any) -> None:
        options = self._options
        if options.workspace is not None:
            config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace)
        if options.optimization_level is not None:
            config.builder_optimization_level = options.optimization_level
        for wanted, flag in ((options.weight_streaming, "WEIGHT_STREAMING"), (options.refit, "REFIT")):
            if wanted and not hasattr(trt.BuilderFlag, flag):
                raise EngineError(f"{self._library.name} has no {flag.lower().replace('_', ' ')}; leave it away")
            if wanted:
                config.set_flag(getattr(trt.BuilderFlag, flag))
        # TensorRT-RTX only; standard TensorRT builds for the GPU here, and `_device` let nothing else through.
        known = getattr(trt, "ComputeCapability", None)
        if (
            known is not None
            and hasattr(config, "num_compute_capabilities")
            and hasattr(config, "set_compute_capability")
        ):
            names = self._named or ["CURRENT"]
            config.num_compute_capabilities = len(names)
            for i, name in enumerate(names):
                config.set_compute_capability(getattr(known, name), i)
        self._load_timing(config)

    def _load_timing(self, config: Any) -> None:
        path = self._options.timing_cache
        if path is None:
            return
        if self._named:
            self.notes.append("no timing cache: kernels are not timed in a build without the device")
            return
        known = path.read_bytes() if path.is_file() else b""
        cache = config.create_timing_cache(known)
        if not config.set_timing_cache(cache, False):  # of another device or version
            self.notes.append(f"{path} is of another device or version of TensorRT: started afresh")
            config.set_timing_cache(config.create_timing_cache(b""), False)

    def _save_timing(self, trt: Any, config: Any) -> None:
        path = self._options.timing_cache
        cache = None if path is None or self._named else config.get_timing_cache()
        if path is None or cache is None:
            return
        partial = path.with_name(f".{path.name}.partial")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            partial.write_bytes(memoryview(cache.serialize()))
            partial.replace(path)
        except OSError as e:
            self.notes.append(f"the timing cache {path} cannot be written ({e})")
            partial.unlink(missing_ok=True)


def _trt_profile(builder: Any, ranges: PlanProfile) -> Any:
    profile = builder.create_optimization_profile()
    for name, shape in ranges.shapes.items():
        profile.set_shape(name, shape.min, shape.opt, shape.max)
    return profile


def _parse_error(parser: Any) -> str:
    errors = [parser.get_error(i) for i in range(parser.num_errors)]
    if not errors:
        return "it gave no reason"
    node = errors[0].node_name() if hasattr(errors[0], "node_name") else ""
    return " ".join(f"{node}: {errors[0].desc()}".split())


# ---------------------------------------------------------------------- what must hold before


def _check_target(bundle: Bundle) -> None:
    if "tensorrt" not in bundle.requires:
        raise BundleError(
            f"{bundle.folder}: exported for {bundle.target!r}, not for TensorRT; export with --target tensorrt "
            "(10.15 or newer, JetPack 7.2) or --target jetpack6 (10.3 to 10.13)"
        )


def _check_version(bundle: Bundle, library: TensorRT) -> None:
    least = bundle.requires["tensorrt"]
    # TensorRT-RTX counts its versions from 1 and has read opset 24 from the first release we know.
    if library.flavour == "tensorrt" and not library.at_least(least):
        raise EngineError(
            f"{library.name} is too old for {bundle.folder}, which needs {least}; export with --target jetpack6 for "
            "TensorRT 10.3 to 10.13"
        )


def _device(library: TensorRT, options: BuildOptions) -> tuple[str, tuple[tuple[int, int], ...]]:
    """Name and compute capabilities to build for."""
    known = library.targets()
    if options.targets and options.gpu is not None:
        raise InputError("plans for named targets are built on no GPU; leave --for or --gpu away")
    if options.targets:
        if not known:
            raise InputError(
                f"{library.name} builds for the GPU of this machine only; for others, pip install tensorrt-rtx"
            )
        odd = [t for t in options.targets if t not in known]
        if odd:
            raise InputError(
                f"{library.name} does not build for {', '.join(odd)}; expected some of {', '.join(known)}"
                " (a Jetson, and other GPUs, build on the device with their own TensorRT)"
            )
        names = sorted(set(options.targets), key=known.index)
        return options.device_name or "+".join(names), tuple(_capability(n) for n in names)
    number = options.gpu or 0
    gpu = current_gpu(number)
    if number and current_gpu() is not None:
        CudaRuntime(number)  # TensorRT builds for the thread's device; says how many there are
    if gpu is None:
        hint = (
            f"name what to build for with --for ({', '.join(known)})"
            if known
            else ("build on the device, or pip install tensorrt-rtx and name what to build for with --for")
        )
        raise EngineError(f"no GPU is found here; {hint}")
    return options.device_name or gpu.name, (gpu.capability,)


def _capability(name: str) -> tuple[int, int]:
    match = re.fullmatch(r"sm(\d+)(\d)", name)
    if match is None:
        raise InputError(f"compute capability {name!r}, expected a name such as sm86")
    return int(match[1]), int(match[2])


def _check_int4(bundle: Bundle, capabilities: Sequence[tuple[int, int]]) -> None:
    if _NO_INT4 in capabilities and bundle.graphs["decoder"].precision == "int4":
        raise InputError("int4 weights have no kernels on sm75 (Turing); build for newer GPUs, or export in fp16")


def _check_folder(bundle: Bundle, folder: Path, overwrite: bool) -> None:
    if not folder.exists() or overwrite:
        return
    try:
        found = PlanSet.read(folder)
    except BundleError:
        return  # damaged: replaced
    if found.stale(bundle) is None:
        raise BundleError(f"{folder}: exists already; pass --overwrite to build it again")


def _sources(bundle: Bundle, role: str) -> dict[str, str]:
    graph = bundle.graphs[role].file
    return {name: entry.sha256 for name, entry in bundle.files.items() if name in (graph, f"{graph}.data")}


@contextmanager
def _partial(target: Path) -> Iterator[Path]:
    """A folder that takes the place of `target` if the block completes, and disappears if it does not."""
    target = Path(os.path.realpath(target))
    partial = target.with_name(f".{target.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)  # of a build that was killed
        partial.mkdir(parents=True)
        yield partial
        swap(partial, target)
    except OSError as e:
        raise BundleError(f"{target}: cannot be written ({e.strerror or e})") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        with suppress(OSError):  # empty after a first build that failed
            target.parent.rmdir()


@contextmanager
def _interruptible() -> Iterator[Callable[[], bool]]:
    """Ctrl-C as a flag that the progress monitor reads: TensorRT does not return to Python's own handler."""
    pressed = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield pressed.is_set
        return
    before = signal.signal(signal.SIGINT, lambda *_: pressed.set())
    try:
        yield pressed.is_set
    finally:
        signal.signal(signal.SIGINT, before)


def _tell_nobody(phase: str, step: int, steps: int) -> None:
    pass


def _bound(progress: Progress, role: str) -> Callable[[str, int, int], None]:
    return lambda phase, step, steps: progress(role, phase, step, steps)
