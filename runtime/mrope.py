"""M-RoPE on the host: positions of every token along time, height and width, and the rotary rows made from them.

Text advances all three axes together; a picture or video spreads over them (Qwen2-VL, arXiv:2409.12191, section 2.1).
The graphs see only one cos/sin row per token. This module knows no pixels, no cache and no engine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from edgevl.runtime.config import SpecialTokens, TextConfig
from edgevl.runtime.errors import InputError
from edgevl.runtime.image_processing import VisionGrid

__all__ = ["MROPE_RULES", "Positions", "position_ids", "rope_delta", "rotary_rows", "vision_rotary_rows"]

# What the first text token after a vision span gets, when the span starts at p and has t frames of h x w merged rows:
#   released         p + max(t, h, w)    transformers 4.45, which Qwen2-VL was released with
#   transformers-5   p + max(h, w)       transformers 5: time is ignored, text may stand "before" the last frames
# They agree on still pictures. Under transformers-5 the reference starts decoding one past the highest position of the
# prompt all the same (its rope_deltas), so the two numbers of `Positions` can differ there.
MROPE_RULES = ("released", "transformers-5")

_VISION_THETA = 10000.0  # fixed in the reference, modeling_qwen2_vl.py


@dataclass(frozen=True)
class Positions:
    """Where the tokens of one prompt, or chunk, stand.

    ids: int64 [3, S], rows t, h, w.
    next_position: what the first generated token, or the next turn, gets: one past the highest position.
    resume_position: what the next token of the same prompt gets: `start` of its next chunk. Equal to next_position
        under "released"; under "transformers-5" it is lower where the prompt ends soon after a long video.
    """

    ids: NDArray[np.int64]
    next_position: int
    resume_position: int


def position_ids(
    input_ids: NDArray[np.int64],
    grids: Sequence[VisionGrid],
    tokens: SpecialTokens,
    merge_size: int,
    rule: str = "released",
    start: int = 0,
) -> Positions:
    """Positions of one prompt or of one chunk of it.

    Args:
        input_ids: int64 [S], with `grid.tokens(merge_size)` placeholders (image or video token) for every grid.
        grids: pictures and videos in prompt order; those of this chunk only, each whole within the chunk.
        merge_size: patches per token along h and w.
        rule: one of MROPE_RULES.
        start: position of the first token, `next_position` of what the cache holds already.

    Raises:
        InputError: an unknown rule, or placeholders that do not fit the grids one to one.
    """
    if rule not in MROPE_RULES:
        raise InputError(f"mrope rule {rule!r} is unknown; expected one of {', '.join(MROPE_RULES)}")
    ids = np.asarray(input_ids)
    if ids.ndim != 1:
        raise InputError(f"input_ids have shape {list(ids.shape)}, expected one row of token ids, [S]")
    slots = np.flatnonzero((ids == tokens.image_token_id) | (ids == tokens.video_token_id))
    needed = sum(grid.tokens(merge_size) for grid in grids)
    if needed != slots.size:
        raise InputError(
            f"{len(grids)} pictures or videos need {needed} placeholder tokens, the prompt has {slots.size}; "
            "expand each placeholder to the tokens of its grid"
        )
    out = np.empty((3, ids.size), np.int64)
    at, position, used, top = 0, start, 0, start - 1  # at: the next token to place; top: the highest position so far
    for number, grid in enumerate(grids):
        count = grid.tokens(merge_size)
        begin, end = int(slots[used]), int(slots[used + count - 1]) + 1
        if end - begin != count or (ids[begin:end] != ids[begin]).any():
            raise InputError(
                f"picture or video {number + 1} needs {count} placeholders in one piece, the prompt has other tokens "
                f"among them between {begin} and {end}; the grids must stand in prompt order"
            )
        out[:, at:begin] = np.arange(position, position + begin - at)
        position += begin - at
        t, h, w = grid.t, grid.h // merge_size, grid.w // merge_size
        out[:, begin:end] = np.indices((t, h, w)).reshape(3, count) + position
        top = max(top, position + max(t, h, w) - 1)
        position += max(t, h, w) if rule == "released" else max(h, w)
        at, used = end, used + count
    out[:, at:] = np.arange(position, position + ids.size - at)
    position += ids.size - at
    # `top` covers the spans; text ends at position - 1, and max(h, w) <= span, so the maximum is over both.
    return Positions(out, next_position=max(position, top + 1), resume_position=position)


def rope_delta(positions: Positions) -> int:
    """What to add to a token's index in the sequence to get its position, for tokens after this prompt (start=0)."""
    return positions.next_position - positions.ids.shape[1]


def rotary_rows(positions: NDArray[np.int64], config: TextConfig) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """One rotary row per token: frequency i of head_dim / 2 turns with t, h or w as mrope_section says.

    Args:
        positions: integers [3, ...], rows t, h, w.

    Returns:
        cos, sin: float32 [..., head_dim / 2]. The angle is float32(position) x float32(theta^(-2i/head_dim)), as in
        the fp32 reference (modeling_qwen2_vl.py, Qwen2VLRotaryEmbedding; the sections of its doubled cos/sin are
        these twice over).
    """
    frequencies, axes = _text_frequencies(config.rope_theta, config.head_dim, config.mrope_section)
    columns = np.asarray(positions, np.float32).T  # [..., 3], the other axes reversed
    if columns.ndim > 2:
        columns = np.moveaxis(np.asarray(positions, np.float32), 0, -1)
    angles = columns.take(axes, axis=-1)
    angles *= frequencies
    return np.cos(angles), np.sin(angles)


@lru_cache(maxsize=16)
def _text_frequencies(
    theta: float, head_dim: int, section: tuple[int, int, int]
) -> tuple[NDArray[np.float32], NDArray[np.intp]]:
    return _inverse_frequencies(theta, head_dim), np.repeat(np.arange(3), section)


def _inverse_frequencies(theta: float, dim: int) -> NDArray[np.float32]:
    # Rounded to float32 where the reference rounds: at position 30,000 a last bit here is a thousandth of a radian.
    # The power itself is taken in float64 and rounded, as numpy's float32 power is off in the last bit more often.
    exponent = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    return np.float32(1.0) / (theta ** exponent.astype(np.float64)).astype(np.float32)


@lru_cache(maxsize=16)
def vision_rotary_rows(
    grid_h: int, grid_w: int, merge_size: int, head_dim: int
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Rotary rows of one frame's patches in the order of pixel_values: merge_size x merge_size blocks, row by row.

    Args:
        grid_h, grid_w: the frame in patches, multiples of merge_size.
        head_dim: of the vision encoder, a multiple of 4.

    Returns:
        cos, sin: float32 [grid_h * grid_w, head_dim / 2], read-only and shared between calls. The first half of the
        frequencies turns with the patch's row, the second with its column (modeling_qwen2_vl.py,
        Qwen2VLVisionRotaryEmbedding), theta 10000.

    Raises:
        InputError: a grid that the merge size does not divide.
    """
    if grid_h < 1 or grid_w < 1 or grid_h % merge_size or grid_w % merge_size:
        raise InputError(f"a grid of {grid_h} x {grid_w} patches, expected positive multiples of {merge_size}")
    m = merge_size
    plane = np.indices((grid_h, grid_w)).reshape(2, grid_h // m, m, grid_w // m, m)
    row, column = plane.transpose(0, 1, 3, 2, 4).reshape(2, -1, 1).astype(np.float32)  # each [patches, 1]
    frequencies = _inverse_frequencies(_VISION_THETA, head_dim // 2)  # [head_dim / 4]
    angles = np.concatenate([row * frequencies, column * frequencies], axis=-1)
    cos, sin = np.cos(angles), np.sin(angles)
    cos.flags.writeable = sin.flags.writeable = False
    return cos, sin
