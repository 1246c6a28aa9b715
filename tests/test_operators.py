"""Shares of operators out of ONNX Runtime's trace."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import Pair
from native_oracle import usable_library
from test_cli import edgevl

from edgevl.benchmarks.operators import operator_shares, read_trace
from edgevl.benchmarks.workloads import Workload
from edgevl.runtime.bundle import Bundle
from edgevl.runtime.errors import InputError
from edgevl.runtime.native_kernels import SWITCH, native_role


def trace(path: Path, *runs: list[tuple[str, int]]) -> Path:
    """Runs of 1,000 µs, each with nodes of (operator, µs) one after another."""
    events = []
    for number, nodes in enumerate(runs):
        at = 1000 * number
        for name, duration in nodes:
            args = {"op_name": name}
            events.append({"cat": "Node", "name": "n_kernel_time", "ts": at, "dur": duration, "args": args})
            events.append({"cat": "Node", "name": "n_fence_before", "ts": at, "dur": 7, "args": args})
            at += duration
        events.append({"cat": "Session", "name": "model_run", "ts": 1000 * number, "dur": 1000})
    path.write_text(json.dumps(events))
    return path


def test_only_the_runs_that_are_asked_for_count(tmp_path: Path) -> None:
    path = trace(tmp_path / "t.json", [("Slow", 900)], [("MatMul", 300), ("Add", 50), ("Add", 50)], [("MatMul", 500)])
    first, second = read_trace(path, 2, skip=1)
    assert (first.name, first.calls, first.ms, first.share) == ("MatMul", 1.0, 0.4, pytest.approx(800 / 900))
    assert (second.name, second.calls, second.ms) == ("Add", 1.0, 0.05)
    (only,) = read_trace(path, 1)
    assert (only.name, only.share) == ("Slow", 1.0)
    with pytest.raises(InputError, match="3 runs in the trace, expected 4"):
        read_trace(path, 2, skip=2)


@pytest.mark.parametrize("kernels", ["on", "off"])
@pytest.mark.parametrize("precision", ["int4", "hybrid"])
def test_calls_are_those_of_the_graphs(
    tiny: Pair, tmp_path: Path, precision: str, kernels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from edgevl.export.exporter import ExportOptions, export_bundle

    if kernels == "on":
        usable_library()
    monkeypatch.setenv(SWITCH, kernels)
    export_bundle(tiny.checkpoint, tmp_path / "b", ExportOptions(precision=precision))
    stages = operator_shares(str(tmp_path / "b"), Workload("w", 84, 56, pictures=2, new_tokens=3), 1)
    calls = {stage: {o.name: o.calls for o in found} for stage, found in stages.items()}
    bundle = Bundle.open(tmp_path / "b")
    text, vision = bundle.model.text, bundle.model.vision
    own_encoder, own_prompts = native_role(bundle, "vision"), native_role(bundle, "prefill")
    assert calls["vision"]["edgevl.FrameAttention" if own_encoder else "MultiHeadAttention"] == vision.depth
    own_attention = "edgevl.CausalAttention"
    own = kernels == "on", kernels == "on" if precision == "int4" else own_prompts is not None
    if own[0]:
        assert calls["decode"][own_attention] == text.num_hidden_layers and "FusedMatMul" not in calls["decode"]
    else:  # a step's attention is in a branch of its own, whose time is counted once
        assert calls["decode"]["FusedMatMul"] == calls["decode"]["Softmax"] == text.num_hidden_layers
        assert "GroupQueryAttention" not in calls["decode"]
    assert calls["prefill"][own_attention if own[1] else "GroupQueryAttention"] == text.num_hidden_layers
    assert "FusedMatMul" not in calls["prefill"] and (own_attention in calls["prefill"]) == own[1]
    for stage in ("prefill", "decode"):
        assert "If" not in calls[stage] and sum(o.share for o in stages[stage]) == pytest.approx(1)
    # qkv, o, gate, up, down of every layer, and the head
    products = "edgevl.MatMulNBits" if kernels == "on" else "MatMulNBits"
    assert calls["decode"][products] == 5 * text.num_hidden_layers + 1
    assert sum("MatMulNBits" in name for name in calls["decode"]) == 1
    if precision == "int4":
        assert calls["prefill"][products] == calls["decode"][products]
    elif own_prompts:
        assert calls["prefill"]["edgevl.MatMulNBits"] == 1
        assert calls["prefill"]["edgevl.MatMulInt8"] == 5 * text.num_hidden_layers
    else:  # ONNX Runtime's own, whatever the decoder's is
        assert calls["prefill"]["MatMulNBits"] == 1 and "edgevl.MatMulNBits" not in calls["prefill"]


def test_the_command_prints_a_table_and_refuses_what_it_cannot_trace(tiny: Pair) -> None:
    bench = ("bench", tiny.bundle, "--operators", "--size", "56x56", "--new-tokens", "2")
    done = edgevl(*bench, "--threads", "1")
    assert done.returncode == 0, done.stderr
    assert "1 × 56×56" in done.stdout and "ms per run" in done.stdout and "Attention" in done.stdout
    for options, message in (
        (("--concurrency", "2"), "one request at a time"),
        (("--engine", "tensorrt"), "expected --engine ort-cpu"),
    ):
        done = edgevl(*bench, *options)
        assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr
