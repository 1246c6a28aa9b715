"""calibration/w8a8.py and calibration/vision.py: what is folded stays the model, scales are the largest inputs that
transformers sees, and the exported graphs compute what numpy says of the written codes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from test_quantize import DEMO, demo_samples, digest, tensors_of
from torch import nn
from transformers import Qwen2VLForConditionalGeneration

from edgevl.calibration import w8a8
from edgevl.calibration.dataset import Sample
from edgevl.calibration.driver import QuantizeReport, quantize_checkpoint
from edgevl.calibration.fidelity import DivergenceSum
from edgevl.calibration.formats import quantize_channels
from edgevl.calibration.gptq import gptq_quantize
from edgevl.calibration.layer_report import LayerReport
from edgevl.calibration.recipes import RECIPES, Recipe, recipe
from edgevl.calibration.smooth import ALPHAS
from edgevl.calibration.w8a8 import (
    Int8Scheme,
    Points,
    Statistics,
    decoder_points,
    merger_points,
    quantize_block,
    smooth_block,
    vision_points,
)
from edgevl.export.exporter import ExportOptions, export_bundle
from edgevl.runtime import VisionLanguageModel, cli
from edgevl.runtime.checkpoint import Checkpoint
from edgevl.runtime.config import ModelConfig
from edgevl.runtime.errors import CheckpointError, EngineError, InputError

CONFIG = ModelConfig.from_folder(DEMO)
STATIC = recipe("w8a8-static", vision="int8-static")


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    return demo_samples(6)


@pytest.fixture(scope="module")
def held_out() -> list[Sample]:
    return demo_samples(3, "test")


@pytest.fixture(scope="module")
def static(samples: list[Sample], held_out: list[Sample], tmp_path_factory: pytest.TempPathFactory) -> QuantizeReport:
    """The demo model with everything static, written once."""
    return quantize_checkpoint(DEMO, tmp_path_factory.mktemp("static") / "q", STATIC, samples, held_out)


def original() -> Qwen2VLForConditionalGeneration:
    return Qwen2VLForConditionalGeneration.from_pretrained(DEMO, dtype=torch.float32).eval()


@torch.inference_mode()
def logits_of(model: nn.Module, sample: Sample) -> torch.Tensor:
    pictures = {
        "pixel_values": torch.from_numpy(np.concatenate([p.pixel_values for p in sample.vision])),
        "image_grid_thw": torch.tensor([[p.grid.t, p.grid.h, p.grid.w] for p in sample.vision]),
    }
    ids, positions = torch.from_numpy(sample.ids)[None], torch.from_numpy(sample.positions)[:, None]
    return model(input_ids=ids, position_ids=positions, use_cache=False, **pictures).logits[0]


Block = tuple[str, nn.Module, Points]


def blocks_of(model: Any) -> list[Block]:
    """(name in the checkpoint, module, points) in the order of computation."""
    visual, text = model.model.visual, model.model.language_model
    blocks: list[Block] = [(f"visual.blocks.{i}", b, vision_points(CONFIG.vision)) for i, b in enumerate(visual.blocks)]
    blocks.append(("visual.merger", visual.merger, merger_points(CONFIG.vision)))
    return blocks + [(f"model.layers.{i}", b, decoder_points(CONFIG.text)) for i, b in enumerate(text.layers)]


def watched(block: Block, model: nn.Module, samples: Iterable[Sample]) -> Statistics:
    """What transformers feeds the linear layers of a block."""
    name, module, points = block
    seen, hooks = Statistics(points, name), []
    for point, names in points.groups.items():

        def look(_: nn.Module, args: tuple[torch.Tensor, ...], point: str = point) -> None:
            seen(point, args[0].reshape(-1, args[0].shape[-1]))

        hooks.append(module.get_submodule(names[0]).register_forward_pre_hook(look))
    for sample in samples:
        seen.visual = torch.from_numpy(sample.visual) if name.startswith("model.") else None
        logits_of(model, sample)
    for hook in hooks:
        hook.remove()
    return seen


def weights_of(module: nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in module.named_parameters()}


@torch.no_grad()
def put(module: nn.Module, weights: dict[str, torch.Tensor]) -> None:
    for name, parameter in module.named_parameters():
        parameter.copy_(weights[name])


def hook(module: nn.Module, names: Iterable[str], change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    for name in names:
        module.get_submodule(name).register_forward_pre_hook(lambda _, args: (change(args[0]),))


# ---------------------------------------------------------------------- folding


@pytest.mark.parametrize(("activations", "alpha"), [("tensor", 0.8), ("token", 0.5), ("tensor", None)])
def test_the_folded_model_is_the_model(samples: list[Sample], activations: str, alpha: float | None) -> None:
    """All points of all blocks at once, nothing rounded: transformers gives the same logits."""
    model, folded = original(), original()
    scheme = Int8Scheme(activations, alpha)  # type: ignore[arg-type]
    for block, (_, module, points) in zip(blocks_of(model), blocks_of(folded)):
        weights = weights_of(module)
        found = smooth_block(weights, watched(block, model, samples[:2]), points, scheme)
        put(module, weights)
        assert all(f.factors is not None and f.factors.std() > 0 for p, f in found.items() if p in points.folds)
        for point in points.behind:
            assert (found[point].pre is not None) == (activations == "tensor")
            if (pre := found[point].pre) is not None:
                hook(module, points.groups[point], lambda x, pre=pre: x * pre)
    for sample in samples[:3]:
        expected = logits_of(model, sample)
        assert (logits_of(folded, sample) - expected).abs().max() < 2e-4 * expected.abs().max()


def test_alpha_is_searched_and_smoothing_left_out_where_it_hurts() -> None:
    points = vision_points(CONFIG.vision)
    e, m = CONFIG.vision.embed_dim, CONFIG.vision.intermediate_size
    generator = torch.Generator().manual_seed(0)
    widths = {"norm1": e, "norm2": e, "attn.qkv": e, "attn.proj": e, "mlp.fc1": e, "mlp.fc2": m}
    rows = {"norm1": 0, "norm2": 0, "attn.qkv": 3 * e, "attn.proj": e, "mlp.fc1": m, "mlp.fc2": e}
    weights = {f"{n}.bias": torch.randn(r or e, generator=generator) for n, r in rows.items()}
    for n, r in rows.items():
        weights[f"{n}.weight"] = torch.randn(*([r] if r else []), widths[n], generator=generator)
    seen = Statistics(points, "block")
    loud = torch.ones(e)
    loud[3] = 300
    for point, width in {"qkv": e, "proj": e, "fc1": e, "fc2": m}.items():
        x = torch.randn(64, width, generator=generator)
        seen(point, x * loud if point == "qkv" else x.sign() if point == "proj" else x)
    # what proj reads and its weights lie on their grids as they are
    weights["attn.proj.weight"].sign_()[:, 5] *= 127
    found = smooth_block(weights, seen, points, Int8Scheme("tensor", None))
    assert found["qkv"].alpha in ALPHAS and found["qkv"].factors is not None
    assert found["qkv"].factors[3] > 5 * found["qkv"].factors.median()
    assert found["proj"].alpha is None and found["proj"].factors is None
    assert found["fc2"].pre is not None and found["fc2"].alpha in ALPHAS


def test_feedback_is_gptq_on_the_smoothed_inputs() -> None:
    """Codes against GPTQ on a Hessian of the divided inputs themselves; nearest codes lose more of the output."""
    points, t = decoder_points(CONFIG.text), CONFIG.text
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    kv = t.num_key_value_heads * t.head_dim
    shapes = {"self_attn.q_proj": t.hidden_size, "self_attn.k_proj": kv, "self_attn.v_proj": kv}
    weights = {f"{n}.weight": noise(rows, t.hidden_size) for n, rows in shapes.items()}
    weights |= {f"{n}.bias": noise(rows) for n, rows in shapes.items()}
    weights |= {f"{n}.weight": noise(t.hidden_size) for n in ("input_layernorm", "post_attention_layernorm")}
    weights["self_attn.o_proj.weight"] = noise(t.hidden_size, t.hidden_size)
    weights |= {f"mlp.{p}_proj.weight": noise(t.intermediate_size, t.hidden_size) for p in ("gate", "up")}
    weights["mlp.down_proj.weight"] = noise(t.hidden_size, t.intermediate_size)
    seen, inputs = Statistics(points, "block", hessians=True), {}
    for point, width in {"qkv": t.hidden_size, "o": t.hidden_size, "gate_up": t.hidden_size, "down": 512}.items():
        inputs[point] = noise(700, 40) @ noise(40, width) + 0.1 * noise(700, width)
        seen(point, inputs[point])
    block = quantize_block(weights, seen, points, Int8Scheme("token", 0.5, feedback=True), "model.layers.0")
    smooth = {n: w.clone() for n, w in weights.items()}
    factors = smooth_block(smooth, seen, points, Int8Scheme("token", 0.5))
    for point, names in points.groups.items():
        divided = factors[point].factors
        assert divided is not None
        x = inputs[point] / divided
        for name in names:
            weight = smooth[f"{name}.weight"]
            expected = (
                gptq_quantize(weight, x.T @ x, bits=8, group_size=-1, clip=False, scale_dtype=torch.float32)
                .weight.codes.reshape(weight.shape)
                .astype(int)
                - 128
            )
            codes = block.tensors[f"{name}.weight"].numpy()
            assert codes.dtype == np.int8 and (codes == expected).mean() > 0.98, name
            nearest = quantize_channels(weight.numpy())
            lost = [
                float((x @ (weight - torch.from_numpy(c * s[:, None])).T).square().sum())
                for c, s in (
                    (codes, block.tensors[f"{name}.weight_scale"].numpy()[:, 0]),
                    (nearest.codes, nearest.scales),
                )
            ]
            assert lost[0] < 0.5 * lost[1], name
    assert all(r.error is not None and r.rtn_error is not None and 0 < r.error < 1e-3 for r in block.reports)


def test_rows_kept_do_not_depend_on_the_pace() -> None:
    x = torch.arange(5000.0)[:, None].expand(-1, 2)
    kept = []
    for size in (5000, 700, 13):
        rows = w8a8._Rows()
        for part in x.split(size):
            rows.add(part)
        kept.append(rows.tensor())
    assert torch.equal(kept[0][:, 0], torch.arange(0, 5000, 8.0)) and len(kept[0]) <= 1024
    assert torch.equal(kept[0], kept[1]) and torch.equal(kept[0], kept[2])


# ---------------------------------------------------------------------- scales


def stored(folder: Path, name: str) -> torch.Tensor:
    t = tensors_of(folder)
    return t[f"{name}.weight"].float() * t[f"{name}.weight_scale"]


def by_name(report: QuantizeReport) -> dict[str, LayerReport]:
    return {r.name: r for r in report.layers}


def test_scales_are_the_largest_inputs_that_transformers_sees(
    samples: list[Sample], held_out: list[Sample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Block after block: the inputs of the original block behind the quantized ones are those that were seen, and the
    largest of those, divided by the factors, are the scales. Behind the first block a number that rounds the other way
    on some processor moves others, and these twice as many in the next: there channels agree on the average."""
    samples = samples[:2]
    torch.set_num_threads(2)  # one thread takes other kernels for the two ways on some processors
    kept: list[Statistics] = []

    def keep(weights: dict[str, torch.Tensor], seen: Statistics, points: Points, scheme: Int8Scheme) -> Any:
        kept.append(seen)
        return smooth_block(weights, seen, points, scheme)

    monkeypatch.setattr(w8a8, "smooth_block", keep)
    static = quantize_checkpoint(DEMO, tmp_path / "q", STATIC, samples, held_out)
    model, tensors, reports = original(), tensors_of(static.output), by_name(static)
    names = set()
    for block, ours in zip(blocks_of(model), kept, strict=True):
        name, module, points = block
        theirs = watched(block, model, samples)
        weights = weights_of(module)
        alpha = STATIC.alpha if name.startswith("model.") else STATIC.vision_alpha
        found = smooth_block(weights, ours, points, Int8Scheme("tensor", alpha))
        for point, layers in points.groups.items():
            factors, ranges = found[point].factors, ours.ranges[point]
            assert factors is not None
            for part, other in ((ranges.text, theirs.ranges[point].text), (ranges.visual, theirs.ranges[point].visual)):
                off = (part.absmax - other.absmax).abs() / other.absmax.clamp(min=1e-9)
                assert off.max() < 1e-5 if name == "visual.blocks.0" else off.mean() < 0.03, (name, point, off.mean())
            both = torch.maximum(ranges.text.absmax, ranges.visual.absmax)
            for layer in layers:
                full = f"{name}.{layer}"
                scale = tensors[f"{full}.input_scale"]
                assert scale.shape == (1,) and scale.dtype == torch.float32
                assert float(scale) == pytest.approx(float((both / factors).max()) / 127, rel=1e-5), full
                row = reports[full]
                assert row.input_scale == float(scale)
                for got, part in ((row.largest_text, ranges.text), (row.largest_visual, ranges.visual)):
                    assert got == pytest.approx(float(part.absmax.max()), rel=1e-5), full
                if point in points.behind:
                    assert (tensors[f"{full}.pre_quant_scale"] * factors - 1).abs().max() < 1e-5, full
                names.add(full)
        quantized = weights_of(module)
        for key in quantized:
            full = f"{name}.{key}"
            scale = tensors.get(f"{full}_scale")
            quantized[key] = tensors[full].float() * (1 if scale is None else scale)
        put(module, quantized)
        for layers in points.groups.values():
            scale = float(tensors[f"{name}.{layers[0]}.input_scale"])
            pre = tensors.get(f"{name}.{layers[0]}.pre_quant_scale", torch.tensor(1.0))
            hook(module, layers, lambda x, s=scale, p=pre: torch.round(x * p / s).clamp(-128, 127) * s)
    assert names == set(reports) == {n.removesuffix(".input_scale") for n in tensors if n.endswith(".input_scale")}
    assert reports["model.layers.1.mlp.up_proj"].error is not None
    # all blocks are quantized in `model` now
    held = demo_samples(3, "test")
    total, plain = DivergenceSum(), original()
    for sample in held:
        wanted = torch.from_numpy(sample.measured)
        total.add(*(logits_of(m, sample)[wanted] for m in (plain, model)))
    assert static.divergence is not None and static.divergence.tokens == total.result().tokens
    assert static.divergence.kl == pytest.approx(total.result().kl, rel=0.05)


def test_errors_say_where_the_outliers_sit(static: QuantizeReport) -> None:
    rows = by_name(static)
    down = [r for n, r in rows.items() if n.endswith("down_proj")]
    assert all(r.error is not None and r.rtn_error is not None and r.error < 0.5 * r.rtn_error for r in down)
    for row in rows.values():
        assert row.smoothed_text is not None and row.smoothed_visual is not None and row.input_scale is not None
        largest = max(row.smoothed_text, row.smoothed_visual)
        assert row.input_scale == pytest.approx(largest / 127, rel=1e-6)
    written = json.loads((static.output / "edgevl_quantize.json").read_text())["layers"]
    assert {r["name"]: r["input_scale"] for r in written} == {n: r.input_scale for n, r in rows.items()}


# ---------------------------------------------------------------------- what is written, and the graphs


def test_what_is_written_is_read_back(static: QuantizeReport) -> None:
    tensors, plain = tensors_of(static.output), tensors_of(DEMO)
    with Checkpoint.open(static.output) as checkpoint:
        assert checkpoint.names() == list(Checkpoint.open(DEMO).names())
        said = checkpoint.describe_quantization()
        assert said is not None and said["vision_precision"] == said["precision"] == "int8"
        assert said["static_activations"] == said["layers"] == 6 * 4 + 2 + 4 * 7
        for name, layer in checkpoint.layers.items():
            assert layer.kind == "int8" and layer.input_scale == float(tensors[f"{name}.input_scale"])
    assert torch.equal(tensors["visual.patch_embed.proj.weight"], plain["visual.patch_embed.proj.weight"])
    assert torch.equal(tensors["visual.blocks.0.mlp.fc2.bias"], plain["visual.blocks.0.mlp.fc2.bias"])
    for changed in ("visual.blocks.0.norm1.bias", "visual.blocks.3.attn.qkv.bias", "visual.merger.ln_q.weight"):
        assert tensors[changed].dtype == torch.float32 and not torch.equal(tensors[changed], plain[changed].float())
    folded = plain["visual.blocks.3.attn.qkv.bias"].float()
    width = CONFIG.vision.embed_dim
    assert torch.equal(tensors["visual.blocks.3.attn.qkv.bias"][: 2 * width], folded[: 2 * width])
    config = json.loads((static.output / "config.json").read_text())["quantization_config"]
    groups = config["config_groups"].values()
    assert all(g["input_activations"].items() >= {"strategy": "tensor", "dynamic": False}.items() for g in groups)
    # other readers must refuse what they would compute wrongly
    assert [g["format"] for g in groups] == ["int-quantized", "int-quantized-pre-scaled"]
    assert config["format"] == "mixed-precision"


def products_of(folder: Path, graph: str) -> tuple[Any, list[Any]]:
    """The graph with the inputs and outputs of its static products as outputs, and those nodes."""
    model = onnx.load(folder / f"{graph}.onnx", load_external_data=False)
    nodes = [n for n in model.graph.node if n.op_type == "MatMulIntegerToFloat"]
    makers = {o: n for n in model.graph.node for o in n.output}
    wanted: set[str] = set()
    for node in nodes:
        source = makers[node.input[0]]
        assert source.op_type == "QuantizeLinear"
        wanted |= {source.input[0], node.output[0]}
    taken = {o.name for o in model.graph.output}
    model.graph.output.extend(onnx.ValueInfoProto(name=n) for n in sorted(wanted - taken))
    onnx.save(model, folder / f"watched-{graph}.onnx")
    session = onnxruntime.InferenceSession(folder / f"watched-{graph}.onnx", providers=["CPUExecutionProvider"])
    return session, [(makers[n.input[0]].input[0], n.output[0], n.input[1]) for n in nodes]


def emulated(x: np.ndarray, tensors: dict[str, np.ndarray], modules: list[str]) -> np.ndarray:
    """float64, from the checkpoint's own tensors: round to int8 with the static scale, multiply in integers."""
    parts = []
    for module in modules:
        scale = np.float32(tensors[f"{module}.input_scale"][0])
        codes = np.clip(np.rint(x.astype(np.float32) / scale), -128, 127).astype(np.int64)
        product = codes @ tensors[f"{module}.weight"].astype(np.int64).T
        y = product * np.float64(scale) * tensors[f"{module}.weight_scale"][:, 0].astype(np.float64)
        parts.append(y + tensors.get(f"{module}.bias", np.zeros(1)))
    return np.concatenate(parts, -1)


def test_the_graphs_compute_what_numpy_says(static: QuantizeReport, tmp_path: Path) -> None:
    """Every static product of both graphs, on a real prompt, from its float input."""
    export_bundle(static.output, tmp_path / "b")
    tensors = {
        n: t.float().numpy() if t.is_floating_point() else t.numpy() for n, t in tensors_of(static.output).items()
    }
    sample = demo_samples(1, "test")[0]
    feeds: dict[str, list[dict[str, np.ndarray]]] = {"vision": [], "decoder": []}
    with VisionLanguageModel.open(tmp_path / "b", "ort-cpu", threads=1) as model:
        assert model.bundle.precision == "vision int8, decoder int8"
        run = type(model.engine.vision).run

        def recorded(runner: Any, inputs: dict[str, np.ndarray]) -> Any:
            feeds["vision"].append({k: np.array(v) for k, v in inputs.items()})
            return run(runner, inputs)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(model.engine.vision), "run", recorded)
            embeds = [np.asarray(model._vision.run(p)) for p in sample.vision]
    seen: set[str] = set()
    seen |= check(tmp_path / "b", "vision", feeds["vision"][0], tensors)
    seen |= check(tmp_path / "b", "decoder", decoder_feed(sample, embeds), tensors)
    assert seen == set(by_name(static))


def decoder_feed(sample: Sample, embeds: list[np.ndarray]) -> dict[str, np.ndarray]:
    from edgevl.runtime.mrope import rotary_rows

    cos, sin = rotary_rows(sample.positions, CONFIG.text)
    length, t = len(sample.ids), CONFIG.text
    cache = {
        f"past_key_values.{i}.{kind}": np.zeros((1, t.num_key_value_heads, length, t.head_dim), np.float32)
        for i in range(t.num_hidden_layers)
        for kind in ("key", "value")
    }
    return {
        "input_ids": sample.ids[None],
        "image_embeds": np.concatenate(embeds),
        "image_slots": np.flatnonzero(sample.visual),
        "logits_rows": np.array([length - 1]),
        "rotary_cos": cos[None],
        "rotary_sin": sin[None],
        "seqlens_k": np.array([length - 1]),
        "total_sequence_length": np.array([length]),
        **cache,
    }


def check(folder: Path, graph: str, feed: dict[str, np.ndarray], tensors: dict[str, np.ndarray]) -> set[str]:
    """The names of the layers that were compared."""
    session, products = products_of(folder, graph)
    types = {"tensor(int64)": np.int64, "tensor(int32)": np.int32, "tensor(float)": np.float32}
    inputs = {i.name: np.ascontiguousarray(feed[i.name], types[i.type]) for i in session.get_inputs()}
    names = [o.name for o in session.get_outputs()]
    found = dict(zip(names, session.run(names, inputs)))
    done: set[str] = set()
    for source, output, weight in products:
        first, *others = weight.split(".weight.")[0].split("+")
        modules = [first, *(f"{first.rsplit('.', 1)[0]}.{o}" for o in others)]
        expected = emulated(found[source], tensors, modules)
        assert np.abs(found[output] - expected).max() <= 1e-5 * np.abs(expected).max(), modules
        done |= set(modules)
    return done


def test_the_engine_multiplies_what_cannot_be_folded(static: QuantizeReport, tmp_path: Path) -> None:
    export_bundle(static.output, tmp_path / "b")
    model = onnx.load(tmp_path / "b" / "vision.onnx")
    arrays = {i.name: onnx.numpy_helper.to_array(i) for i in model.graph.initializer if "pre_quant" in i.name}
    tensors = tensors_of(static.output)
    names = [n for n in tensors if n.endswith("pre_quant_scale")]
    assert len(names) == CONFIG.vision.depth + 1 and {k.split(":")[0] for k in arrays} == set(names)
    assert all(np.array_equal(a, tensors[k.split(":")[0]]) for k, a in arrays.items())
    assert sum(n.op_type == "Mul" and any("pre_quant" in i for i in n.input) for n in model.graph.node) == len(names)
    shared = [n for n in model.graph.node if n.op_type == "QuantizeLinear"]
    assert len(shared) == 4 * CONFIG.vision.depth + 2
    decoder = onnx.load(tmp_path / "b" / "decoder.onnx", load_external_data=False)
    assert sum(n.op_type == "QuantizeLinear" for n in decoder.graph.node) == 4 * CONFIG.text.num_hidden_layers


# ---------------------------------------------------------------------- vision beside any decoder


@pytest.mark.parametrize(("name", "vision"), [("none", "int8"), ("none", "int8-static"), ("rtn-int4", "int8")])
def test_int8_vision_beside_other_decoders(
    name: str, vision: str, samples: list[Sample], held_out: list[Sample], tmp_path: Path
) -> None:
    chosen = recipe(name, vision=vision)
    report = quantize_checkpoint(DEMO, tmp_path / "q", chosen, samples, held_out)
    plain, tensors = tensors_of(DEMO), tensors_of(tmp_path / "q")
    layers = {n.removesuffix(".weight") for n in plain if n.startswith("model.layers") and n.endswith("proj.weight")}
    options = ExportOptions()
    if name == "none":
        assert all(torch.equal(t, plain[n]) for n, t in tensors.items() if n.startswith("model."))
        assert report.divergence is not None and report.divergence.kl < 0.02
        options = ExportOptions(decoder_precision="fp32")
    else:  # the codes of the recipe alone, in the other format
        from test_quantized_checkpoints import stored_weights

        alone = quantize_checkpoint(DEMO, tmp_path / "alone", RECIPES[name], []).output
        export_bundle(alone, tmp_path / "alone-b")
        export_bundle(tmp_path / "q", tmp_path / "q-b")
        ours, theirs = (stored_weights(tmp_path / b) for b in ("q-b", "alone-b"))
        assert ours.keys() == theirs.keys() and all(np.array_equal(ours[k], theirs[k]) for k in ours)
        assert all(f"{n}.weight_packed" in tensors for n in layers)
        config = json.loads((tmp_path / "q" / "config.json").read_text())["quantization_config"]
        assert config["format"] == "mixed-precision" and not (tmp_path / "q" / "quantize_config.json").exists()
        with pytest.raises(InputError, match="vision precision 'fp32' was asked for, but the vision of this"):
            export_bundle(tmp_path / "q", tmp_path / "no", ExportOptions(vision_precision="fp32"))
    export_bundle(tmp_path / "q", tmp_path / "b", options)
    export_bundle(DEMO, tmp_path / "reference", ExportOptions("fp32"))
    embeds = []
    for bundle in ("b", "reference"):
        with VisionLanguageModel.open(tmp_path / bundle, "ort-cpu", threads=1) as model:
            expected = "int4" if name == "rtn-int4" else "fp32"
            assert bundle != "b" or model.bundle.precision == f"vision int8, decoder {expected}"
            embeds.append(np.concatenate([model._vision.run(p) for s in held_out for p in s.vision]))
    a, b = embeds
    cosines = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    assert np.abs(a - b).max() > 0 and cosines.min() > 0.95 and cosines.mean() > 0.99


def test_vision_goes_on_where_it_was_stopped(samples: list[Sample], held_out: list[Sample], tmp_path: Path) -> None:
    chosen = recipe("none", vision="int8-static")
    quantize_checkpoint(DEMO, tmp_path / "whole", chosen, samples, held_out)
    for stop in ("vision block 4 of 7", "pictures (quantized)"):
        target, seen = tmp_path / stop[:6], []

        def stopping(_: int, __: int, what: str, stop: str = stop, seen: list[str] = seen) -> None:
            seen.append(what)
            if what == stop:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            quantize_checkpoint(DEMO, target, chosen, samples, held_out, progress=stopping)
        assert not target.exists()
        again: list[str] = []

        def noting(_: int, __: int, what: str, again: list[str] = again) -> None:
            again.append(what)

        quantize_checkpoint(DEMO, target, chosen, samples, held_out, resume=True, progress=noting)
        assert "vision block 3 of 7" in seen and "vision block 3 of 7" not in again
        assert digest(target) == digest(tmp_path / "whole")
        assert not [p for p in target.iterdir() if p.name.startswith("vision")]


def test_memory_is_that_of_one_block(samples: list[Sample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights are read when their block's turn comes, once."""
    read: list[str] = []
    original_read = Checkpoint.read

    def recorded(self: Checkpoint, name: str) -> np.ndarray:
        read.append(name)
        return original_read(self, name)

    monkeypatch.setattr(Checkpoint, "read", recorded)
    progress: list[tuple[str, int]] = []
    chosen = recipe("none", vision="int8")
    quantize_checkpoint(
        DEMO, tmp_path / "q", chosen, samples, progress=lambda _, __, what: progress.append((what, len(read)))
    )
    starts = [at for what, at in progress if what.startswith("vision block")]
    for block, (first, stop) in enumerate(pairwise(starts)):
        names = [n for n in read[first:stop] if "patch_embed" not in n]
        assert len(names) == 12 and all(n.startswith(f"visual.blocks.{block}.") for n in names)


# ---------------------------------------------------------------------- options


def test_recipes_and_their_options() -> None:
    assert recipe("w8a8", alpha="auto").alpha is None
    assert recipe("w8a8-static", alpha="0.6").alpha == 0.6 and recipe("w8a8-static").activations == "tensor"
    assert recipe("w8a8-static", vision="int8-static").vision_alpha == 0.7
    chosen = recipe("gptq-int4", 64, vision="int8", alpha="0.4")
    assert (chosen.group_size, chosen.vision, chosen.vision_alpha) == (64, "int8", 0.4)
    wrong_ones: tuple[tuple[dict[str, Any], str], ...] = (
        ({"vision": "int4"}, "vision 'int4' is unknown; expected one of none, int8, int8-static"),
        ({"alpha": "0.5"}, "recipe 'rtn-int4' smooths nothing"),
        ({"vision": "int8", "alpha": "1.5"}, "alpha is '1.5', expected auto, or a number from 0 to 1"),
        ({"vision": "int8", "alpha": "much"}, "alpha is 'much'"),
    )
    for wrong, message in wrong_ones:
        with pytest.raises(InputError, match=message):
            recipe("rtn-int4", **wrong)
    with pytest.raises(InputError, match="choose one of both"):
        recipe("none")
    with pytest.raises(InputError, match="leave it out"):
        recipe("w8a8-static", 64)
    assert RECIPES["rtn-int4"].needs_samples is False and recipe("rtn-int4", vision="int8").needs_samples is True


def test_pictures_are_needed(tmp_path: Path) -> None:
    from edgevl.calibration.dataset import SampleSource

    words = [SampleSource(DEMO).sample([{"role": "user", "content": f"Only words {i}."}]) for i in range(4)]
    chosen: Recipe = recipe("none", vision="int8")
    with pytest.raises(InputError, match="no sample has one; give pictures with --images"):
        quantize_checkpoint(DEMO, tmp_path / "q", chosen, words)
    with pytest.raises(InputError, match="calibrates on samples, none were given"):
        quantize_checkpoint(DEMO, tmp_path / "q", chosen, [])
    assert not (tmp_path / "q").exists()


def test_pictures_that_overflow_name_the_block(samples: list[Sample], tmp_path: Path) -> None:
    import shutil

    from safetensors.torch import load_file, save_file

    shutil.copytree(DEMO, tmp_path / "c")
    weights = load_file(tmp_path / "c" / "model.safetensors")
    weights["visual.blocks.1.norm2.weight"] *= 3e38
    save_file(weights, tmp_path / "c" / "model.safetensors", {"format": "pt"})
    with pytest.raises((EngineError, CheckpointError), match=r"visual\.blocks\.1"):
        quantize_checkpoint(tmp_path / "c", tmp_path / "q", recipe("none", vision="int8"), samples[:2])


def test_command_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from edgevl.tasks import TASKS

    (tmp_path / "pictures").mkdir()
    for i in range(6):
        TASKS["where"].case("calibration", i).pictures[0].save(tmp_path / "pictures" / f"{i}.png")
    arguments = ["quantize", str(DEMO), "-o", str(tmp_path / "q"), "--images", str(tmp_path / "pictures")]
    assert cli.run([*arguments, "--recipe", "none", "--vision", "int8-static", "--alpha", "auto"]) == 0
    out, _ = capfd.readouterr()
    assert "mlp.fc2" in out and "merger.mlp.2" in out and "KL to the original" in out and "q_proj" not in out
    assert cli.run(["inspect", str(tmp_path / "q")]) == 0
    assert "vision precision int8, 26 with static activations" in capfd.readouterr().out
    assert cli.run([*arguments, "--recipe", "none"]) == 2
    assert "choose one of both" in capfd.readouterr().err
