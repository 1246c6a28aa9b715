"""export/plan_lint.py: every trap is spoiled into a good graph; the lint sees it, and TensorRT-RTX does what we say."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from conftest import Pair
from onnx import TensorProto, helper, numpy_helper

from edgevl.export.exporter import ExportOptions, export_bundle
from edgevl.export.plan_lint import lint_decoder_plan, lint_graph, lint_vision_plan, read_programs
from edgevl.export.plan_profiles import Limits, decoder_profiles
from edgevl.export.tensorrt_build import BuildOptions, _Build
from edgevl.runtime.bundle import Bundle
from edgevl.runtime.errors import EngineError
from edgevl.runtime.plans import PlanProfile, ShapeRange
from edgevl.runtime.tensorrt_library import find_tensorrt

pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx has no wheel for this platform, or is not installed")

LIMITS = Limits(capacity=64, rows=1, prefill=32, frames=1, min_patches=4, max_patches=16, merged=4)
Spoil = Callable[[onnx.ModelProto], None]


@pytest.fixture(scope="module")
def bundle(tiny: Pair, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("lint") / "b"
    export_bundle(tiny.checkpoint, folder, ExportOptions("int4", target="tensorrt", max_tokens=64, block_size=32))
    return Bundle.open(folder)


def _compile(graph: Path, profiles: tuple[PlanProfile, ...], plan: Path) -> Path:
    build = _Build(find_tensorrt("tensorrt_rtx"), BuildOptions(targets=("sm86",)), [(8, 6)], None)
    build.run("decoder", graph, profiles, plan)
    return plan


def _profiles(bundle: Bundle) -> tuple[PlanProfile, PlanProfile]:
    return decoder_profiles(bundle.graphs["decoder"].spec, LIMITS)


def _spoiled(bundle: Bundle, spoil: Spoil) -> Path:
    """The bundle's decoder with `spoil` done to it, beside the original, so that it finds the weights."""
    model = onnx.load(bundle.path("decoder.onnx"), load_external_data=False)
    spoil(model)
    path = bundle.path("spoiled.onnx")
    onnx.save(model, path)
    return path


def _nodes(model: onnx.ModelProto, op_type: str) -> list[onnx.NodeProto]:
    return [n for n in model.graph.node if n.op_type == op_type]


def _insert_before(model: onnx.ModelProto, node: onnx.NodeProto, *new: onnx.NodeProto) -> None:
    at = list(model.graph.node).index(node)
    for offset, made in enumerate(new):
        model.graph.node.insert(at + offset, made)


# ---------------------------------------------------------------------- the spoils


def no_scale(model: onnx.ModelProto) -> None:
    for node in _nodes(model, "Attention"):
        del node.attribute[:]


def causal(model: onnx.ModelProto) -> None:
    for node in _nodes(model, "Attention"):
        node.attribute.append(helper.make_attribute("is_causal", 1))


def causal_without_mask(model: onnx.ModelProto) -> None:
    causal(model)
    for node in _nodes(model, "Attention"):
        del node.input[3]


def nonpad_length(model: onnx.ModelProto) -> None:
    for node in _nodes(model, "Attention"):
        node.input.extend(["", "", "write_indices"])


def past_inside(model: onnx.ModelProto) -> None:
    for node in _nodes(model, "Attention"):
        node.input.extend(["past_key_values.0.key", "past_key_values.0.value"])


def softcap(model: onnx.ModelProto) -> None:
    for node in _nodes(model, "Attention"):
        node.attribute.append(helper.make_attribute("softcap", 30.0))


def float32_attention(model: onnx.ModelProto) -> None:
    for i, node in enumerate(_nodes(model, "Attention")):
        casts = [
            helper.make_node("Cast", [name], [f"wide_{i}_{j}"], to=TensorProto.FLOAT)
            for j, name in enumerate(node.input)
        ]
        _insert_before(model, node, *casts)
        node.input[:] = [c.output[0] for c in casts]
        back = helper.make_node("Cast", [f"attended_{i}"], [node.output[0]], to=TensorProto.FLOAT16)
        node.output[0] = f"attended_{i}"
        model.graph.node.insert(list(model.graph.node).index(node) + 1, back)


def _mask_as(kind: int) -> Spoil:
    def spoil(model: onnx.ModelProto) -> None:
        mask = next(i for i in model.graph.input if i.name == "attention_mask")
        mask.type.tensor_type.elem_type = kind

    return spoil


def negative_scale(model: onnx.ModelProto) -> None:
    _replace_scale(model, -0.01)


def zero_scale(model: onnx.ModelProto) -> None:
    _replace_scale(model, 0.0)


def _replace_scale(model: onnx.ModelProto, value: float, dtype: type = np.float16) -> None:
    node = _nodes(model, "DequantizeLinear")[0]
    old = next(i for i in model.graph.initializer if i.name == node.input[1])
    scales = np.full(list(old.dims), 0.01, dtype)
    scales.flat[0] = value
    model.graph.initializer.append(numpy_helper.from_array(scales, "spoiled_scale"))
    node.input[1] = "spoiled_scale"


def wide_scale(model: onnx.ModelProto) -> None:
    _replace_scale(model, 0.01, np.float32)


def zero_point(model: onnx.ModelProto) -> None:
    node = _nodes(model, "DequantizeLinear")[0]
    old = next(i for i in model.graph.initializer if i.name == node.input[1])
    packed = np.full(int(np.prod(old.dims)) // 2, 0x11, np.uint8)
    tensor = TensorProto(name="zeros", data_type=TensorProto.INT4, dims=old.dims, raw_data=packed.tobytes())
    model.graph.initializer.append(tensor)
    node.input.append("zeros")


def unsigned(model: onnx.ModelProto) -> None:
    node = _nodes(model, "DequantizeLinear")[0]
    next(i for i in model.graph.initializer if i.name == node.input[0]).data_type = TensorProto.UINT4


def foreign_operator(model: onnx.ModelProto) -> None:
    node = _nodes(model, "RMSNormalization")[0]
    node.op_type, node.domain = "SimplifiedLayerNormalization", "com.microsoft"
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))


def circular_cache(model: onnx.ModelProto) -> None:
    for node in _nodes(model, "TensorScatter"):
        node.attribute.append(helper.make_attribute("mode", "circular"))


def cache_behind_a_copy(model: onnx.ModelProto) -> None:
    node = _nodes(model, "TensorScatter")[0]
    copy = helper.make_node("Identity", [node.input[0]], ["copied"])
    _insert_before(model, node, copy)
    node.input[0] = "copied"


# spoil -> (what the lint says, whether TensorRT-RTX refuses the graph; None: another TensorRT may)
SPOILS: dict[str, tuple[Spoil, str, bool | None]] = {
    "no scale": (no_scale, "no explicit scale", False),
    "is_causal and mask": (causal, "is_causal counts from the upper left", True),
    "is_causal": (causal_without_mask, "is_causal counts from the upper left", False),
    "nonpad_kv_seqlen": (nonpad_length, "nonpad_kv_seqlen, which TensorRT drops", False),
    "past inside": (past_inside, "past or present inside Attention", True),
    "softcap": (softcap, "softcap or softmax_precision", True),
    "float32 attention": (float32_attention, "float32, for which TensorRT has no fused kernel", True),
    "float32 mask": (_mask_as(TensorProto.FLOAT), "a mask of FLOAT for queries of FLOAT16", True),
    "bool mask": (_mask_as(TensorProto.BOOL), "a mask of BOOL for queries of FLOAT16", None),
    "negative scale": (negative_scale, "a scale that is not a positive number", None),
    "zero scale": (zero_scale, "a scale that is not a positive number", None),
    "float32 scale": (wide_scale, "a scale of FLOAT in a graph of FLOAT16", True),
    "zero point": (zero_point, "a zero point that is not zero", True),
    "uint4": (unsigned, "UINT4", True),
    "foreign operator": (foreign_operator, "SimplifiedLayerNormalization of com.microsoft", None),
    "circular cache": (circular_cache, "a circular cache", True),
    "cache behind a copy": (cache_behind_a_copy, "not updated in place", None),
}


def test_a_good_graph_has_no_problems(bundle: Bundle, tmp_path: Path) -> None:
    assert lint_graph(bundle.path("decoder.onnx")) == [] and lint_graph(bundle.path("vision.onnx")) == []
    plan = _compile(bundle.path("decoder.onnx"), _profiles(bundle), tmp_path / "p")
    assert lint_decoder_plan(plan, 2) == []


@pytest.mark.parametrize("name", SPOILS)
def test_the_lint_sees_what_is_spoiled(bundle: Bundle, tmp_path: Path, name: str) -> None:
    spoil, message, refused = SPOILS[name]
    path = _spoiled(bundle, spoil)
    problems = lint_graph(path)
    assert problems and all(message in p for p in problems), problems
    if refused is True:
        with pytest.raises(EngineError, match=r"cannot (read|build) it"):
            _compile(path, _profiles(bundle), tmp_path / "p")
        assert not (tmp_path / "p").exists()
    elif refused is False:  # it builds, and nothing is said: the lint is all there is
        _compile(path, _profiles(bundle), tmp_path / "p")


# ---------------------------------------------------------------------- plans


def shortened_cache(model: onnx.ModelProto) -> None:
    """Attention over the first half of the cache only, which looks like less work."""
    for name, values in (("first", [0]), ("half", [32]), ("along", [2]), ("last", [3])):
        model.graph.initializer.append(numpy_helper.from_array(np.array(values), name))
    for i, node in enumerate(_nodes(model, "Attention")):
        for place, axis in ((1, "along"), (2, "along"), (3, "last")):
            cut = helper.make_node("Slice", [node.input[place], "first", "half", axis], [f"cut_{i}_{place}"])
            _insert_before(model, node, cut)
            node.input[place] = cut.output[0]


def test_a_slice_of_the_cache_moves_it(bundle: Bundle, tmp_path: Path) -> None:
    plan = _compile(_spoiled(bundle, shortened_cache), _profiles(bundle), tmp_path / "p")
    problems = lint_decoder_plan(plan, 2)
    assert any("moves present_key_values" in p for p in problems), problems


def test_one_wide_profile_loses_the_decode_kernel(bundle: Bundle, tmp_path: Path) -> None:
    decode, prefill = _profiles(bundle)
    plan = _compile(bundle.path("decoder.onnx"), (prefill, prefill), tmp_path / "p")
    assert "decode: 0 fused attention kernels, expected 2" in lint_decoder_plan(plan, 2)
    alone = _compile(bundle.path("decoder.onnx"), (decode,), tmp_path / "q")
    assert lint_decoder_plan(alone, 2)[0].startswith("1 readable kernel graphs, expected one for decode")


def test_int8_weight_only_is_written_out(tmp_path: Path) -> None:
    """What the exporter refuses: TensorRT multiplies 8-bit weights through a copy in float16."""
    codes = np.random.default_rng(0).integers(-127, 128, (512, 1024)).astype(np.int8)
    graph = helper.make_graph(
        [
            helper.make_node("DequantizeLinear", ["w", "s"], ["d"], axis=1),
            helper.make_node("MatMul", ["patches", "d"], ["y"]),
        ],
        "g",
        [helper.make_tensor_value_info("patches", TensorProto.FLOAT16, [1, 1, 512])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT16, [1, 1, 1024])],
        [numpy_helper.from_array(codes, "w"), numpy_helper.from_array(np.full(1024, 0.01, np.float16), "s")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.save(model, tmp_path / "g.onnx")
    shape = ShapeRange((1, 1, 512), (1, 1, 512), (1, 1, 512))
    plan = _compile(tmp_path / "g.onnx", (PlanProfile("vision", {"patches": shape}),), tmp_path / "p")
    problems = lint_vision_plan(plan, 0)
    assert problems and "(int8) out in the compute type" in problems[0], (
        problems,
        [(k.name, k.layers) for k in read_programs(plan)[0].kernels],
    )


def test_no_kernel_graph_is_told(tmp_path: Path) -> None:
    (tmp_path / "p").write_bytes(b"NLYM" + bytes(100))
    assert read_programs(tmp_path / "p") == []
    assert lint_vision_plan(tmp_path / "p", 1) == ["0 readable kernel graphs, expected one"]
    (tmp_path / "q").write_bytes(b"plan of something else, ending in NLYM")
    assert read_programs(tmp_path / "q") == []


def test_kernels_know_their_nodes(bundle: Bundle, tmp_path: Path) -> None:
    plan = _compile(bundle.path("decoder.onnx"), _profiles(bundle), tmp_path / "p")
    decode, prefill = read_programs(plan)
    assert (decode.profile, prefill.profile) == (0, 1)
    named = {name for k in decode.kernels for name in k.layers}
    expected = {n.name for n in onnx.load(bundle.path("decoder.onnx"), load_external_data=False).graph.node}
    heavy = {n for n in expected if n.split("_")[0] in ("MatMul", "TensorScatter", "Attention", "RMSNormalization")}
    assert heavy and heavy <= named
    assert (
        sum(decode.types.get(n) == "int4" for k in decode.kernels for n in k.inputs) == 2 * 4
    )  # q/k/v and gate/up merged
