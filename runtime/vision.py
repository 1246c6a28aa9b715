"""Pictures and videos to image embeddings: load, preprocess, run the vision encoder. Knows no text.

A video goes through in groups of frames: decoded, resized, encoded and forgotten but for their embeddings.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgevl.runtime.config import ModelConfig
from edgevl.runtime.engine import GraphRunner
from edgevl.runtime.errors import EngineError, InputError
from edgevl.runtime.image_loading import load_image
from edgevl.runtime.image_processing import (
    ImageProcessorConfig,
    ProcessedImage,
    VisionGrid,
    frame_patches,
    preprocess_image,
)
from edgevl.runtime.mrope import vision_rotary_rows
from edgevl.runtime.prompt import VisionInput
from edgevl.runtime.results import VideoInfo
from edgevl.runtime.video import VideoOptions, VideoPlan, frame_groups, plan_video
from edgevl.runtime.video_reading import DEFAULT_FPS, VideoSource, open_video

__all__ = ["EncodedImage", "VisionStage", "preprocess_vision"]

_PATCHES_PER_CALL = 4096  # frames of a video go through in groups of this many patches, to bound memory
_OPTIONS = ("min_pixels", "max_pixels")


@dataclass(frozen=True)
class EncodedImage:
    """A picture (or video) after the vision encoder; may stand for the picture in any later message.

    `embeds` float32 [grid.tokens, hidden]; sizes are (width, height) in pixels; `key` identifies the pixel values;
    `video` says which frames of a video these are.
    """

    embeds: np.ndarray
    grid: VisionGrid
    original_size: tuple[int, int]
    resized_size: tuple[int, int]
    key: str
    preprocess_s: float
    vision_s: float
    video: VideoInfo | None = None


class VisionStage:
    """The picture half of the model: preprocessing as the checkpoint says, then the vision graph."""

    def __init__(self, graph: GraphRunner, config: ModelConfig, processor: ImageProcessorConfig) -> None:
        self._graph, self._config, self._processor = graph, config, processor

    def encode(self, item: VisionInput, max_tokens: int | None = None) -> EncodedImage:
        """Encode one picture or video of a message; an EncodedImage passes through.

        Args:
            max_tokens: what a video is fitted to, with smaller and then fewer frames; a picture is not.

        Raises:
            InputError: not a picture or video, an option that does not exist.
            CapacityError: two frames of a video are more than max_tokens.
            EngineError: the encoder gave NaN or infinity, or PyAV is needed and not installed.
        """
        if isinstance(item.source, EncodedImage):
            return item.source
        if item.kind == "video":
            return self._encode_video(item, max_tokens)
        started = time.perf_counter()
        processed = self.preprocess(item)
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
        grid = processed.grid
        patches = processed.pixel_values.reshape(grid.t, grid.h * grid.w, -1)
        step = _pairs_per_call(grid)
        parts = [self._run(patches[start : start + step], grid) for start in range(0, grid.t, step)]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _run(self, patches: np.ndarray, grid: VisionGrid) -> np.ndarray:
        """Embeddings of some temporal patches float32 [t, h × w, patch_dim] of a grid."""
        vision = self._config.vision
        cos, sin = vision_rotary_rows(grid.h, grid.w, vision.spatial_merge_size, vision.head_dim)
        rows = {
            "rotary_cos": np.broadcast_to(cos, (len(patches), *cos.shape)),
            "rotary_sin": np.broadcast_to(sin, (len(patches), *sin.shape)),
        }
        embeds = self._graph.run({"patches": patches, **rows})["image_embeds"].astype(np.float32, copy=False)
        if not np.isfinite(embeds).all():
            raise EngineError(
                "the vision encoder gave NaN or infinity; float16 overflows on some pictures: "
                "export with --vision-precision fp32 or int8"
            )
        return embeds

    def _encode_video(self, item: VisionInput, max_tokens: int | None) -> EncodedImage:
        began, vision_s = time.perf_counter(), 0.0
        with _open(item) as source:
            plan = plan_video(source, VideoOptions.of(item.options), self._processor, max_tokens)
            grid, done = plan.grid, 0
            embeds = np.empty((plan.tokens, self._config.vision.hidden_size), np.float32)
            digest = _digest(grid)
            for pixels in _pixels(source, plan, self._processor):
                digest.update(pixels.data)
                started = time.perf_counter()
                part = self._run(pixels.reshape(-1, grid.h * grid.w, pixels.shape[-1]), grid)
                vision_s += time.perf_counter() - started
                embeds[done : done + len(part)] = part
                done += len(part)
            info = plan.info(source)
        return EncodedImage(
            embeds=embeds,
            grid=grid,
            original_size=info.original_size,
            resized_size=info.resized_size,
            key=digest.hexdigest(),
            preprocess_s=time.perf_counter() - began - vision_s,
            vision_s=vision_s,
            video=info,
        )


def preprocess_vision(item: VisionInput, processor: ImageProcessorConfig) -> ProcessedImage:
    """Load one picture or video of a message and turn it into patches as the checkpoint's processor says.

    Raises:
        InputError: not a picture or video, an option that does not exist.
    """
    if item.kind == "video":
        with _open(item) as source:
            plan = plan_video(source, VideoOptions.of(item.options), processor)
            pixels = np.concatenate(list(_pixels(source, plan, processor)))
            return ProcessedImage(pixels, plan.grid, source.size, plan.size)
    unknown = set(item.options) - set(_OPTIONS)
    if unknown:
        raise InputError(f"{item.kind} options {sorted(unknown)} are not supported; expected {', '.join(_OPTIONS)}")
    options: dict[str, Any] = {k: v for k, v in item.options.items() if v is not None}
    return preprocess_image(load_image(item.source), processor, **options)


def content_key(processed: ProcessedImage) -> str:
    """Identity of a picture's pixels (never of its path: a file may be overwritten)."""
    digest = _digest(processed.grid)
    digest.update(np.ascontiguousarray(processed.pixel_values).data)
    return digest.hexdigest()


def _digest(grid: VisionGrid) -> hashlib.blake2b:
    digest = hashlib.blake2b(digest_size=16)
    digest.update(repr(grid).encode())
    return digest


def _open(item: VisionInput) -> VideoSource:
    return open_video(item.source, VideoOptions.of(item.options).sample_fps or DEFAULT_FPS)


def _pixels(source: VideoSource, plan: VideoPlan, processor: ImageProcessorConfig) -> Iterator[np.ndarray]:
    """pixel_values float32 [patches, patch_dim] of a planned video, one group of frames at a time."""
    per_group = _pairs_per_call(plan.grid) * processor.temporal_patch_size
    with closing(source.read(plan.indices)) as frames:
        for group in frame_groups(frames, plan.size, per_group):
            yield frame_patches(group, plan.size, processor)


def _pairs_per_call(grid: VisionGrid) -> int:
    return max(1, _PATCHES_PER_CALL // (grid.h * grid.w))
