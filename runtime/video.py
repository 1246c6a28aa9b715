"""Which frames of a video the model sees, and at what size: sampling and pixel budgets of qwen_vl_utils.

Equal to qwen_vl_utils 0.0.14 (vision_process.py: smart_nframes, calculate_video_frame_range, fetch_video) for frames
at a constant rate. Where the frames of a file come at a varying rate the reference still counts indices; here the
frames that are on screen at evenly spaced times are taken. On top of it, a video is fitted to the tokens that the KV
cache has room for. It decodes nothing itself: `edgevl.runtime.video_reading` does.

Earlier versions of the reference differ: 0.0.8 gives a whole video 24,576 tokens (115,200 from 0.0.11) and rounds the
number of frames to the nearest even one (to the next lower one from 0.0.11); up to 0.0.11 frames given as a list have
the limits of pictures, not those of a video.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from PIL import Image

from edgevl.runtime.errors import CapacityError, InputError
from edgevl.runtime.image_loading import MAX_DECODED_PIXELS
from edgevl.runtime.image_processing import ImageProcessorConfig, VisionGrid
from edgevl.runtime.picture_size import explicit_size, smart_resize
from edgevl.runtime.results import VideoInfo
from edgevl.runtime.video_reading import VideoSource

__all__ = ["VideoOptions", "VideoPlan", "frame_groups", "frame_indices", "plan_video", "smart_nframes"]

FPS = 2.0  # frames per second that are looked at
MIN_FRAMES, MAX_FRAMES = 4, 768
FRAME_FACTOR = 2  # frames come in pairs: temporal_patch_size
MIN_TOKENS, MAX_TOKENS = 128, 768  # of a pair of frames
TOTAL_TOKENS = 128000 * 0.9  # of a video, in tokens of the merged grid
LEAST_TOKENS = 32  # of a pair: where the cache is small, pictures shrink to this before frames are dropped
_MOST = 1e15  # of an option; beyond it is a mistake
# Options that may be 0 or less, or have narrower limits: lower rates make times without end, more pixels no frame.
_RANGES: Mapping[str, tuple[float, float]] = {
    "video_start": (-_MOST, _MOST),
    "video_end": (-_MOST, _MOST),
    "min_frames": (0, _MOST),
    "sample_fps": (1e-6, 1e6),
    "min_pixels": (1, MAX_DECODED_PIXELS),
}
_SAMPLING = ("fps", "nframes", "min_frames", "max_frames")


@dataclass(frozen=True)
class VideoOptions:
    """Settings beside a video in a message, as qwen_vl_utils takes them. None: its default.

    fps or nframes: frames per second, or in all; min_frames, max_frames: limits of the former. min_pixels,
    max_pixels: of one frame; total_pixels: of all, counted for pairs. video_start, video_end: seconds.
    resized_height, resized_width: size of the frames, rounded to tiles. sample_fps: rate of frames without times.
    """

    fps: float | None = None
    nframes: float | None = None
    min_frames: int | None = None
    max_frames: int | None = None
    min_pixels: int | None = None
    max_pixels: int | None = None
    total_pixels: float | None = None
    video_start: float | None = None
    video_end: float | None = None
    resized_height: int | None = None
    resized_width: int | None = None
    sample_fps: float | None = None

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> VideoOptions:
        """Options of a message's item.

        Raises:
            InputError: one that does not exist, is no number or out of range, or two that exclude each other.
        """
        names = [f.name for f in fields(cls)]
        given = {k: v for k, v in options.items() if v is not None}
        unknown = sorted(set(given) - set(names))
        if unknown:
            raise InputError(f"video options {unknown} are not supported; expected {', '.join(names)}")
        for name, value in given.items():
            least, most = _RANGES.get(name, (0, _MOST))
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not -_MOST <= value <= _MOST:
                raise InputError(f"{name} is {value!r:.60}, expected a number of at most {_MOST:.0e}")
            if value <= 0 and name not in _RANGES:
                raise InputError(f"{name} is {value!r}, expected a number above 0")
            if not least <= value <= most:
                raise InputError(f"{name} is {value!r}, expected a number of {least:g} to {most:g}")
        if "fps" in given and "nframes" in given:
            raise InputError("both fps and nframes are given; expected one of them")
        if ("resized_height" in given) != ("resized_width" in given):
            raise InputError("resized_height and resized_width go together; expected both or none")
        if given.get("min_pixels", 0) > given.get("max_pixels", math.inf):
            raise InputError(
                f"min_pixels is {given['min_pixels']}, max_pixels {given['max_pixels']}; "
                "expected min_pixels <= max_pixels"
            )
        return cls(**given)


@dataclass(frozen=True)
class VideoPlan:
    """What of a video goes to the model.

    indices: frames of the source, ascending; an odd last one fills its pair alone. size: (width, height) that they
    are resized to. grid: of the vision encoder. fitted: what was asked for, where the tokens did not fit.
    """

    indices: tuple[int, ...]
    size: tuple[int, int]
    grid: VisionGrid
    tokens: int
    fitted: str | None = None

    def info(self, source: VideoSource) -> VideoInfo:
        """For people and for --json."""
        notes = [*([self.fitted] if self.fitted else []), *source.notes]
        times = source.times[list(self.indices)]
        return VideoInfo(
            source=source.name,
            frames=len(self.indices),
            total_frames=len(source),
            duration_s=source.duration,
            fps=source.fps,
            sample_fps=len(self.indices) / len(source) * source.fps,
            first_s=float(times[0]),
            last_s=float(times[-1]),
            original_size=source.size,
            resized_size=self.size,
            tokens=self.tokens,
            notes=tuple(notes),
        )


def smart_nframes(options: VideoOptions, total_frames: int, video_fps: float) -> int:
    """How many frames to take of `total_frames` at `video_fps`: an even number.

    Raises:
        InputError: fewer than two, or more than there are.
    """
    if options.nframes is not None:
        count = round(options.nframes / FRAME_FACTOR) * FRAME_FACTOR
    else:
        low = math.ceil((MIN_FRAMES if options.min_frames is None else options.min_frames) / FRAME_FACTOR)
        most = min(MAX_FRAMES, total_frames) if options.max_frames is None else options.max_frames
        high = math.floor(most / FRAME_FACTOR)
        wanted = total_frames / video_fps * (FPS if options.fps is None else options.fps)
        wanted = min(min(max(wanted, low * FRAME_FACTOR), high * FRAME_FACTOR), total_frames)
        count = math.floor(wanted / FRAME_FACTOR) * FRAME_FACTOR
    if not FRAME_FACTOR <= count <= total_frames:
        raise InputError(
            f"{count} frames of a video of {total_frames} are asked for, expected {FRAME_FACTOR} to {total_frames}; "
            "change nframes or max_frames"
        )
    return count


def frame_indices(source: VideoSource, options: VideoOptions, count: int | None = None) -> list[int]:
    """Indices of the frames to look at, ascending; `count` overrides the options' number of frames.

    A list or folder of frames is taken whole unless the options ask for a number or a rate. A video of one frame
    gives that frame, where the reference refuses.

    Raises:
        InputError: nothing lies between video_start and video_end, and all that `smart_nframes` raises.
    """
    start, end = _frame_range(source, options)
    total = end - start + 1
    if count is None:
        if source.whole and all(getattr(options, name) is None for name in _SAMPLING):
            return list(range(start, end + 1))
        if total == 1:
            return [start]
        fps = source.fps
        if not source.constant:
            stop = source.times[end + 1] if end + 1 < len(source) else source.duration
            fps = total / float(stop - source.times[start])
        count = smart_nframes(options, total, fps)
    if source.constant:
        return _linspace(start, end, count)
    times = np.linspace(source.times[start], source.times[end], count)
    shown = np.searchsorted(source.times, times + 1e-6, side="right") - 1
    return np.clip(shown, start, end).tolist()


def _frame_range(source: VideoSource, options: VideoOptions) -> tuple[int, int]:
    """First and last frame index of what video_start and video_end leave."""
    last = len(source) - 1
    begin, stop = options.video_start, options.video_end
    if begin is None and stop is None:
        return 0, last
    duration = source.duration
    begin_s = max(0.0, min(begin or 0.0, duration))
    stop_s = duration if stop is None else max(0.0, min(stop, duration))
    if source.constant:
        start = math.ceil(begin_s * source.fps)
        end = last if stop is None else min(math.floor(stop_s * source.fps), last)
    else:
        start = int(np.searchsorted(source.times, begin_s - 1e-6))
        end = int(np.searchsorted(source.times, stop_s + 1e-6, side="right")) - 1
    if start >= end:
        raise InputError(
            f"{source.name}: video_start {begin} and video_end {stop} leave no two frames; "
            f"expected a part of 0 to {duration:.2f} s ({len(source)} frames)"
        )
    return start, end


def _linspace(start: int, end: int, count: int) -> list[int]:
    """torch.linspace(start, end, count).round(), which counts in float32 from both ends with a fused multiply-add: on
    exact arithmetic ties between two frames would fall otherwise, and far into a long video whole frames."""
    step = float(np.float32(np.float32(end - start) / np.float32(max(count - 1, 1))))
    i = np.arange(count)
    places = np.where(i < count // 2, start + step * i, end - step * (count - 1 - i)).astype(np.float32)
    return np.rint(places).astype(int).tolist()


def frame_size(
    size: tuple[int, int], frames: int, options: VideoOptions, config: ImageProcessorConfig
) -> tuple[int, int]:
    """(width, height) that frames of `size` are resized to when `frames` of them, an even number, are taken.

    Limits that the options leave open are the reference's 128 to 768 tokens of a pair, unless the checkpoint's own
    picture limits are narrower: it was trained on other sizes then, and those hold.

    Raises:
        InputError: an aspect ratio over 200, max_pixels below one tile.
    """
    width, height = size
    if options.resized_height is not None and options.resized_width is not None:
        h, w = explicit_size(options.resized_height, options.resized_width, config.factor)
        return w, h
    low, high = pixel_limits(frames, options, config)
    h, w = smart_resize(height, width, config.factor, low, high)
    return w, h


def pixel_limits(frames: int, options: VideoOptions, config: ImageProcessorConfig) -> tuple[float, float]:
    """Fewest and most pixels of one frame when `frames` of them are taken."""
    tile = config.factor**2
    low, high = MIN_TOKENS * tile, MAX_TOKENS * tile
    if config.min_pixels > low or config.max_pixels < high:
        low, high = config.min_pixels, config.max_pixels
    least = options.min_pixels if options.min_pixels is not None else low
    total = options.total_pixels if options.total_pixels is not None else TOTAL_TOKENS * tile
    most = max(min(high, total / frames * FRAME_FACTOR), int(least * 1.05))
    if options.max_pixels is not None:
        most = min(options.max_pixels, most)
    if most < tile:
        raise InputError(
            f"max_pixels is {most:g}, expected at least {tile}: one tile of {config.factor}×{config.factor}"
        )
    return min(least, most), most  # the reference fails where max_pixels alone is below its own least


def plan_video(
    source: VideoSource, options: VideoOptions, config: ImageProcessorConfig, max_tokens: int | None = None
) -> VideoPlan:
    """Choose frames and their size; with `max_tokens`, fitted to them: smaller pictures first, then fewer frames.

    Raises:
        InputError: options that leave nothing.
        CapacityError: not even two frames fit.
    """
    indices = frame_indices(source, options)
    pairs = -(-len(indices) // FRAME_FACTOR)
    size = frame_size(source.size, pairs * FRAME_FACTOR, options, config)
    plan = _plan(indices, size, config)
    if max_tokens is None or plan.tokens <= max_tokens:
        return plan
    fitted, size = _fit(source, pairs, plan, options, config, max_tokens)
    if fitted < pairs:
        indices = frame_indices(source, options, fitted * FRAME_FACTOR)
    asked = (
        f"fitted to {max_tokens} tokens of the KV cache: {len(plan.indices)} frames of {plan.size[0]}×{plan.size[1]} "
        f"would take {plan.tokens}"
    )
    return _plan(indices, size, config, asked)


def _plan(
    indices: Sequence[int], size: tuple[int, int], config: ImageProcessorConfig, fitted: str | None = None
) -> VideoPlan:
    pairs = -(-len(indices) // config.temporal_patch_size)
    grid = VisionGrid(pairs, size[1] // config.patch_size, size[0] // config.patch_size)
    return VideoPlan(tuple(indices), size, grid, grid.tokens(config.merge_size), fitted)


def _fit(
    source: VideoSource,
    pairs: int,
    plan: VideoPlan,
    options: VideoOptions,
    config: ImageProcessorConfig,
    max_tokens: int,
) -> tuple[int, tuple[int, int]]:
    """(pairs of frames, their size) of at most max_tokens."""
    tile = config.factor**2
    natural = plan.tokens // pairs
    least = LEAST_TOKENS if options.min_pixels is None else math.ceil(options.min_pixels / tile)
    fixed = options.resized_height is not None
    least = natural if fixed else min(least, natural)
    if max_tokens // pairs < least:
        pairs = max(1, max_tokens // least)
    size = plan.size
    if not fixed and max_tokens // pairs < natural:
        # Scaled as if the frame had the area that is left, so that it is rounded down to tiles, never up.
        room = max(1, max_tokens // pairs) * tile
        width, height = _scaled(source.size, room)
        h, w = smart_resize(height, width, config.factor, tile, room)
        size = w, h
    per_pair = (size[0] // config.factor) * (size[1] // config.factor)
    pairs = min(pairs, max_tokens // per_pair)  # a thin picture cannot shrink below one tile
    if pairs < 1:
        raise CapacityError(
            f"{source.name}: two frames of {size[0]}×{size[1]} pixels take {per_pair} tokens, the KV cache has room "
            f"for {max(max_tokens, 0)}; open with a larger capacity, or shorten the conversation"
        )
    return pairs, size


def _scaled(size: tuple[int, int], area: float) -> tuple[int, int]:
    """A frame's size at another area, its shape kept; at least one pixel each way."""
    width, height = size
    scale = math.sqrt(area / (width * height))
    return max(1, round(width * scale)), max(1, round(height * scale))


def frame_groups(frames: Iterable[Image.Image], size: tuple[int, int], per_group: int) -> Iterator[list[Image.Image]]:
    """Resized frames, `per_group` at a time: what was decoded at full size is not kept."""
    group: list[Image.Image] = []
    for frame in frames:
        group.append(frame.resize(size, Image.Resampling.BICUBIC) if frame.size != size else frame)
        if len(group) == per_group:
            yield group
            group = []
    if group:
        yield group
