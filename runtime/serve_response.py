"""Answers, chunks, lists and errors in OpenAI's form, as plain dictionaries. Knows no HTTP."""

from __future__ import annotations

import json
import secrets
import time
from dataclasses import dataclass, field
from typing import Any

from edgevl.runtime.errors import CapacityError, InputError, MemoryLimitError
from edgevl.runtime.jobs import BusyError
from edgevl.runtime.results import Completion, Usage
from edgevl.runtime.serve_request import RequestError

__all__ = ["DONE", "AnswerHead", "Failure", "failure", "model_object", "server_sent_event"]

DONE = b"data: [DONE]\n\n"


@dataclass(frozen=True)
class AnswerHead:
    """What all chunks of one answer share; `created` is in seconds since 1970."""

    model: str
    include_usage: bool = False
    id: str = field(default_factory=lambda: f"chatcmpl-{secrets.token_hex(12)}")
    created: int = field(default_factory=lambda: int(time.time()))

    def completion(self, done: Completion) -> dict[str, Any]:
        """A whole answer."""
        message = {"role": "assistant", "content": done.text, "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": done.finish_reason}
        return self._object("chat.completion", [choice]) | {"usage": _usage(done.usage)}

    def chunk(self, delta: dict[str, Any], finish_reason: str | None = None) -> dict[str, Any]:
        """A part of a streamed answer."""
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        return self._object("chat.completion.chunk", [choice]) | ({"usage": None} if self.include_usage else {})

    def usage_chunk(self, done: Completion) -> dict[str, Any]:
        """The last one, where it was asked for."""
        return self._object("chat.completion.chunk", []) | {"usage": _usage(done.usage)}

    def _object(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model, "choices": choices}


@dataclass(frozen=True)
class Failure:
    """An error as a response: HTTP status, OpenAI's error object, and whether the fault is ours."""

    status: int
    body: dict[str, Any]
    headers: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(
        cls, status: int, message: str, kind: str = "invalid_request_error", param: str | None = None,
        code: str | None = None, headers: dict[str, str] | None = None,
    ) -> Failure:  # fmt: skip
        told = {"message": _sendable(message), "type": kind, "param": param and _sendable(param), "code": code}
        return cls(status, {"error": told}, dict(headers or {}))


def failure(error: Exception) -> Failure:
    """What a client is told. An error that is not about its request tells nothing of ours."""
    if isinstance(error, RequestError):
        return Failure.of(error.status, str(error), param=error.param, code=error.code)
    if isinstance(error, BusyError):
        wait = {"Retry-After": str(error.retry_after_s)}
        if error.full:
            return Failure.of(429, str(error), "rate_limit_error", code="rate_limit_exceeded", headers=wait)
        return Failure.of(503, str(error), "server_error", code="unavailable", headers=wait)
    if isinstance(error, MemoryLimitError):  # other answers may be holding it
        return Failure.of(503, str(error), "server_error", code="unavailable", headers={"Retry-After": "5"})
    if isinstance(error, CapacityError):
        return Failure.of(400, str(error), param="messages", code="context_length_exceeded")
    if isinstance(error, InputError):
        return Failure.of(400, str(error))
    return Failure.of(500, "the server could not compute this answer", "server_error", code="internal_error")


def model_object(name: str, created: int) -> dict[str, Any]:
    """An entry of /v1/models."""
    return {"id": name, "object": "model", "created": created, "owned_by": "edgevl"}


def server_sent_event(value: dict[str, Any]) -> bytes:
    """One event; JSON has no line breaks of its own."""
    return b"data: " + json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


def _sendable(text: str) -> str:
    """JSON may bring half of a surrogate pair, which UTF-8 cannot carry."""
    return text.encode("utf-8", "backslashreplace").decode()


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }
