"""Requests that arrive by themselves: the schedule, the queue against a discrete simulation, and the command.

The queue's seconds are held on a clock made here; nothing asserts how long real work takes.
"""

from __future__ import annotations

import heapq
import re
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Pair
from test_cli import edgevl

from edgevl.benchmarks import stages
from edgevl.benchmarks.open_loop import Answer, Arrival, drive, load, run_job
from edgevl.benchmarks.report import SCHEMA, html_page, percentiles, read_lines
from edgevl.benchmarks.stages import Job
from edgevl.benchmarks.workloads import Workload, arrival_times, workload
from edgevl.runtime.errors import InputError

# ---------------------------------------------------------------- the schedule


def test_arrivals_are_a_poisson_process():
    times = arrival_times(4.0, 40_001, (7, 0))
    gaps = np.diff(times)
    assert times[0] == 0 and times.dtype == np.float64 and (gaps > 0).all()
    # exponential: mean and standard deviation 1 / rate, and its distribution function (Kolmogorov-Smirnov, 1 % level)
    assert gaps.mean() == pytest.approx(0.25, rel=0.02) and gaps.std() == pytest.approx(0.25, rel=0.03)
    ordered = np.sort(gaps)
    ranks = np.arange(1, len(gaps) + 1) / len(gaps)
    assert np.abs(ranks - (1 - np.exp(-4.0 * ordered))).max() < 1.63 / np.sqrt(len(gaps))
    # without memory: gaps that follow each other are uncorrelated, and counts per second are as variable as many
    assert abs(np.corrcoef(gaps[:-1], gaps[1:])[0, 1]) < 0.02
    counts = np.bincount(times.astype(int))[:-1]
    assert counts.var() / counts.mean() == pytest.approx(1, abs=0.05)


def test_a_schedule_belongs_to_its_seed():
    times = arrival_times(2.0, 50, (3, 1))
    assert (times == arrival_times(2.0, 50, (3, 1))).all()
    assert (times[:20] == arrival_times(2.0, 20, (3, 1))).all()
    for other in ((3, 2), (4, 1)):
        assert not np.isclose(times[1:], arrival_times(2.0, 50, other)[1:]).any()
    np.testing.assert_allclose(arrival_times(8.0, 50, (3, 1)), times / 4)


@pytest.mark.parametrize(("rate", "count"), [(0.0, 5), (-1.0, 5), (float("nan"), 5), (float("inf"), 5), (1.0, 0)])
def test_schedules_that_cannot_be(rate: float, count: int):
    with pytest.raises(InputError, match="expected a rate above 0 and 1 or more"):
        arrival_times(rate, count, (0,))


def test_a_workload_says_that_requests_arrive():
    work = workload("picture", arrivals_per_s=0.5, concurrency=4)
    assert work.name == "picture* 0.5/s"
    assert work.describe == "1 × 448×448, 16 text tokens, 64 new, 0.5 arrive per second, up to 4 at once"
    assert workload("picture", arrivals_per_s=2.0).name == "picture 2/s"
    for rate in (-1.0, 1e5, float("nan")):
        with pytest.raises(InputError, match="arrivals_per_s is"):
            workload("picture", arrivals_per_s=rate)


# ---------------------------------------------------------------- the queue, against a simulation


class Machine:
    """A clock that stands still but for sleeping and answering; what a batch takes is given by its requests."""

    def __init__(self, first: Callable[[int], float], rest: Callable[[int], float], start: float = 0.0) -> None:
        self.now, self._first, self._rest = start, first, rest

    def clock(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        assert seconds > 0
        self.now += seconds

    def answer(self, numbers: Sequence[int]) -> list[Answer]:
        """First tokens one after another, then all rows together."""
        at = []
        for number in numbers:
            self.now += self._first(number)
            at.append(self.now)
        self.now += max(self._rest(n) for n in numbers)
        return [Answer(t, self.now, new_tokens=n % 5 + 1) for n, t in zip(numbers, at)]


def simulate(
    due: Sequence[float], first: Callable[[int], float], rest: Callable[[int], float], largest: int
) -> list[tuple[float, float, float, int]]:
    """One server, first come first served, in batches: the textbook's simulation by events. (queue, TTFT, total, batch
    size) of each request."""
    events = [(t, 0, i) for i, t in enumerate(due)]  # arrivals before a departure at the same moment
    heapq.heapify(events)
    waiting: deque[int] = deque()
    free = True
    found: list[tuple[float, float, float, int]] = [(0, 0, 0, 0)] * len(due)
    while events:
        now, kind, number = heapq.heappop(events)
        if kind == 0:
            waiting.append(number)
            if events and events[0][:2] == (now, 0):
                continue  # those who come at one moment are seen together
        else:
            free = True
        if free and waiting:
            taken = [waiting.popleft() for _ in range(min(largest, len(waiting)))]
            tokens, at = {}, now
            for i in taken:
                at += first(i)
                tokens[i] = at
            end = at + max(rest(i) for i in taken)
            for i in taken:
                found[i] = (now - due[i], tokens[i] - due[i], end - due[i], len(taken))
            free = False
            heapq.heappush(events, (end, 1, -1))
    return found


@pytest.mark.parametrize("largest", [1, 3, 16])
@pytest.mark.parametrize("rate", [0.2, 1.0, 6.0])
def test_the_queue_is_the_simulations(largest: int, rate: float):
    rng = np.random.default_rng(5)
    prefill, decode = rng.uniform(0.05, 0.6, 300), rng.uniform(0.0, 1.0, 300)
    due = arrival_times(rate, 300, (1, 2))
    due[40:43] = due[40]  # at one moment
    machine = Machine(prefill.__getitem__, decode.__getitem__)
    arrivals = drive(due, machine.answer, largest, machine.clock, machine.sleep)
    expected = simulate(list(due), prefill.__getitem__, decode.__getitem__, largest)
    got = [(a.queue_s, a.ttft_s, a.total_s, a.batch_size) for a in arrivals]
    np.testing.assert_allclose(got, expected, atol=1e-9)
    assert [a.at_s for a in arrivals] == list(due)
    assert [a.new_tokens for a in arrivals] == [i % 5 + 1 for i in range(300)]
    sizes = np.bincount([a.batch for a in arrivals])
    assert [sizes[a.batch] for a in arrivals] == [a.batch_size for a in arrivals] and sizes.max() <= largest


def test_alone_the_wait_is_lindleys():
    """W[n+1] = max(0, W[n] + S[n] - gap[n]) (D. V. Lindley 1952)."""
    service = np.random.default_rng(0).exponential(0.8, 500)
    due = arrival_times(1.0, 500, (0,))
    machine = Machine(service.__getitem__, lambda _: 0.0)
    wait = [0.0]
    for s, gap in zip(service, np.diff(due)):
        wait.append(max(0.0, wait[-1] + s - gap))
    arrivals = drive(due, machine.answer, 1, machine.clock, machine.sleep)
    np.testing.assert_allclose([a.queue_s for a in arrivals], wait, atol=1e-9)


def test_the_mean_wait_is_pollaczek_khinchines():
    """Constant service S at load r: S r / (2 (1 - r)); and the mean queue is Little's, rate times wait."""
    machine = Machine(lambda _: 0.5, lambda _: 0.0)
    due = arrival_times(1.2, 60_000, (4,))
    arrivals = drive(due, machine.answer, 1, machine.clock, machine.sleep)
    mean = np.mean([a.queue_s for a in arrivals])
    assert mean == pytest.approx(0.5 * 0.6 / (2 * 0.4), rel=0.05)
    found = load([arrivals], 1.2, 1)
    assert found.busy == pytest.approx(0.6, rel=0.02) and found.waiting == pytest.approx(1.2 * mean, rel=0.02)
    assert found.full_per_s == pytest.approx(2.0) and not found.overloaded


def test_latency_counts_from_when_a_request_was_due():
    """A stall of 10 s: who came meanwhile has waited, though the worker took each in a moment."""
    machine = Machine(lambda n: 10.0 if n == 0 else 0.01, lambda _: 0.0, start=1e6)
    arrivals = drive([0.0, 1.0, 9.0, 20.0], machine.answer, 1, machine.clock, machine.sleep)
    assert [a.queue_s for a in arrivals] == pytest.approx([0, 9, 1.01, 0], abs=1e-6)
    assert [a.ttft_s for a in arrivals] == pytest.approx([10, 9.01, 1.02, 0.01], abs=1e-6)


def test_a_sleep_that_ends_late_counts_as_waiting():
    machine = Machine(lambda _: 0.1, lambda _: 0.0)

    def late(seconds: float) -> None:
        machine.sleep(seconds * 0.5 if seconds > 1 else seconds + 0.02)  # too short is slept again

    arrivals = drive([0.0, 4.0, 4.01], machine.answer, 2, machine.clock, late)
    assert [(round(a.queue_s, 9), a.batch_size) for a in arrivals] == [(0.0, 1), (0.02, 2), (0.01, 2)]


# ---------------------------------------------------------------- what the requests say together


def run_of(rate: float, service: float, count: int = 80, largest: int = 1, seed: int = 0) -> list[Arrival]:
    machine = Machine(lambda _: service, lambda _: 0.0)
    return drive(arrival_times(rate, count, (seed,)), machine.answer, largest, machine.clock, machine.sleep)


def test_load_by_hand():
    made = [  # (due, queue, total, batch, size): two alone, one idle second, two together
        (0.0, 0.0, 2.0, 0, 1),
        (1.0, 1.0, 3.0, 1, 1),
        (5.0, 0.0, 3.0, 2, 2),
        (5.0, 0.0, 4.0, 2, 2),
    ]
    run = [Arrival(at, q, q + 0.5, t, b, n, 10, 4, 7) for at, q, t, b, n in made]
    found = load([run], 0.5, 2)
    assert (found.served_per_s, found.tokens_per_s) == (pytest.approx(4 / 9), pytest.approx(28 / 9))
    assert (found.busy, found.waiting) == (pytest.approx(8 / 9), pytest.approx(1 / 9))
    assert (found.came_per_s, found.batch_size) == (pytest.approx(3 / 5), pytest.approx(4 / 3))
    assert found.full_per_s == pytest.approx(2 / 4) and found.early_queue_s == 0 == found.late_queue_s
    assert not found.overloaded and "near its limit" in found.verdict
    assert load([run, run], 0.5, 2) == found  # spans add up, and so does what was done in them
    alone = load([run[:1]], 0.5, 2)
    assert alone.full_per_s is None and alone.came_per_s == 0.5 and alone.busy == 1
    assert alone.verdict.startswith("keeps up so far (no batch was full): offered 0.5/s")


@pytest.mark.parametrize(("rate", "largest", "overloaded"), [(0.5, 1, False), (3.0, 1, True), (30.0, 4, True)])
def test_more_than_the_machine_serves_is_said(rate: float, largest: int, overloaded: bool):
    """One request takes 0.5 s, alone or in a batch: it serves 2 per second."""
    found = load([run_of(rate, 0.5, largest=largest, seed=s) for s in range(3)], rate, largest)
    assert found.overloaded == overloaded
    if overloaded:
        assert found.full_per_s == pytest.approx(2) and found.served_per_s == pytest.approx(2, rel=0.05)
        assert found.late_queue_s > 3 * found.early_queue_s > 0 and found.busy > 0.95
        numbers = f"offered {rate:g}/s, came {found.came_per_s:.3g}/s, served {found.served_per_s:.3g}/s"
        assert found.verdict.startswith(f"OVERLOADED: {numbers} ({found.served_per_s / rate:.0%} of what was offered)")
        assert f"{found.early_queue_s:.2f} s in the first quarter, {found.late_queue_s:.2f} s" in found.verdict
    else:
        assert found.verdict.startswith("keeps up: offered 0.5/s") and found.late_queue_s < 0.5


# ---------------------------------------------------------------- one process


@pytest.mark.parametrize("changes", [{"concurrency": 3}, {"pictures": 0, "frames": 4}, {"new_tokens": 1}])
def test_a_real_model_under_arrivals(tiny: Pair, changes, monkeypatch):
    """Requests come so fast that batches form; every answer is the one that the request gets alone."""
    answers: list[tuple[int, ...]] = []
    real = stages.VisionLanguageModel.stream_prompts

    def stream(self, prompts, config, started=None):
        rows, pieces = real(self, prompts, config, started)

        def kept():
            yield from pieces
            answers.extend(tuple(row.tokens) for row in rows)

        return rows, kept()

    monkeypatch.setattr(stages.VisionLanguageModel, "stream_prompts", stream)
    fields = {"width": 84, "height": 56, "new_tokens": 4, "arrivals_per_s": 5000.0, **changes}
    work = Workload("w", **fields)
    done = run_job(Job(str(tiny.bundle), work, threads=1, requests=7))
    assert len(done.requests) == 7 and 0 < done.open_s < done.cold_s and 0 < done.rss_open_mb <= 1.02 * done.peak_mb
    ends = [a.at_s + a.total_s for a in done.requests]
    assert ends == sorted(ends) and [a.at_s for a in done.requests] == list(arrival_times(5000, 7, (0, 0)))
    for a in done.requests:
        assert 0 <= a.queue_s < a.ttft_s <= a.total_s and a.new_tokens == work.new_tokens
        assert a.image_tokens == 6 * (work.pictures + work.frames // 2)
        assert a.prompt_tokens > a.image_tokens + work.prompt_tokens
        assert 1 <= a.batch_size <= work.concurrency
    if work.concurrency > 1:
        assert max(a.batch_size for a in done.requests) == work.concurrency  # the queue is longer than a batch
    got = answers[-7:]  # before them what warmed up
    with tiny.open() as model:
        closed = stages.Runner(model, Job(str(tiny.bundle), replace(work, concurrency=1, arrivals_per_s=0.0)))
        for number in range(7):
            files = closed.files(work.concurrency + number)
            prompt = closed.prompt(*files, stages.StageClock())
            alone = model.stream_prompt(prompt, closed.config(), model.decoder()).completion
            assert alone.token_ids == got[number]


def test_each_loop_refuses_the_others_jobs(tiny: Pair):
    closed, opened = Workload("w", 56, 56, new_tokens=2), Workload("w", 56, 56, new_tokens=2, arrivals_per_s=5.0)
    with pytest.raises(InputError, match="measure it as an open loop"):
        stages.run_job(Job(str(tiny.bundle), opened, threads=1))
    for job in (Job(str(tiny.bundle), closed), Job(str(tiny.bundle), opened, minutes=1)):
        with pytest.raises(InputError, match="needs a rate of arrivals and a number of requests"):
            run_job(job)


# ---------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def measured(tiny: Pair, tmp_path_factory):
    folder = tmp_path_factory.mktemp("arrivals")
    done = edgevl(
        *("bench", tiny.bundle, "--arrivals", 20, "--arrivals", 5000, "--concurrency", 2, "--size", "56x84"),
        *("--new-tokens", 3, "--requests", 8, "--rounds", 2, "--threads", 1, "--checkpoint", "tiny, random"),
        *("--json", folder / "r.jsonl", "--report", folder / "r.html"),
    )
    assert done.returncode == 0, done.stderr
    return done, folder


def _arrival(request: dict[str, Any]) -> Arrival:
    return Arrival(**{k: v for k, v in request.items() if k != "round"})


def test_json_lines_of_an_open_loop(measured):
    cases = read_lines(measured[1] / "r.jsonl")
    assert [c["workload"]["name"] for c in cases] == ["picture* 20/s", "picture* 5000/s"]
    for case, rate in zip(cases, (20, 5000)):
        assert (case["schema"], case["loop"], case["workload"]["arrivals_per_s"]) == (SCHEMA, "open", rate)
        assert not {"stages", "roofline", "tokens_per_s", "minutes"} & set(case)
        requests = case["requests"]
        assert [r["round"] for r in requests] == [0] * 8 + [1] * 8 and len(case["cold_s"]) == 2
        for n in range(2):  # each process has a schedule of its own
            assert [r["at_s"] for r in requests if r["round"] == n] == list(arrival_times(rate, 8, (0, n)))
        for key in ("queue_s", "ttft_s", "total_s"):
            assert case[key] == pytest.approx(percentiles([r[key] for r in requests]))
        gaps = [(r["total_s"] - r["ttft_s"]) / 2 for r in requests]
        assert case["tpot_s"]["p50"] == pytest.approx(np.percentile(gaps, 50)) and case["tpot_s"]["n"] == 16
        runs = [[_arrival(r) for r in requests if r["round"] == n] for n in range(2)]
        again = load(runs, rate, 2)
        assert case["load"].pop("verdict") == again.verdict and case["load"] == again.__dict__
        assert (case["energy"]["j_per_request"] is None) == (not case["energy"]["sources"])
    assert cases[1]["load"]["overloaded"]  # 5,000 requests per second with pictures


def test_the_tables_and_the_page(measured):
    out = measured[0].stdout
    assert "offered /s" in out and "first token" in out and "stages before the first token" not in out
    assert "picture* 5000/s: OVERLOADED: offered 5,000/s" in out
    assert "…" not in out  # nothing cut
    page = (measured[1] / "r.html").read_text()
    assert page.count("<svg") == 3 and "Open loop: load and latency" in page and "OVERLOADED" in page
    assert "Before the first token" not in page and not re.findall(r"""(?:src|href)=["'](?!#)""", page)


def test_a_page_of_both_loops(measured, tiny: Pair):
    folder = measured[1]
    small = ("--size", "56x56", "--new-tokens", 2, "--requests", 2, "--rounds", 1, "--threads", 1)
    done = edgevl("bench", tiny.bundle, *small, "--json", folder / "closed.jsonl")
    assert done.returncode == 0, done.stderr
    page = html_page([*read_lines(folder / "closed.jsonl"), *read_lines(folder / "r.jsonl")[:1]])
    assert "Before the first token" in page and "Open loop: latency" in page and "load and latency" not in page


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--arrivals", "0"], "--arrivals 0: expected requests per second, above 0"),
        (["--arrivals", "-2"], "--arrivals -2: expected"),
        (["--arrivals", "nan"], "--arrivals nan: expected"),
        (["--arrivals", "20000"], "at most 10000"),
        (["--arrivals", "many"], "'many' is not a valid float"),
        (["--arrivals", "2", "--arrivals", "2.0"], "the same rate twice in 2, 2"),
        (["--arrivals", "2", "--minutes", "1.5"], "for 90 s at 2 per second: --requests 180"),
        (["--arrivals", "2", "--operators"], "--operators traces one request"),
        (["--arrivals", "2", "--concurrency", "65"], "concurrency is 65, expected 1 to 64"),
    ],
)
def test_bad_input_is_one_line(tiny: Pair, tmp_path: Path, arguments, message):
    done = edgevl("bench", tiny.bundle, "--rounds", 1, "--threads", 1, "--json", tmp_path / "r.jsonl", *arguments)
    assert done.returncode == 2 and done.stdout == "" and not list(tmp_path.iterdir())
    assert message in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr
