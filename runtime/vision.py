"""Pictures to image embeddings: load, preprocess, run the vision encoder. Knows no text."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from edgevl.runtime.config import ModelConfig
from edgevl.runtime.engine import GraphRunner
from edgevl.runtime.errors import EngineError, InputError
from edgevl.runtime.image_loading import load_image
from edgevl.runtime.image_processing import (
    ImageProcessorConfig,
    ProcessedImage,
    VisionGrid,
    preprocess_frames,
    preprocess_image,
)
from edgevl.runtime.mrope import vision_rotary_rows
from edgevl.runtime.prompt import VisionInput

__all__ = ["EncodedImage", "VisionStage", "preprocess_vision"]

_PATCHES_PER_CALL = 16384  # frames of a video go through in groups of this many patches, to bound activations
_OPTIONS = ("min_pixels", "max_pixels")


@dataclass(frozen=True)
class EncodedImage:
    """A picture (or video) after the vision encoder; may stand for the picture in any later message.

    `embeds` float32 [grid.tokens, hidden]; sizes are (width, height) in pixels; `key` identifies the pixel values.
    """

    embeds: np.ndarray
    grid: VisionGrid
    original_size: tuple[int, int]
    resized_size: tuple[int, int]
    key: str
    preprocess_s: float
    vision_s: float


class VisionStage:
    """The picture half of the model: preprocessing as the checkpoint says, then the vision graph."""

    def __init__(
        self,
        graph: GraphRunner,
        config: ModelConfig,
        processor: ImageProcessorConfig,
        admit: Callable[[ProcessedImage], None] | None = None,
    ) -> None:
        """`admit` is asked before a picture is encoded, and raises where there is no memory for it."""
        self._graph, self._config, self._processor, self._admit = graph, config, processor, admit

    def encode(self, item: VisionInput) -> EncodedImage:
        """Encode one picture or video of a message; an EncodedImage passes through.

        Raises:
            InputError: not a picture, an option that does not exist.
            EngineError: the encoder gave NaN or infinity.
        """
        if isinstance(item.source, EncodedImage):
            return item.source
        started = time.perf_counter()
        processed = self.preprocess(item)
        if self._admit is not None:
            self._admit(processed)
        done = time.perf_counter()
        embeds = self.run(processed)
        return EncodedImage(
            embeds=embeds,
            grid=processed.grid,
            original_size=processed.original_size,
            resized_size=processed.resized_size,
            key=content_key(processed),
            preprocess_s=done - started,
            vision_s=time.perf_counter() - done,
        )

    def preprocess(self, item: VisionInput) -> ProcessedImage:
        """Pixels of one picture or video, as the vision encoder wants them."""
        return preprocess_vision(item, self._processor)

    def run(self, processed: ProcessedImage) -> np.ndarray:
        """Embeddings float32 [tokens, hidden] of preprocessed pixels."""
        grid, vision = processed.grid, self._config.vision
        cos, sin = vision_rotary_rows(grid.h, grid.w, vision.spatial_merge_size, vision.head_dim)
        per_frame = grid.h * grid.w
        patches = processed.pixel_values.reshape(grid.t, per_frame, -1)
        step = max(1, _PATCHES_PER_CALL // per_frame)
        parts = []
        for start in range(0, grid.t, step):
            frames = patches[start : start + step]
            rows = {
                "rotary_cos": np.broadcast_to(cos, (len(frames), *cos.shape)),
                "rotary_sin": np.broadcast_to(sin, (len(frames), *sin.shape)),
            }
            parts.append(self._graph.run({"patches": frames, **rows})["image_embeds"])
        # A copy of its own: what lies in the engine's arena would keep the whole region of a picture's activations.
        embeds = np.concatenate(parts).astype(np.float32, copy=False)
        if not np.isfinite(embeds).all():
            raise EngineError(
                "the vision encoder gave NaN or infinity; float16 overflows on some pictures: "
                "export with --vision-precision fp32 or int8"
            )
        return embeds


def preprocess_vision(item: VisionInput, processor: ImageProcessorConfig) -> ProcessedImage:
    """Load one picture or video of a message and turn it into patches as the checkpoint's processor says.

    Raises:
        InputError: not a picture, an option that does not exist.
    """
    unknown = set(item.options) - set(_OPTIONS)
    if unknown:
        raise InputError(f"{item.kind} options {sorted(unknown)} are not supported; expected {', '.join(_OPTIONS)}")
    options: dict[str, Any] = {k: v for k, v in item.options.items() if v is not None}
    if item.kind == "image":
        return preprocess_image(load_image(item.source), processor, **options)
    return preprocess_frames(_frames(item.source), processor, **options)


def content_key(processed: ProcessedImage) -> str:
    """Identity of a picture's pixels (never of its path: a file may be overwritten)."""
    digest = hashlib.blake2b(digest_size=16)
    digest.update(repr(processed.grid).encode())
    digest.update(np.ascontiguousarray(processed.pixel_values).data)
    return digest.hexdigest()


def _frames(source: object) -> list[Image.Image]:
    """Frames of a video given as a list of pictures or a folder of them (in the order of their names)."""
    if isinstance(source, (str, Path)) and Path(source).is_dir():
        source = sorted(p for p in Path(source).iterdir() if p.suffix.lower() in _PICTURES)
    if not isinstance(source, Sequence) or isinstance(source, (str, bytes)):
        raise InputError(f"video {source!r}: expected a list of pictures or a folder of them")
    if not source:
        raise InputError("a video has no frames; expected at least one picture")
    return [load_image(frame) for frame in source]


_PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")
