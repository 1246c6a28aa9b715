"""Pauses of a long pass, in which something else may be done: answers that are being written get their next tokens
while a picture is encoded or a prompt is read (what chunked prefill is for; Agrawal et al., "Taming Throughput-Latency
Tradeoff in LLM Inference with Sarathi-Serve", OSDI 2024).

A pass comes by `pause` between the chunks of a prompt and between pictures; our own operators come by before each
product, so that one call of the vision encoder has a hundred pauses. What is done meanwhile runs in the same thread,
has all cores, and computes what it would have computed otherwise. It may be a pass too, with pauses of its own.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from edgevl.runtime.native_kernels import at_pauses

__all__ = ["PASS_SHARE", "pause", "pauses"]

PASS_SHARE = 3  # a pass goes on for so many times as long as the last interruption took


class _Thread(threading.local):
    """What is to be done in this thread's pauses."""

    call: Callable[[], None] | None = None
    due = 0.0  # perf_counter
    error: BaseException | None = None
    within = False  # a pass
    inner_s = 0.0  # of passes in pauses


_thread = _Thread()


@contextmanager
def pauses(call: Callable[[], None]) -> Iterator[None]:
    """Within it, `call` is called in this thread's pauses, so often that the pass keeps PASS_SHARE parts of the time to
    one; not from within itself, unless that has `pauses` too: what is done in those, with that pass, has had its share,
    and does not count as time of `call`. What `call` raises ends the pass and is raised in its place."""
    if _thread.call is not None:
        raise RuntimeError("pauses of a pass within pauses")
    began, inner_s, outermost = time.perf_counter(), _thread.inner_s, not _thread.within
    _thread.call, _thread.due, _thread.error, _thread.within = call, 0.0, None, True
    if outermost:
        at_pauses(_goes_on)
    try:
        yield
    finally:
        if outermost:
            at_pauses(None)
        error, _thread.call, _thread.error = _thread.error, None, None
        _thread.within, _thread.inner_s = not outermost, inner_s + time.perf_counter() - began
        if error is not None:
            raise error from None  # in the place of the engine's, which says that an operator failed


def pause() -> None:
    """Do what is to be done, if it is time to.

    Raises: what that raises.
    """
    if not _goes_on():
        assert _thread.error is not None
        raise _thread.error


def _goes_on() -> bool:
    """As `pause`, for C: whether nothing was raised."""
    call = _thread.call
    if _thread.error is not None:
        return False
    if call is None or (began := time.perf_counter()) < _thread.due:
        return True
    _thread.call, inner_s = None, _thread.inner_s  # products of what is called come by here, too
    try:
        call()
    except BaseException as e:
        _thread.error = e
        return False
    ended = time.perf_counter()
    took = ended - began - (_thread.inner_s - inner_s)
    _thread.call, _thread.due = call, ended + PASS_SHARE * took
    return True
