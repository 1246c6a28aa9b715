"""VisionLanguageModel: messages with pictures in, text out.

    open -> encode_image / encode messages -> prefill -> decode loop -> pieces of text

Streaming is the primitive: `generate` drains a stream, `generate_batch` several rows at once, and a chat is a stream
over a cache that is kept.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from pathlib import Path
from types import TracebackType
from typing import Any

from edgevl.runtime.admission import Admission, check_opening, check_sizes
from edgevl.runtime.answer_stream import PreparedPrompt, Stream
from edgevl.runtime.bundle import Bundle
from edgevl.runtime.chat import ChatSession
from edgevl.runtime.decode_loop import DecodeLoop
from edgevl.runtime.decoding import DEFAULT_PREFILL_CHUNK, Decoder
from edgevl.runtime.engine import DEFAULT_GPU, Engine, GpuOptions, open_engine
from edgevl.runtime.errors import CapacityError, EdgeVLError, EngineError, InputError
from edgevl.runtime.grounding import Box
from edgevl.runtime.guided import FORMS, GuideCompiler
from edgevl.runtime.image_cache import DEFAULT_IMAGE_CACHE_MB, ImageCache
from edgevl.runtime.image_processing import VisionGrid
from edgevl.runtime.locate import DEFAULT_QUESTION, locate
from edgevl.runtime.mrope import position_ids
from edgevl.runtime.prefix_cache import PrefixCache, token_identity
from edgevl.runtime.profile import Profile
from edgevl.runtime.prompt import Prompt, PromptBuilder, VisionInput, collect_vision, is_list, load_chat_template
from edgevl.runtime.results import Completion, Piece
from edgevl.runtime.row import Row
from edgevl.runtime.sampling import GenerationConfig
from edgevl.runtime.tokenizer import GROUNDING_TOKENS, POINT_TOKENS, Tokenizer
from edgevl.runtime.ttft import PixelChoice, choose_pixels
from edgevl.runtime.vision import EncodedImage, VisionStage

__all__ = ["VisionLanguageModel"]


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
        memory_limit: int | str | None = None,
        notice: Callable[[str], None] | None = None,
    ) -> None:
        self.bundle, self.engine, self.config = bundle, engine, bundle.model
        self.capacity = bundle.max_tokens if capacity is None else capacity
        check_sizes(bundle, self.capacity, prefill_chunk, image_cache_mb, prefix_cache_mb)
        self.prefill_chunk, self._notice, self._closed = prefill_chunk, notice, False
        self.tokenizer = Tokenizer.from_file(bundle.path("tokenizer.json"))
        # Grounding tokens in messages stay tokens: users refer to boxes with them, and earlier answers hold them.
        template = load_chat_template(bundle.folder)
        self._builder = PromptBuilder(self.tokenizer, template, self.config, trusted=(*GROUNDING_TOKENS, *POINT_TOKENS))
        self.image_cache = ImageCache(int(image_cache_mb * 1e6))
        self.prefix_cache = PrefixCache(int(prefix_cache_mb * 1e6)) if prefix_cache_mb else None
        self._admission = Admission(bundle, engine.name, prefill_chunk, memory_limit, self.capacity)
        admit = self._admission.picture
        self._vision = VisionStage(engine.vision, self.config, bundle.image_processor, self.image_cache, admit)
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
        image_cache_mb: float = DEFAULT_IMAGE_CACHE_MB,
        prefix_cache_mb: float = 0,
        verify_hashes: bool = False,
        memory_limit: int | str | None = None,
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
            memory_limit: bytes, or "4GB", that the process may have in memory; opening and every request that would
                pass it are refused before they run, with advice. By default what the machine (or its cgroup) has
                left; "off" refuses nothing.
            notice: gets a line on the engine chosen, and on every video: frames, size, what was changed to fit.
            gpu: which GPU, and how it is used.

        Raises:
            BundleError, EngineError, InputError: see the classes.
        """
        opened = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle, verify_hashes)
        check_sizes(opened, capacity, prefill_chunk, image_cache_mb, prefix_cache_mb)
        check_opening(opened, memory_limit)
        runner = open_engine(opened, engine, threads, notice, gpu)
        try:
            return cls(opened, runner, capacity, prefill_chunk, image_cache_mb, prefix_cache_mb, memory_limit, notice)
        except EdgeVLError:
            runner.close()
            raise

    def close(self) -> None:
        """Free the engine; nothing can be asked afterwards. Closing twice is closing once."""
        if not self._closed:
            self._closed = True
            self._vision.close()
            self.engine.close()

    def _check_open(self) -> None:
        if self._closed:
            raise EngineError("the model is closed; ask inside its `with` block, or open it again")

    def __enter__(self) -> VisionLanguageModel:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.close()

    # ------------------------------------------------------------------ requests

    def encode_image(
        self, image: Any, min_pixels: int | None = None, max_pixels: int | None = None, **options: Any
    ) -> EncodedImage:
        """Run a picture (path, PIL image, array, bytes) through the vision encoder; the result may stand for it in
        messages, so that asking twice about one picture encodes it once. `options`: resized_height and resized_width.
        """
        self._check_open()
        limits = {"min_pixels": min_pixels, "max_pixels": max_pixels}
        return self._vision.encode(VisionInput("image", image, {**limits, **options}))

    def encode_video(self, video: Any, max_tokens: int | None = None, **options: Any) -> EncodedImage:
        """Like `encode_image`, for a video: a file, an animation, a folder of frames or a list of pictures.

        Args:
            max_tokens: fit the video to so many tokens, with smaller and then fewer frames.
            options: fields of VideoOptions (fps, max_frames, max_pixels, total_pixels, ...).
        """
        self._check_open()
        encoded = self._vision.encode(VisionInput("video", video, options), max_tokens)
        chosen = isinstance(video, (list, tuple))  # frame by frame: nothing to tell unless it was changed
        if self._notice is not None and encoded.video is not None and (encoded.video.notes or not chosen):
            self._notice(f"video {encoded.video}")
        return encoded

    def encode_vision(self, messages: Sequence[dict[str, Any]], answer_tokens: int = 1) -> tuple[EncodedImage, ...]:
        """Pictures and videos of `messages` in prompt order. Videos share what the rest leaves of the KV cache, less
        `answer_tokens` (a quarter of the cache at most); those encoded already stay as they are."""
        self._check_open()
        items = collect_vision(messages)
        videos = [i for i, v in enumerate(items) if v.kind == "video" and not isinstance(v.source, EncodedImage)]
        done = {i: self._vision.encode(item) for i, item in enumerate(items) if i not in videos}
        if videos:
            merge = self.config.vision.spatial_merge_size
            one_token_each = [VisionGrid(1, merge, merge)] * len(items)
            text = len(self._builder.build(messages, one_token_each).input_ids) - len(items)
            room = self.capacity - text - sum(len(e.embeds) for e in done.values())
            room -= min(answer_tokens, self.capacity // 4)
            for number, i in enumerate(videos):
                done[i] = self.encode_video(items[i].source, room // (len(videos) - number), **items[i].options)
                room -= len(done[i].embeds)
        return tuple(done[i] for i in range(len(items)))

    def generation_config(self, **overrides: Any) -> GenerationConfig:
        """The checkpoint's sampling defaults with `overrides` (fields of GenerationConfig) on top; `json_schema`,
        `regex` or `choices` among them become its guide (`GuideCompiler.compile`)."""
        forms = {form: overrides.pop(form, None) for form in FORMS}
        if (guide := self._guides.compile(**forms)) is not None:
            overrides["guide"] = guide
        overrides.setdefault("eos_token_ids", self.config.tokens.eos_token_ids)
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
        prompt = self.prepare(messages, config.max_new_tokens)
        return self.stream_prompt(prompt, config, self.decoder(), started=started)

    def generate(self, messages: Sequence[dict[str, Any]], **generation: Any) -> Completion:
        """Answer `messages`; see `stream`."""
        return self.stream(messages, **generation).completion

    def generate_batch(self, conversations: Sequence[Sequence[dict[str, Any]]], **generation: Any) -> list[Completion]:
        """Answer several conversations, each with its own pictures, decoding all of them together."""
        if not is_list(conversations):
            raise InputError(
                f"conversations are a {type(conversations).__name__}, expected a list of lists of messages"
            )
        config, started = self.generation_config(**generation), time.perf_counter()
        prompts = [self.prepare(messages, config.max_new_tokens) for messages in conversations]
        if not prompts:
            raise InputError("a batch has no conversations; expected at least one")
        self._admission.answers(prompts, config.max_new_tokens)
        rows, pieces = self.stream_prompts(prompts, config, started)
        for _ in pieces:
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
        self._check_open()
        return Decoder(self.engine, self.config, self.engine.new_cache(self.capacity, batch), self.prefill_chunk)

    def prepare(
        self, messages: Sequence[dict[str, Any]], answer_tokens: int = 1, *, check_length: bool = True
    ) -> PreparedPrompt:
        """Encode the pictures of `messages`, build the prompt and its positions.

        Args:
            answer_tokens: kept free in the KV cache where a video has to be fitted (a quarter of it at most).
            check_length: refuse a prompt that does not fit the KV cache.

        Raises:
            InputError: messages or pictures that cannot be used.
            CapacityError: the prompt is longer than the KV cache.
        """
        prompt, image_tokens, exact = self._least_prompt(messages)
        if check_length:  # before seconds go into pictures
            self.check_length(len(prompt.input_ids), image_tokens, at_least=not exact)
        images = self.encode_vision(messages, answer_tokens)
        if (grids := tuple(i.grid for i in images)) != prompt.grids:
            prompt = self._builder.build(messages, grids)
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

    def prompt_size(self, messages: Sequence[dict[str, Any]]) -> tuple[int, int]:
        """Tokens of the prompt of `messages`, and how many of them are pictures; at least so many, where pictures or
        videos would have to be read first. May be asked from any thread.

        Raises:
            InputError: messages or pictures that cannot be used.
        """
        prompt, image_tokens, _ = self._least_prompt(messages)
        return len(prompt.input_ids), image_tokens

    def _least_prompt(self, messages: Sequence[dict[str, Any]]) -> tuple[Prompt, int, bool]:
        """The prompt with what is known of its pictures, their tokens, and whether all is known."""
        grids, exact = self._vision.least_grids(collect_vision(messages))
        prompt = self._builder.build(messages, grids)
        return prompt, sum(g.tokens(self.config.vision.spatial_merge_size) for g in grids), exact

    def stream_prompt(
        self,
        prompt: PreparedPrompt,
        config: GenerationConfig,
        decoder: Decoder,
        cached: int = 0,
        started: float | None = None,
    ) -> Stream:
        """Answer a prepared prompt whose first `cached` tokens are already in row 0 of the decoder's cache."""
        cache = decoder.cache
        row = self.row(prompt, config, cached, started, spare=cache.held - cached)
        return Stream(self._pieces(self._loop(decoder).run([row], [prompt])), row)

    def stream_prompts(
        self, prompts: Sequence[PreparedPrompt], config: GenerationConfig, started: float | None = None
    ) -> tuple[list[Row], Generator[tuple[Row, Piece], None, None]]:
        """Answer prepared prompts together: their rows, in order, and every piece with the row that it belongs to."""
        started = time.perf_counter() if started is None else started
        rows = [self._row(p, config, started, i) for i, p in enumerate(prompts)]
        return rows, self._loop(self.decoder(len(prompts))).run(rows, prompts)

    def _pieces(self, answered: Generator[tuple[Row, Piece], None, None]) -> Generator[Piece, None, None]:
        with closing(answered):
            self._check_open()
            for _, piece in answered:
                yield piece
                self._check_open()  # the next step needs the engine

    def row(
        self,
        prompt: PreparedPrompt,
        config: GenerationConfig,
        cached: int = 0,
        started: float | None = None,
        spare: int = 0,
    ) -> Row:
        """One answer, not begun, for `DecodeLoop.join`; `spare` is that of the loop, where it has answered before.

        Raises:
            CapacityError: there is no memory for it.
        """
        self._admission.answers([prompt], config.max_new_tokens, cached, spare)
        return self._row(prompt, config, time.perf_counter() if started is None else started, 0, cached)

    def decode_loop(self, rows: int) -> DecodeLoop:
        """A loop over a fresh cache of `rows` rows, which answers may join and leave between steps."""
        return self._loop(self.decoder(rows))

    def _row(
        self, prompt: PreparedPrompt, config: GenerationConfig, started: float, index: int, cached: int = 0
    ) -> Row:
        return Row(self.tokenizer, config, prompt, self._grounding_ids, started, index, cached)

    def _loop(self, decoder: Decoder) -> DecodeLoop:
        return DecodeLoop(decoder, self._placeholder_ids, self.prefix_cache)

    @property
    def _placeholder_ids(self) -> tuple[int, int]:
        return self.config.tokens.image_token_id, self.config.tokens.video_token_id

    def check_length(
        self, length: int, image_tokens: int, hint: str = "shorten the prompt", at_least: bool = False
    ) -> None:
        """Refuse a prompt of `length` tokens (or more), of which `image_tokens` are pictures, that leaves no room for
        an answer.

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
            f"the prompt is {'at least ' if at_least else ''}{length} tokens, {length - self.capacity + 1} more than "
            f"the KV cache of {self.capacity} takes with an answer; {', or '.join(advice)}"
        )
