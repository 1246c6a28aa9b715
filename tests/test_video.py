"""runtime/video.py against qwen_vl_utils: which frames, at what size; and what it adds, the fit to the KV cache."""

from __future__ import annotations

import importlib.metadata
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from videos import reference, write_video

from edgevl.runtime import video
from edgevl.runtime.errors import CapacityError, InputError
from edgevl.runtime.image_processing import ImageProcessorConfig, VisionGrid
from edgevl.runtime.mrope import position_ids
from edgevl.runtime.video import VideoOptions, frame_indices, frame_size, plan_video, smart_nframes
from edgevl.runtime.video_reading import VideoSource, open_video

RELEASED = ImageProcessorConfig(min_pixels=3136, max_pixels=12845056)
DEMO = ImageProcessorConfig(min_pixels=784, max_pixels=100352)
TILE = 28 * 28


class Frames(VideoSource):
    """Times and a size, nothing to decode."""

    def __init__(self, count: int, fps: float, size: tuple[int, int] = (640, 360), whole: bool = False) -> None:
        super().__init__("frames")
        self.times, self.fps, self.size, self.whole = np.arange(count) / fps, fps, size, whole
        self.duration = count / fps

    def read(self, indices: Sequence[int]) -> Iterator[Image.Image]:  # type: ignore[override]
        raise NotImplementedError

    def close(self) -> None:
        pass


def test_constants_are_those_of_the_installed_reference() -> None:
    theirs = reference()
    assert importlib.metadata.version("qwen-vl-utils") >= "0.0.14"
    assert (video.FPS, video.MIN_FRAMES, video.MAX_FRAMES) == (theirs.FPS, theirs.FPS_MIN_FRAMES, theirs.FPS_MAX_FRAMES)
    assert (video.MIN_TOKENS, video.MAX_TOKENS) == (theirs.VIDEO_MIN_TOKEN_NUM, theirs.VIDEO_MAX_TOKEN_NUM)
    assert video.FRAME_FACTOR == theirs.FRAME_FACTOR and video.TOTAL_TOKENS == theirs.MODEL_SEQ_LEN * 0.9


OPTIONS = st.one_of(
    st.fixed_dictionaries({}, optional={"nframes": st.integers(1, 900)}),
    st.fixed_dictionaries(
        {},
        optional={
            "fps": st.one_of(st.sampled_from([0.1, 0.5, 1, 2, 4, 30]), st.floats(0.01, 60)),
            "min_frames": st.integers(0, 64),
            "max_frames": st.integers(1, 2000),
        },
    ),
)
RATES = st.one_of(st.sampled_from([1.0, 10.0, 23.976, 24.0, 25.0, 30000 / 1001, 30.0, 60.0]), st.floats(0.2, 240))


@settings(max_examples=500, deadline=None, derandomize=True)
@given(OPTIONS, st.one_of(st.integers(1, 300), st.integers(1, 700_000)), RATES)
def test_number_of_frames_equals_the_reference(options: dict[str, Any], total: int, fps: float) -> None:
    try:
        expected = reference().smart_nframes(options, total, fps)
    except ValueError:
        with pytest.raises(InputError, match="are asked for, expected 2 to"):
            smart_nframes(VideoOptions.of(options), total, fps)
    else:
        assert smart_nframes(VideoOptions.of(options), total, fps) == expected


@settings(max_examples=500, deadline=None, derandomize=True)
@given(
    OPTIONS,
    st.one_of(st.integers(2, 300), st.integers(2, 700_000)),
    RATES,
    st.one_of(st.none(), st.floats(-5, 400)),
    st.one_of(st.none(), st.floats(-5, 4000)),
)
def test_frames_chosen_equal_the_reference(
    options: dict[str, Any], total: int, fps: float, start: float | None, end: float | None
) -> None:
    """The body of its _read_video_torchcodec and _read_video_decord, of its own functions."""
    options = options | {k: v for k, v in (("video_start", start), ("video_end", end)) if v is not None}
    theirs, source = reference(), Frames(total, fps)
    try:
        first, last, count = theirs.calculate_video_frame_range(options, total, fps)
        number = theirs.smart_nframes(options, total_frames=count, video_fps=fps)
        expected = torch.linspace(first, last, number).round().long().tolist()
    except ValueError:
        with pytest.raises(InputError):
            frame_indices(source, VideoOptions.of(options))
    else:
        assert frame_indices(source, VideoOptions.of(options)) == expected


def test_linspace_is_torchs_in_float32() -> None:
    """Exact arithmetic would differ in one video of six of this range."""
    exact = 0
    cases = [(s, s + n * 37 + s % 5, m) for s in (0, 999, 150_001) for n in range(1, 60) for m in (34, 110, 768)]
    for start, end, count in cases:
        expected = torch.linspace(start, end, count).round().long().tolist()
        assert video._linspace(start, end, count) == expected
        exact += [round(start + i * (end - start) / (count - 1)) for i in range(count)] != expected
    assert exact > 20


def reference_size(size: tuple[int, int], count: int, options: dict[str, Any]) -> tuple[int, int]:
    """(width, height) from its fetch_video, given a video of `count` frames that cost no memory."""
    theirs = reference()
    frames = torch.zeros(1, dtype=torch.uint8).expand(count, 3, size[1], size[0])
    resized: list[list[int]] = []

    def resize(video: torch.Tensor, target: list[int], **_: Any) -> torch.Tensor:
        resized.append(target)
        return torch.zeros(1)

    readers, functional = dict(theirs.VIDEO_READER_BACKENDS), theirs.transforms.functional
    theirs.VIDEO_READER_BACKENDS["torchvision"] = lambda _: (frames, {}, 2.0)
    theirs.transforms.functional = type("F", (), {"resize": staticmethod(resize)})
    try:
        theirs.fetch_video({"video": "a.mp4", **options})
    finally:
        theirs.VIDEO_READER_BACKENDS.update(readers)
        theirs.transforms.functional = functional
    [(height, width)] = resized
    return width, height


PIXELS = st.integers(4, 2000).map(lambda n: n * 700)
LIMITS = {"min_pixels": PIXELS, "max_pixels": PIXELS, "total_pixels": PIXELS.map(lambda n: n * 50)}


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    st.integers(28, 4000),
    st.integers(28, 4000),
    st.integers(1, 384).map(lambda n: 2 * n),
    st.fixed_dictionaries({}, optional=LIMITS),
)
def test_sizes_equal_the_reference(width: int, height: int, count: int, options: dict[str, Any]) -> None:
    least, most = options.get("min_pixels", 128 * TILE), options.get("max_pixels", 10**9)
    if max(width, height) > 20 * min(width, height) or most < max(least, TILE):
        return  # thin pictures, and limits that the reference asserts against
    expected = reference_size((width, height), count, options)
    if 0 in expected:
        return  # it shrinks a thin picture to nothing
    assert frame_size((width, height), count, VideoOptions.of(options), RELEASED) == expected


@pytest.mark.parametrize("size", [(320, 240), (1000, 33), (20, 20)])
def test_explicit_sizes_equal_the_reference(size: tuple[int, int]) -> None:
    options = {"resized_width": size[0], "resized_height": size[1]}
    assert frame_size((640, 480), 8, VideoOptions.of(options), RELEASED) == reference_size((640, 480), 8, options)


def test_where_the_reference_fails_a_lone_max_pixels_counts() -> None:
    with pytest.raises(AssertionError):
        reference_size((640, 480), 8, {"max_pixels": 50176})
    assert frame_size((640, 480), 8, VideoOptions(max_pixels=50176), RELEASED) == (252, 168)


def test_a_checkpoint_with_narrower_limits_keeps_them() -> None:
    """The demo model sees 784 to 100352 pixels: 128 tokens for every pair of frames would be its very limit."""
    assert frame_size((96, 64), 8, VideoOptions(), DEMO) == (84, 56)
    assert frame_size((96, 64), 8, VideoOptions(), RELEASED) == reference_size((96, 64), 8, {}) == (392, 280)
    assert frame_size((96, 64), 8, VideoOptions(min_pixels=20000), DEMO) == (196, 140)


def test_whole_file_as_the_reference_reads_it(tmp_path: Path) -> None:
    """Frames, grid and pixels of one file through both. PIL's cubic on bytes against torch's on floats: at most one
    level apart, but for the rare pixel whose overshoot one of them rounds the other way."""
    rng = np.random.default_rng(0)
    small = rng.integers(0, 256, (50, 8, 12, 3), dtype=np.uint8)
    frames = [np.asarray(Image.fromarray(s).resize((360, 240), Image.Resampling.BICUBIC)) for s in small]
    path = write_video(tmp_path / "clip.mp4", frames, fps=10)
    for options in ({"fps": 2.0}, {"nframes": 7}, {"max_frames": 5, "total_pixels": 12 * 128 * TILE}, {}):
        theirs = reference().fetch_video({"video": str(path), **options}, return_video_metadata=True)
        pixels, metadata = theirs
        with open_video(path) as source:
            plan = plan_video(source, VideoOptions.of(options), RELEASED)
            assert list(plan.indices) == metadata["frames_indices"].tolist()
            assert plan.size == (pixels.shape[3], pixels.shape[2])
            [ours] = list(video.frame_groups(source.read(plan.indices), plan.size, 100))
        difference = np.abs(np.stack([np.asarray(p, np.float32) for p in ours]).transpose(0, 3, 1, 2) - pixels.numpy())
        assert difference.max() <= 2 and (difference > 1).mean() < 1e-4


def test_lists_are_taken_whole_and_padded() -> None:
    for count, grid in ((4, 2), (5, 3), (1, 1)):
        plan = plan_video(Frames(count, 2.0, (84, 56), whole=True), VideoOptions(), DEMO)
        assert plan.indices == tuple(range(count)) and plan.grid == VisionGrid(grid, 4, 6)
    some = plan_video(Frames(100, 2.0, whole=True), VideoOptions(max_frames=9), DEMO)
    assert some.indices == tuple(torch.linspace(0, 99, 8).round().long().tolist())


def test_lists_have_the_budget_of_the_reference() -> None:
    """Its pictures go through a resize to multiples of 56 first; where that changes nothing the sizes are equal."""
    for width, height, count in ((560, 392, 4), (1120, 784, 6), (112, 224, 2), (280, 280, 3)):
        frames = [Image.new("RGB", (width, height))] * count
        expected = reference().fetch_video({"video": frames})
        with open_video(frames) as source:
            plan = plan_video(source, VideoOptions(), RELEASED)
        assert (2 * plan.grid.t, plan.size[1], plan.size[0]) == (len(expected), *expected.shape[2:])


# ---------------------------------------------------------------- varying rate


def varying(times: Sequence[float], end: float) -> Frames:
    source = Frames(len(times), len(times) / end)
    source.times, source.duration, source.constant = np.array(times), end, False
    return source


def test_varying_rate_shows_what_is_on_screen() -> None:
    """Slides: counting indices would give each the same weight however long it stood."""
    slides = varying([0, 1, 2, 3, 60, 61, 62, 63], 64)
    got = frame_indices(slides, VideoOptions(nframes=8))
    expected = []
    for t in np.linspace(0, 63, 8):  # the last slide that had begun
        expected.append(max(i for i, begin in enumerate(slides.times) if begin <= t + 1e-6))
    assert got == expected == [0, 3, 3, 3, 3, 3, 3, 7]


def test_varying_rate_counts_seconds() -> None:
    dense = varying([i / 100 for i in range(400)] + [10 + i for i in range(10)], 20)
    assert len(frame_indices(dense, VideoOptions(fps=1))) == 20  # 20 s, although most frames are in the first 4
    part = frame_indices(dense, VideoOptions(fps=1, video_start=10, video_end=15))
    assert part[0] == 400 and part[-1] == 405 and len(part) == 6


# ---------------------------------------------------------------- the fit to the KV cache


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    st.integers(2, 5000),
    st.integers(20, 2500),
    st.integers(20, 2500),
    st.integers(1, 40_000),
    st.booleans(),
    st.fixed_dictionaries({}, optional={"fps": st.floats(0.1, 30), "min_pixels": st.integers(784, 200_000)}),
)
def test_a_fitted_video_fits(
    total: int, width: int, height: int, room: int, released: bool, options: dict[str, Any]
) -> None:
    if max(width, height) > 200 * min(width, height):
        return
    config, source = (RELEASED if released else DEMO), Frames(total, 5.0, (width, height))
    free = plan_video(source, VideoOptions.of(options), config)
    try:
        plan = plan_video(source, VideoOptions.of(options), config, room)
    except CapacityError as e:
        assert room < 2 * max(width, height) / min(width, height) + 8, str(e)
        return
    assert plan.tokens == plan.grid.tokens(2) <= room and len(plan.indices) == 2 * plan.grid.t
    assert plan.size == (plan.grid.w * 14, plan.grid.h * 14)
    assert (plan == free) == (free.tokens <= room) == (plan.fitted is None)
    if plan.fitted is None:
        return
    assert plan.indices[0] == 0 and plan.indices[-1] == total - 1 and list(plan.indices) == sorted(plan.indices)
    least = math.ceil(options["min_pixels"] / TILE) if "min_pixels" in options else video.LEAST_TOKENS
    if len(plan.indices) < len(free.indices):  # frames go only once they are small
        assert room < (free.grid.t + 0) * min(max(least, 1), free.tokens // free.grid.t) or min(plan.size) == 28
    else:
        assert plan.tokens * 4 >= room or plan.tokens // plan.grid.t <= 12  # the room is used, as far as tiles go


def test_pixels_go_before_frames() -> None:
    source = Frames(2400, 2.0, (1280, 720))
    free = plan_video(source, VideoOptions(), RELEASED)
    assert len(free.indices) == 768 and free.size == (644, 336)  # 384 pairs within 115,200 tokens
    fitted = [plan_video(source, VideoOptions(), RELEASED, room) for room in (100_000, 40_000, 20_000, 8_000, 1_000)]
    assert [len(p.indices) for p in fitted] == [768, 768, 768, 500, 62]
    assert [p.tokens // p.grid.t for p in fitted] == sorted((p.tokens // p.grid.t for p in fitted), reverse=True)
    assert all("fitted to" in (p.fitted or "") and "768 frames of 644×336 would take" in p.fitted for p in fitted)  # type: ignore[operator]  # fmt: skip


def test_sizes_that_the_user_fixed_stay() -> None:
    options = VideoOptions(resized_height=280, resized_width=280)
    plan = plan_video(Frames(100, 2.0), options, RELEASED, 1000)
    assert plan.size == (280, 280) and len(plan.indices) == 20
    with pytest.raises(CapacityError, match="take 100 tokens, the KV cache has room for 99"):
        plan_video(Frames(100, 2.0), options, RELEASED, 99)
    floor = plan_video(Frames(100, 2.0, (640, 480)), VideoOptions(min_pixels=100 * TILE), RELEASED, 1000)
    assert len(floor.indices) == 20 and floor.tokens // floor.grid.t >= 75


# ---------------------------------------------------------------- long videos at the 2B shape


def test_twenty_minutes_at_the_2b_shape(tmp_path: Path) -> None:
    """1,200 s from a file: frames, grids, tokens and positions of Qwen2-VL-2B with its 32,768 positions."""
    from edgevl.runtime.config import SpecialTokens

    with open_video(write_video(tmp_path / "long.mp4", 1200, fps=1, codec="mpeg4", size=(320, 192))) as source:
        assert len(source) == 1200 and source.fps == 1 and source.times[-1] == 1199
        free = plan_video(source, VideoOptions(), RELEASED)
        assert len(free.indices) == 768 and free.grid == VisionGrid(384, 18, 30)  # 51,840 tokens: more than the model
        room = 32768 - 200
        plan = plan_video(source, VideoOptions(), RELEASED, room)
    assert len(plan.indices) == 768 and plan.indices[-1] == 1199 and 0.75 * room < plan.tokens <= room
    tokens = SpecialTokens(151655, 151656, 151652, 151653, (151645,))
    ids = np.array([1, 2, 151652, *[151656] * plan.tokens, 151653, 3, 4])
    got = position_ids(ids, [plan.grid], tokens, 2)
    h, w = plan.grid.h // 2, plan.grid.w // 2
    span = got.ids[:, 3 : 3 + plan.tokens].reshape(3, plan.grid.t, h, w)
    assert (span[0] == 3 + np.arange(384)[:, None, None]).all()  # a plain temporal index, no seconds
    assert (span[1] == 3 + np.arange(h)[:, None]).all() and (span[2] == 3 + np.arange(w)).all()
    assert got.ids[:, -1].tolist() == [3 + 384 + 2] * 3 and got.next_position == 3 + 384 + 3


def test_three_hours_are_sampled_down() -> None:
    plan = plan_video(Frames(3 * 3600 * 30, 30.0, (1920, 1080)), VideoOptions(), RELEASED)
    assert len(plan.indices) == 768 and plan.indices[-1] == 3 * 3600 * 30 - 1 and plan.tokens <= 115_200
    info = plan.info(Frames(3 * 3600 * 30, 30.0, (1920, 1080)))
    assert info.duration_s == pytest.approx(10800) and info.sample_fps == pytest.approx(768 / 10800)
    assert "768 of 324000 frames, 0.00 to 10799.97 s" in str(info)


# ---------------------------------------------------------------- options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fps": 0}, "fps is 0, expected a number above 0"),
        ({"fps": -1.5}, "fps is -1.5"),
        ({"fps": float("nan")}, "fps is nan"),
        ({"fps": "2"}, "fps is '2', expected a number"),
        ({"nframes": 0}, "nframes is 0"),
        ({"max_frames": True}, "max_frames is True"),
        ({"fps": 1, "nframes": 4}, "both fps and nframes"),
        ({"resized_height": 280}, "go together"),
        ({"min_pixels": 9000, "max_pixels": 8000}, "expected min_pixels <= max_pixels"),
        ({"speed": 2}, r"\['speed'\] are not supported"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        VideoOptions.of(options)


def test_options_that_leave_nothing() -> None:
    source = Frames(100, 10.0)
    with pytest.raises(InputError, match=r"leave no two frames; expected a part of 0 to 10\.00 s"):
        frame_indices(source, VideoOptions(video_start=9.95))
    with pytest.raises(InputError, match="leave no two frames"):
        frame_indices(source, VideoOptions(video_start=5, video_end=2))
    with pytest.raises(InputError, match="0 frames of a video of 100"):
        frame_indices(source, VideoOptions(max_frames=1))
    with pytest.raises(InputError, match="102 frames of a video of 100 are asked for, expected 2 to 100"):
        frame_indices(source, VideoOptions(nframes=101.5))
    with pytest.raises(InputError, match="max_pixels is 700, expected at least 784"):
        frame_size((64, 64), 4, VideoOptions(max_pixels=700), RELEASED)
    assert frame_indices(Frames(1, 10.0), VideoOptions()) == [0]
