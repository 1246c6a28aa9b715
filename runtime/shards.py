"""The files of a checkpoint: which there are, what their headers say, and numbers out of them; knows no model.

Format of a safetensors file: 8 bytes little-endian header length, that many bytes of JSON
(name -> dtype, shape, data_offsets), then the data without holes (github.com/huggingface/safetensors, "Format").
The header is parsed here because numpy has no bfloat16.

Data is read with `read`, not mapped: mapped pages count as the process's memory until given back, and a file that
shrinks under a mapping kills the process instead of raising.
"""

from __future__ import annotations

import json
import math
import re
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np

from edgevl.runtime.errors import CheckpointError

__all__ = [
    "AGAIN",
    "CHUNK",
    "DTYPES",
    "INDEX",
    "INTEGERS",
    "SINGLE",
    "Entry",
    "ShardReader",
    "more",
    "read_header",
    "read_object",
    "weight_files",
]

# How each accepted dtype lies in the file; BF16 is read as bit patterns.
DTYPES = {"BF16": np.dtype("<u2"), "F16": np.dtype("<f2"), "F32": np.dtype("<f4")}
# Those of packed layers.
INTEGERS = {"I8": np.dtype("i1"), "I32": np.dtype("<i4"), "I64": np.dtype("<i8")}
_SIZES = {**DTYPES, **INTEGERS}

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
MAX_HEADER = 100_000_000  # bytes; the limit of the safetensors library
CHUNK = 1 << 20  # numbers converted at once: 4 MB of float32 stays in cache
AGAIN = "re-download the checkpoint"


@dataclass(frozen=True)
class Entry:
    """Where one tensor lies: file, its name there, dtype as safetensors spells it, shape, byte range in the file."""

    path: Path
    stored_name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def row_size(self) -> int:
        return math.prod(self.shape[1:])


class ShardReader:
    """Reads numbers out of the files, which it opens as they are needed; safe from several threads."""

    def __init__(self) -> None:
        self._files: dict[Path, FileIO] = {}
        self._lock = threading.Lock()
        self._closed = False

    def close(self) -> None:
        with self._lock:
            self._closed = True
            for file in self._files.values():
                file.close()
            self._files.clear()

    def floats(self, name: str, entry: Entry, first: int, count: int) -> np.ndarray:
        """`count` numbers from the `first` of a float tensor, float32 [count]; `name` is the one for errors."""
        out = np.empty(count, np.float32)
        for at, raw in self._raw_chunks(entry, first, count):
            part = out[at : at + raw.size]
            if entry.dtype == "BF16":  # the upper half of a float32
                bits = part.view(np.uint32)
                bits[:] = raw
                bits <<= np.uint32(16)
            else:
                part[:] = raw
            if not np.isfinite(part).all():
                where = first + at + int(np.argmin(np.isfinite(part)))
                position = ", ".join(str(int(i)) for i in np.unravel_index(where, entry.shape))
                raise CheckpointError(
                    f"{entry.path}: tensor {name!r} holds {part[where - first - at]} at [{position}]; "
                    f"weights must be finite: {AGAIN}"
                )
        return out

    def integers(self, entry: Entry) -> np.ndarray:
        """The whole of an integer tensor, in its dtype and shape."""
        dtype = INTEGERS[entry.dtype]
        out = np.empty(math.prod(entry.shape), dtype)
        self._read_into(entry, entry.begin, out.view(np.uint8).data)
        return out.reshape(entry.shape)

    def _raw_chunks(self, entry: Entry, first: int, count: int) -> Iterator[tuple[int, np.ndarray]]:
        """(offset, numbers as stored) of `count` numbers from the `first`; a chunk is valid until the next one."""
        dtype = DTYPES[entry.dtype]
        buffer = np.empty(min(CHUNK, count), dtype)
        for at in range(0, count, CHUNK):
            chunk = buffer[: min(CHUNK, count - at)]
            self._read_into(entry, entry.begin + (first + at) * dtype.itemsize, chunk.view(np.uint8).data)
            yield at, chunk

    def _read_into(self, entry: Entry, position: int, target: memoryview) -> None:
        with self._lock:  # one position per file
            if self._closed:
                raise ValueError("read of a closed Checkpoint")
            try:
                file = self._files.get(entry.path)
                if file is None:
                    file = self._files[entry.path] = FileIO(entry.path)
                file.seek(position)
                done = 0
                while done < len(target):
                    got = file.readinto(target[done:])
                    if not got:
                        raise CheckpointError(f"{entry.path}: ended within tensor {entry.stored_name!r}; {AGAIN}")
                    done += got
            except OSError as e:
                raise CheckpointError(f"{entry.path}: cannot be read ({e}); tensor {entry.stored_name!r}") from None


def read_object(path: Path) -> dict[str, Any]:
    """A JSON file that holds one object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, ValueError, RecursionError) as e:
        raise CheckpointError(f"{path}: not readable as JSON ({e}); {AGAIN}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got {type(value).__name__}; {AGAIN}")
    return value


def weight_files(folder: Path) -> tuple[list[Path], dict[str, str]]:
    """The safetensors files, and tensor -> file name of the index ({} without one)."""
    if (folder / SINGLE).exists():  # transformers, too, prefers it over an index
        return [folder / SINGLE], {}
    path = folder / INDEX
    if path.exists():
        index = read_object(path).get("weight_map")
        if not isinstance(index, dict) or not index:
            raise CheckpointError(f"{path}: weight_map must map tensors to files; {AGAIN}")
        for name, file in index.items():
            if not isinstance(file, str) or not re.fullmatch(r"[\w.-]+\.safetensors", file):
                raise CheckpointError(f"{path}: {name!r} lies in {file!r}, expected a *.safetensors file beside it")
        files = [folder / file for file in sorted(set(index.values()))]
        absent = [file.name for file in files if not file.exists()]
        if absent:
            tensor = next(name for name, file in index.items() if file == absent[0])
            raise CheckpointError(
                f"{folder / absent[0]}: not found, but {INDEX} places tensor {tensor!r} in it"
                f"{more(absent, 'files')}; {AGAIN}"
            )
        return files, index
    files = sorted(folder.glob("*.safetensors"))
    if files:
        return files, {}
    pickles = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in folder.glob(pattern))
    if pickles:
        raise CheckpointError(
            f"{folder / pickles[0]}: a pickle, which runs code when it is read, so edgevl does not; convert it: "
            f"load it with transformers where you trust it and save_pretrained(..., safe_serialization=True)"
        )
    raise CheckpointError(f"{folder}: no {SINGLE}, {INDEX} or other *.safetensors; {AGAIN}")


def read_header(path: Path) -> list[Entry]:
    """The tensors of one file, in the order of their data; every byte of the file must belong to one."""
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > MAX_HEADER or 8 + length > size:
                raise CheckpointError(
                    f"{path}: header of {length} bytes in a file of {size}: truncated or not safetensors; {AGAIN}"
                )
            text = file.read(length)
    except OSError as e:
        raise CheckpointError(f"{path}: cannot be read ({e})") from None
    try:
        header = json.loads(text, object_pairs_hook=_no_duplicates)
    except (UnicodeDecodeError, ValueError, RecursionError) as e:
        raise CheckpointError(f"{path}: the header is not readable as JSON ({e}); {AGAIN}") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: the header is not a JSON object; {AGAIN}")
    entries = [_entry(path, name, spec, 8 + length) for name, spec in header.items() if name != "__metadata__"]
    entries.sort(key=lambda entry: (entry.begin, entry.end))
    beyond = [entry for entry in entries if entry.end > size]
    if beyond:
        raise CheckpointError(
            f"{path}: truncated: tensor {beyond[0].stored_name!r} ends at byte {beyond[0].end}, the file at {size}"
            f"{more(beyond, 'tensors')}; {AGAIN}"
        )
    position = 8 + length
    for entry in entries:
        if entry.begin != position:
            problem = "overlaps the tensor before it" if entry.begin < position else "leaves a hole before it"
            raise CheckpointError(f"{path}: malformed: tensor {entry.stored_name!r} {problem}; {AGAIN}")
        position = entry.end
    if position != size:
        raise CheckpointError(f"{path}: malformed: {size - position} bytes after the last tensor; {AGAIN}")
    return entries


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(n for n in names if names.count(n) > 1)!r} twice")
    return out


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _entry(path: Path, name: str, spec: Any, base: int) -> Entry:
    """One line of the header, checked; `base` is where the data starts."""
    what = f"{path}: malformed header of tensor {name!r}"
    if not isinstance(spec, dict) or not isinstance(spec.get("dtype"), str):
        raise CheckpointError(f"{what}: expected dtype, shape and data_offsets; {AGAIN}")
    shape, offsets = spec.get("shape"), spec.get("data_offsets")
    if not isinstance(shape, list) or not all(_is_count(n) for n in shape):
        raise CheckpointError(f"{what}: shape is {shape!r}; {AGAIN}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_count(n) for n in offsets):
        raise CheckpointError(f"{what}: data_offsets is {offsets!r}; {AGAIN}")
    dtype, (begin, end) = spec["dtype"], offsets
    if end < begin or (dtype in _SIZES and end - begin != math.prod(shape) * _SIZES[dtype].itemsize):
        raise CheckpointError(f"{what}: {dtype} {shape} does not fill the bytes {begin}..{end}; {AGAIN}")
    return Entry(path, name, dtype, tuple(shape), base + begin, base + end)


def more(items: Sequence[Any], what: str) -> str:
    """ " (and 3 more tensors)" after the first of four has been named."""
    return f" (and {len(items) - 1} more {what})" if len(items) > 1 else ""
