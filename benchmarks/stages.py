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
and the answers are decoded together. A process answers one request before it measures: that one is the cold start.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from PIL import Image

from edgevl.benchmarks.energy import EnergyMeter, heat
from edgevl.benchmarks.workloads import Workload, question
from edgevl.runtime import VisionLanguageModel
from edgevl.runtime.doctor import peak_rss_bytes
from edgevl.runtime.errors import InputError
from edgevl.runtime.generation import PreparedPrompt
from edgevl.runtime.image_cache import content_key
from edgevl.runtime.image_loading import load_image
from edgevl.runtime.image_processing import ProcessedImage, preprocess_frames, preprocess_image, smart_resize
from edgevl.runtime.sampling import GenerationConfig
from edgevl.runtime.vision import EncodedImage, VisionStage

__all__ = ["STAGES", "Job", "Measured", "Request", "Runner", "StageClock", "open_job", "rss_mb", "run_job"]

STAGES = ("file_s", "resize_s", "patches_s", "vision_s", "prompt_s", "prefill_s")


@dataclass(frozen=True)
class Job:
    """What one process is told. `spawned`: time.time() when it was started. `minutes`: of a soak; 0: `requests`.
    `round`: which process of the case it is; only the schedule of arrivals depends on it."""

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

    @classmethod
    def from_json(cls, text: str) -> Job:
        data = json.loads(text)
        return cls(**{**data, "workload": Workload(**data["workload"]), "cores": tuple(data["cores"])})


@dataclass(frozen=True)
class Request:
    """Seconds of one request. `steps_s` has one entry per token after the first (a step of a batch answers all its
    rows); `at_s` is when it began, from the first measured request on; joules are None without a sensor."""

    stages: dict[str, float]
    ttft_s: float
    steps_s: list[float]
    detokenize_s: float
    total_s: float
    prompt_tokens: int
    image_tokens: int
    new_tokens: int
    at_s: float = 0.0
    joules: float | None = None
    joules_before_decode: float | None = None
    rss_mb: float = 0.0
    mhz: float | None = None
    celsius: float | None = None


@dataclass(frozen=True)
class Measured:
    """What one process hands back. `cold_s`: from the start of the process to its first token; `open_s`: of that,
    opening the bundle. Bytes are MB (10^6)."""

    bundle: str
    engine: str
    open_s: float
    cold_s: float
    warm_up: Request
    requests: list[Request]
    peak_mb: float
    rss_open_mb: float
    energy_sources: list[str] = field(default_factory=list)
    energy_absent: dict[str, str] = field(default_factory=dict)
    throttled: int | None = None


def run_job(job: Job) -> Measured:
    """Measure in this process (which should be fresh: memory and cold start are the process's).

    Raises:
        InputError: the workload is an open loop (see open_loop.py).
    """
    if job.workload.arrivals_per_s:
        raise InputError(f"workload {job.workload.name!r}: requests arrive by themselves; measure it as an open loop")
    model, runner, open_s, spawned = open_job(job)
    rss_open = rss_mb()
    with EnergyMeter() as meter:
        first: list[float] = []
        warm_up = runner.request(0, meter.read, lambda: first.append(time.time() - spawned))
        hot = heat()
        requests: list[Request] = []
        origin = time.perf_counter()
        while len(requests) < job.requests or time.perf_counter() - origin < 60 * job.minutes:
            at = time.perf_counter() - origin
            now = heat()
            done = runner.request(len(requests) + 1, meter.read)
            requests.append(replace(done, at_s=at, rss_mb=rss_mb(), mhz=now.mhz, celsius=now.celsius))
        after = heat()
        throttled = None if after.throttled is None else after.throttled - (hot.throttled or 0)
        name = model.engine.name
        model.close()
        return Measured(
            bundle=job.bundle,
            engine=name,
            open_s=open_s,
            cold_s=first[0],
            warm_up=warm_up,
            requests=requests,
            peak_mb=peak_rss_bytes() / 1e6,
            rss_open_mb=rss_open,
            energy_sources=list(meter.sources),
            energy_absent=meter.absent,
            throttled=throttled,
        )


def open_job(job: Job) -> tuple[VisionLanguageModel, Runner, float, float]:
    """The model on the job's cores and engine, a runner for it, the seconds that opening took, and time.time() when the
    process was started."""
    if job.cores:
        os.sched_setaffinity(0, job.cores)
    spawned = job.spawned or time.time()
    began = time.perf_counter()
    model = VisionLanguageModel.open(job.bundle, job.engine, threads=job.threads)
    return model, Runner(model, job), time.perf_counter() - began, spawned


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

    def files(self, row: int) -> tuple[list[bytes], list[bytes]]:
        """JPEG bytes of the pictures, and of the frames of the video, of one request."""
        work, seed = self._work, self._job.seed
        pictures = [work.picture(seed, row, i) for i in range(work.pictures)]
        return pictures, work.video(seed, row) if work.frames else []

    def prompt(self, pictures: Sequence[bytes], frames: Sequence[bytes], clock: StageClock) -> PreparedPrompt:
        """The prompt of one request, its pictures encoded."""
        content: list[dict[str, Any]] = [{"type": "image", "image": self._encode([p], clock)} for p in pictures]
        if frames:
            content.append({"type": "video", "video": self._encode(frames, clock)})
        content.append({"type": "text", "text": self._text})
        prompt = self._model.prepare([{"role": "user", "content": content}])
        clock.lap("prompt_s")
        return prompt

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
    ) -> Request:
        """Answer request `number` (all its rows, where several are asked at once). `clock` may measure otherwise."""
        work, model = self._work, self._model
        # The files are there before the request begins.
        files = [self.files(number * work.concurrency + row) for row in range(work.concurrency)]
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
            if not first:
                first.append(time.perf_counter() - started)
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
            ttft_s=first[0],
            steps_s=steps,
            detokenize_s=time.perf_counter() - began,
            total_s=ended - started,
            prompt_tokens=sum(len(p.ids) for p in prompts),
            image_tokens=sum(p.image_tokens for p in prompts),
            new_tokens=sum(len(t) for t in tokens),
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

    def _encode(self, files: Sequence[bytes], clock: StageClock) -> EncodedImage:
        """One picture, or the frames of one video, stage by stage."""
        processor = self._model.bundle.image_processor
        images = [load_image(f) for f in files]
        clock.lap("file_s")
        width, height = images[0].size
        h, w = smart_resize(height, width, processor.factor, processor.min_pixels, processor.max_pixels)
        images = [i.resize((w, h), Image.Resampling.BICUBIC) for i in images]
        clock.lap("resize_s")
        # A picture of the right size is only copied by the processor's own resizing.
        done: ProcessedImage = (
            preprocess_image(images[0], processor) if len(images) == 1 else preprocess_frames(images, processor)
        )
        done = replace(done, original_size=(width, height))
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


def main() -> None:
    """Read a Job as JSON from stdin, write a Measured as one JSON line."""
    measured = run_job(Job.from_json(sys.stdin.read()))
    sys.stdout.write(json.dumps(asdict(measured)) + "\n")


if __name__ == "__main__":
    main()
