"""Prompt-lookup drafts: what followed the last few tokens where they stood before is proposed as what comes next.

The decoder checks a whole draft in one call, so an answer that repeats its prompt (a quotation, a form, code) takes
fewer calls, and the tokens stay those of one-by-one decoding. (Saxena 2023, "Prompt Lookup Decoding"; verification as
in Leviathan et al., arXiv:2211.17192, section 2.3, for greedy decoding.) Purely token ids and seconds; no engine.
"""

from __future__ import annotations

import numpy as np

__all__ = ["PromptLookup"]

LONGEST, SHORTEST = 4, 2  # tokens that must agree; a single one agrees by chance too often
_TRIAL = 3  # drafts after which their worth is judged
_PAUSE, _LONGEST_PAUSE = 16, 512  # tokens without drafts after a trial that did not pay; doubles each time
_WEIGHT = 0.3  # of the newest value in running means


class PromptLookup:
    """Drafts for one answer. It compares the seconds per token with and without drafts, and pauses when they cost
    more than they save.

    Args:
        tokens: most tokens in a draft.
        placeholders: ids of pictures' and videos' tokens, which no answer holds.
    """

    def __init__(self, tokens: int, placeholders: tuple[int, ...] = ()) -> None:
        self.tokens, self._placeholders = tokens, placeholders
        self.drafted = self.accepted = 0
        self._step_s: float | None = None  # running means
        self._call_s = self._gained = 0.0
        self._trials = 0
        self._pause, self._resume_at = _PAUSE, 0

    def propose(self, sequence: np.ndarray, limit: int) -> np.ndarray:
        """Up to `limit` tokens that may follow `sequence` (int64 [S], prompt and answer), int64 [n], n >= 0.

        Of the places where the longest run of last tokens stood before, the latest counts. None before the cost of a
        step without a draft is known, and while pausing.
        """
        nothing = sequence[:0]
        limit = min(limit, self.tokens)
        if limit < 1 or self._step_s is None or len(sequence) < self._resume_at:
            return nothing
        for size in range(min(LONGEST, len(sequence) - 1), SHORTEST - 1, -1):
            # Where the run of `size` tokens starts; the sequence's own end does not count.
            matches = np.ones(len(sequence) - size, bool)
            for i, token in enumerate(sequence[len(sequence) - size :]):
                matches &= sequence[i : i + len(matches)] == token
            found = np.flatnonzero(matches)
            if len(found):
                follows = int(found[-1]) + size
                draft = sequence[follows : follows + limit]
                bad = np.flatnonzero(np.isin(draft, self._placeholders))
                return draft[: bad[0]].copy() if len(bad) else draft.copy()
        return nothing

    def stepped(self, seconds: float) -> None:
        """A step without a draft took `seconds`."""
        self._step_s = seconds if self._step_s is None else _mean(self._step_s, seconds)

    def checked(self, drafted: int, accepted: int, seconds: float, length: int) -> None:
        """A call checked a draft: `accepted` of `drafted` tokens were right, and the sequence now has `length`."""
        self.drafted += drafted
        self.accepted += accepted
        first = self._trials == 0
        self._call_s = seconds if first else _mean(self._call_s, seconds)
        self._gained = accepted + 1 if first else _mean(self._gained, accepted + 1)
        self._trials += 1
        if self._trials < _TRIAL or self._step_s is None:
            return
        if self._call_s > self._gained * self._step_s:
            self._resume_at = length + self._pause
            self._pause = min(2 * self._pause, _LONGEST_PAUSE)
            self._trials = 0
        else:
            self._pause = _PAUSE


def _mean(old: float, new: float) -> float:
    return old + _WEIGHT * (new - old)
