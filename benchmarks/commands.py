"""The subcommand `bench`."""

from __future__ import annotations

import datetime
import json
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from edgevl.benchmarks.bundle_names import bundle_labels, find_bundle
from edgevl.benchmarks.cases import case_of
from edgevl.benchmarks.processes import Ending
from edgevl.benchmarks.report import SCHEMA, check_libraries, html_page, print_table, write_lines
from edgevl.benchmarks.request_size import check_fits
from edgevl.benchmarks.roofline import measure_ceilings
from edgevl.benchmarks.rounds import measure_all
from edgevl.benchmarks.stages import Job
from edgevl.benchmarks.system_info import system_info
from edgevl.benchmarks.workloads import WORKLOADS, Workload, workload
from edgevl.runtime.bundle import Bundle
from edgevl.runtime.commands import note
from edgevl.runtime.engine import ENGINES, choose_engine, usable_cores
from edgevl.runtime.errors import EdgeVLError, InputError
from edgevl.runtime.output_file import check_output_file, write_output

__all__ = ["bench"]

# What --operators, which traces one request of each case and measures nothing, cannot heed.
_NOT_TRACED = ("json_path", "report", "profile", "rounds", "requests", "minutes", "seed", "kind", "fidelity")


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
    One that fails is told of, with status 2, and does not take what else was measured along.

    \b
    Example:
      edgevl bench bundle --workload picture --workload document --report bench.html
      edgevl bench bundle --arrivals 0.5 --arrivals 2 --concurrency 4 --report load.html
    """
    with Ending():
        _bench(bundles, names, options)


def _bench(bundles: tuple[str, ...], names: tuple[str, ...], options: dict[str, Any]) -> None:
    check_libraries(page=options["report"] is not None)
    _check_options(options)
    works = [
        _workload(name, rate, options) for name in names or ("picture",) for rate in options["arrivals"] or (None,)
    ]
    labels = bundle_labels(bundles)
    opened = [Bundle.open(bundle) for bundle in bundles]
    divergences = _divergences(options["fidelity"], bundles, labels)
    for bundle, label in zip(opened, labels):
        for work in works:
            check_fits(bundle, work, label)
    threads = options["threads"] or usable_cores()
    if options["operators"]:
        _print_operators(bundles, labels, works, options["engine"], threads)
        return
    engines = [_engine(bundle, label, options["engine"]) for bundle, label in zip(opened, labels)]
    system = system_info(threads)  # the load is that before all that is measured here
    if options["profile"]:
        for bundle, engine in zip(bundles, engines):
            _keep_profile(bundle, engine, threads)
    note("measuring the machine's ceilings")
    ceilings = measure_ceilings(threads)
    if ceilings.kind != "int8":
        note(f"shares of vision and prefill are of the {ceilings.kind} rate; int8 GEMM: {ceilings.absent['int8 GEMM']}")
    cores = tuple(sorted(os.sched_getaffinity(0))[:threads]) if hasattr(os, "sched_getaffinity") else ()
    requests = options["requests"] or (50 if options["arrivals"] else 5)
    jobs = [
        Job(bundle, work, engine, threads, requests, options["minutes"], options["seed"], cores, label=label)
        for bundle, label, engine in zip(bundles, labels, engines)
        for work in works
    ]
    measured, failures = measure_all(jobs, options["rounds"])
    date = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    head = {"schema": SCHEMA, "date": date, "system": system, "checkpoint": options["kind"]}
    cases = [{**head, **case_of(job, rounds, ceilings)} for job, rounds in zip(jobs, measured) if rounds]
    failures += _tell(cases, divergences, options["json_path"], options["report"]) if cases else []
    if failures:
        raise EdgeVLError("; ".join(failures))


def _tell(
    cases: Sequence[dict[str, Any]], divergences: dict[str, float], json_path: str | None, report: str | None
) -> list[str]:
    """Write and print the cases, each as far as it goes; what could not be written."""
    failures: list[str] = []

    def attempt(write: Callable[[], object]) -> None:
        try:
            write()
        except EdgeVLError as e:
            failures.append(str(e))

    def page(path: str) -> None:
        write_output(path, html_page(cases, divergences))
        note(f"report: {path}")

    # The files first: what was measured must not be lost to a terminal.
    if json_path is not None:
        attempt(lambda: write_lines(Path(json_path), cases))
    if report is not None:
        attempt(lambda: page(report))
    print_table(cases)
    return failures


def _engine(bundle: Bundle, label: str, name: str) -> str:
    """What `auto` stands for, told once for a bundle: its processes then all open the same."""
    return name if name != "auto" else choose_engine(bundle, lambda text: note(f"{label}: {text}"))


def _print_operators(
    bundles: Sequence[str], labels: Sequence[str], works: Sequence[Workload], engine: str, threads: int
) -> None:
    from edgevl.benchmarks.operators import operator_shares, operator_table

    if engine != "ort-cpu":
        raise InputError(
            f"--operators reads ONNX Runtime's trace on the CPU; expected --engine ort-cpu, got {engine!r}"
        )
    for bundle, label in zip(bundles, labels):
        for work in works:
            click.echo(f"{label}, {work.describe}")
            click.echo(operator_table(operator_shares(bundle, work, threads)) + "\n")


def _divergences(given: Sequence[str], bundles: Sequence[str], labels: Sequence[str]) -> dict[str, float]:
    """Label of a bundle -> KL, from the reports that `edgevl quantize` and `edgevl fidelity` write."""
    found = {}
    for text in given:
        name, _, path = text.partition("=")
        try:
            label = labels[find_bundle(name, bundles)]
        except InputError as e:
            raise InputError(
                f"--fidelity {text!r}: expected BUNDLE=F.json with one of {', '.join(labels)} ({e})"
            ) from None
        if not path:
            raise InputError(f"--fidelity {text!r}: expected BUNDLE=F.json with one of {', '.join(labels)}")
        try:
            found[label] = float(json.loads(Path(path).read_text(encoding="utf-8"))["divergence"]["kl"])
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


def _check_options(options: dict[str, Any]) -> None:
    """What can be told to be wrong before a bundle is opened."""
    if not math.isfinite(options["minutes"]):
        raise InputError(f"--minutes {options['minutes']:g}: expected a number of minutes, 0 or more")
    if options["engine"] not in (*ENGINES, "auto"):
        raise InputError(f"engine {options['engine']!r} is unknown; expected auto, {', '.join(ENGINES)}")
    _check_arrivals(options)
    if options["operators"]:
        _check_operators()
    files = [(key, options[key]) for key in ("json_path", "report") if options[key] is not None]
    for key, path in files:
        check_output_file(path, "a file of JSON lines" if key == "json_path" else "an HTML file")
    if len({Path(path).resolve() for _, path in files}) < len(files):
        raise InputError(f"--json and --report both name {options['report']}; expected two files")


def _check_operators() -> None:
    """Refuse by name what was given beside --operators and would not be heeded."""
    context = click.get_current_context()
    options = {p.name: p.opts[-1] for p in context.command.params}
    given = [options[name] for name in _NOT_TRACED if context.get_parameter_source(name) is not ParameterSource.DEFAULT]
    if given:
        raise InputError(f"--operators traces one request of each case; leave {', '.join(given)} away")


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
