"""Has a change made the demo slower? Stage times over the times of fixed kernels, against a stored baseline.

Seconds differ from run to run and from machine to machine; the ratio to a kernel that no change of ours touches,
measured in turn with the stages in the same process, differs far less. Of both, the least over many repetitions counts:
what disturbs a measurement only ever lengthens it. Processors have baselines of their own.

    python -m edgevl.benchmarks.check [--update] [--checkpoint demo/model]     (make bench-check)
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from tabulate import tabulate
from tqdm import tqdm

from edgevl.benchmarks.roofline import int8_product, timed
from edgevl.benchmarks.stages import STAGES, Job, Runner
from edgevl.benchmarks.workloads import Workload
from edgevl.runtime import VisionLanguageModel
from edgevl.runtime.doctor import cpu_model
from edgevl.runtime.engine import usable_cores

__all__ = ["compare", "main", "measure"]

BASELINE = Path(__file__).with_name("baseline.json")
LIMIT = 0.10
_WORK = Workload("check", 448, 448, new_tokens=16)


def measure(bundle: Path, repeats: int, threads: int, tick: Callable[[], object] = lambda: None) -> dict[str, float]:
    """Least time of every stage over `repeats` requests, each over the least time of the fixed kernel."""
    kernel = int8_product(threads, 512, 512, 2048)
    job = Job(str(bundle), _WORK, threads=threads)
    with VisionLanguageModel.open(bundle, "ort-cpu", threads=threads) as model:
        runner = Runner(model, job)
        runner.request(0)
        least: dict[str, float] = {}
        for number in range(1, repeats + 1):
            fixed = min(timed(kernel) for _ in range(5))
            request = runner.request(number)
            found = {**{s: request.stages[s] for s in STAGES}, "step_s": min(request.steps_s), "kernel": fixed}
            least = {k: min(v, least.get(k, v)) for k, v in found.items()}
            tick()
    fixed = least.pop("kernel")
    return {k: v / fixed for k, v in least.items()}


def compare(found: dict[str, float], baseline: dict[str, float], limit: float = LIMIT) -> list[tuple[str, float, bool]]:
    """(stage, change as a fraction, whether it is slower than the limit allows) of every stage of the baseline."""
    changes = ((stage, found[stage] / before - 1) for stage, before in baseline.items())
    return [(stage, change, change > limit) for stage, change in changes]


@click.command()
@click.option("--checkpoint", default="demo/model", show_default=True)
@click.option("--repeats", default=40, show_default=True, type=click.IntRange(1))
@click.option("--baseline", "path", default=str(BASELINE), help="The file of baselines.")
@click.option("--update", is_flag=True, help="Store what is measured as this processor's baseline.")
def main(checkpoint: str, repeats: int, path: str, update: bool) -> None:
    """Compare with the baseline; status 1 when a stage is over 10 % slower, 2 when there is no baseline."""
    file = Path(path)
    stored: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    machine = f"{cpu_model()}, {usable_cores()} cores"
    if not update and machine not in stored:
        click.echo(f"no baseline for {machine!r}; on the commit to compare with: make bench-check UPDATE=1", err=True)
        sys.exit(2)
    found: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder, tqdm(total=2 * repeats, file=sys.stderr, disable=None) as bar:
        for precision in ("int4", "fp32"):
            bundle = Path(folder) / precision
            _export(checkpoint, bundle, precision)
            found[precision] = measure(bundle, repeats, usable_cores(), bar.update)
    if update:
        stored[machine] = found
        file.write_text(json.dumps(stored, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        click.echo(f"baseline of {machine!r} written to {file}")
        return
    rows, slower = [], False
    for precision, ratios in found.items():
        for stage, change, bad in compare(ratios, stored[machine][precision]):
            rows.append((precision, stage.removesuffix("_s"), f"{change:+.1%}", "SLOWER" if bad else "ok"))
            slower |= bad
    click.echo(tabulate(rows, headers=("bundle", "stage", "change", ""), tablefmt="simple", disable_numparse=True))
    sys.exit(1 if slower else 0)


def _export(checkpoint: str, bundle: Path, precision: str) -> None:
    command = [sys.executable, "-m", "edgevl.runtime", "export", checkpoint, "-o", str(bundle)]
    subprocess.run([*command, "--precision", precision, "--no-verify"], check=True, capture_output=True)


if __name__ == "__main__":
    main()
