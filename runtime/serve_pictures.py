"""What a request brings, read and measured before it reaches the model: pictures decoded, length and forms bounded.

Runs in the scheduler's reader thread, so that neither the event loop nor the model waits for a picture.
"""

from __future__ import annotations

import stat
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from edgevl.runtime.errors import CapacityError, InputError
from edgevl.runtime.guide_probe import GuideProbe
from edgevl.runtime.image_loading import MAX_DECODED_PIXELS, load_image, local_path
from edgevl.runtime.image_processing import smart_resize
from edgevl.runtime.serve_request import ChatRequest, PictureUrl, RequestError

if TYPE_CHECKING:
    from edgevl.runtime.generation import VisionLanguageModel

__all__ = ["MessageReader"]

_LOW_PIXELS = 512 * 512  # of OpenAI's "detail": "low"
# Texts longer than so many times the KV cache are counted before the model is asked; much longer ones are refused.
_CHARACTERS_PER_TOKEN, _MOST_PER_TOKEN = 4, 64
_SLICE = 2**14  # characters that are counted at once; the other threads wait for the tokenizer
_SLICE_TOKENS = 16  # that a cut may add


class MessageReader:
    """Reads the pictures of messages for one model.

    Args:
        folder: the one folder whose files requests may name; None: none.
        file_bytes: the largest file that is read.
        form_s: seconds that the preparation of a JSON schema may take.

    Raises:
        InputError: a folder that is none.
    """

    def __init__(
        self,
        model: VisionLanguageModel,
        folder: str | Path | None = None,
        file_bytes: int = 2**25,
        form_s: float = 3.0,
    ) -> None:
        self._model, self._file_bytes = model, file_bytes
        self._processor = model.bundle.image_processor
        text, eos = model.config.text, model.config.tokens.eos_token_ids
        self._probe = GuideProbe(model.bundle.path("tokenizer.json"), text.vocab_size, tuple(eos), form_s)
        self._folder = None if folder is None else Path(folder).resolve()
        if self._folder is not None and not self._folder.is_dir():
            raise InputError(f"--allow-files {folder}: not a folder; expected the folder that requests may read from")

    def read(self, asked: ChatRequest) -> list[dict[str, Any]]:
        """The messages with a decoded picture for every PictureUrl.

        Raises:
            RequestError: a picture that cannot be used, more pixels together than one picture may have.
            CapacityError: more tokens than the KV cache holds, told before anything is encoded.
        """
        messages = asked.messages
        self._check_texts([t for m in messages for t in _texts(m["content"])])
        items = [i for m in messages if not isinstance(m["content"], str) for i in m["content"]]
        pictures = sum("image" in i for i in items)
        self._model.check_length(pictures, pictures, at_least=True)  # a token each
        read = self._all(messages)
        return [m if isinstance(m["content"], str) else m | {"content": c} for m, c in zip(messages, read)]

    def is_to_try(self, asked: ChatRequest) -> bool:
        """Whether `try_form` comes before `read`."""
        return "json_schema" in asked.generation and self._probe.is_costly(asked.generation["json_schema"])

    def try_form(self, asked: ChatRequest) -> None:
        """Try the JSON schema of a request, which takes seconds; in one thread at a time.

        Raises:
            RequestError: it cannot be used, or takes too long.
        """
        try:
            self._probe.check(asked.generation["json_schema"])
        except InputError as e:
            raise RequestError(str(e), "response_format") from None

    def _check_texts(self, texts: Sequence[str]) -> None:
        """Refuse texts that cannot fit the KV cache, before they are made into one prompt."""
        capacity, characters = self._model.capacity, sum(map(len, texts))
        if characters > _MOST_PER_TOKEN * capacity:
            raise CapacityError(
                f"the messages have {characters} characters, expected at most {_MOST_PER_TOKEN * capacity} for a KV "
                f"cache of {capacity} tokens; shorten the prompt"
            )
        if characters <= _CHARACTERS_PER_TOKEN * capacity:
            return
        tokens = 0
        for text in texts:
            for start in range(0, len(text), _SLICE):
                found = len(self._model.tokenizer.encode(text[start : start + _SLICE], specials=False))
                tokens += found if len(text) <= _SLICE else max(0, found - _SLICE_TOKENS)
                self._model.check_length(tokens, 0, at_least=True)

    def _all(self, messages: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
        """The contents, item by item, decoded; an empty list for a text."""
        contents: list[list[dict[str, Any]]] = []
        pixels = tokens = 0
        for number, message in enumerate(messages):
            items = []
            for place, item in enumerate(() if isinstance(message["content"], str) else message["content"]):
                if "image" in item:
                    where = f"messages[{number}].content[{place}].image_url"
                    item, picture = self._item(item["image"], where)
                    pixels += picture.width * picture.height
                    if pixels > MAX_DECODED_PIXELS:
                        raise RequestError(
                            f"{where}: the pictures have over {MAX_DECODED_PIXELS} pixels together; send fewer or "
                            "smaller ones",
                            where,
                            "invalid_image",
                        )
                    tokens += self._tokens(picture, item.get("max_pixels"))
                    self._model.check_length(tokens, tokens, at_least=True)
                items.append(item)
            contents.append(items)
        return contents

    def _item(self, url: PictureUrl, where: str) -> tuple[dict[str, Any], Image.Image]:
        try:
            picture = load_image(url.url if url.url[:5].lower() == "data:" else self._file(url.url))
            item = {"type": "image", "image": picture}
            if url.low:
                item["max_pixels"] = min(_LOW_PIXELS, self._processor.max_pixels)
            self._tokens(picture, item.get("max_pixels"))
        except InputError as e:
            raise RequestError(f"{where}: {e}", where, "invalid_image") from None
        return item, picture

    def _tokens(self, picture: Image.Image, max_pixels: int | None) -> int:
        config = self._processor.with_pixels(max_pixels=max_pixels)
        limits = config.factor, config.min_pixels, config.max_pixels
        height, width = smart_resize(picture.height, picture.width, *limits)
        return height * width // config.factor**2

    def _file(self, url: str) -> bytes:
        """The bytes of a file under the folder. One message for all that is not there or not allowed: a request must
        not learn what else the disk holds."""
        refused = InputError("not a file of the folder that this server may read")
        if self._folder is None:
            raise refused
        try:
            path = (self._folder / local_path(url)).resolve(strict=True)  # links and .. resolved
            if not path.is_relative_to(self._folder) or not stat.S_ISREG(path.stat().st_mode):
                raise refused
            with path.open("rb") as file:
                data = file.read(self._file_bytes + 1)
        except (OSError, ValueError, RuntimeError):  # not there, not readable, a NUL in the name, links in a circle
            raise refused from None
        if len(data) > self._file_bytes:
            raise InputError(f"the file is larger than {self._file_bytes} bytes, as much as this server reads")
        return data


def _texts(content: str | Sequence[dict[str, Any]]) -> list[str]:
    return [content] if isinstance(content, str) else [i["text"] for i in content if "text" in i]
