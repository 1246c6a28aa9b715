"""What several processes measured of one bundle and workload, as one JSON object (its fields: report.py)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from edgevl.benchmarks.open_loop import Arrival, load
from edgevl.benchmarks.report import percentiles
from edgevl.benchmarks.roofline import Ceilings, decode_bytes, prefill_work, vision_work
from edgevl.benchmarks.stages import STAGES, Job
from edgevl.benchmarks.workloads import Workload
from edgevl.runtime.bundle import Bundle

__all__ = ["case_of", "energy", "throttled_in"]

Round = dict[str, Any]


def case_of(job: Job, rounds: Sequence[Round], ceilings: Ceilings) -> dict[str, Any]:
    """The object, without what is the same for all cases."""
    bundle, work = Bundle.open(job.bundle), job.workload
    requests = [{**r, "round": n} for n, m in enumerate(rounds) for r in m["requests"]]
    first = [r["ttft_s"] for r in requests]  # a list of a group's rows in a closed loop
    gpu = [m["peak_gpu_mb"] for m in rounds if m["peak_gpu_mb"] is not None]
    return {
        "bundle": job.label or bundle.folder.name,
        "precision": bundle.precision,
        "engine": rounds[0]["engine"],
        "workload": asdict(work),
        "describe": work.describe,
        "seed": job.seed,
        "cold_s": [m["cold_s"] for m in rounds],
        "open_s": [m["open_s"] for m in rounds],
        "ttft_s": percentiles(first if work.arrivals_per_s else [s for rows in first for s in rows]),
        "total_s": percentiles([r["total_s"] for r in requests]),
        "memory_mb": {
            "peak": max(m["peak_mb"] for m in rounds),
            "after_open": max(m["rss_open_mb"] for m in rounds),
            "arena_mb": rounds[0]["arena_mb"],
            "peak_gpu_mb": max(gpu) if gpu else None,
        },
        "throttled": throttled_in(rounds),
        **(_open(job, rounds) if work.arrivals_per_s else _closed(job, bundle, rounds, requests, ceilings)),
        "warm_up": [m["warm_up"] for m in rounds],
        "requests": requests,
    }


def throttled_in(rounds: Sequence[Round]) -> int | bool | None:
    """Counts add up; of clocks one round that stayed low is enough."""
    told = [m["throttled"] for m in rounds if m["throttled"] is not None]
    if not told:
        return None
    return any(told) if all(isinstance(t, bool) for t in told) else sum(told)


def _closed(
    job: Job, bundle: Bundle, rounds: Sequence[Round], requests: Sequence[Round], ceilings: Ceilings
) -> dict[str, Any]:
    work = job.workload
    steps = [s for r in requests for s in r["steps_s"]]
    rates = [work.concurrency * len(r["steps_s"]) / sum(r["steps_s"]) for r in requests if r["steps_s"]]
    stages = {s: percentiles([r["stages"][s] for r in requests]) for s in STAGES}
    return {
        "loop": "closed",
        "minutes": job.minutes,
        "tpot_s": percentiles(steps),
        "tokens_per_s": percentiles(rates),
        "detokenize_s": percentiles([r["detokenize_s"] for r in requests]),
        "stages": stages,
        "energy": energy(rounds, requests, work),
        "roofline": _shares(bundle, work, requests, stages, steps, ceilings),
    }


def _open(job: Job, rounds: Sequence[Round]) -> dict[str, Any]:
    runs = [[Arrival(**r) for r in m["requests"]] for m in rounds]
    every = [a for run in runs for a in run]
    found = load(runs, job.workload.arrivals_per_s, job.workload.concurrency)
    known = all(m["joules"] is not None for m in rounds)
    return {
        "loop": "open",
        "queue_s": percentiles([a.queue_s for a in every]),
        "tpot_s": percentiles([(a.total_s - a.ttft_s) / (a.new_tokens - 1) for a in every if a.new_tokens > 1]),
        "load": {**asdict(found), "verdict": found.verdict},
        "energy": {
            "j_per_request": sum(m["joules"] for m in rounds) / len(every) if known else None,
            "j_per_picture": None,  # pictures of some requests are encoded while others are answered
            "sources": rounds[0]["energy_sources"],
            "absent": rounds[0]["absent"],
        },
    }


def energy(rounds: Sequence[Round], requests: Sequence[Round], work: Workload) -> dict[str, Any]:
    """Joules of a closed loop. Per request: of all rows that are answered together. Per token: what came after the
    first ones, over the tokens behind them. Per picture: what came before the first tokens, over all rows' pictures."""
    known = [r for r in requests if r["joules"] is not None]
    split = [r for r in known if r["joules_before_decode"] is not None]
    before = sum(r["joules_before_decode"] for r in split)
    after = sum(r["joules"] for r in split) - before
    tokens = sum(r["new_tokens"] - work.concurrency for r in split)
    pictures = work.pictures * work.concurrency * len(split)
    return {
        "j_per_request": sum(r["joules"] for r in known) / len(known) if known else None,
        "j_before_first_token": before / len(split) if split else None,
        "j_per_token": after / tokens if tokens else None,
        "j_per_picture": before / pictures if pictures else None,
        "sources": rounds[0]["energy_sources"],
        "absent": rounds[0]["absent"],
    }


def _shares(
    bundle: Bundle,
    work: Workload,
    requests: Sequence[Round],
    stages: dict[str, dict[str, float]],
    steps: Sequence[float],
    ceilings: Ceilings,
) -> dict[str, Any]:
    """Achieved rates over the ceilings. Vision and prefill against the GEMM rate `kind` (all operations counted, those
    of attention too, which run in float: a share near 1 is out of reach where attention is large)."""
    out: dict[str, Any] = {
        "read_gb_s": ceilings.read_gb_s,
        "gemm_gop_s": ceilings.gemm_gop_s,
        "kind": ceilings.kind,
        "absent": ceilings.absent,
    }
    prompt = requests[0]["prompt_tokens"] / work.concurrency
    if steps:
        context = prompt + work.new_tokens / 2
        weights = decode_bytes(bundle, 0)
        moved = weights + work.concurrency * (decode_bytes(bundle, int(context)) - weights)
        out["decode"] = moved / percentiles(steps)["p50"] / 1e9 / ceilings.read_gb_s
        out["decode_bytes"] = moved
    rate = ceilings.gemm_gop_s[ceilings.kind]
    if work.concurrency == 1:
        todo = prefill_work(bundle.model, int(prompt))
        out["prefill"] = (todo.gemm + todo.attention) / stages["prefill_s"]["p50"] / 1e9 / rate
    todo = [vision_work(bundle.model, t, h * w) for t, h, w in requests[0]["grids"]]
    if todo:
        operations = work.concurrency * sum(part.gemm + part.attention for part in todo)
        out["vision"] = operations / stages["vision_s"]["p50"] / 1e9 / rate
    return out
