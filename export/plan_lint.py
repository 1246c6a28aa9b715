"""Lint of ONNX graphs and of the plans built from them: what TensorRT drops, refuses or does slowly without a word.

A plan of TensorRT-RTX holds its kernel graph as text (undocumented; read here for versions 1.x): one program per
profile, with every kernel's inputs, outputs and the ONNX nodes that went into it. Other plans may hold none.
"""

from __future__ import annotations

import itertools
import mmap
import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir

from edgevl.runtime.bundle import Bundle
from edgevl.runtime.graph_spec import IN_PLACE
from edgevl.runtime.plans import PlanSet

__all__ = [
    "KERNELS_PER_LAYER",
    "Kernel",
    "Program",
    "lint_bundle_graphs",
    "lint_decoder_plan",
    "lint_graph",
    "lint_plans",
    "lint_vision_plan",
    "read_programs",
]

# Most kernels per decoder layer, without and with a cache that the graph updates itself: what was seen with
# TensorRT-RTX 1.7.1 on graphs that fuse as they should (int8 and int4 have the most).
KERNELS_PER_LAYER = {False: {"decode": 12, "prefill": 13}, True: {"decode": 11, "prefill": 13}}


# ---------------------------------------------------------------------- the ONNX graph


def lint_graph(path: Path) -> list[str]:
    """What in an ONNX file would fail, be slow, or be silently wrong on TensorRT; [] where nothing would."""
    graph = ir.load(path).graph
    found: list[str] = []
    for node in graph:
        rules = {"Attention": _attention, "DequantizeLinear": _dequantize, "TensorScatter": _scatter}
        if node.domain not in ("", "ai.onnx"):
            found.append(f"{node.name}: {node.op_type} of {node.domain}, which TensorRT does not know")
        elif node.op_type in rules:
            found += [f"{node.name}: {problem}" for problem in rules[node.op_type](node, graph)]
    return found


def _attention(node: ir.Node, graph: ir.Graph) -> Iterator[str]:
    inputs = [*node.inputs, *[None] * (7 - len(node.inputs))]
    query, mask = inputs[0], inputs[3]
    if "scale" not in node.attributes:
        yield "no explicit scale, which may add moves over the cache"
    if _int(node, "is_causal"):
        yield "is_causal counts from the upper left: wrong for one token over a longer cache"
    if inputs[6] is not None:
        yield "nonpad_kv_seqlen, which TensorRT drops without a word"
    if inputs[4] is not None or inputs[5] is not None or len([o for o in node.outputs if o.name]) > 1:
        yield "past or present inside Attention, which TensorRT does not parse"
    if "softcap" in node.attributes or "softmax_precision" in node.attributes:
        yield "softcap or softmax_precision, which TensorRT does not parse"
    types = _types(graph)
    if query is not None and types.get(query.name or "") == ir.DataType.FLOAT:
        yield "float32, for which TensorRT has no fused kernel"
    if mask is not None and query is not None:
        a, b = types.get(mask.name or ""), types.get(query.name or "")
        if a is not None and b is not None and a != b:
            yield f"a mask of {a.name} for queries of {b.name}; an additive mask in their type is what is fused"


def _dequantize(node: ir.Node, graph: ir.Graph) -> Iterator[str]:
    codes, scale, *zero = node.inputs
    dtype = None if codes is None else codes.dtype if codes.const_value is None else codes.const_value.dtype
    if dtype == ir.DataType.UINT4:
        yield "UINT4, which TensorRT does not parse"
    if zero and zero[0] is not None and zero[0].const_value is not None and zero[0].const_value.numpy().any():
        yield "a zero point that is not zero, which TensorRT does not parse"
    if scale is not None and scale.const_value is not None:
        values = scale.const_value.numpy().astype(np.float32)
        if not (values > 0).all() or not np.isfinite(values).all():
            yield "a scale that is not a positive number, which TensorRT does not parse"
        wide = {t.dtype for t in graph.inputs if t.name in ("rotary_cos",)}
        if wide and scale.dtype not in wide:
            yield f"a scale of {scale.dtype} in a graph of {next(iter(wide))}: the result is computed in another type"
    if dtype == ir.DataType.INT4 and "block_size" not in node.attributes:
        yield "INT4 without blocks, for which TensorRT has no fused kernel"


def _scatter(node: ir.Node, graph: ir.Graph) -> Iterator[str]:
    past, present = node.inputs[0], node.outputs[0]
    if past is None or all(past is not i for i in graph.inputs) or all(present is not o for o in graph.outputs):
        yield "the cache is not an input and an output of the graph, so it is not updated in place"
    mode = node.attributes.get("mode")
    if mode is not None and mode.as_string() != "linear":
        yield "a circular cache, which TensorRT does not take"


def _int(node: ir.Node, name: str) -> int:
    attribute = node.attributes.get(name)
    return 0 if attribute is None else attribute.as_int()


def _types(graph: ir.Graph) -> dict[str, ir.DataType]:
    """Type of every value, forward through nodes that keep the type of their first input."""
    types = {v.name or "": v.dtype for v in (*graph.inputs, *graph.initializers.values()) if v.dtype is not None}
    for node in graph:
        first = types.get(node.inputs[0].name or "") if node.inputs and node.inputs[0] is not None else None
        if node.op_type == "Cast":
            first = ir.DataType(node.attributes["to"].as_int())
        elif node.op_type in ("DequantizeLinear", "Where"):
            first = types.get((node.inputs[1].name or "") if node.inputs[1] is not None else "")
        elif node.op_type in ("Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "And", "Or", "Not"):
            first = ir.DataType.BOOL
        elif node.op_type in ("Shape", "Size"):
            first = ir.DataType.INT64
        if first is not None:
            types.update({o.name or "": first for o in node.outputs})
    return types


# ---------------------------------------------------------------------- the plan


@dataclass(frozen=True)
class Kernel:
    """One launch. `layers`: names of the ONNX nodes that went into it."""

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    layers: tuple[str, ...]

    def operators(self) -> set[str]:
        return {re.sub(r"_\d+$", "", name) for name in self.layers}


@dataclass(frozen=True)
class Program:
    """The kernels of one profile, in order; `types` and `sizes` (elements) of its tensors where they are constant."""

    profile: int
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    kernels: tuple[Kernel, ...]
    types: Mapping[str, str]
    sizes: Mapping[str, int]
    constants: frozenset[str]

    def named(self, pattern: str) -> list[Kernel]:
        return [k for k in self.kernels if re.search(pattern, k.name)]


def read_programs(path: Path) -> list[Program]:
    """The programs of a plan, by profile; [] where it holds no readable kernel graph."""
    found = []
    with path.open("rb") as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as data:
        at = data.find(_MAGIC)
        while at >= 0:
            text = _text(data, at)
            program = None if text is None else _program(text)
            if program is not None:
                found.append(program)
            at = data.find(_MAGIC, at + 1)
    return sorted(found, key=lambda p: p.profile)


_MAGIC = b"NLYM"  # then 4 bytes, the length of the text in 8, the text
_HEAD = 16
_CALL = re.compile(r"^  (\w+)=\{ (.*?) \}$", re.M | re.S)
_KERNELS = ("function", "runtime_fusion")
_OURS = ("input_ids", "patches")  # what the program of a whole graph takes
_TENSOR = re.compile(r'^  tensor=\{ (.*?)dims=\{ (.*?) \} .*?name="([^"]*)".*? type=(\w+) \}$', re.M)


def _text(data: mmap.mmap, at: int) -> str | None:
    head = data[at : at + _HEAD]
    if len(head) < _HEAD:
        return None
    (length,) = struct.unpack("<Q", head[8:])
    body = data[at + _HEAD : at + _HEAD + min(length, len(data))]
    return body.decode("latin-1") if body.startswith(b"header {") else None


def _program(text: str) -> Program | None:
    start = text.find("\nmain {")
    if start < 0:
        return None
    inputs = _quoted(text, "  inputs=")
    outputs = _quoted(text, "  outputs=")
    if not any(name.startswith(_OURS) for name in inputs):
        return None  # one kernel's own little program
    end = text.find("\n}\n", start)
    profile = next((int(m[1]) for name in inputs if (m := re.search(r"\[profile (\d+)\]", name))), 0)
    calls = [(m[1], _kernel(m[2])) for m in _CALL.finditer(text, start, end if end > 0 else len(text))]
    # What is left out: arithmetic on shapes, on the host.
    kernels = tuple(k for kind, k in calls if kind in _KERNELS or k.layers or any("key_values." in n for n in k.inputs))
    types, sizes, constants = {}, {}, set()
    for m in _TENSOR.finditer(text, 0, start):
        types[m[3]] = m[4]
        dims = m[2].split()
        if all(d.isdigit() for d in dims):
            sizes[m[3]] = int(np.prod([int(d) for d in dims], dtype=np.int64))
        if "const_payload_size" in m[1]:
            constants.add(m[3])
    return Program(profile, inputs, outputs, kernels, types, sizes, frozenset(constants))


def _kernel(text: str) -> Kernel:
    name = re.search(r"name=\"?([\w.^-]+)", text)
    layers = re.search(r'layers="(.*?)"', text, re.S)
    return Kernel(
        name[1] if name else "",
        _quoted(text, "input_args=") or _quoted(text, "input="),
        _quoted(text, "output_args=") or _quoted(text, "output="),
        tuple(re.findall(r"\[ONNX Layer: (.*?)\]", layers[1])) if layers else (),
    )


def _quoted(text: str, key: str) -> tuple[str, ...]:
    at = text.find(key + "{")
    return tuple(re.findall(r'"([^"]*)"', text[at : text.find("}", at)])) if at >= 0 else ()


def lint_decoder_plan(path: Path, layers: int, in_place: bool = True) -> list[str]:
    """What in a decoder's plan is not fused as it should be; [] where all is.

    Args:
        layers: of the decoder.
        in_place: whether the graph updates the cache itself (the standard dialect).
    """
    programs = read_programs(path)
    if len(programs) != 2:
        return [f"{len(programs)} readable kernel graphs, expected one for decode and one for prefill"]
    found = []
    # The primitive dialect has the query heads of a group as rows, so its decode is a small prefill.
    for program, profile, attention in zip(
        programs, KERNELS_PER_LAYER[in_place], ("_gemv_mha" if in_place else "_gem[mv]_mha", "_gem[mv]_mha")
    ):
        seen = len(program.named(attention))
        if seen != layers:
            found.append(f"{profile}: {seen} fused attention kernels, expected {layers}")
        found += [f"{profile}: {problem}" for problem in _materialised(program)]
        if in_place:
            found += [f"{profile}: {problem}" for problem in _cache_problems(program, moves=profile == "decode")]
        most, per_layer = KERNELS_PER_LAYER[in_place][profile], _per_layer(program, layers)
        if per_layer > most:
            found.append(f"{profile}: {per_layer} kernels per layer, expected at most {most}")
    return found


def lint_vision_plan(path: Path, blocks: int) -> list[str]:
    """What in a vision encoder's plan is not fused as it should be."""
    programs = read_programs(path)
    if len(programs) != 1:
        return [f"{len(programs)} readable kernel graphs, expected one"]
    seen = len(programs[0].named("_gem[mv]_mha"))
    problems = [] if seen == blocks else [f"{seen} fused attention kernels, expected {blocks}"]
    return problems + _materialised(programs[0])


def _materialised(program: Program) -> list[str]:
    """Kernels that write packed weights out again, wider: no product among their nodes, or a result of their size."""
    problems = []
    for kernel in program.kernels:
        for name in kernel.inputs:
            if name not in program.constants or program.types.get(name) not in ("int4", "int8"):
                continue
            as_large = any(program.sizes.get(n, 0) >= program.sizes[name] for n in kernel.outputs)
            if as_large or not kernel.operators() & {"MatMul", "Gemm", "Gather"}:
                problems.append(f"{kernel.name} writes {name} ({program.types[name]}) out in the compute type")
                break
    return problems


def _cache_problems(program: Program, moves: bool) -> list[str]:
    """What is not right about the cache; `moves`: whether a kernel that moves it counts."""
    presents = {n for n in program.outputs if re.match(r"present_key_values\.", n)}
    problems = [f"{n} is not updated in place" for n in sorted(presents - set(program.inputs))]
    if not presents:
        problems.append("no cache among the outputs")
    for kernel in program.kernels:
        touched = presents & set(kernel.inputs)
        if moves and touched and re.search("Move|Slic|Copy|copy", kernel.name) and "_mha" not in kernel.name:
            problems.append(f"{kernel.name} moves {min(touched)}")
    return problems


def _per_layer(program: Program, layers: int) -> int:
    """Kernels between one layer's attention and the next; of a single layer, all but embedding and head."""
    places = [i for i, k in enumerate(program.kernels) if "_mha" in k.name]
    if len(places) > 1:
        return max(b - a for a, b in itertools.pairwise(places))
    return len(program.kernels) - _AROUND


_AROUND = 4  # embedding with pictures, last norm, head, cast: what a decoder has once


# ---------------------------------------------------------------------- a bundle


def lint_bundle_graphs(bundle: Bundle) -> list[str]:
    """`lint_graph` of all graphs of a bundle."""
    return [f"{g.file}: {problem}" for g in bundle.graphs.values() for problem in lint_graph(bundle.path(g.file))]


def lint_plans(bundle: Bundle, plans: PlanSet) -> list[str]:
    """The kernel graphs of a bundle's plans; plans of another flavour than TensorRT-RTX have none that is read."""
    decoder = bundle.graphs["decoder"]
    if plans.flavour != "tensorrt_rtx":
        return [f"plans of {plans.flavour} hold no kernel graph that can be read; --lint is for TensorRT-RTX"]
    in_place = decoder.spec.cache_update == IN_PLACE
    layers = bundle.model.text.num_hidden_layers
    problems = lint_decoder_plan(plans.path("decoder"), layers, in_place)
    return [
        *(f"vision.plan: {p}" for p in lint_vision_plan(plans.path("vision"), bundle.model.vision.depth)),
        *(f"decoder.plan: {p}" for p in problems),
    ]
