"""Where the frames of a video come from: files through PyAV, animations through Pillow, lists and folders of pictures.

A source knows the time of every frame before it decodes any, and decodes only those that it is asked for, one at a
time, so a long video needs no more memory than a short one. Frames come as upright RGB pictures. It knows no model.
"""

from __future__ import annotations

import io
import os
import re
from abc import ABC, abstractmethod
from array import array
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from edgevl.runtime.errors import EngineError, InputError
from edgevl.runtime.image_loading import check_pixels, load_image, local_path, quiet, read_pipe, too_large, url_bytes

__all__ = ["PICTURE_SUFFIXES", "VideoSource", "import_av", "list_pictures", "open_video", "to_picture"]

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")
DEFAULT_FPS = 2.0  # of frames that carry no time: qwen_vl_utils' sample_fps
_ANIMATIONS = ("GIF", "WEBP", "PNG", "AVIF")
_STILLS = ("JPEG", "BMP", "TIFF")
_UNTIMED_MS = 100  # what browsers make of a duration of zero in an animation
_SEEK_GAP = 24  # frames: jumping to a keyframe costs about as much as decoding a few
_TRANSPOSE = {90: Image.Transpose.ROTATE_90, 180: Image.Transpose.ROTATE_180, 270: Image.Transpose.ROTATE_270}


class VideoSource(ABC):
    """An opened video.

    times: float64 [frames], seconds from the first frame, ascending. duration: seconds, the last frame included.
    fps: frames per second, on average.
    constant: the frames come at a constant rate, so that index i stands at i / fps to within half a frame.
    whole: the user chose the frames (a list, a folder): all of them are meant, unless told otherwise.
    size: (width, height) of the upright frames. notes: what a user should know, such as damage that was met.
    """

    name: str
    times: NDArray[np.float64]
    duration: float
    fps: float
    size: tuple[int, int]
    constant = True
    whole = False

    def __init__(self, name: str) -> None:
        self.name = name
        self.notes: list[str] = []

    @abstractmethod
    def read(self, indices: Sequence[int]) -> Generator[Image.Image, None, None]:
        """The frames of these ascending indices (the same one may be asked for again), decoded one by one.

        Raises:
            InputError: a frame that cannot be read and that no neighbour can stand for.
        """

    @abstractmethod
    def close(self) -> None:
        """Give back what is open."""

    def __len__(self) -> int:
        return len(self.times)

    def __enter__(self) -> VideoSource:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_video(source: Any, sample_fps: float = DEFAULT_FPS) -> VideoSource:
    """Open a video file (path, file: or data: URL, bytes), an animated GIF, WebP, PNG or AVIF, a folder of pictures,
    a list of pictures (whatever `load_image` takes), or an array uint8 [frames, height, width, 3].

    Args:
        sample_fps: the rate of a list or folder, whose frames carry no times.

    Raises:
        InputError: nothing there, not a video, no frames, no decoder for it, PyAV not installed, an http URL.
    """
    if isinstance(source, np.ndarray):
        if source.ndim != 4:
            raise InputError(f"a video as an array of shape {list(source.shape)}; expected [frames, height, width, 3]")
        return _Pictures(list(source), f"array of {len(source)} frames", sample_fps)
    if isinstance(source, (bytes, bytearray, memoryview)):
        return _open_file(io.BytesIO(bytes(source)), f"video of {len(source)} bytes")
    if isinstance(source, Sequence) and not isinstance(source, str):
        return _Pictures(source, f"list of {len(source)} frames", sample_fps)
    if not isinstance(source, (str, os.PathLike)):
        raise InputError(
            f"a video of type {type(source).__name__}; expected a file, a folder of frames or a list of pictures"
        )
    name = repr(str(source)) if len(str(source)) < 200 else f"{str(source)[:40]!r}..."
    if isinstance(source, str) and source[:5].lower() == "data:":
        return _open_file(io.BytesIO(url_bytes(source)), name)
    path = local_path(source) if isinstance(source, str) else Path(source)
    try:
        if path.is_dir():
            return _Pictures(list_pictures(path), f"folder {name}", sample_fps)
        with path.open("rb") as file:
            piped = None if file.seekable() else read_pipe(file, name)  # which gives its bytes once
            if not (piped or file).read(1):
                raise InputError(f"{name}: the file is empty; expected a video")
            if piped is not None:
                return _open_file(piped, name)
    except FileNotFoundError:
        raise InputError(f"{name}: not found; check the path of the video") from None
    except PermissionError:
        raise InputError(f"{name}: Permission denied; make the file readable for this user") from None
    except (OSError, ValueError) as e:
        raise InputError(f"{name}: cannot be read ({_reason(e)}); check the path of the video") from None
    return _open_file(path, name)


def list_pictures(folder: Path) -> list[Path]:
    """The pictures of a folder in the order of their names, numbers by value (frame2 before frame10); hidden files,
    as half-written ones often are, are left out."""
    try:
        found = [p for p in folder.iterdir() if p.suffix.lower() in PICTURE_SUFFIXES and not p.name.startswith(".")]
    except PermissionError:
        raise InputError(f"{str(folder)!r}: Permission denied; make the folder readable for this user") from None
    except OSError as e:
        raise InputError(f"{str(folder)!r}: cannot be read ({_reason(e)}); check the path of the folder") from None
    return sorted(found, key=lambda p: [(int(n) if n else 0, s) for n, s in re.findall(r"(\d*)(\D*)", p.name)])


def import_av() -> ModuleType:
    """PyAV, which only video files and cameras need.

    Raises:
        EngineError: not installed.
    """
    try:
        import av
        import av.error
    except ImportError as e:
        raise EngineError(
            f"video files need the package 'av' ({e}); pip install 'edgevl[video]', "
            "or pass a folder of frames or an animated GIF"
        ) from None
    return av


def _open_file(target: Path | io.BytesIO, name: str) -> VideoSource:
    image = _sniff(target, name)
    if image is not None and (image.format not in _ANIMATIONS or getattr(image, "n_frames", 1) < 2):
        image.close()
        raise InputError(f"{name}: is a {image.format} picture, not a video; pass it as a picture (--image)")
    if image is not None:
        return _Animation(image, name)
    return _File(import_av(), target, name)


def _sniff(target: Path | io.BytesIO, name: str) -> Image.Image | None:
    """The file as a Pillow image where it is one; looks at the header only."""
    Image.init()
    formats = [f for f in (*_ANIMATIONS, *_STILLS) if f in Image.OPEN]
    try:
        with quiet(), suppress(OSError, ValueError, SyntaxError):
            return Image.open(target, formats=formats)
    except Image.DecompressionBombError:  # not for another reader to try
        raise too_large(name, "too many") from None
    if isinstance(target, io.BytesIO):
        target.seek(0)
    return None


class _Pictures(VideoSource):
    """Frames that a user chose one by one."""

    whole = True

    def __init__(self, pictures: Sequence[Any], name: str, fps: float) -> None:
        super().__init__(name)
        if not len(pictures):
            raise InputError(f"{name}: a video has no frames; expected at least one picture")
        self._pictures, self.fps = pictures, fps
        self.times, self.duration = np.arange(len(pictures)) / fps, len(pictures) / fps
        self.size = load_image(pictures[0]).size

    def read(self, indices: Sequence[int]) -> Generator[Image.Image, None, None]:
        at, picture = -1, None
        for index in indices:
            if picture is None or index != at:
                at, picture = index, load_image(self._pictures[index])
            if picture.size != self.size:
                (w, h), (first_w, first_h) = picture.size, self.size
                raise InputError(
                    f"{self.name}: frame {index + 1} is {w}×{h} pixels, the first is {first_w}×{first_h}; "
                    "expected frames of one size: resize them first"
                )
            yield picture

    def close(self) -> None:
        pass


class _Animation(VideoSource):
    """GIF, WebP, APNG or AVIF through Pillow; every frame has a duration of its own."""

    def __init__(self, image: Image.Image, name: str) -> None:
        super().__init__(name)
        self._image, self.size = image, image.size
        check_pixels(name, *image.size)
        count, starts, clock = getattr(image, "n_frames", 1), [], 0.0
        for index in range(count):
            try:
                with quiet():
                    image.seek(index)
                    image.load()
            except Exception as e:  # Pillow's readers raise many types on damaged data
                if not starts:
                    raise InputError(f"{name}: damaged or truncated ({e}); copy it again") from None
                self.notes.append(f"damaged or cut short: {len(starts)} of {count} frames are there")
                break
            starts.append(clock)
            clock += (image.info.get("duration") or _UNTIMED_MS) / 1000
        self.times, self.duration = np.array(starts), clock
        self.fps = len(starts) / clock
        self.constant = _is_constant(self.times, self.fps)

    def read(self, indices: Sequence[int]) -> Generator[Image.Image, None, None]:
        for index in indices:
            self._image.seek(int(index))
            yield load_image(self._image)

    def close(self) -> None:
        self._image.close()


class _File(VideoSource):
    """A video file through PyAV. The packets are read once for the times; a frame is decoded from the keyframe before
    it when that is nearer than the frame decoded last."""

    def __init__(self, av: ModuleType, target: Path | io.BytesIO, name: str) -> None:
        super().__init__(name)
        self._av, self._target = av, target
        with self._container() as (container, stream):
            self._index(container, stream)
        with closing(self.read([0])) as first:
            self.size = next(first).size  # finds a missing decoder, and knows the rotation

    @contextmanager
    def _container(self) -> Iterator[tuple[Any, Any]]:
        """The file opened from its beginning, and its video stream."""
        error = self._av.error
        if isinstance(self._target, io.BytesIO):
            self._target.seek(0)
        file = self._target if isinstance(self._target, io.BytesIO) else str(self._target)
        try:
            container = self._av.open(file)
        except (error.FFmpegError, OSError, ValueError) as e:
            raise InputError(
                f"{self.name}: not a video, or cut off in its header ({_reason(e)}); "
                "expected MP4, MKV, WebM, AVI, MOV or another container that FFmpeg reads"
            ) from None
        try:
            if not container.streams.video:
                kinds = ", ".join(sorted({s.type for s in container.streams})) or "nothing"
                raise InputError(
                    f"{self.name}: no video stream in it ({kinds} only); a file that was cut off before its index "
                    "looks the same: copy it again"
                )
            stream = container.streams.video[0]
            if stream.codec_context is None:
                raise _no_decoder(self.name)
            check_pixels(self.name, stream.codec_context.width, stream.codec_context.height)
            stream.thread_type = "AUTO"
            yield container, stream
        finally:
            container.close()

    def close(self) -> None:
        pass  # every pass opens the file for itself

    def _index(self, container: Any, stream: Any) -> None:
        """Times of all frames, without decoding them."""
        error, stamps, keys, known = self._av.error, array("q"), array("q"), True
        try:
            for packet in container.demux(stream):
                if not packet.size or packet.is_discard:
                    continue
                known = known and packet.pts is not None
                stamps.append(packet.pts or 0)
                if packet.is_keyframe:
                    keys.append(packet.pts or 0)
        except (error.FFmpegError, OSError) as e:
            self.notes.append(f"damaged after {len(stamps)} frames ({_reason(e)})")
        if not stamps:
            raise InputError(f"{self.name}: the video has no frames; copy it again, or pass another")
        rate = stream.average_rate or stream.guessed_rate
        # Without times in the packets (raw streams) frames are told apart by counting them, and come in order.
        self._stamps = np.unique(np.array(stamps)) if known else None
        self._keys = np.unique(np.array(keys)) if known else np.zeros(0, np.int64)
        count = len(stamps) if self._stamps is None else len(self._stamps)
        if self._stamps is None:
            self.fps = float(rate or 25)
            self.times = np.arange(count) / self.fps
        else:
            self.times = (self._stamps - self._stamps[0]) * float(stream.time_base)
            self.fps, self.constant = _rate(self.times, float(rate) if rate else 0.0)
        self.duration = count / self.fps
        self._check_length(stream, container)

    def _check_length(self, stream: Any, container: Any) -> None:
        """Note where the header promises more than is there."""
        count, end = len(self.times), float(self.times[-1])
        promised = float(stream.duration * stream.time_base) if stream.duration else (container.duration or 0) / 1e6
        if stream.frames > count:
            self.notes.append(f"cut short: {count} of {stream.frames} frames are there")
        elif promised > 1.1 * end + 2 / self.fps + 0.5:
            self.notes.append(f"cut short: its frames end at {end:.1f} of {promised:.1f} s")

    def read(self, indices: Sequence[int]) -> Generator[Image.Image, None, None]:
        with self._container() as (container, stream):
            yield from _Reader(self, container, stream).read(indices)


class _Reader:
    """One pass over a file, forward only."""

    def __init__(self, source: _File, container: Any, stream: Any) -> None:
        self._source, self._container, self._stream = source, container, stream
        self._errors = source._av.error
        self._frames = self._decode()
        self._frame: Any = None  # decoded last
        self._at = -(1 << 62)  # its stamp, or its number where the file has no stamps
        self._seeks = True

    def read(self, indices: Sequence[int]) -> Generator[Image.Image, None, None]:
        stamps, picture, shown, missed = self._source._stamps, None, None, 0
        for index in indices:
            wanted = int(index if stamps is None else stamps[index])
            if self._frame is None or self._at < wanted:
                self._seek(wanted)
            if self._frame is None or self._at < wanted:
                self._advance(wanted)
            if self._frame is None:
                raise InputError(f"{self._source.name}: none of its frames can be decoded; copy it again")
            missed += self._at != wanted
            if picture is None or shown != self._at:
                picture, shown = to_picture(self._frame), self._at
            yield picture
        if missed:
            self._source.notes.append(f"damaged: {missed} frames could not be decoded, their neighbours stand for them")

    def _advance(self, wanted: int) -> None:
        """Decode up to the first frame at or after `wanted`; the last one there is if the file ends before it."""
        for frame in self._frames:
            before, self._frame = self._at, frame
            self._at = frame.pts if self._source._stamps is not None and frame.pts is not None else max(before, -1) + 1
            if self._at >= wanted:
                return

    def _seek(self, wanted: int) -> None:
        """Jump to the last keyframe before `wanted` where that skips enough frames."""
        stamps, keys = self._source._stamps, self._source._keys
        if stamps is None or not self._seeks or not len(keys):
            return
        key = keys[max(0, int(np.searchsorted(keys, wanted, side="right")) - 1)]
        now = int(np.searchsorted(stamps, self._at))
        if np.searchsorted(stamps, key) - now <= _SEEK_GAP:
            return
        before = self._frame, self._at
        try:
            self._container.seek(int(key), stream=self._stream)
            self._frames = self._decode()
            first = next(self._frames, None)
        except (self._errors.FFmpegError, OSError):
            first = None
        if first is not None and first.pts is not None and first.pts <= wanted:
            self._frame, self._at = first, first.pts
            return
        # A container without a usable index: from the beginning, and no more jumps.
        self._seeks = False
        self._frame, self._at = before
        with suppress(self._errors.FFmpegError, OSError):
            self._container.seek(int(stamps[0]), stream=self._stream)
        self._frames = (f for f in self._decode() if f.pts is None or f.pts > self._at)

    def _decode(self) -> Iterator[Any]:
        """Frames from where the container stands; packets that cannot be decoded are passed over."""
        try:
            for packet in self._container.demux(self._stream):
                try:
                    frames = packet.decode()
                except self._errors.DecoderNotFoundError:
                    raise _no_decoder(self._source.name) from None
                except (self._errors.FFmpegError, OSError):
                    continue
                yield from frames
        except (self._errors.FFmpegError, OSError):  # the container itself ends in the middle
            return


def to_picture(frame: Any) -> Image.Image:
    """A decoded PyAV frame as an upright RGB picture: turned as its display matrix says."""
    picture = frame.to_image()
    turn = _TRANSPOSE.get(frame.rotation % 360)
    return picture if turn is None else picture.transpose(turn)


def _no_decoder(name: str) -> InputError:
    return InputError(
        f"{name}: no decoder for its codec in this build of FFmpeg; "
        "convert it, for example with `ffmpeg -i IN -c:v libx264 OUT.mp4`"
    )


def _rate(times: NDArray[np.float64], header: float) -> tuple[float, bool]:
    """(frames per second, whether constant): the header's rate where the times bear it out, else what they say."""
    count, end = len(times), float(times[-1])
    if count < 2 or end <= 0:
        return header or DEFAULT_FPS, True
    for rate in (header, (count - 1) / end):
        if rate > 0 and _is_constant(times, rate):
            return rate, True
    return count / (end + float(times[-1] - times[-2])), False  # the last frame stands as long as the one before it


def _is_constant(times: NDArray[np.float64], fps: float) -> bool:
    return bool(np.abs(times * fps - np.arange(len(times))).max() < 0.5)


def _reason(error: Exception) -> str:
    text = getattr(error, "strerror", None) or str(error)
    return " ".join(text.split())[:150] or type(error).__name__
