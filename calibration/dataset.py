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

from edgevl.runtime.config import ModelConfig
from edgevl.runtime.errors import EdgeVLError, InputError
from edgevl.runtime.image_processing import ImageProcessorConfig, ProcessedImage
from edgevl.runtime.mrope import position_ids
from edgevl.runtime.prompt import PromptBuilder, collect_vision, load_chat_template
from edgevl.runtime.tokenizer import GROUNDING_TOKENS, Tokenizer
from edgevl.runtime.vision import preprocess_vision

__all__ = ["PICTURE_SUFFIXES", "PROMPTS", "Sample", "SampleSource", "read_conversations"]

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")
# What a folder of pictures is asked, in turn: the jobs that people give the model.
PROMPTS = ("Describe this image.", "Read the text in the image.", "What objects are there, and where?")
_LEAST_SAMPLES = 4


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
        max_pixels: of a picture; the checkpoint's limit by default.
        skipped: told of every conversation that is left out, and why.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        max_tokens: int = 2048,
        max_pixels: int | None = None,
        mrope_rule: str = "released",
        skipped: Callable[[str], None] | None = None,
    ) -> None:
        folder = Path(folder)
        self.config = ModelConfig.from_folder(folder)
        self._processor = ImageProcessorConfig.from_folder(folder).with_pixels(max_pixels=max_pixels)
        tokenizer = Tokenizer.from_folder(folder)
        self._builder = PromptBuilder(tokenizer, load_chat_template(folder), self.config, trusted=GROUNDING_TOKENS)
        self._max_tokens, self._rule = max_tokens, mrope_rule
        self._skipped = skipped or (lambda _: None)

    def sample(self, messages: Sequence[dict[str, Any]]) -> Sample:
        """One conversation; a last message of the assistant is taken as the answer, and ends the sequence.

        Raises:
            InputError: messages or pictures that cannot be used.
        """
        conversation = list(messages)
        vision = tuple(preprocess_vision(item, self._processor) for item in collect_vision(conversation))
        asked = conversation[-1]["role"] != "assistant"
        prompt = self._builder.build(conversation, [v.grid for v in vision], add_generation_prompt=asked)
        tokens, merge = self.config.tokens, self.config.vision.spatial_merge_size
        positions = position_ids(prompt.input_ids, prompt.grids, tokens, merge, self._rule)
        visual = np.isin(prompt.input_ids, (tokens.image_token_id, tokens.video_token_id))
        return Sample(prompt.input_ids, positions.ids, vision, visual)

    def samples(
        self, conversations: Sequence[Sequence[dict[str, Any]]], count: int, seed: int = 0, least: int = _LEAST_SAMPLES
    ) -> list[Sample]:
        """`count` samples in a random but repeatable order; what cannot be used is skipped and told of.

        Raises:
            InputError: fewer than `least` (or `count`) conversations can be used.
        """
        found: list[Sample] = []
        skipped = 0
        for sample in self._usable(conversations, np.random.default_rng(seed).permutation(len(conversations))):
            if sample is None:
                skipped += 1
                continue
            found.append(sample)
            if len(found) == count:
                break
        if len(found) < min(least, count):
            raise InputError(
                f"{len(found)} of {len(conversations)} conversations can be used ({skipped} skipped), expected at "
                f"least {min(least, count)}; give more pictures, or mend those that were skipped"
            )
        return found

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
                    "lower max_pixels"
                )
                yield None
                continue
            yield sample


def _about(picture: Path, question: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": question}]}]


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
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
        is_path = isinstance(value, str) and not value.startswith(("data:", "http:", "https:", "file:"))
        return folder / value if is_path else [path(v) for v in value] if isinstance(value, list) else value

    if isinstance(message["content"], str):
        return message
    items = []
    for item in message["content"]:
        items.append({k: path(v) if k in ("image", "image_url", "video", "path") else v for k, v in item.items()})
    return {**message, "content": items}
