"""Any picture a user may hand over, as an upright 8-bit RGB Pillow image, fully decoded; knows no model.

Paths, file: and data: URLs, bytes, Pillow images and numpy arrays. EXIF rotation is applied, transparency is put on
white, 16-bit values are scaled (Pillow's own conversion clips them). Nothing is fetched from a network.
"""

from __future__ import annotations

import base64
import binascii
import io
import os
import re
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import unquote

import numpy as np
from PIL import Image, UnidentifiedImageError

from edgevl.runtime.errors import InputError

__all__ = [
    "MAX_DECODED_PIXELS",
    "check_pixels",
    "check_source",
    "load_image",
    "local_path",
    "quiet",
    "read_pipe",
    "too_large",
    "url_bytes",
]

MAX_DECODED_PIXELS = 178_956_970  # where Pillow's own limit stands unless a program moves it: 0.7 GB decoded
MAX_PIPED = 1 << 30  # bytes out of a pipe, which are all held in memory
_FORMATS = "JPEG, PNG, WebP, GIF, BMP or TIFF"
_SCHEME = re.compile(r"([a-z][a-z0-9+.-]*)://", re.IGNORECASE)
_ORIENTATION = 0x0112  # EXIF tag 274
_UPRIGHT = {  # EXIF 2.3, 4.6.4, tag Orientation: what undoes it
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_BOMB = (Image.DecompressionBombError, Image.DecompressionBombWarning)


def load_image(source: str | os.PathLike[str] | bytes | Image.Image | np.ndarray) -> Image.Image:
    """Load one picture; the result is a new RGB image of its own memory, upright, without metadata.

    Args:
        source: a path, `file://` or `data:` (base64) URL; the bytes of a picture file; a Pillow image of any mode; an
            array [H, W] or [H, W, 1|3|4] (grey, RGB, RGBA), uint8 or floating in 0..1. An animation gives its first
            frame. Greyscale of 16 bits is scaled by 255 / 65535. Mode `I` counts as 16-bit unless all values are below
            256, mode `F` as 0..1 unless a value is above 1, then as 0..255.

    Raises:
        InputError: missing, unreadable or empty file, not a picture, truncated, zero-size, more than
            `MAX_DECODED_PIXELS` pixels (looked at before decoding), an http URL, another type.
    """
    if isinstance(source, Image.Image):
        return _finish(source, _name(source))
    if isinstance(source, np.ndarray):
        return _from_array(source, _name(source))
    if isinstance(source, (bytes, bytearray, memoryview)):
        return _from_bytes(bytes(source), _name(source))
    if isinstance(source, str):
        if source[:5].lower() == "data:":
            return _from_bytes(url_bytes(source), _name(source))
        return _from_file(local_path(source), _name(source))
    if isinstance(source, os.PathLike):
        return _from_file(Path(source), _name(source))
    raise InputError(f"a picture of type {type(source).__name__}; expected a path, bytes, PIL image or numpy array")


def check_source(source: str, what: str = "picture", folder: bool = False) -> None:
    """Whether a path or URL leads to a file, which may be asked before a model is opened; nothing is read of it, as a
    pipe gives its bytes once.

    Args:
        folder: a folder is taken too (of a video's frames).

    Raises:
        InputError: not there, a folder, not readable for this user, an http URL.
    """
    name = _name(source)
    if source[:5].lower() == "data:":
        return
    path = local_path(source)
    try:
        is_folder = stat.S_ISDIR(path.stat().st_mode)
    except FileNotFoundError:
        raise InputError(f"{name}: not found; check the path of the {what}") from None
    except (OSError, ValueError) as e:
        raise InputError(f"{name}: cannot be read ({_reason(e)}); check the path of the {what}") from None
    if is_folder and not folder:
        raise InputError(f"{name}: is a folder; expected a picture file ({_FORMATS})")
    if not os.access(path, os.R_OK):
        raise InputError(f"{name}: Permission denied; make it readable for this user")


def _name(source: Any) -> str:
    """A short name for errors, on one line whatever the source holds."""
    if isinstance(source, Image.Image):
        return f"PIL image {source.mode} {source.size[0]}x{source.size[1]}"
    if isinstance(source, np.ndarray):
        return f"array {source.dtype} {list(source.shape)}"
    if isinstance(source, (bytes, bytearray, memoryview)):
        return f"picture of {len(source)} bytes"
    text = str(source)
    if text[:5].lower() == "data:":
        return f"data: URL of {len(text)} characters ({text[:30]!r})"
    return repr(text if len(text) <= 200 else f"{text[:190]}... ({len(text)} characters)")


def local_path(url: str) -> Path:
    """A path as it is, or that of a file:// URL, percent-encoded or (as qwen_vl_utils takes it) literal.

    Raises:
        InputError: a URL of another scheme.
    """
    found = _SCHEME.match(url)
    if found is None:
        return Path(url)
    scheme = found.group(1).lower()
    if scheme in ("http", "https"):
        raise InputError(f"{_name(url)}: edgevl fetches nothing; download it first and pass its path")
    if scheme != "file":
        raise InputError(f"{_name(url)}: unknown scheme {scheme!r}; expected a path, a file:// or a data: URL")
    rest = url[len("file://") :]
    rest = rest[len("localhost") :] if rest.startswith("localhost/") else rest
    literal = Path(rest)
    with suppress(OSError, ValueError):  # a name that the system refuses is reported when it is opened
        if literal.exists():
            return literal
    return Path(unquote(rest))


def url_bytes(url: str) -> bytes:
    """Bytes of `data:[media type];base64,...` (RFC 2397); the media type is not believed, the content decides."""
    head, comma, body = url.partition(",")
    if not comma:
        raise InputError(f"{_name(url)}: without a comma; expected 'data:image/...;base64,' and the picture in base64")
    if not head.lower().rstrip().endswith(";base64"):
        raise InputError(f"{_name(url)}: expected 'data:image/...;base64,' and the picture in base64")
    try:
        return base64.b64decode("".join(unquote(body).split()), validate=True)
    except (binascii.Error, ValueError) as e:
        raise InputError(f"{_name(url)}: not valid base64 ({e}); encode the whole picture file again") from None


def _from_file(path: Path, name: str) -> Image.Image:
    try:
        with path.open("rb") as file:
            stream: BinaryIO = file if file.seekable() else read_pipe(file, name)
            if not stream.read(1):
                raise InputError(f"{name}: the file is empty; expected a picture ({_FORMATS})")
            stream.seek(0)
            return _from_stream(stream, name)
    except FileNotFoundError:
        raise InputError(f"{name}: not found; check the path of the picture") from None
    except IsADirectoryError:
        raise InputError(f"{name}: is a folder; expected a picture file ({_FORMATS})") from None
    except PermissionError:
        raise InputError(f"{name}: Permission denied; make the file readable for this user") from None
    except (OSError, ValueError) as e:  # ValueError: a NUL in the name
        raise InputError(f"{name}: cannot be read ({_reason(e)}); check the path of the picture") from None


def read_pipe(file: BinaryIO, name: str) -> io.BytesIO:
    """What comes through a pipe, all of it.

    Raises:
        InputError: it does not end within MAX_PIPED bytes.
    """
    data = file.read(MAX_PIPED + 1)
    if len(data) > MAX_PIPED:
        raise InputError(
            f"{name}: more than {MAX_PIPED} bytes came through this pipe; save them to a file and pass that"
        )
    return io.BytesIO(data)


def _from_bytes(data: bytes, name: str) -> Image.Image:
    if not data:
        raise InputError(f"{name}: empty; expected the bytes of a picture file ({_FORMATS})")
    return _from_stream(io.BytesIO(data), name)


@contextmanager
def quiet() -> Iterator[None]:
    """Without Pillow's warnings, which would come or raise as the program's filters say: of pictures of half its limit
    (ours is the only one), of metadata that is damaged, of palettes whose transparency is looked after here."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        yield


def _from_stream(stream: BinaryIO, name: str) -> Image.Image:
    try:
        with quiet():
            image = Image.open(stream)
    except _BOMB:
        raise too_large(name, "too many") from None
    except UnidentifiedImageError:
        raise InputError(f"{name}: not a picture, or cut off in its header; expected {_FORMATS}") from None
    except MemoryError:
        raise
    except Exception as e:  # Pillow's readers raise many types on damaged headers: struct.error, KeyError, ...
        raise InputError(f"{name}: damaged or truncated ({_reason(e)}); expected {_FORMATS}") from None
    with image:
        if image.format == "EPS":  # Pillow would hand the file to Ghostscript, a program that runs PostScript
            raise InputError(f"{name}: EPS pictures are not read; convert it to PNG first")
        return _finish(image, name)


def _finish(image: Image.Image, name: str) -> Image.Image:
    """Check the size, decode, convert and turn upright."""
    width, height = image.size
    if width < 1 or height < 1:
        raise InputError(f"{name}: the picture is {width}×{height} pixels; expected at least 1×1")
    check_pixels(name, width, height)
    try:
        with quiet():
            image.load()
            orientation = _orientation(image)  # after load: the TIFF reader turns the picture itself, and says so there
            rgb = _to_rgb(image, name)
    except (InputError, MemoryError):
        raise
    except _BOMB:  # a container whose inner picture is larger than its header says
        raise too_large(name, "too many") from None
    except Exception as e:  # as in _from_stream
        raise InputError(
            f"{name}: damaged or truncated, or of an unusual kind ({_reason(e)}); copy it again, or save it as PNG"
        ) from None
    if orientation in _UPRIGHT:
        rgb = rgb.transpose(_UPRIGHT[orientation])
    rgb.info = {}  # the tag must not turn the picture again when it is passed on
    return rgb


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(_ORIENTATION, 1)
    except Exception:  # damaged metadata is no reason to refuse a picture whose pixels are whole
        return 1


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    """A new RGB image; transparency on white by Image.paste, as qwen_vl_utils (vision_process.py, to_rgb) does for
    RGBA. It drops the other kinds of transparency; transformers puts them on white, and so does this."""
    if image.mode == "I" or image.mode == "F" or image.mode.startswith("I;16"):
        return Image.fromarray(_to_bytes(image, name)).convert("RGB")
    palette_alpha = image.mode == "P" and image.palette is not None and image.palette.mode.endswith("A")
    if "transparency" in image.info or palette_alpha or image.mode in ("RGBA", "LA", "PA", "RGBa", "La"):
        # Pillow goes from La only to LA
        rgba = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
        white = Image.new("RGB", image.size, (255, 255, 255))
        white.paste(rgba, mask=rgba.getchannel("A"))
        return white
    return image.convert("RGB")


def _to_bytes(image: Image.Image, name: str) -> np.ndarray:
    """uint8 [H, W] of a greyscale picture of more than 8 bits; halves round to even, as numpy does."""
    values = np.asarray(image)
    if image.mode == "F":
        return _float_bytes(values, name, top=255)
    if image.mode == "I":
        low, high = int(values.min()), int(values.max())
        if low < 0 or high > 65535:
            raise InputError(f"{name}: integer pixels in {low}..{high}; expected 0..65535: scale the picture first")
        # In memory `I` holds whatever it was made of; the file formats that give it here have 16 bits.
        if high < 256 and image.format not in ("PNG", "PPM"):
            return values.astype(np.uint8)
    bytes_of = np.rint(np.arange(65536) / 257).astype(np.uint8)  # 65535 / 255 = 257
    out = bytes_of[values]
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        out[values == transparent] = 255
    return out


def _float_bytes(values: np.ndarray, name: str, top: int) -> np.ndarray:
    """uint8 of floats in 0..1, or in 0..top where one is above 1."""
    low, high = float(values.min()), float(values.max())
    if not (low >= 0 and high <= top):  # so written, NaN fails too
        raise InputError(f"{name}: floating values in {low:g}..{high:g}, outside 0..1; scale them, or pass uint8")
    return np.rint(values.astype(np.float32) * (255 if high <= 1 else 1)).astype(np.uint8)


def _from_array(array: np.ndarray, name: str) -> Image.Image:
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (1, 3, 4)):
        raise InputError(f"{name}: expected shape [height, width] or [height, width, 1, 3 or 4], channels last")
    if array.size == 0:
        raise InputError(f"{name}: expected at least one pixel")
    if np.issubdtype(array.dtype, np.floating):
        array = _float_bytes(array, name, top=1)
    elif array.dtype != np.uint8:
        raise InputError(f"{name}: expected uint8, or floating values in 0..1; scale and convert it first")
    grey = array.ndim == 3 and array.shape[2] == 1
    return _finish(Image.fromarray(np.ascontiguousarray(array[:, :, 0] if grey else array)), name)


def check_pixels(name: str, width: int, height: int) -> None:
    """Raises InputError for a picture, or a frame of a video, that is too large to decode."""
    if width * height > MAX_DECODED_PIXELS:
        raise too_large(name, f"{width}×{height} = {width * height}")


def too_large(name: str, size: str) -> InputError:
    """`size`: in words, where it is known."""
    pillows = Image.MAX_IMAGE_PIXELS  # it raises above twice this; a program may have lowered it
    limit = MAX_DECODED_PIXELS if pillows is None else min(MAX_DECODED_PIXELS, 2 * pillows)
    return InputError(
        f"{name}: {size} pixels, expected at most {limit} (a decompression bomb?); shrink the picture first"
    )


def _reason(error: Exception) -> str:
    """An exception on one line, without Pillow's object addresses."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split())[:150] or type(error).__name__
