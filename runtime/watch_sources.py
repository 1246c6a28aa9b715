"""What `edgevl watch` looks at: a video file, a folder that fills up, a camera or a network stream. Knows no model.

A source is an endless (or not) iterator of frames. Folders and files wait for whoever reads them; cameras and streams
do not, and are read by a thread that keeps the latest frames only (`edgevl.runtime.watch`).
"""

from __future__ import annotations

import re
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from edgevl.runtime.errors import InputError
from edgevl.runtime.image_loading import load_image, local_path
from edgevl.runtime.video_reading import import_av, list_pictures, open_video, to_picture

__all__ = ["FileSource", "FolderSource", "Frame", "Source", "StreamSource", "open_source"]

_SETTLE_S = 2.0  # a picture that cannot be read and has not changed for so long is given up
_POLL_S = 0.05
_BACKOFF_S = (0.5, 30.0)  # first and longest wait before a lost camera is tried again
_STREAM = re.compile(r"(rtsps?|rtmps?|rtp|udp|tcp|srt|https?)://", re.IGNORECASE)
_DEVICE = re.compile(r"/dev/video\d+$")

Notice = Callable[[str], None]


@dataclass(frozen=True)
class Frame:
    """One frame of a source.

    index: counts the source's frames from 0. time_s: of the frame in a file, else seconds since the watch began.
    wall: when it came in, seconds since 1970. name: of the picture in a folder. load: the picture, upright RGB.
    """

    index: int
    time_s: float
    wall: float
    load: Callable[[], Image.Image]
    name: str | None = None


class Source(ABC):
    """`live`: it goes on whether or not its frames are looked at."""

    live = False

    @abstractmethod
    def frames(self, stop: threading.Event) -> Iterator[Frame]:
        """Frames until the source ends or `stop` is set."""


class FileSource(Source):
    """A video file (or animation, or list of frames): the frames at every multiple of `step_s`, as fast as they are
    asked for; with `realtime` at the pace of the recording, like a camera."""

    def __init__(self, path: Any, step_s: float, realtime: bool = False) -> None:
        self._path, self._step_s, self.live = path, step_s, realtime

    def frames(self, stop: threading.Event) -> Iterator[Frame]:
        began = time.monotonic()
        with open_video(self._path) as video:
            indices = np.arange(len(video))
            if self._step_s > 0 and not self.live:
                ticks = np.arange(0, video.times[-1] + 1e-6, self._step_s)
                indices = np.unique(np.searchsorted(video.times, ticks - 1e-6))
            with closing(video.read(indices.tolist())) as pictures:  # type: ignore[type-var]
                for index, picture in zip(indices.tolist(), pictures):
                    time_s = float(video.times[index])
                    if stop.is_set() or (self.live and stop.wait(max(0.0, began + time_s - time.monotonic()))):
                        return
                    yield Frame(index, time_s, time.time(), lambda p=picture: p)


class FolderSource(Source):
    """Pictures of a folder, those there and those to come, in the order of their names and each once; one that is
    overwritten counts as new. One that is still being written is waited for.

    idle_s: end when nothing new came for so long; None: never.
    """

    def __init__(self, folder: Path, notice: Notice, idle_s: float | None = None) -> None:
        self._folder, self._notice, self._idle_s = folder, notice, idle_s

    def frames(self, stop: threading.Event) -> Iterator[Frame]:
        began = last = time.monotonic()
        seen: dict[str, tuple[int, int]] = {}
        waiting: dict[str, tuple[tuple[int, int], float]] = {}  # name -> state, and since when it is in it
        index = 0
        while not stop.is_set():
            names = set()
            for path in self._list():
                names.add(path.name)
                if stop.is_set():
                    return
                state = _state(path)
                if state is None or seen.get(path.name) == state:
                    continue
                picture = self._load(path, state, waiting)
                if picture is None:
                    if path.name in waiting:
                        break  # in order: what comes after it waits too
                    seen[path.name] = state
                    continue
                seen[path.name] = state
                yield Frame(index, time.monotonic() - began, time.time(), lambda p=picture: p, path.name)
                index, last = index + 1, time.monotonic()
            else:
                seen = {name: state for name, state in seen.items() if name in names}
            if self._idle_s is not None and not waiting and time.monotonic() - last > self._idle_s:
                return
            stop.wait(_POLL_S)

    def _list(self) -> list[Path]:
        try:
            return list_pictures(self._folder)
        except OSError as e:
            raise InputError(f"{str(self._folder)!r}: cannot be listed ({e.strerror}); expected a folder") from None

    def _load(
        self, path: Path, state: tuple[int, int], waiting: dict[str, tuple[tuple[int, int], float]]
    ) -> Image.Image | None:
        """The picture; None if it has to be waited for (then it is in `waiting`) or was given up."""
        error: InputError | None = None
        try:
            picture = load_image(path)
            if _state(path) in (state, None):
                waiting.pop(path.name, None)
                return picture
        except InputError as e:
            error = e
        now = _state(path)
        if now is None:
            waiting.pop(path.name, None)
            self._notice(f"{path.name}: removed before it was read")
            return None
        since = waiting.get(path.name, (None, 0.0))
        if since[0] != now:
            waiting[path.name] = now, time.monotonic()
        elif time.monotonic() - since[1] > _SETTLE_S:
            waiting.pop(path.name)
            self._notice(f"skipped: {error}")
        return None


class StreamSource(Source):
    """A camera or a network stream through PyAV; connected again, ever more slowly, when it is lost.

    timeout_s: for the first connection in all, and for every later one and every read. retries: failures in a row
    before it is given up; None: never.
    """

    live = True

    def __init__(
        self, target: str, notice: Notice, timeout_s: float, retries: int | None = None, form: str | None = None
    ) -> None:
        self._target, self._notice, self._timeout_s, self._retries = target, notice, timeout_s, retries
        self._form = form if form is not None else "v4l2" if _DEVICE.match(target) else None
        self._options: dict[str, str] = {}
        if target.lower().startswith("rtsp"):  # UDP loses packets and is blocked by many networks
            self._options = {"rtsp_transport": "tcp", "timeout": str(int(timeout_s * 1e6))}

    def frames(self, stop: threading.Event) -> Iterator[Frame]:
        av = import_av()
        errors = (av.error.FFmpegError, OSError, ValueError)
        began, index, failures, wait = time.monotonic(), 0, 0, _BACKOFF_S[0]
        while not stop.is_set():
            try:
                with av.open(
                    self._target, format=self._form, options=self._options, timeout=(self._timeout_s, self._timeout_s)
                ) as container:
                    if not container.streams.video:
                        raise InputError(f"{self._target}: no video stream in it; check the address")
                    for frame in container.decode(video=0):
                        if stop.is_set():
                            return
                        failures, wait = 0, _BACKOFF_S[0]
                        yield Frame(index, time.monotonic() - began, time.time(), lambda f=frame: to_picture(f))
                        index += 1
                reason = "it ended"
            except errors as e:
                reason = " ".join((getattr(e, "strerror", None) or str(e)).split())[:150]
            if stop.is_set():
                return
            failures += 1
            first = index == 0
            if first and time.monotonic() - began + wait > self._timeout_s:
                raise InputError(
                    f"{self._target}: no picture within {self._timeout_s:g} s ({reason}); check that the camera is on "
                    "and the address right, or give it longer with --timeout"
                )
            if self._retries is not None and failures > self._retries:
                raise InputError(f"{self._target}: lost, and not back after {self._retries} retries ({reason})")
            self._notice(f"{self._target}: {'not there yet' if first else 'lost'} ({reason}); next try in {wait:g} s")
            stop.wait(wait)
            wait = min(2 * wait, _BACKOFF_S[1])


def open_source(
    source: str,
    notice: Notice,
    step_s: float,
    *,
    realtime: bool = False,
    timeout_s: float = 10.0,
    retries: int | None = None,
    idle_s: float | None = None,
    form: str | None = None,
) -> Source:
    """The source that a user named: a folder, a video file, a device such as /dev/video0, or an address such as
    rtsp://…; `form` is FFmpeg's input format for other devices.

    Raises:
        InputError: nothing there, or not a video.
    """
    if form is not None or _STREAM.match(source) or _DEVICE.match(source):
        import_av()
        if _DEVICE.match(source) and form is None and not Path(source).exists():
            raise InputError(f"{source}: no such device; expected a camera, a file, a folder or an rtsp:// address")
        return StreamSource(source, notice, timeout_s, retries, form)
    path = local_path(source)
    if path.is_dir():
        return FolderSource(path, notice, idle_s)
    with open_video(source):  # a wrong file is told before the model is loaded
        pass
    return FileSource(source, step_s, realtime)


def _state(path: Path) -> tuple[int, int] | None:
    """What changes when a file is written to; None where it is gone."""
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_mtime_ns, stat.st_size
