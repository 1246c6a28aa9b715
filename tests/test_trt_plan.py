"""Opening a plan over a TensorRT of Python classes: weights that stream, scratch memory, reasons of refusals."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import Pair
from host_memory import HostCuda

from edgevl.export.exporter import ExportOptions, export_bundle
from edgevl.runtime.bundle import Bundle
from edgevl.runtime.device_cache import BufferPool, DeviceKVCache
from edgevl.runtime.errors import EngineError
from edgevl.runtime.tensorrt_library import BuildLog, TensorRT
from edgevl.runtime.trt_plan import Plan
from edgevl.runtime.trt_shapes import cache_bytes

WEIGHTS, AUTOMATIC = 4000, 3000  # bytes of a plan's weights, and of them what TensorRT would put on the device


class Device(HostCuda):
    def use(self) -> None:
        pass


class FakeEngine:
    """Scratch memory depends on the weights' budget, and the budget is fixed once there are contexts."""

    num_optimization_profiles = 2

    def __init__(self, streams: bool, refuses: bool = False) -> None:
        self.streamable_weights_size = WEIGHTS if streams else 0
        self.refuses = refuses
        self.budget = self.streamable_weights_size  # all, where nothing is said

    def get_weight_streaming_automatic_budget(self) -> int:
        return AUTOMATIC

    @property
    def weight_streaming_budget_v2(self) -> int:
        return self.budget

    @weight_streaming_budget_v2.setter
    def weight_streaming_budget_v2(self, budget: int) -> None:
        if self.refuses:
            raise RuntimeError("Failed to set weight streaming budget!")
        self.budget = budget

    def get_device_memory_size_for_profile_v2(self, profile: int) -> int:
        return 100 * profile + (50 if self.budget < self.streamable_weights_size else 0)


class Logger:
    Severity = SimpleNamespace(ERROR=1, WARNING=2)


def library(engine: FakeEngine | None) -> TensorRT:
    def runtime(logger: Any) -> Any:
        return SimpleNamespace(deserialize_cuda_engine=lambda data: engine)

    return TensorRT("tensorrt", SimpleNamespace(__version__="10.16.2", ILogger=Logger, Runtime=runtime))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "decoder.plan").write_bytes(bytes(5000))
    return tmp_path / "decoder.plan"


@pytest.mark.parametrize(
    ("spare", "budget"), [(0, AUTOMATIC), (1000, AUTOMATIC), (2500, 2000), (9000, 0)], ids=lambda n: f"{n}"
)
def test_weights_for_which_there_is_no_room_stay_on_the_host(path: Path, spare: int, budget: int) -> None:
    """A device smaller than the plan: the rest is for the KV cache. The scratch memory is that of the budget."""
    engine = FakeEngine(streams=True)
    plan = Plan(library(engine), path, Device(total=4500), "decoder", streams=True, spare=spare)
    assert engine.budget == budget and plan.scratch_bytes == 150


def test_weights_that_do_not_stream_need_their_room(path: Path) -> None:
    engine = FakeEngine(streams=False)
    with pytest.raises(EngineError, match=r"decoder\.plan: the decoder plan needs 0\.00 GB of GPU memory"):
        Plan(library(engine), path, Device(total=4500), "decoder")
    assert Plan(library(engine), path, Device(total=6000), "decoder").scratch_bytes == 100 and engine.budget == 0


def test_a_budget_that_is_refused_is_one_line(path: Path) -> None:
    with pytest.raises(
        EngineError,
        match=r"decoder\.plan: TensorRT 10\.16\.2 does not stream weights with 3,000 bytes .*; build without",
    ):
        Plan(library(FakeEngine(streams=True, refuses=True)), path, Device(), "decoder", streams=True)


def test_a_kv_cache_is_as_large_as_is_reckoned(tiny: Pair, tmp_path: Path) -> None:
    export_bundle(tiny.checkpoint, tmp_path / "b", ExportOptions("fp16", target="tensorrt", max_tokens=64))
    spec = Bundle.open(tmp_path / "b").graphs["decoder"].spec
    cuda = Device()
    stream = cuda.stream()
    assert cache_bytes(spec, 3, 64) == DeviceKVCache(spec, 64, 3, BufferPool(cuda, stream), stream).nbytes


def test_the_reason_is_the_last_error_and_short() -> None:
    log = BuildLog(library(None))
    assert log.reason() == "it gave no reason"
    for severity, text in ((1, "an old one"), (2, "a warning"), (1, "Error Code 4:\n  API Usage Error")):
        log.logger.log(severity, text)
    assert log.reason() == "Error Code 4: API Usage Error" and list(log.warnings) == ["a warning"]
    log.forget_errors()
    assert log.reason() == "it gave no reason" and list(log.warnings) == ["a warning"]
    for i in range(1000):  # a server asks for years
        log.logger.log(1, f"{i} " + "x" * 9999)
    assert len(log.errors) == 100 and log.reason().startswith("999 xxx") and len(log.reason()) < 700
