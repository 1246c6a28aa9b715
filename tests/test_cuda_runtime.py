"""CudaRuntime over a library of Python functions: which device is the thread's, and what memory a Jetson has."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from edgevl.runtime import cuda_memory, engine
from edgevl.runtime.cuda_memory import CudaRuntime
from edgevl.runtime.engine import GpuOptions, engine_status, open_engine
from edgevl.runtime.errors import EngineError
from edgevl.runtime.gpu import Gpu

GB = 10**9
MEMINFO = "MemTotal:       7620000 kB\nMemFree:         300000 kB\nMemAvailable:   5000000 kB\n"


class Cudart:
    """As ctypes calls it: outputs through `byref`, 0 for success. Notes the device at every call that depends on it."""

    def __init__(self, integrated: bool = False, free: int = GB, total: int = 8 * GB, devices: int = 2) -> None:
        self.integrated, self.free, self.total, self.devices = integrated, free, total, devices
        self.current = threading.local()
        self.seen: list[tuple[str, int]] = []

    def _note(self, name: str) -> int:
        self.seen.append((name, getattr(self.current, "device", 0)))
        return 0

    def cudaSetDevice(self, device: int) -> int:
        self.current.device = device
        return 0

    def cudaGetDeviceCount(self, count: Any) -> int:
        count._obj.value = self.devices
        return 0

    def cudaDeviceGetAttribute(self, value: Any, number: int, device: int) -> int:
        value._obj.value = {75: 8, 76: 7, 18: int(self.integrated)}[number]
        return 0

    def cudaMemGetInfo(self, free: Any, total: Any) -> int:
        free._obj.value, total._obj.value = self.free, self.total
        return self._note("cudaMemGetInfo")

    def cudaMalloc(self, pointer: Any, nbytes: int) -> int:
        return self._note("cudaMalloc")

    def cudaHostAlloc(self, pointer: Any, nbytes: int, flags: int) -> int:
        pointer._obj.value = 4096  # never read
        return self._note("cudaHostAlloc")

    def cudaStreamCreateWithFlags(self, pointer: Any, flags: int) -> int:
        return self._note("cudaStreamCreateWithFlags")

    def cudaFree(self, pointer: int) -> int:
        return 0

    cudaFreeHost = cudaStreamDestroy = cudaFree

    def cudaGetLastError(self) -> int:
        return 0


@pytest.fixture
def cudart(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Cudart]:
    def make(**fields: Any) -> Cudart:
        library = Cudart(**fields)
        monkeypatch.setattr(cuda_memory, "_load", lambda: (library, "libcudart"))
        return library

    return make


def test_what_depends_on_the_device_makes_it_the_threads_first(cudart: Callable[..., Cudart]) -> None:
    """CUDA's current device is each thread's own, 0 at first; and another runtime of this process may have set it."""
    library = cudart()
    cuda = CudaRuntime(1)
    CudaRuntime(0)

    def work() -> None:
        cuda.allocate(8, "x", "y")
        cuda.pinned(8)
        cuda.stream()
        cuda.memory()

    work()
    with ThreadPoolExecutor(1) as pool:
        pool.submit(work).result()
    assert len(library.seen) == 8 and {device for _, device in library.seen} == {1}


def test_memory_of_a_jetson_counts_what_the_kernel_gives_back(
    cudart: Callable[..., Cudart], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a plan was read or copied most of the memory is page cache, which cudaMemGetInfo does not count as free."""
    (tmp_path / "meminfo").write_text(MEMINFO)
    monkeypatch.setattr(cuda_memory, "MEMINFO", tmp_path / "meminfo")
    cudart(integrated=True, free=300_000 * 1024, total=7_620_000 * 1024)
    assert CudaRuntime().memory() == (5_000_000 * 1024, 7_620_000 * 1024)
    cudart(integrated=True, free=6 * GB)
    assert CudaRuntime().memory() == (6 * GB, 8 * GB)
    cudart(integrated=True, free=GB, total=2 * GB)
    assert CudaRuntime().memory() == (2 * GB, 2 * GB)  # no more than there is
    cudart(integrated=False)
    assert CudaRuntime().memory() == (GB, 8 * GB)  # a card has memory of its own
    for text in (None, "", "MemTotal: 5 kB\n"):
        (tmp_path / "meminfo").unlink(missing_ok=True)
        if text is not None:
            (tmp_path / "meminfo").write_text(text)
        cudart(integrated=True)
        assert CudaRuntime().memory() == (GB, 8 * GB)


# ---------------------------------------------------------------------- which GPU an engine is judged by


GPUS = [Gpu("Small", (7, 5), 4 * GB), Gpu("Large", (9, 0), 80 * GB)]


@pytest.fixture
def two_gpus(cudart: Callable[..., Cudart], monkeypatch: pytest.MonkeyPatch) -> None:
    cudart()
    monkeypatch.setattr(engine, "current_gpu", lambda number=0: GPUS[number] if number < len(GPUS) else None)
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["CUDAExecutionProvider"])
    monkeypatch.setattr("edgevl.runtime.ort_cuda_engine.provider_problem", lambda: None)


def test_an_engine_is_judged_by_the_gpu_that_was_asked_for(two_gpus: None) -> None:
    details = [{s.name: s.detail for s in engine_status(None, number)} for number in (0, 1)]
    assert details[0]["ort-cuda"].endswith("with CUDA on Small (7.5)")
    assert details[1]["ort-cuda"].endswith("with CUDA on Large (9.0)")


def test_a_gpu_that_is_not_there_is_told(two_gpus: None, monkeypatch: pytest.MonkeyPatch) -> None:
    detail = {s.name: s.detail for s in engine_status(None, 2)}["ort-cuda"]
    assert detail == "GPU 2 does not exist; expected a number from 0 to 1"
    monkeypatch.setattr(engine, "current_gpu", lambda number=0: None)
    assert {s.name: s.detail for s in engine_status(None, 2)}["ort-cuda"].startswith("no NVIDIA GPU is found")


def test_opening_asks_about_the_gpu_of_its_options(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[object, ...]] = []

    def status(*arguments: object) -> list[Any]:
        asked.append(arguments)
        raise EngineError("enough")

    monkeypatch.setattr(engine, "engine_status", status)
    bundle: Any = object()
    for number in (0, 1):
        with pytest.raises(EngineError, match="enough"):
            open_engine(bundle, "ort-cuda", gpu=GpuOptions(number))
    assert asked == [(bundle, 0), (bundle, 1)]


def test_plans_are_chosen_for_the_gpu_that_was_asked_for(two_gpus: None, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, int]] = []

    def choose(bundle: Any, plans: Any, versions: Any, capability: tuple[int, int]) -> tuple[None, list[str]]:
        seen.append(capability)
        return None, ["x: of another device"]

    monkeypatch.setattr("edgevl.runtime.plan_choice.choose_plans", choose)
    monkeypatch.setattr("edgevl.runtime.plans.find_plans", lambda bundle: None)
    monkeypatch.setattr("edgevl.runtime.tensorrt_library.find_tensorrt", lambda flavour=None: None)
    monkeypatch.setattr("edgevl.runtime.tensorrt_library.installed_versions", dict)
    bundle: Any = type("Bundle", (), {"requires": {"tensorrt": "10"}})()
    for number in (0, 1):
        with pytest.raises(EngineError, match="no plans of the bundle fit: x: of another device; run `edgevl build`"):
            engine._tensorrt(bundle, number)
    assert seen == [(7, 5), (9, 0)]
