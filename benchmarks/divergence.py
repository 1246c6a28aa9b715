"""How far one bundle's next-token distributions are from another's, through the engines that will run.

Prompts and answers go through the graphs teacher-forced, all logits of words are read: so the head's rounding, rounded
activations and the KV cache count, which a check of weights alone does not see. Knows bundles, not checkpoints.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgevl.runtime.generation import VisionLanguageModel
from edgevl.runtime.kv_cache import KVCache
from edgevl.runtime.mrope import position_ids, rotary_rows
from edgevl.runtime.prompt import PromptBuilder, collect_vision, load_chat_template
from edgevl.runtime.tokenizer import GROUNDING_TOKENS
from edgevl.runtime.vision import VisionStage

__all__ = ["Divergence", "answer_logits", "conversation_logits", "divergence"]

Messages = Sequence[dict[str, Any]]


@dataclass(frozen=True)
class Divergence:
    """kl: mean KL(reference || other) in nats; top1: share of positions with the same most likely token; perplexity: of
    the other on the conversations' own words; over `tokens` positions."""

    kl: float
    top1: float
    perplexity: float
    tokens: int


def conversation_logits(
    bundle: str | Path, conversations: Sequence[Messages], chunk: int = 4096
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """For every conversation (its last message the answer): logits float32 [n, vocab] of all positions that are words,
    and the ids [n] of the tokens that come next there (-1 after the last)."""
    with VisionLanguageModel.open(bundle, "ort-cpu") as model:
        config = model.config
        stage = VisionStage(model.engine.vision, config, model.bundle.image_processor)
        template = load_chat_template(model.bundle.folder)
        builder = PromptBuilder(model.tokenizer, template, config, trusted=GROUNDING_TOKENS)
        for messages in conversations:
            images = [stage.encode(item) for item in collect_vision(list(messages))]
            prompt = builder.build(list(messages), [i.grid for i in images], add_generation_prompt=False)
            ids, tokens = prompt.input_ids, config.tokens
            positions = position_ids(
                ids, prompt.grids, tokens, config.vision.spatial_merge_size, model.bundle.mrope_rule
            ).ids
            embeds = np.concatenate([i.embeds for i in images]) if images else None
            visual = np.isin(ids, (tokens.image_token_id, tokens.video_token_id))
            yield (
                _logits(model, ids, positions, embeds, visual, chunk),
                np.append(ids[1:], -1)[~visual],
            )


def answer_logits(
    bundle: str | Path, conversations: Sequence[tuple[Messages, str]], engine: str = "ort-cpu"
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The same where the answer's words are said, as they would be: the prompt through the graph for prompts, the
    answer through the decoder. Conversations are (messages, answer); n is the answer's tokens and the end."""
    with VisionLanguageModel.open(bundle, engine) as model:
        end = model.config.tokens.eos_token_ids[0]
        for messages, answer in conversations:
            told = np.array(model.tokenizer.encode(answer, specials=True), np.int64)
            prompt = model.prepare(list(messages), len(told) + 1)
            embeds = np.concatenate([np.asarray(i.embeds) for i in prompt.images]) if prompt.images else None
            decoder = model.decoder()
            first = decoder.prefill(0, prompt.ids, prompt.positions, embeds)
            rest = decoder.score(told, prompt.next_position + np.arange(len(told)))
            yield np.concatenate([first[None], rest]), np.append(told, end)


def _logits(
    model: VisionLanguageModel,
    ids: np.ndarray,
    positions: np.ndarray,
    embeds: np.ndarray | None,
    visual: np.ndarray,
    chunk: int,
) -> np.ndarray:
    """One pass of the prefill graph in which every word's row is wanted."""
    cos, sin = rotary_rows(positions[:, None], model.config.text)
    graph = model.engine.prefill
    feeds = {
        "input_ids": ids[None],
        "image_embeds": np.zeros((0, model.config.text.hidden_size), np.float32) if embeds is None else embeds,
        "image_slots": np.flatnonzero(visual) if embeds is not None else np.zeros(0, np.int64),
        "rotary_cos": cos,
        "rotary_sin": sin,
        "seqlens_k": np.array([len(ids) - 1], np.int32),
        "total_sequence_length": np.array([len(ids)], np.int32),
        "logits_rows": np.flatnonzero(~visual),
    }
    cache = KVCache(graph.spec, len(ids))
    cache.reserve(0, len(ids))
    return graph.run(feeds, cache.view(0, 1))["logits"]


def divergence(
    reference: Sequence[tuple[np.ndarray, np.ndarray]], other: Iterator[tuple[np.ndarray, np.ndarray]]
) -> Divergence:
    """Of `conversation_logits` over the same conversations."""
    kl = equal = loss = 0.0
    count = predicted = 0
    for (a, following), (b, _) in zip(reference, other, strict=True):
        p, q = _log_softmax(a), _log_softmax(b)
        kl += float((np.exp(p) * (p - q)).sum())
        equal += int((a.argmax(-1) == b.argmax(-1)).sum())
        known = following >= 0
        loss -= float(q[known, following[known]].sum())
        count, predicted = count + len(a), predicted + int(known.sum())
    return Divergence(kl / count, equal / count, float(np.exp(loss / predicted)), count)


def _log_softmax(x: np.ndarray) -> np.ndarray:
    x = x.astype(np.float64) - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))
