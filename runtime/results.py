"""What the runtime gives back: frozen, typed, with units in the names."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from edgevl.runtime.grounding import Box

__all__ = ["Completion", "FinishReason", "Piece", "Timings", "Usage"]

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Piece:
    """One step of a stream: the text that became certain with it (may be empty) and the token."""

    text: str
    token_id: int


@dataclass(frozen=True)
class Usage:
    """Token counts. `cached_tokens` of the prompt were already in the KV cache and cost nothing; for `cached_images` of
    the `images` (pictures and videos) the vision encoder did not run; of `drafted_tokens` that prompt lookup proposed,
    `accepted_tokens` were right and came without a step of their own."""

    prompt_tokens: int
    image_tokens: int
    cached_tokens: int
    completion_tokens: int
    images: int = 0
    cached_images: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0


@dataclass(frozen=True)
class Timings:
    """Wall-clock seconds of the stages of one request.

    `first_token_s` is the whole way from the request to the first token, `decode_s` the time of the tokens after it
    (in a batch: of the batch, which its rows share).
    """

    preprocess_s: float
    vision_s: float
    prefill_s: float
    first_token_s: float
    decode_s: float
    decode_steps: int

    @property
    def tokens_per_s(self) -> float:
        """Decode rate of this request; 0 when it ended with its first token."""
        return self.decode_steps / self.decode_s if self.decode_s > 0 else 0.0


@dataclass(frozen=True)
class Completion:
    """An answer. `text` keeps the grounding tokens (`<|box_start|>…`); `boxes` are them in pixels of the original
    picture. `finish_reason` is `stop` (end token or stop string) or `length` (max_new_tokens, or a full KV cache)."""

    text: str
    token_ids: tuple[int, ...]
    boxes: tuple[Box, ...]
    finish_reason: FinishReason
    usage: Usage
    timings: Timings

    def to_dict(self) -> dict[str, Any]:
        data = asdict(self)
        data["timings"]["tokens_per_s"] = self.timings.tokens_per_s
        return data
