"""What a request will need in memory, before anything is loaded: from the bundle's shapes and file sizes.

    peak = max(opening:    base + packed weights + pages that packing read,
               a picture:  base + weights + pixels + vision activations + what the decoder's arena kept,
               an answer:  base + weights + embeddings + prefill activations + KV cache)

Weights are packed copies. ONNX Runtime on a CPU only. Sizes follow from the shapes; the constants that
had to be measured stand below, each with what it stands for and how it was found (benchmarks/memory.py compares
predictions with measured peaks). The same numbers admit or refuse requests (`Admission`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from edgevl.runtime.bundle import NATIVE_ROLES, Bundle
from edgevl.runtime.decoding import DEFAULT_PREFILL_CHUNK
from edgevl.runtime.errors import InputError
from edgevl.runtime.image_processing import VisionGrid
from edgevl.runtime.native_kernels import native_role

__all__ = ["Plan", "Planner"]

# Python, numpy, Pillow, tokenizers and ONNX Runtime with their code pages, without any model; resident set of a
# process that has opened the demo bundle less its weights. x86-64 Linux, Python 3.11 to 3.13, onnxruntime 1.32.
BASE = 100_000_000
# The tokenizers library holds its vocabulary, merges and caches: resident growth on opening a vocabulary of 151,657.
TOKENIZER_BYTES_PER_TOKEN = 350
# MatMulNBits keeps one float32 sum per block of weights beside codes and scales (MLAS, CompInt8 kernels).
BLOCK_SUM_BYTES = 4
# float16 on a CPU is computed in float32: the kernels' copies are twice as large, and the table is kept in both.
FP16_WIDENED = 2.2
# Vision, in units of patches × width float32: merged q/k/v 3, split 3, rotated 2, MultiHeadAttention's own transposes
# 3 and output 2, residual and norm 2 make 15; the rest is the arena's rounding of chunks. Slope measured over 256 to
# 6,400 patches: 20 to 22, the same for float32 and W8A8 (whose feed-forward layer needs less than attention). An
# encoder of a single block stays at 16; no released one has less than 32.
VISION_UNITS = 22.0
VISION_UNITS_FP16 = 26.0  # casts around every product
# Our own attention keeps keys and values in int8 and splits nothing, and products round their inputs, apply QuickGelu
# and add residuals themselves. Slope measured over 256 to 6,400 patches: 11 to 12.5.
VISION_UNITS_NATIVE = 12.0
# Decoder prefill, per token in float32: gate, its silu, up and their product, each as wide as the feed-forward layer,
# over a residual stream. Measured 4.05 to 4.2 widths for 1,024 to 6,144 tokens in int4 and W8A8 alike, whatever the
# cache holds: GroupQueryAttention keeps no matrix of scores.
PREFILL_WIDTHS, PREFILL_STREAMS = 4, 1
PREFILL_WIDTHS_NATIVE = 3.1  # a product multiplies with its gate; measured 3.0 to 3.2 in int4 and W8A8
LOGITS_COPIES = 3  # the graph's, the sampler's float32 and its penalized copy
_PAGE = 4096
_PATCHES_PER_CALL = 16384  # as in edgevl.runtime.vision
_QUANTIZED_BLOCK = 128


@dataclass(frozen=True)
class Plan:
    """Bytes, by what they are for. `cache_tokens` is the longest row's; `peak` is that of a process that opens the
    bundle and answers such requests again and again."""

    images: int
    image_tokens: int
    cache_tokens: int
    batch: int
    base: int  # interpreter, libraries, tokenizer
    tokenizer: int  # the part of base that is the tokenizer
    weights: int
    mapped: int  # pages of weight files, read for packing, that stay resident until opening has ended
    pixels: int
    vision: int
    embeds: int
    prefill: int
    cache: int

    @property
    def opening(self) -> int:
        """The tokenizer comes when the engine has opened and given the mapped pages back."""
        return self.base + self.weights + max(0, self.mapped - self.tokenizer)

    @property
    def picture(self) -> int:
        """While a picture is encoded. ONNX Runtime's arena keeps what earlier prefills took."""
        return self.base + self.weights + self.prefill + self.embeds + self.pixels + self.vision

    @property
    def answer(self) -> int:
        """While the answer is computed."""
        return self.base + self.weights + self.embeds + self.prefill + self.cache

    @property
    def peak(self) -> int:
        return max(self.opening, self.picture if self.images else 0, self.answer)

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "opening": self.opening, "picture": self.picture, "answer": self.answer,
                "peak": self.peak}  # fmt: skip


class Planner:
    """Sizes of one bundle's parts, as this machine runs it: with our own kernels or without; all results in bytes."""

    def __init__(self, bundle: Bundle, prefill_chunk: int = DEFAULT_PREFILL_CHUNK) -> None:
        """Raises InputError where the environment's switch of the kernels says neither on nor off."""
        self.bundle, self._chunk = bundle, prefill_chunk
        self._native = {role for role in NATIVE_ROLES if native_role(bundle, role)}
        self._decoders = [role for role in ("prefill", "decoder") if role in bundle.graphs]
        self._text, self._vision = bundle.model.text, bundle.model.vision
        decoder = bundle.graphs["decoder"]
        self._quantized = decoder.precision not in ("fp32", "fp16")
        # Graphs that pack what they have in blocks, the head at least.
        self._packing = sum(role not in self._native for role in self._decoders)
        self._cache_item = np.dtype(decoder.spec.input(decoder.spec.cache[0][0]).dtype).itemsize
        self._vision_fp16 = bundle.graphs["vision"].precision == "fp16"

    # ------------------------------------------------------------------ what is there all the time

    @property
    def base(self) -> int:
        return BASE + self.tokenizer

    @property
    def tokenizer(self) -> int:
        return TOKENIZER_BYTES_PER_TOKEN * self._text.vocab_size

    @property
    def table(self) -> int:
        """The embedding, or a head of its size, as the file holds it."""
        numbers = self._text.vocab_size * self._text.hidden_size
        if not self._quantized:
            return numbers * (2 if self.bundle.graphs["decoder"].precision == "fp16" else 4)
        options = self.bundle.options
        bits, block = options.get("head_bits") or 8, options.get("block_size") or _QUANTIZED_BLOCK
        return math.ceil(numbers * (bits / 8 + 4 / block))

    @property
    def weights(self) -> int:
        """What the sessions keep: every matrix once, packed for the kernels. The embedding's rows are read from the
        mapped file (a prompt touches few of them); where it is also the head, the head is a packed copy."""
        sizes = {"vision": self._data_size("vision"), "decoder": self._decoder_size()}
        if "prefill" in self.bundle.graphs and self._packing:  # each has its own head; our own kernels share it
            sizes["decoder"] += self.table
        total = 0.0
        for role, size in sizes.items():
            total += size * (FP16_WIDENED if self.bundle.graphs[role].precision == "fp16" else 1)
        return round(total) + self._block_sums()

    @property
    def mapped(self) -> int:
        """The embedding is mapped and, where it is also the head, read for packing, once per decoder graph that packs
        it. The pages are given back when all sessions are open; our own kernels, which pack too, give back those of
        every weight by itself."""
        widened = FP16_WIDENED if self.bundle.graphs["decoder"].precision == "fp16" else 1
        return round(self.table * widened) * self._packing

    def _with_w8a8(self, roles: Sequence[str]) -> bool:
        return any(self.bundle.graphs[role].precision == "int8" for role in roles)

    def _decoder_size(self) -> int:
        """The file of the decoder's weights, without an embedding that is not the head."""
        return self._data_size("decoder") - (0 if self._text.tie_word_embeddings else self.table)

    def _layer_numbers(self) -> int:
        t = self._text
        attention = t.hidden_size * t.head_dim * 2 * (t.num_attention_heads + t.num_key_value_heads)
        return t.num_hidden_layers * (attention + 3 * t.hidden_size * t.intermediate_size)

    def _data_size(self, role: str) -> int:
        stem = self.bundle.graphs[role].file.removesuffix(".onnx")
        return sum(f.size for name, f in self.bundle.files.items() if name.startswith(f"{stem}.onnx"))

    def _block_sums(self) -> int:
        if not self._quantized:
            return 0
        numbers = self._packing * self._text.vocab_size * self._text.hidden_size
        if "decoder" not in self._native and not self._with_w8a8(["decoder"]):  # W8A8 layers have no blocks
            numbers += self._layer_numbers()
        return round(numbers / (self.bundle.options.get("block_size") or _QUANTIZED_BLOCK) * BLOCK_SUM_BYTES)

    # ------------------------------------------------------------------ what a request adds

    def image_tokens(self, grid: VisionGrid) -> int:
        return grid.tokens(self._vision.spatial_merge_size)

    def pixels(self, grid: VisionGrid) -> int:
        """The resized picture's bytes and its patches in float32, and the patches' copy for the graph's frames."""
        return grid.patches * (self._vision.patch_dim * 4 + self._vision.patch_size**2 * self._vision.in_channels)

    def _host_pixels(self, grids: Sequence[VisionGrid], batch: int) -> int:
        """All the request's pictures as RGB, and the patches of the one that is encoded; from the second picture on
        the allocator still holds those of the one before."""
        patch = self._vision.patch_size**2 * self._vision.in_channels
        pictures = batch * sum(g.patches * patch for g in grids)
        held = 2 if batch * len(grids) > 1 else 1
        return pictures + held * max((self.pixels(g) for g in grids), default=0)

    def vision(self, grid: VisionGrid) -> int:
        """Activations of the largest call: all frames that go through the encoder at once."""
        per_frame = grid.h * grid.w
        patches = min(grid.t, max(1, _PATCHES_PER_CALL // per_frame)) * per_frame
        units = VISION_UNITS_NATIVE if "vision" in self._native else VISION_UNITS
        units = VISION_UNITS_FP16 if self._vision_fp16 else units
        return round(units * patches * self._vision.embed_dim * 4)

    def embeds(self, image_tokens: int) -> int:
        """Image embeddings in float32, and the copy that joins those of several pictures."""
        return 2 * image_tokens * self._text.hidden_size * 4

    def prefill(self, new_tokens: int) -> int:
        """Activations of the largest chunk of a prompt of which `new_tokens` are not in the cache."""
        t, chunk = self._text, min(new_tokens, self._chunk)
        widths = PREFILL_WIDTHS_NATIVE if self._decoders[0] in self._native else PREFILL_WIDTHS
        stream = widths * t.intermediate_size + PREFILL_STREAMS * t.hidden_size
        return round(chunk * stream + LOGITS_COPIES * t.vocab_size) * 4

    def cache(self, tokens: int) -> int:
        """Keys and values of one row; every head's run of tokens fills whole pages."""
        t = self._text
        run = -(-tokens * t.head_dim * self._cache_item // _PAGE) * _PAGE
        return 2 * t.num_hidden_layers * t.num_key_value_heads * run

    def plan(self, grids: Sequence[VisionGrid], text_tokens: int, new_tokens: int, batch: int = 1) -> Plan:
        """A request of `batch` equal rows: the pictures `grids`, `text_tokens` of prompt beside them, an answer of at
        most `new_tokens`."""
        image_tokens = sum(self.image_tokens(g) for g in grids)
        prompt = image_tokens + text_tokens
        return Plan(
            images=len(grids),
            image_tokens=image_tokens,
            cache_tokens=prompt + new_tokens,
            batch=batch,
            base=self.base,
            tokenizer=self.tokenizer,
            weights=self.weights,
            mapped=self.mapped,
            pixels=self._host_pixels(grids, batch),
            vision=max((self.vision(g) for g in grids), default=0),
            embeds=batch * self.embeds(image_tokens),
            prefill=self.prefill(prompt),
            cache=batch * self.cache(prompt + new_tokens),
        )


def largest_that_fits(low: int, high: int, fits: Callable[[int], bool]) -> int | None:
    """The largest integer in [low, high] for which `fits` holds, of a property that holds up to some point."""
    if not fits(low):
        return None
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def picture_of(max_pixels: int, factor: int) -> tuple[int, int]:
    """(height, width) of the largest nearly square picture of at most `max_pixels`, in multiples of `factor`.

    Raises:
        InputError: not even one tile fits.
    """
    side = math.isqrt(max(0, max_pixels)) // factor
    if side < 1:
        raise InputError(f"max_pixels is {max_pixels}, expected at least {factor**2}: one tile of {factor}×{factor}")
    return side * factor, max_pixels // (side * factor) // factor * factor
