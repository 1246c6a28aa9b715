"""Conversations against transformers in fp32: every kind of turn after every other, whatever the cache holds."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Pair
from PIL import Image

from edgevl.runtime.chat import ChatSession
from edgevl.runtime.generation import VisionLanguageModel
from edgevl.runtime.row import Row

# The random model says a placeholder now and then, which the reference takes for a picture: such an answer ends there.
GREEDY: dict[str, Any] = {"max_new_tokens": 6, "eos_token_ids": (417, 419, 429, 430)}
CLOSE = 1e-3  # of logits of about ±10; a picture, position or cached token that is not the right one moves them by 0.1


@cache
def picture(width: int, height: int, seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def kinds(seed: int) -> dict[str, list[Any]]:
    """What a turn may show. Sizes are the same for every seed, contents are not."""
    return {
        "text": [],
        "one": [picture(84, 112, seed)],
        "two equal": [picture(84, 112, seed + 1), picture(84, 112, seed + 2)],
        "three unequal": [picture(168, 56, seed + 3), picture(56, 56, seed + 4), picture(84, 112, seed + 5)],
        "video": [[picture(84, 56, seed + n) for n in range(10, 15)]],
    }


FIRST, SECOND, OTHER = kinds(100), kinds(200), kinds(300)
KINDS = tuple(FIRST)


def split(shown: list[Any]) -> dict[str, list[Any]]:
    return {
        "images": [s for s in shown if not isinstance(s, list)],
        "videos": [s for s in shown if isinstance(s, list)],
    }


def user(text: str, shown: list[Any] | tuple[Any, ...] = ()) -> dict[str, Any]:
    items = [{"type": "video", "video": s} if isinstance(s, list) else {"type": "image", "image": s} for s in shown]
    return {"role": "user", "content": [*items, {"type": "text", "text": text}]}


def answer(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


def vision_of(messages: list[dict[str, Any]]) -> list[Any]:
    items = [i for m in messages if isinstance(m["content"], list) for i in m["content"]]
    return [i[i["type"]] for i in items if i["type"] != "text"]


class Room:
    """One model, the reference, and the logits behind every token chosen since `forget`."""

    def __init__(self, tiny: Pair) -> None:
        self.reference = tiny.reference()
        options = {
            "whole": {"image_cache_mb": 0},
            "chunked": {"image_cache_mb": 0, "prefill_chunk": 7},
            "whole kept": {"prefix_cache_mb": 64},
            "chunked kept": {"prefix_cache_mb": 64, "prefill_chunk": 7},
        }
        self.models = {n: VisionLanguageModel.open(tiny.bundle, "ort-cpu", threads=1, **o) for n, o in options.items()}
        self.rows: dict[Row, list[np.ndarray]] = {}
        self._known: dict[tuple, np.ndarray] = {}

    def forget(self) -> None:
        self.rows.clear()

    def expected(self, prompt: list[int], chosen: tuple[int, ...], messages: list[dict[str, Any]]) -> np.ndarray:
        """transformers' logits [steps, vocab] behind each token of `chosen`: one pass over all of it, no cache."""
        key = (tuple(prompt), chosen, tuple(map(id, vision_of(messages))))  # pictures live as long as the module
        if key not in self._known:
            threads = torch.get_num_threads()
            torch.set_num_threads(1)  # of matrices this small a second thread makes waiting
            logits = self.reference.logits([*prompt, *chosen[:-1]], vision_of(messages))
            torch.set_num_threads(threads)
            self._known[key] = logits[len(prompt) - 1 :]
        return self._known[key]

    def check(self, messages: list[dict[str, Any]], row: int = -1) -> list[int]:
        """The answer of a recorded row is the reference's: all logits of every step close, and the highest chosen."""
        prompt = self.models["whole"].prepare(messages).ids.tolist()
        ours, chosen = list(self.rows.values())[row], tuple(list(self.rows)[row].tokens)
        theirs = self.expected(prompt, chosen, messages)
        assert len(ours) == len(theirs) == len(chosen)
        assert np.abs(np.stack(ours) - theirs).max() < CLOSE
        for token, logits in zip(chosen, theirs):
            assert token == logits.argmax() or logits[token] > logits.max() - 2 * CLOSE  # a tie within what was shown
        return list(chosen)


@pytest.fixture(scope="module")
def room(tiny: Pair) -> Iterator[Room]:
    room = Room(tiny)
    accept = Row.accept

    def recorded(self: Row, logits: np.ndarray, *args: Any, **kwargs: Any) -> Any:
        room.rows.setdefault(self, []).append(logits.copy())
        return accept(self, logits, *args, **kwargs)

    patch = pytest.MonkeyPatch()
    patch.setattr(Row, "accept", recorded)
    yield room
    patch.undo()
    for model in room.models.values():
        model.close()


def first_turn(room: Room, kind: str, seeds: dict[str, list[Any]] = FIRST) -> list[dict[str, Any]]:
    """The question and the reference's answer to it."""
    question = user("Read it.", seeds[kind])
    room.forget()
    done = room.models["whole"].generate([question], **GREEDY)
    room.check([question])
    return [question, answer(done.text)]


def chat_to(room: Room, chunk: str, kind: str, **options: Any) -> tuple[ChatSession, list[dict[str, Any]]]:
    history = first_turn(room, kind)
    chat = room.models[chunk].chat(**options)
    chat.send("Read it.", **split(FIRST[kind]), **GREEDY)
    return chat, history


@pytest.mark.parametrize("chunk", ["whole", "chunked"])
@pytest.mark.parametrize("second", KINDS)
@pytest.mark.parametrize("first", KINDS)
class TestMatrix:
    """{first turn} × {second turn} × {whole, chunked prefill} × {fresh, reused, after undo} × {one row, three rows}."""

    def test_one_row(self, room: Room, first: str, second: str, chunk: str) -> None:
        chat, history = chat_to(room, chunk, first)
        messages = [*history, user("And this?", SECOND[second])]
        room.models[chunk].generate(messages, **GREEDY)
        fresh = room.check(messages)

        reused = chat.send("And this?", **split(SECOND[second]), **GREEDY)
        assert room.check(messages) == fresh and reused.usage.cached_tokens > len(vision_of(history))

        chat.undo()
        chat.send("And this?", **split(OTHER[second]), **GREEDY)  # as many tokens, other pictures
        room.check([*history, user("And this?", OTHER[second])])
        chat.undo()
        again = chat.send("And this?", **split(SECOND[second]), **GREEDY)
        assert room.check(messages) == fresh and again.usage.cached_tokens >= reused.usage.cached_tokens

    def test_three_rows(self, room: Room, first: str, second: str, chunk: str) -> None:
        rows = [(first, second), (second, first), (first, "one")]
        histories = [first_turn(room, a, seeds) for (a, _), seeds in zip(rows, (FIRST, SECOND, OTHER))]
        whole = [[*h, user("And this?", OTHER[b])] for h, (_, b) in zip(histories, rows)]
        other = [[*h, user("And this?", SECOND[b])] for h, (_, b) in zip(histories, rows)]

        def ask(model: VisionLanguageModel, conversations: list[list[dict[str, Any]]]) -> list[int]:
            room.forget()
            done = model.generate_batch(conversations, **GREEDY)
            for i, messages in enumerate(conversations):
                assert room.check(messages, i) == list(done[i].token_ids)
            return [d.usage.cached_tokens for d in done]

        kept = room.models[f"{chunk} kept"]
        assert kept.prefix_cache is not None
        kept.prefix_cache.clear()
        assert ask(room.models[chunk], whole) == [0, 0, 0]
        ask(kept, [h[:1] for h in histories])
        reused = ask(kept, whole)
        assert all(r >= len(kept.prepare(h[:1]).ids) for r, h in zip(reused, histories))
        ask(kept, other)
        again = ask(kept, whole)
        assert all(a == len(kept.prepare(m).ids) - 1 for a, m in zip(again, whole))
