"""Ask where something is: one picture, one question, boxes back. Knows no engine; the model does the asking."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from edgevl.runtime.errors import InputError
from edgevl.runtime.grounding import Box
from edgevl.runtime.image_loading import load_image
from edgevl.runtime.results import Completion

__all__ = ["DEFAULT_QUESTION", "locate"]

DEFAULT_QUESTION = "Where is {target}?"
_PLACE = "{target}"

Generate = Callable[..., Completion]


def locate(
    generate: Generate,
    image: Any,
    target: str,
    question: str = DEFAULT_QUESTION,
    crop: Sequence[int] | None = None,
    **generation: Any,
) -> list[Box]:
    """The boxes of `target` in `image`; see VisionLanguageModel.locate, which passes its own `generate`."""
    if not isinstance(target, str) or not target.strip():
        raise InputError(f"the thing to locate is {target!r}, expected words such as 'the search box'")
    if _PLACE not in question:
        raise InputError(f"the question is {question!r}, expected one with {_PLACE} where the words go")
    left = top = 0
    if crop is not None:
        picture = load_image(image)
        left, top, right, bottom = _checked(crop, picture.size)
        image = picture.crop((left, top, right, bottom))
    text = question.replace(_PLACE, target.strip())
    messages = [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": text}]}]
    # A box drawn at random is no box: greedy unless the caller says otherwise.
    answer = generate(messages, **{"temperature": 0.0, **generation})
    return [box.moved(left, top) for box in answer.boxes]


def _checked(crop: Sequence[int], size: tuple[int, int]) -> tuple[int, int, int, int]:
    """Left, top, right, bottom in whole pixels inside the picture."""
    whole = [v for v in crop if isinstance(v, int) and not isinstance(v, bool)]
    if len(whole) == len(crop) == 4:
        left, top, right, bottom = whole
        if 0 <= left < right <= size[0] and 0 <= top < bottom <= size[1]:
            return left, top, right, bottom
    raise InputError(
        f"crop is {tuple(crop)!r}, expected left < right and top < bottom in whole pixels of a picture of "
        f"{size[0]}×{size[1]}"
    )
