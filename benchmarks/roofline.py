"""What this machine could do at most, measured, and how close each stage of a model comes.

Decoding reads every weight once per token, so it is bound by memory bandwidth; prefill and the vision encoder multiply
matrices, so they are bound by the rate of the GEMM kernels (S. Williams et al., "Roofline", CACM 52(4), 2009).
"""

from __future__ import annotations

import contextlib
import math
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edgevl.benchmarks.decoder_weights import step_weight_bytes
from edgevl.benchmarks.processes import run_process
from edgevl.benchmarks.turns import environment
from edgevl.runtime.bundle import Bundle
from edgevl.runtime.config import ModelConfig
from edgevl.runtime.errors import EngineError
from edgevl.runtime.native_kernels import has_int8_kernels, memory_reader, native_library

__all__ = [
    "Ceilings",
    "Work",
    "blas_environment",
    "decode_bytes",
    "fp32_gemm_here",
    "int8_product",
    "measure_ceilings",
    "prefill_work",
    "timed",
    "vision_work",
]

_REPEATS = 7
# How the libraries that numpy's products may come from are told of their threads, which they read as they are loaded.
_BLAS_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "BLIS_NUM_THREADS")
_GEMM = (512, 1536, 4480)  # rows, k, n: a shape of Qwen2-VL-2B


@dataclass(frozen=True)
class Ceilings:
    """read_gb_s: bytes read per second by all threads together; gemm_gop_s: by precision, 2·m·k·n per second. What
    could not be measured is missing there, and has its reason in `absent`."""

    read_gb_s: float
    gemm_gop_s: dict[str, float]
    absent: dict[str, str]

    @property
    def kind(self) -> str:
        """The precision whose rate is the ceiling of vision and prefill: int8 where that was measured."""
        return "int8" if "int8" in self.gemm_gop_s else "fp32"


@dataclass(frozen=True)
class Work:
    """Operations of one stage (a multiplication and an addition are two), matrix products and attention apart."""

    gemm: float
    attention: float


def measure_ceilings(threads: int, megabytes: int = 512) -> Ceilings:
    """Take the machine's ceilings with `threads` threads; some seconds."""
    gemm, absent = {"fp32": _fp32_gemm(threads)}, {}
    try:
        gemm["int8"] = _int8_gemm(threads)
    except ModuleNotFoundError as e:
        absent["int8 GEMM"] = f"needs {e.name}; pip install 'edgevl[ort,export]'"
    return Ceilings(_read_bandwidth(threads, megabytes), gemm, absent)


def decode_bytes(bundle: Bundle, context: int) -> float:
    """Bytes that one decode step of one row must read: every weight of the layers and the head once, as the graph
    stores them (decoder_weights.py), and the keys and values of `context` tokens."""
    text, graph = bundle.model.text, bundle.graphs["decoder"]
    past = graph.spec.input(graph.spec.cache[0][0])
    kv = 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim * np.dtype(past.dtype).itemsize
    return float(step_weight_bytes(bundle) + kv * context)


def prefill_work(config: ModelConfig, tokens: int) -> Work:
    """Of `tokens` prompt tokens through the decoder, one row through the head; causal attention is half the square."""
    text = config.text
    gemm = 2.0 * tokens * _layer_weights(config) + 2.0 * text.vocab_size * text.hidden_size
    attention = 2.0 * text.num_hidden_layers * text.num_attention_heads * text.head_dim * tokens**2
    return Work(gemm, attention)


def vision_work(config: ModelConfig, frames: int, patches: int) -> Work:
    """Of `frames` frames of `patches` patches each: every frame attends to itself."""
    v = config.vision
    block = 4 * v.embed_dim**2 + 2 * v.embed_dim * v.intermediate_size
    merger = v.merged_dim**2 + v.merged_dim * v.hidden_size
    gemm = 2.0 * frames * patches * (v.depth * block + v.patch_dim * v.embed_dim + merger / v.spatial_merge_size**2)
    return Work(gemm, 4.0 * v.depth * frames * patches**2 * v.embed_dim)


def _layer_weights(config: ModelConfig) -> int:
    text = config.text
    heads, kv = text.num_attention_heads * text.head_dim, text.num_key_value_heads * text.head_dim
    layer = text.hidden_size * (heads + 2 * kv) + heads * text.hidden_size
    layer += 3 * text.hidden_size * text.intermediate_size
    return layer * text.num_hidden_layers


def timed(function: Callable[[], object]) -> float:
    """Seconds of one call."""
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def int8_product(threads: int, rows: int, k: int, n: int, operators: Path | None = None) -> Callable[[], object]:
    """An integer product of [rows, k] and [k, n] as CPU bundles have it: ONNX Runtime's of u8 and s8, or, given the
    library of our `operators`, ours of float32 that it rounds.

    Raises:
        ModuleNotFoundError: onnx-ir is not installed.
    """
    import onnx_ir as ir
    import onnxruntime as ort

    dtype = np.dtype(np.uint8 if operators is None else np.float32)
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.from_numpy(dtype)), shape=ir.Shape([rows, k]))
    constants = {"w": np.ones((k, n), np.int8), "s": np.ones(n, np.float32)}
    w, s = (
        ir.Value(name=name, type=ir.TensorType(ir.DataType.from_numpy(a.dtype)), const_value=ir.tensor(a, name=name))
        for name, a in constants.items()
    )
    if operators is None:
        node, initializers = ir.node("MatMulInteger", [x, w]), [w]
    else:
        attributes = {"K": k, "N": n, "quick_gelu": 0, "affine": 0}
        node, initializers = ir.node("MatMulInt8", [x, w, s], attributes, domain="edgevl"), [w, s]
    y = node.outputs[0]
    result = ir.DataType.INT32 if operators is None else ir.DataType.FLOAT
    y.name, y.type, y.shape = "y", ir.TensorType(result), ir.Shape([rows, n])
    opsets = {"": 21, "edgevl": 1}
    graph = ir.Graph([x], [y], nodes=[node], initializers=initializers, opset_imports=opsets, name="gemm")
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    if operators is not None:
        options.register_custom_ops_library(str(operators))
    content = ir.to_proto(ir.Model(graph, ir_version=10)).SerializeToString()
    session = ort.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    feeds = {"x": np.ones((rows, k), dtype)}
    return lambda: session.run(None, feeds)


def _read_bandwidth(threads: int, megabytes: int) -> float:
    """GB/s of an array far larger than the caches, cut into one piece per thread: summed by numpy, or read as our own
    kernels read, whichever is the faster."""
    data = np.ones(megabytes * 1_000_000 // 8, np.int64)
    pieces = np.array_split(data, threads)
    readers: list[Callable[[np.ndarray], object]] = [np.add.reduce]
    with contextlib.suppress(EngineError):
        readers.append(memory_reader())
    with ThreadPoolExecutor(threads) as pool:
        best = min(timed(lambda r=read: list(pool.map(r, pieces))) for _ in range(_REPEATS) for read in readers)
    return data.nbytes / best / 1e9


def fp32_gemm_here() -> float:
    """GOP/s of numpy's BLAS, with the threads that this process was given as it began."""
    rows, k, n = _GEMM
    a, b = np.ones((rows, k), np.float32), np.ones((k, n), np.float32)
    out = np.empty((rows, n), np.float32)
    return 2.0 * rows * k * n / _best(lambda: np.matmul(a, b, out=out)) / 1e9


def _fp32_gemm(threads: int) -> float:
    """GOP/s of numpy's BLAS with so many threads: in a process of its own, which can still be told."""
    code = "from edgevl.benchmarks.roofline import fp32_gemm_here as measure; print(measure())"
    done = run_process([sys.executable, "-c", code], "", blas_environment(threads))
    if done.returncode:
        raise EngineError(f"numpy's products cannot be measured: {(done.stderr.strip().splitlines() or ['?'])[-1]}")
    return float(done.stdout)


def blas_environment(threads: int) -> dict[str, str]:
    """Of a process whose numpy multiplies with so many threads."""
    return {**environment(threads), **dict.fromkeys(_BLAS_THREADS, str(threads))}


def _int8_gemm(threads: int) -> float:
    """GOP/s of the fastest integer product."""
    operators: list[Path | None] = [None]
    with contextlib.suppress(EngineError):
        if has_int8_kernels():
            operators.append(native_library())
    # One after the other: the threads of a session that waits would take time from another's.
    best = min(_best(int8_product(threads, *_GEMM, library)) for library in operators)
    return 2.0 * math.prod(_GEMM) / best / 1e9


def _best(function: Callable[[], object]) -> float:
    return min(timed(function) for _ in range(_REPEATS))
