"""The size, in pixels, that a picture or frame is resized to; arithmetic alone, it knows no pictures."""

from __future__ import annotations

import math

from edgevl.runtime.errors import InputError

__all__ = ["explicit_size", "smart_resize"]

MAX_ASPECT_RATIO = 200  # fixed in the reference's smart_resize
_MOST_PIXELS = 1_000_000  # of a side that is asked for; beyond it is a mistake
_EXPLICIT_TOKENS = 4, 16384  # least and most tiles of a size asked for; IMAGE_*_TOKEN_NUM of qwen_vl_utils


def smart_resize(height: int, width: int, factor: int, min_pixels: float, max_pixels: float) -> tuple[int, int]:
    """(height, width) in pixels that a picture is resized to: multiples of `factor`, area within the limits where the
    aspect ratio allows it (a thin picture may exceed max_pixels: no side goes below `factor`).

    As smart_resize of transformers' PIL processor, which rounds half to even. qwen_vl_utils differs for sides below
    factor / 2: it lifts them to `factor` before it looks at the limits, and does not once it shrinks.

    Raises:
        InputError: a side of zero, or an aspect ratio over 200.
    """
    if height < 1 or width < 1:
        raise InputError(f"the picture is {width}×{height} pixels; expected at least 1×1")
    ratio = max(height, width) / min(height, width)
    if ratio > MAX_ASPECT_RATIO:
        raise InputError(
            f"the picture is {width}×{height} pixels, aspect ratio {ratio:.1f}; "
            f"expected at most {MAX_ASPECT_RATIO}: crop it, or cut it into several pictures"
        )
    resized_h, resized_w = round(height / factor) * factor, round(width / factor) * factor
    if resized_h * resized_w > max_pixels:
        shrink = math.sqrt((height * width) / max_pixels)
        resized_h = max(factor, math.floor(height / shrink / factor) * factor)
        resized_w = max(factor, math.floor(width / shrink / factor) * factor)
    elif resized_h * resized_w < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        resized_h = math.ceil(height * grow / factor) * factor
        resized_w = math.ceil(width * grow / factor) * factor
    return resized_h, resized_w


def explicit_size(resized_height: float, resized_width: float, factor: int) -> tuple[int, int]:
    """(height, width) for a size that was asked for, as qwen_vl_utils 0.0.14 (vision_process.py, fetch_image) makes it:
    rounded to tiles, at least one each way, and scaled where it has fewer than 4 tiles or more than 16,384.

    Raises:
        InputError: not two positive numbers, or an aspect ratio over 200.
    """
    for name, value in (("resized_height", resized_height), ("resized_width", resized_width)):
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 1 <= value <= _MOST_PIXELS:
            raise InputError(f"{name} is {value!r:.60}, expected a number of 1 to {_MOST_PIXELS} pixels")
    ratio = max(resized_height, resized_width) / min(resized_height, resized_width)
    if ratio > MAX_ASPECT_RATIO:
        raise InputError(
            f"resized_width × resized_height are {resized_width:g}×{resized_height:g}, aspect ratio {ratio:.1f}; "
            f"expected at most {MAX_ASPECT_RATIO}"
        )
    least, most = (tokens * factor**2 for tokens in _EXPLICIT_TOKENS)
    area = resized_height * resized_width
    # Unlike smart_resize this lifts a thin side to one tile before it looks at the limits.
    height, width = (max(factor, round(side / factor) * factor) for side in (resized_height, resized_width))
    if height * width > most:
        shrink = math.sqrt(area / most)
        height, width = (math.floor(side / shrink / factor) * factor for side in (resized_height, resized_width))
    elif height * width < least:
        grow = math.sqrt(least / area)
        height, width = (math.ceil(side * grow / factor) * factor for side in (resized_height, resized_width))
    return height, width
