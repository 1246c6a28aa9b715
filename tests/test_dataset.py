"""Calibration samples are what the runtime would feed; what cannot be used is skipped and counted."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import Pair
from PIL import Image

from edgevl.calibration.dataset import PROMPTS, SampleSource, read_conversations
from edgevl.runtime.errors import InputError


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
