"""From chat messages to token ids: the checkpoint's own template, placeholders expanded, user text kept harmless.

Knows how many tokens a picture takes (its grid) but not its pixels; loading pictures is image_processing's.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn, TypeGuard

import jinja2
import jinja2.exceptions
import jinja2.sandbox
import numpy as np
from numpy.typing import NDArray

from edgevl.runtime.config import ModelConfig
from edgevl.runtime.errors import CheckpointError, InputError
from edgevl.runtime.image_processing import VisionGrid
from edgevl.runtime.tokenizer import Tokenizer

__all__ = [
    "ChatTemplate",
    "Prompt",
    "PromptBuilder",
    "VisionInput",
    "collect_vision",
    "is_list",
    "load_chat_template",
]

ROLES = ("system", "user", "assistant")
# Where an item may name its picture or video: the first three as in qwen_vl_utils, the others as in transformers
# (processing_utils.py, apply_chat_template); None: of either.
_SOURCE_KEYS = {"image": "image", "image_url": "image", "video": "video", "base64": "image", "url": None, "path": None}
# Settings of one picture or video, as in qwen_vl_utils; handed on to whoever loads it.
_OPTIONS = (
    *("min_pixels", "max_pixels", "resized_height", "resized_width"),
    *("fps", "nframes", "min_frames", "max_frames", "total_pixels", "video_start", "video_end", "sample_fps"),
)


@dataclass(frozen=True)
class VisionInput:
    """One picture or video of a conversation.

    kind: "image" or "video".
    source: what the message held: a path, URL or data: URL, bytes, PIL picture, array; for a video also its frames.
    options: settings beside it, such as min_pixels, max_pixels, resized_height, fps.
    """

    kind: str
    source: Any
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Prompt:
    """A prompt ready for the decoder.

    input_ids: int64 [S], placeholders expanded to the tokens of the grids.
    grids: pictures and videos in prompt order.
    text: as the template wrote it, one placeholder per picture, for people to read.
    """

    input_ids: NDArray[np.int64]
    grids: tuple[VisionGrid, ...]
    text: str


def is_list(value: Any) -> TypeGuard[Sequence[Any]]:
    """A sequence of things; a text or bytes, sequences of their letters, are one thing."""
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes, bytearray, memoryview))


def collect_vision(messages: Any) -> list[VisionInput]:
    """The pictures and videos of a conversation in prompt order.

    Raises:
        InputError: messages that are not understood; says which one and what was expected.
    """
    return _parse_messages(messages)[1]


class ChatTemplate:
    """A checkpoint's Jinja chat template, rendered in a sandbox: it is code from a download.

    Options, globals and filters are those that Hugging Face gives templates (transformers,
    utils/chat_template_utils.py), less the `generation` tag, which serves training only.
    """

    def __init__(self, source: str, where: str = "chat template") -> None:
        """Raises CheckpointError where the source does not compile."""
        self.source = source
        self._where = where
        environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as e:
            raise CheckpointError(
                f"{where}: not a Jinja template ({_line(e)}); take the one of the released model"
            ) from None

    def render(self, messages: list[dict[str, Any]], add_generation_prompt: bool = True, **variables: Any) -> str:
        """The conversation as text.

        Raises:
            InputError: the template refuses the conversation (its raise_exception).
            CheckpointError: the template does what the sandbox forbids, or fails.
        """
        try:
            return self._template.render(messages=messages, add_generation_prompt=add_generation_prompt, **variables)
        except _RefusedError as e:
            raise InputError(f"{self._where}: refuses this conversation: {_line(e)}") from None
        except jinja2.exceptions.SecurityError as e:
            raise CheckpointError(
                f"{self._where}: does what a template must not ({_line(e)}); do not trust it"
            ) from None
        except Exception as e:  # whatever the template's expressions raise
            raise CheckpointError(
                f"{self._where}: fails with {type(e).__name__}: {_line(e)}; take the released one"
            ) from None


def load_chat_template(folder: str | Path) -> ChatTemplate:
    """Read chat_template.jinja, else chat_template.json, else tokenizer_config.json of a checkpoint or bundle.

    Raises:
        CheckpointError: none holds a template, or the first that should is malformed.
    """
    folder = Path(folder)
    jinja = folder / "chat_template.jinja"
    if jinja.exists():
        try:
            return ChatTemplate(jinja.read_text(encoding="utf-8"), str(jinja))
        except (OSError, UnicodeDecodeError) as e:
            raise CheckpointError(f"{jinja}: not readable as text ({e}); re-download the checkpoint") from None
    for path in (folder / "chat_template.json", folder / "tokenizer_config.json"):
        if not path.exists():
            continue
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as e:
            raise CheckpointError(f"{path}: not readable as JSON ({e}); re-download the checkpoint") from None
        declared = found = value.get("chat_template") if isinstance(value, dict) else None
        if isinstance(declared, list):  # several by name
            named = {t.get("name"): t.get("template") for t in declared if isinstance(t, dict)}
            found = named.get("default") or (next(iter(named.values())) if len(named) == 1 else None)
        if isinstance(found, str):
            return ChatTemplate(found, str(path))
        if declared is not None or path.name == "chat_template.json":
            raise CheckpointError(f"{path}: chat_template must be a text, or a list with one named 'default'")
    raise CheckpointError(
        f"{folder}: no chat template in chat_template.jinja, chat_template.json or tokenizer_config.json; "
        "copy the one of the released model there"
    )


class PromptBuilder:
    """Turns messages into a Prompt. Special tokens come from the template alone, never from what people write."""

    def __init__(
        self, tokenizer: Tokenizer, template: ChatTemplate, config: ModelConfig, trusted: Collection[str] = ()
    ) -> None:
        """`trusted` names special tokens that stay control tokens in message text, such as GROUNDING_TOKENS.

        Raises:
            CheckpointError: tokenizer and config disagree on the placeholders.
        """
        self._tokenizer = tokenizer
        self._template = template
        self._merge_size = config.vision.spatial_merge_size
        self._kinds = {config.tokens.image_token_id: "image", config.tokens.video_token_id: "video"}
        for token_id, kind in self._kinds.items():
            if token_id not in tokenizer.special_ids:
                raise CheckpointError(
                    f"config.json: {kind}_token_id is {token_id}, expected a special token of the tokenizer; "
                    "config and tokenizer belong to different checkpoints"
                )
        self._specials = tokenizer.special_tokens
        self._disarmed = tuple(token for token in self._specials if token not in frozenset(trusted))

    def build(
        self,
        messages: Any,
        grids: Sequence[VisionGrid],
        add_generation_prompt: bool = True,
        add_vision_id: bool = False,
    ) -> Prompt:
        """Render, expand and encode a conversation.

        Args:
            messages: [{"role", "content": text | [{"type": "text" | "image" | "image_url" | "video", ...}]}].
            grids: of `collect_vision(messages)`, in that order.
            add_generation_prompt: end with the opening of the assistant's turn.
            add_vision_id: have the template number the pictures ("Picture 1: ").

        Raises:
            InputError: messages not understood, or another number of pictures than grids or placeholders.
        """
        parsed, vision, texts = _parse_messages(messages)
        if len(vision) != len(grids):
            raise InputError(f"the messages hold {len(vision)} pictures or videos, but {len(grids)} were given")
        shield = _Shield(self._disarmed, [*texts, self._template.source])
        rendered = self._template.render(
            shield.messages(parsed), add_generation_prompt=add_generation_prompt, add_vision_id=add_vision_id
        )
        pieces = self._tokenizer.split_specials(rendered)
        ids: list[int] = []
        kinds: list[str] = []
        for i, piece in enumerate(pieces):
            if i % 2 == 0:
                ids.extend(self._tokenizer.encode(shield.restore(piece), specials=False))
                continue
            token_id = self._specials[piece]
            kind = self._kinds.get(token_id)
            if kind is None:
                ids.append(token_id)
                continue
            if len(kinds) < len(grids):
                ids.extend([token_id] * grids[len(kinds)].tokens(self._merge_size))
            kinds.append(kind)
        if kinds != [v.kind for v in vision]:
            raise InputError(
                f"the messages hold {_count(v.kind for v in vision)}, the chat template wrote placeholders for "
                f"{_count(kinds)}; put pictures where the template looks for them, or take the released template"
            )
        return Prompt(np.array(ids, np.int64), tuple(grids), shield.restore(rendered))


class _Shield:
    """Keeps special-token strings in message text from being taken for control tokens.

    The first character of each is swapped for a private one before the template runs, and back after the rendered
    text has been cut at special tokens. Text without such strings goes through untouched, so the template's own
    string operations, and byte pairs across the seam of template and text, are as they would be without it. The
    ends of a text are looked at too: two texts side by side must not make up a special token between them.
    """

    def __init__(self, specials: Collection[str], texts: Sequence[str]) -> None:
        self._specials = specials
        used = set().union(*texts) if texts else set()
        private = (c for c in map(chr, range(0xF0000, 0x10FFFE)) if c not in used)
        self._swap: dict[str, str] = {}
        for special in specials:
            for character in special:
                if character not in self._swap:
                    self._swap[character] = next(private)
        self._back = str.maketrans({v: k for k, v in self._swap.items()})

    def messages(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [
            message
            | {
                "content": self._disarm(message["content"])
                if isinstance(message["content"], str)
                else [i | {"text": self._disarm(i["text"])} if "text" in i else i for i in message["content"]]
            }
            for message in messages
        ]

    def restore(self, text: str) -> str:
        return text.translate(self._back)

    def _disarm(self, text: str) -> str:
        places: set[int] = set()
        for special in self._specials:
            at = text.find(special)
            while at >= 0:
                places.add(at)
                at = text.find(special, at + 1)
            for length in range(1, min(len(text), len(special) - 1) + 1):
                if text.endswith(special[:length]):  # the beginning of one at the end of this text
                    places.add(len(text) - length)
                if text.startswith(special[-length:]):  # the end of one at its beginning
                    places.add(0)
        if not places:
            return text
        return "".join(self._swap[c] if i in places else c for i, c in enumerate(text))


def _parse_messages(messages: Any) -> tuple[list[dict[str, Any]], list[VisionInput], list[str]]:
    """Check messages; give them as the template may see them (no sources), their vision inputs and their texts."""
    if not is_list(messages):
        raise InputError(f"messages are a {type(messages).__name__}, expected a list of {{'role', 'content'}}")
    if not messages:
        raise InputError("messages are empty, expected at least one {'role': 'user', 'content': ...}")
    parsed: list[dict[str, Any]] = []
    vision: list[VisionInput] = []
    texts: list[str] = []
    for number, message in enumerate(messages, 1):
        where = f"message {number}"
        if not isinstance(message, dict):
            raise InputError(f"{where} is a {type(message).__name__}, expected {{'role', 'content'}}")
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise InputError(f"{where}: role is {role!r}, expected one of {', '.join(ROLES)}")
        if isinstance(content, str):
            texts.append(content)
            parsed.append({"role": role, "content": content})
            continue
        if not isinstance(content, (list, tuple)):
            got = "missing" if "content" not in message else f"a {type(content).__name__}"
            raise InputError(f"{where}: content is {got}, expected a text or a list of text, image and video items")
        items: list[dict[str, Any]] = []
        for place, item in enumerate(content, 1):
            found = _parse_item(item, f"{where}, item {place}")
            if isinstance(found, str):
                texts.append(found)
                items.append({"type": "text", "text": found})
            else:
                vision.append(found)
                items.append({"type": found.kind})
        parsed.append({"role": role, "content": items})
    return parsed, vision, texts


def _parse_item(item: Any, where: str) -> str | VisionInput:
    if not isinstance(item, dict):
        raise InputError(f"{where} is a {type(item).__name__}, expected {{'type': 'text' | 'image' | 'video', ...}}")
    sources = [key for key in ("text", *_SOURCE_KEYS) if key in item]
    kind = item.get("type") or next((_SOURCE_KEYS.get(key, "text") for key in sources), None)
    kind = "image" if kind == "image_url" else kind
    if kind not in ("text", "image", "video"):
        raise InputError(f"{where}: type is {kind!r}, expected 'text', 'image', 'image_url' or 'video'")
    expected = ["text"] if kind == "text" else [k for k, of in _SOURCE_KEYS.items() if of in (kind, None)]
    if len(sources) != 1 or sources[0] not in expected:
        raise InputError(f"{where}: the {kind} has {sources or 'no source'}, expected exactly one of {expected}")
    source = item[sources[0]]
    if kind == "text":
        if not isinstance(source, str):
            raise InputError(f"{where}: text is a {type(source).__name__}, expected a string")
        return source
    if sources[0] == "image_url" and isinstance(source, dict):
        if "url" not in source:
            raise InputError(f"{where}: image_url has no 'url', expected {{'url': 'data:...'}} or a string")
        source = source["url"]
    if source is None:
        raise InputError(f"{where}: {sources[0]} is None, expected a path, URL, bytes, picture or array")
    if sources[0] == "base64":
        source = _data_url(source, where)
    unknown = sorted(set(item) - {"type", sources[0], *_OPTIONS}, key=str)  # whatever a dict may have for keys
    if unknown:
        raise InputError(f"{where}: unknown settings {unknown}, expected some of {', '.join(_OPTIONS)}")
    return VisionInput(kind, source, {k: item[k] for k in _OPTIONS if item.get(k) is not None})


def _data_url(source: Any, where: str) -> str:
    """A picture file in base64 as a data: URL, which has its checks and limits; transformers takes whole URLs too."""
    if not isinstance(source, str):
        raise InputError(f"{where}: base64 is a {type(source).__name__}, expected the picture file in base64, a string")
    return source if source[:5].lower() == "data:" else f"data:;base64,{source}"


def _count(kinds: Any) -> str:
    kinds = list(kinds)
    parts = [f"{kinds.count(kind)} {kind}s" for kind in ("image", "video")]
    return f"{' and '.join(parts)} (in the order {', '.join(kinds)})" if len(set(kinds)) > 1 else " and ".join(parts)


class _Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    def unsafe_undefined(self, obj: Any, attribute: str) -> jinja2.Undefined:
        # Jinja would print nothing and go on; a template that reaches for internals is not to be run at all.
        raise jinja2.exceptions.SecurityError(f"reaches for {attribute!r} of a {type(obj).__name__}")


def _line(error: Exception) -> str:
    """What a template says may have several."""
    return " ".join(str(error).split())[:300]


class _RefusedError(jinja2.TemplateError):
    """A template called raise_exception."""


def _raise_exception(message: str) -> NoReturn:
    raise _RefusedError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes HTML characters, which the models never saw.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)
