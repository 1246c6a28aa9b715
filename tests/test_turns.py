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
from edgevl.runtime.errors import CapacityError, EngineError, InputError
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
        options: dict[str, dict[str, Any]] = {
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
        fresh = room.models[chunk]
        begins = [fresh.prepare(m).identity.tolist() for m in whole]

        def alike(earlier: int, later: int) -> int:  # leading tokens; the last one of a prompt is always computed
            equal = [a == b for a, b in zip(begins[earlier], begins[later][:-1])]
            return [*equal, False].index(False)

        # of rows that answer at once, the later ones take what they begin with from the earlier ones
        assert ask(fresh, whole) == [0, alike(0, 1), max(alike(0, 2), alike(1, 2))]
        ask(kept, [h[:1] for h in histories])
        reused = ask(kept, whole)
        assert all(r >= len(kept.prepare(h[:1]).ids) for r, h in zip(reused, histories))
        ask(kept, other)
        again = ask(kept, whole)
        assert all(a == len(kept.prepare(m).ids) - 1 for a, m in zip(again, whole))


def expect(room: Room, messages: list[dict[str, Any]], done: Any) -> None:
    assert room.check(messages) == list(done.token_ids)


def test_a_wrong_cache_would_be_seen(room: Room, monkeypatch: pytest.MonkeyPatch) -> None:
    """The matrix can fail: with pictures taken for equal, or positions off by one, the logits are far from close."""
    messages = [user("Read it.", SECOND["one"])]
    for broken in ("contents", "positions"):
        chat = room.models["whole"].chat()
        chat.send("Read it.", **split(FIRST["one"]), **GREEDY)
        chat.undo()
        with monkeypatch.context() as patch:
            if broken == "contents":  # equal ids are enough
                patch.setattr(
                    "edgevl.runtime.chat.common_prefix", lambda a, b: int((a[: len(b), 0] == b[: len(a), 0]).sum())
                )
            else:
                patch.setattr("edgevl.runtime.row.Row.position", property(lambda self: len(self.sequence)))
            chat.send("Read it.", **split(SECOND["one"]), **GREEDY)
        with pytest.raises(AssertionError):
            room.check(messages)


def test_edit(room: Room) -> None:
    chat, history = chat_to(room, "whole", "one")
    chat.send("And this?", **split(SECOND["one"]), **GREEDY)
    kept = chat.edit("How many?", **GREEDY)
    expect(room, [*history, user("How many?", SECOND["one"])], kept)
    assert kept.timings.vision_s == 0 and kept.usage.cached_images == 2
    other = chat.edit("How many?", images=OTHER["two equal"], **GREEDY)
    expect(room, [*history, user("How many?", OTHER["two equal"])], other)
    none = chat.edit("How many?", images=(), **GREEDY)
    expect(room, [*history, user("How many?")], none)
    assert len(chat.messages) == 4
    for _ in range(2):
        chat.undo()
    with pytest.raises(InputError, match="nothing was asked yet"):
        chat.edit("How many?")


def test_fork_is_independent_and_copies_late(room: Room) -> None:
    chat, history = chat_to(room, "whole", "two equal")
    branches = [chat.fork() for _ in range(2)]
    assert all(b._store is chat._store for b in branches)  # nothing was copied
    for branch, seeds in zip([chat, *branches], (FIRST, SECOND, OTHER)):
        done = branch.send("And this?", **split(seeds["one"]), **GREEDY)
        expect(room, [*history, user("And this?", seeds["one"])], done)
        assert done.usage.cached_tokens > 40
    assert len({id(b._store) for b in (chat, *branches)}) == 3
    for branch in (branches[1], chat):  # each goes on in its own past
        past = [m if m["role"] == "assistant" else None for m in branch.messages]
        seeds = OTHER if branch is branches[1] else FIRST
        messages = [*history, user("And this?", seeds["one"]), past[3], user("Again?")]
        expect(room, messages, branch.send("Again?", **GREEDY))
    chat.undo()
    assert len(branches[0].messages) == 4  # the others' messages are theirs


def test_a_fork_outlives_its_origin_without_a_copy(room: Room) -> None:
    chat, history = chat_to(room, "whole", "one")
    branch, store = chat.fork(), chat._store
    del chat
    done = branch.send("And this?", **GREEDY)
    expect(room, [*history, user("And this?")], done)
    assert branch._store is store


def test_a_stream_that_is_left(room: Room) -> None:
    chat, history = chat_to(room, "whole", "one")
    left = chat.stream("And this?", **split(SECOND["one"]), **GREEDY)
    next(left)
    left.close()
    assert len(chat.messages) == 2
    done = chat.send("And this?", **split(SECOND["one"]), **GREEDY)
    expect(room, [*history, user("And this?", SECOND["one"])], done)
    assert done.usage.cached_tokens == done.usage.prompt_tokens - 1  # what it had computed was kept


def test_a_second_question_ends_the_first(room: Room) -> None:
    chat, history = chat_to(room, "whole", "one")
    first = chat.stream("And this?", **split(SECOND["one"]), **GREEDY)
    next(first)
    branch = chat.fork()
    done = chat.send("How many?", **GREEDY)
    expect(room, [*history, user("How many?")], done)
    with pytest.raises(InputError, match="left for a later question"):
        next(first)
    expect(room, [*history, user("And now?")], branch.send("And now?", **GREEDY))
    assert [len(c.messages) for c in (chat, branch)] == [4, 4]


def test_a_failed_answer_is_not_built_upon(room: Room, monkeypatch: pytest.MonkeyPatch) -> None:
    """NaN in the cache must not be reused, by the chat or by the prefix cache."""
    for name in ("whole", "whole kept"):
        chat, history = chat_to(room, name, "one")
        bad = room.models[name].encode_image(SECOND["one"][0])
        bad = type(bad)(**{**vars(bad), "embeds": np.full_like(bad.embeds, np.nan)})  # under its right key
        with pytest.raises(EngineError, match=r"(?i)nan"):
            chat.send("And this?", images=[bad], **GREEDY)
        assert len(chat.messages) == 2
        done = chat.send("And this?", **split(SECOND["one"]), **GREEDY)
        expect(room, [*history, user("And this?", SECOND["one"])], done)
        assert done.usage.cached_tokens < done.usage.prompt_tokens - 12


def sizes(model: VisionLanguageModel, messages: list[dict[str, Any]]) -> int:
    return len(model.prepare(messages, check_length=False).ids)


def test_full_refuses_with_numbers(room: Room, tiny: Pair) -> None:
    first, second = user("Read it.", FIRST["one"]), user("And this?", SECOND["one"])
    with VisionLanguageModel.open(tiny.bundle, "ort-cpu", threads=1, capacity=80) as model:
        chat = model.chat()
        said = chat.send("Read it.", **split(FIRST["one"]), **GREEDY)
        length = sizes(model, [first, answer(said.text), second])
        assert length > 80
        with pytest.raises(CapacityError, match=f"the prompt is {length} tokens, {length - 79} more") as caught:
            chat.send("And this?", **split(SECOND["one"]), **GREEDY)
        assert "on_full drop-oldest-turn" in str(caught.value) and "24 tokens are pictures" in str(caught.value)
        assert len(chat.messages) == 2 and chat.undo()  # and it goes on
        expect(room, [second], chat.send("And this?", **split(SECOND["one"]), **GREEDY))


def test_a_video_that_does_not_fit_drops_turns_too(room: Room, tiny: Pair) -> None:
    """It is fitted to what the conversation leaves; where that is nothing, the conversation gives way."""
    history = first_turn(room, "two equal")
    text = sizes(room.models["whole"], [*history, user("And this?")])
    with VisionLanguageModel.open(tiny.bundle, "ort-cpu", threads=1, capacity=text + 5) as model:
        chat = model.chat(on_full="drop-oldest-turn")
        chat.send("Read it.", **split(FIRST["two equal"]), **GREEDY)
        done = chat.send("And this?", **split(SECOND["video"]), **GREEDY)
        expect(room, [user("And this?", SECOND["video"])], done)
        assert chat.dropped_turns == 1 and len(chat.messages) == 2
        refusing = model.chat()
        refusing.send("Read it.", **split(FIRST["two equal"]), **GREEDY)
        with pytest.raises(CapacityError):
            refusing.send("And this?", **split(SECOND["video"]), **GREEDY)
        assert len(refusing.messages) == 2


@pytest.mark.parametrize("system", [None, "Be brief."])
def test_full_drops_the_oldest_turn(room: Room, tiny: Pair, system: str | None) -> None:
    """The answer is the reference's to the shortened conversation: system prompt kept, positions its own."""
    head = [] if system is None else [{"role": "system", "content": system}]
    with VisionLanguageModel.open(tiny.bundle, "ort-cpu", threads=1, capacity=170) as model:
        chat = model.chat(system, on_full="drop-oldest-turn")
        turns: list[dict[str, Any]] = []
        for number, shown in enumerate([FIRST["one"], SECOND["two equal"], OTHER["two equal"], [], FIRST["one"]]):
            asked = user(f"Number {number}?", shown)
            while turns and sizes(room.models["whole"], [*head, *turns, asked]) + GREEDY["max_new_tokens"] - 1 > 170:
                del turns[:2]
            done = chat.send(f"Number {number}?", **split(shown), **GREEDY)
            expect(room, [*head, *turns, asked], done)
            turns += [asked, answer(done.text)]
            assert len(chat.messages) == len(head) + len(turns)
        assert chat.dropped_turns >= 2
        many = [picture(168, 168, s) for s in range(6)]
        with pytest.raises(CapacityError, match="shorten the prompt"):  # alone it is too long as well
            chat.send("All?", images=many, **GREEDY)
        assert len(chat.messages) == len(head) + len(turns)  # and nothing was dropped for it
        with pytest.raises(InputError, match="on_full is 'drop', expected one of refuse, drop-oldest-turn"):
            model.chat(on_full="drop")


def test_a_resent_conversation_pays_only_for_what_is_new(room: Room) -> None:
    model = room.models["whole kept"]
    assert model.prefix_cache is not None
    model.prefix_cache.clear()
    history = first_turn(room, "three unequal")
    model.generate(history[:1], **GREEDY)
    messages = [*history, user("And this?", SECOND["video"])]
    done = model.generate(messages, **GREEDY)
    expect(room, messages, done)
    assert done.usage.cached_tokens >= sizes(model, history[:1])
    last = [*messages, answer(done.text), user("More?")]
    stream = model.stream(last, **GREEDY)
    next(stream)
    stream.close()  # what it had prefilled stays
    again = model.generate(last, **GREEDY)
    expect(room, last, again)
    assert again.usage.cached_tokens == again.usage.prompt_tokens - 1
    changed = [user("Read it.", [*FIRST["three unequal"][:2], OTHER["three unequal"][2]]), *last[1:]]
    other = model.generate(changed, **GREEDY)
    expect(room, changed, other)
    # As many tokens, and the third picture another one: all before its first token is kept, nothing after it.
    assert other.usage.cached_tokens == _start_of_picture(model.prepare(changed).ids, 2)


def _start_of_picture(ids: np.ndarray, number: int) -> int:
    return int(np.flatnonzero(ids == 426)[number]) + 1  # after its vision_start


def test_a_batch_about_one_picture_prefills_it_once(room: Room) -> None:
    model = room.models["chunked kept"]
    assert model.prefix_cache is not None
    model.prefix_cache.clear()
    asked = [[user(text, FIRST["three unequal"])] for text in ("Read it.", "How many?", "Where?")]
    room.forget()
    done = model.generate_batch(asked, **GREEDY)
    for i, messages in enumerate(asked):
        assert room.check(messages, i) == list(done[i].token_ids)
    shared = _start_of_picture(model.prepare(asked[0]).ids, 2) + 12 + 1  # up to the question's first letter
    assert [d.usage.cached_tokens for d in done] == [0, shared, shared]


@pytest.mark.parametrize("chunk", [1, 5, 64])
def test_prefill_in_chunks_is_bounded(tiny: Pair, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """No call of the graph gets more than a chunk of tokens, picture embeddings or logits rows."""
    with VisionLanguageModel.open(tiny.bundle, "ort-cpu", threads=1, prefill_chunk=chunk) as model:
        seen: list[tuple[int, int, int]] = []
        graph = model.engine.prefill
        run = graph.run

        def watched(feeds: Any, cache: Any = None) -> Any:
            seen.append(tuple(feeds[n].shape[-1 if n == "input_ids" else 0] for n in _BOUNDED))
            return run(feeds, cache)

        monkeypatch.setattr(graph, "run", watched)
        model.generate([user("Read it.", FIRST["three unequal"])], max_new_tokens=1)
    assert sum(s[0] for s in seen) > 60 and max(max(s[:2]) for s in seen) == min(chunk, max(s[0] for s in seen))
    assert [s[2] for s in seen] == [0] * (len(seen) - 1) + [1]


_BOUNDED = ("input_ids", "image_embeds", "logits_rows")
