"""Sizes that a message asks for, and pictures in base64: as qwen_vl_utils and transformers take them."""

from __future__ import annotations

import base64
import io
import itertools
import random
from typing import Any

import numpy as np
import pytest
from conftest import Pair
from PIL import Image
from transformers.image_utils import load_image as theirs_load
from videos import reference

from edgevl.runtime.errors import InputError
from edgevl.runtime.image_loading import load_image
from edgevl.runtime.image_processing import ImageProcessorConfig, preprocess_image, resized_size
from edgevl.runtime.picture_size import explicit_size
from edgevl.runtime.prompt import VisionInput, collect_vision
from edgevl.runtime.vision import preprocess_vision

RELEASED = ImageProcessorConfig(min_pixels=3136, max_pixels=12845056)


def picture(width: int = 84, height: int = 112, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def encoded(form: str = "PNG") -> bytes:
    file = io.BytesIO()
    picture().save(file, form)
    return file.getvalue()


def ask(**item: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [{"type": "image", **item}, {"type": "text", "text": "Read the text."}]}]


def test_explicit_sizes_equal_the_reference() -> None:
    theirs, rng = reference().smart_resize, random.Random(0)
    sides = [rng.randint(1, n) for n in (40, 300, 5000, 9000) for _ in range(700)] + [56.5, 70.0, 13.9, 14.1, 42]
    rng.shuffle(sides)
    thin = [(5, 400), (400, 5), (10, 2000), (13, 13), (1, 1), (14, 42), (98, 70)]  # 14, 42, ...: ties of the rounding
    checked = 0
    for height, width in [*itertools.pairwise(sides), *thin]:
        if max(height, width) <= 200 * min(height, width):
            assert explicit_size(height, width, 28) == theirs(height, width, factor=28), (height, width)
            checked += 1
    assert checked > 2000


@pytest.mark.parametrize("size", [(280, 140), (50, 61), (20, 20), (9, 300), (4001, 3999), (56.5, 84)])
def test_pictures_of_explicit_sizes_equal_the_reference(size: tuple[float, float]) -> None:
    """Whatever the picture's own shape, and whatever limits stand beside the size."""
    item = {"image": picture(61, 47), "resized_height": size[0], "resized_width": size[1], "max_pixels": 3136}
    fetched = reference().fetch_image(item)
    ours = preprocess_vision(collect_vision(ask(**item))[0], RELEASED)
    assert ours.resized_size == fetched.size and ours.original_size == (61, 47)
    np.testing.assert_array_equal(ours.pixel_values, preprocess_image(fetched, RELEASED).pixel_values)


def test_without_explicit_sizes_limits_hold() -> None:
    item = VisionInput("image", picture(), {"resized_height": None, "resized_width": None, "max_pixels": 84 * 56})
    assert preprocess_vision(item, RELEASED).resized_size == (56, 56)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"resized_height": 56}, "resized_height and resized_width go together; expected both or none"),
        ({"resized_width": 56}, "go together"),
        ({"resized_height": 0, "resized_width": 56}, "resized_height is 0, expected a number of 1 to 1000000 pixels"),
        ({"resized_height": 56, "resized_width": -1}, "resized_width is -1"),
        ({"resized_height": "56", "resized_width": 56}, "resized_height is '56'"),
        ({"resized_height": True, "resized_width": 56}, "resized_height is True"),
        ({"resized_height": float("nan"), "resized_width": 56}, "resized_height is nan"),
        ({"resized_height": 10**400, "resized_width": 56}, "resized_height is 1000"),
        ({"resized_height": 10, "resized_width": 2010}, "2010×10, aspect ratio 201.0; expected at most 200"),
        ({"resized_height": 56, "resized_width": 56, "max_pixels": 5}, "max_pixels is 5, expected at least 784"),
    ],
)
def test_explicit_sizes_that_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        resized_size((84, 112), RELEASED, **options)


def test_answers_about_explicit_sizes(tiny: Pair) -> None:
    """The whole way, and the cache: the size is part of what a picture is known by."""
    sized = {"resized_height": 56, "resized_width": 140}
    fetched = reference().fetch_image({"image": picture(), **sized})
    assert fetched.size == (140, 56)
    with tiny.open() as model:
        plain = model.generate(ask(image=picture()), max_new_tokens=4)
        got = model.generate(ask(image=picture(), **sized), max_new_tokens=8)
        want = model.generate(ask(image=fetched), max_new_tokens=8)
        assert got.token_ids == want.token_ids and got.usage.image_tokens == 10 != plain.usage.image_tokens
        assert got.usage.cached_images == 0
        assert model.encode_image(picture(), **sized).cached
        other = model.encode_image(picture(), resized_height=140, resized_width=56)
        assert not other.cached and other.resized_size == (56, 140)


# base64


@pytest.mark.parametrize("form", ["PNG", "JPEG"])
def test_base64_is_the_picture_that_transformers_sees(form: str) -> None:
    text = base64.b64encode(encoded(form)).decode()
    lines = base64.encodebytes(encoded(form)).decode()
    for source in (text, lines, f"data:image/{form.lower()};base64,{text}"):
        for item in ({"type": "image", "base64": source}, {"base64": source}):
            [found] = collect_vision([{"role": "user", "content": [item]}])
            assert found.kind == "image"
            np.testing.assert_array_equal(load_image(found.source), theirs_load(source))


def test_answers_about_base64(tiny: Pair) -> None:
    text = base64.b64encode(encoded()).decode()
    with tiny.open() as model:
        want = model.generate(ask(image=picture(), max_pixels=84 * 84), max_new_tokens=6)
        assert model.generate(ask(base64=text, max_pixels=84 * 84), max_new_tokens=6).token_ids == want.token_ids


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ({"base64": "no!base64"}, "not valid base64"),
        ({"base64": base64.b64encode(encoded()[:-300]).decode()}, "damaged or truncated"),
        ({"base64": base64.b64encode(b"hello").decode()}, "not a picture"),
        ({"base64": ""}, "empty; expected the bytes of a picture file"),
        ({"base64": "data:image/png,abc"}, "expected 'data:image/...;base64,'"),
        ({"base64": b"aGVsbG8="}, "message 1, item 1: base64 is a bytes, expected the picture file in base64"),
        ({"base64": None}, "base64 is None"),
        ({"base64": "aGVsbG8=", "path": "a.png"}, "exactly one of"),
        ({"type": "video", "base64": "aGVsbG8="}, "the video has"),
    ],
)
def test_base64_that_cannot_be_used(item: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        [found] = collect_vision(ask(**item))
        load_image(found.source)


def test_base64_has_the_limits_of_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgevl.runtime.image_loading.MAX_DECODED_PIXELS", 84 * 112 - 1)
    [found] = collect_vision(ask(base64=base64.b64encode(encoded()).decode()))
    with pytest.raises(InputError, match="84×112 = 9408 pixels, expected at most 9407"):
        load_image(found.source)
