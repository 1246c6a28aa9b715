"""Pictures and videos to image embeddings: load, preprocess, run the vision encoder. Knows no text.

A video goes through in groups of frames: decoded, resized, encoded and forgotten but for their embeddings.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
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
    frame_patches,
    preprocess_image,
    resized_size,
)
from edgevl.runtime.mrope import vision_rotary_rows
from edgevl.runtime.pauses import pause
from edgevl.runtime.prompt import VisionInput
from edgevl.runtime.results import VideoInfo
from edgevl.runtime.video import VideoOptions, VideoPlan, frame_groups, plan_video
from edgevl.runtime.video_reading import DEFAULT_FPS, VideoSource, open_video

__all__ = ["EncodedImage", "VisionStage", "check_options", "preprocess_vision"]

_PATCHES_PER_CALL = 4096  # frames of a video go through in groups of this many patches, to bound memory
_OPTIONS = ("min_pixels", "max_pixels", "resized_height", "resized_width")  # of a picture


@dataclass(frozen=True)
class EncodedImage:
    """A picture (or video) after the vision encoder; may stand for the picture in any later message.

    `embeds` float32 [grid.tokens, hidden], read-only, or a tensor on the engine's device; sizes are (width, height) in
    pixels; `key` identifies the content; `cached`: the encoder did not run for it (the image cache had it, or it was
    encoded before); `video` says which frames of a video these are.
    """

    embeds: Rows
    grid: VisionGrid
    original_size: tuple[int, int]
    resized_size: tuple[int, int]
    key: str
    preprocess_s: float
    vision_s: float
    cached: bool = False
    video: VideoInfo | None = None


class VisionStage:
    """The picture half of the model: preprocessing as the checkpoint says, then the vision graph.

    Args:
        cache: where features are kept by content; without one nothing is kept.
        admit: asked with the grid and the resized (width, height) before a picture or video is encoded; raises where
            there is no memory for it.
    """

    def __init__(
        self,
        graph: GraphRunner,
        config: ModelConfig,
        processor: ImageProcessorConfig,
        cache: ImageCache | None = None,
        admit: Callable[[VisionGrid, tuple[int, int]], None] = lambda grid, size: None,
    ) -> None:
        self._graph: GraphRunner | None = graph
        self._config, self._processor, self._admit = config, processor, admit
        self.cache = ImageCache(0) if cache is None else cache

    def close(self) -> None:
        """Let go of the graph, so that closing its engine frees it; nothing can be encoded afterwards."""
        self._graph = None

    def least_grids(self, items: Sequence[VisionInput]) -> tuple[list[VisionGrid], bool]:
        """The grids that pictures and videos will have, as far as they are known without reading them, the smallest
        there are for the others; and whether all were known.

        Raises:
            InputError: a size or option that cannot be.
        """
        config, exact = self._processor, True
        grids = []
        for item in items:
            if isinstance(item.source, EncodedImage):
                grids.append(item.source.grid)
            elif item.kind == "image" and isinstance(item.source, Image.Image):
                width, height = resized_size(item.source.size, config, **_options(item))
                grids.append(VisionGrid(1, height // config.patch_size, width // config.patch_size))
            else:
                grids.append(VisionGrid(1, config.merge_size, config.merge_size))
                exact = False
        return grids, exact

    def encode(self, item: VisionInput, max_tokens: int | None = None) -> EncodedImage:
        """Encode one picture or video of a message; an EncodedImage passes through.

        Args:
            max_tokens: what a video is fitted to, with smaller and then fewer frames; a picture is not.

        Raises:
            InputError: not a picture or video, an option that does not exist.
            CapacityError: two frames of a video are more than max_tokens.
            EngineError: the encoder gave NaN or infinity, or PyAV is needed and not installed.
        """
        if isinstance(item.source, EncodedImage):  # its times were counted where it was encoded
            return replace(item.source, preprocess_s=0.0, vision_s=0.0, cached=True)
        return self._encode_picture(item) if item.kind == "image" else self._encode_video(item, max_tokens)

    def _encode_picture(self, item: VisionInput) -> EncodedImage:
        """A picture is looked up by its decoded pixels, before they are resized."""
        started = time.perf_counter()
        options = _options(item)
        picture = load_image(item.source)
        pause()
        config = self._processor
        width, height = resized_size(picture.size, config, **options)
        key = picture_key(picture, config, (width, height))
        embeds = self.cache.get(key)
        cached = embeds is not None
        grid = VisionGrid(1, height // config.patch_size, width // config.patch_size)
        if embeds is None:
            self._admit(grid, (width, height))  # before its pixels are made, which are the most of it
            pause()
            processed = preprocess_image(picture, config, **options)
            done = time.perf_counter()
            embeds = self.run(processed)
            self.cache.put(key, embeds)
        else:
            done = time.perf_counter()
        freeze(embeds)
        times = {"preprocess_s": done - started, "vision_s": time.perf_counter() - done}
        return EncodedImage(embeds, grid, picture.size, (width, height), key, **times, cached=cached)

    def _encode_video(self, item: VisionInput, max_tokens: int | None) -> EncodedImage:
        """A video is read in a stream, and looked up temporal patch by temporal patch (one row of tokens in time). Of
        one that does not fit the cache whole nothing is kept: going round, it would drop every patch before it is
        asked for again."""
        began, vision_s = time.perf_counter(), 0.0
        with _open(item) as source:
            plan = plan_video(source, VideoOptions.of(item.options), self._processor, max_tokens)
            grid, hidden = plan.grid, self._config.vision.hidden_size
            self._admit(grid, plan.size)
            cache = self.cache if plan.tokens * hidden * 4 <= self.cache.limit_bytes else ImageCache(0)
            embeds, keys = np.empty((plan.tokens, hidden), np.float32), []
            done = hits = 0
            for pixels in _pixels(source, plan, self._processor):
                started = time.perf_counter()
                part, new, found = self._rows_in_time(
                    pixels.reshape(-1, grid.h * grid.w, pixels.shape[-1]), grid, cache
                )
                vision_s += time.perf_counter() - started
                embeds[done : done + len(part)] = part  # a video gathers on the host
                done, hits, keys = done + len(part), hits + found, keys + new
            info = plan.info(source)
        embeds.flags.writeable = False
        return EncodedImage(
            embeds=embeds,
            grid=grid,
            original_size=info.original_size,
            resized_size=info.resized_size,
            key=join_keys("video", keys),
            preprocess_s=time.perf_counter() - began - vision_s,
            vision_s=vision_s,
            cached=hits == len(keys),
            video=info,
        )

    def _rows_in_time(
        self, patches: np.ndarray, grid: VisionGrid, cache: ImageCache
    ) -> tuple[np.ndarray, list[str], int]:
        """Embeddings of temporal patches float32 [t, h × w, patch_dim], their keys, and how many the cache had."""
        keys = [content_key(p, "frames", grid.h, grid.w) for p in patches]
        if not cache.limit_bytes:
            return np.asarray(self._run(patches, grid)), keys, 0

        def encode(indices: list[int]) -> np.ndarray:
            rows = np.asarray(self._run(patches if len(indices) == len(patches) else patches[indices], grid))
            return rows.reshape(len(indices), -1, rows.shape[-1])

        rows, hits = cached_rows(cache, keys, encode)
        return rows, keys, hits

    def preprocess(self, item: VisionInput) -> ProcessedImage:
        """Pixels of one picture or video, as the vision encoder wants them."""
        return preprocess_vision(item, self._processor)

    def run(self, processed: ProcessedImage) -> Rows:
        """Embeddings [tokens, hidden] of preprocessed pixels: float32, or a tensor on the engine's device."""
        grid = processed.grid
        return self._run(processed.pixel_values.reshape(grid.t, grid.h * grid.w, -1), grid)

    def _run(self, patches: np.ndarray, grid: VisionGrid) -> Rows:
        """Embeddings of some temporal patches float32 [t, h × w, patch_dim] of a grid."""
        if self._graph is None:
            raise EngineError("the vision stage is closed; open the model again")
        vision = self._config.vision
        cos, sin = vision_rotary_rows(grid.h, grid.w, vision.spatial_merge_size, vision.head_dim)
        step = _pairs_per_call(grid)
        parts = []
        for start in range(0, len(patches), step):
            frames = patches[start : start + step]
            pause()
            rows = {
                "rotary_cos": np.broadcast_to(cos, (len(frames), *cos.shape)),
                "rotary_sin": np.broadcast_to(sin, (len(frames), *sin.shape)),
            }
            parts.append(self._graph.run({"patches": frames, **rows})["image_embeds"])
        embeds = join_rows(parts)
        if isinstance(embeds, np.ndarray):
            # A copy of its own: what lies in the engine's arena would keep the whole region of a picture's activations.
            embeds = np.array(embeds, np.float32)
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
        InputError: not a picture or video, an option that does not exist.
    """
    if item.kind == "video":
        with _open(item) as source:
            plan = plan_video(source, VideoOptions.of(item.options), processor)
            pixels = np.concatenate(list(_pixels(source, plan, processor)))
            return ProcessedImage(pixels, plan.grid, source.size, plan.size)
    return preprocess_image(load_image(item.source), processor, **_options(item))


def check_options(item: VisionInput, processor: ImageProcessorConfig) -> None:
    """Whether the options beside a picture or video can be; its source is not looked at.

    Raises:
        InputError: an option that does not exist or is out of range.
    """
    if item.kind == "video":
        VideoOptions.of(item.options)
    else:
        resized_size((processor.factor, processor.factor), processor, **_options(item))


def _options(item: VisionInput) -> dict[str, Any]:
    unknown = set(item.options) - set(_OPTIONS)
    if unknown:
        raise InputError(f"{item.kind} options {sorted(unknown)} are not supported; expected {', '.join(_OPTIONS)}")
    return {k: v for k, v in item.options.items() if v is not None}


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
