"""The subcommand `bench`."""

from __future__ import annotations

import datetime
import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import click
from tqdm import tqdm

from edgevl.benchmarks.open_loop import Arrival, load
from edgevl.benchmarks.report import SCHEMA, check_libraries, html_page, percentiles, print_table, write_lines
from edgevl.benchmarks.roofline import Ceilings, decode_bytes, measure_ceilings, prefill_work, vision_work
from edgevl.benchmarks.stages import STAGES, Job
from edgevl.benchmarks.system_info import system_info
from edgevl.benchmarks.turns import environment, in_turn
from edgevl.benchmarks.workloads import WORKLOADS, Workload, workload
from edgevl.runtime.bundle import Bundle
from edgevl.runtime.commands import note
from edgevl.runtime.engine import ENGINES, choose_engine, usable_cores
from edgevl.runtime.errors import EdgeVLError, InputError
from edgevl.runtime.output_file import check_output_file, write_output

__all__ = ["bench"]


@click.command()
@click.argument("bundles", nargs=-1, required=True, metavar="BUNDLE...")
@click.option("--workload", "names", multiple=True, metavar="W", help=f"Several may be given: {', '.join(WORKLOADS)}.")
@click.option("--size", metavar="WxH", help="Another size of pictures and frames.")
@click.option("--pictures", type=int, metavar="N", help="Another number of pictures.")
@click.option("--frames", type=int, metavar="N", help="Another number of video frames.")
@click.option("--prompt-tokens", type=int, metavar="N", help="Another length of the question.")
@click.option("--new-tokens", type=int, metavar="N", help="Another length of the answer.")
@click.option("--concurrency", type=int, metavar="N", help="Requests answered together (with --arrivals: at most).")
@click.option(
    "--arrivals",
    multiple=True,
    type=float,
    metavar="R",
    help="Open loop: R requests per second arrive by themselves (repeatable: a case for each rate).",
)
@click.option(
    "--requests",
    type=click.IntRange(1),
    metavar="N",
    help="Measured in every process [default: 5; 50 with --arrivals].",
)
@click.option("--rounds", default=3, show_default=True, type=click.IntRange(1), help="Processes of every case.")
@click.option(
    "--minutes", default=0.0, type=click.FloatRange(0), help="Soak: go on at least this long in every process."
)
@click.option("--engine", default="ort-cpu", show_default=True, metavar="E", help=f"auto, {', '.join(ENGINES)}.")
@click.option("--threads", type=click.IntRange(1), metavar="N", help="Worker threads [default: the usable cores].")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0), help="Of pictures and arrivals.")
@click.option("--checkpoint", "kind", default="not told", metavar="TEXT", help="What the weights are, for the report.")
@click.option("--json", "json_path", metavar="F", help="Write one JSON line per case.")
@click.option("--report", metavar="F.html", help="Write a page with plots.")
@click.option(
    "--fidelity",
    multiple=True,
    metavar="BUNDLE=F.json",
    help="A fidelity report of a bundle's checkpoint, to plot precision against speed (repeatable).",
)
@click.option(
    "--profile", is_flag=True, help="First measure and keep this machine's speed with each bundle, for --ttft-budget."
)
@click.option("--operators", is_flag=True, help="Only trace one request of each case: the share of every operator.")
def bench(bundles: tuple[str, ...], names: tuple[str, ...], **options: Any) -> None:
    """Measure BUNDLEs: stages, p50 / p95 / p99, cold start, memory, energy, share of what the machine could do.

    Every case runs in processes of its own, in turn with the others, so that what else the machine does hits all alike.

    \b
    Example:
      edgevl bench bundle --workload picture --workload document --report bench.html
      edgevl bench bundle --arrivals 0.5 --arrivals 2 --concurrency 4 --report load.html
    """
    check_libraries(page=options["report"] is not None)
    _check_arrivals(options)
    works = [
        _workload(name, rate, options) for name in names or ("picture",) for rate in options["arrivals"] or (None,)
    ]
    opened = [Bundle.open(bundle) for bundle in bundles]
    if options["engine"] not in (*ENGINES, "auto"):
        raise InputError(f"engine {options['engine']!r} is unknown; expected auto, {', '.join(ENGINES)}")
    for key, what in (("json_path", "a file of JSON lines"), ("report", "an HTML file")):
        if options[key] is not None:
            check_output_file(options[key], what)
    divergences = _divergences(options["fidelity"], bundles)
    threads = options["threads"] or usable_cores()
    if options["operators"]:
        _print_operators(bundles, works, options["engine"], threads)
        return
    engines = [_engine(bundle, options["engine"]) for bundle in opened]
    if options["profile"]:
        for bundle, engine in zip(bundles, engines):
            _keep_profile(bundle, engine, threads)
    note("measuring the machine's ceilings")
    ceilings = measure_ceilings(threads)
    system = system_info(threads)
    cores = tuple(sorted(os.sched_getaffinity(0))[:threads]) if hasattr(os, "sched_getaffinity") else ()
    requests = options["requests"] or (50 if options["arrivals"] else 5)
    jobs = [
        Job(bundle, work, engine, threads, requests, options["minutes"], options["seed"], cores)
        for bundle, engine in zip(bundles, engines)
        for work in works
    ]
    measured = _run(jobs, options["rounds"])
    date = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    head = {"schema": SCHEMA, "date": date, "system": system, "checkpoint": options["kind"]}
    cases = [{**head, **_case(job, rounds, ceilings)} for job, rounds in zip(jobs, measured)]
    # The files first: what was measured must not be lost to a terminal.
    if options["json_path"] is not None:
        write_lines(Path(options["json_path"]), cases)
    if options["report"] is not None:
        write_output(options["report"], html_page(cases, divergences))
        note(f"report: {options['report']}")
    print_table(cases)


def _engine(bundle: Bundle, name: str) -> str:
    """What `auto` stands for, told once for a bundle: its processes then all open the same."""
    return name if name != "auto" else choose_engine(bundle, lambda text: note(f"{bundle.folder.name}: {text}"))


def _print_operators(bundles: tuple[str, ...], works: list[Workload], engine: str, threads: int) -> None:
    from edgevl.benchmarks.operators import operator_shares, operator_table

    if engine != "ort-cpu":
        raise InputError(
            f"--operators reads ONNX Runtime's trace on the CPU; expected --engine ort-cpu, got {engine!r}"
        )
    for bundle in bundles:
        for work in works:
            click.echo(f"{Path(bundle).resolve().name}, {work.describe}")
            click.echo(operator_table(operator_shares(bundle, work, threads)) + "\n")


def _divergences(given: tuple[str, ...], bundles: tuple[str, ...]) -> dict[str, float]:
    """Bundle name -> KL, from the reports that `edgevl quantize` and `edgevl fidelity` write."""
    names, found = {Path(b).resolve().name for b in bundles}, {}
    for text in given:
        name, _, path = text.partition("=")
        name = Path(name).resolve().name
        if name not in names or not path:
            raise InputError(f"--fidelity {text!r}: expected BUNDLE=F.json with one of {', '.join(sorted(names))}")
        try:
            found[name] = float(json.loads(Path(path).read_text(encoding="utf-8"))["divergence"]["kl"])
        except (OSError, ValueError, KeyError, TypeError) as e:
            raise InputError(f"{path}: no fidelity report with a divergence inside ({type(e).__name__}: {e})") from None
    return found


def _keep_profile(bundle: str, engine: str, threads: int) -> None:
    from edgevl.benchmarks.profile import measure_profile
    from edgevl.runtime import VisionLanguageModel
    from edgevl.runtime.profile import profile_path

    note(f"profile of {bundle}: measuring pictures and prompts of several sizes")
    with VisionLanguageModel.open(bundle, engine, threads=threads) as model:
        profile = measure_profile(model)
        path = profile_path(model.bundle, profile.machine)
        profile.save(path)
    note(f"profile: {path}")


def _check_arrivals(options: dict[str, Any]) -> None:
    if not options["arrivals"]:
        return
    for rate in options["arrivals"]:
        if not 0 < rate <= 10_000:
            raise InputError(f"--arrivals {rate:g}: expected requests per second, above 0, at most 10000")
    if len(set(options["arrivals"])) < len(options["arrivals"]):
        raise InputError(f"--arrivals: the same rate twice in {', '.join(f'{r:g}' for r in options['arrivals'])}")
    if options["minutes"]:
        seconds = f"{60 * options['minutes']:g} s at {options['arrivals'][0]:g} per second"
        count = max(1, round(60 * options["minutes"] * options["arrivals"][0]))
        raise InputError(
            f"--minutes goes on with a closed loop; with --arrivals expected --requests (for {seconds}: --requests "
            f"{count})"
        )
    if options["operators"]:
        raise InputError("--operators traces one request; it does not go with --arrivals")


def _workload(name: str, rate: float | None, options: dict[str, Any]) -> Workload:
    changes: dict[str, float | None] = {"arrivals_per_s": rate}
    changes |= {k: options[k] for k in ("pictures", "frames", "prompt_tokens", "new_tokens", "concurrency")}
    if options["size"] is not None:
        try:
            changes["width"], changes["height"] = (int(x) for x in options["size"].lower().split("x"))
        except ValueError:
            raise InputError(f"size {options['size']!r}: expected WIDTHxHEIGHT, such as 448x448") from None
    return workload(name, **changes)


def _run(jobs: list[Job], rounds: int) -> list[list[dict[str, Any]]]:
    """What every job's processes measured; the order rotates from round to round."""
    results: list[list[dict[str, Any]]] = [[] for _ in jobs]
    with tqdm(total=rounds * len(jobs), unit="process", file=sys.stderr, disable=None, leave=False) as bar:
        for number in range(rounds):
            for index in in_turn(range(len(jobs)), number):
                bar.set_postfix_str(f"{Path(jobs[index].bundle).name} {jobs[index].workload.name}")
                results[index].append(_measure(replace(jobs[index], round=number)))
                bar.update()
    return results


def _measure(job: Job) -> dict[str, Any]:
    loop = "open_loop" if job.workload.arrivals_per_s else "stages"
    command = [sys.executable, "-m", f"edgevl.benchmarks.{loop}"]
    text = json.dumps(asdict(replace(job, spawned=time.time())))
    done = subprocess.run(command, input=text, capture_output=True, text=True, env=environment(job.threads))
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
        name = f"{Path(job.bundle).name}, workload {job.workload.name!r}"
        raise EdgeVLError(f"{name}: {last.split(': ', 1)[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def _case(job: Job, rounds: list[dict[str, Any]], ceilings: Ceilings) -> dict[str, Any]:
    """The JSON object of one bundle and workload, without what is the same for all cases."""
    bundle, work = Bundle.open(job.bundle), job.workload
    requests = [{**r, "round": n} for n, m in enumerate(rounds) for r in m["requests"]]
    return {
        "bundle": bundle.folder.name,
        "precision": bundle.precision,
        "engine": rounds[0]["engine"],
        "workload": asdict(work),
        "describe": work.describe,
        "seed": job.seed,
        "cold_s": [m["cold_s"] for m in rounds],
        "open_s": [m["open_s"] for m in rounds],
        "ttft_s": percentiles([r["ttft_s"] for r in requests]),
        "total_s": percentiles([r["total_s"] for r in requests]),
        "memory_mb": {"peak": max(m["peak_mb"] for m in rounds), "after_open": max(m["rss_open_mb"] for m in rounds)},
        "throttled": None if rounds[0]["throttled"] is None else sum(m["throttled"] for m in rounds),
        **(_open(job, rounds) if work.arrivals_per_s else _closed(job, bundle, rounds, requests, ceilings)),
        "warm_up": [m["warm_up"] for m in rounds],
        "requests": requests,
    }


def _closed(
    job: Job, bundle: Bundle, rounds: list[dict[str, Any]], requests: list[dict[str, Any]], ceilings: Ceilings
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
        "energy": _energy(rounds, requests),
        "roofline": _shares(bundle, work, requests, stages, steps, ceilings),
    }


def _open(job: Job, rounds: list[dict[str, Any]]) -> dict[str, Any]:
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
            "sources": rounds[0]["energy_sources"],
            "absent": rounds[0]["energy_absent"],
        },
    }


def _energy(rounds: list[dict[str, Any]], requests: list[dict[str, Any]]) -> dict[str, Any]:
    known = [r for r in requests if r["joules"] is not None]
    before = [r["joules_before_decode"] for r in known if r["joules_before_decode"] is not None]
    after = [
        (r["joules"] - r["joules_before_decode"], r["new_tokens"])
        for r in known
        if r["joules_before_decode"] is not None
    ]
    tokens = sum(n for _, n in after)
    return {
        "j_per_request": sum(r["joules"] for r in known) / len(known) if known else None,
        "j_before_first_token": sum(before) / len(before) if before else None,
        "j_per_token": sum(j for j, _ in after) / tokens if tokens else None,
        "sources": rounds[0]["energy_sources"],
        "absent": rounds[0]["energy_absent"],
    }


def _shares(
    bundle: Bundle,
    work: Workload,
    requests: list[dict[str, Any]],
    stages: dict[str, dict[str, float]],
    steps: list[float],
    ceilings: Ceilings,
) -> dict[str, Any]:
    """Achieved rates over the ceilings. Vision and prefill against the int8 GEMM rate (all operations counted, those of
    attention too, which run in float: a share near 1 is out of reach where attention is large)."""
    out: dict[str, Any] = {
        "read_gb_s": ceilings.read_gb_s,
        "gemm_gop_s": ceilings.gemm_gop_s,
        "absent": ceilings.absent,
    }
    prompt = requests[0]["prompt_tokens"] / work.concurrency
    if steps:
        context = prompt + work.new_tokens / 2
        weights = decode_bytes(bundle, 0)
        moved = weights + work.concurrency * (decode_bytes(bundle, int(context)) - weights)
        out["decode"] = moved / percentiles(steps)["p50"] / 1e9 / ceilings.read_gb_s
        out["decode_bytes"] = moved
    rate = ceilings.gemm_gop_s.get("int8", ceilings.gemm_gop_s["fp32"])
    if work.concurrency == 1:
        todo = prefill_work(bundle.model, int(prompt))
        out["prefill"] = (todo.gemm + todo.attention) / stages["prefill_s"]["p50"] / 1e9 / rate
    tokens, merge = requests[0]["image_tokens"], bundle.model.vision.spatial_merge_size**2
    if tokens:
        per = tokens * merge // max(1, work.concurrency * (work.pictures + -(-work.frames // 2)))
        todo = vision_work(bundle.model, tokens * merge // per, per)
        out["vision"] = (todo.gemm + todo.attention) / stages["vision_s"]["p50"] / 1e9 / rate
    return out
