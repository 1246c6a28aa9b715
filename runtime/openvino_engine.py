"""OpenVINO for the vision encoder and for prompts, ONNX Runtime for the rest: one bundle of `--target cpu`.

OpenVINO reads the encoder's ONNX graph as it is. It has attention in bfloat16 where the processor multiplies that fast
(AMX, AMD's AVX512-BF16), which large pictures are bound by, and its int8 kernels round activations as they come, or
multiply them on tiles (AMX, `edgevl.runtime.openvino_rewrite`). Prompts have a graph of their own over the decoder's
weights (`edgevl.export.dialect_openvino`), which takes nearly half of ONNX Runtime's time there; a second packed copy
of the layers, without the head, is what it costs. Over W8A8 weights it is used where there are tiles: it takes the
place of `hybrid`'s own graph for prompts then. Without tiles our own encoder (`edgevl.runtime.native_kernels`) is the
faster one, and is used where the machine has it.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from edgevl.runtime.bundle import OPENVINO_PREFILL, Bundle
from edgevl.runtime.engine import GraphRunner, usable_cores
from edgevl.runtime.errors import EngineError, EngineFailedError
from edgevl.runtime.graph_spec import GraphSpec
from edgevl.runtime.kv_cache import CacheView
from edgevl.runtime.native_kernels import kernel_instructions, native_role
from edgevl.runtime.openvino_rewrite import (
    has_int8_tiles,
    join_transposes,
    round_rows,
    slow_bfloat16,
    without_row_scales,
)
from edgevl.runtime.ort_engine import OrtEngine, check_signature, release_weight_files
from edgevl.runtime.trt_feeds import appended_mask, rows_of_images, store_appended

__all__ = [
    "LEAST_OPENVINO",
    "OpenVinoEngine",
    "OpenVinoGraph",
    "OpenVinoPrefill",
    "openvino_version",
    "prompts_on_openvino",
    "vision_on_openvino",
]

LEAST_OPENVINO = "2026.4"  # 2025.4 crashes on the encoder; nothing between was tried
_FEWEST_TOKENS = 32  # below, a pass through ONNX Runtime's decoder is faster
# Activations that share a scale: of a weight-only layer, finer is slower; of the encoder, coarser is a sixth slower on
# some processors (VNNI at full width, float32 attention) and 2 % faster on others.
_WEIGHT_GROUP, _VISION_GROUP = 128, 256


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


def prompts_on_openvino(bundle: Bundle) -> bool:
    """Whether it has a graph for prompts that is the fastest here: W8A8 only with int8 tiles."""
    graph = bundle.graphs.get(OPENVINO_PREFILL)
    return graph is not None and (graph.precision != "int8" or has_int8_tiles())


def vision_on_openvino(bundle: Bundle) -> bool:
    """Whether its encoder is the faster one here: without int8 tiles ours is, as measured with AVX512-VNNI."""
    return has_int8_tiles() or native_role(bundle, "vision") is None or kernel_instructions() != "avx512-vnni"


class OpenVinoGraph:
    """A graph without a KV cache of its own, compiled for the CPU.

    Args:
        group: inputs of a quantized layer that share an activation scale. Without meaning where products are in tiles.
        tiles: products of int8 by int8, for the processor's tiles; by default where it has them.
    """

    def __init__(self, path: Path, spec: GraphSpec, threads: int, group: int, tiles: bool | None = None) -> None:
        self.spec = spec
        openvino: Any = importlib.import_module("openvino")
        settings = {
            "INFERENCE_NUM_THREADS": threads,
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": 1,
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": group,
        }
        if slow_bfloat16():
            settings["INFERENCE_PRECISION_HINT"] = "f32"
        try:
            core = openvino.Core()
            model = core.read_model(str(path))
            join_transposes(model)
            if has_int8_tiles() if tiles is None else tiles:
                round_rows(model)
            else:
                without_row_scales(model)
            self._compiled = core.compile_model(model, "CPU", settings)
        except Exception as e:  # openvino raises RuntimeError for all that it cannot read
            reason = next((line for line in reversed(str(e).splitlines()) if line.strip()), type(e).__name__)
            raise EngineError(f"{path}: openvino {openvino_version()} cannot load it: {reason.strip()}") from None
        check_signature(path, spec, [i.any_name for i in self._compiled.inputs])
        self._request = self._compiled.create_infer_request()
        self._dtypes = {t.name: np.dtype(t.dtype) for t in spec.inputs}

    def repack(self, **sizes: int) -> None:
        """Run once over zeros: weights are packed for the processor at the first run, not at opening.

        Args:
            sizes: of the dynamic axes, 1 where none is given.
        """
        shapes = {t.name: [d if isinstance(d, int) else sizes.get(d, 1) for d in t.shape] for t in self.spec.inputs}
        self.run({name: np.zeros(shape) for name, shape in shapes.items()})

    def run(self, feeds: Mapping[str, np.ndarray], cache: CacheView | None = None) -> dict[str, np.ndarray]:
        """See GraphRunner; `cache` must be None."""
        given = {name: np.ascontiguousarray(value, self._dtypes[name]) for name, value in feeds.items()}
        try:
            found = self._request.infer(given, share_inputs=True)
        except RuntimeError as e:
            what = f"graph {self.spec.name!r}: openvino failed: {str(e).splitlines()[-1]}"
            raise EngineFailedError(what) from None
        return {t.name: np.array(found[t.name]) for t in self.spec.outputs}


class OpenVinoPrefill:
    """Prompts of one row: all tokens but the last fill the cache on OpenVINO, the last is a step of the decoder, whose
    logits are then the prompt's.

    Args:
        graph: it gives keys and values, see `edgevl.runtime.graph_spec.cache_filling_spec`.
        decoder: of the same weights; also takes what is short, in several rows, or wants more logits than the last.
    """

    def __init__(self, graph: OpenVinoGraph, decoder: GraphRunner) -> None:
        self._graph, self._decoder = graph, decoder
        self.spec = decoder.spec

    def run(self, feeds: Mapping[str, np.ndarray], cache: CacheView | None = None) -> dict[str, np.ndarray]:
        """See GraphRunner."""
        rows, tokens = np.shape(feeds["input_ids"])
        wanted = np.asarray(feeds["logits_rows"]).tolist()
        if cache is None or rows != 1 or tokens < _FEWEST_TOKENS or wanted not in ([], [tokens - 1]):
            return self._decoder.run(feeds, cache)
        filled = tokens - len(wanted)
        past = int(feeds["seqlens_k"][0]) + 1 - tokens
        new = self._graph.run(self._feeds(feeds, filled, past, cache))
        store_appended(cache.buffers, new, np.array([past]), self._graph.spec)
        if not wanted:
            return {"logits": np.zeros((0, self.spec.outputs[0].shape[1]), np.float32)}
        return self._decoder.run(_last_token(feeds), cache)

    def _feeds(self, feeds: Mapping[str, np.ndarray], count: int, past: int, cache: CacheView) -> dict[str, np.ndarray]:
        """The first `count` tokens, behind `past` ones in the cache."""
        embeds = np.asarray(feeds["image_embeds"])
        given = {
            "input_ids": feeds["input_ids"][:, :count],
            "image_embeds": embeds if len(embeds) else np.zeros((1, embeds.shape[1]), np.float32),
            "image_rows": rows_of_images(feeds)[:, :count],
            "rotary_cos": feeds["rotary_cos"][:, :count],
            "rotary_sin": feeds["rotary_sin"][:, :count],
            "attention_mask": appended_mask(np.array([past]), count, past),
        }
        needed = {t.name for t in self._graph.spec.inputs}
        return given | {n: buffer[:, :, :past] for n, buffer in cache.buffers.items() if n in needed}


def _last_token(feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The same call with its last token alone; the lengths are already those behind it."""
    last = np.shape(feeds["input_ids"])[1] - 1
    here = np.asarray(feeds["image_slots"]) == last
    cut = {name: feeds[name][:, last:] for name in ("input_ids", "rotary_cos", "rotary_sin")}
    images = {"image_slots": np.zeros(int(here.sum()), np.int64), "image_embeds": feeds["image_embeds"][here]}
    return {**feeds, **cut, **images, "logits_rows": np.zeros(1, np.int64)}


class OpenVinoEngine(OrtEngine):
    """Vision and prompts on OpenVINO where it is the fastest at them and the bundle has graphs for that; all else as in
    `ort-cpu`.

    Args:
        threads: of each of the two, which never work at the same time; the usable cores by default.
    """

    name = "openvino"

    def __init__(self, bundle: Bundle, threads: int | None = None) -> None:
        openvino_version()
        count = threads or usable_cores()
        self._encoder = self._open_encoder(bundle, count) if vision_on_openvino(bundle) else None
        filling = self._open_prefill(bundle, count) if prompts_on_openvino(bundle) else None
        super().__init__(bundle, threads)
        del self._encoder  # among the graphs now, which `close` frees
        if filling is not None:
            self._graphs["prefill"] = OpenVinoPrefill(filling, self.decoder)

    def _open_encoder(self, bundle: Bundle, threads: int) -> OpenVinoGraph:
        """The encoder, its weights packed and their file's pages given back before the decoder's come into memory."""
        graph, vision = bundle.graphs["vision"], bundle.model.vision
        group = _VISION_GROUP if vision.embed_dim % _VISION_GROUP == 0 else vision.embed_dim
        opened = OpenVinoGraph(bundle.path(graph.file), graph.spec, threads, group)
        opened.repack(patches=vision.spatial_merge_size**2)
        release_weight_files(bundle)
        return opened

    def _open_prefill(self, bundle: Bundle, threads: int) -> OpenVinoGraph:
        graph = bundle.graphs[OPENVINO_PREFILL]
        opened = OpenVinoGraph(bundle.path(graph.file), graph.spec, threads, _WEIGHT_GROUP)
        opened.repack(sequence=_FEWEST_TOKENS, past=0, attended=_FEWEST_TOKENS)
        release_weight_files(bundle)
        return opened

    def _roles(self, bundle: Bundle) -> list[str]:
        roles = super()._roles(bundle)
        return [r for r in roles if r != "prefill"] if prompts_on_openvino(bundle) else roles

    def _open(self, bundle: Bundle, role: str) -> GraphRunner:
        ready = self._encoder if role == "vision" else None
        return super()._open(bundle, role) if ready is None else ready
