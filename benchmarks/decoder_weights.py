"""Bytes of weights that one decode step reads, as the decoder's graph says: every tensor of the data file once, with
its own bits, blocks and zero points, however mixed; of a table that rows are only looked up in, next to nothing.

Our own kernels keep scales of blocks in 16 bits where these hold all of a matrix exactly, and read those
(runtime/native/nbits_packed.c). ONNX files are read here by hand (onnx.proto, protobuf's wire format): devices that
measure need no package for it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np

from edgevl.runtime.bundle import Bundle
from edgevl.runtime.errors import BundleError
from edgevl.runtime.native_kernels import native_role

__all__ = ["step_weight_bytes"]

_LOOKUPS = ("Gather", "GatherBlockQuantized")  # read some rows
_SCALES = ("MatMulNBits", 2)  # operator and place of the scales of blocks
_FLOAT32 = 1  # onnx.proto, TensorProto.DataType
_NORMAL_HALF = 2.0**-14  # the least that the kernels try to keep in 16 bits, beside zero
# Numbers of fields (onnx.proto)
_MODEL_GRAPH, _GRAPH_NODE, _GRAPH_INITIALIZER = 7, 1, 5
_NODE_INPUT, _NODE_OPERATOR, _NODE_ATTRIBUTE, _ATTRIBUTE_GRAPH = 1, 4, 5, 6
_TENSOR_TYPE, _TENSOR_NAME, _TENSOR_EXTERNAL = 2, 8, 13


@dataclass(frozen=True)
class _Tensor:
    """Of a data file: its bytes [offset, offset + length) of `location`."""

    name: str
    dtype: int
    location: str
    offset: int
    length: int


@dataclass
class _Graph:
    """Tensors in data files, and who reads which name: (operator, place among its inputs)."""

    tensors: list[_Tensor] = field(default_factory=list)
    readers: dict[str, set[tuple[str, int]]] = field(default_factory=dict)


def step_weight_bytes(bundle: Bundle) -> int:
    """Of the decoder's graph that this machine runs.

    Raises:
        BundleError: the graph cannot be read.
    """
    native = native_role(bundle, "decoder")
    return _step_weight_bytes(bundle.path(bundle.graphs[native or "decoder"].file), native is not None)


@cache
def _step_weight_bytes(path: Path, native: bool) -> int:
    graph = _Graph()
    try:
        for number, value in _fields(memoryview(path.read_bytes())):
            if number == _MODEL_GRAPH:
                _read_graph(_bytes(value), graph)
    except (OSError, ValueError, IndexError) as e:
        raise BundleError(f"{path}: not readable as an ONNX graph ({e}); export the checkpoint again") from None
    sizes: dict[tuple[str, int], int] = {}  # one tensor may have two names and two shapes
    for tensor in graph.tensors:
        readers = graph.readers.get(tensor.name, set())
        if all(operator in _LOOKUPS for operator, _ in readers):
            continue  # also of a tensor that nothing reads
        short = native and _SCALES in readers and tensor.dtype == _FLOAT32 and _exact_in_half(path.parent, tensor)
        sizes[tensor.location, tensor.offset] = tensor.length // 2 if short else tensor.length
    return sum(sizes.values())


def _exact_in_half(folder: Path, tensor: _Tensor) -> bool:
    scales = np.fromfile(folder / tensor.location, np.float32, tensor.length // 4, offset=tensor.offset)
    with np.errstate(over="ignore"):
        exact = scales.astype(np.float16).astype(np.float32) == scales
    return bool((exact & ((scales == 0) | (np.abs(scales) >= _NORMAL_HALF))).all())


# ---------------------------------------------------------------------- onnx.proto


def _read_graph(data: memoryview, into: _Graph) -> None:
    for number, value in _fields(data):
        if number == _GRAPH_NODE:
            _read_node(_bytes(value), into)
        elif number == _GRAPH_INITIALIZER:
            tensor = _tensor(_bytes(value))
            if tensor is not None:
                into.tensors.append(tensor)


def _read_node(data: memoryview, into: _Graph) -> None:
    inputs, operator = [], ""
    for number, value in _fields(data):
        if number == _NODE_INPUT:
            inputs.append(_text(value))
        elif number == _NODE_OPERATOR:
            operator = _text(value)
        elif number == _NODE_ATTRIBUTE:  # the branches of an If
            for inner, graph in _fields(_bytes(value)):
                if inner == _ATTRIBUTE_GRAPH:
                    _read_graph(_bytes(graph), into)
    for place, name in enumerate(inputs):
        into.readers.setdefault(name, set()).add((operator, place))


def _tensor(data: memoryview) -> _Tensor | None:
    """None of one that lies in the model file: a small constant."""
    name, dtype, external = "", 0, {}
    for number, value in _fields(data):
        if number == _TENSOR_NAME:
            name = _text(value)
        elif number == _TENSOR_TYPE and isinstance(value, int):
            dtype = value
        elif number == _TENSOR_EXTERNAL:
            entry = {n: _text(v) for n, v in _fields(_bytes(value))}
            external[entry.get(1, "")] = entry.get(2, "")
    if "location" not in external:
        return None
    return _Tensor(name, dtype, external["location"], int(external.get("offset", 0)), int(external["length"]))


def _fields(data: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """(number, value) of a message: an integer, or the bytes of a string or of a message inside."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        kind = key & 7
        if kind == 0:
            value, at = _varint(data, at)
            yield key >> 3, value
            continue
        if kind == 2:
            size, at = _varint(data, at)
        else:
            size = {1: 8, 5: 4}.get(kind, math.inf)
        if at + size > len(data):
            raise ValueError(f"a field of kind {kind} at byte {at} passes the end")
        yield key >> 3, data[at : at + int(size)]
        at += int(size)


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 127) << shift
        shift, at = shift + 7, at + 1
        if byte < 128:
            return value, at


def _bytes(value: int | memoryview) -> memoryview:
    if isinstance(value, int):
        raise ValueError(f"the number {value} where bytes are expected")
    return value


def _text(value: int | memoryview) -> str:
    return bytes(_bytes(value)).decode()
