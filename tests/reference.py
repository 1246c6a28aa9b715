"""Answers from transformers, the slow and obvious way: fp32, no cache, the whole sequence again for every token."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from transformers import Qwen2VLForConditionalGeneration

from edgevl.runtime.image_loading import load_image
from edgevl.runtime.image_processing import ImageProcessorConfig, VisionGrid, preprocess_frames


def released_positions(ids: Sequence[int], grids: Sequence[VisionGrid], placeholders: Sequence[int]) -> list[list[int]]:
    """Qwen2-VL's own rule, token by token: a vision span counts from the position before it, and the text after it
    goes on one past the largest of t, h and w (Qwen2-VL paper, arXiv:2409.12191, section 2.1)."""
    positions: list[list[int]] = []
    following, i, waiting = 0, 0, list(grids)
    while i < len(ids):
        if ids[i] not in placeholders:
            positions.append([following] * 3)
            following += 1
            i += 1
            continue
        grid = waiting.pop(0)
        span = [
            [following + t, following + h, following + w]
            for t in range(grid.t)
            for h in range(grid.h // 2)
            for w in range(grid.w // 2)
        ]
        positions += span
        following = max(max(p) for p in span) + 1
        i += len(span)
    return positions


class Reference:
    """transformers behind the same inputs as ours."""

    def __init__(self, model: Qwen2VLForConditionalGeneration, processor: ImageProcessorConfig) -> None:
        self.model, self.processor = model, processor
        self.placeholders = (model.config.image_token_id, model.config.video_token_id)

    def _pixels(self, sources: Sequence) -> tuple[torch.Tensor, torch.Tensor, list[VisionGrid]]:
        """Of pictures and of videos as lists of frames; test_image_processing.py holds them to transformers."""
        done = []
        for source in sources:
            frames = source if isinstance(source, list) else [source, source]
            done.append(preprocess_frames([load_image(f) for f in frames], self.processor))
        pixels = torch.tensor(np.concatenate([d.pixel_values for d in done]))
        grids = [d.grid for d in done]
        return pixels, torch.tensor([[g.t, g.h, g.w] for g in grids]), grids

    def logits(self, ids: Sequence[int], vision: Sequence, positions: list[list[int]] | None = None) -> np.ndarray:
        """[S, vocab] of one sequence; `vision` holds what its placeholders stand for, in order."""
        inputs, grids = {}, self._pixels(vision)[2] if vision else []
        images, videos = ([v for v in vision if isinstance(v, list) == film] for film in (False, True))
        if images:
            inputs["pixel_values"], inputs["image_grid_thw"], _ = self._pixels(images)
        if videos:
            inputs["pixel_values_videos"], inputs["video_grid_thw"], _ = self._pixels(videos)
        positions = positions or released_positions(list(ids), grids, self.placeholders)
        with torch.no_grad():
            out = self.model(
                input_ids=torch.tensor([list(ids)]),
                attention_mask=torch.ones(1, len(ids), dtype=torch.long),
                position_ids=torch.tensor(positions).T[:, None],
                use_cache=False,
                **inputs,
            )
        return out.logits[0].numpy()

    def greedy(self, ids: Sequence[int], vision: Sequence, steps: int, eos: Sequence[int] = (419, 417)) -> list[int]:
        """The greedy answer to prompt `ids`."""
        grids = self._pixels(vision)[2] if vision else []
        positions = released_positions(list(ids), grids, self.placeholders)
        following = max(max(p) for p in positions) + 1
        sequence, answer = list(ids), []
        for step in range(steps):
            answer.append(int(self.logits(sequence, vision, positions)[-1].argmax()))
            if answer[-1] in eos:
                break
            sequence.append(answer[-1])
            positions = [*positions, [following + step] * 3]
        return answer
