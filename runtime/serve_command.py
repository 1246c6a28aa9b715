"""The command `edgevl serve`: options, the socket, signals. HTTP runs in a thread of its own, the model in another."""

from __future__ import annotations

import ipaddress
import math
import os
import socket
import threading
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import click
import uvicorn

from edgevl.runtime.bundle import Bundle
from edgevl.runtime.commands import _engine_options, _open, note
from edgevl.runtime.errors import EngineError, InputError
from edgevl.runtime.scheduler import Scheduler
from edgevl.runtime.serve_app import ServeSettings, build_app
from edgevl.runtime.serve_metrics import Metrics
from edgevl.runtime.serve_pictures import MessageReader
from edgevl.runtime.stop_signals import StopSignals

__all__ = ["HttpServer", "bind", "serve"]

_KEY_VARIABLE = "EDGEVL_API_KEY"
_POLL_S = 0.05
_LAST_WORDS_S = 2  # for answers that were given up to say so to their clients


@click.command()
@click.argument("bundle")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0: any that is free.")
@click.option(
    "--api-key",
    "keys",
    multiple=True,
    metavar="KEY",
    help="Ask for this key (repeatable) [default: EDGEVL_API_KEY, which other users of the machine do not see; several "
    "with spaces between].",
)
@click.option("--model-name", metavar="NAME", help="The model's name in requests [default: the bundle's folder].")
@click.option(
    "--max-batch", type=click.IntRange(min=1), default=4, show_default=True, metavar="N", help="Answers at once."
)
@click.option(
    "--max-queue", type=click.IntRange(min=0), default=32, show_default=True, metavar="N", help="Requests that wait."
)
@click.option(
    "--max-new-tokens",
    type=click.IntRange(min=1),
    default=1024,
    show_default=True,
    metavar="N",
    help="Longest answer; requests that ask for more, or name no length, get this.",
)
@click.option("--max-body-mb", type=float, default=20, show_default=True, metavar="MB", help="Largest request.")
@click.option(
    "--allow-files", metavar="DIR", help="Let requests name picture files of this folder [default: no files]."
)
@click.option("--cors-origin", "origins", multiple=True, metavar="URL", help="Let pages of this origin ask (* all).")
@click.option(
    "--prefix-cache-mb",
    type=click.FloatRange(min=0),
    default=0,
    show_default=True,
    metavar="MB",
    help="Keep keys and values of earlier requests: conversations that are sent again pay for what is new.",
)
@click.option(
    "--grace",
    type=click.FloatRange(min=0),
    default=30,
    show_default=True,
    metavar="S",
    help="Seconds that running answers get when the server is told to end.",
)
@_engine_options
def serve(bundle: str, **options: Any) -> int:
    """Serve BUNDLE over HTTP as OpenAI's API does: /v1/chat/completions, /v1/models, /health, /metrics.

    Requests are answered together, at most --max-batch at once; others wait in order. Pictures come as data: URLs.
    SIGTERM ends it with status 0, Ctrl-C with 130, once running answers are complete; a second signal at once.

    \b
    Example:
      edgevl serve bundle --port 8000 --api-key SECRET
      curl localhost:8000/v1/models -H "Authorization: Bearer SECRET"
    """
    body_bytes = options["max_body_mb"] * 1e6
    if not 1 <= body_bytes < math.inf:
        raise InputError(f"--max-body-mb is {options['max_body_mb']}, expected megabytes above 0")
    if not math.isfinite(options["grace"]):
        raise InputError(f"--grace is {options['grace']}, expected seconds, 0 or more")
    keys = _keys(options["keys"])
    opened = Bundle.open(bundle, options["verify_hashes"])
    with closing(bind(options["host"], options["port"])) as listener, _Stop() as stop:
        address = ipaddress.ip_address(listener.getsockname()[0].partition("%")[0])
        if not address.is_loopback and not keys:
            note(f"edgevl serve: {address} can be reached by other machines, and no --api-key is asked for")
        with _open(opened, options) as model:
            metrics = Metrics()
            reader = MessageReader(model, options["allow_files"], int(body_bytes))
            settings = ServeSettings(
                model=options["model_name"] or Path(bundle).resolve().name,
                keys=keys,
                max_body_bytes=int(body_bytes),
                max_tokens=min(options["max_new_tokens"], model.capacity),
                files=options["allow_files"] is not None,
                cors_origins=options["origins"],
                note=note,
            )
            scheduler = Scheduler(model, _rows(model, options["max_batch"]), options["max_queue"], metrics)
            server = HttpServer(build_app(settings, scheduler, reader, metrics), listener, options["grace"])
            note(f"edgevl serve: {settings.model} on {server.url}")
            return _until_stopped(server, scheduler, stop, options["grace"])


def _keys(given: tuple[str, ...]) -> tuple[str, ...]:
    """The keys of the options, else those of the environment; an empty variable, which a script has failed to fill,
    does not open the server to all."""
    named = "--api-key"
    if not given and (listed := os.environ.get(_KEY_VARIABLE)) is not None:
        named, given = _KEY_VARIABLE, tuple(listed.split()) or ("",)
    if not all(k and k.isascii() and k.isprintable() and " " not in k for k in given):
        raise InputError(f"{named}: an empty key, or one with spaces or other characters than ASCII's")
    return given


def _rows(model: Any, wanted: int) -> int:
    most = model.engine.limits.rows
    if most is not None and most < wanted:
        note(f"edgevl serve: {model.engine.name} takes {most} rows at once, not {wanted}")
        return most
    return wanted


def _until_stopped(server: HttpServer, scheduler: Scheduler, stop: StopSignals, grace: float) -> int:
    while server.running and not stop.event.wait(_POLL_S):
        pass
    scheduler.drain()
    server.end()
    deadline = time.monotonic() + grace
    while server.running and time.monotonic() < deadline:
        time.sleep(_POLL_S)
    if not scheduler.close(_LAST_WORDS_S):  # deep in a long call of the engine, which nothing interrupts
        os._exit(stop.status)
    server.join(_LAST_WORDS_S)
    if not stop.event.is_set():
        raise EngineError("the HTTP server has ended by itself")
    return stop.status


def bind(host: str, port: int) -> socket.socket:
    """A socket that is bound, and does not listen before the model can answer.

    Raises:
        InputError: no such host, no address of this machine, a port that is taken or not allowed.
    """
    try:
        found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as e:
        raise InputError(f"--host {host!r} is no address ({e}); expected for example 127.0.0.1 or 0.0.0.0") from None
    family, kind, protocol, _, address = found[0]
    listener = socket.socket(family, kind, protocol)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
    except OSError as e:
        listener.close()
        raise InputError(f"--host {host} --port {port}: {e.strerror}; choose another, or --port 0") from None
    return listener


class HttpServer:
    """uvicorn over a bound socket, in a thread of its own, where it leaves signals alone.

    Args:
        grace: most seconds that it waits for responses when it ends.

    Raises:
        InputError: the socket cannot listen.
    """

    def __init__(self, app: Any, listener: socket.socket, grace: float) -> None:
        config = uvicorn.Config(
            app, http="h11", ws="none", loop="asyncio", lifespan="off", log_level="critical", access_log=False,
            server_header=False, timeout_graceful_shutdown=math.ceil(grace) + 1,
        )  # fmt: skip
        self._server, self._listener = uvicorn.Server(config), listener
        self._error: BaseException | None = None
        host, port = listener.getsockname()[:2]
        self.url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        self._thread = threading.Thread(target=self._run, name="edgevl-serve-http", daemon=True)
        self._thread.start()
        while not self._server.started:
            if not self._thread.is_alive():
                raise InputError(f"{self.url} cannot be listened on ({self._error}); choose another --port")
            time.sleep(_POLL_S)

    @property
    def running(self) -> bool:
        return self._thread.is_alive()

    def end(self) -> None:
        """Accept nothing more, and end when the responses that are being sent are complete."""
        self._server.should_exit = True

    def join(self, timeout: float) -> None:
        self._thread.join(timeout)

    def _run(self) -> None:
        try:
            self._server.run(sockets=[self._listener])
        except (Exception, SystemExit) as e:
            self._error = e


class _Stop(StopSignals):
    """A second signal ends the process at once."""

    def _handle(self, number: int, _: Any) -> None:
        if self.event.is_set():
            os._exit(self.status)
        super()._handle(number, _)
