"""A conversation that keeps its KV cache: every turn prefills only what is new.

The whole conversation is rendered through the chat template each turn, and the cache is rewound to the longest
prefix of equal tokens and equal picture contents; so an undo, an edited history, a dropped turn or a template that
rewrites earlier turns are right by construction, positions included, only slower.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Generator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from edgevl.runtime.errors import CapacityError, InputError
from edgevl.runtime.prefix_cache import common_prefix
from edgevl.runtime.prompt import is_list
from edgevl.runtime.results import Completion, Piece

if TYPE_CHECKING:
    from edgevl.runtime.answer_stream import PreparedPrompt, Stream
    from edgevl.runtime.decoding import Decoder
    from edgevl.runtime.generation import VisionLanguageModel
    from edgevl.runtime.sampling import GenerationConfig
    from edgevl.runtime.vision import EncodedImage

__all__ = ["ON_FULL", "ChatSession"]

ON_FULL = ("refuse", "drop-oldest-turn")
_VISION = ("image", "video")


class _Store:
    """A decoder and what row 0 of its cache holds; forked sessions share one until either of them writes."""

    def __init__(self, decoder: Decoder, identity: np.ndarray) -> None:
        self.decoder, self.identity = decoder, identity
        self.owners: weakref.WeakSet[ChatSession] = weakref.WeakSet()


class ChatSession:
    """One conversation of `model`; see `VisionLanguageModel.chat`.

    `messages` are the turns so far, pictures encoded; `dropped_turns` counts those that `on_full` has dropped, which
    no undo brings back.
    """

    def __init__(self, model: VisionLanguageModel, system: str | None = None, on_full: str = "refuse") -> None:
        if on_full not in ON_FULL:
            raise InputError(f"on_full is {on_full!r}, expected one of {', '.join(ON_FULL)}")
        self._model, self._system, self._on_full = model, system, on_full
        self.messages: list[dict[str, Any]] = []
        self.dropped_turns = 0
        self._store: _Store | None = None
        self._stream: Stream | None = None  # the answer being read
        self._last: Completion | None = None
        self.reset()

    @property
    def last(self) -> Completion | None:
        """The latest answer."""
        return self._last

    def reset(self) -> None:
        """Forget every turn (and free nothing: the cache is used again)."""
        self._leave()
        self.messages = [] if self._system is None else [{"role": "system", "content": self._system}]
        self._last, self.dropped_turns = None, 0

    def undo(self) -> bool:
        """Take back the last question and its answer; False when there is none."""
        self._leave()
        last = self._last_question()
        if last is None:
            return False
        del self.messages[last:]
        return True

    def fork(self) -> ChatSession:
        """An independent conversation with the same past. It costs nothing until one of the two goes on, which then
        copies the used part of the KV cache."""
        other = ChatSession(self._model, self._system, self._on_full)
        other.messages = [
            m if isinstance(m["content"], str) else {**m, "content": list(m["content"])} for m in self.messages
        ]
        other.dropped_turns, other._last = self.dropped_turns, self._last
        if self._store is not None:
            other._store = self._store
            self._store.owners.add(other)
        return other

    def send(self, text: str, images: Sequence[Any] = (), videos: Sequence[Any] = (), **generation: Any) -> Completion:
        """Ask the next question, with pictures and videos before it; a video is what `encode_video` takes, or a message
        item with its options ({"video": ..., "fps": ...})."""
        return _drain(self.stream(text, images, videos, **generation))

    def edit(
        self,
        text: str,
        images: Sequence[Any] | None = None,
        videos: Sequence[Any] | None = None,
        **generation: Any,
    ) -> Completion:
        """Ask the last question in other words. It keeps its pictures and videos unless others are given (none: ())."""
        return _drain(self.stream_edit(text, images, videos, **generation))

    def stream(
        self, text: str, images: Sequence[Any] = (), videos: Sequence[Any] = (), **generation: Any
    ) -> Generator[Piece, None, Completion]:
        """Like `send`, piece by piece. A stream that is left before its end leaves the conversation as it was."""
        items = _items(images, videos)
        return (yield from self._ask(len(self.messages), text, items, generation))

    def stream_edit(
        self,
        text: str,
        images: Sequence[Any] | None = None,
        videos: Sequence[Any] | None = None,
        **generation: Any,
    ) -> Generator[Piece, None, Completion]:
        """Like `edit`, piece by piece; left before its end, the question stays what it was.

        Raises:
            InputError: nothing was asked yet.
        """
        last = self._last_question()
        if last is None:
            raise InputError("nothing was asked yet; there is no question to edit")
        items = _items(() if images is None else images, () if videos is None else videos)
        if images is None and videos is None:
            content = self.messages[last]["content"]
            items = [] if isinstance(content, str) else [i for i in content if i["type"] in _VISION]
        return (yield from self._ask(last, text, items, generation))

    def _ask(
        self, at: int, text: str, items: list[dict[str, Any]], generation: dict[str, Any]
    ) -> Generator[Piece, None, Completion]:
        """Ask in place of the messages from `at` on."""
        started, config = time.perf_counter(), self._model.generation_config(**generation)
        words = {"type": "text", "text": text}
        history, pictures, lost = self._encoded(self.messages[:at], [*items, words], config)
        history, prompt, dropped = self._fitting(history, {"role": "user", "content": [*pictures, words]}, config)
        self._leave()
        store = self._writable()
        cached = min(common_prefix(store.identity, prompt.identity), len(prompt.ids) - 1)
        store.decoder.cache.rewind(0, cached)
        store.identity = prompt.identity[:cached]
        self._stream = stream = self._model.stream_prompt(prompt, config, store.decoder, cached, started)
        try:
            for piece in stream:
                yield piece
                if self._stream is not stream:
                    raise InputError("this answer was left for a later question; fork() the conversation to have both")
        except GeneratorExit:
            if self._stream is stream:
                self._leave()
            raise
        except Exception:
            if self._stream is stream:
                self._stream = None  # what it has put into the cache since may be wrong
            raise
        self._leave()
        done = stream.completion
        question = {"role": "user", "content": [*map(_settled, pictures), words]}
        answer = {"role": "assistant", "content": [{"type": "text", "text": done.text}]}
        self.messages = [*history, question, answer]
        self.dropped_turns += lost + dropped
        self._last = done
        return done

    def _encoded(
        self, history: list[dict[str, Any]], content: list[dict[str, Any]], config: GenerationConfig
    ) -> tuple[list[dict[str, Any]], list[dict[str, Any]], int]:
        """The history that leaves room for the pictures and videos of `content`, these encoded, and how many turns
        were dropped for it. A video is fitted to what the history leaves.

        Raises:
            CapacityError: a video does not fit, however small.
        """
        count = len(content) - 1
        if not count:
            return history, [], 0
        dropped = 0
        while True:
            messages = [*history, {"role": "user", "content": content}]
            try:
                encoded = self._model.encode_vision(messages, config.max_new_tokens)[-count:]
            except CapacityError:
                shorter = _without_oldest_turn(history) if self._on_full == "drop-oldest-turn" else None
                if shorter is None:
                    raise
                history, dropped = shorter, dropped + 1
            else:
                return history, [{"type": i["type"], i["type"]: e} for i, e in zip(content, encoded)], dropped

    def _fitting(
        self, history: list[dict[str, Any]], question: dict[str, Any], config: GenerationConfig
    ) -> tuple[list[dict[str, Any]], PreparedPrompt, int]:
        """The history that goes with `question`, the prompt, and how many turns were dropped for it.

        Raises:
            CapacityError: the KV cache is full, or the question alone is too long.
        """
        model, dropped = self._model, 0
        while True:
            prompt = model.prepare([*history, question], check_length=False)
            # The answer's last token is never fed.
            fits = len(prompt.ids) + config.max_new_tokens - 1 <= model.capacity
            shorter = _without_oldest_turn(history) if self._on_full == "drop-oldest-turn" and not fits else None
            if shorter is None:
                break
            history, dropped = shorter, dropped + 1
        earlier = any(m["role"] == "user" for m in history)
        hint = "take back turns, start over, or let the oldest go (on_full drop-oldest-turn)"
        model.check_length(len(prompt.ids), prompt.image_tokens, hint if earlier else "shorten the prompt")
        # What was encoded for this question counts as its own time; `prepare` saw it encoded.
        fresh = [item[item["type"]] for item in question["content"] if item["type"] in _VISION]
        images = (*prompt.images[: len(prompt.images) - len(fresh)], *fresh)
        seconds = {name: sum(getattr(i, name) for i in images) for name in ("preprocess_s", "vision_s")}
        return history, replace(prompt, images=images, **seconds), dropped

    def _writable(self) -> _Store:
        """The store, of this session alone."""
        store = self._store
        if store is None:
            store = _Store(self._model.decoder(), np.zeros((0, 3), np.int64))
        elif len(store.owners) > 1:
            store.owners.discard(self)
            store = _Store(store.decoder.fork(), store.identity)
        store.owners.add(self)
        self._store = store
        return store

    def _leave(self) -> None:
        """Close the answer that is being read, and note what it has put into the cache."""
        stream, self._stream = self._stream, None
        if stream is None or self._store is None:
            return
        stream.close()
        self._store.identity = stream.identity[: int(self._store.decoder.cache.lengths[0])]

    def _last_question(self) -> int | None:
        places = [i for i, m in enumerate(self.messages) if m["role"] == "user"]
        return places[-1] if places else None


def _without_oldest_turn(history: list[dict[str, Any]]) -> list[dict[str, Any]] | None:
    """All but the first question and what follows it up to the next; system messages before it stay. None: no turn."""
    places = [i for i, m in enumerate(history) if m["role"] == "user"]
    if not places:
        return None
    return [*history[: places[0]], *(history[places[1] :] if len(places) > 1 else [])]


def _items(images: Sequence[Any], videos: Sequence[Any]) -> list[dict[str, Any]]:
    """Content items of a message, pictures first.

    Raises:
        InputError: one picture or video where a list is expected; letter by letter it would be many.
    """
    for name, given, one in (("images", images, "pictures"), ("videos", videos, "videos")):
        if not is_list(given):
            raise InputError(f"{name} is a {type(given).__name__}, expected a list of {one}: {name}=[...]")
    items: list[dict[str, Any]] = [{"type": "image", "image": i} for i in images]
    return [*items, *({"type": "video", **(v if isinstance(v, dict) else {"video": v})} for v in videos)]


def _settled(item: dict[str, Any]) -> dict[str, Any]:
    """A picture for later turns, which do not count its time again."""
    encoded: EncodedImage = item[item["type"]]
    return {**item, item["type"]: replace(encoded, preprocess_s=0.0, vision_s=0.0, cached=True)}


def _drain(pieces: Generator[Piece, None, Completion]) -> Completion:
    while True:
        try:
            next(pieces)
        except StopIteration as end:
            return end.value
