"""The dialects for TensorRT: their files, run by ONNX Runtime, give the numbers of the model."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx.reference
import pytest
from conftest import MakePair, Pair
from quantized import CASES, write
from test_export import _logits, cosine

from edgevl.calibration.formats import dequantize_blocks, quantize_blocks
from edgevl.export.exporter import ExportOptions, export_bundle
from edgevl.export.targets import TARGETS as TARGETS_BY_NAME
from edgevl.export.trt_weights import pack_int4
from edgevl.runtime.bundle import Bundle, FileEntry
from edgevl.runtime.errors import CapacityError, CheckpointError, EngineError, InputError
from edgevl.runtime.generation import VisionLanguageModel
from edgevl.runtime.golden import COSINE_FLOORS
from edgevl.runtime.graph_spec import APPENDED, IN_PLACE

TARGETS = ("tensorrt", "jetpack6")
KEPT = (  # of quantized.CASES
    *("gptq int4, 72B", "awq, 2B, ragged", "desc_act", "v2 asymmetric", "some layers asymmetric"),
    *("some layers plain", "whole columns", "groups of 48", "packed, activation order"),
)
PICTURE = np.random.default_rng(5).integers(0, 256, (112, 84, 3), dtype=np.uint8)


def _message(text: str = "Read it.", picture: bool = True) -> list[dict[str, Any]]:
    pictures = [{"type": "image", "image": PICTURE}] if picture else []
    return [{"role": "user", "content": [*pictures, {"type": "text", "text": text}]}]


def _open(folder: Path, **options: Any) -> VisionLanguageModel:
    return VisionLanguageModel.open(folder, "ort-cpu", threads=2, **options)


@pytest.fixture(scope="module")
def pair(make_pair: MakePair) -> Pair:
    return make_pair(hidden_size=128, intermediate_size=256)


@pytest.fixture(scope="module")
def bundles(pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    """(target, precision) -> bundle of one checkpoint."""
    root = tmp_path_factory.mktemp("trt")
    made = {}
    for target in TARGETS:
        for precision in ("fp16", "int4", "bf16"):
            made[target, precision] = root / f"{target}-{precision}"
            chosen = ExportOptions(precision, target=target, max_tokens=256, block_size=32)
            export_bundle(pair.checkpoint, made[target, precision], chosen)
    return made


# ---------------------------------------------------------------------- numbers


@pytest.mark.parametrize(("precision", "floor"), [("fp16", 0.99999), ("int4", 0.9)])
@pytest.mark.parametrize("target", TARGETS)
def test_the_model_is_kept(
    bundles: dict[tuple[str, str], Path], pair: Pair, target: str, precision: str, floor: float
) -> None:
    for prefill in (True, False):
        got, embeds = _logits(bundles[target, precision], prefill)
        expected, plain = _logits(pair.bundle, prefill)
        assert cosine(got, expected) > floor
        assert cosine(embeds, plain) > 0.9999


@pytest.mark.parametrize("target", TARGETS)
def test_greedy_answers_are_those_of_transformers(
    bundles: dict[tuple[str, str], Path], pair: Pair, target: str
) -> None:
    reference = pair.reference()
    with _open(bundles[target, "fp16"]) as model:
        for messages, pictures in ((_message(), [PICTURE]), (_message("Why?", False), [])):
            prompt = model.prepare(messages)
            answer = list(model.generate(messages, max_new_tokens=4, do_sample=False, repetition_penalty=1.0).token_ids)
            expected = reference.greedy(prompt.ids.tolist(), pictures, 4)
            for i, (a, b) in enumerate(zip(answer, expected)):
                if a == b:
                    continue
                row = reference.logits([*prompt.ids.tolist(), *expected[:i]], pictures)[-1]
                # float16 may turn a tie; what follows one is another answer
                assert abs(row[a] - row[b]) < 2e-3 * (row.max() - row.min()), (i, a, b)
                break
            else:
                assert len(answer) == len(expected)


@pytest.mark.parametrize("precision", ["fp16", "int4"])
@pytest.mark.parametrize("target", TARGETS)
def test_chunks_and_steps_are_one_prefill(bundles: dict[tuple[str, str], Path], target: str, precision: str) -> None:
    with _open(bundles[target, precision]) as model:
        prompt = model.prepare(_message())
        embeds = prompt.images[0].embeds
        whole = model.decoder().prefill(0, prompt.ids, prompt.positions, embeds)
        cut = model.decoder()
        cut._chunk = 7  # pictures are cut, and the last piece is shorter
        limit = 2e-3 * np.abs(whole).max()
        assert np.abs(cut.prefill(0, prompt.ids, prompt.positions, embeds) - whole).max() < limit
        steps = model.decoder()
        steps.prefill(0, prompt.ids[:-3], prompt.positions[:, :-3], embeds)
        for i in (-3, -2, -1):
            last = steps.step(prompt.ids[i:][:1], prompt.positions[0, i:][:1])[0]
        assert np.abs(last - whole).max() < limit


@pytest.mark.parametrize("target", TARGETS)
def test_rows_of_unequal_length_do_not_see_each_other(bundles: dict[tuple[str, str], Path], target: str) -> None:
    with _open(bundles[target, "fp16"]) as model:
        prompts = [model.prepare(_message()), model.prepare(_message("What is this?", False))]
        together, alone = model.decoder(2), []
        for row, prompt in enumerate(prompts):
            embeds = prompt.images[0].embeds if prompt.images else None
            together.prefill(row, prompt.ids, prompt.positions, embeds)
            single = model.decoder()
            single.prefill(0, prompt.ids, prompt.positions, embeds)
            alone.append(single)
        tokens = np.array([17, 23])
        for step in range(3):
            places = np.array([p.next_position + step for p in prompts])
            got = together.step(tokens, places)
            for row, single in enumerate(alone):
                expected = single.step(tokens[row : row + 1], places[row : row + 1])[0]
                assert np.abs(got[row] - expected).max() < 2e-3 * np.abs(expected).max()
            tokens = tokens + 1
        ours, theirs = together.cache.view(1, 2).buffers, alone[1].cache.view(0, 1).buffers
        used = int(together.cache.lengths[1])
        for name, buffer in ours.items():
            np.testing.assert_allclose(buffer[:, :, :used], theirs[name][:, :, :used], atol=2e-3)
            assert not buffer[:, :, used:].any()  # nothing is written past the row


@pytest.mark.parametrize("precision", ["fp16", "int4"])
def test_the_primitive_dialect_gives_the_standard_numbers(bundles: dict[tuple[str, str], Path], precision: str) -> None:
    for prefill in (True, False):
        (a, x), (b, y) = (_logits(bundles[target, precision], prefill) for target in TARGETS)
        assert np.abs(a - b).max() < 1e-3 * np.abs(a).max()
        assert np.abs(x - y).max() < 1e-3 * np.abs(x).max()


def test_the_cache_is_written_in_place(bundles: dict[tuple[str, str], Path]) -> None:
    with _open(bundles["tensorrt", "fp16"]) as model:
        prompt, decoder = model.prepare(_message("Why?", False)), model.decoder()
        before = {n: b.ctypes.data for n, b in decoder.cache.view(0, 1).buffers.items()}
        decoder.prefill(0, prompt.ids, prompt.positions)
        for name, buffer in decoder.cache.view(0, 1).buffers.items():
            assert buffer.ctypes.data == before[name]
            assert np.abs(buffer[0, :, : len(prompt.ids)]).min(axis=(0, 2)).max() > 0
            assert not buffer[0, :, len(prompt.ids) :].any()


# ---------------------------------------------------------------------- what the files hold


def test_int4_is_packed_as_onnx_reads_it() -> None:
    codes = np.random.default_rng(0).integers(0, 16, (5, 7)).astype(np.uint8)
    packed = pack_int4(codes.copy())
    tensor = onnx.TensorProto(data_type=onnx.TensorProto.INT4, dims=codes.shape, raw_data=packed.tobytes())
    assert (onnx.numpy_helper.to_array(tensor).astype(int) == codes.astype(int) - 8).all()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_scales_that_tensorrt_takes(dtype: str) -> None:
    """Positive, in the graph's type, and no worse than the grid of ONNX Runtime by more than a tenth."""
    weight = np.random.default_rng(1).standard_normal((64, 256)).astype(np.float32)
    weight[3] = 0
    weight[4] *= 1e-9
    weight[5, :32] = np.linspace(-1, 1, 32)
    q = quantize_blocks(weight, 4, 32, stored=dtype)
    assert (q.scales > 0).all() and q.zero_points is None
    assert (
        q.scales.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else np.float16).astype(np.float32) == q.scales
    ).all()
    free = quantize_blocks(weight, 4, 32)
    errors = [np.square(dequantize_blocks(x) - weight).sum() for x in (q, free)]
    assert errors[0] < 1.25 * errors[1]
    assert not dequantize_blocks(q)[3].any()
    assert np.abs(dequantize_blocks(q)[5] - weight[5]).max() <= np.abs(weight[5]).max() / 7.5 + 1e-3


def _arrays(bundle: Path) -> tuple[onnx.ModelProto, dict[str, np.ndarray]]:
    model = onnx.load(bundle / "decoder.onnx")
    return model, {i.name: onnx.numpy_helper.to_array(i) for i in model.graph.initializer}


def _stored(bundle: Path) -> Iterator[tuple[str, np.ndarray]]:
    """(module, [N, K]) of every int4 or int8 layer, by the formula, with the order and the zero points undone."""
    model, arrays = _arrays(bundle)
    producers = {o: n for n in model.graph.node for o in n.output}
    consumers = {}
    for node in model.graph.node:
        for name in node.input:
            consumers.setdefault(name, []).append(node)
    for node in model.graph.node:
        if node.op_type != "DequantizeLinear" or ".trt" not in node.input[0]:
            continue
        module = node.input[0].split(".weight.")[0]
        codes, scales = (arrays[n].astype(np.float32) for n in node.input[:2])
        attributes = {a.name: a.i for a in node.attribute}
        if "block_size" not in attributes:
            yield module, (codes * scales).T
            continue
        size = attributes["block_size"]
        weight = codes * np.repeat(scales, size, 0)
        product = consumers[node.output[0]][0]
        for later in consumers[product.output[0]]:
            for name in later.input:
                other = producers.get(name)
                if other is not None and other.op_type == "MatMul" and other.input[1].endswith(".correction"):
                    weight = weight + np.repeat(arrays[other.input[1]].astype(np.float32), size, 0)
        before = producers.get(product.input[0])
        if before is not None and before.op_type == "Gather" and before.input[1].startswith("order."):
            whole = np.empty_like(weight)
            whole[arrays[before.input[1]]] = weight
            weight = whole
        yield module, weight.T


@pytest.mark.parametrize("name", KEPT)
def test_codes_of_quantized_checkpoints_are_kept(name: str, tmp_path: Path) -> None:
    """GPTQ, AWQ and compressed-tensors, with zero points, activation order and ragged groups."""
    written = write(tmp_path, **CASES[name][1])
    expected = None
    for target in TARGETS:
        folder = tmp_path / target
        export_bundle(written.folder, folder, ExportOptions(target=target, max_tokens=256))
        stored = dict(_stored(folder))
        assert set(stored) >= set(written.weights)
        for module in written.weights:
            weight = stored[module]
            # Zero points stand beside the codes as s * (8 - z), rounded to float16.
            limit = 8 * np.abs(written.weights[module]).max() * 2**-11
            assert np.abs(weight - written.weights[module]).max() <= limit, module
        if expected is None:
            export_bundle(written.plain, tmp_path / "reference", ExportOptions("fp32"))
            expected = _logits(tmp_path / "reference")[0]
        assert cosine(_logits(folder)[0], expected) > (0.999 if "plain" in name else 0.9999)  # rounded here


def test_int4_head_and_int8_embedding(pair: Pair, make_pair: MakePair, tmp_path: Path) -> None:
    untied = make_pair(hidden_size=128, intermediate_size=256, tie_word_embeddings=False)
    for i, source in enumerate((pair, untied)):
        folder = tmp_path / str(i)
        options = ExportOptions("int4", target="tensorrt", max_tokens=256, head_bits=4, block_size=32)
        export_bundle(source.checkpoint, folder, options)
        assert cosine(_logits(folder)[0], _logits(source.bundle)[0]) > 0.85
        _, arrays = _arrays(folder)
        tables = {n.split(":")[0]: a.dtype for n, a in arrays.items() if n.endswith(":float16")}
        assert tables["model.embed_tokens.weight.trt8r"] == np.int8
        head = "model.embed_tokens" if source is pair else "lm_head"
        assert tables[f"{head}.weight.trt4b32"] == ml_dtypes.int4


def test_a_tied_table_is_stored_once(bundles: dict[tuple[str, str], Path]) -> None:
    model, arrays = _arrays(bundles["tensorrt", "int4"])
    users = [n.op_type for n in model.graph.node if "model.embed_tokens.weight:float16" in n.input]
    assert users == ["Gather", "Gemm"] and "model.embed_tokens.weight:float16" in arrays


def test_files_are_valid_onnx_of_their_opset(bundles: dict[tuple[str, str], Path]) -> None:
    for (target, precision), folder in bundles.items():
        bundle = Bundle.open(folder, verify_hashes=True)
        assert bundle.target == target and "tensorrt" in bundle.requires
        assert ("onnxruntime" in bundle.requires) == (precision != "bf16")
        assert bundle.graphs["decoder"].spec.cache_update == (IN_PLACE if target == "tensorrt" else APPENDED)
        for graph in bundle.graphs.values():
            model = onnx.load(folder / graph.file)
            assert [(o.domain, o.version) for o in model.opset_import] == [("", 24 if target == "tensorrt" else 21)]
            onnx.checker.check_model(str(folder / graph.file), full_check=True)
            assert [i.name for i in model.graph.input] == [t.name for t in graph.spec.inputs]


def test_weights_stream_into_int4_at_half_a_byte(bundles: dict[tuple[str, str], Path]) -> None:
    model = onnx.load(bundles["tensorrt", "int4"] / "decoder.onnx", load_external_data=False)
    for tensor in model.graph.initializer:
        if tensor.data_type == onnx.TensorProto.INT4:
            said = {e.key: e.value for e in tensor.external_data}
            assert int(said["length"]) == np.prod(tensor.dims) // 2


# ---------------------------------------------------------------------- static int8


STATIC = pytest.mark.skipif("static activations" not in CASES, reason="this reader knows no static activation scales")


def _by_formula(x: np.ndarray, weight: np.ndarray, step: float) -> np.ndarray:
    return np.clip(np.rint(x / step), -128, 127) * step @ weight.T


@STATIC
@pytest.mark.parametrize("target", TARGETS)
def test_static_int8_is_rounded_with_the_checkpoints_scales(target: str, tmp_path: Path) -> None:
    """Every int8 product of the decoder, from its own input, against the formula."""
    written = write(tmp_path, **CASES["static activations"][1])
    folder = tmp_path / target
    export_bundle(written.folder, folder, ExportOptions(target=target, max_tokens=256))
    assert Bundle.open(folder).precision == "vision fp16, decoder int8"
    export_bundle(written.plain, tmp_path / f"{target}-plain", ExportOptions("fp32"))
    assert cosine(_logits(folder)[0], _logits(tmp_path / f"{target}-plain")[0]) > 0.98
    model, arrays = _arrays(folder)
    assert dict(_stored(folder)).keys() == written.weights.keys()
    producers = {o: n for n in model.graph.node for o in n.output}
    rounds = [n for n in model.graph.node if n.op_type == "QuantizeLinear"]
    assert len(rounds) == 2 * 4  # q/k/v share one, gate/up too
    for node in rounds:
        assert arrays[node.input[1]] == np.float16(0.0625) and arrays[node.input[2]] == np.int8(0)
    for module, weight in written.weights.items():
        product = next(
            n
            for n in model.graph.node
            if n.op_type == "MatMul" and producers[n.input[1]].input[0].startswith(f"{module}.weight.trt8c")
        )
        x = np.random.default_rng(1).standard_normal((3, weight.shape[1])).astype(np.float16)
        codes = producers[producers[product.input[0]].input[0]]
        weights = producers[product.input[1]]
        parts = [codes, producers[product.input[0]], weights, product]
        names = {n for p in parts for n in p.input} & arrays.keys()
        single = onnx.helper.make_graph(
            parts,
            "one",
            [onnx.helper.make_tensor_value_info(codes.input[0], onnx.TensorProto.FLOAT16, x.shape)],
            [onnx.helper.make_tensor_value_info(product.output[0], onnx.TensorProto.FLOAT16, (3, len(weight)))],
            [i for i in model.graph.initializer if i.name in names],
        )
        made = onnx.helper.make_model(single, opset_imports=model.opset_import, ir_version=model.ir_version)
        (got,) = onnx.reference.ReferenceEvaluator(made).run(None, {codes.input[0]: x})
        expected = _by_formula(x.astype(np.float64), weight.astype(np.float64), 0.0625)
        np.testing.assert_allclose(np.asarray(got), expected, atol=4e-3 * np.abs(expected).max())


@pytest.mark.parametrize("precision", [{"precision": "int8"}, {"vision_precision": "int8"}])
def test_int8_without_static_scales_is_told(pair: Pair, tmp_path: Path, precision: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match="no static scale of its activations, which int8 on TensorRT needs"):
        export_bundle(pair.checkpoint, tmp_path / "b", ExportOptions(target="tensorrt", **precision))
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "fp32"}, "precision 'fp32' is unknown for target 'tensorrt'; expected one of fp16, bf16"),
        ({"precision": "hybrid"}, "precision 'hybrid' is unknown for target"),
        ({"decoder_precision": "int8-weights"}, "decoder precision 'int8-weights' is not offered for TensorRT"),
        ({"vision_precision": "int4"}, "vision precision 'int4' is not offered for TensorRT"),
        ({"symmetric": False}, "TensorRT rounds int4 symmetrically"),
        ({"head_bits": 8}, "head bits 8 is not offered for TensorRT"),
        ({"block_size": 48}, "block size 48 is not offered"),
        ({"max_tokens": 10**6}, "max tokens is 1000000"),
    ],
)
def test_wrong_options_are_told(pair: Pair, tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        export_bundle(pair.checkpoint, tmp_path / "b", ExportOptions(target="tensorrt", **options))


def test_an_unknown_target_is_told(pair: Pair, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="target 'tpu' is not supported by this version; expected cpu, cuda, tensorrt"):
        export_bundle(pair.checkpoint, tmp_path / "b", ExportOptions(target="tpu"))


def test_eight_bit_layers_are_refused_by_name(tmp_path: Path) -> None:
    written = write(tmp_path, **CASES["mixed bits"][1])
    with pytest.raises(CheckpointError, match=r"down_proj is weight-only with 8 bits"):
        export_bundle(written.folder, tmp_path / "b", ExportOptions(target="tensorrt"))
    written = write(tmp_path / "8", **CASES["gptq int8, 7B"][1])
    with pytest.raises(InputError, match="'int8-weights' is not offered for TensorRT"):
        export_bundle(written.folder, tmp_path / "b", ExportOptions(target="tensorrt"))


def test_a_width_without_blocks_is_refused(make_pair: MakePair, tmp_path: Path) -> None:
    odd = make_pair(hidden_size=64, intermediate_size=72)
    with pytest.raises(InputError, match=r"down_proj has 72 inputs, which no int4 block of 16 or more divides"):
        export_bundle(odd.checkpoint, tmp_path / "b", ExportOptions("int4", target="tensorrt"))


def test_bfloat16_does_not_run_on_the_cpu(bundles: dict[tuple[str, str], Path]) -> None:
    with pytest.raises(EngineError, match="exported for 'tensorrt', not for ONNX Runtime"):
        _open(bundles["tensorrt", "bf16"])


def test_the_capacity_is_fixed_and_told(bundles: dict[tuple[str, str], Path]) -> None:
    with _open(bundles["tensorrt", "fp16"], capacity=100) as model, pytest.raises(CapacityError, match="exactly 256"):
        model.decoder()


def test_verify_runs_the_same_file(bundles: dict[tuple[str, str], Path], pair: Pair, tmp_path: Path) -> None:
    """Golden vectors of the reference through the graphs that TensorRT gets."""
    from edgevl.export.verify import write_golden
    from edgevl.runtime.golden import replay

    golden = tmp_path / "golden"
    written: dict[str, FileEntry] = {}

    def finish(folder: Path, bundle: Bundle) -> dict[str, FileEntry]:
        """Computed for the first bundle, copied into the other: they are of one checkpoint."""
        if not written:
            written.update(write_golden(folder, bundle, pair.checkpoint, steps=3))
            shutil.copytree(folder / "golden", golden)
        else:
            shutil.copytree(golden, folder / "golden")
        return dict(written)

    for target in TARGETS:
        folder = tmp_path / target
        export_bundle(pair.checkpoint, folder, ExportOptions("fp16", target=target, max_tokens=256), finish=finish)
        report = replay(Bundle.open(folder), "ort-cpu", threads=2)
        assert report.passed, report.first_drift
        assert {r.stage for r in report.results} >= {"vision", "prefill", "decode", "tokens"}


def test_every_precision_has_a_floor() -> None:
    """A bundle of any precision can be verified on its device."""
    for target in TARGETS_BY_NAME.values():
        assert set(target.vision_precisions) <= set(COSINE_FLOORS["vision"])
        assert set(target.decoder_precisions) - {"hybrid"} <= set(COSINE_FLOORS["decoder"])
