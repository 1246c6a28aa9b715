"""OpenVINO for the vision encoder, ONNX Runtime for the decoder: one bundle of `--target cpu`, the same files.

OpenVINO reads the encoder's ONNX graph as it is. It has attention in bfloat16 where the processor multiplies that
(AVX512-BF16, AMX), which large pictures are bound by, and its int8 kernels round activations as they come.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from edgevl.runtime.bundle import Bundle
from edgevl.runtime.engine import GraphRunner, usable_cores
from edgevl.runtime.errors import EngineError
from edgevl.runtime.graph_spec import GraphSpec
from edgevl.runtime.kv_cache import CacheView
from edgevl.runtime.ort_engine import OrtEngine, check_signature, release_file_pages

__all__ = ["LEAST_OPENVINO", "OpenVinoEngine", "OpenVinoGraph", "openvino_version", "without_row_scales"]

LEAST_OPENVINO = "2026.4"  # 2025.4 crashes on the encoder; nothing between was tried


def openvino_version() -> str:
    """The installed version, such as `2026.4.1`.

    Raises:
        EngineError: it is not installed, or too old.
    """
    try:
        version = importlib.metadata.version("openvino")
    except importlib.metadata.PackageNotFoundError:
        raise EngineError("openvino is not installed; pip install 'edgevl[openvino]'") from None
    if [int(p) for p in version.split(".")[:2]] < [int(p) for p in LEAST_OPENVINO.split(".")]:
        raise EngineError(f"openvino {version} is too old, {LEAST_OPENVINO} is needed; pip install -U openvino")
    return version


def without_row_scales(model: Any) -> int:
    """Undo, in an openvino.Model, the scaling of rows by which the ONNX Runtime dialect makes a per-tensor kernel round
    per token: (x / s) W s = x W, and OpenVINO's kernels find their own scales. How many layers it was taken from."""
    undone = 0
    for product in [op for op in model.get_ops() if op.get_type_name() == "MatMul"]:
        scaled = product.input_value(0).get_node()
        if scaled.get_type_name() != "Divide":
            continue
        scale = scaled.input_value(1)
        if scale.get_node().get_type_name() != "Maximum":
            continue
        after = [i.get_node() for i in product.output(0).get_target_inputs()]
        if len(after) != 1 or after[0].get_type_name() != "Multiply" or scale not in after[0].input_values():
            continue
        product.input(0).replace_source_output(scaled.input_value(0))
        for reader in after[0].output(0).get_target_inputs():
            reader.replace_source_output(product.output(0))
        undone += 1
    return undone


class OpenVinoGraph:
    """A graph without a KV cache, compiled for the CPU.

    Args:
        group: inputs of a quantized layer that share an activation scale; the width of the layers' rows makes it one
            scale per token, as in the ONNX Runtime dialect.
    """

    def __init__(self, path: Path, spec: GraphSpec, threads: int, group: int) -> None:
        self.spec = spec
        openvino: Any = importlib.import_module("openvino")
        settings = {
            "INFERENCE_NUM_THREADS": threads,
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": 1,
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": group,
        }
        try:
            core = openvino.Core()
            model = core.read_model(str(path))
            without_row_scales(model)
            self._compiled = core.compile_model(model, "CPU", settings)
        except Exception as e:  # openvino raises RuntimeError for all that it cannot read
            reason = next((line for line in reversed(str(e).splitlines()) if line.strip()), type(e).__name__)
            raise EngineError(f"{path}: openvino {openvino_version()} cannot load it: {reason.strip()}") from None
        check_signature(path, spec, [i.any_name for i in self._compiled.inputs])
        self._request = self._compiled.create_infer_request()
        self._dtypes = {t.name: np.dtype(t.dtype) for t in spec.inputs}

    def repack(self, patches: int) -> None:
        """Run once over `patches` zeros: weights are packed for the processor at the first run, not at opening."""
        sizes = {axis: patches if axis == "patches" else 1 for t in self.spec.inputs for axis in map(str, t.shape)}
        self.run({t.name: np.zeros([d if isinstance(d, int) else sizes[d] for d in t.shape]) for t in self.spec.inputs})

    def run(self, feeds: Mapping[str, np.ndarray], cache: CacheView | None = None) -> dict[str, np.ndarray]:
        """See GraphRunner; `cache` must be None."""
        given = {name: np.ascontiguousarray(value, self._dtypes[name]) for name, value in feeds.items()}
        try:
            found = self._request.infer(given, share_inputs=True)
        except RuntimeError as e:
            raise EngineError(f"graph {self.spec.name!r}: openvino failed: {str(e).splitlines()[-1]}") from None
        return {t.name: np.array(found[t.name]) for t in self.spec.outputs}


class OpenVinoEngine(OrtEngine):
    """Vision on OpenVINO, the decoder as in `ort-cpu`.

    Args:
        threads: of each of the two, which never work at the same time; the usable cores by default.
    """

    name = "openvino"

    def __init__(self, bundle: Bundle, threads: int | None = None) -> None:
        openvino_version()
        self._encoder = self._open_encoder(bundle, threads or usable_cores())
        super().__init__(bundle, threads)

    def _open_encoder(self, bundle: Bundle, threads: int) -> OpenVinoGraph:
        """The encoder, its weights packed and their file's pages given back before the decoder's come into memory."""
        graph, vision = bundle.graphs["vision"], bundle.model.vision
        opened = OpenVinoGraph(bundle.path(graph.file), graph.spec, threads, vision.embed_dim)
        opened.repack(vision.spatial_merge_size**2)
        release_file_pages([bundle.path(name) for name in bundle.files if name.endswith(".data")])
        return opened

    def _open(self, bundle: Bundle, role: str) -> GraphRunner:
        return self._encoder if role == "vision" else super()._open(bundle, role)
