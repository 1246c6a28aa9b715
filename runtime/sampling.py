"""From logits to the next token: settings, the sampler, and the cut at stop strings. Numbers and text only."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgevl.runtime.errors import EngineError, InputError

if TYPE_CHECKING:
    from edgevl.runtime.guided import Guide

__all__ = ["GenerationConfig", "Sampler", "StopStrings"]

_FLOAT32 = np.finfo(np.float32)


@dataclass(frozen=True)
class GenerationConfig:
    """How an answer is generated; names and meanings are those of transformers' generation_config.json.

    max_new_tokens: at most this many tokens.
    do_sample: draw from the distribution; False takes the most likely token, and of the settings below only
        repetition_penalty matters.
    temperature: logits are divided by it.
    top_k: keep the k most likely tokens (and ties with the last); 0 keeps all.
    top_p: keep the fewest tokens whose probabilities add up to top_p; 1 keeps all.
    min_p: drop tokens less likely than min_p times the most likely one; 0 keeps all.
    repetition_penalty: > 1 lowers tokens seen before, prompt included (CTRL, arXiv:1909.05858, section 4.1).
    seed: of the draws; None takes a fresh one.
    stop: the answer ends before the first of these strings.
    eos_token_ids: the answer ends at any of these tokens.
    lookup_tokens: most tokens that prompt lookup drafts at a time (`edgevl.runtime.lookup`), while a single row is
        being decoded; 0 drafts none. Drafts change no token, drawn ones included: each is chosen from its own logits,
        with the same draw, and a draft only saves calls where it foresaw the choice.
    guide: holds the answer to a JSON schema, a regular expression or choices (`edgevl.runtime.guided`).

    Raises:
        InputError: a value out of range.
    """

    max_new_tokens: int = 128
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    eos_token_ids: tuple[int, ...] = ()
    lookup_tokens: int = 0
    guide: Guide | None = None

    def __post_init__(self) -> None:
        # One string, or a list, is what callers often have at hand; a str as a tuple would be its letters.
        stop = (self.stop,) if isinstance(self.stop, str) else _tuple("stop", self.stop, "strings")
        object.__setattr__(self, "stop", stop)
        object.__setattr__(self, "eos_token_ids", _tuple("eos_token_ids", self.eos_token_ids, "token ids"))
        if any(not isinstance(s, str) or not s for s in stop):
            raise InputError(f"stop is {list(stop)!r}, expected strings that are not empty")
        _check_int("max_new_tokens", self.max_new_tokens, 1)
        _check_int("top_k", self.top_k, 0, "; 0 keeps all tokens")
        _check_int("lookup_tokens", self.lookup_tokens, 0, "; 0 drafts none")
        if self.seed is not None:
            _check_int("seed", self.seed, 0)
        if not isinstance(self.do_sample, bool):
            raise InputError(f"do_sample is {self.do_sample!r}, expected True or False")
        _check_float("top_p", self.top_p, above=0.0, most=1.0, hint="; 1 keeps all tokens")
        _check_float("min_p", self.min_p, least=0.0, most=1.0, hint="; 0 keeps all tokens")
        _check_float("repetition_penalty", self.repetition_penalty, above=0.0, hint="; 1 changes nothing")
        _check_float("temperature", self.temperature, least=0.0)
        if self.do_sample and self.temperature == 0:
            raise InputError("temperature 0 with do_sample=True, expected a temperature above 0 or do_sample=False")

    @classmethod
    def from_defaults(cls, generation: Mapping[str, Any], **overrides: Any) -> GenerationConfig:
        """The checkpoint's defaults (`ModelConfig.generation`) with the caller's own settings over them.

        An override that is None was not given. A temperature that was given says whether to sample (above 0: yes,
        0: no) unless do_sample was given too.

        Raises:
            InputError: an unknown setting or a value out of range.
        """
        known = {f.name for f in fields(cls)}
        unknown = sorted(set(overrides) - known)
        if unknown:
            raise InputError(f"unknown generation settings {unknown}, expected some of {sorted(known)}")
        given = {k: v for k, v in overrides.items() if v is not None}
        # A null in generation_config.json means "the library's default".
        settings = {k: v for k, v in generation.items() if k in known - {"guide"} and v is not None} | given
        if "temperature" in given and "do_sample" not in given:
            _check_float("temperature", given["temperature"], least=0.0)
            settings["do_sample"] = given["temperature"] > 0
        return cls(**settings)


def _tuple(name: str, value: Any, of: str) -> tuple[Any, ...]:
    try:
        return tuple(value)
    except TypeError:
        raise InputError(f"{name} is {value!r}, expected a list of {of}") from None


def _check_int(name: str, value: object, least: int, hint: str = "") -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise InputError(f"{name} is {value!r}, expected a whole number of at least {least}{hint}")


def _check_float(
    name: str, value: object, least: float = -math.inf, above: float = -math.inf, most: float = math.inf, hint: str = ""
) -> None:
    good = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < math.inf
    if not good or not (least <= value <= most and value > above):  # type: ignore[operator]
        low = f"above {above:g}" if above > -math.inf else f"of at least {least:g}"
        high = f" and at most {most:g}" if most < math.inf else ""
        raise InputError(f"{name} is {value!r}, expected a number {low}{high}{hint}")


class Sampler:
    """Picks tokens from logits; state is the random generator alone.

    The order of the steps is transformers': repetition penalty, temperature, top-k, top-p, min-p.
    """

    def __init__(self, config: GenerationConfig, rng: np.random.Generator | None = None) -> None:
        """`rng` overrides the config's seed, so that several answers can share one stream of draws."""
        self.config = config
        self._rng = rng if rng is not None else np.random.default_rng(config.seed)

    def next(self, logits: NDArray[np.floating], seen_ids: NDArray[np.int64] | None = None) -> int:
        """The next token id.

        Args:
            logits: float [V], of one row.
            seen_ids: ids of the prompt and of the answer so far; only the repetition penalty reads them.

        Raises:
            EngineError: a logit is NaN or +inf, or all are -inf.
        """
        scores = self._penalized(logits, seen_ids)
        if not self.config.do_sample:
            return int(np.argmax(scores))  # the lowest id among equals
        ids, weights = self._weights(scores)
        place = _draw(weights, self._rng.random())
        return int(ids[place]) if ids is not None else place

    def probabilities(
        self, logits: NDArray[np.floating], seen_ids: NDArray[np.int64] | None = None
    ) -> NDArray[np.float64]:
        """The distribution that `next` draws from, float64 [V]; all on one token where it does not sample."""
        scores = self._penalized(logits, seen_ids)
        out = np.zeros(scores.shape, np.float64)
        if not self.config.do_sample:
            out[np.argmax(scores)] = 1.0
            return out
        ids, weights = self._weights(scores)
        out[slice(None) if ids is None else ids] = weights / weights.sum(dtype=np.float64)
        return out

    def _penalized(self, logits: NDArray[np.floating], seen_ids: NDArray[np.int64] | None) -> NDArray[np.float32]:
        scores = np.asarray(logits, np.float32)
        _check_logits(scores)
        penalty = _float32(self.config.repetition_penalty)
        if penalty != 1 and seen_ids is not None and len(seen_ids):
            seen = np.asarray(seen_ids)
            values = scores[seen]
            scores = scores.copy()
            with np.errstate(over="ignore"):
                changed = np.where(values < 0, values * penalty, values / penalty)
            # An extreme penalty makes a score the highest or lowest there is, not infinite; what is excluded stays so.
            scores[seen] = np.where(np.isneginf(values), values, np.clip(changed, _FLOAT32.min, _FLOAT32.max))
        return scores

    def _weights(self, scores: NDArray[np.float32]) -> tuple[NDArray[np.intp] | None, NDArray[np.float32]]:
        """Ids that survive (ascending; None: all of them) and their unnormalized probabilities."""
        c = self.config
        ids: NDArray[np.intp] | None = None
        if 0 < c.top_k < scores.size:
            ids = np.flatnonzero(scores >= _kth_largest(scores, c.top_k))
            scores = scores[ids]
        # exp of (score - highest) / temperature: the highest is 1, nothing overflows. The difference comes first, so
        # that a tiny temperature does not overflow either: in the limit it is greedy, equals shared out.
        with np.errstate(over="ignore"):  # to -inf, a weight of 0
            weights = np.exp((scores - scores.max()) / _float32(c.temperature))
        if c.top_p < 1:
            keep = _nucleus(weights, c.top_p)
            ids, weights = keep if ids is None else ids[keep], weights[keep]
        if c.min_p > 0:
            keep = np.flatnonzero(weights >= c.min_p * weights.max())
            ids, weights = keep if ids is None else ids[keep], weights[keep]
        return ids, weights


def _float32(value: float) -> np.float32:
    """A positive number as float32 can hold it: 1e-50 as the least normal one (0 / 0 is NaN), 1e50 as the largest."""
    return np.float32(min(max(value, float(_FLOAT32.tiny)), float(_FLOAT32.max)))


def _check_logits(scores: NDArray[np.float32]) -> None:
    if scores.ndim != 1 or not scores.size:
        raise EngineError(f"logits have shape {list(scores.shape)}, expected those of one token, [V]")
    top = float(scores[np.argmax(scores)])  # argmax stops at the first NaN, so one pass finds all that is wrong
    if math.isfinite(top):
        return
    index = int(np.argmax(scores)) if math.isnan(top) or top > 0 else 0
    what = f"logit {index} of {scores.size} is {top}" if top != -math.inf else f"all {scores.size} logits are -inf"
    raise EngineError(
        f"{what}, expected finite numbers; try another engine or export with --precision fp32, "
        "and let `edgevl verify` name the stage that breaks"
    )


def _kth_largest(scores: NDArray[np.float32], k: int) -> np.float32:
    """The k-th largest value, without sorting or even partitioning them all.

    The k-th largest of block maxima is a lower bound: only what reaches it can be among the k.
    """
    width = 64
    blocks = scores.size // width
    if blocks > 4 * k:
        whole = scores[: blocks * width]
        maxima = np.append(whole.reshape(width, blocks).max(axis=0), scores[blocks * width :])
        scores = scores[scores >= np.partition(maxima, maxima.size - k)[maxima.size - k]]
    return np.partition(scores, scores.size - k)[scores.size - k]


def _draw(weights: NDArray[np.float32], uniform: float) -> int:
    """The place at which the running sum of the weights passes `uniform` (in [0, 1)) of their total.

    In two steps, over sums of blocks and then inside one: a running sum over 150,000 float64 takes a millisecond.
    """
    width = 512
    whole = weights.size // width * width
    sums = weights[:whole].reshape(-1, width).sum(axis=1, dtype=np.float64)
    cumulative = np.append(sums, weights[whole:].sum(dtype=np.float64)).cumsum()
    target = uniform * cumulative[-1]
    block = _first_past(cumulative, target)
    inner = weights[block * width : (block + 1) * width].astype(np.float64).cumsum()
    return block * width + _first_past(inner, target - (cumulative[block - 1] if block else 0.0))


def _first_past(cumulative: NDArray[np.float64], target: float) -> int:
    """The first place whose running sum is above the target; where rounding leaves none, the last that adds to it.

    Either way a place with a weight of 0 is never the answer.
    """
    last = int(np.searchsorted(cumulative, cumulative[-1], side="left"))
    return min(int(np.searchsorted(cumulative, target, side="right")), last)


def _nucleus(weights: NDArray[np.float32], top_p: float) -> NDArray[np.intp]:
    """Ids, ascending, of the fewest tokens whose share reaches top_p (arXiv:1904.09751, section 3.1)."""
    target = top_p * float(weights.sum(dtype=np.float64))
    # Weighted quickselect for the lightest weight that is still needed: each pass keeps the side of the mean on which
    # the running sum from the top crosses the target, so that only a short rest is sorted.
    rest, above = weights, 0.0  # above: the mass of what is heavier than `rest`, all of it kept
    while rest.size > 1024:
        mean = rest.mean()
        heavy = rest.compress(rest > mean)
        mass = float(heavy.sum(dtype=np.float64))
        if above + mass >= target:
            rest = heavy
        else:
            light = rest.compress(rest <= mean)
            if light.size == rest.size:  # all equal
                break
            rest, above = light, above + mass
    rest = np.sort(rest)[::-1]
    mass = above + np.cumsum(rest, dtype=np.float64)
    # A token stays while those before it have not reached the target; rounding may leave the last sum just short.
    count = min(int(np.searchsorted(mass, target, side="left")), rest.size - 1)
    cutoff = rest[count]
    surplus = int(np.count_nonzero(rest[count + 1 :] == cutoff))
    kept = np.flatnonzero(weights >= cutoff)
    if surplus:  # among equals the lowest ids stay
        equal = np.flatnonzero(weights[kept] == cutoff)
        kept = np.delete(kept, equal[equal.size - surplus :])
    return kept


class StopStrings:
    """Cuts a stream of text before the first stop string, wherever the pieces break.

    Text that may be the beginning of a stop string is held back until the next piece decides. With several stop
    strings the one that is complete first counts, so the result does not depend on the pieces.
    """

    def __init__(self, stop: tuple[str, ...]) -> None:
        self._stop = stop
        self._held = ""
        self._stopped = False

    def push(self, piece: str) -> tuple[str, bool]:
        """Take the next piece; give the text that may be shown now, and whether a stop string was reached."""
        if self._stopped:
            return "", True
        text = self._held + piece
        found = [(at + len(stop), at) for stop in self._stop if (at := text.find(stop)) >= 0]
        if found:
            self._held, self._stopped = "", True
            return text[: min(found)[1]], True
        keep = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], False

    def flush(self) -> str:
        """The text held back, once no more pieces come."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest proper beginning of `stop` that `text` ends with."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
