"""Open loop: requests come when a schedule says, whether or not the ones before are done.

    schedule    arrival_times (workloads.py): when every request is due
    queue       first come, first served
    worker      one; when it is free it takes the requests that wait, `concurrency` at most, and answers them together.
                Who comes meanwhile waits until all of them are answered: that is how `generate_batch` works

Seconds of a request count from when it was due, never from when the worker got to it, so that a slow answer shows in
everybody's latency who had to wait for it (G. Tene, "How NOT to measure latency": coordinated omission). Pictures lie
in files before the first request is due; reading and decoding them is part of the answer.

`drive` knows neither model nor clock. What it keeps of a request (`Arrival`) is what a client of a server sees too, and
`load` sums up either.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

import numpy as np

from edgevl.benchmarks.device_memory import DeviceMemory, absences
from edgevl.benchmarks.energy import EnergyMeter, heat
from edgevl.benchmarks.plotting import rate_text
from edgevl.benchmarks.processes import Ending, scratch_folder
from edgevl.benchmarks.stages import Job, Request, Runner, StageClock, answer_job, open_job, rss_mb
from edgevl.benchmarks.throttling import ClockWatch, throttled
from edgevl.benchmarks.workloads import arrival_times
from edgevl.runtime import VisionLanguageModel
from edgevl.runtime.doctor import peak_rss_bytes
from edgevl.runtime.errors import InputError
from edgevl.runtime.row import Row

__all__ = ["Answer", "Arrival", "Load", "MeasuredOpen", "drive", "load", "run_job"]


@dataclass(frozen=True)
class Answer:
    """What the worker tells of one request: the clock at its first and at its last token, and counts."""

    first_at: float
    ended_at: float
    prompt_tokens: int = 0
    image_tokens: int = 0
    new_tokens: int = 0


@dataclass(frozen=True)
class Arrival:
    """One request. `at_s`: when it was due, from the first one on. From then on: `queue_s` until the worker took it,
    `ttft_s` until its first token, `total_s` until its last. `batch`: which of the worker's batches it was in,
    `batch_size`: with how many, itself among them."""

    at_s: float
    queue_s: float
    ttft_s: float
    total_s: float
    batch: int
    batch_size: int
    prompt_tokens: int
    image_tokens: int
    new_tokens: int


@dataclass(frozen=True)
class MeasuredOpen:
    """What one process hands back; as `Measured` (stages.py) where names are the same. `joules`: from the first request
    due to the last token, idle seconds among them."""

    bundle: str
    engine: str
    open_s: float
    cold_s: float
    warm_up: Request
    requests: list[Arrival]
    peak_mb: float
    rss_open_mb: float
    peak_gpu_mb: float | None = None
    arena_mb: float | None = None
    joules: float | None = None
    energy_sources: list[str] = field(default_factory=list)
    absent: dict[str, str] = field(default_factory=dict)
    throttled: int | bool | None = None


def drive(
    due: Sequence[float] | np.ndarray,
    answer: Callable[[Sequence[int]], Sequence[Answer]],
    largest: int,
    clock: Callable[[], float] = time.perf_counter,
    sleep: Callable[[float], object] = time.sleep,
) -> list[Arrival]:
    """Answer every request of a schedule.

    Args:
        due: seconds from the start, ascending; one per request.
        answer: answers requests (indices into `due`) together; times in what it returns are this clock's.
        largest: most requests answered together.
    """
    arrivals: list[Arrival] = []
    start, batch = clock(), 0
    while len(arrivals) < len(due):
        begin = len(arrivals)
        while (now := clock() - start) < due[begin]:
            sleep(due[begin] - now)
        waiting = int(np.searchsorted(due, now, side="right"))
        numbers = range(begin, min(waiting, begin + largest))
        for number, done in zip(numbers, answer(numbers), strict=True):
            at = float(due[number])
            arrivals.append(
                Arrival(
                    at_s=at,
                    queue_s=now - at,
                    ttft_s=done.first_at - start - at,
                    total_s=done.ended_at - start - at,
                    batch=batch,
                    batch_size=len(numbers),
                    prompt_tokens=done.prompt_tokens,
                    image_tokens=done.image_tokens,
                    new_tokens=done.new_tokens,
                )
            )
        batch += 1
    return arrivals


# ---------------------------------------------------------------------- what the requests say together


@dataclass(frozen=True)
class Load:
    """How the machine bore a load; over several runs of one case, their spans added up.

    offered_per_s: the rate asked for. came_per_s: that of the schedules drawn (few requests are off by chance).
    served_per_s, tokens_per_s: requests and new tokens over the span from the first request due to the last token.
    busy: share of that span in which the worker had a request. waiting: requests in the queue, mean over the span.
    batch_size: mean over the worker's batches. full_per_s: requests per second of the batches that were full, which is
    the most that this worker can serve; None where none was full. early_queue_s, late_queue_s: median queueing of the
    first and the last quarter of the requests of every run. overloaded: more came than full batches serve, and the
    queue grew.
    """

    offered_per_s: float
    came_per_s: float
    served_per_s: float
    tokens_per_s: float
    busy: float
    waiting: float
    batch_size: float
    full_per_s: float | None
    early_queue_s: float
    late_queue_s: float
    overloaded: bool

    @property
    def verdict(self) -> str:
        """One line."""
        offered, came, served = map(rate_text, (self.offered_per_s, self.came_per_s, self.served_per_s))
        rates = f"offered {offered}/s, came {came}/s, served {served}/s"
        wait = f"median wait {self.early_queue_s:.2f} s in the first quarter, {self.late_queue_s:.2f} s in the last"
        if self.full_per_s is None:
            return f"keeps up so far (no batch was full): {rates}, worker busy {self.busy:.0%}; {wait}"
        most = f"full batches reach {rate_text(self.full_per_s)}/s"
        if self.overloaded:
            return (
                f"OVERLOADED: {rates} ({self.served_per_s / self.offered_per_s:.0%} of what was offered), {most}; the "
                f"queue grew: {wait}. Latency depends on how long the run was"
            )
        word = "near its limit" if self.came_per_s > self.full_per_s else "keeps up"
        return f"{word}: {rates}, {most}, worker busy {self.busy:.0%}; {wait}"


def load(runs: Sequence[Sequence[Arrival]], offered: float, largest: int) -> Load:
    """Sum up the runs of one case (all non-empty). `largest`: most requests that were answered together."""
    spans = [max(a.at_s + a.total_s for a in run) - run[0].at_s for run in runs]
    every = [a for run in runs for a in run]
    batches = [list(group) for run in runs for _, group in groupby(run, key=lambda a: a.batch)]
    full = [b for b in batches if len(b) == largest]
    full_per_s = largest * len(full) / sum(map(_service, full)) if full else None
    gaps, drawn = sum(len(run) - 1 for run in runs), sum(run[-1].at_s - run[0].at_s for run in runs)
    came = gaps / drawn if drawn else offered
    quarters = [max(1, len(run) // 4) for run in runs]
    early = float(np.median([a.queue_s for run, n in zip(runs, quarters) for a in run[:n]]))
    late = float(np.median([a.queue_s for run, n in zip(runs, quarters) for a in run[-n:]]))
    return Load(
        offered_per_s=offered,
        came_per_s=came,
        served_per_s=len(every) / sum(spans),
        tokens_per_s=sum(a.new_tokens for a in every) / sum(spans),
        busy=sum(map(_service, batches)) / sum(spans),
        waiting=sum(a.queue_s for a in every) / sum(spans),
        batch_size=len(every) / len(batches),
        full_per_s=full_per_s,
        early_queue_s=early,
        late_queue_s=late,
        overloaded=full_per_s is not None and came > full_per_s and late > early,
    )


def _service(batch: Sequence[Arrival]) -> float:
    """Seconds from when the worker took a batch to the last token of it."""
    return max(a.at_s + a.total_s for a in batch) - (batch[0].at_s + batch[0].queue_s)


# ---------------------------------------------------------------------- one measuring process


class _Worker:
    """Answers requests of a job whose pictures it has put into `folder`."""

    def __init__(self, model: VisionLanguageModel, runner: Runner, job: Job, folder: Path) -> None:
        self._model, self._runner, self._config = model, runner, runner.config()
        self._files: list[tuple[list[Path], list[Path]]] = []
        for number in range(job.requests):
            # The rows before are those of the request to warm up.
            pictures, frames = runner.files(job.workload.concurrency + number)
            self._files.append((_put(folder, f"{number}-picture", pictures), _put(folder, f"{number}-frame", frames)))

    def answer(self, numbers: Sequence[int]) -> list[Answer]:
        prompts = []
        for number in numbers:
            pictures, frames = ([p.read_bytes() for p in paths] for paths in self._files[number])
            prompts.append(self._runner.prompt(pictures, frames, StageClock()))
        rows, pieces = self._model.stream_prompts(prompts, self._config)
        first: dict[Row, float] = {}
        ended: dict[Row, float] = {}
        for row, _ in pieces:
            now = time.perf_counter()
            first.setdefault(row, now)
            ended[row] = now
        return [
            Answer(first[row], ended[row], len(prompt.ids), prompt.image_tokens, len(row.tokens))
            for row, prompt in zip(rows, prompts)
        ]


def _put(folder: Path, name: str, files: Sequence[bytes]) -> list[Path]:
    paths = [folder / f"{name}-{i}.jpg" for i in range(len(files))]
    for path, data in zip(paths, files):
        path.write_bytes(data)
    return paths


def run_job(job: Job) -> MeasuredOpen:
    """Measure in this process (which should be fresh: memory and cold start are the process's).

    Raises:
        InputError: the workload is a closed loop, or the job a soak.
    """
    work = job.workload
    if not work.arrivals_per_s or job.minutes:
        raise InputError(f"workload {work.name!r}: an open loop needs a rate of arrivals and a number of requests")
    model, runner, open_s, apart_s, spawned = open_job(job)
    rss_open, memory, watch = rss_mb(), DeviceMemory(model.engine.name), ClockWatch(job.cores)
    memory.look()
    due = arrival_times(work.arrivals_per_s, job.requests, (job.seed, job.round))
    with EnergyMeter() as meter, scratch_folder() as folder:
        # As many rows as the largest batch has: what a batch takes for the first time is not a request's to pay.
        warm_up, cold_s = runner.warm_up(meter.read, spawned, apart_s)
        worker = _Worker(model, runner, job, folder)

        def answer(numbers: Sequence[int]) -> list[Answer]:
            with watch.loaded():  # between batches the clocks may fall
                return worker.answer(numbers)

        before, hot = meter.read(), heat()
        requests = drive(due, answer, work.concurrency)
        spent, slow = meter.read(), throttled(hot, heat(), watch)
        memory.look()
        name = model.engine.name
        model.close()
        return MeasuredOpen(
            bundle=job.bundle,
            engine=name,
            open_s=open_s,
            cold_s=cold_s,
            warm_up=warm_up,
            requests=requests,
            peak_mb=peak_rss_bytes() / 1e6,
            rss_open_mb=rss_open,
            peak_gpu_mb=memory.peak_mb,
            joules=None if spent is None or before is None else spent - before,
            energy_sources=list(meter.sources),
            absent=meter.absent | absences(memory, slow),
            throttled=slow,
        )


def main() -> None:
    """One measuring process; told to end, it removes its pictures."""
    with Ending():
        answer_job(run_job)


if __name__ == "__main__":
    main()
