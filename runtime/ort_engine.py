"""ONNX Runtime: sessions over a bundle's graphs, bound so that the KV cache is read and written in place."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import RLock
from typing import Any

import numpy as np
import onnxruntime as ort

from edgevl.runtime.bundle import NATIVE_ROLES, Bundle
from edgevl.runtime.engine import EngineLimits, GraphRunner, usable_cores
from edgevl.runtime.errors import EngineError, EngineFailedError, InputError
from edgevl.runtime.graph_spec import APPENDED, GraphSpec
from edgevl.runtime.kv_cache import CacheView, KVCache
from edgevl.runtime.native_kernels import kernel_instructions, native_library, native_role, uses_native_kernels
from edgevl.runtime.trt_feeds import is_tensorrt_spec, store_appended, tensorrt_feeds

__all__ = ["OrtEngine", "OrtGraph", "check_signature", "check_version"]

_MADV_DONTNEED = 4
# Held while sessions map files or unmap them, and while pages of mapped files are given back: what is unmapped
# meanwhile may be somebody's memory by then, and be lost.
_MAPPINGS = RLock()
PROVIDER = "CPUExecutionProvider"


class OrtGraph:
    """One session. The providers that it got are asserted: ONNX Runtime falls back to the CPU without raising.

    Args:
        operators: a library of operators that the graph uses, see `edgevl.runtime.native_kernels`.
    """

    def __init__(
        self,
        path: Path,
        spec: GraphSpec,
        threads: int,
        shrink_arena: bool = False,
        trace: Path | None = None,
        operators: Path | None = None,
    ) -> None:
        self.spec = spec
        options = ort.SessionOptions()
        if trace is not None:
            options.enable_profiling, options.profile_file_prefix = True, str(trace)
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        # Workers of one session that go on spinning take cores from another's: a step in a pause of the encoder.
        options.add_session_config_entry("session.intra_op.spin_duration_us", "1000")
        options.log_severity_level = 3
        # A memory pattern holds a second copy of a shape's activations beside the arena, and what it holds is not given
        # back by shrinking: prompts and pictures come in all shapes.
        options.enable_mem_pattern = False
        # A graph written for TensorRT runs here too, for its numbers; it takes a mask instead of lengths.
        self._for_tensorrt = is_tensorrt_spec(spec)
        if self._for_tensorrt:  # as it stands: fused, ONNX Runtime would round activations in front of int4 weights
            options.add_session_config_entry("session.disable_quant_qdq", "1")
        try:
            if operators is not None:
                options.register_custom_ops_library(str(operators))
            self._session = ort.InferenceSession(str(path), options, providers=[PROVIDER])
        except Exception as e:  # onnxruntime raises its own classes, undocumented
            raise EngineError(
                f"{path}: onnxruntime {ort.__version__} cannot load it: {str(e).splitlines()[0]}"
            ) from None
        if self._session.get_providers() != [PROVIDER]:
            raise EngineError(f"{path}: asked for {PROVIDER}, got {self._session.get_providers()}")
        check_signature(path, spec, [i.name for i in self._session.get_inputs()])
        self._run_options = ort.RunOptions()
        self._run_options.log_severity_level = 4  # what fails is raised
        if shrink_arena:
            # Pictures come in all sizes: without this the largest one's activations stay allocated for ever.
            self._run_options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
        self._binding: tuple[tuple[Any, ...], ort.IOBinding] | None = None
        self._dtypes = {t.name: np.dtype(t.dtype) for t in spec.inputs}
        self._cached = dict(spec.cache)
        self._appends = spec.cache_update == APPENDED
        presents = set() if self._appends else set(self._cached.values())
        self._outputs = [t.name for t in spec.outputs if t.name not in presents]

    def end_trace(self) -> Path:
        """Stop keeping times of operators; where those kept so far are (a Chrome trace, JSON)."""
        return Path(self._session.end_profiling())

    def run(self, feeds: Mapping[str, np.ndarray], cache: CacheView | None = None) -> dict[str, np.ndarray]:
        wanted, lengths = feeds.get("logits_rows"), feeds.get("seqlens_k")
        if self._for_tensorrt:
            past = np.asarray(lengths, np.int64) + 1 - np.shape(feeds["input_ids"])[1]
            feeds = tensorrt_feeds(feeds, self.spec)
        binding = self._bound_to(cache)
        alive = []  # the binding holds pointers, not references
        for name, value in feeds.items():
            array = np.ascontiguousarray(value, self._dtypes[name])
            alive.append(array)
            binding.bind_cpu_input(name, array)
        for name in self._outputs:
            binding.bind_output(name, "cpu")
        try:
            self._session.run_with_iobinding(binding, self._run_options)
        except Exception as e:
            what = f"graph {self.spec.name!r}: onnxruntime failed: {str(e).splitlines()[0]}"
            raise EngineFailedError(what) from None
        # Outputs come in the order in which they were bound: the cache's first, then ours.
        values = binding.get_outputs()[-len(self._outputs) :]
        found = {name: value.numpy() for name, value in zip(self._outputs, values)}
        if not self._for_tensorrt:
            return found
        if self._appends and cache is not None:
            store_appended(cache.buffers, found, past, self.spec)
        return {"logits": found["logits"][: np.size(wanted)]}

    def _bound_to(self, cache: CacheView | None) -> ort.IOBinding:
        """A binding with the cache's buffers in it, kept while they are the same: there are over a hundred to bind,
        0.4 of 28 ms of a step of the 2B. All else is bound anew for every run."""
        if cache is None:  # nothing to keep, and a kept binding would hold the last outputs
            return self._session.io_binding()
        key = tuple((b.__array_interface__["data"][0], b.shape) for b in cache.buffers.values())
        if self._binding is None or self._binding[0] != key:
            binding = self._session.io_binding()
            for name, buffer in cache.buffers.items():
                where = ("cpu", 0, buffer.dtype, buffer.shape, buffer.ctypes.data)
                binding.bind_input(name, *where)
                if not self._appends:
                    binding.bind_output(self._cached[name], *where)
            self._binding = key, binding
        return self._binding[1]


def check_signature(path: Path, spec: GraphSpec, inputs: Sequence[str]) -> None:
    """Raises EngineError where a graph's inputs are not those of the manifest."""
    if set(inputs) != {t.name for t in spec.inputs}:
        raise EngineError(f"{path}: inputs {sorted(inputs)} are not those of the manifest; export the bundle again")


class OrtEngine:
    """All graphs of a bundle on the CPU.

    Args:
        threads: worker threads of each session; the cores that the process may use by default.
        trace: a folder where every graph keeps the times of its operators (`OrtGraph.end_trace`).
    """

    name = "ort-cpu"

    def __init__(self, bundle: Bundle, threads: int | None = None, trace: Path | None = None) -> None:
        if threads is not None and threads < 1:
            raise InputError(f"threads is {threads}, expected at least 1")
        check_version(bundle)
        self._trace = trace
        self.threads = threads or usable_cores()
        self.kernels = kernel_instructions() if uses_native_kernels(bundle) else ""  # our own, of the decoder
        # Repacking weights is most of the time of opening, and each session does it on one thread.
        roles = self._roles(bundle)
        with _MAPPINGS, ThreadPoolExecutor(len(roles)) as pool:
            opened = dict(zip(roles, pool.map(lambda role: self._open(bundle, role), roles)))
            release_weight_files(bundle)
        self._graphs: dict[str, GraphRunner] = opened
        self.limits = EngineLimits()

    def _roles(self, bundle: Bundle) -> list[str]:
        return [role for role in bundle.graphs if role in NATIVE_ROLES]

    def _open(self, bundle: Bundle, role: str) -> GraphRunner:
        native = native_role(bundle, role)
        graph = bundle.graphs[native or role]
        trace = None if self._trace is None else self._trace / role
        operators = None if native is None else native_library()
        return OrtGraph(bundle.path(graph.file), graph.spec, self.threads, role == "vision", trace, operators)

    @property
    def graphs(self) -> Mapping[str, GraphRunner]:
        """By role: vision, decoder, and prefill in hybrid bundles."""
        return self._graphs

    @property
    def vision(self) -> GraphRunner:
        return self._graphs["vision"]

    @property
    def decoder(self) -> GraphRunner:
        return self._graphs["decoder"]

    @property
    def prefill(self) -> GraphRunner:
        return self._graphs.get("prefill", self.decoder)

    def new_cache(self, capacity: int, batch: int = 1) -> KVCache:
        return KVCache(self.decoder.spec, capacity, batch)

    def close(self) -> None:
        """Free the sessions; the engine cannot run afterwards."""
        with _MAPPINGS:
            self._graphs.clear()


def release_weight_files(bundle: Bundle) -> None:
    """See release_file_pages."""
    release_file_pages([bundle.path(name) for name in bundle.files if name.endswith(".data")])


def release_file_pages(paths: Sequence[Path]) -> None:
    """Give back the resident pages of mapped weight files; those still used come back from the page cache.

    ONNX Runtime copies what it repacks, but the pages that it read for that stay resident (233 MB for the embedding
    of a 2B model, of which a prompt uses a few rows). Mappings that hold pages written to are left alone; that the file
    itself is still on its way to the disk, as after an export, is no reason to. Linux only.
    """
    smaps, wanted = Path("/proc/self/smaps"), {str(p.resolve()) for p in paths}
    if not smaps.exists():
        return
    libc = ctypes.CDLL(None, use_errno=True)
    region: tuple[int, int] | None = None
    with _MAPPINGS:
        for line in smaps.read_text(errors="replace").splitlines():
            head = line.split(maxsplit=5)
            if "-" in head[0] and not head[0].endswith(":"):
                start, _, end = head[0].partition("-")
                is_ours = len(head) == 6 and head[5] in wanted
                region = (int(start, 16), int(end, 16)) if is_ours else None
            elif region is not None and head[0] == "Anonymous:" and head[1] == "0":
                libc.madvise(ctypes.c_void_p(region[0]), ctypes.c_size_t(region[1] - region[0]), _MADV_DONTNEED)


def check_version(bundle: Bundle) -> None:
    least = bundle.requires.get("onnxruntime")
    if least is None:
        raise EngineError(
            f"{bundle.folder}: exported for {bundle.target!r}, not for ONNX Runtime; export with --target cpu"
        )
    have = tuple(int(p) for p in ort.__version__.split(".")[:2])
    if have < tuple(int(p) for p in least.split(".")[:2]):
        raise EngineError(
            f"onnxruntime {ort.__version__} is too old for this bundle, it needs {least}; pip install -U onnxruntime"
        )
