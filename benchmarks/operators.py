"""Where the time of a graph goes: the share of every operator, from ONNX Runtime's own trace.

A trace costs a little at every node, so what is timed here is compared with itself only: shares, not speeds.
"""

from __future__ import annotations

import json
import tempfile
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tabulate import tabulate

from edgevl.benchmarks.stages import Job, Runner
from edgevl.benchmarks.workloads import Workload
from edgevl.runtime import VisionLanguageModel
from edgevl.runtime.bundle import Bundle
from edgevl.runtime.errors import InputError
from edgevl.runtime.native_kernels import native_role
from edgevl.runtime.ort_engine import OrtEngine, OrtGraph

__all__ = ["Operator", "operator_shares", "operator_table", "read_trace"]

_KERNEL = "_kernel_time"
# In a graph for our own kernels; a trace does not tell whose an operator is.
_OWN = ("CausalAttention", "MatMulNBits", "MatMulInt8", "FrameAttention")
_BRANCHES = "If"  # its own time is that of the nodes in its branch, which the trace has too


@dataclass(frozen=True)
class Operator:
    """Of one kind of node: calls and milliseconds per run of the graph, and the share of all nodes' time. What our own
    kernels do has a name such as `edgevl.MatMulNBits`."""

    name: str
    calls: float
    ms: float
    share: float


def read_trace(path: Path, runs: int, skip: int = 0, native: bool = False) -> list[Operator]:
    """Operators of a trace of ONNX Runtime, the costliest first, over its last `runs` runs after the first `skip`.

    Args:
        native: of a graph for our own kernels.

    Raises:
        InputError: fewer runs in the trace than that.
    """
    events = json.loads(path.read_text(encoding="utf-8"))
    ends = [e["ts"] + e["dur"] for e in events if e.get("name") == "model_run"]
    if len(ends) < skip + runs or not runs:
        raise InputError(f"{path}: {len(ends)} runs in the trace, expected {skip + runs} and at least one to count")
    begun = sorted(ends)[skip - 1] if skip else 0
    stop = sorted(ends)[skip + runs - 1]
    spent: dict[str, list[float]] = defaultdict(list)
    for e in events:
        is_kernel = e.get("cat") == "Node" and e["name"].endswith(_KERNEL) and e["args"]["op_name"] != _BRANCHES
        if is_kernel and begun <= e["ts"] < stop:
            name = e["args"]["op_name"]
            spent[f"edgevl.{name}" if native and name in _OWN else name].append(e["dur"] / 1e3)
    total = sum(map(sum, spent.values()))
    found = [Operator(n, len(v) / runs, sum(v) / runs, sum(v) / total) for n, v in spent.items()]
    return sorted(found, key=lambda o: -o.ms)


def operator_shares(bundle: str, work: Workload, threads: int) -> dict[str, list[Operator]]:
    """By stage (vision, prefill, decode): the operators of one request of `work`, after one to warm up.

    Raises:
        InputError: several requests at once, or a question that takes several calls of the prefill graph.
    """
    if work.concurrency != 1:
        raise InputError(f"workload {work.name!r}: operators are told apart of one request at a time")
    opened = Bundle.open(bundle)
    with tempfile.TemporaryDirectory() as folder:
        engine = OrtEngine(opened, threads, Path(folder))
        model = VisionLanguageModel(opened, engine, image_cache_mb=0)
        runner = Runner(model, Job(bundle, work, threads=threads))
        prompt = 0
        for number in range(2):
            prompt = runner.request(number).prompt_tokens
        graphs = {role: graph for role, graph in engine.graphs.items() if isinstance(graph, OrtGraph)}
        traces = {role: graph.end_trace() for role, graph in graphs.items()}
        chunks = -(-prompt // model.prefill_chunk)
        steps = work.new_tokens - 1
        own = {role: native_role(model.bundle, role) is not None for role in graphs}
        found: dict[str, list[Operator]] = {}
        if work.pictures or work.frames:
            encoded = _runs(traces["vision"]) // 2
            found["vision"] = read_trace(traces["vision"], encoded, encoded, own["vision"])
        if "prefill" in traces:
            found["prefill"] = read_trace(traces["prefill"], chunks, chunks, own["prefill"])
            found["decode"] = read_trace(traces["decoder"], steps, steps, own["decoder"]) if steps else []
        else:
            once = chunks + steps
            found["prefill"] = read_trace(traces["decoder"], chunks, once, own["decoder"])
            found["decode"] = read_trace(traces["decoder"], steps, once + chunks, own["decoder"]) if steps else []
        model.close()
    return found


def _runs(trace: Path) -> int:
    events: list[dict[str, Any]] = json.loads(trace.read_text(encoding="utf-8"))
    return sum(e.get("name") == "model_run" for e in events)


def operator_table(stages: dict[str, list[Operator]], least: float = 0.005) -> str:
    """One table: stage, operator, calls and milliseconds per run, share; what is under `least` is put together."""
    rows = []
    for stage, operators in stages.items():
        for o in [o for o in operators if o.share >= least]:
            rows.append((stage, o.name, f"{o.calls:.0f}", f"{o.ms:.1f}", f"{o.share:.1%}"))
        rest = [o for o in operators if o.share < least]
        if rest:
            calls, ms, share = (sum(getattr(o, k) for o in rest) for k in ("calls", "ms", "share"))
            rows.append((stage, f"{len(rest)} others", f"{calls:.0f}", f"{ms:.1f}", f"{share:.1%}"))
    headers = ("stage", "operator", "calls", "ms per run", "share")
    return tabulate(rows, headers, tablefmt="simple", disable_numparse=True, colalign=("left", "left", *["right"] * 3))
