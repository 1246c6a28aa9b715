"""Videos through the whole runtime: answers equal transformers', the cache is respected, memory stays bounded."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import DEMO
from conftest import Pair
from PIL import Image
from reference import Reference
from videos import frame, reference, write_video

from edgevl.export.exporter import ExportOptions, export_bundle
from edgevl.runtime import cli
from edgevl.runtime.bundle import Bundle
from edgevl.runtime.errors import CapacityError, InputError
from edgevl.runtime.generation import VisionLanguageModel
from edgevl.runtime.image_processing import preprocess_frames
from edgevl.runtime.prompt import VisionInput
from edgevl.runtime.video_reading import open_video
from edgevl.runtime.vision import preprocess_vision

STEPS = 6


def ask(video: Any, text: str = "Which way does the shape move?", **options: Any) -> list[dict[str, Any]]:
    content = [{"type": "video", "video": video, **options}, {"type": "text", "text": text}]
    return [{"role": "user", "content": content}]


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 frames at 10 per second, noisy so that every frame is its own."""
    rng = np.random.default_rng(0)
    noise = [rng.integers(0, 256, (8, 12, 3), dtype=np.uint8) for _ in range(60)]
    frames = [np.asarray(Image.fromarray(n).resize((144, 96), Image.Resampling.BICUBIC)) for n in noise]
    return write_video(tmp_path_factory.mktemp("clip") / "clip.mp4", frames)


@pytest.mark.parametrize(
    "options",
    [{}, {"fps": 1.5, "video_start": 1.0, "video_end": 5.0}, {"max_pixels": 5000, "nframes": 8}],
    ids=str,
)
def test_greedy_equals_transformers(tiny: Pair, clip: Path, options: dict[str, Any]) -> None:
    """On the frames that qwen_vl_utils' own functions choose."""
    theirs = reference()
    with open_video(clip) as source:
        first, last, count = theirs.calculate_video_frame_range(options, 60, 10.0)
        number = theirs.smart_nframes(options, count, 10.0)
        chosen = [round(first + i * (last - first) / (number - 1)) for i in range(number)]
        frames = list(source.read(chosen))
    processor = Bundle.open(tiny.bundle).image_processor.with_pixels(max_pixels=options.get("max_pixels"))
    expected = Reference(tiny.model, processor)
    with tiny.open() as model:
        answer = model.generate(ask(str(clip), **options), max_new_tokens=STEPS)
        ids = model.prepare(ask(str(clip), **options)).ids.tolist()
    assert list(answer.token_ids) == expected.greedy(ids, [frames], STEPS)
    [info] = answer.videos
    assert info.frames == number and info.tokens == answer.usage.image_tokens and info.total_frames == 60
    assert (info.first_s, info.last_s) == pytest.approx((chosen[0] / 10, chosen[-1] / 10))


def test_two_videos_a_picture_and_text(tiny: Pair, clip: Path) -> None:
    with open_video(clip) as source:
        a, b = list(source.read([0, 20, 39, 59])), list(source.read([0, 59]))
    picture = Image.fromarray(frame(3, (84, 56)))
    content = [
        {"type": "text", "text": "First"},
        {"type": "video", "video": str(clip), "nframes": 4},
        {"type": "video", "video": str(clip), "nframes": 2},
        {"type": "text", "text": "Which one?"},
    ]
    with tiny.open() as model:
        answer = model.generate([{"role": "user", "content": content}], max_new_tokens=STEPS)
        ids = model.prepare([{"role": "user", "content": content}]).ids.tolist()
        assert list(answer.token_ids) == tiny.reference().greedy(ids, [a, b], STEPS)
        mixed = [{"role": "user", "content": [{"type": "image", "image": picture}, *content]}]
        usage = model.generate(mixed, max_new_tokens=2).usage
        assert usage.image_tokens == answer.usage.image_tokens + 6


def test_groups_give_the_embeddings_of_the_whole(tiny: Pair, clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    item = VisionInput("video", str(clip), {"fps": 10})
    with tiny.open() as model:
        processed = model._vision.preprocess(item)
        whole = model._vision.run(processed)
        monkeypatch.setattr("edgevl.runtime.vision._PATCHES_PER_CALL", processed.grid.h * processed.grid.w * 4)
        encoded = model.encode_video(str(clip), fps=10)
        assert processed.grid.t == 30 and encoded.grid == processed.grid
        np.testing.assert_allclose(encoded.embeds, whole, atol=1e-5)
        assert encoded.key == model.encode_video(str(clip), fps=10).key


def test_preprocessing_equals_that_of_the_same_frames_as_pictures(tiny: Pair, clip: Path) -> None:
    processor = Bundle.open(tiny.bundle).image_processor
    ours = preprocess_vision(VisionInput("video", str(clip), {"nframes": 5}), processor)
    with open_video(clip) as source:
        frames = list(source.read([0, 20, 39, 59]))
    np.testing.assert_array_equal(ours.pixel_values, preprocess_frames(frames, processor).pixel_values)


# ---------------------------------------------------------------- the KV cache


def test_a_video_is_fitted_to_the_cache(tiny: Pair, clip: Path) -> None:
    notes: list[str] = []
    with tiny.open() as model:
        free = model.prepare(ask(str(clip), fps=10))
        text = len(free.ids) - free.image_tokens
        assert free.image_tokens == 30 * 15 and free.images[0].video is not None and not free.images[0].video.notes
    with tiny.open(capacity=400, notice=notes.append) as model:
        answer = model.generate(ask(str(clip), fps=10), max_new_tokens=20)
        [info] = answer.videos
        # 15 tokens a pair is as small as pictures should be: frames go
        assert info.tokens + text + 20 <= 400 and (info.frames, info.resized_size) == (44, (140, 84))
        assert info.notes == ("fitted to 342 tokens of the KV cache: 60 frames of 140×84 would take 450",)
        assert notes[-1] == f"video {info}"
        # unless the user allows smaller ones
        small = model.generate(ask(str(clip), fps=10, min_pixels=784), max_new_tokens=20).videos[0]
        assert (small.frames, small.resized_size) == (60, (112, 56))
        two = ask(str(clip), fps=10)
        two[0]["content"].insert(0, two[0]["content"][0])
        both = model.generate(two, max_new_tokens=20)
        assert sum(v.tokens for v in both.videos) + 20 < 400 and min(v.tokens for v in both.videos) > 60
        assert both.usage.prompt_tokens + 20 <= 400
    with tiny.open(capacity=130) as model, pytest.raises(CapacityError, match="KV cache has room for"):
        model.generate([*ask(str(clip)), {"role": "assistant", "content": "a" * 40}, *ask(str(clip), "b" * 30)])


def test_the_answer_of_a_fitted_video_equals_transformers(tiny: Pair, clip: Path) -> None:
    with tiny.open(capacity=200) as model:
        prompt = model.prepare(ask(str(clip), fps=10), STEPS)
        info = prompt.images[0].video
        assert info is not None and info.notes
        answer = model.generate(ask(str(clip), fps=10), max_new_tokens=STEPS)
        processor = model.bundle.image_processor
    with open_video(clip) as source:
        step = [round(i * 59 / (info.frames - 1)) for i in range(info.frames)]
        frames = [f.resize(info.resized_size, Image.Resampling.BICUBIC) for f in source.read(step)]
    ids = prompt.ids.tolist()
    assert [i.embeds.shape[0] for i in prompt.images] == [preprocess_frames(frames, processor).grid.tokens(2)]
    assert list(answer.token_ids) == Reference(tiny.model, processor).greedy(ids, [frames], STEPS)


def test_chat_takes_videos_with_options(tiny: Pair, clip: Path) -> None:
    with tiny.open(capacity=400) as model:
        chat = model.chat()
        first = chat.send("Which way?", videos=[{"video": str(clip), "nframes": 4}], max_new_tokens=4)
        assert first.videos[0].frames == 4
        second = chat.send("And here?", videos=[str(clip)], max_new_tokens=4)
        assert second.usage.cached_tokens > 60 and [v.frames for v in second.videos] == [4, 12]
        third = chat.send("And in this long one?", videos=[{"video": str(clip), "fps": 10}], max_new_tokens=4)
        assert third.videos[2].notes and third.usage.prompt_tokens <= 396
        plain = [m if m["role"] != "user" else dict(m) for m in chat.messages]
        again = model.generate(plain[:5], max_new_tokens=4)
        assert again.token_ids == third.token_ids


def test_twenty_minutes_go_through(tiny: Pair, tmp_path: Path) -> None:
    """1,200 s: 768 frames do not fit 2,048 tokens at any size worth looking at, so frames go too."""
    path = write_video(tmp_path / "long.mp4", 1200, fps=1, codec="mpeg4")
    with tiny.open() as model:
        answer = model.generate(ask(str(path)), max_new_tokens=4)
    [info] = answer.videos
    assert info.duration_s == 1200 and info.frames > 500 and info.last_s == 1199 and info.tokens <= 2044
    assert answer.usage.prompt_tokens + 4 <= 2048 and answer.usage.completion_tokens == 4


# ---------------------------------------------------------------- memory

PEAK = """
import sys, json
from edgevl.runtime import vision
from edgevl.runtime.generation import VisionLanguageModel
from edgevl.runtime.doctor import peak_rss_bytes
vision._PATCHES_PER_CALL = 512  # small groups for a small model
with VisionLanguageModel.open(sys.argv[1], "ort-cpu", threads=2) as model:
    out = model.encode_video(sys.argv[2], max_frames=100000, fps=1000, max_pixels=6000)
print(json.dumps([peak_rss_bytes(), out.embeds.nbytes, out.grid.patches]))
"""


def test_memory_does_not_grow_with_the_video(tmp_path: Path) -> None:
    """Ten times as many frames, all of them encoded. Decoded, those of the long video are 300 MB, their pixel values
    73 MB; what is kept are the tokens. (glibc is told to give large blocks back at once: what it keeps for later
    depends on threads and chance.)"""
    bundle = tmp_path / "bundle"
    export_bundle(DEMO, bundle, ExportOptions(precision="fp32"))
    pictures = [frame(i, (320, 240)) for i in range(16)]

    def peak(count: int) -> tuple[int, int, int]:
        path = write_video(tmp_path / f"{count}.mp4", [pictures[i % 16] for i in range(count)], fps=30, codec="mpeg4")
        command = [sys.executable, "-c", PEAK, str(bundle), str(path)]
        environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "100000"}
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
        most, tokens, patches = json.loads(done.stdout)
        return most, tokens, patches

    (short_peak, short_tokens, few), (long_peak, long_tokens, many) = peak(130), peak(1300)
    assert many == 10 * few == 650 * 24 and long_tokens == 10 * short_tokens
    assert long_peak - short_peak < (long_tokens - short_tokens) + 10e6


# ---------------------------------------------------------------- the command line


def test_run_with_a_video(tiny: Pair, clip: Path, capfd: pytest.CaptureFixture[str]) -> None:
    common = ["run", str(tiny.bundle), "Which way?", "--video", str(clip), "--max-new-tokens", "4"]
    assert cli.run([*common, "--engine", "ort-cpu", "--fps", "1", "--stats"]) == 0
    out, err = capfd.readouterr()
    assert "6 of 60 frames, 0.00 to 5.90 s, 140×84 pixels each, 45 tokens" in err
    assert any(line.split()[:3] == ["video", "6", "frames"] for line in err.splitlines()) and out.endswith("\n")
    assert cli.run([*common, "--engine", "ort-cpu", "--max-frames", "4", "--max-pixels", "8000", "--json"]) == 0
    data = json.loads(capfd.readouterr().out)
    assert data["videos"][0]["frames"] == 4 and data["videos"][0]["resized_size"] == [84, 56]
    assert cli.run([*common, "--engine", "ort-cpu", "--capacity", "150", "--json", "--fps", "10"]) == 0
    data = json.loads(capfd.readouterr().out)
    assert "fitted to" in data["videos"][0]["notes"][0] and data["usage"]["prompt_tokens"] <= 146


def test_chat_with_a_video(tiny: Pair, clip: Path) -> None:
    script = f"/video {clip}\nWhich way?\n/stats\n/video absent.mp4\n/video {clip.parent}\nHm?\n"
    command = [sys.executable, "-m", "edgevl.runtime", "chat", str(tiny.bundle), "--max-new-tokens", "4", "--fps", "1"]
    done = subprocess.run(command, input=script, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "6 of 60 frames" in done.stderr and "'absent.mp4': not found" in done.stderr
    assert "a video has no frames" in done.stderr  # a folder without pictures; the conversation goes on


def bad(tmp_path: Path, clip: Path) -> list[tuple[list[str], str]]:
    (tmp_path / "text.mp4").write_text("hello" * 99)
    (tmp_path / "cut.mp4").write_bytes(clip.read_bytes()[:3000])
    return [
        (["--video", str(tmp_path / "absent.mp4")], "not found; check the path of the video"),
        (["--video", str(tmp_path / "text.mp4")], "not a video"),
        (["--video", str(tmp_path / "cut.mp4")], "not a video, or cut off in its header"),
        (["--video", str(clip), "--fps", "0"], "fps is 0.0, expected a number above 0"),
        (["--video", str(clip), "--max-frames", "-3"], "max_frames is -3"),
        (["--video", str(clip), "--max-frames", "1"], "0 frames of a video of 60"),
        (["--video", "rtsp://localhost/x"], "unknown scheme 'rtsp'"),
    ]


def test_bad_videos_are_one_line_and_status_2(
    tiny: Pair, clip: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for arguments, message in bad(tmp_path, clip):
        status = cli.run(["run", str(tiny.bundle), "hi", *arguments])
        out, err = capfd.readouterr()
        errors = [line for line in err.splitlines() if line.startswith("edgevl: error:")]
        assert status == 2 and out == "" and len(errors) == 1 and message in errors[0], (arguments, err)
    monkeypatch.setitem(sys.modules, "av", None)
    assert cli.run(["run", str(tiny.bundle), "hi", "--video", str(clip)]) == 2
    assert "pip install 'edgevl[video]'" in capfd.readouterr().err


def test_options_of_pictures_are_still_checked(tiny: Pair) -> None:
    with VisionLanguageModel.open(tiny.bundle, "ort-cpu") as model:
        content = [{"type": "image", "image": Image.new("RGB", (56, 56)), "fps": 2}]
        with pytest.raises(InputError, match=r"image options \['fps'\] are not supported"):
            model.generate([{"role": "user", "content": content}])
