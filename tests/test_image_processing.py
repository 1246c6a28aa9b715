"""runtime/image_processing.py against transformers' PIL image processor and against loops over pixels."""

from __future__ import annotations

import ast
import importlib.util
import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Optional

import numpy as np
import pytest
import torch
from checkpoints import DEMO
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import ProcessorMixin
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize as reference_resize

from edgevl.runtime.errors import CheckpointError, InputError
from edgevl.runtime.image_loading import load_image
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


def reference_processor(config: ImageProcessorConfig) -> Qwen2VLImageProcessorPil:
    size = {"shortest_edge": config.min_pixels, "longest_edge": config.max_pixels}
    return Qwen2VLImageProcessorPil(size=size, patch_size=14, temporal_patch_size=2, merge_size=2)


def reference_function(module: str, name: str, **scope: object) -> Callable:
    """One function of an installed module that itself cannot be imported here: it wants torchvision."""
    top, *parts = module.split(".")
    spec = importlib.util.find_spec(top)
    assert spec is not None and spec.submodule_search_locations is not None
    path = Path(spec.submodule_search_locations[0]).joinpath(*parts).with_suffix(".py")
    tree = ast.parse(path.read_text(encoding="utf-8"))
    [found] = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name == name]
    exec(compile(ast.Module([found], type_ignores=[]), str(path), "exec"), scope)
    return scope[name]  # type: ignore[return-value]


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
        (100_000, 500),
        (30_000, 40_000),
    ]
    # One pixel around where the rounded area meets a limit, and around halves of a tile.
    near = (41, 42, 43, 55, 56, 57, 69, 70, 71, 447, 448, 449, 3583, 3584, 3585)
    cases += [(h, w) for h in near for w in near]
    cases += [(side, ratio * side) for side in (1, 2, 7, 13, 14, 15, 27, 28, 29, 100) for ratio in (50, 150, 199, 200)]
    checked = 0
    for height, width in cases:
        if max(height, width) / min(height, width) > 200:
            continue
        for low, high in ((3136, 12845056), (784, 50176), (200704, 200704)):
            expected = reference_resize(height, width, factor=28, min_pixels=low, max_pixels=high)
            assert smart_resize(height, width, 28, low, high) == expected, (height, width, low, high)
            checked += 1
    assert checked > 15000


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.integers(1, 5000), st.integers(1, 5000), st.integers(1, 40), st.integers(1, 400))
def test_sizes_keep_their_promises(height: int, width: int, low: int, extra: int) -> None:
    ratio = max(height, width) / min(height, width)
    if ratio > 200:
        return
    min_pixels, max_pixels = low * 784, (low + extra) * 784
    rows, columns = smart_resize(height, width, 28, min_pixels, max_pixels)
    assert rows % 28 == columns % 28 == 0 and rows >= 28 and columns >= 28
    if max_pixels >= 4 * min_pixels:  # nearer limits leave no room for rounding each side to a tile
        assert rows * columns >= min_pixels
        assert rows * columns <= max_pixels or min(rows, columns) == 28  # a thin picture: one tile cannot shrink
    # Each side is off by less than one tile, so the ratio is kept as closely as tiles allow.
    scale = max(rows, columns) / max(height, width)
    assert abs(min(rows, columns) - scale * min(height, width)) <= 28 * (1 + 2 / ratio)


def test_half_rounds_to_even() -> None:
    # 42 / 28 = 1.5 -> 2, 70 / 28 = 2.5 -> 2: C's round would give 3.
    assert smart_resize(42, 70, 28, 784, 10**6) == (56, 56)


@pytest.mark.parametrize(
    "size", [(100, 200), (640, 33), (1288, 966), (28, 28), (13, 5), (56, 84), (1, 150), (333, 777), (2, 2)]
)
@pytest.mark.parametrize("config", [SMALL, RELEASED], ids=["small", "released"])
def test_pixels_equal_the_reference(size: tuple[int, int], config: ImageProcessorConfig) -> None:
    reference = reference_processor(config)
    image = picture(*size)
    expected = reference(image, return_tensors="np")
    ours = preprocess_image(image, config)
    grid = ours.grid
    assert [grid.t, grid.h, grid.w] == expected["image_grid_thw"][0].tolist()
    assert ours.pixel_values.dtype == np.float32 and ours.original_size == size
    assert ours.resized_size == (grid.w * 14, grid.h * 14)
    np.testing.assert_array_equal(ours.pixel_values, expected["pixel_values"])  # to the last bit


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(1, 600), st.integers(1, 600), st.integers(1, 20), st.integers(0, 60))
def test_pixels_equal_the_reference_at_any_size(width: int, height: int, low: int, extra: int) -> None:
    if max(height, width) / min(height, width) > 200:
        return
    config = SMALL.with_pixels(low * 784, (low + extra) * 784)
    expected = reference_processor(config)(picture(width, height), return_tensors="np")
    ours = preprocess_image(picture(width, height), config)
    np.testing.assert_array_equal(ours.pixel_values, expected["pixel_values"])


def test_several_pictures_and_modes_equal_the_reference() -> None:
    """Loading and preprocessing together, against one call of the reference on all pictures."""
    rgba = np.random.default_rng(3).integers(0, 256, (61, 75, 4), np.uint8)
    palette = picture(90, 40).convert("P", palette=Image.Palette.ADAPTIVE, colors=40)
    palette.info["transparency"] = 7
    pictures = [
        picture(100, 60),
        Image.fromarray(rgba),
        Image.fromarray(rgba).convert("LA"),
        picture(33, 47).convert("L"),
        picture(64, 64).convert("1"),
        palette,
        picture(50, 120).convert("CMYK"),
        picture(100, 60, seed=1),
        picture(29, 31).convert("YCbCr"),
    ]
    expected = reference_processor(SMALL)(pictures, return_tensors="np")
    ours = [preprocess_image(load_image(p), SMALL) for p in pictures]
    assert [[o.grid.t, o.grid.h, o.grid.w] for o in ours] == expected["image_grid_thw"].tolist()
    np.testing.assert_array_equal(np.concatenate([o.pixel_values for o in ours]), expected["pixel_values"])


@pytest.mark.parametrize("count", [1, 2, 3, 5, 6])
def test_frames_equal_the_reference_video_patches(count: int) -> None:
    """transformers' own patchify of its video processor, on frames that its PIL processor resized and normalised."""
    patchify = reference_function("transformers.models.qwen2_vl.video_processing_qwen2_vl", "patchify", torch=torch)
    frames = [picture(130, 70, seed) for seed in range(count)]
    rows, columns = reference_resize(70, 130, factor=28, min_pixels=SMALL.min_pixels, max_pixels=SMALL.max_pixels)
    processor, done = reference_processor(SMALL), []
    for frame in frames:
        pixels = np.asarray(frame.resize((columns, rows), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
        done.append(processor.normalize(processor.rescale(pixels, 1 / 255), SMALL.image_mean, SMALL.image_std))
    expected, t, h, w = patchify(None, torch.tensor(np.stack(done))[None], 14, 2, 2)
    ours = preprocess_frames(frames, SMALL)
    assert ours.grid == VisionGrid(t, h, w) and t == (count + 1) // 2
    np.testing.assert_array_equal(ours.pixel_values, expected[0].numpy())


def test_where_qwen_vl_utils_differs() -> None:
    """It lifts thin sides to one tile first, and may shrink them to nothing; otherwise the sizes are the same."""
    scope: dict = {"math": math, "MAX_RATIO": 200, "Optional": Optional, "Tuple": tuple}
    for name in ("round_by_factor", "ceil_by_factor", "floor_by_factor"):
        scope[name] = reference_function("qwen_vl_utils.vision_process", name, math=math)
    theirs = reference_function("qwen_vl_utils.vision_process", "smart_resize", **scope)
    rng = random.Random(1)
    for _ in range(2000):
        height, width = rng.randint(28, 3000), rng.randint(28, 3000)
        if 200 * min(height, width) >= max(height, width):
            ours = smart_resize(height, width, 28, 3136, 12845056)
            assert ours == theirs(height, width, 28, 3136, 12845056), (height, width)
    assert theirs(10, 2000, 28, 784, 7840) == (0, 1232)
    assert smart_resize(10, 2000, 28, 784, 7840) == (28, 420)  # transformers: 0 rows are too few, so it grows


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


def test_a_lone_minimum_lifts_the_maximum() -> None:
    config = SMALL.with_pixels(min_pixels=200000)
    assert (config.min_pixels, config.max_pixels) == (200000, 200000)
    assert SMALL.with_pixels() == SMALL and SMALL.factor == 28 and SMALL.patch_dim == 1176


@pytest.mark.parametrize("size", [(0, 10), (10, 0), (201, 1), (1, 201), (2001, 10)])
def test_impossible_sizes(size: tuple[int, int]) -> None:
    with pytest.raises(InputError, match="expected at"):
        smart_resize(*size, 28, 784, 10**6)


@pytest.mark.parametrize(
    "limits",
    [
        {"max_pixels": 783},
        {"min_pixels": 0},
        {"min_pixels": -5},
        {"min_pixels": 10**6, "max_pixels": 10**5},
        {"max_pixels": 1.5e6},
        {"max_pixels": True},
        {"max_pixels": "50176"},
    ],
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


class ImageOnlyProcessor(ProcessorMixin):
    def __init__(self, image_processor: object = None) -> None:
        super().__init__(image_processor)


def test_config_as_transformers_saves_a_whole_processor(tmp_path: Path) -> None:
    ImageOnlyProcessor(Qwen2VLImageProcessorPil.from_pretrained(DEMO)).save_pretrained(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["processor_config.json"]
    released = ImageProcessorConfig.from_folder(DEMO)
    assert ImageProcessorConfig.from_folder(tmp_path) == released
    # Both files: the nested one wins, as in transformers; without its object, the other.
    other = {**released.to_dict(), "max_pixels": 10**6}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(other))
    assert ImageProcessorConfig.from_folder(tmp_path) == released
    assert Qwen2VLImageProcessorPil.from_pretrained(tmp_path).size["longest_edge"] == released.max_pixels
    (tmp_path / "processor_config.json").write_text('{"processor_class": "Qwen2VLProcessor"}')
    assert ImageProcessorConfig.from_folder(tmp_path).max_pixels == 10**6


@pytest.mark.parametrize(
    ("changes", "limits"),
    [
        ({"size": {"min_pixels": 1000, "max_pixels": 2000}}, (1000, 2000)),
        ({"size": {"shortest_edge": 1000, "longest_edge": 2000}}, (1000, 2000)),
        ({"size": {"shortest_edge": 1000, "longest_edge": 2000}, "min_pixels": None, "max_pixels": 3000}, (1000, 3000)),
        ({"size": None, "min_pixels": 1000, "max_pixels": 2000}, (1000, 2000)),
    ],
)
def test_layouts_of_the_limits(tmp_path: Path, changes: dict, limits: tuple[int, int]) -> None:
    data = SMALL.to_dict()
    del data["min_pixels"], data["max_pixels"], data["rescale_factor"]
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({**data, **changes}))
    config = ImageProcessorConfig.from_folder(tmp_path)
    assert (config.min_pixels, config.max_pixels) == limits
    assert config.rescale_factor == 1 / 255 and config.image_std == SMALL.image_std


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patch_size": None}, "'patch_size' is missing"),
        ({"min_pixels": None}, "'min_pixels' is missing"),
        ({"min_pixels": -1}, "min_pixels is -1"),
        ({"max_pixels": 500}, "max_pixels is 500"),
        ({"merge_size": 2.0}, "merge_size is 2.0"),
        ({"image_std": [0, 1, 1]}, "image_std holds 0"),
        ({"image_mean": [0.5, 0.5]}, "image_mean is"),
        ({"image_mean": [0.5, 0.5, float("nan")]}, "image_mean holds nan"),
        ({"rescale_factor": "x"}, "rescale_factor holds"),
        ({"do_resize": False}, "do_resize is False"),
        ({"resample": 2}, "resample is 2"),
        ({"size": 5}, "size is 5"),
    ],
)
def test_bad_values_in_files(tmp_path: Path, changes: dict, message: str) -> None:
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({**SMALL.to_dict(), **changes}))
    with pytest.raises(CheckpointError, match=message) as caught:
        ImageProcessorConfig.from_folder(tmp_path)
    assert "\n" not in str(caught.value)


def test_nested_object_must_be_one(tmp_path: Path) -> None:
    (tmp_path / "processor_config.json").write_text('{"image_processor": [1]}')
    with pytest.raises(CheckpointError, match="expected a JSON object, got list"):
        ImageProcessorConfig.from_folder(tmp_path)


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
    for bad in ({"patch_size": "14"}, {"image_mean": 0.5}, {"min_pixels": 10**9}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            ImageProcessorConfig.from_dict({**SMALL.to_dict(), **bad})
    with pytest.raises(ValueError, match="expected an object"):
        ImageProcessorConfig.from_dict([])  # type: ignore[arg-type]
