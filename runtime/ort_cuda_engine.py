"""ONNX Runtime on CUDA: sessions whose inputs, outputs and KV cache stay on the device.

The provider is asserted twice: the session refuses nodes on the CPU, and the providers that it got are compared with
the one that was asked for. Small inputs go over in one copy; image embeddings come from the vision session and go to
the decoder where they are; only logits are copied back. With `cuda_graph` a decode step is captured and replayed, per
number of rows and set of cache buffers. The providers' options are those of onnxruntime 1.23 and later.
"""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from edgevl.runtime.bundle import Bundle
from edgevl.runtime.cuda_memory import CudaRuntime, Stream, gigabytes
from edgevl.runtime.device_cache import BufferPool, DeviceKVCache
from edgevl.runtime.device_tensor import DeviceTensor, Rows, Staging
from edgevl.runtime.engine import DEFAULT_GPU, EngineLimits, GpuOptions
from edgevl.runtime.errors import EngineError, EngineFailedError
from edgevl.runtime.graph_spec import GraphSpec
from edgevl.runtime.kv_cache import CacheView
from edgevl.runtime.ort_engine import check_signature, check_version

__all__ = [
    "GraphNumbers",
    "OrtCudaEngine",
    "OrtCudaGraph",
    "check_providers",
    "cuda_session",
    "output_shape",
    "provider_problem",
]

PROVIDER = "CUDAExecutionProvider"
_ON_CPU = ("total_sequence_length",)  # GroupQueryAttention reads it on the host
_NO_GRAPH = "-1"
_NO_PROVIDER = "it has no CUDA provider; pip uninstall onnxruntime, then pip install 'edgevl[ort-gpu]'"
_LIBRARIES = (
    "install the CUDA and cuDNN that it was built for (pip install 'onnxruntime-gpu[cuda,cudnn]'; on a Jetson the "
    "wheel made for your JetPack)"
)
MAX_GRAPHS = 16  # ONNX Runtime frees captured graphs with the session only
_PROBE_S = 120
# What a process of its own runs: says which library the CUDA provider lacks. With none lacking it may die as it loads
# (1.26 and 1.28 do where onnxruntime has not set its side up, as a session does), which is no problem.
_PROBE = """
import contextlib, ctypes, io, os, sys
sys.path[:] = sys.argv[1].split(os.pathsep)
import onnxruntime
if hasattr(onnxruntime, "preload_dlls"):
    with contextlib.redirect_stdout(io.StringIO()):
        onnxruntime.preload_dlls(directory="")
try:
    for path in sys.argv[2:]:
        ctypes.CDLL(path, ctypes.RTLD_GLOBAL)
except OSError as e:
    print(" ".join(str(e).split()))
    sys.exit(3)
"""


def cuda_session(path: Path, options: GpuOptions, capture: bool) -> ort.InferenceSession:
    """A session that runs wholly on CUDA.

    Raises:
        EngineError: the provider is missing or does not load here, a node would run on the CPU, or anything else that
            ONNX Runtime objects to.
    """
    settings = ort.SessionOptions()
    settings.log_severity_level = 4  # what goes wrong is raised below
    settings.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    settings.add_session_config_entry("session.use_device_allocator_for_initializers", "1")
    provider = {
        "device_id": str(options.device),
        "arena_extend_strategy": "kSameAsRequested",
        "enable_cuda_graph": "1" if capture else "0",
        "use_tf32": "0",  # float32 is chosen where float16 overflows: then it should be float32
    }
    if options.memory is not None:
        provider["gpu_mem_limit"] = str(options.memory)
    if PROVIDER not in ort.get_available_providers():
        raise EngineError(f"{path}: onnxruntime {ort.__version__} cannot run it on CUDA: {_NO_PROVIDER}")
    ort.set_default_logger_severity(4)
    if hasattr(ort, "preload_dlls"):  # CUDA and cuDNN out of the nvidia-* packages, where they are installed
        with contextlib.redirect_stdout(io.StringIO()):  # it prints what it does not find
            ort.preload_dlls(directory="")
    try:
        # Without its own fallback, which prints to stdout and goes on with the CPU.
        session = ort.InferenceSession(str(path), settings, providers=[(PROVIDER, provider)], enable_fallback=0)
    except Exception as e:  # onnxruntime raises its own classes, undocumented
        raise EngineError(_explain(path, " ".join(str(e).split()), options)) from None
    check_providers(path, session.get_providers())
    return session


def provider_problem() -> str | None:
    """Why ONNX Runtime's CUDA provider cannot be loaded here (which library is missing), or None where it can, as far
    as can be told without a session."""
    if PROVIDER not in ort.get_available_providers():
        return _NO_PROVIDER
    folder = Path(ort.__file__).parent / "capi"
    libraries = [str(folder / f"libonnxruntime_providers_{name}.so") for name in ("shared", "cuda")]
    if not sys.executable or not all(Path(library).exists() for library in libraries):
        return None  # other names, as on Windows; the session will tell
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-c", _PROBE, os.pathsep.join(filter(None, sys.path)), *libraries],
            capture_output=True, text=True, errors="replace", timeout=_PROBE_S, check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return None
    if done.returncode != 3:
        return None
    return f"its CUDA provider does not load: {done.stdout.strip().splitlines()[-1]}; {_LIBRARIES}"


def check_providers(path: Path, got: Sequence[str]) -> None:
    """Raises EngineError where a session is not on CUDA: ONNX Runtime falls back to the CPU without raising."""
    if not got or got[0] != PROVIDER:
        raise EngineError(
            f"{path}: asked for {PROVIDER}, got {', '.join(got)}: onnxruntime {ort.__version__} could not use CUDA; "
            "`edgevl doctor` says more, or run with --engine ort-cpu"
        )


def _explain(path: Path, reason: str, options: GpuOptions) -> str:
    head = f"{path}: onnxruntime {ort.__version__} cannot run it on CUDA: "
    if "fallback to CPU EP has been explicitly disabled" in reason:
        problem = provider_problem() or "the provider did not start or lacks an operator; `edgevl doctor` says more"
        return f"{head}{problem}, or use --engine ort-cpu"
    if "Failed to allocate memory" in reason or "out of memory" in reason:
        limit = "" if options.memory is None else f" (the limit is {gigabytes(options.memory)})"
        return f"{head}not enough GPU memory{limit}: {reason[:200]}"
    return f"{head}{_cause(reason)}"


def _cause(reason: str) -> str:
    """CUDA's own words, where they are in what onnxruntime says: templates and source lines come before them."""
    start = reason.find("CUDA failure")
    return reason[:300] if start < 0 else reason[start:].partition(" ; ")[0][:300]


class GraphNumbers:
    """Numbers for captured decode steps by what must be the same for a replay: rows and addresses. None once there
    are too many."""

    def __init__(self, most: int = MAX_GRAPHS) -> None:
        self._most = most
        self._numbers: dict[tuple[int, ...], int] = {}

    def number(self, key: tuple[int, ...]) -> int | None:
        if key not in self._numbers and len(self._numbers) < self._most:
            self._numbers[key] = len(self._numbers) + 1
        return self._numbers.get(key)


class OrtCudaGraph:
    """One session.

    Args:
        merged: patches that become one image token. keep: outputs that stay on the device.
    """

    def __init__(
        self,
        path: Path,
        spec: GraphSpec,
        cuda: CudaRuntime,
        stream: Stream,
        options: GpuOptions,
        merged: int,
        keep: tuple[str, ...] = (),
    ) -> None:
        self.spec = spec
        self._cuda, self._stream, self._device, self._keep = cuda, stream, options.device, keep
        self._merged = merged
        self._capture = bool(options.cuda_graph) and bool(spec.cache)
        self._session: ort.InferenceSession | None = cuda_session(path, options, self._capture)
        check_signature(path, spec, [i.name for i in self._session.get_inputs()])
        self._dtypes = {t.name: np.dtype(t.dtype) for t in spec.inputs}
        self._cached = dict(spec.cache)
        presents = set(self._cached.values())
        self._outputs = {t.name: t for t in spec.outputs if t.name not in presents}
        self._staging: dict[int | None, Staging] = {}  # a captured step has its own: its addresses must stay
        self._results: dict[tuple[str, tuple[int, ...]], DeviceTensor] = {}
        self._totals: dict[int, np.ndarray] = {}
        self._graphs = GraphNumbers()

    def run(self, feeds: Mapping[str, Rows], cache: CacheView | None = None) -> dict[str, Any]:
        """Run once. `image_embeds` may be a DeviceTensor. Outputs in `keep` are DeviceTensors, the others numpy."""
        if self._session is None:
            raise EngineError(f"graph {self.spec.name!r} is closed; open the model again")
        self._cuda.use()
        wanted = np.size(feeds["logits_rows"]) if "logits_rows" in feeds else None
        if (
            wanted == 0
        ):  # a chunk in the middle of a prompt: one row is computed and dropped, kernels see no empty tensor
            feeds = {**feeds, "logits_rows": np.zeros(1, np.int64)}
        number = self._graph_number(feeds, cache)
        if number is not None and cache is not None:
            capacity = next(iter(cache.buffers.values())).shape[2]
            feeds = {**feeds, "total_sequence_length": self._total(capacity)}
        binding, alive = self._session.io_binding(), []
        alive.append(self._bind_inputs(binding, feeds, number))
        for name, buffer in ({} if cache is None else cache.buffers).items():
            where = ("cuda", self._device, np.dtype(buffer.dtype), buffer.shape, buffer.pointer)
            binding.bind_input(name, *where)
            binding.bind_output(self._cached[name], *where)
        results = self._bind_outputs(binding, feeds)
        options = ort.RunOptions()
        if self._capture:
            options.add_run_config_entry("gpu_graph_id", _NO_GRAPH if number is None else str(number))
        self._stream.synchronize()  # the inputs are there; ONNX Runtime has a stream of its own
        try:
            self._session.run_with_iobinding(binding, options)
        except Exception as e:
            what = f"graph {self.spec.name!r}: onnxruntime failed: {_cause(' '.join(str(e).split()))}"
            raise EngineFailedError(what) from None
        found: dict[str, Any] = {}
        for name, tensor in results.items():
            found[name] = tensor if name in self._keep else tensor.numpy()
        if wanted == 0:
            found["logits"] = found["logits"][:0]
        return found

    def close(self) -> None:
        """Free the session and what it works in, whoever still holds this object."""
        self._session = None
        self._staging.clear()
        self._results.clear()

    def _graph_number(self, feeds: Mapping[str, Rows], cache: CacheView | None) -> int | None:
        """Number of the captured graph for this step; None where it is not one token per row, or not wanted."""
        if not self._capture or cache is None or np.shape(feeds["input_ids"])[1] != 1 or len(feeds["image_embeds"]):
            return None
        pointers = (b.pointer for b in cache.buffers.values())
        return self._graphs.number((len(feeds["input_ids"]), *pointers))

    def _total(self, capacity: int) -> np.ndarray:
        """A captured step sees the largest length there can be, at one host address: lengths are in seqlens_k."""
        return self._totals.setdefault(capacity, np.array([capacity], np.int32))

    def _bind_inputs(self, binding: Any, feeds: Mapping[str, Rows], number: int | None) -> list[object]:
        alive: list[object] = []  # the binding holds pointers, not references
        small: dict[str, np.ndarray] = {}
        for name, value in feeds.items():
            dtype = self._dtypes[name]
            if isinstance(value, DeviceTensor) and value.dtype == dtype.name:
                binding.bind_input(name, "cuda", self._device, dtype, value.shape, value.pointer)
                alive.append(value)
            elif name in _ON_CPU:
                array = np.ascontiguousarray(value, dtype)
                binding.bind_input(name, "cpu", 0, dtype, array.shape, array.ctypes.data)
                alive.append(array)
            else:
                small[name] = np.ascontiguousarray(value, dtype)
        staging = self._staging.setdefault(number, Staging(self._cuda, self._stream))
        for name, pointer in staging.write(small).items():
            binding.bind_input(name, "cuda", self._device, small[name].dtype, small[name].shape, pointer)
        staging.send()
        return alive

    def _bind_outputs(self, binding: Any, feeds: Mapping[str, Rows]) -> dict[str, DeviceTensor]:
        """Outputs in memory of ours: those that stay get memory of their own, the others one place per shape."""
        results = {}
        for name, tensor in self._outputs.items():
            shape = output_shape(self.spec, name, feeds, self._merged)
            key = (name, shape)
            if name in self._keep or key not in self._results:
                self._results.pop(key, None)
                advice = "lower --max-pixels, or free GPU memory"
                count = int(np.prod(shape)) * np.dtype(tensor.dtype).itemsize
                memory = self._cuda.allocate(count, f"output {name!r}", advice)
                results[name] = DeviceTensor(memory, self._stream, tensor.dtype, shape)
                if name not in self._keep:
                    self._results[key] = results[name]
            else:
                results[name] = self._results[key]
            where = results[name]
            binding.bind_output(name, "cuda", self._device, np.dtype(tensor.dtype), shape, where.pointer)
        return results


def output_shape(spec: GraphSpec, name: str, feeds: Mapping[str, Rows], merged: int) -> tuple[int, ...]:
    """Shape of the output `name`, from those of the feeds: image tokens, or rows of logits."""
    tensor = next(t for t in spec.outputs if t.name == name)
    if name == "image_embeds":
        frames, patches, _ = np.shape(feeds["patches"])
        return (frames * patches // merged, int(tensor.shape[1]))
    return (int(np.size(feeds["logits_rows"])), int(tensor.shape[1]))


class OrtCudaEngine:
    """All graphs of a bundle on one GPU. Never run on a GPU so far: its parts are tested without one.

    Raises:
        EngineError: a bundle for another target, no CUDA here, a provider that does not load, too little memory.
    """

    name = "ort-cuda"

    def __init__(self, bundle: Bundle, options: GpuOptions = DEFAULT_GPU) -> None:
        check_version(bundle)
        self._cuda = CudaRuntime(options.device)
        self._stream = self._cuda.stream()
        self._pool = BufferPool(self._cuda, self._stream)
        self.limits = EngineLimits()
        self._graphs: dict[str, OrtCudaGraph] = {r: self._open(bundle, r, options) for r in bundle.graphs}

    def _open(self, bundle: Bundle, role: str, options: GpuOptions) -> OrtCudaGraph:
        graph = bundle.graphs[role]
        keep = ("image_embeds",) if role == "vision" else ()
        merged = bundle.model.vision.spatial_merge_size**2
        return OrtCudaGraph(bundle.path(graph.file), graph.spec, self._cuda, self._stream, options, merged, keep)

    @property
    def vision(self) -> OrtCudaGraph:
        return self._graphs["vision"]

    @property
    def decoder(self) -> OrtCudaGraph:
        return self._graphs["decoder"]

    @property
    def prefill(self) -> OrtCudaGraph:
        return self._graphs.get("prefill", self.decoder)

    def new_cache(self, capacity: int, batch: int = 1) -> DeviceKVCache:
        return DeviceKVCache(self.decoder.spec, capacity, batch, self._pool, self._stream)

    def close(self) -> None:
        """Free the sessions and the pooled memory; the engine cannot run afterwards."""
        for graph in self._graphs.values():
            graph.close()
        self._graphs.clear()
        self._pool.close()
