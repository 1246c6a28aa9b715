"""Named tensors in one small file: a safetensors reader and writer in numpy, for golden vectors.

Format (github.com/huggingface/safetensors, "Format"): 8 bytes little-endian header length, that many bytes of JSON
(name -> dtype, shape, data_offsets; `__metadata__` -> strings), then the data without holes. Strict: what the format
does not allow is an error, not a guess.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from edgevl.runtime.errors import BundleError

__all__ = ["read_tensors", "write_tensors"]

DTYPES = {"F32": np.dtype("<f4"), "I64": np.dtype("<i8"), "U8": np.dtype("u1")}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_METADATA = "__metadata__"
_MAX_HEADER = 1 << 20  # bytes; ours are a few hundred


def write_tensors(path: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
    """Write the file under a temporary name and rename it: a reader sees all of it or none.

    Raises:
        ValueError: a dtype that the reader does not take (float32, int64 and uint8 it does).
    """
    header: dict[str, Any] = {_METADATA: dict(metadata)}
    offset, arrays = 0, []
    # Widest first, so that every tensor is aligned to its item size.
    for name, value in sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize):
        array = np.ascontiguousarray(value)
        if array.dtype not in _NAMES:
            raise ValueError(f"{name}: {array.dtype}, expected one of {', '.join(map(str, _NAMES))}")
        shape = list(np.shape(value))  # ascontiguousarray makes a scalar a row
        header[name] = {"dtype": _NAMES[array.dtype], "shape": shape, "data_offsets": [offset, offset + array.nbytes]}
        offset += array.nbytes
        arrays.append(array)
    text = json.dumps(header, ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for array in arrays:
                file.write(memoryview(array).cast("B") if array.size else b"")
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def read_tensors(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Tensors by name, and the metadata.

    Raises:
        BundleError: the file cannot be read or is malformed; names it and what is wrong.
    """
    try:
        data = path.read_bytes()
    except OSError as e:
        raise BundleError(f"{path}: cannot be read ({e}); copy the bundle again") from None
    try:
        return _parse(data)
    except (ValueError, TypeError, KeyError, RecursionError) as e:
        raise BundleError(f"{path}: not a safetensors file ({e}); copy the bundle again or re-export") from None


def _parse(data: bytes) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or length > _MAX_HEADER or 8 + length > len(data):
        raise ValueError(f"header of {length} bytes in a file of {len(data)}")
    header = json.loads(data[8 : 8 + length].decode("utf-8"), object_pairs_hook=_no_duplicates)
    if not isinstance(header, dict):
        raise ValueError("the header is not a JSON object")
    metadata = header.pop(_METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise ValueError(f"{_METADATA} must map names to strings")
    tensors: dict[str, np.ndarray] = {}
    position, body = 0, memoryview(data)[8 + length :]
    entries = [_entry(name, spec) for name, spec in header.items()]
    for begin, end, name, dtype, shape in sorted(entries, key=lambda entry: entry[:2]):
        if begin != position or end > len(body):
            raise ValueError(f"tensor {name!r} at {begin}..{end}, expected it at {position} of {len(body)} bytes")
        tensors[name] = np.frombuffer(body[begin:end], dtype).reshape(shape)
        position = end
    if position != len(body):
        raise ValueError(f"{len(body) - position} bytes after the last tensor")
    return tensors, metadata


def _entry(name: str, spec: Any) -> tuple[int, int, str, np.dtype[Any], tuple[int, ...]]:
    if not isinstance(spec, dict) or set(spec) != {"dtype", "shape", "data_offsets"} or spec["dtype"] not in DTYPES:
        raise ValueError(f"tensor {name!r} is {spec!r}, expected dtype ({', '.join(DTYPES)}), shape and data_offsets")
    shape, offsets, dtype = spec["shape"], spec["data_offsets"], DTYPES[spec["dtype"]]
    counts = [*shape, *offsets] if isinstance(shape, list) and isinstance(offsets, list) else [None]
    if any(type(n) is not int or n < 0 for n in counts) or len(offsets) != 2:
        raise ValueError(f"tensor {name!r}: shape {shape!r}, data_offsets {offsets!r}")
    if offsets[1] - offsets[0] != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"tensor {name!r}: {spec['dtype']} {shape} does not fill the bytes {offsets[0]}..{offsets[1]}")
    return offsets[0], offsets[1], name, dtype, tuple(shape)


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        raise ValueError("a name stands twice in the header")
    return out
