"""A conversation that keeps its KV cache: every turn prefills only what is new.

The whole conversation is rendered through the chat template each turn, and the cache is rewound to the longest
prefix of equal tokens and equal picture contents; so an undo, an edited history or a template that rewrites earlier
turns are right by construction, only slower.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from edgevl.runtime.results import Completion, Piece

if TYPE_CHECKING:
    from edgevl.runtime.decoding import Decoder
    from edgevl.runtime.generation import PreparedPrompt, VisionLanguageModel

__all__ = ["ChatSession", "common_prefix"]


class ChatSession:
    """One conversation of `model`; see `VisionLanguageModel.chat`."""

    def __init__(self, model: VisionLanguageModel, system: str | None = None) -> None:
        self._model, self._system = model, system
        self.messages: list[dict[str, Any]] = []
        self._decoder: Decoder | None = None
        self._prompt: PreparedPrompt | None = None  # what the cache's tokens stand for
        self._cached_ids = np.zeros(0, np.int64)
        self._last: Completion | None = None
        self.reset()

    @property
    def last(self) -> Completion | None:
        """The latest answer."""
        return self._last

    def reset(self) -> None:
        """Forget every turn (and free nothing: the cache is used again)."""
        self.messages = [] if self._system is None else [{"role": "system", "content": self._system}]
        self._last = None

    def undo(self) -> bool:
        """Take back the last question and its answer; False when there is none."""
        for i in range(len(self.messages) - 1, -1, -1):
            if self.messages[i]["role"] == "user":
                del self.messages[i:]
                return True
        return False

    def send(self, text: str, images: Sequence[Any] = (), videos: Sequence[Any] = (), **generation: Any) -> Completion:
        """Ask the next question, with pictures and videos before it; a video is what `encode_video` takes, or a message
        item with its options ({"video": ..., "fps": ...})."""
        pieces = self.stream(text, images, videos, **generation)
        while True:
            try:
                next(pieces)
            except StopIteration as end:
                return end.value

    def stream(
        self, text: str, images: Sequence[Any] = (), videos: Sequence[Any] = (), **generation: Any
    ) -> Generator[Piece, None, Completion]:
        """Like `send`, piece by piece. A stream that is left before its end leaves the conversation as it was."""
        model = self._model
        config = model.generation_config(**generation)
        content: list[dict[str, Any]] = [{"type": "image", "image": i} for i in images]
        content += [{"type": "video", **(v if isinstance(v, dict) else {"video": v})} for v in videos]
        question = {"role": "user", "content": [*content, {"type": "text", "text": text}]}
        if content:  # kept encoded for later turns; a video is fitted to what the conversation leaves
            encoded = model.encode_vision([*self.messages, question], config.max_new_tokens)[-len(content) :]
            content = [{"type": c["type"], c["type"]: e} for c, e in zip(content, encoded)]
            question = {"role": "user", "content": [*content, {"type": "text", "text": text}]}
        prompt = model.prepare([*self.messages, question])
        if self._decoder is None:
            self._decoder = model.decoder()
        cache = self._decoder.cache
        # The last token is always fed again: its logits are not kept.
        cached = min(common_prefix(self._cached_ids, self._prompt, prompt, model), len(prompt.ids) - 1)
        cache.rewind(0, cached)
        self._cached_ids, self._prompt = prompt.ids[:cached], prompt
        stream = model.stream_prompt(prompt, config, self._decoder, cached)
        yield from stream
        done = stream.completion
        # The last token was chosen but never fed.
        fed = np.concatenate([prompt.ids, np.array(done.token_ids[:-1], np.int64)])
        self._cached_ids = fed[: int(cache.lengths[0])]
        self.messages += [question, {"role": "assistant", "content": [{"type": "text", "text": done.text}]}]
        self._last = done
        return done


def common_prefix(
    cached_ids: np.ndarray, cached: PreparedPrompt | None, prompt: PreparedPrompt, model: VisionLanguageModel
) -> int:
    """How many leading tokens of `prompt` are cached: equal ids, and equal pictures behind placeholders."""
    if cached is None:
        return 0
    size = min(len(cached_ids), len(prompt.ids))
    different = np.flatnonzero(cached_ids[:size] != prompt.ids[:size])
    prefix = int(different[0]) if len(different) else size
    tokens = model.config.tokens
    slots = np.flatnonzero(np.isin(prompt.ids, (tokens.image_token_id, tokens.video_token_id)))
    start = 0
    for i, image in enumerate(prompt.images):
        if i >= len(cached.images) or cached.images[i].key != image.key:
            return min(prefix, int(slots[start]))
        start += len(image.embeds)
    return prefix
