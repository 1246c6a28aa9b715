"""What a decode step reads, byte by byte, and the ceilings of the machine that `edgevl bench` compares with."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import random_model, save_checkpoint
from conftest import MakePair
from quantized import gptq_config, gptq_tensors, mixed, write

from edgevl.benchmarks import roofline
from edgevl.benchmarks.roofline import blas_environment, decode_bytes, measure_ceilings
from edgevl.export.exporter import ExportOptions, export_bundle
from edgevl.runtime.bundle import Bundle
from edgevl.runtime.errors import BundleError
from edgevl.runtime.native_kernels import SWITCH, native_role

# ---------------------------------------------------------------- bytes of a step


def _layers(config: Any) -> dict[str, tuple[int, int]]:
    t = config.text
    q, kv = t.num_attention_heads * t.head_dim, t.num_key_value_heads * t.head_dim
    return {
        **{"q_proj": (q, t.hidden_size), "k_proj": (kv, t.hidden_size), "v_proj": (kv, t.hidden_size)},
        **{"o_proj": (t.hidden_size, q), "down_proj": (t.hidden_size, t.intermediate_size)},
        **{"gate_proj": (t.intermediate_size, t.hidden_size), "up_proj": (t.intermediate_size, t.hidden_size)},
    }


def _stored(shape: tuple[int, int], bits: int, block: int, scale: int, zeros: bool) -> int:
    """Bytes of a matrix in blocks, row by row."""
    blocks = -(-shape[1] // block)
    return shape[0] * (blocks * (block * bits // 8 + scale) + (-(-blocks * bits // 8) if zeros else 0))


def _expected(bundle: Bundle, matrix: Callable[[str, tuple[int, int]], int], head: int) -> int:
    """Of every layer, with what is in float32 beside them: norms and biases."""
    t, shapes = bundle.model.text, _layers(bundle.model)
    beside = 4 * (2 * t.hidden_size + sum(shapes[n][0] for n in ("q_proj", "k_proj", "v_proj")))
    layer = sum(matrix(name, shape) for name, shape in shapes.items()) + beside
    return t.num_hidden_layers * layer + 4 * t.hidden_size + head


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of numbers of 16 bits, as released ones are: so are the scales of its blocks, which are the largest
    number over a power of two, unless there are zero points."""
    model = random_model()
    torch.nn.Module.to(torch.nn.Module.to(model, torch.float16), torch.float32)
    return save_checkpoint(model, tmp_path_factory.mktemp("short") / "checkpoint")


def _own_kernels(bundle: Bundle) -> bool:
    return native_role(bundle, "decoder") is not None


@pytest.mark.parametrize("kernels", ["on", "off"])
@pytest.mark.parametrize(
    ("options", "bits"),
    [
        ({"precision": "int4"}, 4),
        ({"precision": "int4", "block_size": 32, "symmetric": False}, 4),
        ({"decoder_precision": "int8-weights", "block_size": 64, "head_bits": 4}, 8),
    ],
)
def test_a_step_reads_bits_blocks_and_zero_points_as_exported(
    short: Path, tmp_path: Path, monkeypatch, options: dict[str, Any], bits: int, kernels: str
):
    """Own kernels keep scales in 16 bits where those hold them, ONNX Runtime's in 32."""
    monkeypatch.setenv(SWITCH, kernels)
    export_bundle(short, tmp_path / "b", ExportOptions(**options))
    bundle = Bundle.open(tmp_path / "b")
    if kernels == "on" and not _own_kernels(bundle):
        pytest.skip("no kernels of our own here")
    block, zeros = options.get("block_size", 128), "symmetric" in options
    scale = 2 if kernels == "on" and not zeros else 4
    t = bundle.model.text
    head = _stored((t.vocab_size, t.hidden_size), options.get("head_bits", 8), block, scale, zeros)
    expected = _expected(bundle, lambda _, shape: _stored(shape, bits, block, scale, zeros), head)
    assert decode_bytes(bundle, 0) == expected
    assert decode_bytes(bundle, 7) - expected == 7 * 2 * t.num_hidden_layers * t.num_key_value_heads * t.head_dim * 4


def test_a_step_of_w8a8_reads_a_byte_per_weight_and_a_scale_per_row(short: Path, tmp_path: Path):
    export_bundle(short, tmp_path / "b", ExportOptions(precision="int8"))
    bundle = Bundle.open(tmp_path / "b")
    if not _own_kernels(bundle):
        pytest.skip("no kernels of our own here")
    t = bundle.model.text
    head = _stored((t.vocab_size, t.hidden_size), 8, 128, 2, False)
    assert decode_bytes(bundle, 0) == _expected(bundle, lambda _, shape: shape[0] * (shape[1] + 4), head)


def test_a_step_of_a_mixed_checkpoint_reads_each_layer_as_it_is(tmp_path: Path):
    """GPTQ in groups of 32, down_proj in 8 bits and the others in 4."""
    written = write(tmp_path, gptq_tensors, gptq_config(4, group_size=32), mixed)
    export_bundle(written.folder, tmp_path / "b", ExportOptions())
    bundle = Bundle.open(tmp_path / "b")
    t, scale = bundle.model.text, 2 if _own_kernels(bundle) else 4
    head = _stored((t.vocab_size, t.hidden_size), 8, 128, scale, False)
    found = decode_bytes(bundle, 0)
    assert found == _expected(
        bundle, lambda name, shape: _stored(shape, 8 if name == "down_proj" else 4, 32, scale, False), head
    )


def test_scales_that_16_bits_do_not_hold_count_whole(short: Path, tmp_path: Path):
    """One that they do not hold is enough, of its own matrix."""
    export_bundle(short, tmp_path / "a", ExportOptions())
    bundle = Bundle.open(tmp_path / "a")
    if not _own_kernels(bundle):
        pytest.skip("no kernels of our own here")
    import onnx

    graph = onnx.load(str(bundle.path("decoder_native.onnx")), load_external_data=False).graph
    tensor = next(t for t in graph.initializer if t.name.endswith("o_proj.weight.int4b128.scales"))
    place = {e.key: e.value for e in tensor.external_data}
    copy = tmp_path / "b"
    shutil.copytree(bundle.folder, copy)
    with (copy / place["location"]).open("r+b") as file:
        file.seek(int(place["offset"]))
        file.write(np.float32(1 / 3).tobytes())
    assert decode_bytes(Bundle.open(copy), 0) - decode_bytes(bundle, 0) == int(place["length"]) // 2


def test_the_embedding_beside_an_untied_head_is_not_read(make_pair: MakePair):
    pair = make_pair(tie_word_embeddings=False)
    bundle = Bundle.open(pair.bundle)
    t = bundle.model.text
    assert decode_bytes(bundle, 0) == _expected(bundle, lambda _, s: 4 * s[0] * s[1], 4 * t.vocab_size * t.hidden_size)


def test_a_damaged_graph_is_told_of(make_pair: MakePair, tmp_path: Path):
    copy = tmp_path / "b"
    shutil.copytree(make_pair().bundle, copy)
    path = copy / Bundle.open(copy).graphs["decoder"].file
    path.write_bytes(b"\xff" * path.stat().st_size)
    with pytest.raises(BundleError, match="not readable as an ONNX graph"):
        decode_bytes(Bundle.open(copy), 0)


# ---------------------------------------------------------------- ceilings


@pytest.mark.skipif((os.cpu_count() or 1) < 2 or sys.platform != "linux", reason="one core, or no /proc")
def test_numpy_multiplies_with_the_threads_that_are_asked_for():
    code = (
        "import os, numpy as np; a = np.ones((512, 512), np.float32); a @ a; print(len(os.listdir('/proc/self/task')))"
    )
    for threads in (1, 2):
        env = blas_environment(threads)
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=True)
        assert int(done.stdout) == threads


def test_the_fp32_rate_is_taken_with_the_threads_that_are_asked_for(monkeypatch):
    asked = []

    def process(command: list[str], text: str, env: dict[str, str]) -> Any:
        asked.append(env["OPENBLAS_NUM_THREADS"])
        return SimpleNamespace(returncode=0, stdout="12.5\n")

    monkeypatch.setattr(roofline, "run_process", process)
    found = measure_ceilings(3, megabytes=8)
    assert asked == ["3"] and found.gemm_gop_s["fp32"] == 12.5 and found.kind == "int8"


def test_without_the_int8_rate_it_is_said_which_one_the_shares_are_of(monkeypatch):
    def missing(threads: int) -> float:
        raise ModuleNotFoundError("no", name="onnx_ir")

    monkeypatch.setattr(roofline, "_int8_gemm", missing)
    found = measure_ceilings(1, megabytes=8)
    assert found.kind == "fp32" and set(found.gemm_gop_s) == {"fp32"}
    assert found.absent == {"int8 GEMM": "needs onnx_ir; pip install 'edgevl[ort,export]'"}
