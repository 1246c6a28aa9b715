"""ONNX Runtime: sessions over a bundle's graphs, bound so that the KV cache is read and written in place."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnxruntime as ort

from edgevl.runtime.bundle import Bundle
from edgevl.runtime.engine import usable_cores
from edgevl.runtime.errors import EngineError, InputError
from edgevl.runtime.graph_spec import GraphSpec
from edgevl.runtime.kv_cache import CacheView

__all__ = ["OrtEngine", "OrtGraph"]

PROVIDER = "CPUExecutionProvider"


class OrtGraph:
    """One session. The providers that it got are asserted: ONNX Runtime falls back to the CPU without raising."""

    def __init__(self, path: Path, spec: GraphSpec, threads: int, shrink_arena: bool = False) -> None:
        self.spec = spec
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        try:
            self._session = ort.InferenceSession(str(path), options, providers=[PROVIDER])
        except Exception as e:  # onnxruntime raises its own classes, undocumented
            raise EngineError(
                f"{path}: onnxruntime {ort.__version__} cannot load it: {str(e).splitlines()[0]}"
            ) from None
        if self._session.get_providers() != [PROVIDER]:
            raise EngineError(f"{path}: asked for {PROVIDER}, got {self._session.get_providers()}")
        self._check_signature(path)
        self._run_options = ort.RunOptions()
        if shrink_arena:
            # Pictures come in all sizes: without this the largest one's activations stay allocated for ever.
            self._run_options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
        self._dtypes = {t.name: np.dtype(t.dtype) for t in spec.inputs}
        self._cached = dict(spec.cache)
        presents = set(self._cached.values())
        self._outputs = [t.name for t in spec.outputs if t.name not in presents]

    def run(self, feeds: Mapping[str, np.ndarray], cache: CacheView | None = None) -> dict[str, np.ndarray]:
        binding = self._session.io_binding()
        alive = []  # the binding holds pointers, not references
        for name, value in feeds.items():
            array = np.ascontiguousarray(value, self._dtypes[name])
            alive.append(array)
            binding.bind_cpu_input(name, array)
        for name, buffer in ({} if cache is None else cache.buffers).items():
            where = ("cpu", 0, buffer.dtype, buffer.shape, buffer.ctypes.data)
            binding.bind_input(name, *where)
            binding.bind_output(self._cached[name], *where)
        for name in self._outputs:
            binding.bind_output(name, "cpu")
        try:
            self._session.run_with_iobinding(binding, self._run_options)
        except Exception as e:
            raise EngineError(f"graph {self.spec.name!r}: onnxruntime failed: {str(e).splitlines()[0]}") from None
        # Outputs come in the order in which they were bound: the cache's first, then ours.
        values = binding.get_outputs()[-len(self._outputs) :]
        return {name: value.numpy() for name, value in zip(self._outputs, values)}

    def _check_signature(self, path: Path) -> None:
        found = {i.name for i in self._session.get_inputs()}
        if found != {t.name for t in self.spec.inputs}:
            raise EngineError(f"{path}: inputs {sorted(found)} are not those of the manifest; export the bundle again")


class OrtEngine:
    """All graphs of a bundle on the CPU.

    Args:
        threads: worker threads of each session; the cores that the process may use by default.
    """

    name = "ort-cpu"

    def __init__(self, bundle: Bundle, threads: int | None = None) -> None:
        if threads is not None and threads < 1:
            raise InputError(f"threads is {threads}, expected at least 1")
        _check_version(bundle)
        self.threads = threads or usable_cores()
        graphs = bundle.graphs
        self.vision = OrtGraph(bundle.path(graphs["vision"].file), graphs["vision"].spec, self.threads, True)
        self.decoder = OrtGraph(bundle.path(graphs["decoder"].file), graphs["decoder"].spec, self.threads)
        self.prefill = self.decoder
        if "prefill" in graphs:
            self.prefill = OrtGraph(bundle.path(graphs["prefill"].file), graphs["prefill"].spec, self.threads)

    def close(self) -> None:
        del self.vision, self.decoder, self.prefill


def _check_version(bundle: Bundle) -> None:
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
