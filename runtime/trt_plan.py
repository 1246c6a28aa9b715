"""One TensorRT plan, opened: its engine, its execution contexts, the weights that may stay in host memory, and what
TensorRT-RTX compiled for this machine. Knows no model."""

from __future__ import annotations

import mmap
from contextlib import suppress
from pathlib import Path
from typing import Any

from edgevl.runtime.cuda_memory import CudaRuntime, DeviceBuffer, Stream
from edgevl.runtime.errors import EngineError, EngineFailedError
from edgevl.runtime.tensorrt_library import BuildLog, TensorRT
from edgevl.runtime.trt_shapes import check_device_memory

__all__ = ["Context", "Plan"]


class Plan:
    """One deserialized engine and how contexts of it are made.

    Args:
        streams: built with weight streaming, so that weights for which there is no room stay in host memory.
        spare: bytes of device memory that such weights leave free.
    """

    def __init__(
        self, library: TensorRT, path: Path, cuda: CudaRuntime, role: str, streams: bool = False, spare: int = 0
    ) -> None:
        self._library, self._cuda, self._path = library, cuda, path
        short = None if streams else check_device_memory(f"the {role} plan", path.stat().st_size, *cuda.memory())
        if short is not None:
            raise EngineError(f"{path}: {short}")
        cuda.use()
        trt = library.module
        self.log = BuildLog(library)
        self._runtime = trt.Runtime(self.log.logger)
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            self.engine = self._runtime.deserialize_cuda_engine(data)
        if self.engine is None:
            raise EngineError(f"{path}: {library.name} cannot open it: {self.log.reason()}; run `edgevl build` again")
        if self.engine.streamable_weights_size > 0:
            self._stream_weights(spare)
        self.cache_file = path.with_suffix(".runtime-cache")
        self._config, self._runtime_cache = self._open_cache()

    def _stream_weights(self, spare: int) -> None:
        """Say how much of the weights may lie on the device: all of them would, where nothing is said. The sizes of
        scratch memory follow from it, and no context may be there yet."""
        free, _ = self._cuda.memory()
        budget = min(int(self.engine.get_weight_streaming_automatic_budget()), max(0, free - spare))
        try:
            self.engine.weight_streaming_budget_v2 = budget
        except RuntimeError as e:
            raise EngineError(
                f"{self._path}: {self._library.name} does not stream weights with {budget:,} bytes of them on the GPU: "
                f"{self.log.reason() if self.log.errors else e}; build without --weight-streaming"
            ) from None

    @property
    def scratch_bytes(self) -> int:
        """Device memory for activations of whichever profile needs most."""
        return max(
            int(self.engine.get_device_memory_size_for_profile_v2(i))
            for i in range(self.engine.num_optimization_profiles)
        )

    def context(self, profile: int, scratch: DeviceBuffer, stream: Stream) -> Context:
        trt = self._library.module
        strategy = trt.ExecutionContextAllocationStrategy.USER_MANAGED
        if self._config is not None:
            self._config.set_execution_context_allocation_strategy(strategy)
            context = self.engine.create_execution_context(self._config)
        else:
            context = self.engine.create_execution_context(strategy)
        if context is None:
            raise EngineError(f"{self._path}: no execution context: {self.log.reason()}")
        context.set_device_memory(scratch.pointer, scratch.nbytes)
        if not context.set_optimization_profile_async(profile, stream.pointer):
            raise EngineError(f"{self._path}: profile {profile} cannot be set: {self.log.reason()}")
        stream.synchronize()
        return Context(context, self.log, stream, self._path.name)

    def _open_cache(self) -> tuple[Any, Any]:
        """TensorRT-RTX compiles kernels on the target; a cache beside the plan keeps them for the next start."""
        if not hasattr(self.engine, "create_runtime_config") or not hasattr(self._library.module, "IRuntimeCache"):
            return None, None
        config = self.engine.create_runtime_config()
        runtime_cache = config.create_runtime_cache()
        with suppress(OSError):  # none yet
            runtime_cache.deserialize(
                self.cache_file.read_bytes()
            )  # of another device or driver: refused, and written anew
        config.set_runtime_cache(runtime_cache)
        return config, runtime_cache

    def save_runtime_cache(self) -> None:
        """Best effort: a bundle may lie where nothing can be written."""
        if self._runtime_cache is None:
            return
        partial = self.cache_file.with_name(f".{self.cache_file.name}.partial")
        try:
            partial.write_bytes(memoryview(self._runtime_cache.serialize()))
            partial.replace(self.cache_file)
        except OSError:
            with suppress(OSError):
                partial.unlink(missing_ok=True)


class Context:
    """An execution context of one profile; remembers shapes and addresses, and sets only what has changed."""

    def __init__(self, context: Any, log: BuildLog, stream: Stream, name: str) -> None:
        self._context, self._log, self._stream, self._name = context, log, stream, name
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}

    def shape(self, name: str, shape: tuple[int, ...]) -> None:
        if self._shapes.get(name) != shape:
            self._check(self._context.set_input_shape(name, shape), f"shape {list(shape)} of {name!r}")
            self._shapes[name] = shape

    def address(self, name: str, pointer: int) -> None:
        if self._addresses.get(name) != pointer:
            self._check(self._context.set_tensor_address(name, pointer), f"the address of {name!r}")
            self._addresses[name] = pointer

    def enqueue(self) -> None:
        self._check(self._context.execute_async_v3(self._stream.pointer), "the call")

    def _check(self, accepted: bool, what: str) -> None:
        if not accepted:
            raise EngineFailedError(f"{self._name}: TensorRT refused {what}: {self._log.reason()}")
