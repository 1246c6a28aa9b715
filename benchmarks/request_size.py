"""How many tokens a request has, from sizes alone: pictures, video and prompt are sized as the runtime sizes them.

A case that the KV cache does not hold is told of before anything is measured; nothing is loaded but the tokenizer.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
from PIL import Image

from edgevl.benchmarks.workloads import Workload, question
from edgevl.runtime.bundle import Bundle
from edgevl.runtime.errors import CapacityError, InputError
from edgevl.runtime.image_processing import VisionGrid, resized_size
from edgevl.runtime.prompt import PromptBuilder, load_chat_template
from edgevl.runtime.tokenizer import Tokenizer
from edgevl.runtime.video import VideoOptions, plan_video
from edgevl.runtime.video_reading import DEFAULT_FPS, VideoSource

__all__ = ["check_fits", "message", "picture_grid", "prompt_tokens", "video_room"]


class _Frames(VideoSource):
    """Frames of which the size is known, and nothing else."""

    whole = True  # as a list of pictures is

    def __init__(self, count: int, size: tuple[int, int]) -> None:
        super().__init__(f"{count} frames")
        self.fps, self.size = DEFAULT_FPS, size
        self.times, self.duration = np.arange(count) / DEFAULT_FPS, count / DEFAULT_FPS

    def read(self, indices: Sequence[int]) -> Generator[Image.Image, None, None]:
        raise NotImplementedError("these frames have a size only")

    def close(self) -> None:
        pass


def message(pictures: Sequence[Any], video: Any, text: str) -> list[dict[str, Any]]:
    """The messages of a request: its pictures, its video (None: no video), and its question."""
    content: list[dict[str, Any]] = [{"type": "image", "image": p} for p in pictures]
    if video is not None:
        content.append({"type": "video", "video": video})
    content.append({"type": "text", "text": text})
    return [{"role": "user", "content": content}]


def picture_grid(bundle: Bundle, work: Workload) -> VisionGrid:
    """Of each of the workload's pictures."""
    config = bundle.image_processor
    width, height = resized_size((work.width, work.height), config)
    return VisionGrid(1, height // config.patch_size, width // config.patch_size)


def video_room(bundle: Bundle, builder: PromptBuilder, work: Workload, text: str, capacity: int) -> int:
    """Tokens of the KV cache that a request's video is fitted to, as `VisionLanguageModel.encode_vision` counts."""
    pictures = work.pictures * picture_grid(bundle, work).tokens(bundle.model.vision.spatial_merge_size)
    return capacity - _text_tokens(bundle, builder, work, text) - pictures - min(work.new_tokens, capacity // 4)


def prompt_tokens(bundle: Bundle, work: Workload, capacity: int) -> int:
    """Tokens of one row's prompt.

    Raises:
        InputError: pictures or frames that cannot be resized, a video of which not two frames fit.
    """
    tokenizer = Tokenizer.from_file(bundle.path("tokenizer.json"))
    builder = PromptBuilder(tokenizer, load_chat_template(bundle.folder), bundle.model)
    text = question(cast(Any, SimpleNamespace(tokenizer=tokenizer)), work.prompt_tokens)
    total = _text_tokens(bundle, builder, work, text)
    if work.pictures:
        total += work.pictures * picture_grid(bundle, work).tokens(bundle.model.vision.spatial_merge_size)
    if work.frames:
        room = video_room(bundle, builder, work, text, capacity)
        source = _Frames(work.frames, (work.width, work.height))
        total += plan_video(source, VideoOptions(), bundle.image_processor, room).tokens
    return total


def check_fits(bundle: Bundle, work: Workload, label: str) -> None:
    """Raises InputError where a request with its whole answer is more than the bundle's KV cache holds."""
    capacity = bundle.max_tokens
    try:
        prompt = prompt_tokens(bundle, work, capacity)
        over = prompt + max(1, work.new_tokens - 1) - capacity  # the last token is not fed
        if over > 0:
            raise CapacityError(
                f"a prompt of {prompt} tokens and an answer of {work.new_tokens} are {over} tokens more than the KV "
                f"cache of {capacity} takes; ask for less (--prompt-tokens, --new-tokens, --size, --pictures), or "
                "export with a larger --max-tokens"
            )
    except InputError as e:
        raise type(e)(f"{label}, workload {work.name!r}: {e}") from None


def _text_tokens(bundle: Bundle, builder: PromptBuilder, work: Workload, text: str) -> int:
    """Tokens of a prompt besides those of its pictures and its video."""
    items = work.pictures + bool(work.frames)
    merge = bundle.model.vision.spatial_merge_size
    messages = message([b""] * work.pictures, [b""] if work.frames else None, text)
    return len(builder.build(messages, [VisionGrid(1, merge, merge)] * items).input_ids) - items
