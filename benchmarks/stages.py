"""One measuring process: opens a bundle, answers requests, and keeps when every stage ended.

The stages of a request are those that an application goes through, each called as the runtime calls it:

    file      JPEG bytes -> upright RGB picture
    resize    -> the size that smart_resize chose
    patches   -> normalised patches
    vision    -> image embeddings (the encoder)
    prompt    template, tokenizer, positions
    prefill   -> logits of the first token, and the token
    steps     one entry for each token after it

TTFT runs from the bytes to the first token. Of several requests at once, pictures and prompts are worked off one by one
and the answers are decoded together: a group, whose rows have a TTFT each. A process answers one request before it
measures: that one is the cold start. What a benchmark makes for itself (pictures, the question's text) counts nowhere.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from edgevl.benchmarks.device_memory import DeviceMemory, absences
from edgevl.benchmarks.energy import EnergyMeter, heat
from edgevl.benchmarks.processes import end_with_parent
from edgevl.benchmarks.request_size import message, video_room
from edgevl.benchmarks.throttling import ClockWatch, throttled
from edgevl.benchmarks.workloads import Workload, question
from edgevl.runtime import VisionLanguageModel
from edgevl.runtime.answer_stream import PreparedPrompt
from edgevl.runtime.doctor import peak_rss_bytes
from edgevl.runtime.errors import InputError
from edgevl.runtime.image_cache import content_key
from edgevl.runtime.image_loading import load_image
from edgevl.runtime.image_processing import ProcessedImage, VisionGrid, frame_patches, resized_size
from edgevl.runtime.sampling import GenerationConfig
from edgevl.runtime.video import VideoOptions, plan_video
from edgevl.runtime.video_reading import open_video
from edgevl.runtime.vision import EncodedImage, VisionStage

__all__ = [
    "STAGES",
    "Files",
    "Job",
    "Measured",
    "Opened",
    "Request",
    "Runner",
    "StageClock",
    "answer_job",
    "open_job",
    "rss_mb",
    "run_job",
]

STAGES = ("file_s", "resize_s", "patches_s", "vision_s", "prompt_s", "prefill_s")


@dataclass(frozen=True)
class Job:
    """What one process is told. `label`: the bundle's name for people. `spawned`: time.time() when it was started;
    `parent`: id of the process that started it, 0 for none. `minutes`: of a soak; 0: `requests`. `round`: which process
    of the case it is; only the schedule of arrivals depends on it."""

    bundle: str
    workload: Workload
    engine: str = "ort-cpu"
    threads: int = 2
    requests: int = 5
    minutes: float = 0.0
    seed: int = 0
    cores: tuple[int, ...] = ()
    spawned: float = 0.0
    round: int = 0
    label: str = ""
    parent: int = 0

    @classmethod
    def from_json(cls, text: str) -> Job:
        data = json.loads(text)
        return cls(**{**data, "workload": Workload(**data["workload"]), "cores": tuple(data["cores"])})


@dataclass(frozen=True)
class Request:
    """Seconds of one request, or of a group of them that are answered together. `ttft_s` has one entry per row;
    `steps_s` one per token after the first (a step of a group answers all its rows); `at_s` is when it began, from the
    first measured request on; joules are None without a sensor. `grids`: [t, h, w] in patches of every picture and
    video of a row; all rows have such."""

    stages: dict[str, float]
    ttft_s: list[float]
    steps_s: list[float]
    detokenize_s: float
    total_s: float
    prompt_tokens: int
    image_tokens: int
    new_tokens: int
    grids: list[list[int]] = field(default_factory=list)
    at_s: float = 0.0
    joules: float | None = None
    joules_before_decode: float | None = None
    rss_mb: float = 0.0
    mhz: float | None = None
    celsius: float | None = None


@dataclass(frozen=True)
class Measured:
    """What one process hands back. `cold_s`: from the start of the process to its first token; `open_s`: of that,
    opening the bundle. Bytes are MB (10^6). `absent`: what this machine or engine does not tell, and why. `throttled`:
    see throttling.py."""

    bundle: str
    engine: str
    open_s: float
    cold_s: float
    warm_up: Request
    requests: list[Request]
    peak_mb: float
    rss_open_mb: float
    peak_gpu_mb: float | None = None
    arena_mb: float | None = None
    energy_sources: list[str] = field(default_factory=list)
    absent: dict[str, str] = field(default_factory=dict)
    throttled: int | bool | None = None


Files = tuple[list[bytes], list[bytes]]  # JPEG bytes of the pictures, and of the frames of the video, of one row


class Opened(NamedTuple):
    """A model on its job's cores and engine. `open_s`: what opening it took; `apart_s`: making what to ask, which no
    figure counts; `spawned`: time.time() when the process was started."""

    model: VisionLanguageModel
    runner: Runner
    open_s: float
    apart_s: float
    spawned: float


def run_job(job: Job) -> Measured:
    """Measure in this process (which should be fresh: memory and cold start are the process's).

    Raises:
        InputError: the workload is an open loop (see open_loop.py).
    """
    if job.workload.arrivals_per_s:
        raise InputError(f"workload {job.workload.name!r}: requests arrive by themselves; measure it as an open loop")
    model, runner, open_s, apart_s, spawned = open_job(job)
    rss_open, memory, watch = rss_mb(), DeviceMemory(model.engine.name), ClockWatch(job.cores)
    memory.look()
    with EnergyMeter() as meter:
        warm_up, cold_s = runner.warm_up(meter.read, spawned, apart_s)
        hot = heat()
        requests: list[Request] = []
        origin = time.perf_counter()
        while len(requests) < job.requests or time.perf_counter() - origin < 60 * job.minutes:
            at = time.perf_counter() - origin
            files = runner.group(len(requests) + 1)
            now = heat()
            with watch.loaded():
                done = runner.request(len(requests) + 1, meter.read, files=files)
            memory.look()
            requests.append(replace(done, at_s=at, rss_mb=rss_mb(), mhz=now.mhz, celsius=now.celsius))
        slow = throttled(hot, heat(), watch)
        name = model.engine.name
        model.close()
        return Measured(
            bundle=job.bundle,
            engine=name,
            open_s=open_s,
            cold_s=cold_s,
            warm_up=warm_up,
            requests=requests,
            peak_mb=peak_rss_bytes() / 1e6,
            rss_open_mb=rss_open,
            peak_gpu_mb=memory.peak_mb,
            energy_sources=list(meter.sources),
            absent=meter.absent | absences(memory, slow),
            throttled=slow,
        )


def open_job(job: Job) -> Opened:
    """The job's model, opened, and a runner for it."""
    if job.cores:
        os.sched_setaffinity(0, job.cores)
    spawned = job.spawned or time.time()
    began = time.perf_counter()
    model = VisionLanguageModel.open(job.bundle, job.engine, threads=job.threads)
    opened = time.perf_counter()
    runner = Runner(model, job)
    return Opened(model, runner, opened - began, time.perf_counter() - opened, spawned)


class StageClock:
    """Adds up the seconds of named stages."""

    def __init__(self) -> None:
        self.stages: dict[str, float] = {stage: 0.0 for stage in STAGES}
        self.begin()

    def begin(self) -> None:
        """What came before counts to no stage."""
        self._at = time.perf_counter()

    def lap(self, stage: str) -> None:
        now = time.perf_counter()
        self.stages[stage] += now - self._at
        self._at = now


class Runner:
    """Requests of one workload to one model."""

    def __init__(self, model: VisionLanguageModel, job: Job) -> None:
        self._model, self._job, self._work = model, job, job.workload
        self._text = question(model, job.workload.prompt_tokens)
        self._vision = VisionStage(model.engine.vision, model.config, model.bundle.image_processor)
        self._room = 0  # of the KV cache, for a video
        if self._work.frames:
            self._room = video_room(model.bundle, model._builder, self._work, self._text, model.capacity)

    def files(self, row: int) -> Files:
        """Those of one row."""
        work, seed = self._work, self._job.seed
        pictures = [work.picture(seed, row, i) for i in range(work.pictures)]
        return pictures, work.video(seed, row) if work.frames else []

    def group(self, number: int) -> list[Files]:
        """Files of all rows of request `number`."""
        return [self.files(number * self._work.concurrency + row) for row in range(self._work.concurrency)]

    def prompt(self, pictures: Sequence[bytes], frames: Sequence[bytes], clock: StageClock) -> PreparedPrompt:
        """The prompt of one row, its pictures encoded."""
        encoded = [self._picture(p, clock) for p in pictures]
        video = self._video(frames, clock) if frames else None
        prompt = self._model.prepare(message(encoded, video, self._text))
        clock.lap("prompt_s")
        return prompt

    def warm_up(self, joules: Callable[[], float | None], spawned: float, apart_s: float) -> tuple[Request, float]:
        """Request 0, and the seconds from `spawned` (time.time()) to its first token, less `apart_s` and what making
        its files took."""
        began = time.perf_counter()
        files = self.group(0)
        apart_s += time.perf_counter() - began
        first: list[float] = []
        done = self.request(0, joules, lambda: first.append(time.time() - spawned), files=files)
        return done, first[0] - apart_s

    def config(self) -> GenerationConfig:
        """Greedy, and as many tokens as the workload asks for."""
        return self._model.generation_config(
            max_new_tokens=self._work.new_tokens, eos_token_ids=(-1,), do_sample=False, repetition_penalty=1.0
        )

    def request(
        self,
        number: int,
        joules: Callable[[], float | None] = lambda: None,
        on_first: Callable[[], None] = lambda: None,
        clock: StageClock | None = None,
        files: Sequence[Files] | None = None,
    ) -> Request:
        """Answer request `number` (all its rows, where several are asked at once).

        Args:
            clock: may measure otherwise.
            files: `group(number)`; by default they are made before the request begins.
        """
        work, model = self._work, self._model
        files = self.group(number) if files is None else files
        before = joules()
        clock = clock or StageClock()
        clock.begin()
        started = time.perf_counter()
        prompts = [self.prompt(*f, clock) for f in files]
        config = self.config()
        first: list[float] = []
        at_first: list[float | None] = []
        times: list[float] = []

        def on_step(pieces: int) -> None:
            if pieces <= work.concurrency:  # the rows' first tokens, one after another
                first.append(time.perf_counter() - started)
            if pieces == 1:
                on_first()
            if pieces == work.concurrency:  # all rows have their first token
                at_first.append(joules())
                clock.lap("prefill_s")
            elif pieces > work.concurrency and pieces % work.concurrency == 0:
                now = time.perf_counter()
                times.append(now)

        tokens = self._answer(prompts, config, on_step)
        ended = time.perf_counter()
        decode_began = started + sum(clock.stages.values())
        steps = [b - a for a, b in zip([decode_began, *times[:-1]], times)]
        spent = joules()
        began = time.perf_counter()
        model.tokenizer.decode(tokens[0])
        return Request(
            stages=clock.stages,
            ttft_s=first,
            steps_s=steps,
            detokenize_s=time.perf_counter() - began,
            total_s=ended - started,
            prompt_tokens=sum(len(p.ids) for p in prompts),
            image_tokens=sum(p.image_tokens for p in prompts),
            new_tokens=sum(len(t) for t in tokens),
            grids=[[i.grid.t, i.grid.h, i.grid.w] for i in prompts[0].images],
            joules=None if spent is None or before is None else spent - before,
            joules_before_decode=None if before is None or not at_first or at_first[0] is None
            else at_first[0] - before,
        )  # fmt: skip

    def _answer(self, prompts: list[Any], config: Any, on_step: Callable[[int], None]) -> list[tuple[int, ...]]:
        """Token ids of every row; `on_step` is told the number of tokens so far, of all rows."""
        model = self._model
        pieces = 0
        if len(prompts) == 1:
            stream = model.stream_prompt(prompts[0], config, model.decoder())
            for _ in stream:
                pieces += 1
                on_step(pieces)
            return [stream.completion.token_ids]
        rows, stream = model.stream_prompts(prompts, config)
        for _ in stream:
            pieces += 1
            on_step(pieces)
        return [row.completion().token_ids for row in rows]

    def _picture(self, file: bytes, clock: StageClock) -> EncodedImage:
        image = load_image(file)
        clock.lap("file_s")
        size = resized_size(image.size, self._model.bundle.image_processor)
        return self._encode([image], size, clock)

    def _video(self, files: Sequence[bytes], clock: StageClock) -> EncodedImage:
        """Frames and their size are chosen as for a list of pictures in a message."""
        with open_video(files) as source:
            plan = plan_video(source, VideoOptions(), self._model.bundle.image_processor, self._room)
            images = list(source.read(plan.indices))
        clock.lap("file_s")
        return self._encode(images, plan.size, clock)

    def _encode(self, images: Sequence[Image.Image], size: tuple[int, int], clock: StageClock) -> EncodedImage:
        """One picture, or the frames of one video, to be resized to `size` (width, height), stage by stage."""
        processor, original = self._model.bundle.image_processor, images[0].size
        if original != size:
            images = [i.resize(size, Image.Resampling.BICUBIC) for i in images]
        clock.lap("resize_s")
        t, patch = -(-len(images) // processor.temporal_patch_size), processor.patch_size
        grid = VisionGrid(t, size[1] // patch, size[0] // patch)
        done = ProcessedImage(frame_patches(images, size, processor), grid, original, size)
        clock.lap("patches_s")
        embeds = self._vision.run(done)
        clock.lap("vision_s")
        key = content_key(done.pixel_values)
        return EncodedImage(embeds, done.grid, done.original_size, done.resized_size, key, 0.0, 0.0)


def rss_mb() -> float:
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) / 1e3 * 1.024
    return peak_rss_bytes() / 1e6


def answer_job(run: Callable[[Job], Any]) -> None:
    """What a measuring process does: read a Job as JSON from stdin, write what `run` makes of it as one JSON line. It
    ends where the process that started it has ended."""
    job = Job.from_json(sys.stdin.read())
    if job.parent:
        end_with_parent(job.parent)
    sys.stdout.write(json.dumps(asdict(run(job)), allow_nan=False) + "\n")


def main() -> None:
    """One measuring process."""
    answer_job(run_job)


if __name__ == "__main__":
    main()
