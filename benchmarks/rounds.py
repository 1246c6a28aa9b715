"""Every case in processes of its own, in turn with the others; one that fails leaves the others their figures."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from tqdm import tqdm

from edgevl.benchmarks.processes import run_process
from edgevl.benchmarks.stages import Job
from edgevl.benchmarks.turns import environment, in_turn
from edgevl.runtime.commands import note
from edgevl.runtime.errors import EdgeVLError

__all__ = ["measure_all"]


def measure_all(jobs: Sequence[Job], rounds: int) -> tuple[list[list[dict[str, Any]]], list[str]]:
    """What every job's processes measured, by job, and what failed, in words. The order rotates from round to round; a
    job that failed has no further rounds, those before count."""
    results: list[list[dict[str, Any]]] = [[] for _ in jobs]
    failed: dict[int, str] = {}
    with tqdm(total=rounds * len(jobs), unit="process", file=sys.stderr, disable=None, leave=False) as bar:
        for number in range(rounds):
            for index in in_turn(range(len(jobs)), number):
                job = jobs[index]
                bar.set_postfix_str(f"{job.label} {job.workload.name}")
                if index not in failed:
                    try:
                        results[index].append(_measure(replace(job, round=number)))
                    except EdgeVLError as e:
                        failed[index] = f"{job.label}, workload {job.workload.name!r}, round {number + 1}: {e}"
                        note(f"failed: {failed[index]}")
                bar.update()
    return results, list(failed.values())


def _measure(job: Job) -> dict[str, Any]:
    """What one process writes.

    Raises:
        EdgeVLError: it failed; the last line that it said.
    """
    loop = "open_loop" if job.workload.arrivals_per_s else "stages"
    command = [sys.executable, "-m", f"edgevl.benchmarks.{loop}"]
    text = json.dumps(asdict(replace(job, spawned=time.time(), parent=os.getpid())))
    done = run_process(command, text, environment(job.threads))
    if done.returncode < 0:
        advice = "; the machine may be out of memory" if done.returncode == -signal.SIGKILL else ""
        raise EdgeVLError(f"the measuring process was ended by {signal.Signals(-done.returncode).name}{advice}")
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
        raise EdgeVLError(last.split(": ", 1)[-1])
    return json.loads(done.stdout.splitlines()[-1])
