"""The errors edgevl raises on purpose.

A user's mistake, or the state of a machine, ends in one of these: the message says what was got, what was expected
and what to do. Anything else that escapes is a bug of ours. The command line prints the message on one line of
stderr and leaves with `exit_status`.
"""

from __future__ import annotations

__all__ = [
    "BundleError",
    "CapacityError",
    "CheckFailedError",
    "CheckpointError",
    "EdgeVLError",
    "EngineError",
    "EngineFailedError",
    "InputError",
    "MemoryLimitError",
]


class EdgeVLError(Exception):
    """Base of every error raised on purpose; `exit_status` is the status of the command line."""

    exit_status = 2


class InputError(EdgeVLError):
    """A picture, video, prompt, message or option that cannot be used."""


class CapacityError(InputError):
    """A request that does not fit the KV cache or a profile of the engine."""


class MemoryLimitError(CapacityError):
    """A request for which there is no memory now."""


class CheckpointError(EdgeVLError):
    """A checkpoint folder that cannot be read: names the file and the tensor."""


class BundleError(EdgeVLError):
    """A bundle that is incomplete, damaged, or of another schema version."""


class EngineError(EdgeVLError):
    """An engine or provider that is not available, or numbers from it that cannot be right."""


class EngineFailedError(EngineError):
    """A call of an engine that failed while it ran; the next one may, too."""


class CheckFailedError(EdgeVLError):
    """A check that was asked for did not hold (verify, a gate)."""

    exit_status = 1
