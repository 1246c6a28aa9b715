"""Requests admitted or refused before they run, by the numbers of `edgevl.runtime.preflight` and the memory left."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from edgevl.runtime.bundle import Bundle
from edgevl.runtime.decoding import DEFAULT_PREFILL_CHUNK
from edgevl.runtime.errors import CapacityError, EngineError, InputError, MemoryLimitError
from edgevl.runtime.image_processing import VisionGrid, smart_resize
from edgevl.runtime.memory import available_bytes, parse_size, resident_bytes, shown
from edgevl.runtime.preflight import Planner, largest_that_fits

if TYPE_CHECKING:
    from edgevl.runtime.answer_stream import PreparedPrompt

__all__ = ["Admission", "check_opening", "check_sizes"]

OFF = "off"
_PLANNED = "ort-cpu"  # elsewhere weights and activations are in a device's memory, which this does not count
_TEXT_TOKENS, _ANSWER_TOKENS = 64, 128  # assumed beside a picture when advising on its size


def _limit(memory_limit: int | str | None) -> int | None:
    return None if memory_limit is None or memory_limit == OFF else parse_size(memory_limit)


def _room(limit: int | None) -> int | None:
    """Bytes that the process may still take: up to its limit, else what the machine has left."""
    if limit is None:
        return available_bytes()
    used = resident_bytes()
    return None if used is None else max(0, limit - used)


def _whose(limit: int | None) -> str:
    return "available here" if limit is None else f"left of the memory limit of {shown(limit)}"


def check_sizes(
    bundle: Bundle, capacity: int | None, prefill_chunk: int, image_cache_mb: float, prefix_cache_mb: float
) -> None:
    """Numbers of `VisionLanguageModel.open`, before the engine is opened (and `auto` says which).

    Raises:
        InputError: one that is out of range.
    """
    most = bundle.model.text.max_position_embeddings
    if capacity is not None and not 1 <= capacity <= most:
        raise InputError(f"capacity is {capacity}, expected 1 to {most} tokens")
    if prefill_chunk < 1:
        raise InputError(f"prefill chunk is {prefill_chunk}, expected at least 1 token")
    for name, value in (("image_cache_mb", image_cache_mb), ("prefix_cache_mb", prefix_cache_mb)):
        if not (math.isfinite(value) and value >= 0):
            raise InputError(f"{name} is {value}, expected 0 (off) or more megabytes")


def check_opening(bundle: Bundle, memory_limit: int | str | None) -> None:
    """Refuse to load weights that do not fit. Pages of files that only stay mapped for a while are not counted: the
    kernel takes them back when it must.

    Raises:
        CapacityError: how much is needed, how much there is, what to do.
        InputError: a limit that is no size.
    """
    limit = _limit(memory_limit)
    room = _room(limit)
    if room is None or memory_limit == OFF or bundle.target != "cpu":
        return
    needed = Planner(bundle).weights
    if needed > room:
        raise CapacityError(
            f"{bundle.folder}: its weights need {shown(needed)} of memory ({bundle.precision}), "
            f"{shown(room)} are {_whose(limit)}; export with a smaller --precision such as int4"
        )


class Admission:
    """Checks the requests of one opened bundle.

    What is asked is how much *more* the request takes than the process has now, so that caches, arenas and other
    libraries count as they are. By default a request is refused only where the prediction passes all that is left.
    """

    def __init__(
        self,
        bundle: Bundle,
        engine: str,
        prefill_chunk: int = DEFAULT_PREFILL_CHUNK,
        memory_limit: int | str | None = None,
        capacity: int | None = None,
    ) -> None:
        """`capacity`: tokens that a row of the KV cache holds; those of the model by default.

        Raises EngineError for a limit on an engine that is not planned for."""
        self._planner, self._limit = Planner(bundle, prefill_chunk), _limit(memory_limit)
        self._active = engine == _PLANNED and memory_limit != OFF
        if self._limit is not None and engine != _PLANNED:
            raise EngineError(f"a memory limit is known for {_PLANNED} only, the engine is {engine}; open without one")
        self._chunk = prefill_chunk
        self._capacity = capacity or bundle.model.text.max_position_embeddings
        self._factor = bundle.image_processor.factor
        self._patch = bundle.image_processor.patch_size
        self._arena = 0  # of the decoder, which keeps what its largest prefill took

    def picture(self, grid: VisionGrid, resized_size: tuple[int, int]) -> None:
        """Before a picture, or the frames of a video, go through the vision encoder.

        Args:
            resized_size: (width, height) in pixels.

        Raises:
            MemoryLimitError: they need more than there is; says which max_pixels would fit.
        """
        room = self._room()
        if room is None:
            return
        needed = self._encoding(grid) + self._planner.embeds(self._planner.image_tokens(grid))
        if needed <= room:
            return
        width, height = resized_size
        best = self._max_pixels(height, width, grid.t, room)
        advice = "no smaller size fits either" if best is None else f"max_pixels {best} would fit"
        what = f"a picture of {width}×{height} pixels" if grid.t == 1 else f"a video of {grid.t}×{width}×{height}"
        raise MemoryLimitError(
            f"{what} (after the resize) needs {shown(needed)} to encode, "
            f"{shown(room)} are {_whose(self._limit)}; {advice}"
        )

    def _encoding(self, grid: VisionGrid) -> int:
        """A picture's pixels, not made yet, and activations; of a video, which is read in groups, the activations."""
        return self._planner.vision(grid) + (self._planner.pixels(grid) if grid.t == 1 else 0)

    def _room(self) -> int | None:
        return _room(self._limit) if self._active else None

    def _max_pixels(self, height: int, width: int, frames: int, room: int) -> int | None:
        """The largest limit whose picture, and a short question about it, fit."""

        def fits(pixels: int) -> bool:
            h, w = smart_resize(height, width, self._factor, self._factor**2, pixels)
            grid = VisionGrid(frames, h // self._patch, w // self._patch)
            tokens = self._planner.image_tokens(grid)
            prompt = tokens + _TEXT_TOKENS
            answer = self._planner.prefill(prompt) + self._planner.cache(prompt + _ANSWER_TOKENS)
            return self._planner.embeds(tokens) + max(self._encoding(grid), answer - self._arena) <= room

        return largest_that_fits(self._factor**2, height * width, fits)

    def answers(self, prompts: Sequence[PreparedPrompt], new_tokens: int, cached: int = 0, spare: int = 0) -> None:
        """Before prompts are prefilled, `cached` tokens of each being in a KV cache already.

        Args:
            spare: tokens for which the KV cache has memory already, from answers that have ended; below 0, what it will
                take beside.

        Raises:
            MemoryLimitError: they need more than there is; says what would fit.
        """
        room = self._room()
        lengths = [len(p.ids) - cached for p in prompts]
        planner, most = self._planner, self._capacity - cached

        def needed(lengths: Sequence[int], arena: int) -> int:
            cache = sum(planner.cache(min(n + new_tokens, most)) for n in lengths)
            cache += planner.cache(max(0, -spare)) - planner.cache(max(0, spare))
            return max(0, arena - self._arena) + max(0, cache)

        arena = max(planner.prefill(n) for n in lengths)
        if room is not None and (wanted := needed(lengths, arena)) > room:
            advice = self._advice(prompts, lengths, lambda lengths, arena: needed(lengths, arena) <= room)
            raise MemoryLimitError(
                f"{'a prompt' if len(lengths) == 1 else f'{len(lengths)} prompts'} of {max(lengths)} tokens with "
                f"answers of {new_tokens} needs {shown(wanted)}, {shown(room)} are {_whose(self._limit)}; {advice}"
            )
        self._arena = max(self._arena, arena)

    def _advice(
        self, prompts: Sequence[PreparedPrompt], lengths: Sequence[int], fits: Callable[[Sequence[int], int], bool]
    ) -> str:
        """`fits`: whether prompts of so many tokens do, with so many bytes of activations."""
        pixels = [[i.resized_size[0] * i.resized_size[1] for i in p.images] for p in prompts]
        largest = max((n for row in pixels for n in row), default=0)
        tile = self._factor**2

        def smaller_fits(limit: int) -> bool:
            spared = [sum((n - min(n, limit)) // tile for n in row) for row in pixels]
            fewer = [n - s for n, s in zip(lengths, spared)]
            return fits(fewer, max(self._planner.prefill(n) for n in fewer))

        best = largest_that_fits(tile, largest, smaller_fits) if largest >= tile else None
        if best is not None:
            return f"max_pixels {best} would fit"
        chunk = min(self._chunk, max(lengths))
        while chunk > 64:
            chunk //= 2
            if fits(lengths, self._planner.prefill(chunk)):
                return f"a prefill chunk of {chunk} would fit"
        return "send fewer or shorter prompts, or ask for shorter answers"
