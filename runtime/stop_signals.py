"""SIGTERM and SIGINT as a request to end, for commands that run until they are told to."""

from __future__ import annotations

import signal
import threading
from typing import Any

__all__ = ["StopSignals"]


class StopSignals:
    """Within its block a signal sets the event and the status that the process should end with. What a second one
    does is for subclasses to say."""

    def __init__(self) -> None:
        self.event, self.status = threading.Event(), 0

    def __enter__(self) -> StopSignals:
        self._before = {s: signal.signal(s, self._handle) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _: Any) -> None:
        self.event.set()
        if number == signal.SIGINT:
            self.status = 130
