"""VisionLanguageModel: messages with pictures in, text out.

    open -> encode_image / encode messages -> prefill -> decode loop -> pieces of text

Streaming is the primitive: `generate` drains a stream, `generate_batch` several rows at once, and a chat is a stream
over a cache that is kept.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from edgevl.runtime.bundle import Bundle
from edgevl.runtime.chat import ChatSession
from edgevl.runtime.decode_loop import DecodeLoop
from edgevl.runtime.decoding import DEFAULT_PREFILL_CHUNK, Decoder
from edgevl.runtime.engine import DEFAULT_GPU, Engine, GpuOptions, open_engine
from edgevl.runtime.errors import CapacityError, EdgeVLError, InputError
from edgevl.runtime.image_cache import DEFAULT_IMAGE_CACHE_MB, ImageCache
from edgevl.runtime.mrope import position_ids
from edgevl.runtime.prefix_cache import PrefixCache, token_identity
from edgevl.runtime.prompt import PromptBuilder, VisionInput, collect_vision, load_chat_template
from edgevl.runtime.results import Completion, Piece
from edgevl.runtime.row import Row
from edgevl.runtime.sampling import GenerationConfig
from edgevl.runtime.tokenizer import GROUNDING_TOKENS, Tokenizer
from edgevl.runtime.vision import EncodedImage, VisionStage

__all__ = ["PreparedPrompt", "Stream", "VisionLanguageModel"]


@dataclass(frozen=True)
class PreparedPrompt:
    """A prompt ready for prefill: everything about it is known but the answer."""

    ids: np.ndarray  # int64 [S]
    positions: np.ndarray  # int64 [3, S]
    next_position: int
    identity: np.ndarray  # int64 [S, 3], see token_identity
    images: tuple[EncodedImage, ...]
    preprocess_s: float
    vision_s: float

    @property
    def image_tokens(self) -> int:
        return sum(len(i.embeds) for i in self.images)


class Stream(Iterator[Piece]):
    """Pieces of one answer; `completion` is there when it has ended."""

    def __init__(self, pieces: Generator[Piece, None, None], row: Row) -> None:
        self._pieces, self._row = pieces, row

    def __iter__(self) -> Stream:
        return self

    def close(self) -> None:
        """Leave the stream before its end."""
        self._pieces.close()

    def __next__(self) -> Piece:
        return next(self._pieces)

    @property
    def identity(self) -> np.ndarray:
        """Of the prompt and the answer so far (with prompt lookup it may be ahead of the pieces); the cache holds a
        beginning of it."""
        return self._row.identity

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
        image_cache_mb: float = DEFAULT_IMAGE_CACHE_MB,
        prefix_cache_mb: float = 0,
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
        self._builder = PromptBuilder(self.tokenizer, template, self.config, trusted=GROUNDING_TOKENS)
        for name, value in (("image_cache_mb", image_cache_mb), ("prefix_cache_mb", prefix_cache_mb)):
            if not (math.isfinite(value) and value >= 0):
                raise InputError(f"{name} is {value}, expected 0 (off) or more megabytes")
        self.image_cache = ImageCache(int(image_cache_mb * 1e6))
        self.prefix_cache = PrefixCache(int(prefix_cache_mb * 1e6)) if prefix_cache_mb else None
        self._vision = VisionStage(engine.vision, self.config, bundle.image_processor, self.image_cache)
        ids = (self.tokenizer.token_to_id(t) for t in GROUNDING_TOKENS)
        self._grounding_ids = frozenset(i for i in ids if i is not None)

    @classmethod
    def open(
        cls,
        bundle: str | Path | Bundle,
        engine: str = "auto",
        *,
        threads: int | None = None,
        capacity: int | None = None,
        prefill_chunk: int = DEFAULT_PREFILL_CHUNK,
        image_cache_mb: float = DEFAULT_IMAGE_CACHE_MB,
        prefix_cache_mb: float = 0,
        verify_hashes: bool = False,
        gpu: GpuOptions = DEFAULT_GPU,
        notice: Callable[[str], None] | None = None,
    ) -> VisionLanguageModel:
        """Open a bundle folder on an engine.

        Args:
            engine: `ort-cpu`, `ort-cuda`, `tensorrt`, or `auto`, which tells `notice` what it chose and why.
            threads: worker threads; the cores that the process may use by default.
            capacity: tokens that a KV cache holds; the bundle's `max_tokens` by default.
            prefill_chunk: most prompt tokens that go through the decoder at once; bounds activation memory.
            image_cache_mb: most memory, in 1e6 bytes, for vision features kept by content; 0 keeps none.
            prefix_cache_mb: most memory, in 1e6 bytes, for keys and values of earlier requests: `generate`, `stream`
                and `generate_batch` then prefill only what no earlier request began with. 0 keeps none. It comes on
                top of the KV cache of the request itself; a 2B model in float32 takes 57 kB a token.
            verify_hashes: check every file's sha256 first.
            gpu: which GPU, and how it is used.

        Raises:
            BundleError, EngineError, InputError: see the classes.
        """
        opened = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle, verify_hashes)
        runner = open_engine(opened, engine, threads, notice, gpu)
        try:
            return cls(opened, runner, capacity, prefill_chunk, image_cache_mb, prefix_cache_mb)
        except EdgeVLError:
            runner.close()
            raise

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
        """The checkpoint's sampling defaults with `overrides` (fields of GenerationConfig) on top."""
        overrides.setdefault("eos_token_ids", self.config.tokens.eos_token_ids)
        if isinstance(overrides.get("stop"), str):
            overrides["stop"] = (overrides["stop"],)
        if "stop" in overrides:
            overrides["stop"] = tuple(overrides["stop"])
        return GenerationConfig.from_defaults(self.config.generation, **overrides)

    def stream(self, messages: Sequence[dict[str, Any]], **generation: Any) -> Stream:
        """Answer `messages` token by token. `generation`: fields of GenerationConfig."""
        config, started = self.generation_config(**generation), time.perf_counter()
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
        decoder = self.decoder(len(prompts))
        rows = [self._row(p, config, started, i) for i, p in enumerate(prompts)]
        for _ in self._loop(decoder).run(rows, prompts):
            pass
        return [row.completion() for row in rows]

    def chat(self, system: str | None = None, on_full: str = "refuse") -> ChatSession:
        """A conversation that keeps its KV cache between turns.

        Args:
            on_full: when a question and its answer (max_new_tokens) do not fit the KV cache with what was said before:
                `refuse` with a CapacityError, or `drop-oldest-turn`.
        """
        return ChatSession(self, system, on_full)

    # ------------------------------------------------------------------ stages, for chats, verify and benchmarks

    def decoder(self, batch: int = 1) -> Decoder:
        """A decoder loop over a fresh cache."""
        return Decoder(self.engine, self.config, self.engine.new_cache(self.capacity, batch), self._chunk)

    def prepare(self, messages: Sequence[dict[str, Any]], *, check_length: bool = True) -> PreparedPrompt:
        """Encode the pictures of `messages`, build the prompt and its positions.

        Args:
            check_length: refuse a prompt that does not fit the KV cache.

        Raises:
            InputError: messages or pictures that cannot be used.
            CapacityError: the prompt is longer than the KV cache.
        """
        images = tuple(self._vision.encode(item) for item in collect_vision(list(messages)))
        prompt = self._builder.build(list(messages), [i.grid for i in images])
        if check_length:
            self.check_length(len(prompt.input_ids), sum(len(i.embeds) for i in images))
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
            identity=token_identity(prompt.input_ids, images, self._placeholder_ids),
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
        row = self._row(prompt, config, time.perf_counter() if started is None else started, 0, cached)
        return Stream(_pieces(self._loop(decoder).run([row], [prompt])), row)

    def _row(
        self, prompt: PreparedPrompt, config: GenerationConfig, started: float, index: int, cached: int = 0
    ) -> Row:
        return Row(self.tokenizer, config, prompt, self._grounding_ids, started, index, cached)

    def _loop(self, decoder: Decoder) -> DecodeLoop:
        return DecodeLoop(decoder, self._placeholder_ids, self.prefix_cache)

    @property
    def _placeholder_ids(self) -> tuple[int, int]:
        return self.config.tokens.image_token_id, self.config.tokens.video_token_id

    def check_length(self, length: int, image_tokens: int, hint: str = "shorten the prompt") -> None:
        """Refuse a prompt of `length` tokens, of which `image_tokens` are pictures, that leaves no room for an answer.

        Raises:
            CapacityError: by how much, and what could be done.
        """
        if length < self.capacity:
            return
        advice = []
        if image_tokens:
            advice.append(f"lower max_pixels ({image_tokens} tokens are pictures)")
        if self.capacity < self.config.text.max_position_embeddings:
            advice.append(f"open with a larger capacity (up to {self.config.text.max_position_embeddings})")
        advice.append(hint)
        raise CapacityError(
            f"the prompt is {length} tokens, {length - self.capacity + 1} more than the KV cache of {self.capacity} "
            f"takes with an answer; {', or '.join(advice)}"
        )


def _pieces(answered: Generator[tuple[Row, Piece], None, None]) -> Generator[Piece, None, None]:
    with closing(answered):
        for _, piece in answered:
            yield piece
