"""Pictures to image embeddings: load, preprocess, run the vision encoder. Knows no text."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from edgevl.runtime.config import ModelConfig
from edgevl.runtime.device_tensor import Rows, freeze, join_rows
from edgevl.runtime.engine import GraphRunner
from edgevl.runtime.errors import EngineError, InputError
from edgevl.runtime.image_cache import ImageCache, cached_rows, content_key, join_keys, picture_key
from edgevl.runtime.image_loading import load_image
from edgevl.runtime.image_processing import (
    ImageProcessorConfig,
    ProcessedImage,
    VisionGrid,
    preprocess_frames,
    preprocess_image,
    smart_resize,
)
from edgevl.runtime.mrope import vision_rotary_rows
from edgevl.runtime.prompt import VisionInput

__all__ = ["EncodedImage", "VisionStage", "preprocess_vision"]

_PATCHES_PER_CALL = 16384  # frames of a video go through in groups of this many patches, to bound activations
_OPTIONS = ("min_pixels", "max_pixels")


@dataclass(frozen=True)
class EncodedImage:
    """A picture (or video) after the vision encoder; may stand for the picture in any later message.

    `embeds` float32 [grid.tokens, hidden], read-only, or a tensor on the engine's device; sizes are (width, height) in
    pixels; `key` identifies the content; `cached`: the encoder did not run for it (the image cache had it, or it was
    encoded before).
    """

    embeds: Rows
    grid: VisionGrid
    original_size: tuple[int, int]
    resized_size: tuple[int, int]
    key: str
    preprocess_s: float
    vision_s: float
    cached: bool = False


class VisionStage:
    """The picture half of the model: preprocessing as the checkpoint says, then the vision graph.

    Args:
        cache: where features are kept by content; without one nothing is kept.
    """

    def __init__(
        self, graph: GraphRunner, config: ModelConfig, processor: ImageProcessorConfig, cache: ImageCache | None = None
    ) -> None:
        self._graph, self._config, self._processor = graph, config, processor
        self.cache = ImageCache(0) if cache is None else cache

    def encode(self, item: VisionInput) -> EncodedImage:
        """Encode one picture or video of a message; an EncodedImage passes through.

        Raises:
            InputError: not a picture, an option that does not exist.
            EngineError: the encoder gave NaN or infinity.
        """
        if isinstance(item.source, EncodedImage):  # its times were counted where it was encoded
            return replace(item.source, preprocess_s=0.0, vision_s=0.0, cached=True)
        return self._encode_picture(item) if item.kind == "image" else self._encode_video(item)

    def _encode_picture(self, item: VisionInput) -> EncodedImage:
        """A picture is looked up by its decoded pixels, before they are resized."""
        started = time.perf_counter()
        options = _options(item)
        picture = load_image(item.source)
        config = self._processor.with_pixels(**options)
        height, width = smart_resize(picture.height, picture.width, config.factor, config.min_pixels, config.max_pixels)
        key = picture_key(picture, config, (width, height))
        embeds = self.cache.get(key)
        cached = embeds is not None
        if embeds is None:
            processed = preprocess_image(picture, self._processor, **options)
            done = time.perf_counter()
            embeds = self.run(processed)
            self.cache.put(key, embeds)
        else:
            done = time.perf_counter()
        freeze(embeds)
        grid = VisionGrid(1, height // config.patch_size, width // config.patch_size)
        times = {"preprocess_s": done - started, "vision_s": time.perf_counter() - done}
        return EncodedImage(embeds, grid, picture.size, (width, height), key, **times, cached=cached)

    def _encode_video(self, item: VisionInput) -> EncodedImage:
        """A video is looked up frame group by frame group (what becomes one row of tokens in time)."""
        started = time.perf_counter()
        processed = self.preprocess(item)
        done = time.perf_counter()
        grid = processed.grid
        groups = processed.pixel_values.reshape(grid.t, grid.h * grid.w, -1)
        embeds, keys, hits = self._frames(groups, grid)
        freeze(embeds)
        return EncodedImage(
            embeds=embeds,
            grid=grid,
            original_size=processed.original_size,
            resized_size=processed.resized_size,
            key=join_keys("video", keys),
            preprocess_s=done - started,
            vision_s=time.perf_counter() - done,
            cached=hits == len(keys),
        )

    def _frames(self, groups: np.ndarray, grid: VisionGrid) -> tuple[Rows, list[str], int]:
        """Embeddings of frame groups float32 [t, h × w, patch_dim] of a video of `grid`, their keys, and how many of
        them the cache had. Of a video that does not fit the cache whole nothing is kept: going round, it would drop
        every group before it is asked for again."""
        tokens = grid.tokens(self._config.vision.spatial_merge_size)
        keys = [content_key(group, "frames", grid.h, grid.w) for group in groups]
        if tokens * self._config.text.hidden_size * 4 > self.cache.limit_bytes:
            return self._run(groups, grid), keys, 0

        def encode(indices: list[int]) -> np.ndarray:
            embeds = self._run(groups if len(indices) == len(groups) else groups[indices], grid)
            return np.asarray(embeds).reshape(len(indices), tokens // grid.t, -1)

        embeds, hits = cached_rows(self.cache, keys, encode)
        return embeds, keys, hits

    def preprocess(self, item: VisionInput) -> ProcessedImage:
        """Pixels of one picture or video, as the vision encoder wants them."""
        return preprocess_vision(item, self._processor)

    def run(self, processed: ProcessedImage) -> Rows:
        """Embeddings [tokens, hidden] of preprocessed pixels: float32, or a tensor on the engine's device."""
        grid = processed.grid
        return self._run(processed.pixel_values.reshape(grid.t, grid.h * grid.w, -1), grid)

    def _run(self, patches: np.ndarray, grid: VisionGrid) -> Rows:
        """Embeddings of some temporal patches float32 [t, h × w, patch_dim] of a grid."""
        vision = self._config.vision
        cos, sin = vision_rotary_rows(grid.h, grid.w, vision.spatial_merge_size, vision.head_dim)
        step = max(1, _PATCHES_PER_CALL // (grid.h * grid.w))
        parts = []
        for start in range(0, len(patches), step):
            frames = patches[start : start + step]
            rows = {
                "rotary_cos": np.broadcast_to(cos, (len(frames), *cos.shape)),
                "rotary_sin": np.broadcast_to(sin, (len(frames), *sin.shape)),
            }
            parts.append(self._graph.run({"patches": frames, **rows})["image_embeds"])
        embeds = join_rows(parts)
        if isinstance(embeds, np.ndarray):
            embeds = embeds.astype(np.float32, copy=False)
        # Of a tensor on a device this is a copy; the tensor itself stays there.
        if not np.isfinite(np.asarray(embeds)).all():
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
    options = _options(item)
    if item.kind == "image":
        return preprocess_image(load_image(item.source), processor, **options)
    return preprocess_frames(_frames(item.source), processor, **options)


def _options(item: VisionInput) -> dict[str, Any]:
    unknown = set(item.options) - set(_OPTIONS)
    if unknown:
        raise InputError(f"{item.kind} options {sorted(unknown)} are not supported; expected {', '.join(_OPTIONS)}")
    return {k: v for k, v in item.options.items() if v is not None}


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
