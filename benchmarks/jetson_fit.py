"""What fits on which Jetson: memory of the released shapes at the precisions offered, from the shapes alone.

    python -m edgevl.benchmarks.jetson_fit        # the table of docs/jetson.md

    total = system + process + weights + KV cache + scratch of the larger of vision encoder and prefill

Weights follow from the shapes and formats. TensorRT keeps the weights of float16 and W8A8 layers once per profile, and
there are two (decode, prefill); int4 weights are kept once and 6 % (both read off plans of TensorRT-RTX 1.7). Scratch
is what one layer holds at once. System and process are round figures of a Jetson without a desktop. No figure of this
module was measured on a Jetson.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

import numpy as np
from tabulate import tabulate

from edgevl.benchmarks.random_checkpoint import released_config
from edgevl.runtime.checkpoint import expected_shapes
from edgevl.runtime.config import ModelConfig

__all__ = ["BOARDS", "RECIPES", "Fit", "Recipe", "fit", "table"]

BOARDS = (4, 8, 16, 32, 64)  # GB as they are sold
USABLE = 0.93  # of them: the rest is reserved by firmware (an 8 GB board shows 7.4 GiB)
SYSTEM = 0.9e9  # Jetson Linux without a desktop
PROCESS = 1.1e9  # CUDA context, TensorRT's or ONNX Runtime's libraries, Python
TOKENS = 4096  # of the KV cache
PATCHES = 4096  # of the largest picture: 896 x 896, 1,024 tokens
PREFILL = 1024  # tokens at once
MODELS = ("2b", "7b", "72b")
BLOCK = 128


@dataclass(frozen=True)
class Recipe:
    """One way to export: bytes per weight of the parts, and how often the decoder's layers are kept."""

    name: str
    options: str
    layers: float
    copies: float
    tables: float
    vision: float


_INT4 = 0.5 + 2 / BLOCK
RECIPES = (
    Recipe("TensorRT fp16", "--target tensorrt --precision fp16", 2, 2, 2, 2),
    Recipe("TensorRT W8A8", "--target tensorrt --precision int8", 1, 2, 2, 2),
    Recipe("TensorRT int4", "--target tensorrt --precision int4", _INT4, 1.06, 2, 2),
    Recipe("TensorRT int4, vision int8", "… --precision int4 --vision-precision int8", _INT4, 1.06, 2, 1),
    Recipe("TensorRT int4, head int4, vision int8", "… --head-bits 4 --vision-precision int8", _INT4, 1.06, _INT4, 1),
    Recipe("ONNX Runtime CUDA int4", "--target cuda --precision int4", _INT4, 1, 1 + 2 / BLOCK, 2),
)


@dataclass(frozen=True)
class Fit:
    """Bytes by what they are for."""

    weights: int
    cache: int
    scratch: int

    @property
    def total(self) -> int:
        return int(SYSTEM + PROCESS) + self.weights + self.cache + self.scratch

    def fits(self, gigabytes: int) -> bool:
        return self.total <= gigabytes * 2**30 * USABLE


def fit(config: ModelConfig, recipe: Recipe) -> Fit:
    """Memory of one model exported by one recipe."""
    weights = 0.0
    for name, shape in expected_shapes(config).items():
        count = int(np.prod(shape, dtype=np.int64))
        if name.startswith("visual."):
            weights += count * (recipe.vision if len(shape) == 2 else 2)
        elif name in ("model.embed_tokens.weight", "lm_head.weight"):
            weights += count * recipe.tables
        else:
            weights += count * (recipe.layers * recipe.copies if len(shape) == 2 else 2)
    t, v = config.text, config.vision
    cache = 2 * t.num_hidden_layers * t.num_key_value_heads * t.head_dim * TOKENS * 2
    # gate, up and their product beside the residual stream, q, k, v and the mask; in the encoder the feed-forward
    # layer beside the residual stream and its norm, or q, k, v twice (before and after the rotation)
    prefill = PREFILL * (3 * t.intermediate_size + 5 * t.hidden_size + TOKENS) * 2
    vision = PATCHES * (6 * v.embed_dim + max(4 * v.embed_dim, v.intermediate_size)) * 2
    return Fit(int(weights), cache, max(prefill, vision) + t.vocab_size * 4)


def model_config(shape: str) -> ModelConfig:
    """The released config of a shape of `random_checkpoint.SHAPES`."""
    return ModelConfig.from_hf(released_config(shape), {}, f"config of {shape}")


def table() -> str:
    """The table, in Markdown; sizes in GB (1e9 bytes)."""
    rows = []
    for shape in MODELS:
        config = model_config(shape)
        for recipe in RECIPES:
            found = fit(config, recipe)
            sizes = [f"{n / 1e9:.1f}" for n in (found.weights, found.cache, found.scratch, found.total)]
            rows.append([shape.upper(), recipe.name, *sizes, *("yes" if found.fits(b) else "–" for b in BOARDS)])
    headers = ["model", "engine, precision", "weights", "KV cache", "scratch", "total", *(f"{b} GB" for b in BOARDS)]
    align = ("left", "left", *["right"] * 4, *["center"] * len(BOARDS))
    return tabulate(rows, headers=headers, tablefmt="github", colalign=align, disable_numparse=True)


def main() -> None:
    sys.stdout.write(table() + "\n")


if __name__ == "__main__":
    main()
