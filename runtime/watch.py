"""Answer the same question about a camera, stream, video or folder again and again; frames are dropped, never queued,
where the model is slower than a camera.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from edgevl.runtime.errors import CapacityError, InputError, MemoryLimitError
from edgevl.runtime.results import Completion
from edgevl.runtime.watch_sources import Frame, Notice, Source

if TYPE_CHECKING:
    from edgevl.runtime.generation import VisionLanguageModel

__all__ = ["WatchAnswer", "WatchOptions", "change", "signature", "watch"]

_SIDE, _BLOCK = 64, 8  # of the thumbnail whose blocks are compared
_WAIT_S = 0.1  # how long a stop may go unseen

# (frames of one answer, how many came since the last, how many answers were missed)
_Batches = Generator[tuple[list[Frame], int, int], None, None]


@dataclass(frozen=True)
class WatchOptions:
    """every_s: seconds between answers (0: as often as possible). frames: at most so many of the time since the last
    answer make up one answer, as a video; 1: the latest picture alone. skip_unchanged: no answer where `change` since
    the last answer is below it. picture: options of pictures, such as max_pixels. generation: as for `generate`."""

    prompt: str
    every_s: float = 1.0
    frames: int = 1
    skip_unchanged: float | None = None
    system: str | None = None
    picture: dict[str, Any] = field(default_factory=dict)
    generation: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not (math.isfinite(self.every_s) and self.every_s >= 0):
            raise InputError(f"every is {self.every_s} s, expected 0 or more")
        if self.frames < 1:
            raise InputError(f"{self.frames} frames for an answer, expected at least 1")
        if self.skip_unchanged is not None and not 0 <= self.skip_unchanged <= 1:
            raise InputError(f"skip_unchanged is {self.skip_unchanged}, expected 0 (never) to 1")


@dataclass(frozen=True)
class WatchAnswer:
    """One answer. `frame` is the latest of the `frames` that it saw. Since the answer before it, `received` frames
    came from the source, `missed` answers were due while the model was busy, `skipped` were left out as unchanged."""

    number: int
    frame: Frame
    size: tuple[int, int]
    frames: int
    received: int
    missed: int
    skipped: int
    completion: Completion
    answered: float  # seconds since 1970

    def to_dict(self) -> dict[str, Any]:
        """For one JSON line; times of day in UTC."""
        done = asdict(self.completion)
        return {
            "answer": self.number,
            "text": self.completion.text,
            "frame": {
                "index": self.frame.index,
                "time_s": round(self.frame.time_s, 3),
                "name": self.frame.name,
                "size": list(self.size),
            },
            "frames": self.frames,
            "wall_time": _iso(self.frame.wall),
            "answered_at": _iso(self.answered),
            "latency_s": round(self.answered - self.frame.wall, 4),
            "received": self.received,
            "missed": self.missed,
            "skipped": self.skipped,
            "finish_reason": self.completion.finish_reason,
            "boxes": done["boxes"],
            "usage": done["usage"],
            "timings": done["timings"] | {"tokens_per_s": self.completion.timings.tokens_per_s},
        }


def watch(
    model: VisionLanguageModel, source: Source, options: WatchOptions, stop: threading.Event, notice: Notice
) -> Generator[WatchAnswer, None, None]:
    """Answers until the source ends or `stop` is set; one that is being written then is given up.

    Raises:
        InputError: the source cannot be read (any more).
        CapacityError: prompt and picture do not fit the KV cache.
    """
    batches = _live(source, options, stop) if source.live else _waiting(source, options, stop)
    with closing(batches):
        yield from _answers(model, batches, options, stop, notice)


def _answers(
    model: VisionLanguageModel,
    batches: _Batches,
    options: WatchOptions,
    stop: threading.Event,
    notice: Notice,
) -> Generator[WatchAnswer, None, None]:
    seen: np.ndarray | None = None
    number = received = missed = skipped = 0
    for frames, came, late in batches:
        received, missed = received + came, missed + late
        picture = frames[-1].load()
        now = None if options.skip_unchanged is None else signature(picture)
        if now is not None and seen is not None and change(now, seen) < (options.skip_unchanged or 0):
            skipped += 1
            continue
        pictures = [p for p in (f.load() for f in frames[:-1]) if p.size == picture.size]
        completion = _answer(model, [*pictures, picture], options, stop, notice)
        if stop.is_set():
            return
        if completion is None:
            continue
        seen = now
        answer = (len(pictures) + 1, received, missed, skipped, completion, time.time())
        yield WatchAnswer(number, frames[-1], picture.size, *answer)
        number, received, missed, skipped = number + 1, 0, 0, 0


def _answer(
    model: VisionLanguageModel,
    pictures: Sequence[Image.Image],
    options: WatchOptions,
    stop: threading.Event,
    notice: Notice,
) -> Completion | None:
    kind, seen = ("image", pictures[0]) if len(pictures) == 1 else ("video", list(pictures))
    content = [{"type": kind, kind: seen, **options.picture}, {"type": "text", "text": options.prompt}]
    messages: list[dict[str, Any]] = [{"role": "user", "content": content}]
    if options.system is not None:
        messages.insert(0, {"role": "system", "content": options.system})
    try:
        stream = model.stream(messages, **options.generation)
        for _ in stream:
            if stop.is_set():
                return None
        return stream.completion
    except MemoryLimitError as e:  # other programs may give back what they have now
        notice(f"skipped: {e}")
        return None
    except CapacityError:
        raise
    except InputError as e:  # a picture of an impossible shape must not end a watch
        notice(f"skipped: {e}")
        return None


def _waiting(source: Source, options: WatchOptions, stop: threading.Event) -> _Batches:
    """Of a source that waits: nothing is lost."""
    frames: list[Frame] = []
    for frame in source.frames(stop):
        frames.append(frame)
        if len(frames) == options.frames:
            yield frames, len(frames), 0
            frames = []
    if frames and not stop.is_set():
        yield frames, len(frames), 0


def _live(source: Source, options: WatchOptions, stop: threading.Event) -> _Batches:
    """Of a source that goes on by itself: the latest frames when an answer is due, none twice."""
    latest = _Latest(options.frames, options.every_s / options.frames)
    done = threading.Event()  # ends the reader when the watch is left
    reader = threading.Thread(target=latest.fill, args=(source, done), name="edgevl-watch", daemon=True)
    reader.start()
    try:
        due, late = time.monotonic() + (options.every_s if options.frames > 1 else 0.0), 0
        while not stop.is_set():
            now = time.monotonic()
            if now < due:
                stop.wait(min(_WAIT_S, due - now))
                continue
            frames, came = latest.take(_WAIT_S)
            if not frames:
                if latest.ended:
                    return
                continue
            began = time.monotonic()
            yield frames, came, late
            if options.every_s:  # the beat is kept, unless the source itself was late
                beat = due if began - due < options.every_s else began
                late = int((time.monotonic() - beat) / options.every_s)
                due = beat + (late + 1) * options.every_s
    finally:
        done.set()
        reader.join(timeout=5)


class _Latest:
    """The latest frames of a source, at most `count`, the earlier ones `step_s` apart; filled by a thread."""

    def __init__(self, count: int, step_s: float) -> None:
        self._frames: deque[Frame] = deque(maxlen=count)
        self._step_s, self._came = step_s, 0
        self._change = threading.Condition()
        self._error: BaseException | None = None
        self.ended = False

    def fill(self, source: Source, stop: threading.Event) -> None:
        try:
            for frame in source.frames(stop):
                self.add(frame)
        except BaseException as e:  # given to the reader of `take`
            self._error = e
        with self._change:
            self.ended = True
            self._change.notify()

    def add(self, frame: Frame) -> None:
        with self._change:
            self._came += 1
            if len(self._frames) > 1 and self._frames[-1].time_s - self._frames[-2].time_s < self._step_s:
                self._frames.pop()
            self._frames.append(frame)
            self._change.notify()

    def take(self, timeout_s: float) -> tuple[list[Frame], int]:
        """The frames since the last call, and how many came; empty after the timeout or at the end."""
        with self._change:
            if not self._frames and not self.ended:
                self._change.wait(timeout_s)
            if self._error is not None and not self._frames:
                raise self._error
            out, came = list(self._frames), self._came
            self._frames.clear()
            self._came = 0
            return out, came


def signature(picture: Image.Image) -> np.ndarray:
    """float32 [8, 8, 64]: the grey thumbnail of a picture in blocks, for `change`."""
    small = np.asarray(picture.convert("L").resize((_SIDE, _SIDE), Image.Resampling.BOX), np.float32)
    n = _SIDE // _BLOCK
    return small.reshape(n, _BLOCK, n, _BLOCK).transpose(0, 2, 1, 3).reshape(n, n, -1)


def change(a: np.ndarray, b: np.ndarray) -> float:
    """How much two pictures differ, 0 to 1: the mean absolute difference of the block that differs most. Noise
    averages out over the pixels of a thumbnail; something small that moves does not drown in the rest."""
    return float(np.abs(a - b).mean(axis=-1).max()) / 255


def _iso(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, timezone.utc).isoformat(timespec="milliseconds")
