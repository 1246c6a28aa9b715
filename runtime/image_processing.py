"""Pixels for the vision encoder: dynamic-resolution resize, normalisation and patches, in numpy and Pillow.

Equal to transformers' PIL image processor (models/qwen2_vl/image_processing_pil_qwen2_vl.py): sizes exactly, pixels
to the last bit. Takes upright RGB pictures (`edgevl.runtime.image_loading`); knows no files, tokens or model.
"""

from __future__ import annotations

import json
import operator
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from edgevl.runtime.errors import CheckpointError, InputError
from edgevl.runtime.picture_size import explicit_size, smart_resize

__all__ = [
    "ImageProcessorConfig",
    "ProcessedImage",
    "VisionGrid",
    "frame_patches",
    "preprocess_frames",
    "preprocess_image",
    "resized_size",
    "smart_resize",
]

CHANNELS = 3
_RESCALE_FACTOR = 1 / 255  # of the reference; the released files leave it out
_CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
_CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
_BICUBIC = 3  # number of PIL.Image.Resampling.BICUBIC, as preprocessor_config.json stores it
_MOST = 10**15  # of a setting; beyond it is a mistake
_MOST_PIXELS = 178_956_970  # that a picture can be blown up to: as many as one may have (image_loading)
_ROWS_PER_LOOKUP = 128  # patches; an index buffer of this size stays in the cache (twice as fast as all at once)


@dataclass(frozen=True)
class VisionGrid:
    """Size of a picture or video in patches: `t` temporal patches (1 for a picture) of `h` rows and `w` columns."""

    t: int
    h: int
    w: int

    @property
    def patches(self) -> int:
        """Rows of pixel_values."""
        return self.t * self.h * self.w

    def tokens(self, merge_size: int) -> int:
        """Placeholder tokens in the prompt: merge_size² patches become one."""
        return self.patches // merge_size**2


@dataclass(frozen=True)
class ImageProcessorConfig:
    """How a checkpoint wants its pictures: `preprocessor_config.json`. Pixel limits count pixels after the resize."""

    min_pixels: int
    max_pixels: int
    patch_size: int = 14
    temporal_patch_size: int = 2
    merge_size: int = 2
    image_mean: tuple[float, float, float] = _CLIP_MEAN  # per channel, after rescale_factor
    image_std: tuple[float, float, float] = _CLIP_STD
    rescale_factor: float = _RESCALE_FACTOR

    @property
    def factor(self) -> int:
        """Width and height of a resized picture are multiples of this: one token is a tile of factor × factor."""
        return self.patch_size * self.merge_size

    @property
    def patch_dim(self) -> int:
        """Numbers in one flattened patch: channels × temporal × patch × patch (1176 as released)."""
        return CHANNELS * self.temporal_patch_size * self.patch_size**2

    @classmethod
    def from_folder(cls, folder: str | Path) -> ImageProcessorConfig:
        """Read a checkpoint folder as transformers does: an `image_processor` object in `processor_config.json`
        (where transformers 5 saves a whole processor) first, else `preprocessor_config.json`.

        Raises:
            CheckpointError: no such file, malformed, a missing value, or one that is not implemented.
        """
        nested = Path(folder) / "processor_config.json"
        if nested.exists():
            inner = _read_json(nested).get("image_processor")
            if inner is not None:
                return _parse(inner, f"{nested}: image_processor")
        path = Path(folder) / "preprocessor_config.json"
        return _parse(_read_json(path), str(path))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, for a bundle's manifest."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> ImageProcessorConfig:
        """The inverse of `to_dict`, strict.

        Raises:
            KeyError: an unknown or missing key.
            ValueError: a value of another type or out of range.
        """
        expected = {f.name for f in fields(cls)}
        if not isinstance(data, dict):
            raise ValueError(f"the image processor is {data!r}, expected an object")
        if set(data) != expected:
            raise KeyError(f"got keys {sorted(data)}, expected {sorted(expected)}")
        return _checked(data)

    def with_pixels(self, min_pixels: int | None = None, max_pixels: int | None = None) -> ImageProcessorConfig:
        """The same with other pixel limits. None keeps the checkpoint's, or follows where a lone limit passes it:
        max_pixels below the checkpoint's min_pixels means at most that many.

        Raises:
            InputError: not a positive integer, min over max, or max_pixels below one tile of factor × factor.
        """
        changes: dict[str, int] = {}
        for name, value in (("min_pixels", min_pixels), ("max_pixels", max_pixels)):
            if value is not None:
                try:
                    changes[name] = _integer(name, value)
                except ValueError as e:
                    raise InputError(str(e)) from None
        if "min_pixels" not in changes:
            changes["min_pixels"] = min(self.min_pixels, changes.get("max_pixels", self.min_pixels))
        elif "max_pixels" not in changes:
            changes["max_pixels"] = max(self.max_pixels, changes["min_pixels"])
        out = replace(self, **changes)
        problem = _pixel_problem(out)
        if problem:
            raise InputError(problem)
        return out


@dataclass(frozen=True, eq=False)
class ProcessedImage:
    """A picture or video ready for the vision encoder.

    `pixel_values` float32 [grid.patches, channels × temporal × patch × patch]; rows run over t, then tiles of
    merge_size × merge_size patches row by row, then the patches inside a tile, so that one merged token is
    merge_size² adjacent rows; columns run over channel, frame, y, x. Sizes are (width, height) in pixels; the original
    one is that of the upright picture (after EXIF rotation), to which boxes are mapped back.
    """

    pixel_values: np.ndarray
    grid: VisionGrid
    original_size: tuple[int, int]
    resized_size: tuple[int, int]


def resized_size(
    size: tuple[int, int],
    config: ImageProcessorConfig,
    min_pixels: int | None = None,
    max_pixels: int | None = None,
    resized_height: float | None = None,
    resized_width: float | None = None,
) -> tuple[int, int]:
    """(width, height) that a picture of `size` (width, height) is resized to with the options of its message.

    As in qwen_vl_utils, resized_height and resized_width stand above the picture's shape and all limits of pixels. One
    without the other, which it drops without a word, is refused.

    Raises:
        InputError: options out of range, a picture of zero size, an aspect ratio over 200.
    """
    limits = config.with_pixels(min_pixels, max_pixels)
    if resized_height is not None and resized_width is not None:
        height, width = explicit_size(resized_height, resized_width, config.factor)
    elif resized_height is not None or resized_width is not None:
        raise InputError("resized_height and resized_width go together; expected both or none")
    else:
        height, width = smart_resize(size[1], size[0], config.factor, limits.min_pixels, limits.max_pixels)
    return width, height


def preprocess_image(
    image: Image.Image,
    config: ImageProcessorConfig,
    min_pixels: int | None = None,
    max_pixels: int | None = None,
    resized_height: float | None = None,
    resized_width: float | None = None,
) -> ProcessedImage:
    """Resize, normalise and cut one upright RGB picture; it fills every frame of its temporal patch (grid.t is 1).

    Raises:
        InputError: not RGB, zero-size, aspect ratio over 200, options out of range (see `resized_size`).
    """
    size = resized_size(image.size, config, min_pixels, max_pixels, resized_height, resized_width)
    return _process([image], size, config, "picture")


def preprocess_frames(
    frames: Sequence[Image.Image],
    config: ImageProcessorConfig,
    min_pixels: int | None = None,
    max_pixels: int | None = None,
) -> ProcessedImage:
    """The same for a video given as upright RGB frames of one size; pixel limits are per frame.

    grid.t is len(frames) / temporal_patch_size, rounded up: the last frame repeats to fill the last temporal patch, as
    in the reference (models/qwen2_vl/video_processing_qwen2_vl.py, patchify). Frames are resized by Pillow as
    pictures are.

    Raises:
        InputError: no frames, frames of unequal size, and all that `preprocess_image` raises.
    """
    if not frames:
        raise InputError("frames of a video: got none, expected at least one picture")
    sizes = sorted({frame.size for frame in frames})
    if len(sizes) > 1:
        listed = ", ".join(f"{w}×{h}" for w, h in sizes[:5])
        raise InputError(f"the frames of a video have sizes {listed}; expected one size: resize them first")
    return _process(frames, resized_size(frames[0].size, config, min_pixels, max_pixels), config, "frame")


def _process(
    frames: Sequence[Image.Image], size: tuple[int, int], config: ImageProcessorConfig, what: str
) -> ProcessedImage:
    """Frames, resized to `size` (width, height), to patches; a picture is a video of one frame, which the padding rule
    repeats."""
    for frame in frames:
        if frame.mode != "RGB":
            raise InputError(f"the {what} mode is {frame.mode}, expected RGB; pass it through load_image first")
    per_patch = config.temporal_patch_size
    grid = VisionGrid(-(-len(frames) // per_patch), size[1] // config.patch_size, size[0] // config.patch_size)
    return ProcessedImage(frame_patches(frames, size, config), grid, frames[0].size, size)


def frame_patches(frames: Sequence[Image.Image], size: tuple[int, int], config: ImageProcessorConfig) -> np.ndarray:
    """Upright RGB frames resized to `size` (width, height; multiples of config.factor), normalised and cut: float32
    [ceil(frames / temporal_patch_size) × h × w, patch_dim], as in ProcessedImage. The last frame fills up."""
    width, height = size
    per_patch = config.temporal_patch_size
    t, rows = -(-len(frames) // per_patch), (height // config.patch_size) * (width // config.patch_size)
    table = _lookup_table(config)
    out = np.empty((t, rows, CHANNELS, per_patch, config.patch_size**2), np.float32)
    for i, frame in enumerate(frames):
        resized = frame if frame.size == size else frame.resize(size, Image.Resampling.BICUBIC)
        t, slot = divmod(i, per_patch)
        end = per_patch if i == len(frames) - 1 else slot + 1
        _normalise(_patches(np.asarray(resized), config), table, out[t, :, :, slot:end])
    return out.reshape(-1, config.patch_dim)


def _lookup_table(config: ImageProcessorConfig) -> np.ndarray:
    """float32 [channels, 256]: what the reference makes of each byte; float64 product, the rest in float32."""
    rescaled = (np.arange(256, dtype=np.float64) * config.rescale_factor).astype(np.float32)
    mean = np.array(config.image_mean, np.float32)[:, None]
    std = np.array(config.image_std, np.float32)[:, None]
    return (rescaled - mean) / std


def _patches(pixels: np.ndarray, config: ImageProcessorConfig) -> np.ndarray:
    """uint8 [H, W, channels] -> uint8 [patches, channels, patch²] in merge-grouped order.

    The transpose moves bytes, not floats: a quarter of the traffic.
    """
    patch, merge = config.patch_size, config.merge_size
    height, width, channels = pixels.shape
    tiles_h, tiles_w = height // config.factor, width // config.factor
    tiles = pixels.reshape(tiles_h, merge, patch, tiles_w, merge, patch, channels)
    # -> tile row, tile column, patch row, patch column, channel, y, x
    return tiles.transpose(0, 3, 1, 4, 6, 2, 5).reshape(-1, channels, patch**2)


def _normalise(patches: np.ndarray, table: np.ndarray, out: np.ndarray) -> None:
    """Look up uint8 [patches, channels, patch²] into each frame of out float32 [patches, channels, frames, patch²]."""
    for start in range(0, len(patches), _ROWS_PER_LOOKUP):
        rows = slice(start, start + _ROWS_PER_LOOKUP)
        for channel, values in enumerate(table):
            # mode: a byte cannot miss a table of 256, so numpy need not check for it
            out[rows, channel] = values.take(patches[rows, channel], mode="clip")[:, None]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"{path.parent}: no {path.name}; a Qwen2-VL checkpoint has one: copy it beside config.json"
        ) from None
    except (OSError, ValueError, RecursionError) as e:
        raise CheckpointError(f"{path}: not readable as JSON ({e}); re-download the checkpoint") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


# What the reference can switch off or change and Qwen2-VL never does: refused, not ignored.
_FIXED = {
    "do_resize": True,
    "do_rescale": True,
    "do_normalize": True,
    "do_convert_rgb": True,
    "resample": _BICUBIC,
}


def _parse(source: Any, where: str) -> ImageProcessorConfig:
    """The released layout (min_pixels, max_pixels) and those of later transformers (inside `size`); the former wins
    where both are given, as in the reference. A null counts as absent."""
    if not isinstance(source, dict):
        raise CheckpointError(f"{where}: expected a JSON object, got {type(source).__name__}")
    for key, value in _FIXED.items():
        if source.get(key) is not None and source[key] != value:
            raise CheckpointError(f"{where}: {key} is {source[key]!r}; edgevl implements {value!r} only")
    size = source.get("size") or {}
    if not isinstance(size, dict):
        raise CheckpointError(f"{where}: size is {size!r}, expected an object with shortest_edge and longest_edge")
    places: dict[str, list[Any]] = {
        "min_pixels": [source.get("min_pixels"), size.get("min_pixels"), size.get("shortest_edge")],
        "max_pixels": [source.get("max_pixels"), size.get("max_pixels"), size.get("longest_edge")],
        "rescale_factor": [source.get("rescale_factor"), _RESCALE_FACTOR],
    }
    values: dict[str, Any] = {}
    for f in fields(ImageProcessorConfig):
        given = [v for v in places.get(f.name, [source.get(f.name)]) if v is not None]
        if not given:
            raise CheckpointError(f"{where}: {f.name!r} is missing; re-download the checkpoint's preprocessor files")
        values[f.name] = given[0]
    try:
        return _checked(values)
    except ValueError as e:
        raise CheckpointError(f"{where}: {e}") from None


def _checked(values: dict[str, Any]) -> ImageProcessorConfig:
    """A config of values of the right type and range; ValueError names the first that is not."""
    out: dict[str, Any] = {}
    for name, value in values.items():
        if name in ("image_mean", "image_std"):
            if not isinstance(value, (list, tuple)) or len(value) != CHANNELS:
                raise ValueError(f"{name} is {value!r}, expected {CHANNELS} numbers")
            out[name] = tuple(_real(name, v, positive=name == "image_std") for v in value)
        elif name == "rescale_factor":
            out[name] = _real(name, value, positive=True)
        else:
            out[name] = _integer(name, value)
    config = ImageProcessorConfig(**out)
    problem = _pixel_problem(config)
    if problem:
        raise ValueError(problem)
    return config


def _integer(name: str, value: Any) -> int:
    try:
        number = 0 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = 0
    if not 1 <= number <= _MOST:
        most = f" of at most {_MOST:.0e}" if number > _MOST else ""
        raise ValueError(f"{name} is {value!r:.60}, expected a positive integer{most}")
    return number


def _real(name: str, value: Any, positive: bool) -> float:
    ok = isinstance(value, (int, float)) and not isinstance(value, bool) and -_MOST <= value <= _MOST
    if not ok or (positive and value <= 0):
        raise ValueError(f"{name} holds {value!r:.60}, expected a {'positive ' if positive else ''}finite number")
    return float(value)


def _pixel_problem(config: ImageProcessorConfig) -> str | None:
    if config.max_pixels < config.factor**2:
        return (
            f"max_pixels is {config.max_pixels}, expected at least {config.factor**2}: "
            f"one tile of {config.factor}×{config.factor} pixels"
        )
    if config.min_pixels > _MOST_PIXELS:
        return f"min_pixels is {config.min_pixels}, expected at most {_MOST_PIXELS}"
    if config.min_pixels > config.max_pixels:
        return f"min_pixels is {config.min_pixels}, max_pixels {config.max_pixels}; expected min_pixels <= max_pixels"
    return None
