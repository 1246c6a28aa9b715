"""What is asked of a model in a benchmark: named request shapes, their pictures and prompts. Deterministic with a seed.

No two requests of a run share a picture, so that no cache of features can answer for the encoder. Pictures are made
like photographs (large soft shapes and fine noise) and handed over as JPEG bytes: a device decodes files too.

A workload is a closed loop (a request begins when the one before has ended) or, with `arrivals_per_s`, an open one:
requests come when the schedule says, as those of many users do. What rate makes sense depends on the machine, so no
named workload has one.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from edgevl.runtime.errors import InputError

if TYPE_CHECKING:
    from edgevl.runtime import VisionLanguageModel

__all__ = ["WORKLOADS", "Workload", "arrival_times", "question", "workload"]


@dataclass(frozen=True)
class Workload:
    """One request shape.

    width, height: of every picture and frame, in pixels. pictures: per request. frames: of one video per request, 0
    for none. prompt_tokens: of the question, besides pictures and template. new_tokens: of the answer; end tokens are
    not heeded. concurrency: requests answered together; at most, of those waiting, where they come by themselves.
    arrivals_per_s: mean rate of an open loop's requests (`arrival_times`), 0 for a closed loop.
    """

    name: str
    width: int = 448
    height: int = 448
    pictures: int = 1
    frames: int = 0
    prompt_tokens: int = 16
    new_tokens: int = 64
    concurrency: int = 1
    arrivals_per_s: float = 0.0

    def __post_init__(self) -> None:
        limits = {
            "width": (28, 8192),
            "height": (28, 8192),
            "pictures": (0, 64),
            "frames": (0, 768),
            "prompt_tokens": (1, 32768),
            "new_tokens": (1, 8192),
            "concurrency": (1, 64),
            "arrivals_per_s": (0, 10_000),
        }
        for name, (least, most) in limits.items():
            value = getattr(self, name)
            if not least <= value <= most:
                raise InputError(f"workload {self.name!r}: {name} is {value}, expected {least} to {most}")

    @property
    def describe(self) -> str:
        """One line for a table."""
        parts = []
        if self.pictures:
            parts.append(f"{self.pictures} × {self.width}×{self.height}")
        if self.frames:
            parts.append(f"{self.frames} frames {self.width}×{self.height}")
        parts += [f"{self.prompt_tokens} text tokens", f"{self.new_tokens} new"]
        if self.arrivals_per_s:
            parts.append(f"{self.arrivals_per_s:g} arrive per second")
        if self.concurrency > 1:
            parts.append(f"{'up to ' if self.arrivals_per_s else ''}{self.concurrency} at once")
        return ", ".join(parts)

    def picture(self, seed: int, request: int, index: int) -> bytes:
        """JPEG bytes of picture `index` of a request."""
        return _jpeg(_photo(self.width, self.height, np.random.default_rng([seed, request, index])))

    def video(self, seed: int, request: int) -> list[bytes]:
        """JPEG bytes of the frames of a request's video: one scene that moves."""
        rng = np.random.default_rng([seed, request, 1_000_000])
        scene = np.asarray(_photo(self.width * 2, self.height, rng))
        steps = np.linspace(0, self.width, max(1, self.frames)).astype(int)
        return [_jpeg(Image.fromarray(scene[:, s : s + self.width])) for s in steps]


WORKLOADS = {
    w.name: w
    for w in (
        Workload("picture"),
        Workload("thumbnail", 224, 224),
        Workload("large", 1024, 1024),
        Workload("huge", 2048, 2048),
        Workload("document", 1288, 966, prompt_tokens=32, new_tokens=128),
        Workload("panorama", 2240, 448),
        Workload("four-pictures", pictures=4),
        Workload("eight-pictures", pictures=8),
        Workload("video-8", 320, 240, pictures=0, frames=8),
        Workload("video-64", 320, 240, pictures=0, frames=64),
        Workload("text", pictures=0, prompt_tokens=256),
        Workload("context-1600", pictures=0, prompt_tokens=1600),
        Workload("long-prompt", pictures=0, prompt_tokens=4096, new_tokens=16),
        Workload("long-answer", new_tokens=512),
        Workload("batch-4", concurrency=4),
        Workload("batch-16", concurrency=16),
    )
}


def workload(name: str, **changes: float | None) -> Workload:
    """The workload `name`, with the fields that are given (not None) changed; its name says so with a star, and with
    the rate of arrivals, by which the cases of one run may differ.

    Raises:
        InputError: an unknown name or a value out of range.
    """
    if name not in WORKLOADS:
        raise InputError(f"workload {name!r} is unknown; expected one of {', '.join(WORKLOADS)}")
    given: dict[str, Any] = {k: v for k, v in changes.items() if v is not None}
    rate = given.get("arrivals_per_s")
    shown = name + ("*" if set(given) - {"arrivals_per_s"} else "") + ("" if rate is None else f" {rate:g}/s")
    return replace(WORKLOADS[name], **given, name=shown)


def arrival_times(rate: float, count: int, seed: Sequence[int]) -> np.ndarray:
    """When `count` requests of a Poisson process come, float64 [count] in seconds; the first comes at 0.

    The gaps are exponential with mean 1 / rate, drawn for the seed alone: two rates with one seed have the same
    schedule, stretched.

    Raises:
        InputError: a rate that is not positive, or no requests.
    """
    if not 0 < rate < np.inf or count < 1:
        raise InputError(f"arrivals: rate {rate:g} per second, {count} requests; expected a rate above 0 and 1 or more")
    gaps = np.random.default_rng([*seed, 2_000_000]).standard_exponential(count - 1)
    return np.concatenate([[0.0], np.cumsum(gaps)]) / rate


def question(model: VisionLanguageModel, tokens: int) -> str:
    """A text of `tokens` tokens in the model's own vocabulary: words of one token each where it has such."""
    words = ["a"]
    while len(model.tokenizer.encode(" ".join(words), specials=False)) < tokens:
        missing = tokens - len(model.tokenizer.encode(" ".join(words), specials=False))
        words += ["a"] * max(1, missing // 2)
    while len(words) > 1 and len(model.tokenizer.encode(" ".join(words), specials=False)) > tokens:
        words.pop()
    return " ".join(words)


def _photo(width: int, height: int, rng: np.random.Generator) -> Image.Image:
    coarse = rng.integers(0, 256, (max(2, height // 64), max(2, width // 64), 3), dtype=np.uint8)
    soft = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC), np.float32)
    noise = rng.normal(0, 8, (height, width, 1)).astype(np.float32)
    return Image.fromarray(np.clip(soft + noise, 0, 255).astype(np.uint8))


def _jpeg(image: Image.Image) -> bytes:
    out = io.BytesIO()
    image.save(out, "JPEG", quality=90)
    return out.getvalue()
