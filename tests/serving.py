"""A server in this process over a real socket, for the tests of `edgevl serve`. Needs no torch."""

from __future__ import annotations

import base64
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from edgevl.export.exporter import ExportOptions, export_bundle
from edgevl.runtime.generation import VisionLanguageModel
from edgevl.runtime.scheduler import Scheduler
from edgevl.runtime.serve_app import ServeSettings, build_app
from edgevl.runtime.serve_command import HttpServer, bind
from edgevl.runtime.serve_metrics import Metrics
from edgevl.runtime.serve_pictures import MessageReader

DEMO = Path(__file__).parent.parent / "demo"
NAME = "demo"
# An answer of as many tokens as are wanted, whatever the model would like to say.
LONG = {"type": "json_schema", "json_schema": {"schema": {"type": "string", "minLength": 4000}}}
QUESTIONS = [  # picture, question
    ("line.png", "Read the text."),
    ("receipt.png", "What is the total?"),
    ("where.png", "Where is the red circle?"),
    ("count.png", "How many stars?"),
    ("three-lines.png", "Read the text."),
    ("colour.png", "What colour is the triangle?"),
    ("receipt-items.png", "List the items."),
    (None, "How many stars?"),
]


@dataclass
class Server:
    """A running server; `client` speaks to it, `notes` are the lines for whoever runs it."""

    url: str
    client: httpx.Client
    scheduler: Scheduler
    http: HttpServer
    notes: list[str]
    model: VisionLanguageModel  # the worker's: look, and do not run it
    reader: MessageReader

    def ask(self, body: dict[str, Any], **headers: str) -> httpx.Response:
        return self.client.post("/v1/chat/completions", json={"model": NAME, **body}, headers=headers)

    def text(self, body: dict[str, Any]) -> str:
        answer = self.ask(body)
        assert answer.status_code == 200, answer.text
        return answer.json()["choices"][0]["message"]["content"]


def demo_bundle(folder: Path) -> Path:
    export_bundle(DEMO / "model", folder / NAME, ExportOptions(precision="fp32"))
    return folder / NAME


def open_model(bundle: Path, **options: Any) -> VisionLanguageModel:
    return VisionLanguageModel.open(bundle, "ort-cpu", threads=1, **options)


@contextmanager
def serving(
    bundle: Path, max_batch: int = 4, max_queue: int = 32, allow_files: Path | None = None, **settings: Any
) -> Iterator[Server]:
    notes: list[str] = []
    with closing(bind("127.0.0.1", 0)) as listener, open_model(bundle) as model:
        metrics = Metrics()
        chosen = ServeSettings(**{"model": NAME, "note": notes.append, "files": allow_files is not None, **settings})
        scheduler = Scheduler(model, max_batch, max_queue, metrics)
        reader = MessageReader(model, allow_files, chosen.max_body_bytes, form_s=1)
        http = HttpServer(build_app(chosen, scheduler, reader, metrics), listener, grace=5)
        try:
            with httpx.Client(base_url=http.url, timeout=30) as client:
                yield Server(http.url, client, scheduler, http, notes, model, reader)
        finally:
            http.end()
            assert scheduler.close(10)
            http.join(10)
            assert not http.running


def data_url(picture: str | bytes) -> str:
    data = (DEMO / "pictures" / picture).read_bytes() if isinstance(picture, str) else picture
    return "data:image/png;base64," + base64.b64encode(data).decode()


def user(text: str, *pictures: str | bytes) -> list[dict[str, Any]]:
    """Messages in OpenAI's form: demo pictures by name, or the bytes of a file."""
    content: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": data_url(p)}} for p in pictures]
    return [{"role": "user", "content": [*content, {"type": "text", "text": text}]}]


def ours(text: str, *pictures: str | bytes) -> list[dict[str, Any]]:
    """The same in ours."""
    images = [DEMO / "pictures" / p if isinstance(p, str) else p for p in pictures]
    return [
        {"role": "user", "content": [*({"type": "image", "image": i} for i in images), {"type": "text", "text": text}]}
    ]


def long(tokens: int = 3000) -> dict[str, Any]:
    """A request whose answer takes seconds."""
    return {"messages": user("How many stars?"), "response_format": LONG, "max_tokens": tokens, "temperature": 0}


def until(true: Callable[[], bool], seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "it did not come to be"
        time.sleep(0.01)
