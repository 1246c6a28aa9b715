"""Calibration samples: pictures or conversations, through the runtime's own preprocessing, prompts and M-RoPE.

So quantization sees what the device sees: sizes, tokens and positions of a sample are those of `edgevl run`. Knows no
weights.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgevl.calibration.pixel_store import PixelStore
from edgevl.runtime.config import ModelConfig
from edgevl.runtime.errors import EdgeVLError, InputError
from edgevl.runtime.image_processing import ImageProcessorConfig, ProcessedImage, resized_size
from edgevl.runtime.mrope import position_ids
from edgevl.runtime.prompt import PromptBuilder, VisionInput, collect_vision, load_chat_template
from edgevl.runtime.tokenizer import GROUNDING_TOKENS, Tokenizer
from edgevl.runtime.vision import preprocess_vision

__all__ = ["LEAST_SAMPLES", "PICTURE_SUFFIXES", "PROMPTS", "Sample", "SampleSource", "read_conversations"]

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")
# What a folder of pictures is asked, in turn: the jobs that people give the model.
PROMPTS = ("Describe this image.", "Read the text in the image.", "What objects are there, and where?")
LEAST_SAMPLES = 4
_WORDS = 256  # tokens of a conversation that its pictures leave to the words, where nobody limits the pictures
_PATHS = ("image", "image_url", "video", "path", "url")  # where an item may name a file
_URLS = ("data:", "http:", "https:", "file:")


@dataclass(frozen=True)
class Sample:
    """One conversation, ready for the layers.

    ids: int64 [S]. positions: int64 [3, S]. vision: its pictures and videos in prompt order.
    visual: bool [S], True where a token is a picture's.
    """

    ids: np.ndarray
    positions: np.ndarray
    vision: tuple[ProcessedImage, ...]
    visual: np.ndarray

    @property
    def measured(self) -> np.ndarray:
        """bool [S]: the positions over which a divergence is taken, the words from the first picture on.

        Nobody samples after a picture's token. What stands before the first picture is the template, the same in every
        conversation: it would be counted once for each and say nothing of pictures.
        """
        return ~self.visual & (np.maximum.accumulate(self.visual) if self.visual.any() else True)


def read_conversations(source: str | Path) -> list[list[dict[str, Any]]]:
    """The conversations of a .jsonl file, or one per picture of a folder (searched through, in the order of names).

    A line of the file is a list of messages, or an object with `messages`; paths of pictures are relative to the file.

    Raises:
        InputError: no such path, nothing inside, or a line that is not understood.
    """
    path = Path(source)
    if path.is_dir():
        pictures = sorted(p for p in path.rglob("*") if p.suffix.lower() in PICTURE_SUFFIXES)
        if not pictures:
            raise InputError(f"{path}: no pictures inside; expected files such as {', '.join(PICTURE_SUFFIXES[:4])}")
        return [_about(picture, PROMPTS[i % len(PROMPTS)]) for i, picture in enumerate(pictures)]
    if not path.is_file():
        raise InputError(f"{path}: not found; expected a folder of pictures or a .jsonl of conversations")
    conversations = []
    for number, line in enumerate(_lines(path), 1):
        if line.strip():
            conversations.append(_conversation(line, f"{path}, line {number}", path.parent))
    if not conversations:
        raise InputError(f"{path}: empty; expected one conversation per line")
    return conversations


class SampleSource:
    """Turns conversations into samples as a checkpoint's own files say.

    Args:
        folder: of the checkpoint: config, tokenizer, template and preprocessor.
        max_tokens: longer conversations are left out.
        max_pixels: of a picture. By default the checkpoint's limit, but no more than leaves a conversation's pictures
            within `max_tokens`: the released model's limit is 16,384 tokens.
        skipped: told of every conversation that is left out, and why.
        notice: told once, when the first picture is shrunk to fit.
        scratch: a folder on whose disk the pixels of `samples` lie; by default they are kept in memory.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        max_tokens: int = 2048,
        max_pixels: int | None = None,
        mrope_rule: str = "released",
        skipped: Callable[[str], None] | None = None,
        notice: Callable[[str], None] | None = None,
        scratch: str | Path | None = None,
    ) -> None:
        folder = Path(folder)
        self.config = ModelConfig.from_folder(folder)
        self._processor = ImageProcessorConfig.from_folder(folder).with_pixels(max_pixels=max_pixels)
        tokenizer = Tokenizer.from_folder(folder)
        self._builder = PromptBuilder(tokenizer, load_chat_template(folder), self.config, trusted=GROUNDING_TOKENS)
        self._max_tokens, self._rule = max_tokens, mrope_rule
        self._fits = max_pixels is None and max_tokens > _WORDS
        self._skipped = skipped or (lambda _: None)
        self._notice = notice or (lambda _: None)
        self._scratch = None if scratch is None else Path(scratch)

    def sample(self, messages: Sequence[dict[str, Any]]) -> Sample:
        """One conversation; a last message of the assistant is taken as the answer, and ends the sequence.

        Raises:
            InputError: messages or pictures that cannot be used.
        """
        conversation = list(messages)
        vision = tuple(self._preprocessed(collect_vision(conversation)))
        asked = conversation[-1]["role"] != "assistant"
        prompt = self._builder.build(conversation, [v.grid for v in vision], add_generation_prompt=asked)
        tokens, merge = self.config.tokens, self.config.vision.spatial_merge_size
        positions = position_ids(prompt.input_ids, prompt.grids, tokens, merge, self._rule)
        visual = np.isin(prompt.input_ids, (tokens.image_token_id, tokens.video_token_id))
        return Sample(prompt.input_ids, positions.ids, vision, visual)

    def samples(
        self, conversations: Sequence[Sequence[dict[str, Any]]], count: int, seed: int = 0, least: int = LEAST_SAMPLES
    ) -> list[Sample]:
        """`count` samples in a random but repeatable order; what cannot be used is skipped and told of.

        Raises:
            InputError: fewer than `least` (or `count`) conversations can be used.
            CheckpointError: no room for pixels on the disk of `scratch`.
        """
        order = np.random.default_rng(seed).permutation(len(conversations))
        if self._scratch is None:
            return self._found(conversations, order, count, least)
        with PixelStore(self._scratch) as store:
            return store.mapped(self._found(conversations, order, count, least, store.taken))

    def _found(
        self,
        conversations: Sequence[Sequence[dict[str, Any]]],
        order: np.ndarray,
        count: int,
        least: int,
        kept: Callable[[Sample], Sample] = lambda sample: sample,
    ) -> list[Sample]:
        found: list[Sample] = []
        skipped = 0
        for sample in self._usable(conversations, order):
            if sample is None:
                skipped += 1
                continue
            found.append(kept(sample))
            if len(found) == count:
                break
        if len(found) < min(least, count):
            raise InputError(
                f"{len(found)} of {len(conversations)} conversations can be used ({skipped} skipped), expected at "
                f"least {min(least, count)}; give more pictures, or mend those that were skipped"
            )
        return found

    def _preprocessed(self, items: Sequence[VisionInput]) -> Iterator[ProcessedImage]:
        """Pixels; pictures that nobody limited are shrunk to share the tokens that the words leave. Videos have limits
        of their own."""
        fitting, pictures = self._processor, sum(item.kind == "image" for item in items)
        if self._fits and pictures:
            most = (self._max_tokens - _WORDS) // pictures * self._processor.factor**2
            if 0 < most < self._processor.max_pixels:
                fitting = self._processor.with_pixels(max_pixels=most)
        for item in items:
            done = preprocess_vision(item, fitting if item.kind == "image" else self._processor)
            if item.kind == "image" and fitting is not self._processor:
                self._tell_of(done, item)
            yield done

    def _tell_of(self, done: ProcessedImage, item: VisionInput) -> None:
        """Once, and only where it matters."""
        if resized_size(done.original_size, self._processor, **item.options) == done.resized_size:
            return
        most = (self._max_tokens - _WORDS) * self._processor.factor**2
        self._notice(
            f"large pictures are shrunk so that a conversation stays within {self._max_tokens:,} tokens: to {most:,} "
            f"pixels, less where there are several (the checkpoint allows {self._processor.max_pixels:,}); "
            "--max-pixels sets another limit"
        )
        self._notice = lambda _: None

    def _usable(self, conversations: Sequence[Sequence[dict[str, Any]]], order: np.ndarray) -> Iterator[Sample | None]:
        for index in order:
            try:
                sample = self.sample(conversations[int(index)])
            except EdgeVLError as e:
                self._skipped(f"skipped: {e}")
                yield None
                continue
            if len(sample.ids) > self._max_tokens:
                self._skipped(
                    f"skipped: a conversation of {len(sample.ids)} tokens, at most {self._max_tokens} are taken; "
                    + ("pass a smaller --max-pixels" if sample.vision else "shorten it")
                )
                yield None
                continue
            yield sample


def _about(picture: Path, question: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": question}]}]


def _lines(path: Path) -> list[str]:
    """Lines end where JSON Lines says: other separators of Unicode may stand inside a text."""
    try:
        return path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as e:
        raise InputError(f"{path}: not readable as UTF-8 text ({e}); expected a .jsonl of conversations") from None


def _conversation(line: str, where: str, folder: Path) -> list[dict[str, Any]]:
    try:
        data = json.loads(line)
    except ValueError as e:
        raise InputError(f"{where}: not JSON ({e})") from None
    messages = data.get("messages") if isinstance(data, dict) else data
    if not isinstance(messages, list):
        raise InputError(f"{where}: expected a list of messages, or an object with 'messages'")
    try:
        collect_vision(messages)
    except InputError as e:
        raise InputError(f"{where}: {e}") from None
    return [_resolved(message, folder) for message in messages]


def _resolved(message: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The message with relative paths taken from the file's folder."""

    def path(value: Any) -> Any:
        if isinstance(value, str):
            return value if value.lower().startswith(_URLS) else folder / value
        if isinstance(value, dict):  # OpenAI's {"image_url": {"url": ...}}
            return {k: path(v) if k == "url" else v for k, v in value.items()}
        return [path(v) for v in value] if isinstance(value, list) else value

    if isinstance(message["content"], str):
        return message
    items = []
    for item in message["content"]:
        items.append({k: path(v) if k in _PATHS else v for k, v in item.items()})
    return {**message, "content": items}
