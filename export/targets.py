"""Targets by name: which dialect writes the graphs, which precisions there are, and what the device must have."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from edgevl.export.dialect_cuda import CudaDialect
from edgevl.export.dialect_ort import LEAST_ONNXRUNTIME, LEAST_ONNXRUNTIME_INT8_CACHE, OrtDialect
from edgevl.export.dialect_primitive import PrimitiveDialect
from edgevl.export.dialect_standard import StandardDialect
from edgevl.export.precision import (
    DECODER_PRECISIONS,
    TENSORRT_DECODER_PRECISIONS,
    TENSORRT_VISION_PRECISIONS,
    VISION_PRECISIONS,
    Precision,
    decoder_precision,
    tensorrt_decoder_precision,
    tensorrt_vision_precision,
    vision_precision,
)
from edgevl.runtime.config import ModelConfig
from edgevl.runtime.errors import InputError
from edgevl.runtime.graph_spec import (
    APPENDED,
    IN_PLACE,
    GraphSpec,
    decoder_spec,
    tensorrt_decoder_spec,
    vision_spec,
)

__all__ = ["TARGETS", "Target", "find_target"]


@dataclass(frozen=True)
class Target:
    """One `--target`. `precisions` maps an overall name to those of vision and decoder."""

    name: str
    dialect: type[OrtDialect] | type[StandardDialect]
    requires: Mapping[str, str]  # engine package -> least version
    precisions: Mapping[str, tuple[str, str]]
    default_max_tokens: int
    default_head_bits: int
    vision_precisions: tuple[str, ...]
    decoder_precisions: tuple[str, ...]
    cache_update: str | None = None  # None: ONNX Runtime's lengths instead of TensorRT's mask

    def vision_precision(self, name: str) -> Precision:
        return vision_precision(name) if self.cache_update is None else tensorrt_vision_precision(name)

    def decoder_precision(
        self, name: str, block_size: int, symmetric: bool, head_bits: int | None
    ) -> tuple[Precision, ...]:
        """One precision per graph: two for `hybrid`, one for the others."""
        head_bits = self.default_head_bits if head_bits is None else head_bits
        if self.cache_update is None:
            return decoder_precision(name, block_size, symmetric, head_bits)
        return (tensorrt_decoder_precision(name, block_size, symmetric, head_bits),)

    def vision_spec(self, config: ModelConfig, vision: Precision, decoder: Precision) -> GraphSpec:
        if self.cache_update is None:
            return vision_spec(config, vision.dtype)
        return vision_spec(config, vision.dtype, decoder.dtype)

    def decoder_spec(self, config: ModelConfig, precision: Precision, role: str, capacity: int) -> GraphSpec:
        if self.cache_update is None:
            return decoder_spec(config, precision.dtype, role, precision.cache)
        return tensorrt_decoder_spec(config, precision.dtype, capacity, role, self.cache_update)

    def engines(self, *precisions: Precision) -> dict[str, str]:
        """Engine package -> least version that runs graphs of these precisions."""
        found = dict(self.requires)
        for precision in precisions:
            if precision.cache == "int8":
                found["onnxruntime"] = LEAST_ONNXRUNTIME_INT8_CACHE[precision.dtype]
        if self.cache_update is not None and any(p.dtype == "bfloat16" for p in precisions):
            del found["onnxruntime"]  # its CPU kernels know no bfloat16
        return found


@dataclass(frozen=True)
class CudaTarget(Target):
    """ONNX Runtime on CUDA: attention over the cache is float16 only there, and W8A8 has no kernels."""

    def vision_precision(self, name: str) -> Precision:
        self._check("vision", name, self.vision_precisions, VISION_PRECISIONS)
        return vision_precision(name)

    def decoder_precision(
        self, name: str, block_size: int, symmetric: bool, head_bits: int | None
    ) -> tuple[Precision, ...]:
        self._check("decoder", name, self.decoder_precisions, DECODER_PRECISIONS)
        return tuple(
            replace(p, dtype="float16") for p in super().decoder_precision(name, block_size, symmetric, head_bits)
        )

    def vision_spec(self, config: ModelConfig, vision: Precision, decoder: Precision) -> GraphSpec:
        return vision_spec(config, vision.dtype, decoder.dtype)

    def _check(self, part: str, name: str, offered: tuple[str, ...], known: tuple[str, ...]) -> None:
        """Names that exist nowhere are refused where all of them are known."""
        if name in known and name not in offered:
            raise InputError(
                f"{part} precision {name!r} has no CUDA kernels in ONNX Runtime; target cuda offers "
                f"{', '.join(offered)} (INT8 on a GPU is TensorRT's: --target tensorrt)"
            )


_TENSORRT = {"fp16": ("fp16", "fp16"), "bf16": ("bf16", "bf16"), "int8": ("fp16", "int8"), "int4": ("fp16", "int4")}

TARGETS: dict[str, Target] = {
    t.name: t
    for t in (
        Target(
            "cpu",
            OrtDialect,
            {"onnxruntime": LEAST_ONNXRUNTIME},
            {
                "fp32": ("fp32", "fp32"),
                "fp16": ("fp16", "fp16"),
                "int8": ("int8", "int8"),
                "int8-weights": ("int8", "int8-weights"),
                "int4": ("int8", "int4"),
                "hybrid": ("int8", "hybrid"),
            },
            default_max_tokens=8192,
            default_head_bits=8,
            vision_precisions=VISION_PRECISIONS,
            decoder_precisions=DECODER_PRECISIONS,
        ),
        CudaTarget(
            "cuda",
            CudaDialect,
            {"onnxruntime": LEAST_ONNXRUNTIME},
            {"fp16": ("fp16", "fp16"), "int8-weights": ("fp16", "int8-weights"), "int4": ("fp16", "int4")},
            default_max_tokens=8192,
            default_head_bits=8,
            vision_precisions=("fp16", "fp32"),
            decoder_precisions=("fp16", "int8-weights", "int4"),
        ),
        # ONNX Runtime is listed because it runs the same files, slower: for their numbers where there is no GPU.
        Target(
            "tensorrt",
            StandardDialect,
            {"tensorrt": "10.15", "onnxruntime": "1.24"},
            _TENSORRT,
            default_max_tokens=4096,
            default_head_bits=16,
            vision_precisions=TENSORRT_VISION_PRECISIONS,
            decoder_precisions=TENSORRT_DECODER_PRECISIONS,
            cache_update=IN_PLACE,
        ),
        Target(
            "jetpack6",
            PrimitiveDialect,
            {"tensorrt": "10.3", "onnxruntime": LEAST_ONNXRUNTIME},
            _TENSORRT,
            default_max_tokens=4096,
            default_head_bits=16,
            vision_precisions=TENSORRT_VISION_PRECISIONS,
            decoder_precisions=TENSORRT_DECODER_PRECISIONS,
            cache_update=APPENDED,
        ),
    )
}


def find_target(name: str) -> Target:
    """Raises InputError for a name that is not in TARGETS."""
    if name not in TARGETS:
        raise InputError(f"target {name!r} is not supported by this version; expected {', '.join(TARGETS)}")
    return TARGETS[name]
