"""runtime/image_processing.py against transformers' PIL image processor and against loops over pixels."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
from checkpoints import DEMO
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize as reference_resize

from edgevl.runtime.errors import CheckpointError, InputError
from edgevl.runtime.image_processing import (
    ImageProcessorConfig,
    VisionGrid,
    preprocess_frames,
    preprocess_image,
    smart_resize,
)

RELEASED = ImageProcessorConfig(min_pixels=3136, max_pixels=12845056)
SMALL = ImageProcessorConfig(min_pixels=784, max_pixels=100352)


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """Smooth structure and noise, so that filters and patch order both show."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    base = np.stack([x * 255 / max(width, 2), y * 255 / max(height, 2), (x * 7 + y * 13) % 256], -1)
    return Image.fromarray((base * 0.6 + rng.integers(0, 100, base.shape)).clip(0, 255).astype(np.uint8))


def test_sizes_equal_the_reference() -> None:
    rng = random.Random(0)
    cases = [(rng.randint(1, 4000), rng.randint(1, 4000)) for _ in range(4000)]
    cases += [(rng.randint(1, 60), rng.randint(1, 60)) for _ in range(1500)]
    cases += [
        (14, 14),
        (42, 42),
        (70, 98),
        (28, 5600),
        (5600, 28),
        (1, 200),
        (1, 1),
        (10000, 9999),
        (3, 600),
        (2479, 3508),
    ]
    checked = 0
    for height, width in cases:
        if max(height, width) / min(height, width) > 200:
            continue
        for low, high in ((3136, 12845056), (784, 50176), (200704, 200704)):
            expected = reference_resize(height, width, factor=28, min_pixels=low, max_pixels=high)
            assert smart_resize(height, width, 28, low, high) == expected, (height, width, low, high)
            checked += 1
    assert checked > 15000


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 5000), st.integers(1, 5000), st.integers(1, 40), st.integers(1, 400))
def test_sizes_keep_their_promises(height: int, width: int, low: int, extra: int) -> None:
    if max(height, width) / min(height, width) > 200:
        return
    min_pixels, max_pixels = low * 784, (low + extra) * 784
    rows, columns = smart_resize(height, width, 28, min_pixels, max_pixels)
    assert rows % 28 == columns % 28 == 0 and rows >= 28 and columns >= 28
    if height * width > max_pixels and min(rows, columns) > 28:  # growing rounds up; one tile cannot shrink
        assert rows * columns <= max_pixels


def test_half_rounds_to_even() -> None:
    # 42 / 28 = 1.5 -> 2, 70 / 28 = 2.5 -> 2: C's round would give 3.
    assert smart_resize(42, 70, 28, 784, 10**6) == (56, 56)


@pytest.mark.parametrize(
    "size", [(100, 200), (640, 33), (1288, 966), (28, 28), (13, 5), (56, 84), (1, 150), (333, 777), (2, 2)]
)
@pytest.mark.parametrize("config", [SMALL, RELEASED], ids=["small", "released"])
def test_pixels_equal_the_reference(size: tuple[int, int], config: ImageProcessorConfig) -> None:
    reference = Qwen2VLImageProcessorPil(
        size={"shortest_edge": config.min_pixels, "longest_edge": config.max_pixels},
        patch_size=14,
        temporal_patch_size=2,
        merge_size=2,
    )
    image = picture(*size)
    expected = reference(image, return_tensors="np")
    ours = preprocess_image(image, config)
    grid = ours.grid
    assert [grid.t, grid.h, grid.w] == expected["image_grid_thw"][0].tolist()
    assert ours.pixel_values.dtype == np.float32 and ours.original_size == size
    assert ours.resized_size == (grid.w * 14, grid.h * 14)
    assert np.abs(ours.pixel_values - expected["pixel_values"]).max() < 1e-6


def test_patch_order_against_loops() -> None:
    """Where every number of a 4-frame video comes from, pixel by pixel."""
    frames = [picture(56, 84, seed) for seed in range(4)]
    out = preprocess_frames(frames, SMALL)
    assert out.grid == VisionGrid(2, 6, 4)
    pixels = np.stack([np.asarray(f) for f in frames]).astype(np.float64) / 255
    mean, std = np.array(SMALL.image_mean), np.array(SMALL.image_std)
    expected = np.zeros((48, 1176))
    row = 0
    for t in range(2):
        for tile_y in range(3):
            for tile_x in range(2):
                for y in range(2):
                    for x in range(2):
                        column = 0
                        for c in range(3):
                            for frame in range(2):
                                for py in range(14):
                                    for px in range(14):
                                        top, left = (tile_y * 2 + y) * 14 + py, (tile_x * 2 + x) * 14 + px
                                        value = pixels[t * 2 + frame, top, left, c]
                                        expected[row, column] = (value - mean[c]) / std[c]
                                        column += 1
                        row += 1
    np.testing.assert_allclose(out.pixel_values, expected, atol=1e-6)


def test_odd_frames_repeat_the_last() -> None:
    frames = [picture(56, 56, seed) for seed in range(3)]
    odd, even = preprocess_frames(frames, SMALL), preprocess_frames([*frames, frames[2]], SMALL)
    assert odd.grid.t == 2
    np.testing.assert_array_equal(odd.pixel_values, even.pixel_values)


def test_a_still_is_two_equal_frames() -> None:
    still, video = preprocess_image(picture(70, 91), SMALL), preprocess_frames([picture(70, 91)] * 2, SMALL)
    np.testing.assert_array_equal(still.pixel_values, video.pixel_values)


def test_limits_per_call() -> None:
    assert preprocess_image(picture(400, 400), RELEASED, max_pixels=28 * 28 * 16).grid.tokens(2) == 16
    assert preprocess_image(picture(28, 28), RELEASED, min_pixels=28 * 28 * 9).grid.tokens(2) == 9
    # a lone max_pixels below the checkpoint's min_pixels means what it says
    assert preprocess_image(picture(400, 400), RELEASED, max_pixels=784).grid.tokens(2) == 1


def test_wrong_resize_filter_would_show() -> None:
    """The tolerance of 1e-6 separates filters: bilinear is off by five orders of magnitude."""
    image = picture(500, 300)
    ours = preprocess_image(image, SMALL, max_pixels=252 * 168)
    bilinear = preprocess_image(image.resize(ours.resized_size, Image.Resampling.BILINEAR), SMALL)
    assert bilinear.grid == ours.grid and np.abs(bilinear.pixel_values - ours.pixel_values).max() > 0.1


@pytest.mark.parametrize("size", [(0, 10), (201, 1), (1, 201)])
def test_impossible_sizes(size: tuple[int, int]) -> None:
    with pytest.raises(InputError, match="expected at"):
        smart_resize(*size, 28, 784, 10**6)


@pytest.mark.parametrize(
    "limits",
    [{"max_pixels": 783}, {"min_pixels": 0}, {"min_pixels": 10**6, "max_pixels": 10**5}, {"max_pixels": 1.5e6}],
)
def test_impossible_limits(limits: dict) -> None:
    with pytest.raises(InputError, match="pixels is"):
        preprocess_image(picture(56, 56), SMALL, **limits)


def test_frames_must_agree() -> None:
    with pytest.raises(InputError, match="28×28, 56×56"):
        preprocess_frames([picture(28, 28), picture(56, 56)], SMALL)
    with pytest.raises(InputError, match="none"):
        preprocess_frames([], SMALL)


def test_only_rgb_is_taken() -> None:
    with pytest.raises(InputError, match="mode is L"):
        preprocess_image(picture(28, 28).convert("L"), SMALL)


def test_config_files(tmp_path: Path) -> None:
    released = ImageProcessorConfig.from_folder(DEMO)
    assert ImageProcessorConfig.from_dict(json.loads(json.dumps(released.to_dict()))) == released
    Qwen2VLImageProcessorPil.from_pretrained(DEMO).save_pretrained(tmp_path)
    saved = ImageProcessorConfig.from_folder(tmp_path)
    assert (saved.min_pixels, saved.max_pixels) == (released.min_pixels, released.max_pixels)
    (tmp_path / "new").mkdir()
    inner = json.loads((tmp_path / "preprocessor_config.json").read_text())
    (tmp_path / "new" / "processor_config.json").write_text(json.dumps({"image_processor": inner}))
    assert ImageProcessorConfig.from_folder(tmp_path / "new") == saved


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"min_pixels": -1}', '{"do_resize": false}', '{"resample": 2}', '{"image_std": [0, 1, 1]}']
)
def test_bad_config_files(tmp_path: Path, content: str) -> None:
    (tmp_path / "preprocessor_config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"preprocessor_config\.json"):
        ImageProcessorConfig.from_folder(tmp_path)


def test_no_config_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no preprocessor_config"):
        ImageProcessorConfig.from_folder(tmp_path)


def test_strict_dictionary() -> None:
    data = SMALL.to_dict()
    with pytest.raises(KeyError, match="surprise"):
        ImageProcessorConfig.from_dict({**data, "surprise": 1})
    del data["max_pixels"]
    with pytest.raises(KeyError, match="expected"):
        ImageProcessorConfig.from_dict(data)
