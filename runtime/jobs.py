"""Requests of a server and what becomes of them. Knows no model and no HTTP."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from edgevl.runtime.errors import EdgeVLError
from edgevl.runtime.results import Completion

__all__ = ["BusyError", "Done", "Event", "Failed", "Job", "Text"]


class BusyError(EdgeVLError):
    """A request that cannot be taken now: the queue is full, or the server is ending."""

    def __init__(self, message: str, full: bool = False, retry_after_s: int = 1) -> None:
        super().__init__(message)
        self.full, self.retry_after_s = full, retry_after_s


@dataclass(frozen=True)
class Text:
    """What one step added to an answer; the first says that it has begun, and may be empty."""

    text: str


@dataclass(frozen=True)
class Done:
    completion: Completion


@dataclass(frozen=True)
class Failed:
    """The answer will not come (any more). An error that is no EdgeVLError is a bug of ours."""

    error: Exception


Event = Text | Done | Failed
Read = Callable[[], Sequence[dict[str, Any]]]


@dataclass(eq=False)
class Job:
    """One request.

    read: gives its messages with all pictures decoded; runs once, in the reader thread, and raises InputError where
        something cannot be used.
    generation: settings of `VisionLanguageModel.stream`.
    deliver: takes the events, in order, in a thread of the scheduler; must not block. Done or Failed is the last.
        None need come after `cancel`.
    """

    read: Read
    generation: Mapping[str, Any]
    deliver: Callable[[Event], None]
    arrived: float = field(default_factory=time.perf_counter)
    cancelled: threading.Event = field(default_factory=threading.Event)
    first_s: float | None = None  # perf_counter of its first token

    def cancel(self) -> None:
        """Give the answer up: its row leaves before the next step."""
        self.cancelled.set()
