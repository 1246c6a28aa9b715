"""The TensorRT engine's own work, with ONNX Runtime on the same graph files in TensorRT's place (tests/host_memory.py):
shapes, addresses, feeds, the cache, what is captured and replayed, and everything that is refused before it runs."""

from __future__ import annotations

import gc
import importlib
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from conftest import Pair
from host_memory import HostCuda, HostStream, OrtContext
from PIL import Image

from edgevl.export.exporter import ExportOptions, export_bundle
from edgevl.export.plan_profiles import decoder_profiles, plan_limits, vision_profile
from edgevl.export.tensorrt_build import BuildOptions
from edgevl.runtime import trt_engine
from edgevl.runtime.bundle import Bundle
from edgevl.runtime.device_cache import BufferPool, DeviceKVCache
from edgevl.runtime.device_tensor import DeviceTensor
from edgevl.runtime.engine import EngineLimits
from edgevl.runtime.errors import CapacityError, EngineError, InputError
from edgevl.runtime.generation import VisionLanguageModel
from edgevl.runtime.ort_engine import OrtEngine
from edgevl.runtime.plan_choice import choose_plans
from edgevl.runtime.plans import FoundPlans, PlanFile, PlanSet
from edgevl.runtime.tensorrt_library import TensorRT
from edgevl.runtime.trt_engine import TrtDecoder, TrtEngine, TrtVision
from edgevl.runtime.trt_shapes import VISIBLE_STEP, check_device_memory, check_patches, check_rows, visible_tokens

CAPACITY = 320


def plan_set(bundle: Bundle, **changes: Any) -> PlanSet:
    """What `edgevl build --profile rows=3,prefill=24,frames=2` describes, without the plans themselves."""
    limits = plan_limits(bundle, BuildOptions(rows=3, prefill=24, frames=2))
    graphs = bundle.graphs
    profiles = {
        "vision": (vision_profile(graphs["vision"].spec, limits),),
        "decoder": decoder_profiles(graphs["decoder"].spec, limits),
    }
    sources = {n: f.sha256 for n, f in bundle.files.items() if n.startswith("decoder.onnx")}
    plans = {
        role: PlanFile(f"{role}.plan", 1, "0" * 64, "float16", sources if role == "decoder" else {}, ranges)
        for role, ranges in profiles.items()
    }
    made = PlanSet(
        folder=bundle.folder / "engines" / "tensorrt-10.16.2-orin",
        flavour="tensorrt",
        version="10.16.2",
        device="Orin",
        capabilities=((8, 7),),
        capacity=limits.capacity,
        max_rows=limits.rows,
        max_prefill=limits.prefill,
        min_patches=limits.min_patches,
        max_patches=limits.max_patches,
        plans=plans,
    )
    return replace(made, **changes)


class CheckedContext(OrtContext):
    """Refuses shapes beyond the profile, as TensorRT would."""

    def __init__(self, *arguments: Any, profile: Any) -> None:
        super().__init__(*arguments)
        self.profile = profile

    def shape(self, name: str, shape: tuple[int, ...]) -> None:
        assert self.profile.shapes[name].holds(shape), (name, shape, self.profile.shapes[name])
        super().shape(name, shape)


class Device(HostCuda):
    """Notes the threads whose current device it became."""

    def __init__(self, total: int = 1 << 30) -> None:
        super().__init__(total)
        self.threads: set[int] = set()

    @property
    def capability(self) -> tuple[int, int]:
        return 8, 7

    def use(self) -> None:
        self.threads.add(threading.get_ident())


class HostEngine:
    """TrtVision and TrtDecoder over host memory."""

    name = "tensorrt"

    def __init__(self, bundle: Bundle, graphs: bool = True) -> None:
        self.cuda = Device()
        self.stream = self.cuda.stream()
        assert isinstance(self.stream, HostStream)
        self.plans = plans = plan_set(bundle)
        self.notes: list[str] = []
        v, d = bundle.graphs["vision"], bundle.graphs["decoder"]

        def context(role: str, profile: Any) -> CheckedContext:
            graph = bundle.graphs[role]
            return CheckedContext(bundle.path(graph.file), graph.spec, self.stream, profile=profile)

        vision: Any = context("vision", plans.plans["vision"].profiles[0])
        self.contexts: Any = {p.name: context("decoder", p) for p in plans.plans["decoder"].profiles}
        self.vision = TrtVision(v.spec, plans, vision, self.stream, 4, 14)
        self.decoder = TrtDecoder(d.spec, plans, self.contexts, self.stream, graphs, self.notes.append)
        self.prefill = self.decoder
        self.limits = EngineLimits(plans.capacity, plans.max_prefill, plans.max_rows)
        self.pool = BufferPool(self.cuda, self.stream)

    def new_cache(self, capacity: int, batch: int = 1) -> DeviceKVCache:
        check_rows(batch, self.plans)
        return DeviceKVCache(self.decoder.spec, capacity, batch, self.pool, self.stream)

    def close(self) -> None:
        self.pool.close()


@pytest.fixture(scope="module", params=["tensorrt", "jetpack6"])
def bundle(request: pytest.FixtureRequest, tiny: Pair, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp(request.param) / "bundle"
    options = ExportOptions(target=request.param, precision="fp16", max_tokens=CAPACITY)
    export_bundle(tiny.checkpoint, folder, options)
    return Bundle.open(folder)


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    rng = np.random.default_rng(3)
    return [Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)) for h, w in ((84, 112), (56, 84))]


def question(*pictures: Any, text: str = "Compare.") -> list[dict[str, Any]]:
    items = [{"type": "image", "image": p} for p in pictures]
    return [{"role": "user", "content": [*items, {"type": "text", "text": text}]}]


def answers(model: VisionLanguageModel, pictures: list[Image.Image]) -> list[Any]:
    """Everything that reaches the engine: two pictures, a long prompt in chunks, a batch that shrinks, a chat."""
    limits = {"eos_token_ids": (-1,)}
    done = [model.generate(question(*pictures), max_new_tokens=9, **limits).token_ids]
    done.append(model.generate(question(text="one two three " * 20), max_new_tokens=4, **limits).token_ids)
    batch = [question(pictures[0]), question(text="Hello"), question(pictures[1], text="What is it?")]
    done += [c.token_ids for c in model.generate_batch(batch, max_new_tokens=6, **limits)]
    chat = model.chat()
    done.append(chat.send("Hello", max_new_tokens=3, **limits).token_ids)
    done.append(chat.send("And this?", images=[pictures[1]], max_new_tokens=3, **limits).token_ids)
    return done


def test_the_engine_gives_what_onnx_runtime_gives_on_the_same_files(bundle: Bundle, pictures: list) -> None:
    reference = VisionLanguageModel(bundle, OrtEngine(bundle, threads=1), prefill_chunk=24)
    expected = answers(reference, pictures)
    engine: Any = HostEngine(bundle)
    model = VisionLanguageModel(bundle, engine)
    assert answers(model, pictures) == expected
    assert engine.stream.launches > 10 and engine.notes == []
    encoded = model.encode_image(pictures[0])
    assert isinstance(encoded.embeds, DeviceTensor)
    assert np.array_equal(
        np.asarray(encoded.embeds, np.float32), np.asarray(reference.encode_image(pictures[0]).embeds)
    )


def test_one_capture_serves_a_whole_answer_and_the_next_request(bundle: Bundle) -> None:
    engine: Any = HostEngine(bundle)
    model = VisionLanguageModel(bundle, engine)
    model.generate(question(text="Hello"), max_new_tokens=8, eos_token_ids=(-1,))
    # 7 steps: one as it is, then a capture, which is launched for it and for the rest
    assert (engine.stream.captures, engine.stream.launches) == (1, 6)
    model.generate(question(text="Hello again"), max_new_tokens=5, eos_token_ids=(-1,))
    assert (engine.stream.captures, engine.stream.launches) == (1, 10)  # the same cache buffers came back


def test_a_capture_that_fails_is_told_of_and_done_without(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: HostStream) -> None:
        raise EngineError("CUDA: cudaStreamEndCapture failed: cudaErrorStreamCaptureUnsupported (…)")

    expected = VisionLanguageModel(bundle, OrtEngine(bundle, threads=1)).generate(
        question(text="Hello"), max_new_tokens=6, eos_token_ids=(-1,)
    )
    monkeypatch.setattr(HostStream, "end_capture", fail)
    engine: Any = HostEngine(bundle)
    model = VisionLanguageModel(bundle, engine)
    assert model.generate(question(text="Hello"), max_new_tokens=6, eos_token_ids=(-1,)).token_ids == expected.token_ids
    assert engine.stream.launches == 0 and engine.stream.captures == 1
    assert len(engine.notes) == 1 and "cudaErrorStreamCaptureUnsupported" in engine.notes[0]


def test_without_graphs_nothing_is_captured(bundle: Bundle) -> None:
    engine: Any = HostEngine(bundle, graphs=False)
    VisionLanguageModel(bundle, engine).generate(question(text="Hello"), max_new_tokens=5, eos_token_ids=(-1,))
    assert engine.stream.captures == 0


def test_drafted_tokens_are_scored_one_by_one(bundle: Bundle) -> None:
    """A plan gives one row of logits for several tokens; prompt lookup wants them all."""
    engine: Any = HostEngine(bundle)
    model = VisionLanguageModel(bundle, engine)
    reference = VisionLanguageModel(bundle, OrtEngine(bundle, threads=1))
    found = []
    for m in (model, reference):
        decoder = m.decoder()
        prompt = m.prepare(question(text="Hello"))
        decoder.prefill(0, prompt.ids, prompt.positions)
        ids = np.array([3, 1, 4, 1], np.int64)
        found.append(decoder.score(ids, prompt.next_position + np.arange(4)))
        assert int(decoder.cache.lengths[0]) == len(prompt.ids) + 4
    assert found[0].shape == (4, 512) and np.abs(found[0] - found[1]).max() < 0.02


def test_a_video_goes_in_groups_of_frames_that_the_profile_takes(bundle: Bundle) -> None:
    rng = np.random.default_rng(5)
    frames = [Image.fromarray(rng.integers(0, 256, (56, 56, 3), dtype=np.uint8)) for _ in range(10)]
    model = VisionLanguageModel(bundle, HostEngine(bundle), image_cache_mb=0)  # type: ignore[arg-type]
    reference = VisionLanguageModel(bundle, OrtEngine(bundle, threads=1), image_cache_mb=0)
    ours, theirs = model.encode_video(frames), reference.encode_video(frames)
    assert ours.grid.t == 5 and isinstance(ours.embeds, np.ndarray)  # a video gathers on the host
    assert np.abs(np.asarray(ours.embeds, np.float32) - np.asarray(theirs.embeds)).max() < 1e-2


def test_runs_make_their_device_that_of_the_thread(bundle: Bundle, pictures: list) -> None:
    """`serve --gpu 1` opens in one thread and answers in another."""
    engine: Any = HostEngine(bundle)
    model = VisionLanguageModel(bundle, engine)
    runs = (
        lambda: model.encode_image(pictures[0]),
        lambda: model.generate(question(text="Hello"), max_new_tokens=2),
    )
    for run in runs:
        engine.cuda.threads.clear()
        with ThreadPoolExecutor(1) as pool:
            pool.submit(run).result()
        assert len(engine.cuda.threads) == 1 and threading.get_ident() not in engine.cuda.threads


def test_what_is_closed_is_free_whoever_holds_it(bundle: Bundle) -> None:
    engine = HostEngine(bundle)
    contexts = [weakref.ref(c) for c in (engine.vision._context, *engine.contexts.values())]
    engine.contexts = {}
    engine.vision.close()
    engine.decoder.close()
    gc.collect()
    assert [context() for context in contexts] == [None] * 3
    with pytest.raises(EngineError, match="the vision plan is closed; open the model again"):
        engine.vision.run({})
    with pytest.raises(EngineError, match="the decoder's plan is closed"):
        engine.decoder.run({}, engine.new_cache(CAPACITY).view(0, 1))


# ---------------------------------------------------------------------- limits


def test_a_picture_beyond_the_profile_is_refused_before_it_runs(bundle: Bundle) -> None:
    model = VisionLanguageModel(bundle, HostEngine(bundle))  # type: ignore[arg-type]
    large = Image.new("RGB", (700, 700))  # 50 x 50 patches
    most = model.engine.plans.max_patches  # type: ignore[attr-defined]
    assert most < 2500
    with pytest.raises(InputError, match=rf"a picture of 2,500 patches .* take 4 to {most:,} patches; pass max_pixels"):
        model.encode_image(large, max_pixels=700 * 700)
    assert model.encode_image(large, max_pixels=most * 196).grid.patches <= most


def test_messages_name_the_limit_and_the_build_that_lifts_it(bundle: Bundle) -> None:
    plans = plan_set(bundle, min_patches=16)
    with pytest.raises(InputError, match=r"--profile max-pixels=1226176$"):
        check_patches(6256, plans, 14)
    with pytest.raises(InputError, match=r"of 4 patches .* min_pixels=3136 .* --profile min-pixels=784$"):
        check_patches(4, plans, 14)
    check_patches(16, plans, 14)
    check_rows(3, plans)
    with pytest.raises(CapacityError, match=r"a batch of 4 .* decode 3 together; .* --profile rows=4$"):
        check_rows(4, plans)
    with pytest.raises(CapacityError, match="a batch of 5"):
        HostEngine(bundle).new_cache(CAPACITY, 5)
    assert check_device_memory("the decoder plan", 5, 5, 9) is None
    text = check_device_memory("the decoder plan", 1_600_000_000, 900_000_000, 4_000_000_000)
    assert text is not None and text.startswith(
        "the decoder plan needs 1.60 GB of GPU memory, 0.90 GB of 4.00 GB are free"
    )


def test_too_many_tokens_at_once_are_refused(bundle: Bundle) -> None:
    engine = HostEngine(bundle)
    feeds = {"input_ids": np.zeros((1, 25), np.int64), "image_embeds": np.zeros((0, 64)), "logits_rows": np.zeros(1)}
    with pytest.raises(CapacityError, match=r"25 tokens at once, these TensorRT plans take 24; .* prefill=25"):
        engine.decoder.run(feeds, engine.new_cache(CAPACITY).view(0, 1))


def test_visible_tokens_are_few_numbers_that_the_profile_takes(bundle: Bundle) -> None:
    _, profile = plan_set(bundle).plans["decoder"].profile("decode")
    seen = {visible_tokens(np.array([n]), 1, CAPACITY) for n in range(CAPACITY)}
    assert seen == {VISIBLE_STEP, CAPACITY - 1}
    for past in range(CAPACITY):
        assert visible_tokens(np.array([past, 0]), 1, CAPACITY) >= max(past, 1)
        assert visible_tokens(np.array([past]), 7, CAPACITY) == max(past, 1)
    if "attention_mask" in profile.shapes and bundle.target == "jetpack6":
        for visible in seen:
            assert profile.shapes["attention_mask"].holds((1, 1, 1, visible + 1))


# ---------------------------------------------------------------------- the choice of plans


def test_plans_are_chosen_by_version_and_device(bundle: Bundle) -> None:
    orin = plan_set(bundle)
    rtx = replace(
        orin,
        flavour="tensorrt_rtx",
        version="1.7.1.116",
        capabilities=((8, 6), (8, 9)),
        device="sm86+sm89",
        folder=Path("engines/tensorrt_rtx-1.7.1.116-sm86+sm89"),
    )
    both = FoundPlans((rtx, orin), ())
    assert choose_plans(bundle, both, {"tensorrt": "10.16.2", "tensorrt_rtx": "1.7.1.116"}, (8, 7)) == (orin, [])
    found, reasons = choose_plans(bundle, both, {"tensorrt_rtx": "1.7.1.116"}, (8, 9))
    assert found is rtx and reasons == [
        "tensorrt-10.16.2-orin: built with tensorrt 10.16.2, this machine has tensorrt_rtx 1.7.1.116"
    ]
    found, reasons = choose_plans(bundle, both, {"tensorrt": "10.7.0", "tensorrt_rtx": "1.7.1.116"}, (12, 0))
    assert found is None and "10.16.2" in reasons[0] and "10.7.0" in reasons[0]
    assert "compute capability 8.6, 8.9 (sm86+sm89), this device has 12.0" in reasons[1]
    assert "neither TensorRT nor TensorRT-RTX" in choose_plans(bundle, both, {}, (8, 7))[1][0]
    changed = replace(orin.plans["decoder"], sources={"decoder.onnx": "1" * 64})
    stale = replace(orin, plans={**orin.plans, "decoder": changed})
    found, reasons = choose_plans(bundle, FoundPlans((stale,), ()), {"tensorrt": "10.16.2"}, (8, 7))
    assert found is None and "another decoder.onnx than the bundle holds now" in reasons[0]


class HostPlan:
    """A plan of the bundle whose contexts are ONNX Runtime's."""

    made: ClassVar[list[HostPlan]] = []
    scratch_bytes = 4096

    def __init__(self, library: TensorRT, path: Path, cuda: Device, role: str, streams: bool, spare: int) -> None:
        self.role, self.streams, self.spare = role, streams, spare
        self.contexts: list[weakref.ref[CheckedContext]] = []
        self.saved = False
        HostPlan.made.append(self)

    def context(self, number: int, scratch: Any, stream: HostStream) -> CheckedContext:
        assert scratch.nbytes == self.scratch_bytes
        graph = self.bundle.graphs[self.role]
        profile = plan_set(self.bundle).plans[self.role].profiles[number]
        made = CheckedContext(self.bundle.path(graph.file), graph.spec, stream, profile=profile)
        self.contexts.append(weakref.ref(made))
        return made

    def save_runtime_cache(self) -> None:
        self.saved = True

    bundle: ClassVar[Bundle]


def test_an_engine_opens_answers_and_closes(bundle: Bundle, pictures: list, monkeypatch: pytest.MonkeyPatch) -> None:
    """All but TensorRT and CUDA themselves. Of plans that stream the decoder's weights come first to the device, and
    leave room for the KV cache."""
    monkeypatch.setattr(HostPlan, "made", [])
    monkeypatch.setattr(HostPlan, "bundle", bundle, raising=False)
    monkeypatch.setattr(trt_engine, "Plan", HostPlan)
    monkeypatch.setattr(trt_engine, "CudaRuntime", lambda number: Device())
    monkeypatch.setattr(trt_engine, "find_tensorrt", lambda flavour=None: None)
    monkeypatch.setattr(trt_engine, "installed_versions", lambda: {"tensorrt": "10.16.2"})
    found = FoundPlans((plan_set(bundle, weight_streaming=True),), ("engines/x: damaged",))
    monkeypatch.setattr(trt_engine, "find_plans", lambda of: found)
    with VisionLanguageModel(bundle, TrtEngine(bundle)) as model:
        reference = VisionLanguageModel(bundle, OrtEngine(bundle, threads=1), prefill_chunk=24)
        given = {"max_new_tokens": 5, "eos_token_ids": (-1,)}
        answer = model.generate(question(pictures[0]), **given).token_ids
        assert answer == reference.generate(question(pictures[0]), **given).token_ids
        cache = model.engine.new_cache(CAPACITY, 3).nbytes
    assert [(p.role, p.streams, p.spare, p.saved) for p in HostPlan.made] == [
        ("decoder", True, cache, True),
        ("vision", True, cache, True),
    ]
    gc.collect()
    assert [context() for plan in HostPlan.made for context in plan.contexts] == [None] * 3  # though `model` is there
    monkeypatch.setattr(trt_engine, "find_plans", lambda of: FoundPlans((), found.problems))
    with pytest.raises(EngineError, match="no plans of the bundle fit: engines/x: damaged; run `edgevl build"):
        TrtEngine(bundle)


def test_opening_here_is_one_clear_error(bundle: Bundle) -> None:
    if importlib.import_module("edgevl.runtime.gpu").current_gpu() is not None:
        pytest.skip("a GPU is here")
    with pytest.raises(EngineError, match=r"TensorRT is not installed here|cudaGetDeviceCount failed|not found here"):
        TrtEngine(bundle)
