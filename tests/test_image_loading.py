"""runtime/image_loading.py: every mode holds values, every guard trips."""

from __future__ import annotations

import base64
import io
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edgevl.runtime import image_loading
from edgevl.runtime.errors import InputError
from edgevl.runtime.image_loading import load_image

RGB = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3) * 3


def encode(image: Image.Image, form: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def values(source: object) -> np.ndarray:
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
    for name, message in {
        "notes.png": "not a picture",
        "cut.jpg": "damaged or truncated",
        "cut.png": "damaged or truncated",
        "empty.png": "is empty",
        "absent.png": "not found",
        ".": "is a folder",
    }.items():
        with pytest.raises(InputError, match=message) as caught:
            load_image(tmp_path / name)
        assert str(tmp_path / name) in str(caught.value) and "\n" not in str(caught.value)


def test_unreadable_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "secret.png"
    path.write_bytes(encode(Image.fromarray(RGB)))
    path.chmod(0)
    if os.access(path, os.R_OK):  # root reads everything: let the system call fail instead

        def refuse(self: Path) -> bytes:
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(InputError, match="Permission denied"):
        load_image(path)


def test_bomb(monkeypatch: pytest.MonkeyPatch) -> None:
    bomb = encode(Image.new("1", (30000, 30000)))  # 110 kB that decode to 900 million pixels
    with pytest.raises(InputError, match="decompression bomb"):
        load_image(bomb)
    monkeypatch.setattr(image_loading, "MAX_DECODED_PIXELS", 23)
    with pytest.raises(InputError, match="6×4 = 24 pixels, expected at most 23"):
        load_image(encode(Image.fromarray(RGB)))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("https://example.com/a.png", "download it"),
        ("data:image/png;base64", "without a comma"),
        ("data:image/png;base64,@@@", "not valid base64"),
        ("data:image/png;base64,aGVsbG8=", "not a picture"),
        ("a\0b", "cannot be read"),
        (42, "of type int"),
        (None, "of type NoneType"),
    ],
)
def test_bad_sources(source: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_image(source)


def test_zero_size_picture() -> None:
    with pytest.raises(InputError, match="0×4"):
        load_image(Image.new("RGB", (0, 4)))
