"""A thin builder over onnx_ir: nodes one by one, weights streamed to one data file as they are declared.

It knows tensors and nodes, not models. A weight is handed over as chunks and is never held whole: the data file
grows while the graph is built, so the memory of an export does not depend on the depth of the model.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir

from edgevl.runtime.graph_spec import GraphSpec

__all__ = ["EDGEVL", "MICROSOFT", "DataFile", "GraphBuilder"]

MICROSOFT = "com.microsoft"
EDGEVL = "edgevl"  # operators of runtime/native
_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)  # importing it is what makes np.dtype("bfloat16") known
_PAGE = 4096  # a tensor that starts on a page can be mapped by the engine instead of copied
_LARGE = 1 << 20


class DataFile:
    """External data shared by the graphs of one model: tensors back to back, hashed while they are written.

    The same key is stored once, however many graphs and nodes refer to it.
    """

    def __init__(self, path: Path, on_tensor: Callable[[str, int], None] | None = None) -> None:
        self.path = path
        self._on_tensor = on_tensor
        self._file = path.open("wb")
        self._offset = 0
        self._hash = hashlib.sha256()
        self._tensors: dict[str, ir.ExternalTensor] = {}

    def __enter__(self) -> DataFile:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._file.close()

    def stored(self, key: str) -> ir.ExternalTensor | None:
        return self._tensors.get(key)

    def append(
        self,
        key: str,
        dtype: np.dtype[Any],
        shape: Sequence[int],
        chunks: Iterable[np.ndarray],
        packed: ir.DataType | None = None,
    ) -> ir.ExternalTensor:
        """Write the chunks, which together are the C-ordered tensor `key`, and return a reference to them.

        With `packed` (INT4) the chunks are the bytes that hold its elements, low bits first, and `shape` counts
        elements.
        """
        element = packed or ir.DataType.from_numpy(dtype)
        expected = -(-int(np.prod(shape, dtype=np.int64)) * element.bitwidth // 8)
        self._pad(_PAGE if expected >= _LARGE else 64)
        start = self._offset
        for chunk in chunks:
            if chunk.dtype != dtype:
                raise ValueError(f"{key}: a chunk of {chunk.dtype}, declared as {dtype}")
            self._write(np.ascontiguousarray(chunk).reshape(-1).view(np.uint8).data)
        if self._offset - start != expected:
            raise ValueError(f"{key}: {self._offset - start} bytes were written, {tuple(shape)} {dtype} is {expected}")
        tensor = ir.ExternalTensor(
            self.path.name,
            start,
            expected,
            element,
            shape=ir.Shape(shape),
            name=key,
            base_dir=str(self.path.parent),
        )
        self._tensors[key] = tensor
        if self._on_tensor is not None:
            self._on_tensor(key, expected)
        return tensor

    def alias(self, key: str, of: str, shape: Sequence[int], element: ir.DataType | None = None) -> ir.ExternalTensor:
        """The bytes of tensor `of` under another name and shape, and as elements of another type where one is given:
        two operators may want two views of one table."""
        source = self._tensors[of]
        tensor = ir.ExternalTensor(
            self.path.name,
            source.offset,
            source.length,
            element or source.dtype,
            shape=ir.Shape(shape),
            name=key,
            base_dir=str(self.path.parent),
        )
        self._tensors[key] = tensor
        return tensor

    def sha256(self) -> str:
        return self._hash.hexdigest()

    def _pad(self, alignment: int) -> None:
        self._write(memoryview(bytes(-self._offset % alignment)))

    def _write(self, data: memoryview) -> None:
        self._file.write(data)
        self._hash.update(data)
        self._offset += len(data)


class GraphBuilder:
    """One ONNX graph under construction; its inputs are those of `spec`, in that order."""

    def __init__(self, spec: GraphSpec, data: DataFile, opset: int, ir_version: int) -> None:
        self.spec = spec
        self.data = data
        self._opset, self._ir_version = opset, ir_version
        self._nodes: list[ir.Node] = []
        self._domains = {""}
        self._initializers: dict[str, ir.Value] = {}
        self._counts: dict[str, int] = {}
        self._inputs = {
            t.name: ir.Value(
                name=t.name,
                type=ir.TensorType(ir.DataType.from_numpy(np.dtype(t.dtype))),
                shape=ir.Shape(t.shape),
            )
            for t in spec.inputs
        }
        self._outputs: dict[str, ir.Value] = {}

    def input(self, name: str) -> ir.Value:
        return self._inputs[name]

    def output(self, name: str, value: ir.Value) -> None:
        """Declare `value` as the graph's output `name` with the type that the spec promises."""
        spec = next(t for t in self.spec.outputs if t.name == name)
        value.name = name
        value.type = ir.TensorType(ir.DataType.from_numpy(np.dtype(spec.dtype)))
        value.shape = ir.Shape(spec.shape)
        self._outputs[name] = value

    def op(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        attributes: dict[str, Any] | None = None,
        *,
        domain: str = "",
        outputs: int = 1,
    ) -> Any:
        """Append a node; returns its output, or the tuple of them where `outputs` > 1."""
        count = self._counts[op_type] = self._counts.get(op_type, -1) + 1
        name = f"{op_type}_{count}"
        node = ir.node(op_type, inputs, attributes or {}, domain=domain, num_outputs=outputs, name=name)
        for i, value in enumerate(node.outputs):
            value.name = f"{name}_{i}" if outputs > 1 else name
        self._nodes.append(node)
        self._domains.add(domain)
        return node.outputs if outputs > 1 else node.outputs[0]

    def either(
        self,
        condition: ir.Value,
        then: Callable[[], Sequence[ir.Value]],
        otherwise: Callable[[], Sequence[ir.Value]],
    ) -> tuple[ir.Value, ...]:
        """What `then` gives where the condition (bool, one element) holds, else what `otherwise` gives: as many values.

        Both append their nodes to a branch of their own. They may use all values declared before, but nothing declared
        in a branch is known outside of it.
        """
        branches = {"then_branch": self._branch(then), "else_branch": self._branch(otherwise)}
        outputs = len(branches["then_branch"].outputs)
        return self.op("If", [condition], branches, outputs=outputs)

    def _branch(self, write: Callable[[], Sequence[ir.Value]]) -> ir.Graph:
        outside, self._nodes = self._nodes, []
        try:
            values = write()
            name = f"branch_{self._nodes[-1].name}"
            return ir.Graph([], list(values), nodes=self._nodes, name=name)
        finally:
            self._nodes = outside

    def constant(self, key: str, array: np.ndarray) -> ir.Value:
        """A small tensor kept inside the model file, shared by all who ask for `key`."""
        if key not in self._initializers:
            self._register(key, ir.tensor(array, name=key))
        return self._initializers[key]

    def weight(
        self,
        key: str,
        dtype: np.dtype[Any] | type,
        shape: Sequence[int],
        chunks: Callable[[], Iterable[np.ndarray]],
        packed: ir.DataType | None = None,
    ) -> ir.Value:
        """A tensor in the data file; `chunks` is called only if no graph has stored `key` before."""
        if key not in self._initializers:
            tensor = self.data.stored(key)
            if tensor is None:
                tensor = self.data.append(key, np.dtype(dtype), shape, chunks(), packed)
            self._register(key, tensor)
        return self._initializers[key]

    def data_only(
        self, key: str, dtype: np.dtype[Any] | type, shape: Sequence[int], chunks: Callable[[], Iterable[np.ndarray]]
    ) -> None:
        """Store a tensor that this graph may refer to later, without declaring it as an initializer yet."""
        if self.data.stored(key) is None:
            self.data.append(key, np.dtype(dtype), shape, chunks())

    def alias(self, key: str, of: str, shape: Sequence[int], element: ir.DataType | None = None) -> ir.Value:
        """A weight that shares the bytes of the weight `of`, in another shape or type of elements."""
        if key not in self._initializers:
            self._register(key, self.data.stored(key) or self.data.alias(key, of, shape, element))
        return self._initializers[key]

    def save(self, path: Path) -> None:
        missing = [t.name for t in self.spec.outputs if t.name not in self._outputs]
        if missing:
            raise ValueError(f"graph {self.spec.name!r} has no value for its outputs {missing}")
        graph = ir.Graph(
            [self._inputs[t.name] for t in self.spec.inputs],
            [self._outputs[t.name] for t in self.spec.outputs],
            nodes=self._used_nodes(),
            initializers=list(self._initializers.values()),
            opset_imports={domain: 1 if domain else self._opset for domain in sorted(self._domains)},
            name=self.spec.name,
        )
        ir.save(ir.Model(graph, ir_version=self._ir_version, producer_name="edgevl"), path)

    def _used_nodes(self) -> list[ir.Node]:
        """Without those whose outputs nothing uses: another node has taken over what they did."""
        outputs, used = set(self._outputs.values()), []
        for node in reversed(self._nodes):
            if any(value in outputs or value.uses() for value in node.outputs):
                used.append(node)
            else:
                for place in range(len(node.inputs)):
                    node.replace_input_with(place, None)
        return used[::-1]

    def _register(self, key: str, tensor: ir.TensorProtocol) -> None:
        self._initializers[key] = ir.Value(
            name=key,
            type=ir.TensorType(tensor.dtype),
            shape=ir.Shape([int(d) for d in tensor.shape.numpy()]),
            const_value=tensor,
        )
