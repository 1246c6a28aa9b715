"""Rewrites of an openvino.Model before it is compiled: who rounds activations, and for which kernels.

Without tiles (AMX) OpenVINO's kernels over int8 weights round activations themselves, and the graph should not. With
tiles they do not, they multiply in bfloat16 at a third of the rate. There activations have to come rounded: rows scaled
to [-1, 1] go through a FakeQuantize with constant limits, which OpenVINO turns into int8 on both sides of the product.
That is one scale per token, the W8A8 of the ONNX Runtime dialect.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from edgevl.runtime.doctor import cpu_flags, cpu_model

__all__ = ["has_int8_tiles", "join_transposes", "round_rows", "slow_bfloat16", "without_row_scales"]

_LEVELS = 255  # -127 to 127


def has_int8_tiles() -> bool:
    """Whether this processor multiplies int8 in tiles (AMX)."""
    return "amx_int8" in cpu_flags()


def slow_bfloat16() -> bool:
    """Whether this processor multiplies bfloat16 more slowly than float32: Intel's AVX512-BF16 does, where there is no
    AMX (or a virtual machine hides it)."""
    flags = cpu_flags()
    return "avx512_bf16" in flags and "amx_bf16" not in flags and "intel" in cpu_model().lower()


class _Scaled(NamedTuple):
    """A product of rows divided by their largest magnitude: multiply(matmul(divide(x, largest), W), largest)."""

    product: Any
    divide: Any
    multiply: Any


def _scaled_products(model: Any) -> Iterator[_Scaled]:
    for product in [op for op in model.get_ordered_ops() if op.get_type_name() == "MatMul"]:
        divide = product.input_value(0).get_node()
        if divide.get_type_name() != "Divide":
            continue
        largest = divide.input_value(1)
        if largest.get_node().get_type_name() != "Maximum":
            continue
        after = [i.get_node() for i in product.output(0).get_target_inputs()]
        if len(after) == 1 and after[0].get_type_name() == "Multiply" and largest in after[0].input_values():
            yield _Scaled(product, divide, after[0])


def _replace(old: Any, new: Any) -> None:
    for reader in old.get_target_inputs():
        reader.replace_source_output(new)


def without_row_scales(model: Any) -> int:
    """Undo the scaling of rows by which the ONNX Runtime dialect makes a per-tensor kernel round per token:
    (x / s) W s = x W, and OpenVINO's kernels find their own scales. How many products it was taken from."""
    found = list(_scaled_products(model))
    for scaled in found:
        scaled.product.input(0).replace_source_output(scaled.divide.input_value(0))
        _replace(scaled.multiply.output(0), scaled.product.output(0))
    return len(found)


def round_rows(model: Any) -> int:
    """Round the scaled rows in front of products over int8 weights to 255 levels. Of how many products.

    What OpenVINO keeps in float32 in a bfloat16 graph is all that leads to an output without a product in between; the
    magnitudes of a last product's rows lead there, and to them everything before. A product of theirs by one ends it.
    """
    opset: Any = importlib.import_module("openvino.opset13")
    limits = [opset.constant(np.float32(limit)) for limit in (-1, 1)]
    rounded: dict[str, Any] = {}
    found = list(_scaled_products(model))
    for scaled in reversed(found):  # the last ones first: what they end does not lead on from those before
        name = scaled.divide.get_friendly_name()
        if name not in rounded:
            rounded[name] = opset.fake_quantize(scaled.divide.output(0), *limits, *limits, _LEVELS).output(0)
        scaled.product.input(0).replace_source_output(rounded[name])
        if _leads_to_output(scaled.product):
            largest = scaled.divide.input_value(1)
            ended = opset.matmul(largest, opset.constant(np.ones((1, 1), np.float32)), False, True).output(0)
            side = 0 if scaled.multiply.input_value(0) == largest else 1
            scaled.multiply.input(side).replace_source_output(ended)
    return len(found)


def _leads_to_output(product: Any) -> bool:
    """Whether an output depends on it with no other product in between."""
    seen, ahead = set(), [product]
    while ahead:
        for reader in (i.get_node() for output in ahead.pop().outputs() for i in output.get_target_inputs()):
            kind, name = reader.get_type_name(), reader.get_friendly_name()
            if kind == "Result":
                return True
            if kind != "MatMul" and name not in seen:
                seen.add(name)
                ahead.append(reader)
    return False


def join_transposes(model: Any) -> int:
    """Take out pairs of transposes that undo each other: rotated heads are laid flat, as ONNX's operators hand them on,
    and taken apart again for attention. How many pairs."""
    joined = 0
    for last in [op for op in model.get_ops() if op.get_type_name() == "Transpose"]:
        first = _before(_before(_before(last, "Reshape"), "Reshape"), "Transpose")
        if first is not None and _same_heads(first, last):
            _replace(last.output(0), first.input_value(0))
            joined += 1
    return joined


def _before(node: Any, kind: str) -> Any:
    """What a node's first input comes from, if it is of that kind."""
    found = None if node is None else node.input_value(0).get_node()
    return found if found is not None and found.get_type_name() == kind else None


def _same_heads(first: Any, last: Any) -> bool:
    """Both swap axes 1 and 2 of four, and the heads [B, heads, S, d] that come out are those that went in."""
    orders = [np.asarray(t.input_value(1).get_node().data).tolist() for t in (first, last)]
    before, after = first.input_value(0).get_partial_shape(), last.output(0).get_partial_shape()
    if orders != [[0, 2, 1, 3]] * 2:
        return False
    return all(before[i].is_static and before[i] == after[i] for i in (1, 3))
