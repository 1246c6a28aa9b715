"""Models that peers have made of a checkpoint, kept between runs, and of which checkpoint each was made.

Beside the conversion `MODELS/llama_cpp-Q4_0` lies its marker, `MODELS/llama_cpp-Q4_0.checkpoint.json`, written when the
conversion is complete:

    {"checkpoint": "2b", "fingerprint": "0123456789abcdef"}

The fingerprint decides; the name is for people. A conversion without a marker, with a broken one or with one of another
checkpoint is made anew. `mark` writes the marker of a conversion that was made otherwise.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from edgevl.runtime.errors import CheckpointError
from edgevl.runtime.output_file import write_output

__all__ = ["convert", "fingerprint", "is_current", "mark", "marker"]

_CONFIG = "config.json"
_BESIDE = ("preprocessor_config.json", "tokenizer.json")  # conversions hold what these say
_SAMPLE = 1024  # bytes of every tensor's beginning, middle and end
_MAX_HEADER = 100_000_000  # bytes; what the safetensors library allows


def fingerprint(checkpoint: Path) -> str:
    """16 hexadecimal digits of a sha256 over config.json, the tokenizer's and the preprocessor's files, and of every
    weight file its name, size, header and some bytes of each tensor: a second's work for gigabytes. Training moves all
    values of a tensor, so that samples tell.

    Raises:
        CheckpointError: no config.json, no weights, or a weight file that is none.
    """
    digest = hashlib.sha256()
    try:
        for name in (_CONFIG, *_BESIDE):
            if name == _CONFIG or (checkpoint / name).exists():
                _add(digest, name.encode(), (checkpoint / name).read_bytes())
        weights = sorted(checkpoint.glob("*.safetensors"))
        for path in weights:
            size = path.stat().st_size
            with path.open("rb") as file:
                _add(digest, path.name.encode(), str(size).encode(), *_samples(file, size, path))
    except OSError as e:
        raise CheckpointError(f"{checkpoint}: cannot be read ({e}); expected the folder of a checkpoint") from None
    if not weights:
        raise CheckpointError(f"{checkpoint}: no *.safetensors in it, expected the folder of a checkpoint")
    return digest.hexdigest()[:16]


def _add(digest: hashlib._Hash, *parts: bytes) -> None:
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)


def _samples(file: BinaryIO, size: int, path: Path) -> Iterator[bytes]:
    """The header (github.com/huggingface/safetensors, "Format"), then pieces of the tensors in it."""
    length = int.from_bytes(file.read(8), "little")
    try:
        if not 0 < length <= min(size - 8, _MAX_HEADER):
            raise ValueError(f"header of {length} bytes in a file of {size}")
        header = file.read(length)
        entries = json.loads(header)
        tensors = [entry["data_offsets"] for name, entry in entries.items() if name != "__metadata__"]
        spans = sorted((int(first), int(last)) for first, last in tensors)
        if any(not 0 <= first <= last <= size - 8 - length for first, last in spans):
            raise ValueError("a tensor lies outside of the file")
    except (ValueError, TypeError, KeyError, AttributeError) as e:
        raise CheckpointError(f"{path}: not a safetensors file ({e}); copy the checkpoint again") from None
    yield header
    for first, last in spans:
        for at in (first, (first + last) // 2, max(first, last - _SAMPLE)):
            file.seek(8 + length + at)
            yield file.read(min(_SAMPLE, last - at))


def marker(folder: Path) -> Path:
    """Where it is written of which checkpoint a conversion was made."""
    return folder.with_name(f"{folder.name}.checkpoint.json")


def mark(folder: Path, checkpoint: Path) -> None:
    """Say that the conversion was made of this checkpoint as it is now.

    Raises:
        CheckpointError: see `fingerprint`.
        InputError: the marker cannot be written.
    """
    said = {"checkpoint": checkpoint.absolute().name, "fingerprint": fingerprint(checkpoint)}
    write_output(marker(folder), json.dumps(said) + "\n")


def is_current(folder: Path, expected: str) -> bool:
    """Whether a conversion is there and was made of the checkpoint with this fingerprint. What a link to a checkpoint
    leads to may have changed since: that is looked at itself."""
    try:
        said = json.loads(marker(folder).read_text(encoding="utf-8"))
        if not folder.exists() or said["fingerprint"] != expected:
            return False
        linked = folder.is_symlink() and (folder / _CONFIG).exists() and any(folder.glob("*.safetensors"))
        return not linked or fingerprint(folder) == expected
    except (OSError, ValueError, TypeError, KeyError, CheckpointError):
        return False


def convert(checkpoint: Path, folder: Path, make: Callable[[Path], None]) -> None:
    """Have `make` convert the checkpoint into the folder that it is given, put that in the place of what was there, and
    mark it. Where `make` fails, what was there stays, and nothing is left of the attempt.

    Raises:
        FileNotFoundError: `make` has made nothing.
        CheckpointError, InputError: see `mark`.
    """
    new = folder.with_name(f"{folder.name}.new")
    leftovers = (new, new.with_name(f"{new.name}.partial"))
    try:
        for path in leftovers:  # of a run that was killed
            _remove(path)
        make(new)
        if not new.exists():
            raise FileNotFoundError(f"the conversion wrote no {folder.name}")
        # From here to the end there is no conversion that another run would take.
        marker(folder).unlink(missing_ok=True)
        _remove(folder)
        new.rename(folder)
        mark(folder, checkpoint)
    finally:
        for path in leftovers:
            _remove(path)


def _remove(path: Path) -> None:
    """A folder, or a link but never what it leads to."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.is_dir():
        shutil.rmtree(path)
