"""Progress of a TensorRT build, and its end when the user presses Ctrl-C."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from edgevl.runtime.tensorrt_library import TensorRT

__all__ = ["progress_monitor"]


def progress_monitor(
    library: TensorRT, progress: Callable[[str, int, int], None], cancelled: Callable[[], bool]
) -> Any | None:
    """A monitor that tells `progress` of (phase, step, steps) and stops the build once `cancelled`; None where the
    version has no monitors (before 9.0)."""
    base = getattr(library.module, "IProgressMonitor", None)
    if base is None:
        return None

    class Monitor(base):
        def __init__(self) -> None:
            base.__init__(self)
            self._steps: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self._steps[phase_name] = num_steps
            progress(phase_name, 0, num_steps)

        def phase_finish(self, phase_name: str) -> None:
            steps = self._steps.pop(phase_name, 0)
            progress(phase_name, steps, steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            progress(phase_name, step + 1, self._steps.get(phase_name, 0))
            return not cancelled()

    return Monitor()
