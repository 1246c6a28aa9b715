"""A body of POST /v1/chat/completions (OpenAI's form) checked and turned into messages and settings of ours.

Every field is known or refused: what would change the answer and is not supported must not be dropped silently. Knows
no HTTP and no model; pictures stay URLs.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, NoReturn

from edgevl.runtime.errors import InputError

__all__ = ["ChatRequest", "PictureUrl", "RequestError", "parse_json", "parse_request"]

_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
# name -> (type, least, most): OpenAI's limits where it has the field; the others keep float32 arithmetic finite.
_NUMBERS: dict[str, tuple[type, float, float]] = {
    "temperature": (float, 0, 2),
    "top_p": (float, 1e-6, 1),
    "min_p": (float, 0, 1),
    "repetition_penalty": (float, 0.1, 10),
    "top_k": (int, -1, 2**31),
}
_LIMITS = ("max_completion_tokens", "max_tokens")  # the first that is given counts
_READ = {"model", "messages", "stream", "stream_options", "stop", "seed", "response_format", *_NUMBERS, *_LIMITS}
_IGNORED = {
    *("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"),
    *("parallel_tool_calls", "prediction"),  # say nothing without tools; only save time
}
# What is not supported may be there with a value that asks for nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "audio": (),
    "reasoning_effort": ("none",),
    "verbosity": ("medium",),
    "web_search_options": (),
}
_MESSAGE_KEYS = {"role", "content", "name", "refusal", "annotations"}
_MOST_STOPS = 16
_SEEDS = 2**63


class RequestError(InputError):
    """A request that cannot be answered as it is; `param` and `code` are those of OpenAI's error object."""

    def __init__(self, message: str, param: str | None = None, code: str | None = None, status: int = 400) -> None:
        super().__init__(message)
        self.param, self.code, self.status = param, code, status


@dataclass(frozen=True)
class PictureUrl:
    """A picture in a message, not read yet; low: at most 512 × 512 pixels are wanted of it."""

    url: str
    low: bool = False


@dataclass(frozen=True)
class ChatRequest:
    """messages: as for `VisionLanguageModel.stream`, with a PictureUrl as the source of every picture.
    generation: settings of `stream`."""

    messages: list[dict[str, Any]]
    generation: dict[str, Any]
    stream: bool
    include_usage: bool


def parse_json(body: bytes) -> Any:
    """The value of a JSON text.

    Raises:
        RequestError: not JSON, or nested too deep.
    """
    try:
        return json.loads(body, parse_constant=_no_constant)
    except (ValueError, RecursionError) as e:  # UnicodeDecodeError is a ValueError
        reason = "nested too deep" if isinstance(e, RecursionError) else str(e)
        raise RequestError(f"the body is not JSON ({reason}); expected an object with model and messages") from None


def parse_request(body: Any, model: str, most_tokens: int, files: bool = False) -> ChatRequest:
    """Check a request.

    Args:
        body: what `parse_json` gave.
        model: the only name that is answered to.
        most_tokens: an answer's length where none is given, and at most.
        files: whether pictures may be files of the server.

    Raises:
        RequestError: says which field, what was got, what was expected.
    """
    if not isinstance(body, dict):
        raise RequestError(f"the body is a {type(body).__name__}, expected an object with model and messages")
    given = {k: v for k, v in body.items() if v is not None}  # null is OpenAI's "not given"
    _check_fields(given, model)
    stream = _flag(given, "stream")
    generation: dict[str, Any] = {"max_new_tokens": _length(given, most_tokens), "stop": _stop(given.get("stop", []))}
    for name, (kind, least, most) in _NUMBERS.items():
        if name in given:
            generation[name] = _number(name, given[name], kind, least, most)
    if generation.get("top_k") == -1:  # as in vLLM: all
        generation["top_k"] = 0
    if "seed" in given:
        seed = given["seed"]
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise RequestError(f"seed is {_shown(seed)}, expected a whole number", "seed")
        generation["seed"] = seed % _SEEDS
    schema = _schema(given.get("response_format", {"type": "text"}))
    if schema is not None:
        generation["json_schema"] = schema
    return ChatRequest(_messages(given["messages"], files), generation, stream, _include_usage(given, stream))


def _check_fields(given: dict[str, Any], model: str) -> None:
    for name in ("model", "messages"):
        if name not in given:
            raise RequestError(f"{name} is missing", name, "missing_required_parameter")
    for name, value in given.items():
        if name in _READ or name in _IGNORED:
            continue
        if name not in _NEUTRAL:
            raise RequestError(f"unknown field {_shown(name)}", name[:100], "unknown_parameter")
        if value not in _NEUTRAL[name]:
            allowed = " or ".join(json.dumps(v) for v in _NEUTRAL[name])
            hint = f"leave it away, or give {allowed}" if allowed else "leave it away"
            raise RequestError(f"{name} is {_shown(value)}: not supported here; {hint}", name, "unsupported_parameter")
    if given["model"] != model:
        raise RequestError(
            f"the model {_shown(given['model'])} does not exist here; this server has {model!r}",
            "model",
            "model_not_found",
            404,
        )


def _flag(given: dict[str, Any], name: str) -> bool:
    value = given.get(name, False)
    if not isinstance(value, bool):
        raise RequestError(f"{name} is {_shown(value)}, expected true or false", name)
    return value


def _include_usage(given: dict[str, Any], stream: bool) -> bool:
    options = given.get("stream_options")
    if options is None:
        return False
    if not stream:
        raise RequestError("stream_options are for stream true only", "stream_options")
    if not isinstance(options, dict) or set(options) - {"include_usage", "include_obfuscation"}:
        raise RequestError(f"stream_options are {_shown(options)}, expected include_usage", "stream_options")
    return _flag(options, "include_usage")


def _length(given: dict[str, Any], most: int) -> int:
    name = next((n for n in _LIMITS if n in given), None)
    return most if name is None else min(most, _number(name, given[name], int, 1, float("inf")))


def _number(name: str, value: Any, kind: type, least: float, most: float) -> Any:
    allowed = int if kind is int else (int, float)
    # An integer of any size compares rightly with a float; 1e999 is inf, and NaN is no JSON.
    if isinstance(value, bool) or not isinstance(value, allowed) or not least <= value <= most or value == 1e999:
        what = "whole number" if kind is int else "number"
        above = f" to {most:g}" if most < float("inf") else " or more"
        raise RequestError(f"{name} is {_shown(value)}, expected a {what} of {least:g}{above}", name)
    return value


def _stop(value: Any) -> tuple[str, ...]:
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or len(stops) > _MOST_STOPS or not all(isinstance(s, str) and s for s in stops):
        raise RequestError(
            f"stop is {_shown(value)}, expected a text or up to {_MOST_STOPS} of them, none empty", "stop"
        )
    return tuple(stops)


def _schema(form: Any) -> dict[str, Any] | None:
    """The JSON schema that a response_format asks for; None: text."""
    kind = form.get("type") if isinstance(form, dict) else None
    if kind == "text":
        return None
    if kind == "json_object":
        return {"type": "object"}
    described = form.get("json_schema") if kind == "json_schema" else None
    if not isinstance(described, dict) or not isinstance(described.get("schema", {}), dict):
        raise RequestError(
            f'response_format is {_shown(form)}, expected {{"type": "text"}}, {{"type": "json_object"}} or '
            '{"type": "json_schema", "json_schema": {"name": ..., "schema": {...}}}',
            "response_format",
        )
    return described.get("schema", {"type": "object"})


def _messages(messages: Any, files: bool) -> list[dict[str, Any]]:
    if not isinstance(messages, list) or not messages:
        raise RequestError(f"messages are {_shown(messages)}, expected a list with at least one", "messages")
    return [_message(m, f"messages[{i}]", files) for i, m in enumerate(messages)]


def _message(message: Any, where: str, files: bool) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise RequestError(f"{where} is {_shown(message)}, expected an object with role and content", where)
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or role not in _ROLES:
        hint = "; tools are not supported" if role in ("tool", "function") else ""
        raise RequestError(
            f"{where}.role is {_shown(role)}, expected one of {', '.join(_ROLES)}{hint}", f"{where}.role"
        )
    for key, value in message.items():
        if key not in _MESSAGE_KEYS and value not in (None, []):
            raise RequestError(f"{where}.{key[:100]}: not supported here; leave it away", f"{where}.{key[:100]}")
    if isinstance(content, str):
        return {"role": _ROLES[role], "content": content}
    if not isinstance(content, list):
        raise RequestError(
            f"{where}.content is {_shown(content)}, expected a text or a list of parts", f"{where}.content"
        )
    return {"role": _ROLES[role], "content": [_part(p, f"{where}.content[{i}]", files) for i, p in enumerate(content)]}


def _part(part: Any, where: str, files: bool) -> dict[str, Any]:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return {"type": "text", "text": part["text"]}
    if kind == "image_url":
        return {"type": "image", "image": _picture(part.get("image_url"), f"{where}.image_url", files)}
    raise RequestError(
        f'{where} is {_shown(part)}, expected {{"type": "text", "text": ...}} or '
        '{"type": "image_url", "image_url": {"url": "data:image/...;base64,..."}}',
        where,
    )


def _picture(image: Any, where: str, files: bool) -> PictureUrl:
    url, detail = (image.get("url"), image.get("detail", "auto")) if isinstance(image, dict) else (image, "auto")
    if not isinstance(url, str) or not url:
        raise RequestError(f'{where} is {_shown(image)}, expected {{"url": "data:image/...;base64,..."}}', where)
    if detail not in ("auto", "low", "high", None):
        raise RequestError(f"{where}.detail is {_shown(detail)}, expected auto, low or high", f"{where}.detail")
    if url[:5].lower() != "data:":
        send = "send the picture itself as a data: URL (data:image/png;base64,...)"
        if url[:7].lower() == "http://" or url[:8].lower() == "https://":
            raise RequestError(f"{where}: this server fetches nothing; {send}", where, "invalid_image_url")
        if not files:
            raise RequestError(f"{where}: this server reads no files; {send}", where, "invalid_image_url")
    return PictureUrl(url, detail == "low")


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def _shown(value: Any) -> str:
    """A value of the client's, short and on one line; a long one is not written out first."""
    if isinstance(value, (dict, list)):
        return f"{'an object' if isinstance(value, dict) else 'a list'} of {len(value)}"
    if isinstance(value, str):
        return repr(value[:60] + ("..." if len(value) > 60 else ""))
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) > 10**20:
        return "a very large number"
    return json.dumps(value)
