"""runtime/image_loading.py: every mode holds values, every guard trips."""

from __future__ import annotations

import ast
import base64
import importlib.util
import io
import os
import struct
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from edgevl.runtime import image_loading
from edgevl.runtime.errors import InputError
from edgevl.runtime.image_loading import load_image

RGB = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3) * 3


def encode(image: Image.Image, form: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def values(source: Any) -> np.ndarray:
    image = load_image(source)
    assert image.mode == "RGB"
    return np.asarray(image)


def test_sources_agree(tmp_path: Path) -> None:
    data = encode(Image.fromarray(RGB))
    path = tmp_path / "a picture.png"
    path.write_bytes(data)
    url = "data:image/png;base64," + base64.b64encode(data).decode()
    for source in (path, str(path), f"file://{path}", data, bytearray(data), url, RGB, Image.fromarray(RGB)):
        np.testing.assert_array_equal(values(source), RGB)


def test_the_callers_picture_is_not_touched() -> None:
    image = Image.fromarray(RGB)
    loaded = load_image(image)
    loaded.putpixel((0, 0), (9, 9, 9))
    assert image.getpixel((0, 0)) == (0, 3, 6)


def test_the_result_has_its_own_memory(tmp_path: Path) -> None:
    for array in (RGB.copy(), RGB[:, :, 0].copy(), np.dstack([RGB, RGB[:, :, :1] | 255])):
        loaded = load_image(array)
        before = np.asarray(loaded).copy()
        array[:] = 99
        np.testing.assert_array_equal(np.asarray(loaded), before)
    path = tmp_path / "gone.png"
    path.write_bytes(encode(Image.fromarray(RGB)))
    loaded = load_image(path)
    path.unlink()
    np.testing.assert_array_equal(np.asarray(loaded), RGB)


def test_no_file_stays_open(tmp_path: Path) -> None:
    good, cut, text = tmp_path / "good.tif", tmp_path / "cut.png", tmp_path / "text.png"
    # Pillow keeps a file of several frames open after load()
    Image.fromarray(RGB).save(good, save_all=True, append_images=[Image.fromarray(RGB)])
    cut.write_bytes(encode(Image.effect_noise((200, 200), 90))[:3000])
    text.write_text("hello")
    before = len(os.listdir("/proc/self/fd"))
    kept = [load_image(good)]
    for bad in (cut, text):
        with pytest.raises(InputError) as caught:
            load_image(bad)
        kept.append(caught)  # type: ignore[arg-type]
    assert len(os.listdir("/proc/self/fd")) == before


def test_urls(tmp_path: Path) -> None:
    data = encode(Image.fromarray(RGB))
    path = tmp_path / "a b%41.png"
    path.write_bytes(data)
    body = base64.b64encode(data).decode()
    for source in (
        f"file://{path}",  # literal
        f"file://localhost{path}",
        f"FILE://{tmp_path}/a%20b%2541.png",  # percent-encoded
        "DATA:;base64," + body,
        "data:application/octet-stream;charset=x;base64," + body[:50] + "\n " + body[50:],
        "data:image/png;base64," + body.replace("+", "%2B").replace("=", "%3D"),
    ):
        np.testing.assert_array_equal(values(source), RGB)


@pytest.mark.parametrize("orientation", range(10))
@pytest.mark.parametrize("form", ["PNG", "JPEG", "TIFF", "WEBP"])
def test_every_orientation_as_pillow_turns_it(orientation: int, form: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation  # 0 and 9 mean nothing
    data = encode(Image.fromarray(RGB), form, exif=exif)
    with Image.open(io.BytesIO(data)) as opened:
        expected = np.asarray(ImageOps.exif_transpose(opened).convert("RGB"))
    loaded = load_image(data)
    np.testing.assert_array_equal(np.asarray(loaded), expected)
    np.testing.assert_array_equal(values(loaded), expected)  # turned once, not again
    with Image.open(io.BytesIO(data)) as opened:
        np.testing.assert_array_equal(values(opened.convert("RGB")), expected)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_damaged_exif_is_no_orientation() -> None:
    image = Image.fromarray(RGB)
    image.info["exif"] = b"Exif\0\0MM\0*\0\0\0\x08\0\x05\x01\x12"
    np.testing.assert_array_equal(values(image), RGB)
    image.info["exif"] = b"not a tiff header"
    np.testing.assert_array_equal(values(image), RGB)


def test_exif_orientation(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rows are columns
    path = tmp_path / "turned.png"
    Image.fromarray(RGB).save(path, exif=exif)
    np.testing.assert_array_equal(values(path), np.rot90(RGB, -1))


def test_transparency_goes_on_white() -> None:
    rgba = np.zeros((1, 3, 4), np.uint8)
    rgba[0] = [[200, 0, 0, 255], [200, 0, 0, 0], [200, 0, 0, 51]]
    expected = [[200, 0, 0], [255, 255, 255], [244, 204, 204]]  # 0.2 · colour + 0.8 · 255
    assert np.abs(values(encode(Image.fromarray(rgba)))[0].astype(int) - expected).max() <= 1
    assert np.abs(values(rgba)[0].astype(int) - expected).max() <= 1


def test_rgba_as_qwen_vl_utils_puts_it_on_white() -> None:
    spec = importlib.util.find_spec("qwen_vl_utils")  # importing it would need torchvision
    assert spec is not None and spec.submodule_search_locations is not None
    path = Path(spec.submodule_search_locations[0]) / "vision_process.py"
    tree = ast.parse(path.read_text(encoding="utf-8"))
    [found] = [n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == "to_rgb"]
    scope: dict = {"Image": Image}
    exec(compile(ast.Module([found], type_ignores=[]), str(path), "exec"), scope)
    rgba = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 4), np.uint8))
    np.testing.assert_array_equal(values(rgba), np.asarray(scope["to_rgb"](rgba)))
    for mode in ("LA", "PA"):  # it drops these; on white they are what their RGBA is
        other = rgba.convert(mode) if mode == "LA" else rgba.convert("RGB").convert("P").convert("PA")
        np.testing.assert_array_equal(values(other), np.asarray(scope["to_rgb"](other.convert("RGBA"))))
    for mode in ("RGB", "L", "P", "1", "CMYK", "YCbCr", "HSV", "RGBX"):
        other = rgba.convert("RGB").convert(mode)
        np.testing.assert_array_equal(values(other), np.asarray(scope["to_rgb"](other)))


def test_premultiplied_and_keyed_transparency() -> None:
    half = Image.new("RGBA", (1, 1), (200, 0, 0, 51)).convert("RGBa")
    assert np.abs(values(half)[0, 0].astype(int) - [244, 204, 204]).max() <= 2
    grey = Image.merge("LA", [Image.new("L", (1, 1), 100), Image.new("L", (1, 1), 51)]).convert("La")
    assert np.abs(values(grey)[0, 0].astype(int) - 224).max() <= 2
    assert values(encode(Image.fromarray(RGB), transparency=(0, 3, 6)))[0, :2].tolist() == [[255] * 3, [9, 12, 15]]
    assert values(encode(Image.fromarray(RGB[:1, :2, 0]), transparency=9))[0].tolist() == [[0] * 3, [255] * 3]
    alpha_palette = Image.new("P", (2, 1))
    alpha_palette.putpalette([10, 20, 30, 255, 40, 50, 60, 0], "RGBA")
    alpha_palette.putdata([0, 1])
    assert values(alpha_palette)[0].tolist() == [[10, 20, 30], [255, 255, 255]]
    deep = Image.fromarray(np.array([[257, 514]], np.uint16))
    assert values(encode(deep, transparency=514))[0, :, 0].tolist() == [1, 255]


def test_deep_grey_is_scaled_not_clipped() -> None:
    levels = np.array([[0, 128, 129, 257, 30000, 65535]], np.uint16)
    expected = [0, 0, 1, 1, 117, 255]  # round(v / 257)
    for form in ("PNG", "TIFF", "PPM"):
        assert values(encode(Image.fromarray(levels), form))[0, :, 0].tolist() == expected
    big_endian = Image.frombytes("I;16B", (6, 1), levels.astype(">u2").tobytes())
    assert values(big_endian)[0, :, 0].tolist() == expected
    assert values(Image.fromarray(levels.astype(np.int32)))[0, :, 0].tolist() == expected
    # `I` made from bytes keeps them; so does `F`
    narrow = Image.fromarray(np.array([[0, 7, 255]], np.uint8))
    assert values(narrow.convert("I"))[0, :, 0].tolist() == [0, 7, 255]
    assert values(narrow.convert("F"))[0, :, 0].tolist() == [0, 7, 255]
    # a 16-bit file whose values are all dark stays dark
    assert values(b"P5 2 1 65535\n\x00\x00\x00\xff")[0, :, 0].tolist() == [0, 1]


@pytest.mark.parametrize(
    "image",
    [
        Image.fromarray(np.array([[0, 65536]], np.int32)),
        Image.fromarray(np.array([[-1, 5]], np.int32)),
        Image.fromarray(np.array([[-0.5, 1]], np.float32)),
        Image.fromarray(np.array([[0, 256]], np.float32)),
        Image.fromarray(np.array([[0, np.nan]], np.float32)),
        Image.fromarray(np.array([[0, np.inf]], np.float32)),
    ],
    ids=["I high", "I low", "F low", "F high", "F nan", "F inf"],
)
def test_values_without_a_known_range(image: Image.Image) -> None:
    with pytest.raises(InputError, match="scale"):
        load_image(image)


def test_palette_and_its_transparency() -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putdata([0, 1])
    assert values(encode(image))[0].tolist() == [[10, 20, 30], [40, 50, 60]]
    assert values(encode(image, transparency=1))[0].tolist() == [[10, 20, 30], [255, 255, 255]]


def test_grey_modes() -> None:
    assert values(Image.fromarray(np.array([[0, 128, 255]], np.uint8)))[0].tolist() == [[0] * 3, [128] * 3, [255] * 3]
    grey_alpha = Image.merge("LA", [Image.new("L", (1, 1), 100), Image.new("L", (1, 1), 0)])
    assert values(grey_alpha)[0].tolist() == [[255] * 3]
    assert values(Image.new("1", (1, 1), 1))[0].tolist() == [[255] * 3]
    deep = Image.fromarray(np.array([[0, 32768, 65535]], np.uint16))
    assert values(encode(deep))[0, :, 0].tolist() == [0, 128, 255]
    assert values(Image.fromarray(np.array([[0.0, 0.5, 1.0]], np.float32)))[0, :, 0].tolist() == [0, 128, 255]
    assert values(Image.fromarray(np.array([[0.0, 255.0]], np.float32)))[0, :, 0].tolist() == [0, 255]


def test_cmyk_ycbcr_and_formats() -> None:
    assert values(encode(Image.new("CMYK", (8, 8), (0, 0, 0, 0)), "JPEG"))[0, 0].tolist() == [255, 255, 255]
    assert np.abs(values(Image.new("YCbCr", (1, 1), (128, 128, 128)))[0, 0].astype(int) - 128).max() <= 1
    np.testing.assert_array_equal(values(encode(Image.fromarray(RGB), "WEBP", lossless=True)), RGB)
    frames = [Image.new("RGB", (4, 4), c) for c in ("red", "blue")]
    assert values(encode(frames[0], "GIF", save_all=True, append_images=frames[1:]))[0, 0].tolist() == [255, 0, 0]


def test_arrays() -> None:
    assert values(np.array([[7]], np.uint8))[0, 0].tolist() == [7, 7, 7]
    assert values(np.array([[[7]]], np.uint8))[0, 0].tolist() == [7, 7, 7]
    np.testing.assert_array_equal(values(RGB.astype(np.float32) / 255), RGB)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((2, 2, 2), np.uint8), "shape"),
        (np.zeros((0, 2, 3), np.uint8), "at least one pixel"),
        (np.full((2, 2), 2.0), "outside 0..1"),
        (np.full((2, 2), np.nan), "outside 0..1"),
        (np.zeros((2, 2), np.int32), "int32"),
        (np.zeros(4, np.uint8), "shape"),
    ],
)
def test_bad_arrays(array: np.ndarray, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_image(array)


def test_bad_files(tmp_path: Path) -> None:
    text = tmp_path / "notes.png"
    text.write_text("hello")
    jpeg = encode(Image.effect_noise((200, 200), 90).convert("RGB"), "JPEG")
    cut = tmp_path / "cut.jpg"
    cut.write_bytes(jpeg[: len(jpeg) // 2])
    (tmp_path / "cut.png").write_bytes(encode(Image.effect_noise((200, 200), 90))[:3000])
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "header.png").write_bytes(encode(Image.fromarray(RGB))[:20])
    (tmp_path / "picture.eps").write_bytes(encode(Image.fromarray(RGB), "EPS"))
    (tmp_path / "short.bmp").write_bytes(encode(Image.fromarray(RGB), "BMP")[:-10])
    for name, message in {
        "header.png": "damaged or truncated",
        "picture.eps": "EPS",
        "short.bmp": "damaged or truncated",
        "a" * 300: "cannot be read",
        "notes.png": "not a picture",
        "cut.jpg": "damaged or truncated",
        "cut.png": "damaged or truncated",
        "empty.png": "is empty",
        "absent.png": "not found",
        ".": "is a folder",
    }.items():
        with pytest.raises(InputError, match=message) as caught:
            load_image(tmp_path / name)
        assert str(tmp_path / name)[:150] in str(caught.value) and "\n" not in str(caught.value)


def test_unreadable_file(tmp_path: Path) -> None:
    path = tmp_path / "secret.png"
    path.write_bytes(encode(Image.fromarray(RGB)))
    path.chmod(0)
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)  # root reads everything, nobody does not
    try:
        with pytest.raises(InputError, match="Permission denied"):
            load_image(path)
    finally:
        if root:
            os.seteuid(0)


def test_a_pipe_is_read(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.write(writer, encode(Image.fromarray(RGB)))
    os.close(writer)
    try:
        np.testing.assert_array_equal(values(f"/dev/fd/{reader}"), RGB)
    finally:
        os.close(reader)


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds next to nothing."""
    chunks = b"\x89PNG\r\n\x1a\n"
    for kind, data in ((b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)), (b"IDAT", zlib.compress(b""))):
        chunks += struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    return chunks


@pytest.mark.parametrize("filters", ["default", "error", "ignore"])
def test_bomb(filters: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same whatever the program's warnings filters; Pillow alone warns at half its limit and raises above it."""
    data = encode(Image.fromarray(RGB))
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter(filters)
        for side in (13_378, 30_000, 2**31 - 1):  # the first is one row over the limit
            with pytest.raises(InputError, match="decompression bomb"):
                load_image(png_header(side, side))
        with pytest.raises(InputError, match="13000×13800 = 179400000 pixels, expected at most 178956970"):
            monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
            load_image(png_header(13_000, 13_800))
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20)  # Pillow would warn, or raise as the filter says
        np.testing.assert_array_equal(values(data), RGB)
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 5)  # a program's stricter limit is kept
        with pytest.raises(InputError, match="expected at most 10 "):
            load_image(data)
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
        monkeypatch.setattr(image_loading, "MAX_DECODED_PIXELS", 23)
        for source in (data, Image.fromarray(RGB), RGB):
            with pytest.raises(InputError, match="6×4 = 24 pixels, expected at most 23"):
                load_image(source)
    assert not seen


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("https://example.com/a.png", "download it"),
        ("data:image/png;base64", "without a comma"),
        ("data:image/png;base64,@@@", "not valid base64"),
        ("data:image/png;base64,aGVsbG8=", "not a picture"),
        ("data:image/png,abc", "expected 'data:image"),
        ("data:image/png;base64,", "empty"),
        ("s3://bucket/a.png", "unknown scheme 's3'"),
        ("HTTP://example.com/a.png", "download it"),
        ("file:///no/such/file.png", "not found"),
        ("line\nbreak.png", "not found"),
        (b"", "empty"),
        (b"P6 0 5 255\n", "not a picture"),
        ("", "is a folder"),
        ("a\0b", "cannot be read"),
        (42, "of type int"),
        (None, "of type NoneType"),
    ],
)
def test_bad_sources(source: object, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        load_image(source)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


def test_a_closed_picture() -> None:
    image = Image.fromarray(RGB)
    image.close()
    with pytest.raises(InputError, match="damaged"):
        load_image(image)


def test_zero_size_picture() -> None:
    with pytest.raises(InputError, match="0×4"):
        load_image(Image.new("RGB", (0, 4)))
