"""Does the runtime do more work than before, or less? Instructions of every stage on the demo model, by a baseline.

    python -m edgevl.benchmarks.check [--update] [--checkpoint demo/model]     (make bench-check)

One thread, in valgrind (see instructions.py): the counts of two runs of the same code differ by far less than the 10 %
that is flagged, on any machine. What they cannot see is a kernel that takes longer for as many instructions, and what
AVX-512 or AMX would do; those are measured in seconds, by `edgevl bench`. A baseline holds for one set of versions.
Fewer instructions are flagged as well: a stage may have stopped doing its work, and a baseline that is no longer met
would let as much be added unseen.
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Literal, NoReturn

import click
from tabulate import tabulate
from tqdm import tqdm

from edgevl.benchmarks.instructions import count_instructions, mark
from edgevl.benchmarks.stages import Job, Runner, StageClock
from edgevl.benchmarks.workloads import Workload
from edgevl.runtime import VisionLanguageModel
from edgevl.runtime.engine import usable_cores
from edgevl.runtime.errors import InputError
from edgevl.runtime.output_file import check_output_file, write_output

__all__ = ["PRECISIONS", "compare", "main", "measure", "read_baselines", "setting"]

BASELINE = Path(__file__).with_name("baseline.json")
LIMIT = 0.10
PRECISIONS = ("hybrid", "fp32")  # hybrid: int8 vision, W8A8 prefill, int4 decode
_WORK = Workload("check", 230, 230, new_tokens=9)  # no multiple of 28: it has to be resized
_REQUESTS = 2  # after one to warm up


class _MarkingClock(StageClock):
    """Marks the stages' ends instead of timing them."""

    def __init__(self, names: list[str]) -> None:
        self._names = names
        super().__init__()

    def begin(self) -> None:
        super().begin()
        self.end("between")

    def end(self, stage: str) -> None:
        """Of the stage that has run since the last mark."""
        self._names.append(stage)
        mark()

    def lap(self, stage: str) -> None:
        super().lap(stage)
        self.end(stage.removesuffix("_s"))


def answer_marked(job: Job) -> list[str]:
    """In valgrind: open the bundle and answer, marking every stage's end; their names in order."""
    names: list[str] = []
    with VisionLanguageModel.open(job.bundle, job.engine, threads=job.threads) as model:
        names.append("open")
        mark()
        for number in range(1 + job.requests):
            clock = _MarkingClock(names)
            Runner(model, job).request(number, clock=clock)
            clock.end("decode")
    return names


def measure(job: Job) -> dict[str, int]:
    """Instructions of every stage of one answer (the mean over requests of other pictures; `step`: of one token after
    the first, detokenizing included), and of `open`, from the start of the process to the opened bundle.

    Raises:
        FileNotFoundError, RuntimeError: see `count_instructions`.
    """
    worker = [sys.executable, "-m", "edgevl.benchmarks.check", "--worker", json.dumps(asdict(job))]
    counts, printed = count_instructions(worker)
    names: list[str] = json.loads(printed.splitlines()[-1])
    if len(counts) != len(names):
        raise RuntimeError(f"callgrind saw {len(counts)} of {len(names)} marks")
    warm = names.index("decode") + 1  # the first answer warms up
    sums: dict[str, int] = {}
    for name, count in zip(names[warm:], counts[warm:]):
        sums[name] = sums.get(name, 0) + count
    del sums["between"]
    step = sums.pop("decode") // (job.workload.new_tokens - 1)
    answer = {name: count // job.requests for name, count in {**sums, "step": step}.items()}
    return {"open": counts[0], **answer}


def compare(
    found: dict[str, int], baseline: dict[str, int], limit: float = LIMIT
) -> list[tuple[str, float, Literal["MORE", "FEWER", "ok"]]]:
    """(stage, change as a fraction, whether that is more than the limit allows) of every stage of the baseline."""

    def verdict(now: int, before: int) -> Literal["MORE", "FEWER", "ok"]:
        if abs(now - before) <= limit * before:
            return "ok"
        return "MORE" if now > before else "FEWER"

    return [(stage, found[stage] / n - 1, verdict(found[stage], n)) for stage, n in baseline.items()]


def read_baselines(file: Path) -> dict[str, dict[str, dict[str, int]]]:
    """Instructions by setting, precision and stage; none where there is no file.

    Raises:
        InputError: it cannot be read, or is no file of baselines.
    """
    if not file.exists():
        return {}
    try:
        stored = json.loads(file.read_text(encoding="utf-8"))
        counts = [n for precisions in stored.values() for stages in precisions.values() for n in stages.values()]
        if not all(type(n) is int and n > 0 for n in counts):
            raise ValueError("a count that is no positive whole number")
    except OSError as e:
        raise InputError(f"{file}: cannot be read ({e.strerror}); expected a file of baselines") from None
    except (ValueError, AttributeError, RecursionError) as e:
        raise InputError(
            f"{file}: not a file of baselines ({e}); take it from git again, or remove it and, "
            "on the commit to compare with: make bench-check UPDATE=1"
        ) from None
    return stored


def setting() -> str:
    """What a baseline holds for: the libraries whose instructions are counted."""
    packages = ("onnxruntime", "numpy", "pillow", "tokenizers", "jinja2")
    versions = ", ".join(f"{p} {importlib.metadata.version(p)}" for p in packages)
    return f"{platform.machine()}, Python {'.'.join(platform.python_version_tuple()[:2])}, {versions}"


@click.command()
@click.option("--checkpoint", default="demo/model", show_default=True)
@click.option(
    "--precision", "precisions", multiple=True, default=PRECISIONS, show_default=True, help="May be repeated."
)
@click.option(
    "--size", default=_WORK.width, show_default=True, type=click.IntRange(28, 8192), help="Of the square pictures."
)
@click.option("--baseline", "path", default=str(BASELINE), help="The file of baselines.")
@click.option("--update", is_flag=True, help="Store what is counted as the baseline of these versions.")
@click.option("--worker", hidden=True, help="A job: answer with marks, in valgrind.")
def main(checkpoint: str, precisions: tuple[str, ...], size: int, path: str, update: bool, worker: str | None) -> None:
    """Compare with the baseline; status 1 when a stage takes over 10 % more or fewer instructions, 2 when there is no
    baseline to compare with."""
    if worker:
        click.echo(json.dumps(answer_marked(Job.from_json(worker))))
        return
    file, here = Path(path), f"{setting()}, {size}×{size}"
    try:
        stored = read_baselines(file)
        if update:
            check_output_file(file, "the file of baselines")
    except InputError as e:
        _fail(str(e))
    missing = [p for p in precisions if p not in stored.get(here, {})]
    if missing and not update:
        _fail(
            f"no baseline of {', '.join(missing)} for {here} (there is: {'; '.join(stored) or 'none'}); "
            "on the commit to compare with: make bench-check UPDATE=1"
        )
    found = _measure_all(checkpoint, precisions, replace(_WORK, width=size, height=size))
    if update:
        stored[here] = {**stored.get(here, {}), **found}
        try:
            write_output(file, json.dumps(stored, indent=1, sort_keys=True, ensure_ascii=False) + "\n")
        except InputError as e:
            _fail(str(e))
        click.echo(f"baseline of {here} written to {file}")
        return
    sys.exit(_report(found, stored[here]))


def _report(found: dict[str, dict[str, int]], baseline: dict[str, dict[str, int]]) -> int:
    """Print the comparison; returns the exit status."""
    if gone := [f"{p} {s}" for p in found for s in baseline[p] if s not in found[p]]:
        _fail(f"the baseline has stages that were not counted: {', '.join(gone)}; make it anew with UPDATE=1")
    rows, said = [], set[str]()
    for precision, counts in found.items():
        for stage, change, verdict in compare(counts, baseline[precision]):
            rows.append((precision, stage, f"{counts[stage] / 1e6:,.2f}", f"{change:+.1%}", verdict))
            said.add(verdict)
    headers = ("bundle", "stage", "million instructions", "change", "")
    click.echo(tabulate(rows, headers=headers, tablefmt="simple", disable_numparse=True))
    if "FEWER" in said:
        click.echo("fewer: renew the baseline with `make bench-check UPDATE=1` if this is meant", err=True)
    return 1 if said - {"ok"} else 0


def _measure_all(checkpoint: str, precisions: Sequence[str], work: Workload) -> dict[str, dict[str, int]]:
    """Of every precision; several at once, for counts do not depend on what else the machine does."""

    def one(precision: str) -> dict[str, int]:
        bundle = Path(folder) / precision
        _export(checkpoint, bundle, precision)
        return measure(Job(str(bundle), work, threads=1, requests=_REQUESTS))

    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(usable_cores()) as pool:
        try:
            done = tqdm(pool.map(one, precisions), total=len(precisions), unit="bundle", disable=None)
            return dict(zip(precisions, done))
        except (FileNotFoundError, RuntimeError) as e:
            _fail(str(e))


def _fail(message: str) -> NoReturn:
    click.echo(message, err=True)
    sys.exit(2)


def _export(checkpoint: str, bundle: Path, precision: str) -> None:
    command = [sys.executable, "-m", "edgevl.runtime", "export", checkpoint, "-o", str(bundle)]
    done = subprocess.run(
        [*command, "--precision", precision, "--no-verify"], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(done.stderr.strip())


if __name__ == "__main__":
    main()
