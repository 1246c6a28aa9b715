"""Calibration samples are what the runtime would feed; what cannot be used is skipped and counted."""

from __future__ import annotations

import base64
import errno
import gc
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Pair
from PIL import Image

from edgevl.calibration.dataset import PROMPTS, SampleSource, read_conversations
from edgevl.runtime.errors import CheckpointError, InputError


def paint(path: Path, width: int, height: int, seed: int = 0) -> Path:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    (folder / "deep").mkdir(parents=True)
    for i, size in enumerate([(84, 56), (56, 84), (112, 84), (60, 60)]):
        paint(folder / f"{i}.png", *size, i)
    paint(folder / "deep" / "4.jpg", 90, 90, 9)
    (folder / "notes.txt").write_text("not a picture")
    return folder


def test_samples_are_the_runtimes_prompts(tiny: Pair, pictures: Path) -> None:
    conversations = read_conversations(pictures)
    source = SampleSource(tiny.checkpoint)
    with tiny.open() as model:
        for messages in conversations:
            sample, prompt = source.sample(messages), model.prepare(messages)
            np.testing.assert_array_equal(sample.ids, prompt.ids)
            np.testing.assert_array_equal(sample.positions, prompt.positions)
            assert [v.grid for v in sample.vision] == [i.grid for i in prompt.images]
            assert sample.visual.sum() == prompt.image_tokens > 0


def test_a_folder_is_asked_in_turn(pictures: Path) -> None:
    conversations = read_conversations(pictures)
    assert len(conversations) == 5
    texts = [c[0]["content"][1]["text"] for c in conversations]
    assert texts == [PROMPTS[i % len(PROMPTS)] for i in range(5)]


def test_jsonl_with_answers_and_relative_paths(tiny: Pair, pictures: Path) -> None:
    question = {"role": "user", "content": [{"type": "image", "image": "0.png"}, {"type": "image", "image": "1.png"}]}
    answer = {"role": "assistant", "content": "two pictures"}
    lines = [
        json.dumps([question]),
        json.dumps({"messages": [question, answer]}),
        "",
        json.dumps([answer | {"role": "user"}]),
    ]
    (pictures / "talk.jsonl").write_text("\n".join(lines))
    conversations = read_conversations(pictures / "talk.jsonl")
    assert len(conversations) == 3
    source = SampleSource(tiny.checkpoint)
    asked, answered, text = (source.sample(c) for c in conversations)
    assert len(asked.vision) == len(answered.vision) == 2 and not text.vision
    # the answer's tokens follow the opening of the assistant's turn
    np.testing.assert_array_equal(asked.ids, answered.ids[: len(asked.ids)])
    assert len(answered.ids) > len(asked.ids)


def test_order_is_random_and_repeatable(tiny: Pair, pictures: Path) -> None:
    source, conversations = SampleSource(tiny.checkpoint), read_conversations(pictures)
    sizes = [[len(s.ids) for s in source.samples(conversations, 5, seed)] for seed in (0, 0, 1)]
    assert sizes[0] == sizes[1] != sizes[2] and sorted(sizes[0]) == sorted(sizes[2])


def test_unusable_pictures_are_skipped_and_counted(tiny: Pair, pictures: Path) -> None:
    (pictures / "broken.png").write_bytes(b"not a picture")
    paint(pictures / "thin.png", 600, 2)
    paint(pictures / "large.png", 280, 280)
    told: list[str] = []
    source = SampleSource(tiny.checkpoint, max_tokens=70, skipped=told.append)
    assert len(source.samples(read_conversations(pictures), 50)) == 5
    assert (
        len(told) == 3
        and sum("broken.png" in t for t in told) == 1
        and sum("tokens, at most 70" in t for t in told) == 1
    )
    with pytest.raises(InputError, match=r"5 of 8 conversations can be used \(3 skipped\), expected at least 6"):
        source.samples(read_conversations(pictures), 50, least=6)


def test_max_pixels(tiny: Pair, pictures: Path) -> None:
    messages = read_conversations(pictures)[2]
    small = SampleSource(tiny.checkpoint, max_pixels=56 * 56).sample(messages)
    assert small.visual.sum() < SampleSource(tiny.checkpoint).sample(messages).visual.sum()


@pytest.fixture
def released(tiny: Pair, tmp_path: Path) -> Path:
    """The tiny checkpoint's files with the released model's limit of a picture."""
    folder = tmp_path / "released"
    shutil.copytree(tiny.checkpoint, folder)
    path = folder / "preprocessor_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "max_pixels": 12_845_056}))
    return folder


def test_photographs_are_shrunk_to_fit_and_told_of_once(released: Path, tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    for i in range(3):
        Image.new("RGB", (2400, 1800), (40 * i, 90, 120)).save(photos / f"{i}.jpg")
    paint(photos / "small.png", 84, 56)
    told, skipped = [], []
    source = SampleSource(released, skipped=skipped.append, notice=told.append)
    conversations = read_conversations(photos)
    small = source.sample(conversations[3])
    assert small.visual.sum() == 6 and not told, "nothing is said where nothing is shrunk"
    samples = source.samples(conversations, 4)
    assert len(samples) == 4 and not skipped
    large = [s for s in samples if len(s.ids) > 500]
    assert all(1650 < s.visual.sum() <= 1792 and len(s.ids) <= 2048 for s in large) and len(large) == 3
    assert len(told) == 1 and "--max-pixels" in told[0] and "1,404,928" in told[0] and "12,845,056" in told[0]
    # several share the tokens
    pair = [{"type": "image", "image": photos / f"{i}.jpg"} for i in (0, 1)]
    both = source.sample([{"role": "user", "content": [*pair, {"type": "text", "text": "Compare."}]}])
    assert 1600 < both.visual.sum() <= 1792
    # what somebody asked for is left alone, and may not fit
    own = SampleSource(released, max_pixels=12_845_056, skipped=skipped.append, notice=told.append)
    with pytest.raises(InputError, match="1 of 4 conversations can be used"):
        own.samples(conversations, 4)
    assert len(skipped) == 3 and len(told) == 1 and all("pass a smaller --max-pixels" in s for s in skipped)
    item = {"type": "image", "image": photos / "0.jpg", "max_pixels": 12_845_056}
    assert source.sample([{"role": "user", "content": [item]}]).visual.sum() > 5000


def test_pixels_on_the_disk_are_those_in_memory(
    tiny: Pair, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mapped from a file that nobody sees, also after its pictures are gone."""
    conversations = [*read_conversations(pictures), [{"role": "user", "content": "Only words."}]]
    several = [c[0]["content"][0] for c in conversations[:2]]
    conversations.append([{"role": "user", "content": several}])
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    memory = SampleSource(tiny.checkpoint).samples(conversations, 7)
    disk = SampleSource(tiny.checkpoint, scratch=scratch).samples(conversations, 7)
    shutil.rmtree(pictures)
    gc.collect()
    assert len(memory) == len(disk) == 7 and not list(scratch.iterdir())
    for a, b in zip(memory, disk):
        np.testing.assert_array_equal(a.ids, b.ids)
        assert [p.grid for p in a.vision] == [p.grid for p in b.vision]
        for ours, theirs in zip(a.vision, b.vision, strict=True):
            assert isinstance(theirs.pixel_values, np.memmap) and not theirs.pixel_values.flags.writeable
            np.testing.assert_array_equal(ours.pixel_values, theirs.pixel_values)
    words = SampleSource(tiny.checkpoint, scratch=scratch).samples([conversations[-2]], 1)
    assert not words[0].vision

    class Full:
        def write(self, _: Any) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        def close(self) -> None: ...

    monkeypatch.setattr(tempfile, "TemporaryFile", lambda **_: Full())
    content = [{"type": "image", "image": Image.new("RGB", (84, 56))}]
    with pytest.raises(CheckpointError, match=r"scratch: the disk is full; .* or pass a smaller --max-pixels"):
        SampleSource(tiny.checkpoint, scratch=scratch).samples([[{"role": "user", "content": content}]], 1)


def test_measured_positions(tiny: Pair, pictures: Path) -> None:
    """Words behind the first picture's first token: nothing of the template before it, and no picture's token."""
    source = SampleSource(tiny.checkpoint)
    several = [c[0]["content"][0] for c in read_conversations(pictures)[:2]]
    content = [several[0], {"type": "text", "text": "and"}, several[1], {"type": "text", "text": "Which?"}]
    sample = source.sample([{"role": "system", "content": "Be brief."}, {"role": "user", "content": content}])
    pad = source.config.tokens.image_token_id
    ids = sample.ids.tolist()
    expected = [i > ids.index(pad) and token != pad for i, token in enumerate(ids)]
    assert sample.measured.tolist() == expected and 0 < sum(expected) < sum(t != pad for t in ids)
    words = source.sample([{"role": "user", "content": "Only words."}])
    assert words.measured.all() and words.measured.dtype == bool


def test_separators_of_unicode_stand_inside_a_text(tmp_path: Path) -> None:
    """Only a newline ends a line, and a byte order mark is no part of the first one."""
    texts = ["one\u2028two", "a\x85b\u2029c", "plain"]
    lines = [json.dumps([{"role": "user", "content": t}], ensure_ascii=False) for t in texts]
    for name, mark, end in (("x", b"", "\n"), ("bom", b"\xef\xbb\xbf", "\n"), ("dos", b"\xef\xbb\xbf", "\r\n")):
        (tmp_path / f"{name}.jsonl").write_bytes(mark + end.join(lines).encode() + end.encode())
        found = read_conversations(tmp_path / f"{name}.jsonl")
        assert [c[0]["content"] for c in found] == texts, name


def test_every_way_to_name_a_file_is_relative_to_the_jsonl(
    tiny: Pair, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = "data:image/png;base64," + base64.b64encode((pictures / "0.png").read_bytes()).decode()
    items = [
        {"type": "image", "image": "0.png"},
        {"type": "image", "url": "0.png"},
        {"type": "image", "path": "0.png"},
        {"type": "image_url", "image_url": "0.png"},
        {"type": "image_url", "image_url": {"url": "0.png"}},
        {"type": "image_url", "image_url": {"url": data}},
        {"type": "image", "url": data.replace("data:", "DATA:")},
        {"type": "image", "image": (pictures / "0.png").as_uri()},
        {"type": "image", "base64": data.partition(",")[2]},
    ]
    lines = [json.dumps([{"role": "user", "content": [item]}]) for item in items]
    (pictures / "talk.jsonl").write_text("\n".join(lines))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    skipped: list[str] = []
    source = SampleSource(tiny.checkpoint, skipped=skipped.append)
    samples = source.samples(read_conversations(Path("..") / "pictures" / "talk.jsonl"), len(items))
    assert not skipped and len(samples) == len(items)
    for sample in samples:
        np.testing.assert_array_equal(sample.vision[0].pixel_values, samples[0].vision[0].pixel_values)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "line 1: not JSON"),
        ("3", "line 1: expected a list of messages"),
        ('[{"role": "king", "content": "x"}]', "line 1: message 1: role is 'king'"),
        ("\n\n", "empty; expected one conversation per line"),
    ],
)
def test_bad_files(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "x.jsonl").write_text(text)
    with pytest.raises(InputError, match=message):
        read_conversations(tmp_path / "x.jsonl")


def test_bad_paths(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not found; expected a folder of pictures"):
        read_conversations(tmp_path / "absent")
    with pytest.raises(InputError, match="no pictures inside"):
        read_conversations(tmp_path)
    (tmp_path / "x.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="not readable as UTF-8"):
        read_conversations(tmp_path / "x.jsonl")
