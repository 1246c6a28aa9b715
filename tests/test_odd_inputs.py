"""Numbers, names, files and checkpoints that nobody means, and some mean harm with: one line each, and no traceback."""

from __future__ import annotations

import io
import json
import os
import shutil
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import DEMO
from PIL import Image
from videos import write_video

from edgevl.runtime import cli, image_loading
from edgevl.runtime.checkpoint import Checkpoint
from edgevl.runtime.config import ModelConfig
from edgevl.runtime.errors import CheckpointError, EdgeVLError, InputError
from edgevl.runtime.image_loading import load_image
from edgevl.runtime.image_processing import ImageProcessorConfig, resized_size
from edgevl.runtime.prompt import ChatTemplate, collect_vision, load_chat_template
from edgevl.runtime.tokenizer import Tokenizer
from edgevl.runtime.video import VideoOptions
from edgevl.runtime.video_reading import list_pictures, open_video

HUGE = 10**400  # JSON can say it, and no float holds it
PROCESSOR = ImageProcessorConfig.from_folder(DEMO)


def one_line(call: Callable[[], object], kind: type[EdgeVLError] = InputError) -> str:
    """What the error says: one line, and no longer than a few."""
    with pytest.raises(kind) as caught:
        call()
    text = str(caught.value)
    assert "\n" not in text and len(text) < 600, text[:1000]
    return text


def animation(frames: int = 3) -> bytes:
    pictures = [Image.new("RGB", (50, 40), (60 * i, 0, 0)) for i in range(frames)]
    out = io.BytesIO()
    pictures[0].save(out, "GIF", save_all=True, append_images=pictures[1:])
    return out.getvalue()


# ---------------------------------------------------------------------- numbers


@pytest.mark.parametrize("name", sorted(VideoOptions.__dataclass_fields__))
@pytest.mark.parametrize("value", [HUGE, -HUGE, 1e300, float("nan")])
def test_a_video_option_that_no_float_holds(name: str, value: float) -> None:
    assert one_line(lambda: VideoOptions.of({name: value})).startswith(f"{name} is ")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"sample_fps": 1e-320}, "sample_fps is 1e-320, expected a number of 1e-06 to 1e+06"),
        ({"min_frames": -4}, "min_frames is -4, expected a number of 0 to"),
        ({"min_pixels": 10**12}, "min_pixels is 1000000000000, expected a number of 1 to"),
    ],
)
def test_video_options_out_of_range(options: dict[str, Any], said: str) -> None:
    """A list of frames whose times overflow gave Infinity in --json; frames of 10^12 pixels take all memory."""
    assert said in one_line(lambda: VideoOptions.of(options))


def test_negative_seconds_are_still_the_beginning() -> None:
    assert VideoOptions.of({"video_start": -5, "min_frames": 0}).video_start == -5


@pytest.mark.parametrize("name", ["min_pixels", "max_pixels", "resized_height"])
def test_a_picture_option_that_no_float_holds(name: str) -> None:
    options = {name: HUGE, **({"resized_width": 56} if name == "resized_height" else {})}
    assert one_line(lambda: resized_size((640, 480), PROCESSOR, **options)).startswith(f"{name} is ")


def test_a_picture_is_not_blown_up_beyond_what_one_may_have() -> None:
    said = one_line(lambda: resized_size((640, 480), PROCESSOR, min_pixels=178_956_971))
    assert said == "min_pixels is 178956971, expected at most 178956970"
    assert resized_size((640, 480), PROCESSOR, max_pixels=10**12) == (644, 476)  # means: no limit


def _walk(value: dict[str, Any], path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    found = []
    for key, inner in value.items():
        found += [(*path, key)] + (_walk(inner, (*path, key)) if isinstance(inner, dict) else [])
    return found


def _with(value: dict[str, Any], path: tuple[str, ...], new: Any) -> dict[str, Any]:
    key, *rest = path
    return value | {key: _with(value[key], tuple(rest), new) if rest else new}


CONFIG = json.loads((DEMO / "config.json").read_text(encoding="utf-8")) | {"layer_types": ["full_attention"]}
ODD = [None, True, -1, 0, 1.5, "x", [], {}, [[1]], HUGE, 1e308, float("nan"), float("inf"), 1e-320]


@pytest.mark.parametrize("path", _walk(CONFIG), ids=".".join)
def test_whatever_a_config_says_is_read_or_refused(path: tuple[str, ...]) -> None:
    for value in ODD:
        try:
            config = ModelConfig.from_hf(_with(CONFIG, path, value), {})
        except CheckpointError as e:
            assert "\n" not in str(e) and len(str(e)) < 600
        else:
            assert config.vision.intermediate_size > 0


def test_whatever_a_preprocessor_says_is_read_or_refused(tmp_path: Path) -> None:
    path = tmp_path / "preprocessor_config.json"
    said = json.loads((DEMO / path.name).read_text(encoding="utf-8"))
    said |= {"rescale_factor": 1 / 255, "size": {"shortest_edge": 3136, "longest_edge": 10**6}}
    for place in _walk(said):
        for value in [*ODD, [HUGE, 1, 1], [1e400, 1, 1], [0, 0, 0]]:
            path.write_text(json.dumps(_with(said, place, value)), encoding="utf-8")
            try:
                ImageProcessorConfig.from_folder(tmp_path)
            except CheckpointError as e:
                assert "\n" not in str(e) and len(str(e)) < 600


# ---------------------------------------------------------------------- names and files


def test_a_name_that_the_system_refuses(tmp_path: Path) -> None:
    name = "x" * 5000
    assert "cannot be read (File name too long)" in one_line(lambda: open_video(name))
    assert "cannot be read (File name too long)" in one_line(lambda: load_image(name))
    assert "cannot be read (File name too long)" in one_line(lambda: Checkpoint.open(name), CheckpointError)
    assert "cannot be read (Not a directory)" in one_line(lambda: open_video(f"{DEMO}/config.json/x"))
    gone = tmp_path / "gone"
    assert "cannot be read" in one_line(lambda: list_pictures(gone))
    assert cli.run(["run", str(DEMO), "x", "--video", name]) == 2


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names here")
def test_a_video_comes_through_a_pipe(tmp_path: Path) -> None:
    """Its bytes come once: they were asked for twice, and the second time for ever."""
    file = write_video(tmp_path / "v.mkv", 5)
    for content, frames in ((animation(), 3), (file.read_bytes(), 5)):
        pipe = tmp_path / f"pipe{frames}"
        os.mkfifo(pipe)
        found: list[int] = []

        def read(pipe: Path = pipe, found: list[int] = found) -> None:
            with open_video(pipe) as source:
                found.append(len(source))

        writer = threading.Thread(target=pipe.write_bytes, args=(content,), daemon=True)
        reader = threading.Thread(target=read, daemon=True)
        for thread in (writer, reader):
            thread.start()
        reader.join(20)
        assert found == [frames]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names here")
@pytest.mark.parametrize("opened", [load_image, open_video])
def test_a_pipe_that_does_not_end(
    opened: Callable[[Path], object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image_loading, "MAX_PIPED", 1000)
    for size, said in (
        (0, "the file is empty"),
        (1000, "not a"),
        (1001, "more than 1000 bytes came through this pipe"),
    ):
        pipe = tmp_path / f"pipe{size}"
        os.mkfifo(pipe)
        writer = threading.Thread(target=pipe.write_bytes, args=(b"x" * size,), daemon=True)
        writer.start()
        assert said in one_line(lambda pipe=pipe: opened(pipe))
        writer.join(20)


def test_a_video_of_frames_too_large_to_decode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Found in the header, before a frame is decoded, and not handed to another reader."""
    file = write_video(tmp_path / "v.mp4", 5)
    monkeypatch.setattr(image_loading, "MAX_DECODED_PIXELS", 96 * 64 - 1)
    assert "96×64 = 6144 pixels, expected at most 6143" in one_line(lambda: open_video(file))
    monkeypatch.setattr(image_loading, "MAX_DECODED_PIXELS", 50 * 40 - 1)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert "50×40 = 2000 pixels" in one_line(lambda: open_video(animation()))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # Pillow raises above twice this
    assert "too many pixels, expected at most 200" in one_line(lambda: open_video(animation()))


def test_pillows_warnings_are_not_the_users(capsys: pytest.CaptureFixture[str]) -> None:
    """They came on stderr with the path of a package, or as errors where a program has them raised."""
    array = np.arange(256, dtype=np.uint8).reshape(16, 16)
    palette = Image.fromarray(array).quantize(17)
    out = io.BytesIO()
    palette.save(out, "PNG", transparency=bytes(range(17)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        picture = load_image(out.getvalue())
    again = Image.open(io.BytesIO(out.getvalue())).convert("RGBA")
    white = Image.new("RGB", again.size, (255, 255, 255))
    white.paste(again, mask=again.getchannel("A"))
    np.testing.assert_array_equal(np.asarray(picture), np.asarray(white))
    tiff = io.BytesIO()
    Image.fromarray(np.dstack([array] * 3)).save(tiff, "TIFF", software="x" * 40)
    damaged = tiff.getvalue()[:-30]  # the tag's text lies behind the pixels
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            load_image(damaged)
        except InputError as e:
            assert "damaged" in str(e) or "not a picture" in str(e)
    assert [w for w in told if issubclass(w.category, UserWarning)] == []


# ---------------------------------------------------------------------- a checkpoint's texts

MALFORMED = ["1" * 5000, '{"a":' * 100_000, '{"chat_template": ' + "1" * 5000 + "}", "[", "null"]


@pytest.mark.parametrize("content", MALFORMED, ids=["digits", "deep", "digits inside", "open", "null"])
def test_json_that_cannot_be_read(content: str, tmp_path: Path) -> None:
    """Also a number of more digits than Python reads, and brackets deeper than it goes."""
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json", "chat_template.json"):
        (tmp_path / name).write_text(content, encoding="utf-8")
    one_line(lambda: Tokenizer.from_folder(tmp_path), CheckpointError)
    one_line(lambda: load_chat_template(tmp_path), CheckpointError)
    shutil.copy(DEMO / "tokenizer_config.json", tmp_path)
    one_line(lambda: Tokenizer.from_folder(tmp_path), CheckpointError)


@pytest.mark.parametrize("number", ["²", "9" * 5000, "-1", "1.5", ""])
def test_an_added_token_whose_number_is_none(number: str, tmp_path: Path) -> None:
    (tmp_path / "vocab.json").write_text('{"a": 0}', encoding="utf-8")
    (tmp_path / "merges.txt").write_text("", encoding="utf-8")
    said = {"added_tokens_decoder": {number: {"content": "<a>"}}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(said), encoding="utf-8")
    assert "must map ids to the added tokens" in one_line(lambda: Tokenizer.from_folder(tmp_path), CheckpointError)


def test_what_a_template_says_stays_on_one_line() -> None:
    messages = [{"role": "user", "content": "x"}]
    refused = ChatTemplate("{{ raise_exception('not\nso\n' ~ 'x' * 1000) }}")
    assert "refuses this conversation: not so xxx" in one_line(lambda: refused.render(messages))
    failing = ChatTemplate("{{ ('a\nb' * 500)[0].c.d }}")
    one_line(lambda: failing.render(messages), CheckpointError)


def test_settings_whose_names_are_no_texts() -> None:
    item = {"type": "image", "image": "a.png", 1: 2, "zoom": 3}
    assert "unknown settings [1, 'zoom']" in one_line(lambda: collect_vision([{"role": "user", "content": [item]}]))
