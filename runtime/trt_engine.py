"""TensorRT: the plans of a bundle, opened and run. One code for TensorRT 10.x, 11.x and TensorRT-RTX.

One execution context per profile. The KV cache is written in place: the presents' addresses are the pasts'. Small
inputs go over in one copy from pinned memory; image embeddings stay on the device; a decode step (copy in, kernels,
logits out) is captured once per number of rows and set of cache buffers, and launched as a graph from then on. All
contexts work one after another on one stream, so they share their scratch memory.

Never run on a GPU so far: shapes, feeds, plan choice and memory arithmetic are tested without one, and every name of
TensorRT's that is used here is held against its bindings.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from edgevl.runtime.bundle import Bundle
from edgevl.runtime.cuda_memory import CudaGraph, CudaRuntime, DeviceBuffer, PinnedArray, Stream
from edgevl.runtime.device_cache import BufferPool, DeviceKVCache
from edgevl.runtime.device_tensor import DeviceTensor, Rows, Staging, item_size, join_rows
from edgevl.runtime.engine import DEFAULT_GPU, EngineLimits, GpuOptions
from edgevl.runtime.errors import CapacityError, EngineError
from edgevl.runtime.graph_spec import APPENDED, GraphSpec
from edgevl.runtime.kv_cache import CacheView
from edgevl.runtime.plan_choice import choose_plans
from edgevl.runtime.plans import DECODE_PROFILE, PREFILL_PROFILE, VISION_PROFILE, PlanSet, find_plans
from edgevl.runtime.tensorrt_library import find_tensorrt, installed_versions
from edgevl.runtime.trt_feeds import as_dtype, tensorrt_feeds
from edgevl.runtime.trt_plan import Context, Plan
from edgevl.runtime.trt_shapes import (
    cache_bytes,
    check_device_memory,
    check_patches,
    check_rows,
    frames_at_once,
    visible_tokens,
)

__all__ = ["TrtEngine"]

Notice = Callable[[str], None]


class TrtVision:
    """The vision plan; pictures beyond its profile are refused before anything runs."""

    def __init__(
        self, spec: GraphSpec, plans: PlanSet, context: Context, stream: Stream, merged: int, patch: int
    ) -> None:
        self.spec = spec
        self._plans, self._stream, self._merged, self._patch = plans, stream, merged, patch
        self._context: Context | None = context
        self._staging = Staging(stream.cuda, stream)
        self._frames = frames_at_once(plans)

    def run(self, feeds: Mapping[str, Any], cache: CacheView | None = None) -> dict[str, Any]:
        """patches [frames, patches, 1176] and rotary rows -> image_embeds, on the device."""
        if self._context is None:
            raise EngineError("the vision plan is closed; open the model again")
        self._stream.cuda.use()
        frames, patches, _ = np.shape(feeds["patches"])
        check_patches(patches, self._plans, self._patch)
        parts: list[Rows] = []
        for start in range(0, frames, self._frames):
            group = {name: value[start : start + self._frames] for name, value in feeds.items()}
            parts.append(self._call(self._context, group))
        return {"image_embeds": join_rows(parts)}

    def close(self) -> None:
        """Free the context, whoever still holds this object."""
        self._context = None

    def _call(self, context: Context, feeds: Mapping[str, np.ndarray]) -> DeviceTensor:
        arrays = {name: as_dtype(value, self.spec.input(name).dtype) for name, value in feeds.items()}
        for name, pointer in self._staging.write(arrays).items():
            context.shape(name, arrays[name].shape)
            context.address(name, pointer)
        out = self.spec.outputs[0]
        frames, patches, _ = arrays["patches"].shape
        shape = (frames * patches // self._merged, int(out.shape[1]))
        nbytes = shape[0] * shape[1] * item_size(out.dtype)
        memory = self._stream.cuda.allocate(nbytes, "the embeddings of a picture", "lower max_pixels")
        context.address(out.name, memory.pointer)
        self._staging.send()
        context.enqueue()
        self._stream.synchronize()  # the staging block is free again
        return DeviceTensor(memory, self._stream, out.dtype, shape)


class TrtDecoder:
    """The decoder plan: a context for one token per row, one for prompts."""

    def __init__(
        self,
        spec: GraphSpec,
        plans: PlanSet,
        contexts: Mapping[str, Context],
        stream: Stream,
        graphs: bool,
        notice: Notice | None,
    ) -> None:
        self.spec = spec
        self._plans, self._contexts, self._stream, self._notice = plans, dict(contexts), stream, notice
        self._use_graphs = graphs
        self._appends = spec.cache_update == APPENDED
        self._cached = dict(spec.cache)
        self._vocab = int(next(t for t in spec.outputs if t.name == "logits").shape[1])
        self._staging = {name: Staging(stream.cuda, stream) for name in contexts}
        rows = plans.max_rows
        self._logits = stream.cuda.allocate(rows * self._vocab * 4, "the logits", "use a smaller batch")
        self._logits_host: PinnedArray = stream.cuda.pinned(rows * self._vocab * 4)
        self._new: DeviceBuffer | None = None  # keys and values of new tokens, where the graph does not store them
        self._seen: tuple[int, ...] = ()  # what the last single step was like
        self._graph: tuple[tuple[int, ...], CudaGraph] | None = None

    def run(self, feeds: Mapping[str, Any], cache: CacheView | None = None) -> dict[str, np.ndarray]:
        """Feeds of the decoder loop -> logits float32 [rows wanted, vocab]."""
        if cache is None:
            raise ValueError("the decoder runs over a KV cache")
        if not self._contexts:
            raise EngineError("the decoder's plan is closed; open the model again")
        self._stream.cuda.use()
        rows, sequence = np.shape(feeds["input_ids"])
        wanted = int(np.size(feeds["logits_rows"]))
        check_rows(rows, self._plans)
        if sequence > 1 and wanted > 1:  # drafted tokens: the prefill profile gives one row of logits
            return {"logits": self._one_by_one(feeds, cache)}
        if sequence > self._plans.max_prefill:
            raise CapacityError(
                f"{sequence} tokens at once, these TensorRT plans take {self._plans.max_prefill}; use a smaller "
                f"prefill chunk, or build with --profile prefill={sequence}"
            )
        name = DECODE_PROFILE if sequence == 1 and not len(feeds["image_embeds"]) else PREFILL_PROFILE
        past = np.asarray(feeds["seqlens_k"], np.int64) + 1 - sequence
        visible = visible_tokens(past, sequence, self._plans.capacity)
        embeds = feeds["image_embeds"]
        stays = isinstance(embeds, DeviceTensor) and embeds.dtype == self.spec.input("image_embeds").dtype
        direct = {"image_embeds": embeds} if stays and len(embeds) else {}
        arrays = tensorrt_feeds(_without_values(feeds) if direct else feeds, self.spec, visible)
        small = {n: a for n, a in arrays.items() if n not in direct}
        self._bind(name, small, direct, cache, rows, sequence)
        pointers = (b.pointer for b in cache.buffers.values())
        self._execute(name, (rows, visible, *self._staging[name].addresses, *pointers))
        if self._appends:
            self._store(cache, past, sequence)
        self._stream.synchronize()
        host = self._logits_host.array.view(np.float32).reshape(-1, self._vocab)
        return {"logits": host[:wanted].copy()}

    def close(self) -> None:
        """Free the contexts and what was captured of them, whoever still holds this object."""
        self._graph = None
        self._contexts.clear()

    def _bind(
        self,
        name: str,
        arrays: Mapping[str, np.ndarray],
        direct: Mapping[str, DeviceTensor],
        cache: CacheView,
        rows: int,
        sequence: int,
    ) -> None:
        context = self._contexts[name]
        for key, pointer in self._staging[name].write(arrays).items():
            context.shape(key, arrays[key].shape)
            context.address(key, pointer)
        for key, tensor in direct.items():
            context.shape(key, tensor.shape)
            context.address(key, tensor.pointer)
        news = self._new_places(cache, rows, sequence) if self._appends else {}
        for past, present in self._cached.items():
            buffer = cache.buffers[past]
            context.shape(past, buffer.shape)
            context.address(past, buffer.pointer)
            context.address(present, news.get(past, buffer.pointer))
        context.address("logits", self._logits.pointer)

    def _execute(self, name: str, key: tuple[int, ...]) -> None:
        """Put one call on the stream: launched as a graph when the same single step comes again."""
        if name != DECODE_PROFILE or not self._use_graphs:
            self._enqueue(name, key[0])
            return
        if self._graph is not None and self._graph[0] == key:
            self._graph[1].launch(self._stream)
            return
        self._graph = None  # its context has other shapes or addresses now, which invalidates what was captured
        if self._seen != key:  # TensorRT wants one plain call with new shapes before they are captured
            self._seen = key
            self._enqueue(name, key[0])
            return
        try:
            self._stream.begin_capture()
            self._enqueue(name, key[0])
            graph = self._stream.end_capture()
        except EngineError as e:
            self._stream.abandon_capture()
            self._use_graphs = False
            if self._notice is not None:
                self._notice(f"the decode step cannot be captured as a CUDA graph and runs without: {e}")
            self._enqueue(name, key[0])
            return
        self._graph = (key, graph)
        graph.launch(self._stream)

    def _enqueue(self, name: str, rows: int) -> None:
        self._staging[name].send()
        self._contexts[name].enqueue()
        self._stream.copy(self._logits_host.pointer, self._logits.pointer, rows * self._vocab * 4)

    def _new_places(self, cache: CacheView, rows: int, sequence: int) -> dict[str, int]:
        """Addresses for the new tokens' keys and values, by past input."""
        buffer = next(iter(cache.buffers.values()))
        _, heads, _, dim = buffer.shape
        size = -(-rows * heads * sequence * dim * item_size(buffer.dtype) // 256) * 256
        if self._new is None or self._new.nbytes < size * len(self._cached):
            self._graph, self._seen = None, ()  # they hold the old addresses
            self._stream.synchronize()
            advice = "use a smaller prefill chunk"
            self._new = self._stream.cuda.allocate(size * len(self._cached), "new keys and values", advice)
        return {past: self._new.pointer + i * size for i, past in enumerate(self._cached)}

    def _store(self, cache: CacheView, past: np.ndarray, sequence: int) -> None:
        """Copy the new tokens' keys and values to where each row's cache ends."""
        places = self._new_places(cache, len(past), sequence)
        for name, buffer in cache.buffers.items():
            rows, heads, capacity, dim = buffer.shape
            token = dim * item_size(buffer.dtype)
            for row in range(rows):
                target = buffer.pointer + (row * heads * capacity + int(past[row])) * token
                source = places[name] + row * heads * sequence * token
                self._stream.copy_rows(target, capacity * token, source, sequence * token, sequence * token, heads)

    def _one_by_one(self, feeds: Mapping[str, Any], cache: CacheView) -> np.ndarray:
        """Several tokens of one row whose logits are all wanted, as single steps."""
        sequence = np.shape(feeds["input_ids"])[1]
        found = []
        for i in range(sequence):
            step = {name: np.asarray(feeds[name])[:, i : i + 1] for name in ("input_ids", "rotary_cos", "rotary_sin")}
            length = np.asarray(feeds["seqlens_k"]) - (sequence - 1 - i)
            rest = {"image_slots": feeds["image_slots"], "image_embeds": feeds["image_embeds"]}
            step |= {"seqlens_k": length, "logits_rows": np.zeros(1, np.int64), **rest}
            found.append(self.run(step, cache)["logits"])
        return np.concatenate(found)[np.asarray(feeds["logits_rows"], np.int64)]


def _without_values(feeds: Mapping[str, Any]) -> dict[str, Any]:
    """The feeds with as many rows of zeros in place of embeddings on the device: only their number is looked at."""
    shape = feeds["image_embeds"].shape
    return {**feeds, "image_embeds": np.broadcast_to(np.float32(0), shape)}


class TrtEngine:
    """The plans of a bundle that fit this machine.

    Raises:
        EngineError: no TensorRT (what to install), no GPU, no plans or none that fit (both names), too little memory
            (what is needed and what is free).
    """

    name = "tensorrt"

    def __init__(self, bundle: Bundle, options: GpuOptions = DEFAULT_GPU, notice: Notice | None = None) -> None:
        find_tensorrt()
        self._cuda = CudaRuntime(options.device)
        plans, reasons = choose_plans(bundle, find_plans(bundle), installed_versions(), self._cuda.capability)
        if plans is None:
            why = f"no plans of the bundle fit: {'; '.join(reasons)}" if reasons else "the bundle has no TensorRT plans"
            raise EngineError(f"{bundle.folder}: {why}; run `edgevl build {bundle.folder}` here")
        self.plans = plans
        library = find_tensorrt(plans.flavour)
        self._stream = self._cuda.stream()
        self._pool = BufferPool(self._cuda, self._stream)
        # Of weights that stream, the decoder's come first to the device: they are needed for every token.
        cache = cache_bytes(bundle.graphs["decoder"].spec, plans.max_rows, plans.capacity)
        self._opened = {
            role: Plan(library, plans.path(role), self._cuda, role, plans.weight_streaming, cache)
            for role in ("decoder", "vision")
        }
        scratch = max(plan.scratch_bytes for plan in self._opened.values())
        short = check_device_memory("the plans' scratch memory", scratch, *self._cuda.memory())
        if short is not None:
            raise EngineError(f"{plans.folder}: {short}")
        self._scratch = self._cuda.allocate(scratch, "the plans' scratch memory", "build with smaller --profile limits")
        self.limits = EngineLimits(plans.capacity, plans.max_prefill, plans.max_rows)
        self._vision = self._open_vision(bundle)
        self._decoder = self._open_decoder(bundle, options.cuda_graph is not False, notice)

    def _open_vision(self, bundle: Bundle) -> TrtVision:
        number, _ = self.plans.plans["vision"].profile(VISION_PROFILE)
        context = self._opened["vision"].context(number, self._scratch, self._stream)
        v = bundle.model.vision
        spec = bundle.graphs["vision"].spec
        return TrtVision(spec, self.plans, context, self._stream, v.spatial_merge_size**2, v.patch_size)

    def _open_decoder(self, bundle: Bundle, graphs: bool, notice: Notice | None) -> TrtDecoder:
        plan = self.plans.plans["decoder"]
        contexts = {
            name: self._opened["decoder"].context(plan.profile(name)[0], self._scratch, self._stream)
            for name in (DECODE_PROFILE, PREFILL_PROFILE)
        }
        return TrtDecoder(bundle.graphs["decoder"].spec, self.plans, contexts, self._stream, graphs, notice)

    @property
    def vision(self) -> TrtVision:
        return self._vision

    @property
    def decoder(self) -> TrtDecoder:
        return self._decoder

    @property
    def prefill(self) -> TrtDecoder:
        return self._decoder

    def new_cache(self, capacity: int, batch: int = 1) -> DeviceKVCache:
        check_rows(batch, self.plans)
        return DeviceKVCache(self._decoder.spec, capacity, batch, self._pool, self._stream)

    def close(self) -> None:
        """Save what TensorRT-RTX compiled, free plans and memory; the engine cannot run afterwards."""
        for plan in self._opened.values():
            plan.save_runtime_cache()
        self._vision.close()  # contexts before their engines
        self._decoder.close()
        self._opened.clear()
        self._pool.close()
        self._scratch.close()
