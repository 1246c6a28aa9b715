"""A budget for the time to first token becomes a budget of pixels, by the machine's measured profile."""

from __future__ import annotations

import importlib.metadata
import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgevl.runtime.bundle import Bundle
from edgevl.runtime.doctor import cpu_model
from edgevl.runtime.engine import Engine
from edgevl.runtime.errors import InputError
from edgevl.runtime.image_loading import load_image
from edgevl.runtime.image_processing import ImageProcessorConfig, VisionGrid, resized_size
from edgevl.runtime.preflight import largest_that_fits
from edgevl.runtime.profile import Machine, Profile, profile_path
from edgevl.runtime.prompt import collect_vision
from edgevl.runtime.vision import EncodedImage

__all__ = ["PixelChoice", "choose_pixels", "machine_of", "parse_seconds"]

_EXPLICIT = ("resized_height", "resized_width")
_DURATION = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*(ms|s)?\s*")


@dataclass(frozen=True)
class PixelChoice:
    """`messages` are the caller's with `max_pixels` on every picture; `predicted_s` is the time to first token that
    the profile promises for them."""

    messages: list[dict[str, Any]]
    max_pixels: int
    predicted_s: float


def parse_seconds(text: str) -> float:
    """Seconds of "800ms", "1.5s" or "2".

    Raises:
        InputError: anything else, or nothing at all.
    """
    match = _DURATION.fullmatch(text)
    seconds = float(match[1]) * (1e-3 if match[2] == "ms" else 1.0) if match is not None else 0.0
    if seconds <= 0:
        raise InputError(f"a time budget of {text!r}, expected one such as 800ms or 1.5s")
    return seconds


def machine_of(engine: Engine) -> Machine:
    """What a profile taken with this engine holds for."""
    version = ""
    for package in ("onnxruntime", "onnxruntime-gpu"):
        try:
            version = importlib.metadata.version(package)
            break
        except importlib.metadata.PackageNotFoundError:
            continue
    kernels = getattr(engine, "kernels", "")
    name = f"{engine.name}, own kernels ({kernels})" if kernels else engine.name
    return Machine(cpu_model(), name, int(getattr(engine, "threads", 0)), version)


def choose_pixels(
    messages: Sequence[dict[str, Any]],
    budget_s: float,
    bundle: Bundle,
    engine: Engine,
    text_tokens: Callable[[list[dict[str, Any]], list[VisionGrid]], int],
    profile: str | Path | Profile | None = None,
    started: float | None = None,
) -> PixelChoice:
    """The largest `max_pixels` for the pictures of `messages` whose predicted time to first token is in the budget.

    Pictures are loaded first and that time is counted, so that a slow disk or a large file costs pixels. A limit or
    size that a message sets itself still holds, and no picture is enlarged for a generous budget.

    Args:
        budget_s: seconds from `started` (time.perf_counter, now by default) to the first token.
        text_tokens: messages and grids -> tokens of the prompt that are no pictures'.
        profile: a Profile, or its file; by default the one kept for this bundle and machine.

    Raises:
        InputError: no picture, or a video; no profile; a budget that the smallest pictures miss.
    """
    if not isinstance(budget_s, (int, float)) or isinstance(budget_s, bool) or not 0 < budget_s < math.inf:
        raise InputError(f"ttft_budget_s is {budget_s!r}, expected seconds above 0")
    started = time.perf_counter() if started is None else started
    items = collect_vision(messages)
    if not items or any(item.kind != "image" for item in items):
        raise InputError(
            "a budget for the time to first token chooses the size of pictures; "
            f"the messages have {'a video' if items else 'none'}: set max_pixels instead"
        )
    if not isinstance(profile, Profile):
        machine = machine_of(engine)
        profile = Profile.load(Path(profile) if profile else profile_path(bundle, machine), bundle, machine)
    processor = bundle.image_processor
    loaded = [i.source if isinstance(i.source, EncodedImage) else load_image(i.source) for i in items]

    def sized(max_pixels: int) -> list[tuple[int, int]]:
        """(height, width) of every picture under the limit."""
        return [
            (p.resized_size[1], p.resized_size[0])
            if isinstance(p, EncodedImage)
            else _resized(p.size, processor, item.options, max_pixels)
            for p, item in zip(loaded, items)
        ]

    patch = processor.patch_size
    grids = [VisionGrid(1, h // patch, w // patch) for h, w in sized(processor.max_pixels)]
    words = text_tokens(list(messages), grids)
    spent = time.perf_counter() - started

    def seconds(max_pixels: int) -> float:
        total, tokens = spent, words
        for picture, (height, width) in zip(loaded, sized(max_pixels)):
            tokens += height * width // processor.factor**2
            if not isinstance(picture, EncodedImage):
                total += profile.seconds("picture", picture.width * picture.height, height * width)
                total += profile.seconds("vision", height * width // patch**2)
        return total + profile.seconds("prefill", tokens)

    low = max(processor.min_pixels, processor.factor**2)
    # An explicit size, or a picture encoded before, may be above what the others may have.
    high = max(low, min(processor.max_pixels, max(h * w for h, w in sized(processor.max_pixels))))
    best = largest_that_fits(low, high, lambda pixels: seconds(pixels) <= budget_s)
    if best is None:
        raise InputError(
            f"a time to first token of {budget_s * 1e3:.0f} ms cannot be met: with pictures of {low} pixels, the "
            f"smallest, it is {seconds(low) * 1e3:.0f} ms on this machine; allow more time or send fewer pictures"
        )
    return PixelChoice(_limited(messages, iter(loaded), best), best, seconds(best))


def _resized(
    size: tuple[int, int], processor: ImageProcessorConfig, options: Mapping[str, Any], max_pixels: int
) -> tuple[int, int]:
    """(height, width) of a picture with its message's options; an explicit size stays whatever the limit."""
    low, high = options.get("min_pixels"), options.get("max_pixels")
    most = min(max_pixels, processor.max_pixels if high is None else high)
    explicit = {k: options[k] for k in _EXPLICIT if k in options}
    width, height = resized_size(size, processor, None if low is None else min(low, most), most, **explicit)
    return height, width


def _limited(messages: Sequence[dict[str, Any]], loaded: Any, max_pixels: int) -> list[dict[str, Any]]:
    """The messages with the loaded pictures in place of their sources, in order, and the limit on each."""
    out = []
    for message in messages:
        content = message["content"]
        if isinstance(content, str):
            out.append(message)
            continue
        items = []
        for item in content:
            if "text" in item and item.get("type", "text") == "text":
                items.append(item)
                continue
            most = min(max_pixels, item.get("max_pixels") or max_pixels)
            low = item.get("min_pixels")
            options = {"max_pixels": most} | ({} if low is None else {"min_pixels": min(low, most)})
            options |= {k: item[k] for k in _EXPLICIT if item.get(k) is not None}
            items.append({"type": "image", "image": next(loaded), **options})
        out.append({**message, "content": items})
    return out
