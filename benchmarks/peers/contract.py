"""What a peer's module has to offer, and what is asked of it.

A module `edgevl.benchmarks.peers.<name>` defines

    REQUIREMENTS  what pip installs into its environment (versions pinned)
    VARIANTS      {variant: one line that says what it is: precision of decoder and vision, settings}
    prepare(checkpoint, folder, variant)   converts the checkpoint; may take minutes and use other processes
    open_model(folder, variant, threads)   a Contender; runs in a fresh process, whose memory is measured
    NO_VISION     (optional) True where pictures are only as many tokens: its TTFT is not compared

and imports nothing but the standard library, numpy, Pillow and what REQUIREMENTS names, each where it is used.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

__all__ = [
    "Answer",
    "Contender",
    "Measured",
    "PeerModule",
    "Request",
    "Unsupported",
    "chat_prompt",
    "ending",
    "placeholders",
    "run_tool",
]


class Unsupported(Exception):
    """This peer cannot do what was asked; the message says why and goes into the table."""


@dataclass(frozen=True)
class Request:
    """pictures: JPEG bytes, none of which was asked before. text: the question. system: the system prompt."""

    pictures: tuple[bytes, ...]
    text: str
    system: str = "a"


def ending(status: int, *written: str) -> str:
    """How a process that failed has ended: its status, and the last line of the first text that has one, which is where
    an error's message stands."""
    said = next((lines[-1].strip() for text in written if (lines := text.strip().splitlines())), "")
    how = f"status {status}" if status >= 0 else signal.Signals(-status).name
    if status == -signal.SIGKILL:
        how += " (out of memory?)"
    return f"ended with {how}" + (f": {said[:600]}" if said else "")


def run_tool(
    what: str, command: Sequence[str], cwd: Path | None = None, environment: Mapping[str, str] | None = None
) -> None:
    """A step of a conversion in a process of its own; what it writes goes to stderr when it has ended.

    Raises:
        RuntimeError: it failed; `what`, and the last line of its errors, or where there are none of its output.
    """
    done = subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, errors="replace", check=False
    )
    sys.stderr.write(done.stdout + done.stderr)
    if done.returncode:
        raise RuntimeError(f"{what} {ending(done.returncode, done.stderr, done.stdout)}")


def chat_prompt(request: Request, pictures: str) -> str:
    """Qwen2-VL's chat template filled in: `pictures` is what stands for them, marks or placeholder tokens."""
    user = f"<|im_start|>user\n{pictures}{request.text}<|im_end|>\n"
    return f"<|im_start|>system\n{request.system}<|im_end|>\n{user}<|im_start|>assistant\n"


def placeholders(tokens: Sequence[int]) -> str:
    """Placeholder tokens of pictures with so many tokens each."""
    return "".join(f"<|vision_start|>{'<|image_pad|>' * n}<|vision_end|>" for n in tokens)


@dataclass(frozen=True)
class Answer:
    """What one request took, in seconds since `answer` was called.

    token_s: when every new token had come; the first of them is the TTFT, decoding of the JPEG included. vision_s,
    prefill_s: how long the vision encoder (projector and all) and the decoder's prefill took, where the peer tells
    them apart. prompt_tokens: as the decoder saw them, those of pictures included.
    """

    prompt_tokens: int
    token_s: tuple[float, ...]
    vision_s: float | None = None
    prefill_s: float | None = None


class Contender(Protocol):
    """A model in memory. versions: of the packages that do the work."""

    versions: Mapping[str, str]

    def answer(self, requests: Sequence[Request], new_tokens: int) -> list[Answer]:
        """Greedy answers of exactly `new_tokens` tokens (end tokens are not heeded), all requests at once.

        Raises:
            Unsupported: several requests, or a picture, of which this peer can make nothing.
        """
        ...


class PeerModule(Protocol):
    REQUIREMENTS: Sequence[str]
    VARIANTS: Mapping[str, str]

    def prepare(self, checkpoint: Path, folder: Path, variant: str) -> None: ...

    def open_model(self, folder: Path, variant: str, threads: int) -> Contender: ...


@dataclass
class Measured:
    """What one process measured: an entry per request, or per round trip of several requests at once for the speeds
    (decode: all of them together, from when the last has its first token)."""

    contender: str
    versions: dict[str, str] = field(default_factory=dict)
    open_s: float = 0.0
    peak_mb: float = 0.0
    prompt_tokens: list[int] = field(default_factory=list)
    vision_s: list[float] = field(default_factory=list)
    prefill_s: list[float] = field(default_factory=list)
    ttft_s: list[float] = field(default_factory=list)
    decode_tokens_per_s: list[float] = field(default_factory=list)
    total_tokens_per_s: list[float] = field(default_factory=list)
    unsupported: str = ""
