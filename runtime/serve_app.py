"""The HTTP application of `edgevl serve`: OpenAI's paths over a Scheduler. Needs starlette (extra `serve`)."""

from __future__ import annotations

import asyncio
import hmac
import os
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from edgevl.runtime.errors import EdgeVLError
from edgevl.runtime.jobs import Event, Failed, Job, Text
from edgevl.runtime.scheduler import Scheduler
from edgevl.runtime.serve_metrics import CONTENT_TYPE, Metrics
from edgevl.runtime.serve_pictures import MessageReader
from edgevl.runtime.serve_request import ChatRequest, RequestError, parse_json, parse_request
from edgevl.runtime.serve_response import DONE, AnswerHead, Failure, failure, model_object, server_sent_event

__all__ = ["ServeSettings", "build_app"]

_CHAT = "/v1/chat/completions"
_PATHS = {_CHAT, "/v1/models", "/health", "/metrics"}  # those that metrics name
_IDLE_S = 30  # without a byte of a body that was announced


@dataclass(frozen=True)
class ServeSettings:
    """model: the name that requests give. keys: one of them is needed, where there are any. max_tokens: of an answer.
    files: whether pictures may be files. note: gets a line on every fault of ours."""

    model: str
    keys: tuple[str, ...] = ()
    max_body_bytes: int = 20_000_000
    max_tokens: int = 1024
    files: bool = False
    cors_origins: tuple[str, ...] = ()
    note: Callable[[str], None] = lambda message: None


def build_app(settings: ServeSettings, scheduler: Scheduler, reader: MessageReader, metrics: Metrics) -> ASGIApp:
    """The application. It must not outlive the scheduler."""
    api = _Api(settings, scheduler, reader, metrics)
    routes = [
        Route(_CHAT, api.chat, methods=["POST"]),
        Route("/v1/models", api.models),
        Route("/v1/models/{name:path}", api.one_model),
        Route("/health", api.health),
        Route("/metrics", api.metrics),
    ]
    handlers: Any = {HTTPException: api.refused, EdgeVLError: api.failed, Exception: api.failed}
    app: ASGIApp = _Guard(Starlette(routes=routes, exception_handlers=handlers), settings.keys, metrics)
    if settings.cors_origins:  # outermost: a browser's preflight has no key, and must see the reason of a refusal
        app = CORSMiddleware(
            app, allow_origins=settings.cors_origins, allow_methods=["GET", "POST"],
            allow_headers=["*"],  # OpenAI's client for browsers sends a dozen of its own
            expose_headers=["Retry-After"],
        )  # fmt: skip
    return app


class _Api:
    """The endpoints."""

    def __init__(self, settings: ServeSettings, scheduler: Scheduler, reader: MessageReader, metrics: Metrics) -> None:
        self._settings, self._scheduler, self._reader, self._metrics = settings, scheduler, reader, metrics
        self._model = model_object(settings.model, int(time.time()))
        self._bodies = 0  # being received
        self._forms = ThreadPoolExecutor(1, "edgevl-serve-forms")  # a schema may take seconds, which no other waits for

    async def chat(self, request: Request) -> Any:
        media = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if media != "application/json":  # a form would let any web page ask without the browser's preflight
            raise RequestError(f"the Content-Type is {media[:60]!r}, expected application/json", status=415)
        self._scheduler.check_room()  # before megabytes are read for nothing
        if self._bodies >= self._scheduler.max_batch + self._scheduler.max_queue:
            raise self._scheduler.too_many(f"{self._bodies} requests are being received")
        loop, events = asyncio.get_running_loop(), asyncio.Queue[Event | None]()
        self._bodies += 1
        try:
            body = await _read_body(request, self._settings.max_body_bytes)
            asked, to_try = await asyncio.to_thread(self._parse, body)  # megabytes of base64
            del body
            if to_try:
                await loop.run_in_executor(self._forms, self._reader.try_form, asked)
        except ClientDisconnect:
            return Response(status_code=499)  # nobody reads it
        finally:
            self._bodies -= 1

        def deliver(event: Event) -> None:
            with suppress(RuntimeError):  # the server has ended, and its loop is closed
                loop.call_soon_threadsafe(events.put_nowait, event)

        job = Job(lambda: self._reader.read(asked), asked.generation, deliver)
        self._scheduler.submit(job)
        return _Answer(job, events, AnswerHead(self._settings.model, asked.include_usage), asked.stream, self.answer)

    def _parse(self, body: bytes) -> tuple[ChatRequest, bool]:
        """The request, and whether its form has to be tried first."""
        s = self._settings
        asked = parse_request(parse_json(body), s.model, s.max_tokens, s.files)
        if "json_schema" in asked.generation and find_spec("llguidance") is None:
            raise RequestError("this server has no forms: the package llguidance is missing", "response_format")
        return asked, self._reader.is_to_try(asked)

    async def models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._model]})

    async def one_model(self, request: Request) -> Response:
        name = request.path_params["name"]
        if name != self._settings.model:
            message = f"the model {name[:60]!r} does not exist here; this server has {self._settings.model!r}"
            raise RequestError(message, "model", "model_not_found", 404)
        return JSONResponse(self._model)

    async def health(self, request: Request) -> Response:
        problem = self._scheduler.problem
        return JSONResponse({"status": "ok" if problem is None else problem}, 200 if problem is None else 503)

    async def metrics(self, request: Request) -> Response:
        gauges = {
            "edgevl_requests_waiting": ("Requests that wait for a row.", float(self._scheduler.waiting)),
            "edgevl_requests_running": ("Answers being written.", float(self._scheduler.running)),
        }
        return Response(self._metrics.render(gauges), media_type=CONTENT_TYPE)

    async def refused(self, request: Request, error: HTTPException) -> Response:
        """Starlette's own errors: no such path, another method."""
        if error.status_code == 404:
            message = f"no such path: {request.url.path[:100]}"
        else:
            message = f"{request.method} {request.url.path[:100]}: {error.detail}"
        return _response(Failure.of(error.status_code, message, headers=dict(error.headers or {})))

    async def failed(self, request: Request, error: Exception) -> Response:
        return _response(self.answer(error))

    def answer(self, error: Exception) -> Failure:
        """What a client is told, and a line for whoever runs the server where the fault is ours."""
        told = failure(error)
        if told.status == 500:
            self._settings.note(f"edgevl serve: {type(error).__name__}: {' '.join(str(error).split())}")
            if os.environ.get("EDGEVL_DEBUG") == "1":
                self._settings.note("".join(traceback.format_exception(type(error), error, error.__traceback__)))
        return told


class _Answer:
    """The response to one chat completion: status and headers wait for the first token, so that a picture that cannot
    be used is a 400 in a stream too. A client that goes away takes its answer with it."""

    def __init__(
        self,
        job: Job,
        events: asyncio.Queue[Event | None],
        head: AnswerHead,
        stream: bool,
        answer: Callable[[Exception], Failure],
    ) -> None:
        self._job, self._events, self._head, self._stream, self._failure = job, events, head, stream, answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        gone = asyncio.create_task(self._watch(receive))
        try:
            event = await self._events.get()
            while isinstance(event, Text) and not self._stream:
                event = await self._events.get()
            if event is None:
                return
            if isinstance(event, Failed):
                await _response(self._failure(event.error))(scope, receive, send)
            elif isinstance(event, Text):
                await self._send_stream(event, send)
            else:
                await JSONResponse(self._head.completion(event.completion))(scope, receive, send)
        finally:
            gone.cancel()
            self._job.cancel()

    async def _watch(self, receive: Receive) -> None:
        """A None among the events when the client has gone."""
        while (await receive())["type"] != "http.disconnect":
            pass
        self._job.cancel()
        self._events.put_nowait(None)

    async def _send_stream(self, event: Event | None, send: Send) -> None:
        headers = [
            (b"content-type", b"text/event-stream; charset=utf-8"),
            (b"cache-control", b"no-cache"),
            (b"x-accel-buffering", b"no"),  # a proxy must not collect the stream
        ]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        parts = [server_sent_event(self._head.chunk({"role": "assistant", "content": ""}))]
        while isinstance(event, Text):
            if event.text:
                parts.append(server_sent_event(self._head.chunk({"content": event.text})))
            if parts:
                await send({"type": "http.response.body", "body": b"".join(parts), "more_body": True})
            parts, event = [], await self._events.get()
        if event is None:
            return
        if isinstance(event, Failed):
            parts = [server_sent_event(self._failure(event.error).body)]
        else:
            parts = [server_sent_event(self._head.chunk({}, event.completion.finish_reason))]
            if self._head.include_usage:
                parts.append(server_sent_event(self._head.usage_chunk(event.completion)))
            parts.append(DONE)
        await send({"type": "http.response.body", "body": b"".join(parts)})


class _Guard:
    """Asks for a key, and counts responses by status."""

    def __init__(self, app: ASGIApp, keys: Sequence[str], metrics: Metrics) -> None:
        self._app, self._keys, self._metrics = app, [k.encode() for k in keys], metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"] if scope["path"] in _PATHS else "other"

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._metrics.request(path, message["status"])
            await send(message)

        if path == "/health" or self._allowed(dict(scope["headers"]).get(b"authorization", b"")):
            await self._app(scope, receive, counted)
            return
        refused = Failure.of(
            401, "no or a wrong API key; expected the header Authorization: Bearer KEY",
            code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"},
        )  # fmt: skip
        await _response(refused)(scope, receive, counted)

    def _allowed(self, header: bytes) -> bool:
        """Every key is compared, each in constant time."""
        kind, _, given = header.partition(b" ")
        matches = [hmac.compare_digest(given.strip(), key) for key in self._keys]
        return not self._keys or (kind.lower() == b"bearer" and any(matches))


def _response(told: Failure) -> Response:
    return JSONResponse(told.body, told.status, told.headers)


async def _read_body(request: Request, limit: int) -> bytes:
    """The body, at most `limit` bytes of it in memory. What is not read here the HTTP library throws away, so that a
    client that sends it all sees the reason.

    Raises:
        RequestError: larger (413), or it does not come (408).
        ClientDisconnect: nor will it.
    """
    declared = request.headers.get("content-length", "")
    size = int(declared) if declared.isdecimal() else 0
    parts: list[bytes] = []
    read, stream = 0, request.stream()
    while size <= limit:
        try:
            parts.append(await asyncio.wait_for(stream.__anext__(), _IDLE_S))
        except StopAsyncIteration:
            return b"".join(parts)
        except asyncio.TimeoutError:
            raise RequestError(f"the body did not come within {_IDLE_S} s", status=408) from None
        read += len(parts[-1])
        size = max(size, read)
    what = f"{declared} bytes" if declared else f"over {limit} bytes"
    raise RequestError(f"the body has {what}, expected at most {limit}", code="body_too_large", status=413)
