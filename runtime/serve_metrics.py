"""Counters of the server in Prometheus' text format (version 0.0.4); written by hand, they are few."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Mapping, Sequence

__all__ = ["CONTENT_TYPE", "Histogram", "Metrics"]

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
# Upper bounds in seconds: from a small model on a desktop to a large picture on a slow device.
_FIRST_TOKEN_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100)
_OUTPUT_TOKEN_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)


class Histogram:
    """Counts of values up to each of `bounds`, with their sum."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds, self._counts = tuple(bounds), [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        self._counts[sum(value > b for b in self._bounds)] += 1
        self._sum += value

    def lines(self, name: str) -> list[str]:
        """Cumulative buckets, sum and count."""
        lines, total = [], 0
        for bound, count in zip((*map(str, self._bounds), "+Inf"), self._counts):
            total += count
            lines.append(f'{name}_bucket{{le="{bound}"}} {total}')
        return [*lines, f"{name}_sum {self._sum:.6f}", f"{name}_count {total}"]


class Metrics:
    """What a server has done so far; any thread may count."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._requests: Counter[tuple[str, int]] = Counter()
        self._prompt_tokens = self._completion_tokens = 0
        self._first = Histogram(_FIRST_TOKEN_S)
        self._output = Histogram(_OUTPUT_TOKEN_S)

    def request(self, path: str, status: int) -> None:
        """A response was begun; `path` must be one of a few known ones."""
        with self._lock:
            self._requests[path, status] += 1

    def prompt(self, tokens: int) -> None:
        """A prompt of so many tokens was prefilled."""
        with self._lock:
            self._prompt_tokens += tokens

    def first_token(self, seconds: float) -> None:
        """A first token came so long after its request."""
        with self._lock:
            self._first.observe(seconds)

    def answer(self, tokens: int, decode_s: float) -> None:
        """An answer has ended, or was given up, `decode_s` after its first token."""
        with self._lock:
            self._completion_tokens += tokens
            if tokens > 1:
                self._output.observe(decode_s / (tokens - 1))

    def render(self, gauges: Mapping[str, tuple[str, float]]) -> str:
        """The page; `gauges`: name -> (help, value now)."""
        with self._lock:
            lines = _head("edgevl_requests_total", "Responses by path and status.", "counter")
            for (path, status), count in sorted(self._requests.items()):
                lines.append(f'edgevl_requests_total{{path="{path}",status="{status}"}} {count}')
            for name, text, value in (
                ("edgevl_prompt_tokens_total", "Tokens of prompts, pictures included.", self._prompt_tokens),
                ("edgevl_completion_tokens_total", "Tokens of answers.", self._completion_tokens),
            ):
                lines += [*_head(name, text, "counter"), f"{name} {value}"]
            for name, text, histogram in (
                ("edgevl_time_to_first_token_seconds", "From the request to its first token.", self._first),
                ("edgevl_time_per_output_token_seconds", "Mean of an answer, after its first token.", self._output),
            ):
                lines += [*_head(name, text, "histogram"), *histogram.lines(name)]
        for name, (text, value) in gauges.items():
            lines += [*_head(name, text, "gauge"), f"{name} {value:g}"]
        return "\n".join(lines) + "\n"


def _head(name: str, text: str, kind: str) -> list[str]:
    return [f"# HELP {name} {text}", f"# TYPE {name} {kind}"]
