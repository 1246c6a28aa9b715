"""One answer being written: from logits to tokens, text and the reason to stop. Knows no engine."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import numpy as np

from edgevl.runtime.errors import EdgeVLError, EngineError
from edgevl.runtime.grounding import Box, Point, parse_grounding
from edgevl.runtime.prefix_cache import token_identity
from edgevl.runtime.results import Completion, FinishReason, Piece, Timings, Usage
from edgevl.runtime.sampling import GenerationConfig, Sampler, StopStrings
from edgevl.runtime.tokenizer import IncrementalDetokenizer, Tokenizer

if TYPE_CHECKING:
    from edgevl.runtime.answer_stream import PreparedPrompt

__all__ = ["Row"]

_GROWTH = 64  # tokens of an answer that have room at first


class Row:
    """State of one row of a batch.

    `token` is the last token chosen, which the next step feeds at `position`. `cached` tokens of the prompt were in
    the KV cache before.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        config: GenerationConfig,
        prompt: PreparedPrompt,
        grounding_ids: frozenset[int],
        started: float,
        index: int,
        cached: int,
    ) -> None:
        self._prompt, self.config, self._started = prompt, config, started
        seed = None if config.seed is None else config.seed + index
        self._sampler = Sampler(config, None if seed is None else np.random.default_rng(seed))
        self._detokenizer = IncrementalDetokenizer(tokenizer, keep_special=grounding_ids)
        self._stop = StopStrings(config.stop)
        self._guide = None if config.guide is None else config.guide.start()
        self._seen = np.concatenate([prompt.ids, np.zeros(_GROWTH, np.int64)])  # grows with the answer
        self._text: list[str] = []
        self.tokens: list[int] = []
        self.cached = cached
        self.drafted = self.accepted = 0  # tokens of prompt lookup
        self.finish_reason: FinishReason | None = None
        self.error: EdgeVLError | None = None  # why it was given up
        self.prefill_s = self.decode_s = self._first_token_s = 0.0

    @property
    def token(self) -> int:
        return self.tokens[-1]

    @property
    def sequence(self) -> np.ndarray:
        """Ids of the prompt and of the answer so far, int64 [S]."""
        return self._seen[: len(self._prompt.ids) + len(self.tokens)]

    @property
    def prompt_identity(self) -> np.ndarray:
        """What `token_identity` gives for the prompt, int64 [S, 3]."""
        return self._prompt.identity

    @property
    def identity(self) -> np.ndarray:
        """What `token_identity` gives for `sequence`, int64 [S, 3]."""
        return np.concatenate([self._prompt.identity, token_identity(np.array(self.tokens, np.int64))])

    @property
    def position(self) -> int:
        """M-RoPE position of `token`, the same for t, h and w."""
        return self._prompt.next_position + len(self.tokens) - 1

    def accept(self, logits: np.ndarray, room: bool) -> Piece:
        """Choose the next token from `logits` [vocab]; without `room` in the cache it is the last one."""
        prompt = len(self._prompt.ids)
        if self._guide is not None:
            logits = self._guide.mask(logits)
        token = self._sampler.next(logits, self._seen[: prompt + len(self.tokens)])
        if not self.tokens:
            self._first_token_s = time.perf_counter() - self._started
        if prompt + len(self.tokens) == len(self._seen):
            self._seen = np.concatenate([self._seen, np.zeros(len(self._seen), np.int64)])
        self._seen[prompt + len(self.tokens)] = token
        self.tokens.append(token)
        ended = token in self.config.eos_token_ids
        text, stopped = ("", False) if ended else self._stop.push(self._detokenizer.push(token))
        whole = self._guide is not None and self._guide.accept(token)  # nothing but an end token could follow
        if ended or stopped or whole:
            self.finish_reason = "stop"
        elif len(self.tokens) == self.config.max_new_tokens or not room:
            self.finish_reason = "length"
        if self.finish_reason is not None and not stopped:
            tail, stopped = self._stop.push(self._detokenizer.finish())
            text += tail + ("" if stopped else self._stop.flush())
        self._text.append(text)
        return Piece(text, token)

    def completion(self) -> Completion:
        if self.finish_reason is None:
            raise EngineError("the answer has not ended; read the stream to its end first")
        text = "".join(self._text)
        found = parse_grounding(text, [i.original_size for i in self._prompt.images])
        return Completion(
            text=text,
            token_ids=tuple(self.tokens),
            boxes=tuple(f for f in found if isinstance(f, Box)),
            points=tuple(f for f in found if isinstance(f, Point)),
            finish_reason=self.finish_reason,
            usage=Usage(
                prompt_tokens=len(self._prompt.ids),
                image_tokens=self._prompt.image_tokens,
                cached_tokens=self.cached,
                completion_tokens=len(self.tokens),
                images=len(self._prompt.images),
                cached_images=sum(i.cached for i in self._prompt.images),
                drafted_tokens=self.drafted,
                accepted_tokens=self.accepted,
            ),
            timings=Timings(
                preprocess_s=self._prompt.preprocess_s,
                vision_s=self._prompt.vision_s,
                prefill_s=self.prefill_s,
                first_token_s=self._first_token_s,
                decode_s=self.decode_s,
                decode_steps=len(self.tokens) - 1,
            ),
            videos=tuple(i.video for i in self._prompt.images if i.video is not None),
        )
