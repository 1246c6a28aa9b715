"""The README's commands, run, and their output held against what it shows.

A block marked `console` holds commands after `$ ` with their output; `python` blocks run as they are. Times, sizes and
processor names differ from machine to machine: in lines that hold one, numbers are not compared. A command that ends in
` &` is a server: it runs, at another port, until the block ends.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
CHECKED = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *ROOT.glob("demo/**/README.md")]
# A figure that depends on the machine (its kernels and their memory too) or the day.
MEASURED = re.compile(
    r"cosine|pixel error|greedy tokens equal|fits$|"
    r"\d ?(ms|s|MB|tokens/s|tok/s)\b|_s\"|processor|memory|seconds|EPYC|Xeon|python +3"
)


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)


PORT = "8000"  # of the README's server; a free one takes its place
UNIQUE = re.compile(r"(?<=chatcmpl-)\w+|(?<=\"created\":)\d+")

Shown = tuple[str, str]  # a command, and the output that is shown


def sessions() -> Iterator[list[Shown]]:
    """The commands of every console block: the later ones may need what the earlier ones left."""
    for block in blocks("console"):
        found = []
        for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            command, _, output = part.partition("\n")
            while command.endswith("\\"):
                more, _, output = output.partition("\n")
                command = command[:-1] + more
            found.append((command, output))
        yield found


def commands() -> list[Shown]:
    return [shown for session in sessions() for shown in session]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that looks like the repository after `make demo`, where commands may write."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "demo").symlink_to(ROOT / "demo")
    run(f"{sys.executable} demo/demo.py out/demo", folder)
    return folder


def run(command: str, folder: Path) -> str:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", command], cwd=folder, capture_output=True, text=True, env={**os.environ, "PATH": path}
    )
    assert done.returncode == 0, (command, done.stdout, done.stderr)
    return done.stdout + done.stderr


def start(command: str, folder: Path) -> tuple[subprocess.Popen[str], str]:
    """A server, and the first line that it prints."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    server = subprocess.Popen(
        ["bash", "-c", f"exec {command}"], cwd=folder, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PATH": path},
    )  # fmt: skip
    assert server.stderr is not None
    return server, server.stderr.readline()


def comparable(text: str) -> list[str]:
    """Lines without what differs between machines: numbers of measured lines, spaces and rules of tables."""
    lines = []
    for line in text.splitlines():
        line = re.sub(r"\d[\d.,]*", "#", line) if MEASURED.search(line) else UNIQUE.sub("#", line)
        line = " ".join(re.sub(r"-{3,}", "", line).split())
        if line:
            lines.append(line)
    return lines


def test_there_are_commands() -> None:
    found = [command for command, _ in commands()]
    for name in (
        "demo/demo.py",
        "edgevl run",
        "edgevl chat",
        "edgevl serve",
        "edgevl export",
        "edgevl verify",
        "edgevl inspect",
    ):
        assert any(name in command for command in found), name


@pytest.mark.parametrize("session", [s for s in sessions() if "demo.py" not in s[0][0]], ids=lambda s: s[0][0][:50])
def test_console_blocks(place: Path, session: list[Shown]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    servers: list[subprocess.Popen[str]] = []
    try:
        for command, shown in session:
            command, shown = command.replace(PORT, port), shown.replace(PORT, port)
            if "curl" in command and shutil.which("curl") is None:
                pytest.skip("curl is not here")
            if command.endswith(" &"):
                server, output = start(command.removesuffix(" &"), place)
                servers.append(server)
            else:
                output = run(command, place)
            printed, expected = comparable(output), comparable(shown)
            if "..." in expected:  # the middle of a long output is left out
                at = expected.index("...")
                assert printed[:at] == expected[:at]
                assert printed[len(printed) - (len(expected) - at - 1) :] == expected[at + 1 :]
            else:
                assert printed == expected
    finally:
        for server in servers:
            server.terminate()
            server.communicate(timeout=20)
    assert all(server.returncode == 0 for server in servers)


def test_the_demo_says_what_is_shown(place: Path) -> None:
    """The same pictures and questions, and as many right answers but one: near ties differ by processor."""
    (shown,) = [output for command, output in commands() if "demo.py" in command]
    printed = run(f"{sys.executable} demo/demo.py out/again", place)
    names = re.compile(r"^(\S+(?:\.png|motion)?)  +(\S.*?)(?:  |$)", re.MULTILINE)
    assert names.findall(printed)[:10] == names.findall(shown)[:10]
    right = [re.search(r"(\d+) of (\d+) right", text) for text in (printed, shown)]
    assert right[0] and right[1] and right[0][2] == right[1][2]
    assert abs(int(right[0][1]) - int(right[1][1])) <= 1
    drawn = re.findall(r"box drawn to (\S+)", printed)
    assert len(drawn) == len(re.findall(r"box drawn to", shown)) >= 1
    assert all((place / "out" / "again" / Path(d).name).exists() for d in drawn)


@pytest.mark.parametrize("code", blocks("python"))
def test_python_blocks(place: Path, code: str) -> None:
    done = subprocess.run([sys.executable, "-c", code], cwd=place, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for word in ("red", "stop", "tokens came from the cache"):
        assert word in done.stdout


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for path in CHECKED:
        for name in re.findall(r"`?make ([a-z][a-z-]*)`", path.read_text()) + re.findall(
            r"^make ([a-z-]+)", path.read_text(), re.MULTILINE
        ):
            assert name in targets, (path, name)


def test_links_lead_somewhere() -> None:
    for path in CHECKED:
        for target in re.findall(r"\]\(([^)#]+)\)", path.read_text(encoding="utf-8")):
            if not target.startswith("http"):
                assert (path.parent / target).exists(), (path, target)


def test_no_machine_is_named() -> None:
    """Documents hold no path of the machine that they were written on."""
    for path in [*CHECKED, ROOT / "benchmarks" / "LOG.md"]:
        assert not re.search(r"/(root|home|work|tmp)/", path.read_text(encoding="utf-8")), path
