"""`edgevl serve` as a process: what it prints, its statuses, signals, and what it refuses before it listens."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from serving import NAME, demo_bundle, long, serving, until, user

from edgevl.runtime import cli, serve_command
from edgevl.runtime.engine import EngineLimits
from edgevl.runtime.errors import EngineError, InputError
from edgevl.runtime.serve_command import HttpServer, bind


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return demo_bundle(tmp_path_factory.mktemp("serve"))


class Process:
    """A server process; `url` is there when it can answer."""

    def __init__(self, bundle: Path, arguments: tuple[str, ...], env: dict[str, str]) -> None:
        command = [sys.executable, "-m", "edgevl.runtime", "serve", str(bundle), "--port", "0", "--engine", "ort-cpu"]
        self.process = subprocess.Popen(
            [*command, "--threads", "1", *arguments], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**os.environ, **env},
        )  # fmt: skip
        assert self.process.stderr is not None
        self.lines: list[str] = []
        self.url = ""
        for line in self.process.stderr:
            self.lines.append(line.rstrip())
            if found := re.search(r"on (http://\S+)$", line):
                self.url = found[1]
                break
        assert self.url, self.lines

    def end(self, number: int) -> int:
        self.process.send_signal(number)
        return self.wait()

    def wait(self) -> int:
        out, err = self.process.communicate(timeout=20)
        assert out == ""
        self.lines += err.splitlines()
        return self.process.returncode


@contextmanager
def process(bundle: Path, *arguments: str, **env: str) -> Iterator[Process]:
    running = Process(bundle, arguments, env)
    try:
        yield running
    finally:
        if running.process.poll() is None:
            running.process.kill()
            running.process.communicate()


class Asked(threading.Thread):
    """A request that is being answered."""

    def __init__(self, url: str, body: dict[str, Any]) -> None:
        super().__init__(daemon=True)
        self.url, self.body = url, {"model": NAME, **body, "stream": True}
        self.text = ""
        self.start()
        until(lambda: "assistant" in self.text)

    def run(self) -> None:
        try:
            with httpx.stream("POST", f"{self.url}/v1/chat/completions", json=self.body, timeout=30) as response:
                for line in response.iter_lines():
                    self.text += line + "\n"
        except httpx.HTTPError as e:
            self.text += f"broke: {e!r}"


def test_keys_from_the_environment_a_name_and_sigterm(bundle: Path) -> None:
    with process(bundle, "--model-name", "org/eyes", "--max-batch", "2", EDGEVL_API_KEY="one two") as server:
        assert re.fullmatch(r"edgevl serve: org/eyes on http://127\.0\.0\.1:\d+", server.lines[-1])
        assert httpx.get(f"{server.url}/v1/models").status_code == 401
        for key in ("one", "two"):
            headers = {"Authorization": f"Bearer {key}"}
            assert httpx.get(f"{server.url}/v1/models/org/eyes", headers=headers).json()["id"] == "org/eyes"
        body = {"model": "org/eyes", "messages": user("Read the text.", "card-half-as-large.png")}
        answer = httpx.post(f"{server.url}/v1/chat/completions", json=body, headers=headers, timeout=30)
        assert answer.json()["choices"][0]["message"]["content"] == "REPENTANCE\nFallacious"
        with httpx.Client(base_url=server.url) as idle:  # a connection that is kept open does not hold the end up
            assert idle.get("/health").json() == {"status": "ok"}
            started = time.monotonic()
            assert server.end(signal.SIGTERM) == 0
            assert time.monotonic() - started < 5
        assert len(server.lines) == 1
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{server.url}/health")


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_running_answers_are_completed(bundle: Path, number: int, status: int) -> None:
    with process(bundle, "--max-new-tokens", "4000") as server:
        asked = Asked(server.url, long(300))
        assert server.end(number) == status
        asked.join(10)
        assert asked.text.endswith("data: [DONE]\n\n") and '"finish_reason":"length"' in asked.text


def test_grace_has_an_end(bundle: Path) -> None:
    with process(bundle, "--max-new-tokens", "4000", "--grace", "0.3") as server:
        asked = Asked(server.url, long(4000))
        started = time.monotonic()
        assert server.end(signal.SIGTERM) == 0
        assert time.monotonic() - started < 5
        asked.join(10)
        assert "the server has ended before the answer" in asked.text and "[DONE]" not in asked.text


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_second_signal_ends_at_once(bundle: Path, number: int, status: int) -> None:
    with process(bundle, "--max-new-tokens", "4000") as server:
        asked = Asked(server.url, long(4000))
        server.process.send_signal(number)
        time.sleep(0.3)
        assert server.process.poll() is None  # the answer goes on
        started = time.monotonic()
        assert server.end(number) == status
        assert time.monotonic() - started < 3
        asked.join(10)
        assert asked.text.rpartition("\n")[2].startswith("broke: ")


def test_other_machines_without_a_key_are_warned_about(bundle: Path) -> None:
    with process(bundle, "--host", "0.0.0.0") as server:
        assert "0.0.0.0 can be reached by other machines, and no --api-key is asked for" in server.lines[0]
        assert server.end(signal.SIGTERM) == 0
    with process(bundle, "--host", "0.0.0.0", "--api-key", "k") as server:
        assert len(server.lines) == 1
        assert server.end(signal.SIGTERM) == 0


# ------------------------------------------------------------------------------------------- refused at the door


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line that a command ends with, status 2."""
    assert cli.run(["serve", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1, err
    return err


def test_ports_and_hosts(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        told = refused(capsys, str(bundle), "--port", port)
        assert f"--host 127.0.0.1 --port {port}: Address already in use; choose another, or --port 0" in told
    assert "is no address" in refused(capsys, str(bundle), "--host", "no such host", "--port", "0")
    assert "is no address" in refused(capsys, str(bundle), "--host", "a" * 300, "--port", "0")
    assert "Cannot assign requested address" in refused(capsys, str(bundle), "--host", "192.0.2.1", "--port", "0")
    assert "70000" in refused(capsys, str(bundle), "--port", "70000")


def test_a_port_that_is_taken_while_the_model_opens(bundle: Path) -> None:
    """Two sockets may be bound to one port until one of them listens."""
    with bind("127.0.0.1", 0) as ours, bind("127.0.0.1", ours.getsockname()[1]) as theirs:
        theirs.listen()
        with pytest.raises(InputError, match=r"cannot be listened on .* choose another --port"):
            HttpServer(None, ours, 1)


def test_rows_that_the_engine_takes(capsys: pytest.CaptureFixture[str]) -> None:
    model = SimpleNamespace(engine=SimpleNamespace(name="tensorrt", limits=EngineLimits(rows=2)))
    assert serve_command._rows(model, 2) == 2 and not capsys.readouterr().err
    assert serve_command._rows(model, 4) == 2
    assert "tensorrt takes 2 rows at once, not 4" in capsys.readouterr().err


def test_an_http_server_that_ends_by_itself(bundle: Path) -> None:
    with serving(bundle) as server:
        server.http.end()
        with pytest.raises(EngineError, match="the HTTP server has ended by itself"):
            serve_command._until_stopped(server.http, server.scheduler, serve_command._Stop(), 1)


def test_a_call_of_the_engine_that_goes_on_is_left(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Closing the model under it would crash: the process ends instead."""

    def leave(status: int) -> None:
        raise SystemExit(status)

    with serving(bundle) as server:
        monkeypatch.setattr(server.scheduler._loop, "step", lambda: time.sleep(1.5) or [])
        monkeypatch.setattr(serve_command, "_LAST_WORDS_S", 0.1)
        monkeypatch.setattr(os, "_exit", leave)
        stop = serve_command._Stop()
        stop._handle(signal.SIGINT, None)
        Asked(server.url, long())
        with pytest.raises(SystemExit) as left:
            serve_command._until_stopped(server.http, server.scheduler, stop, 0.1)
        assert left.value.code == 130


def test_bad_options_and_bundles(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    port = ("--port", "0", "--engine", "ort-cpu")
    assert str(tmp_path / "none") in refused(capsys, str(tmp_path / "none"), *port)
    assert "manifest.json" in refused(capsys, str(tmp_path), *port)
    assert "--allow-files" in refused(capsys, str(bundle), *port, "--allow-files", str(tmp_path / "none"))
    assert "--api-key: an empty key" in refused(capsys, str(bundle), *port, "--api-key", "")
    for key in ("schlüssel", "two words", " "):
        assert "--api-key" in refused(capsys, str(bundle), *port, "--api-key", key)
    for value in ("", "  ", "schlüssel"):  # a script that has failed to fill it must not open the server to all
        with monkeypatch.context() as patch:
            patch.setenv("EDGEVL_API_KEY", value)
            assert "EDGEVL_API_KEY: an empty key" in refused(capsys, str(bundle), *port)
    for value in ("nan", "inf"):
        assert "--grace" in refused(capsys, str(bundle), *port, "--grace", value)
    for value in ("0", "nan", "inf", "-1"):
        assert f"--max-body-mb is {float(value)}" in refused(capsys, str(bundle), *port, "--max-body-mb", value)
    for name in ("--max-batch", "--max-new-tokens", "--grace", "--max-queue"):
        assert name in refused(capsys, str(bundle), *port, name, "-1")
    assert "capacity is 0" in refused(capsys, str(bundle), *port, "--capacity", "0")
    assert "engine 'x' is unknown" in refused(capsys, str(bundle), "--port", "0", "--engine", "x")


def test_without_its_packages_it_names_the_extra(bundle: Path) -> None:
    code = "import sys; sys.modules['{}'] = None; from edgevl.runtime import cli; sys.exit(cli.run(['serve', 'x']))"
    for package in ("uvicorn", "starlette"):
        done = subprocess.run([sys.executable, "-c", code.format(package)], capture_output=True, text=True)
        assert done.returncode == 2 and done.stderr.count("\n") == 1
        assert f"needs the package '{package}" in done.stderr and "pip install 'edgevl[serve]'" in done.stderr


def test_help_has_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["serve", "--help"]) == 0
    shown = capsys.readouterr().out
    assert "edgevl serve bundle --port 8000 --api-key SECRET" in shown and "--max-queue N" in shown
