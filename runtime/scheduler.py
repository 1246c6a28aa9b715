"""Requests onto one model: first come, first served, answered together (continuous batching). Knows no HTTP.

    submit -> waiting -> reader: pictures, form -> ready -> worker: vision, prefill, decode steps -> events

The engine is not reentrant, so one worker thread owns the model. Between two decode steps it drops answers that were
given up and admits requests that are ready, up to `max_batch` rows; steps go on in the pauses of their passes. In
those a short request may overtake a long one. The reader is at most two requests ahead: decoded
pictures are large, encoded ones wait in the queue.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgevl.runtime.errors import EdgeVLError, EngineFailedError, MemoryLimitError
from edgevl.runtime.jobs import BusyError, Done, Event, Failed, Job, Text
from edgevl.runtime.pauses import PASS_SHARE, pauses
from edgevl.runtime.sampling import GenerationConfig
from edgevl.runtime.serve_metrics import Metrics

if TYPE_CHECKING:
    from edgevl.runtime.answer_stream import PreparedPrompt
    from edgevl.runtime.generation import VisionLanguageModel
    from edgevl.runtime.row import Row

__all__ = ["Scheduler"]

_POLL_S = 0.1  # how long a stop may go unseen by a thread that waits
# A prompt of so many tokens is read aside, so that those of a part of its length, or of its pictures', may overtake it;
# with pictures, those with a part of its pictures' length.
_LONG, _SHORTER = 512, 4
_LONGEST_WAIT_S = 60  # most seconds that a refused client is asked to stay away


@dataclass(frozen=True)
class _Ready:
    job: Job
    messages: Sequence[dict[str, Any]]
    config: GenerationConfig
    tokens: int  # of the prompt
    image_tokens: int


class Scheduler:
    """Owns `model` until it is closed.

    Args:
        max_batch: most answers that are being written at once.
        max_queue: most requests that wait beside them.

    Raises:
        CapacityError: more rows than the engine takes.
        EngineError: too little memory for their KV cache.
    """

    def __init__(self, model: VisionLanguageModel, max_batch: int, max_queue: int, metrics: Metrics) -> None:
        self.max_batch, self.max_queue = max_batch, max_queue
        self._model, self._metrics = model, metrics
        self._loop = model.decode_loop(max_batch)
        self._lock = threading.Condition()
        self._waiting: deque[Job] = deque()
        self._open: set[Job] = set()  # all that have not ended: waiting, being read, or running
        self._ready: queue.Queue[_Ready] = queue.Queue(1)
        self._running: dict[Row, Job] = {}
        self._accepting, self._stop = True, False
        self._broken: str | None = None  # the engine's last call failed so
        self._encoding = False
        self._overtakable = 0  # most tokens of a prompt that may overtake the one being read
        self._joining = 0  # requests that have no row yet: more than one where one overtakes another
        self._overtaking_due = 0.0  # perf_counter
        self._request_s = 1.0  # running mean of the time that an answer takes
        self._threads = [
            threading.Thread(target=target, name=f"edgevl-serve-{name}", daemon=True)
            for name, target in (("reader", self._read), ("worker", self._work))
        ]
        for thread in self._threads:
            thread.start()

    # ------------------------------------------------------------------ from any thread

    @property
    def running(self) -> int:
        """Answers being written."""
        return len(self._running)

    @property
    def encoding(self) -> bool:
        """Whether pictures are being encoded."""
        return self._encoding

    @property
    def waiting(self) -> int:
        """Requests taken whose prompt has not been prefilled yet."""
        return max(0, len(self._open) - len(self._running))

    @property
    def problem(self) -> str | None:
        """Why no request can be answered now; None when it can."""
        if not self._accepting:
            return "the server is ending"
        if not all(t.is_alive() for t in self._threads):
            return "a thread of the scheduler has ended"
        return self._broken

    def check_room(self) -> None:
        """Raise what `submit` would raise now."""
        with self._lock:
            if not self._accepting:
                raise BusyError("the server is ending; ask another one, or later")
            for job in [j for j in self._waiting if j.cancelled.is_set()]:  # whose clients left keep no place
                self._waiting.remove(job)
                self._open.discard(job)
            if len(self._open) >= self.max_batch + self.max_queue:
                raise self.too_many(f"{self.running} requests are being answered and {self.waiting} wait")

    def too_many(self, what: str) -> BusyError:
        """A refusal because of `what`, with the time after which a row should be free."""
        wait = self._request_s * len(self._open) / self.max_batch
        message = f"{what}, as many as this server takes; try again later"
        return BusyError(message, full=True, retry_after_s=max(1, min(_LONGEST_WAIT_S, round(wait))))

    def submit(self, job: Job) -> None:
        """Queue a request.

        Raises:
            BusyError: `max_queue` requests wait already, or the server is ending.
        """
        with self._lock:
            self.check_room()
            self._open.add(job)
            self._waiting.append(job)
            self._lock.notify()

    def drain(self) -> None:
        """Take no more requests, and refuse those that wait; answers being written go on."""
        with self._lock:
            self._accepting = False
            waiting = [*self._waiting]
            self._waiting.clear()
            self._lock.notify_all()
        for job in waiting:
            self._end(job, Failed(BusyError("the server is ending; ask another one, or later")))

    def close(self, timeout: float | None = None) -> bool:
        """Drain, give up what is running, and wait for both threads; False: a call of the engine goes on, and the model
        must not be closed."""
        self.drain()
        with self._lock:
            self._stop = True
            self._lock.notify_all()
        for thread in self._threads:
            thread.join(timeout)
        for job in [*self._open]:  # one may have been on its way from the reader to the worker
            self._end(job, Failed(_given_up()))
        return not any(t.is_alive() for t in self._threads)

    # ------------------------------------------------------------------ the reader

    def _read(self) -> None:
        while (job := self._next()) is not None:
            try:
                if job.cancelled.is_set():
                    self._end(job)
                    continue
                messages, job.read = job.read(), _was_read  # which may hold megabytes
                config = self._model.generation_config(**job.generation)
                ready = _Ready(job, messages, config, *self._model.prompt_size(messages))
            except Exception as e:
                self._end(job, Failed(e))
                continue
            while not self._stop:
                try:
                    self._ready.put(ready, timeout=_POLL_S)
                    break
                except queue.Full:
                    if job.cancelled.is_set():
                        self._end(job)
                        break
            else:
                self._end(job, Failed(_given_up()))

    def _next(self) -> Job | None:
        """The request that has waited longest; None: the scheduler ends."""
        with self._lock:
            self._lock.wait_for(lambda: self._waiting or self._stop)
            return None if self._stop else self._waiting.popleft()

    # ------------------------------------------------------------------ the worker

    def _work(self) -> None:
        while not self._stop:
            self._drop_cancelled()
            self._admit()
            if self._running:
                self._step()
        for row in [*self._running]:
            self._loop.leave(row)
            self._leave(row, Failed(_given_up()))

    def _drop_cancelled(self) -> None:
        for row, job in [*self._running.items()]:
            if job.cancelled.is_set():
                self._loop.leave(row)
                self._leave(row)

    def _go_on(self, joining: Job) -> None:
        """Answers being written, while the pictures and the prompt of another request are read.

        Raises:
            BusyError: they need not be read to the end, nobody waits for them.
        """
        if self._stop or joining.cancelled.is_set():
            raise _given_up()
        self._drop_cancelled()
        if self._overtakable:
            self._overtake()
        if self._running:
            self._step()

    def _overtake(self) -> None:
        """Admit the next request in a pause of a long one, if it is short: it takes a second where the other may take
        many. That keeps its row, and its share of the time. A picture's token is encoded, too, and counts for more."""
        began = time.perf_counter()
        if began < self._overtaking_due or len(self._running) + self._joining >= self.max_batch:
            return
        with self._ready.mutex:  # nobody else takes anything out
            following = self._ready.queue[0] if self._ready.queue else None
        if following is None or not self._loop.may_join(following.tokens):
            return
        if following.tokens * (_SHORTER if following.image_tokens else 1) > self._overtakable:
            return
        overtakable, encoding = self._overtakable, self._encoding
        try:
            self._begin(self._ready.get_nowait(), overtakes=True)
        finally:
            self._overtakable, self._encoding = overtakable, encoding
        ended = time.perf_counter()
        self._overtaking_due = ended + PASS_SHARE * (ended - began)

    def _admit(self) -> None:
        """Prefill a request that is ready, where there is a row; one at a time, so that running answers get a token
        between two of them (and in their pauses). Waits for one only where there is nothing else to do."""
        if len(self._running) == self.max_batch:
            return
        try:
            ready = self._ready.get(block=not self._running, timeout=_POLL_S)
        except queue.Empty:
            return
        self._begin(ready)

    def _begin(self, ready: _Ready, overtakes: bool = False) -> None:
        if ready.job.cancelled.is_set():
            self._end(ready.job)
        else:
            self._join(ready, overtakes)

    def _join(self, ready: _Ready, overtakes: bool) -> None:
        job = ready.job
        self._joining += 1
        try:
            with pauses(lambda: self._go_on(job)):
                prompt = self._prepare(ready)
                row, aside = self._row(ready, prompt, overtakes)
                self._overtakable = max(ready.image_tokens, len(prompt.ids) // _SHORTER) if aside else 0
                piece = self._loop.join(row, prompt, aside)
        except Exception as e:
            self._note(e)
            self._end(job, Failed(e))
            return
        finally:
            self._joining, self._overtakable = self._joining - 1, 0
        self._broken = None
        self._running[row] = job
        self._metrics.prompt(len(prompt.ids))
        self._deliver(row, piece.text)

    def _prepare(self, ready: _Ready) -> PreparedPrompt:
        self._encoding, self._overtakable = ready.image_tokens > 0, ready.image_tokens
        try:
            return self._model.prepare(ready.messages, ready.config.max_new_tokens)
        finally:
            self._encoding = False

    def _row(self, ready: _Ready, prompt: PreparedPrompt, overtakes: bool) -> tuple[Row, bool]:
        """An answer, and whether its prompt is read aside: where it is long, and there is memory for that."""
        length, spare = len(prompt.ids), self._loop.spare
        settings = {"prompt": prompt, "config": ready.config, "started": ready.job.arrived}
        if length >= _LONG and self.max_batch > 1 and not overtakes:
            with suppress(MemoryLimitError):
                return self._model.row(**settings, spare=spare - length), True
        return self._model.row(**settings, spare=spare), False

    def _step(self) -> None:
        try:
            pieces = self._loop.step()
        except Exception as e:  # the engine's, so of all rows
            self._note(e)
            for row in [*self._running]:
                self._loop.leave(row)
                self._leave(row, Failed(e))
            return
        self._broken = None
        texts: dict[Row, str] = {}
        for row, piece in pieces:  # with prompt lookup several are one row's, and it ends with the last
            texts[row] = texts.get(row, "") + piece.text
        for row, text in texts.items():
            self._deliver(row, text)
        for row in [*self._running]:
            if row.error is not None:
                self._leave(row, Failed(row.error))

    def _deliver(self, row: Row, text: str) -> None:
        job = self._running[row]
        first = job.first_s is None
        if job.first_s is None:
            job.first_s = time.perf_counter()
            self._metrics.first_token(job.first_s - job.arrived)
        if (first or text) and not job.cancelled.is_set():
            job.deliver(Text(text))
        if row.finish_reason is not None:
            self._leave(row, Done(row.completion()))

    def _leave(self, row: Row, event: Event | None = None) -> None:
        """A row that is in the loop no more."""
        job, now = self._running.pop(row), time.perf_counter()
        self._metrics.answer(len(row.tokens), now - (job.first_s or now))
        self._request_s += 0.2 * (now - job.arrived - self._request_s)
        self._end(job, event)

    def _end(self, job: Job, event: Event | None = None) -> None:
        with self._lock:
            self._open.discard(job)
        if event is not None and not job.cancelled.is_set():
            job.deliver(event)

    def _note(self, error: Exception) -> None:
        """A failure of the engine makes the server unhealthy until a call succeeds again; numbers that one picture
        has made infinite do not."""
        if isinstance(error, EngineFailedError) or not isinstance(error, EdgeVLError):
            self._broken = f"the engine failed: {type(error).__name__}"


def _was_read() -> Sequence[dict[str, Any]]:
    raise RuntimeError("a job is read once")


def _given_up() -> BusyError:
    return BusyError("the server has ended before the answer; ask another one, or later")
