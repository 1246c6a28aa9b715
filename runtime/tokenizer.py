"""Text to token ids and back: Qwen2's byte-level BPE over the `tokenizers` library, and a streaming detokenizer.

Knows no chat template and no model. Special tokens are recognised in a text only where the caller asks for it.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import tokenizers

from edgevl.runtime.errors import CheckpointError, InputError

__all__ = ["GROUNDING_TOKENS", "POINT_TOKENS", "IncrementalDetokenizer", "Tokenizer", "check_text"]

# The specials that carry an answer's boxes: shown to the parser where the others are dropped.
GROUNDING_TOKENS = (
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
)
# Not in Qwen2-VL's own vocabulary; fine-tuned checkpoints add them for points.
POINT_TOKENS = ("<|point_start|>", "<|point_end|>")

# Qwen2's pre-tokenizer: contractions, words with one leading mark, single digits, marks, line ends, spaces.
_QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_ADDED_FLAGS = ("single_word", "lstrip", "rstrip", "normalized")


def check_text(text: str, what: str = "the text") -> None:
    """Refuse what is no text: bytes of a command line that are not UTF-8 reach Python as halves of characters.

    Raises:
        InputError: names the place.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as e:
        raise InputError(
            f"{what} holds {text[e.start]!r} at {e.start}, half of a character; expected text that UTF-8 can hold"
        ) from None


class Tokenizer:
    """A byte-level BPE tokenizer; safe to share between threads (nothing changes after construction)."""

    def __init__(self, spec: str, where: str = "tokenizer.json") -> None:
        """`spec` is the text of a tokenizer.json; `where` names it in errors.

        Raises:
            CheckpointError: not a tokenizer, or not a byte-level one.
        """
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(spec)
        except Exception as e:  # the library raises bare Exception
            raise CheckpointError(f"{where}: not a tokenizer ({e}); re-download the checkpoint") from None
        decoder = self._tokenizer.decoder
        if not isinstance(decoder, tokenizers.decoders.ByteLevel):
            name = type(decoder).__name__
            raise CheckpointError(f"{where}: its decoder is {name}, expected ByteLevel as Qwen2-VL has")
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        # The library would find specials in any text, a user's too. It is told once not to, and where specials are
        # wanted the text is split here: no second copy of 150,000 entries, no switch that threads could race for.
        self._tokenizer.encode_special_tokens = True
        added = self._tokenizer.get_added_tokens_decoder()
        self._specials = {token.content: i for i, token in added.items() if token.special}
        for i, token in added.items():
            flags = [flag for flag in _ADDED_FLAGS if getattr(token, flag)]
            if token.special and flags:
                raise CheckpointError(
                    f"{where}: special token {i} {token.content!r} sets {flags}, expected none of them"
                )
        self.special_ids: frozenset[int] = frozenset(self._specials.values())
        longest_first = sorted(self._specials, key=len, reverse=True)
        self._special_pattern = (
            re.compile("(" + "|".join(map(re.escape, longest_first)) + ")") if longest_first else None
        )

    @classmethod
    def from_file(cls, path: str | Path) -> Tokenizer:
        """Read a tokenizer.json. Raises CheckpointError where it is missing or malformed."""
        return cls(_read_text(Path(path)), str(path))

    @classmethod
    def from_folder(cls, folder: str | Path) -> Tokenizer:
        """Read tokenizer.json, or vocab.json + merges.txt + the added tokens of tokenizer_config.json.

        Raises:
            CheckpointError: neither is there, or one is malformed.
        """
        folder = Path(folder)
        if (folder / "tokenizer.json").exists():
            return cls.from_file(folder / "tokenizer.json")
        if not (folder / "vocab.json").exists() or not (folder / "merges.txt").exists():
            raise CheckpointError(
                f"{folder}: no tokenizer.json, and no vocab.json with merges.txt; copy the tokenizer's files there"
            )
        return cls._from_slow_files(folder)

    @classmethod
    def _from_slow_files(cls, folder: Path) -> Tokenizer:
        config = _read_json(folder / "tokenizer_config.json")
        declared = config.get("added_tokens_decoder")
        if not isinstance(declared, dict) or not all(
            re.fullmatch("[0-9]{1,10}", i) and isinstance(token, dict) and isinstance(token.get("content"), str)
            for i, token in declared.items()
        ):
            raise CheckpointError(
                f"{folder / 'tokenizer_config.json'}: added_tokens_decoder must map ids to the added tokens; "
                "re-download the checkpoint"
            )
        added: list[dict[str, Any]] = [
            {"id": int(i), "content": t["content"], "special": bool(t.get("special"))}
            | {flag: bool(t.get(flag)) for flag in _ADDED_FLAGS}
            for i, t in sorted(declared.items(), key=lambda item: int(item[0]))
        ]
        spec = {
            "version": "1.0",
            "added_tokens": added,
            "normalizer": {"type": "NFC"},
            "pre_tokenizer": {
                "type": "Sequence",
                "pretokenizers": [
                    {"type": "Split", "pattern": {"Regex": _QWEN2_SPLIT}, "behavior": "Isolated", "invert": False},
                    {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False},
                ],
            },
            "post_processor": None,
            "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False},
            "model": {
                "type": "BPE",
                "vocab": _read_json(folder / "vocab.json"),
                "merges": _read_merges(folder / "merges.txt"),
            },
        }
        out = cls(json.dumps(spec), f"{folder}: vocab.json with merges.txt")
        for token in added:
            # The library numbers added tokens itself; a gap after the vocabulary would shift them.
            got = out.token_to_id(token["content"])
            if got != token["id"]:
                raise CheckpointError(
                    f"{folder / 'tokenizer_config.json'}: {token['content']!r} is declared as {token['id']} but "
                    f"vocab.json makes it {got}; the files belong to different checkpoints"
                )
        return out

    def to_json(self) -> str:
        """The text of a tokenizer.json that `from_file`, transformers and the tokenizers library read."""
        return self._tokenizer.to_str()

    def to_file(self, path: str | Path) -> None:
        """Write `to_json` to a file."""
        Path(path).write_text(self.to_json(), encoding="utf-8")

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included; the model's logits may have more columns."""
        return self._tokenizer.get_vocab_size(with_added_tokens=True)

    @property
    def special_tokens(self) -> dict[str, int]:
        return dict(self._specials)

    def token_to_id(self, token: str) -> int | None:
        return self._tokenizer.token_to_id(token)

    def id_to_token(self, token_id: int) -> str | None:
        """The token's spelling in the vocabulary's byte alphabet (or as written, for an added token)."""
        return self._tokenizer.id_to_token(token_id) if token_id >= 0 else None

    def split_specials(self, text: str) -> list[str]:
        """Cut at special tokens: plain text at even places (may be empty), a special token at each odd one."""
        return self._special_pattern.split(text) if self._special_pattern else [text]

    def encode(self, text: str, specials: bool) -> list[int]:
        """Token ids of a text.

        Args:
            specials: True: "<|im_end|>" and its like become their one control token (for trusted text only).
                False: they are spelt out as ordinary text.

        Raises:
            InputError: the text holds lone surrogates, which no encoding can carry.
        """
        if not specials:
            return self._plain(text)
        out: list[int] = []
        for i, piece in enumerate(self.split_specials(text)):
            if i % 2:
                out.append(self._specials[piece])
            elif piece:
                out.extend(self._plain(piece))
        return out

    def _plain(self, text: str) -> list[int]:
        check_text(text)
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(
        self, ids: Iterable[int], skip_special_tokens: bool = True, keep_special: frozenset[int] = frozenset()
    ) -> str:
        """Text of token ids; bytes that are no UTF-8 become U+FFFD, ids without a token are left out.

        Args:
            skip_special_tokens: drop control tokens, except those in `keep_special`.
        """
        dropped = self.special_ids - keep_special if skip_special_tokens else frozenset()
        return self._tokenizer.decode([int(i) for i in ids if i not in dropped], skip_special_tokens=False)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that one token stands for; b"" for an id without a token."""
        token = self.id_to_token(token_id)
        if token is None:
            return b""
        try:
            return bytes(map(_BYTE_OF.__getitem__, token))
        except KeyError:  # an added token with characters outside the byte alphabet, as written
            return token.encode("utf-8")


class IncrementalDetokenizer:
    """Token ids in, text out, as early as it is whole: a character whose bytes are spread over tokens is held back.

    Byte-level tokens are bytes, so a streaming UTF-8 decoder does it: constant work per token. The pieces and the end
    together equal `Tokenizer.decode` of all ids.
    """

    def __init__(
        self, tokenizer: Tokenizer, skip_special_tokens: bool = True, keep_special: frozenset[int] = frozenset()
    ) -> None:
        self._tokenizer = tokenizer
        self._dropped = tokenizer.special_ids - keep_special if skip_special_tokens else frozenset()
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        """The text that this token completes, often "" in the middle of an emoji."""
        token_id = int(token_id)
        return "" if token_id in self._dropped else self._decoder.decode(self._tokenizer.token_bytes(token_id))

    def finish(self) -> str:
        """What was held back: U+FFFD if the answer stopped inside a character, else ""; ready for a new text."""
        tail = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return tail


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-ins (openai/gpt-2, encoder.py): a printable byte is itself, the others follow U+0100."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (b for b in range(256) if b not in printable)
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(others)}


_BYTE_OF = _byte_alphabet()


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise CheckpointError(f"{path}: not found; copy the tokenizer's files of the checkpoint there") from None
    except (OSError, UnicodeDecodeError) as e:
        raise CheckpointError(f"{path}: not readable as text ({e}); re-download the checkpoint") from None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(_read_text(path))
    except (ValueError, RecursionError) as e:  # ValueError: also of a number of thousands of digits
        raise CheckpointError(f"{path}: not readable as JSON ({e}); re-download the checkpoint") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def _read_merges(path: Path) -> list[list[str]]:
    lines = _read_text(path).split("\n")  # not splitlines: a merge may hold U+0085's stand-in and the like
    if lines[0].startswith("#version"):
        lines = lines[1:]
    merges = [line.rstrip("\r").split(" ") for line in lines if line.strip("\r")]
    bad = next((m for m in merges if len(m) != 2), None)
    if bad is not None:
        raise CheckpointError(f"{path}: {' '.join(bad)!r} is no pair of tokens; re-download the checkpoint")
    return merges
