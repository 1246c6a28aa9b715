"""Answers held to a form: a JSON schema, a regular expression or a list of choices, through llguidance.

A form becomes a grammar once (`GuideCompiler.compile`); each answer then walks it with a `GuideState`, which says
before every token which tokens may come next. The mask goes onto the logits before anything is sampled, so it holds
for greedy and sampled answers and for every row of a batch. It knows token ids and logits, no engine and no prompt.

llguidance (extra `guided`) is imported when the first form is compiled. Special tokens never match a form; the end
tokens are allowed exactly where the text is complete.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgevl.runtime.errors import EdgeVLError, EngineError, InputError
from edgevl.runtime.tokenizer import Tokenizer, check_text

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

__all__ = ["FORMS", "FormError", "Guide", "GuideCompiler", "GuideState"]

FORMS = ("json_schema", "regex", "choices")
# JSON as Python's json.dumps spaces it, which is what models have seen most. Fixed, because free white space would let
# an answer of bounded content grow without end.
_JSON_LAYOUT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
_QUIET = 0  # llguidance writes to stderr above this


class FormError(EngineError, InputError):
    """A form that llguidance gave up on: too complex, or a token that does not fit it."""


@dataclass(frozen=True)
class Guide:
    """A compiled form. `kind` is one of FORMS, `form` is it in a few words, for messages."""

    kind: str
    form: str
    grammar: str = field(repr=False)
    eos_token_ids: tuple[int, ...] = field(repr=False)
    matcher: LLMatcher = field(repr=False, compare=False)  # at the beginning of an answer; making one takes a while

    def start(self) -> GuideState:
        """The state of a new answer."""
        return GuideState(self.matcher.deep_copy(), self)


class GuideState:
    """Where one answer stands in its form."""

    def __init__(self, matcher: LLMatcher, guide: Guide) -> None:
        self._matcher, self._guide = matcher, guide
        self._check()

    def mask(self, logits: NDArray[np.floating]) -> NDArray[np.float32]:
        """A copy of logits [V] with -inf where a token would leave the form.

        Raises:
            FormError: llguidance gave up, for instance because a form is too complex.
        """
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        self._check()
        allowed = np.unpackbits(bits, bitorder="little")[: logits.size].view(np.bool_)
        masked = np.full(logits.size, -np.inf, np.float32)
        masked[: allowed.size][allowed] = logits[: allowed.size][allowed]
        return masked

    def accept(self, token: int) -> bool:
        """Take the token chosen; True when the answer is complete and nothing but an end token could follow.

        Raises:
            FormError: the token does not fit the form; it was not chosen from masked logits.
        """
        self._matcher.consume_token(int(token))
        self._check()
        return self._matcher.is_stopped()

    @property
    def complete(self) -> bool:
        """Whether the text so far satisfies the form."""
        return self._matcher.is_accepting() or self._matcher.is_stopped()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise FormError(
                f"the {self._guide.kind} {self._guide.form} cannot be followed: "
                f"{_one_line(self._matcher.get_error())}; simplify it"
            )


class GuideCompiler:
    """Compiles forms for one tokenizer; the vocabulary is prepared once, when the first form comes (about a second
    for 150,000 tokens)."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        """`vocab_size`: columns of the logits, which may be more than the tokenizer has."""
        self._source, self._vocab_size, self._eos = tokenizer, vocab_size, tuple(eos_token_ids)
        self._tokenizer: LLTokenizer | None = None

    def compile(
        self,
        json_schema: Mapping[str, Any] | str | bool | None = None,
        regex: str | None = None,
        choices: Sequence[str] | None = None,
    ) -> Guide | None:
        """A guide of the one form given; None when none is.

        Args:
            json_schema: a schema as a dictionary, or as JSON text. The answer is JSON in one line, separators ", " and
                ": ". An unbounded schema (a string without maxLength) may run into max_new_tokens: the answer then
                ends with finish_reason "length" and is not complete.
            regex: the whole answer matches it (Rust's syntax: no look-around, no back-references).
            choices: the answer is one of these.

        Raises:
            InputError: more than one form, or one that cannot be used: names what is wrong with it.
            EdgeVLError: llguidance is not installed.
        """
        given = {k: v for k, v in zip(FORMS, (json_schema, regex, choices)) if v is not None}
        if not given:
            return None
        if len(given) > 1:
            raise InputError(f"{' and '.join(given)} were given; an answer follows one form: give one of them")
        ((kind, form),) = given.items()
        written = {"json_schema": _json_grammar, "regex": _regex_grammar, "choices": _choices_grammar}[kind]
        _require_llguidance()
        from llguidance import LLMatcher

        grammar, shown = written(form)
        tokenizer = self._prepared()
        wrong, messages = LLMatcher.validate_grammar_with_warnings(grammar, tokenizer)
        if wrong:
            raise InputError(f"the {kind} {shown} cannot be used: {_one_line(messages[0])}")
        return Guide(kind, shown, grammar, self._eos, LLMatcher(tokenizer, grammar, log_level=_QUIET))

    def _prepared(self) -> LLTokenizer:
        if self._tokenizer is None:
            from llguidance import LLTokenizer

            self._tokenizer = LLTokenizer(
                self._source.to_json(), n_vocab=self._vocab_size, eos_token=[*self._eos], slices=None
            )
        return self._tokenizer


def _require_llguidance() -> None:
    try:
        import llguidance  # noqa: F401
    except ImportError as e:
        raise EdgeVLError(
            f"json_schema, regex and choices need the package 'llguidance' ({e}); pip install 'edgevl[guided]'"
        ) from None


def _json_grammar(schema: object) -> tuple[str, str]:
    from llguidance import LLMatcher

    if isinstance(schema, str):
        shown = _short(schema)
        try:
            schema = json.loads(schema)
        except (ValueError, RecursionError) as e:
            raise InputError(f"the json_schema {shown} is not JSON ({e}); expected a schema such as "
                             '{"type": "object", "properties": {"total": {"type": "string"}}}') from None  # fmt: skip
    if schema is True:
        schema = {}
    if not isinstance(schema, Mapping):
        raise InputError(f"the json_schema is {_short(repr(schema))}, expected an object such as {{'type': 'object'}}")
    try:
        text = json.dumps(dict(schema))
        return LLMatcher.grammar_from_json_schema(text, overrides=_JSON_LAYOUT), _short(text)  # pyright: ignore
    except (TypeError, ValueError, RecursionError) as e:
        raise InputError(f"the json_schema cannot be used: {_one_line(str(e))}; expected plain JSON values") from None


def _regex_grammar(regex: object) -> tuple[str, str]:
    from llguidance import LLMatcher

    if not isinstance(regex, str) or not regex:
        raise InputError(f"the regex is {_short(repr(regex))}, expected a pattern such as [0-9]+")
    check_text(regex, "the regex")
    return LLMatcher.grammar_from_regex(regex), _short(repr(regex))


def _choices_grammar(choices: object) -> tuple[str, str]:
    from llguidance import LLMatcher

    listed = [choices] if isinstance(choices, str) else list(choices) if isinstance(choices, Sequence) else None
    if not listed or not all(isinstance(c, str) and c for c in listed):
        raise InputError(f"choices are {_short(repr(choices))}, expected at least one text, none of them empty")
    for choice in listed:
        check_text(choice, "a choice")
    # Lark's strings take JSON's escapes.
    lark = "start: " + " | ".join(json.dumps(c, ensure_ascii=False) for c in dict.fromkeys(listed))
    return LLMatcher.grammar_from_lark(lark), _short(repr(listed))


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 80 else text[:77] + "..."


def _one_line(text: str) -> str:
    return _short(text) if len(text) < 80 else " ".join(text.split())[:200]
