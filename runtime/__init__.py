"""The device side of edgevl: bundles in, answers out; numpy, Pillow, tokenizers, jinja2 and one engine library.

Names are resolved when first used, so that `import edgevl.runtime` costs next to nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edgevl.runtime.answer_stream import Stream
    from edgevl.runtime.bundle import Bundle
    from edgevl.runtime.chat import ChatSession
    from edgevl.runtime.errors import EdgeVLError
    from edgevl.runtime.generation import VisionLanguageModel
    from edgevl.runtime.grounding import Box, Point
    from edgevl.runtime.results import Completion, Piece, Timings, Usage, VideoInfo
    from edgevl.runtime.sampling import GenerationConfig
    from edgevl.runtime.vision import EncodedImage

_HOME = {
    "Bundle": "bundle",
    "Box": "grounding",
    "ChatSession": "chat",
    "Completion": "results",
    "EdgeVLError": "errors",
    "EncodedImage": "vision",
    "GenerationConfig": "sampling",
    "Piece": "results",
    "Point": "grounding",
    "Stream": "answer_stream",
    "Timings": "results",
    "Usage": "results",
    "VideoInfo": "results",
    "VisionLanguageModel": "generation",
}

__all__ = [
    "Box",
    "Bundle",
    "ChatSession",
    "Completion",
    "EdgeVLError",
    "EncodedImage",
    "GenerationConfig",
    "Piece",
    "Point",
    "Stream",
    "Timings",
    "Usage",
    "VideoInfo",
    "VisionLanguageModel",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
