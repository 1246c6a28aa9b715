"""VisionLanguageModel: messages with pictures in, text out.

    open -> encode_image / encode messages -> prefill -> decode loop -> pieces of text

Streaming is the primitive: `generate` drains a stream, `generate_batch` several rows at once, and a chat is a stream
over a cache that is kept.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from edgevl.runtime.admission import Admission, check_opening
from edgevl.runtime.bundle import Bundle
from edgevl.runtime.chat import ChatSession
from edgevl.runtime.decoding import DEFAULT_PREFILL_CHUNK, Decoder
from edgevl.runtime.engine import Engine, open_engine
from edgevl.runtime.errors import CapacityError, InputError
from edgevl.runtime.grounding import Box
from edgevl.runtime.guided import FORMS, GuideCompiler
from edgevl.runtime.image_processing import VisionGrid
from edgevl.runtime.kv_cache import KVCache
from edgevl.runtime.locate import DEFAULT_QUESTION, locate
from edgevl.runtime.mrope import position_ids
from edgevl.runtime.profile import Profile
from edgevl.runtime.prompt import PromptBuilder, VisionInput, collect_vision, load_chat_template
from edgevl.runtime.results import Completion, Piece
from edgevl.runtime.row import Row
from edgevl.runtime.sampling import GenerationConfig
from edgevl.runtime.tokenizer import GROUNDING_TOKENS, POINT_TOKENS, Tokenizer
from edgevl.runtime.ttft import PixelChoice, choose_pixels
from edgevl.runtime.vision import EncodedImage, VisionStage

__all__ = ["PreparedPrompt", "Stream", "VisionLanguageModel"]


@dataclass(frozen=True)
class PreparedPrompt:
    """A prompt ready for prefill: everything about it is known but the answer."""

    ids: np.ndarray  # int64 [S]
    positions: np.ndarray  # int64 [3, S]
    next_position: int
    images: tuple[EncodedImage, ...]
    preprocess_s: float
    vision_s: float

    @property
    def image_tokens(self) -> int:
        return sum(len(i.embeds) for i in self.images)


class Stream(Iterator[Piece]):
    """Pieces of one answer; `completion` is there when it has ended."""

    def __init__(self, pieces: Iterator[Piece], row: Row) -> None:
        self._pieces, self._row = pieces, row

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> Piece:
        return next(self._pieces)

    @property
    def completion(self) -> Completion:
        """The whole answer; runs the stream to its end if it has not been read."""
        for _ in self._pieces:
            pass
        return self._row.completion()


class VisionLanguageModel:
    """A bundle opened on an engine. Not thread-safe: one request at a time."""

    def __init__(
        self,
        bundle: Bundle,
        engine: Engine,
        capacity: int | None = None,
        prefill_chunk: int = DEFAULT_PREFILL_CHUNK,
        memory_limit: int | str | None = None,
    ) -> None:
        self.bundle, self.engine, self.config = bundle, engine, bundle.model
        self.capacity = bundle.max_tokens if capacity is None else capacity
        if not 1 <= self.capacity <= self.config.text.max_position_embeddings:
            raise InputError(
                f"capacity is {self.capacity}, expected 1 to {self.config.text.max_position_embeddings} tokens"
            )
        self._chunk = prefill_chunk
        self.tokenizer = Tokenizer.from_file(bundle.path("tokenizer.json"))
        # Grounding tokens in messages stay tokens: users refer to boxes with them, and earlier answers hold them.
        template = load_chat_template(bundle.folder)
        self._builder = PromptBuilder(self.tokenizer, template, self.config, trusted=(*GROUNDING_TOKENS, *POINT_TOKENS))
        self._admission = Admission(bundle, engine.name, prefill_chunk, memory_limit)
        self._vision = VisionStage(engine.vision, self.config, bundle.image_processor, self._admission.picture)
        ids = (self.tokenizer.token_to_id(t) for t in (*GROUNDING_TOKENS, *POINT_TOKENS))
        self._grounding_ids = frozenset(i for i in ids if i is not None)
        self._guides = GuideCompiler(self.tokenizer, self.config.text.vocab_size, self.config.tokens.eos_token_ids)

    @classmethod
    def open(
        cls,
        bundle: str | Path | Bundle,
        engine: str = "auto",
        *,
        threads: int | None = None,
        capacity: int | None = None,
        prefill_chunk: int = DEFAULT_PREFILL_CHUNK,
        verify_hashes: bool = False,
        memory_limit: int | str | None = None,
        notice: Callable[[str], None] | None = None,
    ) -> VisionLanguageModel:
        """Open a bundle folder on an engine.

        Args:
            engine: `ort-cpu`, `ort-cuda`, `tensorrt`, or `auto`, which tells `notice` what it chose and why.
            threads: worker threads; the cores that the process may use by default.
            capacity: tokens that a KV cache holds; the bundle's `max_tokens` by default.
            prefill_chunk: most prompt tokens that go through the decoder at once; bounds activation memory.
            verify_hashes: check every file's sha256 first.
            memory_limit: bytes, or "4GB", that the process may have in memory; opening and every request that would
                pass it are refused before they run, with advice. By default what the machine (or its cgroup) has
                left; "off" refuses nothing.

        Raises:
            BundleError, EngineError, InputError: see the classes.
        """
        opened = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle, verify_hashes)
        check_opening(opened, memory_limit)
        return cls(opened, open_engine(opened, engine, threads, notice), capacity, prefill_chunk, memory_limit)

    def close(self) -> None:
        self.engine.close()

    def __enter__(self) -> VisionLanguageModel:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.close()

    # ------------------------------------------------------------------ requests

    def encode_image(self, image: Any, min_pixels: int | None = None, max_pixels: int | None = None) -> EncodedImage:
        """Run a picture (path, PIL image, array, bytes) through the vision encoder; the result may stand for it in
        messages, so that asking twice about one picture encodes it once."""
        return self._vision.encode(VisionInput("image", image, {"min_pixels": min_pixels, "max_pixels": max_pixels}))

    def encode_video(self, video: Any, min_pixels: int | None = None, max_pixels: int | None = None) -> EncodedImage:
        """Like `encode_image`, for the frames of a video: a list of pictures or a folder of them."""
        return self._vision.encode(VisionInput("video", video, {"min_pixels": min_pixels, "max_pixels": max_pixels}))

    def generation_config(self, **overrides: Any) -> GenerationConfig:
        """The checkpoint's sampling defaults with `overrides` (fields of GenerationConfig) on top; `json_schema`,
        `regex` or `choices` among them become its guide (`GuideCompiler.compile`)."""
        forms = {form: overrides.pop(form, None) for form in FORMS}
        if (guide := self._guides.compile(**forms)) is not None:
            overrides["guide"] = guide
        overrides.setdefault("eos_token_ids", self.config.tokens.eos_token_ids)
        if isinstance(overrides.get("stop"), str):
            overrides["stop"] = (overrides["stop"],)
        if "stop" in overrides:
            overrides["stop"] = tuple(overrides["stop"])
        return GenerationConfig.from_defaults(self.config.generation, **overrides)

    def stream(self, messages: Sequence[dict[str, Any]], **generation: Any) -> Stream:
        """Answer `messages` token by token. `generation`: fields of GenerationConfig, one of `json_schema`, `regex` and
        `choices`, and

        ttft_budget_s: shrink the pictures until the first token is expected within so many seconds; `profile` names
            the file of measured speeds to expect it by (`choose_pixels`).
        started: when the request began (time.perf_counter), for the timings.
        """
        budget, profile = generation.pop("ttft_budget_s", None), generation.pop("profile", None)
        started = generation.pop("started", None) or time.perf_counter()
        config = self.generation_config(**generation)
        if budget is not None:
            messages = self.choose_pixels(messages, budget, profile, started).messages
        prompt = self.prepare(messages)
        return self.stream_prompt(prompt, config, self.decoder(), started=started)

    def generate(self, messages: Sequence[dict[str, Any]], **generation: Any) -> Completion:
        """Answer `messages`; see `stream`."""
        return self.stream(messages, **generation).completion

    def generate_batch(self, conversations: Sequence[Sequence[dict[str, Any]]], **generation: Any) -> list[Completion]:
        """Answer several conversations, each with its own pictures, decoding all of them together."""
        config, started = self.generation_config(**generation), time.perf_counter()
        prompts = [self.prepare(messages) for messages in conversations]
        if not prompts:
            raise InputError("a batch has no conversations; expected at least one")
        self._admission.answers(prompts, config.max_new_tokens)
        decoder = self.decoder(len(prompts))
        rows = [self._row(p, config, started, i) for i, p in enumerate(prompts)]
        for _ in self._run(decoder, rows, prompts):
            pass
        return [row.completion() for row in rows]

    def locate(
        self,
        image: Any,
        target: str,
        *,
        question: str = DEFAULT_QUESTION,
        crop: Sequence[int] | None = None,
        **generation: Any,
    ) -> list[Box]:
        """Where `target` ("the search box") is in `image`: boxes in pixels of the upright original picture, none where
        the model names none. Greedy unless a temperature is given.

        Args:
            question: how this checkpoint likes to be asked; {target} stands for the words.
            crop: (left, top, right, bottom) in pixels: look at this part only, at its full resolution. The boxes are
                still the whole picture's.

        Raises:
            InputError: no words, a question without {target}, a crop that leaves the picture.
        """
        return locate(self.generate, image, target, question, crop, **generation)

    def choose_pixels(
        self,
        messages: Sequence[dict[str, Any]],
        budget_s: float,
        profile: str | Path | Profile | None = None,
        started: float | None = None,
    ) -> PixelChoice:
        """Pictures as large as a time to first token of `budget_s` allows; see `edgevl.runtime.ttft.choose_pixels`."""

        def text_tokens(messages: list[dict[str, Any]], grids: list[VisionGrid]) -> int:
            prompt = self._builder.build(messages, grids)
            return len(prompt.input_ids) - sum(g.tokens(self.config.vision.spatial_merge_size) for g in grids)

        return choose_pixels(messages, budget_s, self.bundle, self.engine, text_tokens, profile, started)

    def chat(self, system: str | None = None) -> ChatSession:
        """A conversation that keeps its KV cache between turns."""
        return ChatSession(self, system)

    # ------------------------------------------------------------------ stages, for chats, verify and benchmarks

    def decoder(self, batch: int = 1) -> Decoder:
        """A decoder loop over a fresh cache."""
        cache = KVCache(self.engine.decoder.spec, self.capacity, batch)
        return Decoder(self.engine, self.config, cache, self._chunk)

    def prepare(self, messages: Sequence[dict[str, Any]]) -> PreparedPrompt:
        """Encode the pictures of `messages`, build the prompt and its positions.

        Raises:
            InputError: messages or pictures that cannot be used.
            CapacityError: the prompt is longer than the KV cache.
        """
        images = tuple(self._vision.encode(item) for item in collect_vision(list(messages)))
        prompt = self._builder.build(list(messages), [i.grid for i in images])
        self._check_length(len(prompt.input_ids), images)
        positions = position_ids(
            prompt.input_ids,
            [i.grid for i in images],
            self.config.tokens,
            self.config.vision.spatial_merge_size,
            self.bundle.mrope_rule,
        )
        return PreparedPrompt(
            ids=prompt.input_ids,
            positions=positions.ids,
            next_position=positions.next_position,
            images=images,
            preprocess_s=sum(i.preprocess_s for i in images),
            vision_s=sum(i.vision_s for i in images),
        )

    def stream_prompt(
        self,
        prompt: PreparedPrompt,
        config: GenerationConfig,
        decoder: Decoder,
        cached: int = 0,
        started: float | None = None,
    ) -> Stream:
        """Answer a prepared prompt whose first `cached` tokens are already in row 0 of the decoder's cache."""
        self._admission.answers([prompt], config.max_new_tokens, cached)
        row = self._row(prompt, config, time.perf_counter() if started is None else started, 0, cached)
        return Stream((piece for _, piece in self._run(decoder, [row], [prompt])), row)

    def _row(
        self, prompt: PreparedPrompt, config: GenerationConfig, started: float, index: int, cached: int = 0
    ) -> Row:
        return Row(self.tokenizer, config, prompt, self._grounding_ids, started, index, cached)

    def _run(
        self, decoder: Decoder, rows: Sequence[Row], prompts: Sequence[PreparedPrompt]
    ) -> Iterator[tuple[Row, Piece]]:
        """Prefill every row, then decode the rows that go on together; a row that ends gives its place to the last."""
        active: list[Row] = []
        for slot, (row, prompt) in enumerate(zip(rows, prompts)):
            began = time.perf_counter()
            ids = prompt.ids[row.cached :]
            placeholders = np.isin(prompt.ids[: row.cached], self._placeholder_ids).sum()
            embeds = [i.embeds for i in prompt.images]
            rest = np.concatenate(embeds)[placeholders:] if embeds else None
            logits = decoder.prefill(slot, ids, prompt.positions[:, row.cached :], rest)
            row.prefill_s = time.perf_counter() - began
            yield row, row.accept(logits, room=self._room(decoder, slot))
            active.append(row)
        active = self._compact(decoder, active)
        while active:
            began = time.perf_counter()
            ids = np.array([row.token for row in active], np.int64)
            logits = decoder.step(ids, np.array([row.position for row in active], np.int64))
            pieces = [row.accept(logits[i], room=self._room(decoder, i)) for i, row in enumerate(active)]
            elapsed = time.perf_counter() - began
            for row, piece in zip(active, pieces):
                row.decode_s += elapsed
                yield row, piece
            active = self._compact(decoder, active)

    @property
    def _placeholder_ids(self) -> tuple[int, int]:
        return self.config.tokens.image_token_id, self.config.tokens.video_token_id

    @staticmethod
    def _room(decoder: Decoder, slot: int) -> bool:
        """Whether the token just chosen could still be fed."""
        return bool(decoder.cache.lengths[slot] < decoder.cache.capacity)

    @staticmethod
    def _compact(decoder: Decoder, active: list[Row]) -> list[Row]:
        """Drop ended rows; the last row's cache moves into the gap, so that the rows stay contiguous."""
        rows = list(active)
        slot = 0
        while slot < len(rows):
            if rows[slot].finish_reason is None:
                slot += 1
                continue
            last = len(rows) - 1
            if last != slot:
                decoder.cache.move(last, slot)
                rows[slot] = rows[last]
            rows.pop()
        return rows

    def _check_length(self, length: int, images: Sequence[EncodedImage]) -> None:
        if length < self.capacity:
            return
        tokens = sum(len(i.embeds) for i in images)
        advice = []
        if tokens:
            advice.append(f"lower max_pixels ({tokens} tokens are pictures)")
        if self.capacity < self.config.text.max_position_embeddings:
            advice.append(f"open with a larger capacity (up to {self.config.text.max_position_embeddings})")
        advice.append("shorten the prompt")
        raise CapacityError(
            f"the prompt is {length} tokens, {length - self.capacity + 1} more than the KV cache of {self.capacity} "
            f"takes with an answer; {', or '.join(advice)}"
        )
