"""Fidelity: every number of the report against transformers and slow formulas, for checkpoints of every layout."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import random_model, save_checkpoint
from PIL import Image
from quantized import CASES, GROUP32, Recipe, Written, all_by, gptq_config, gptq_tensors, write
from transformers import Qwen2VLForConditionalGeneration

from edgevl.calibration import fidelity, fidelity_command, report, sensitivity
from edgevl.calibration.comparison import Comparison, compare
from edgevl.calibration.dataset import Sample, SampleSource
from edgevl.calibration.dequantized import FloatCheckpoint
from edgevl.calibration.driver import quantize_checkpoint
from edgevl.calibration.fidelity import Divergence, bootstrap, combined
from edgevl.calibration.recipes import RECIPES
from edgevl.calibration.scores import MEAN, compare_answers, paired_interval, parse_min_scores
from edgevl.calibration.sensitivity import Unit, sensitivities, units_of
from edgevl.runtime import cli
from edgevl.runtime.errors import CheckpointError, EngineError, InputError
from edgevl.tasks import TASKS, Answered, Score, wilson

SIZE = {"hidden_size": 128, "intermediate_size": 256}
Q, K = "model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.k_proj"


def picture(seed: int, width: int = 84) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (56, width, 3), dtype=np.uint8))


def conversations(count: int) -> list[list[dict[str, Any]]]:
    """Of different lengths, with an answer; every third without a picture."""
    out = []
    for i in range(count):
        seen = [] if i % 3 == 2 else [{"type": "image", "image": picture(i, 84 + 28 * (i % 4))}]
        content = [*seen, {"type": "text", "text": "What is this? " * (1 + i % 3)}]
        out.append([{"role": "user", "content": content}, {"role": "assistant", "content": "a card " * (1 + i % 2)}])
    return out


@dataclass
class Made:
    """The original checkpoint, the same quantized in some layout, and samples."""

    original: Path
    written: Written
    samples: list[Sample]

    def model(self, quantized: Sequence[str] | None) -> Qwen2VLForConditionalGeneration:
        """transformers' original, with the named layers (None: all) replaced by what the formula dequantizes."""
        model = Qwen2VLForConditionalGeneration.from_pretrained(self.original, dtype=torch.float32).eval()
        for name, weight in self.written.weights.items():
            if quantized is None or name in quantized:
                linear(model, name).weight.data.copy_(torch.from_numpy(weight))
        return model


def linear(model: torch.nn.Module, name: str) -> torch.nn.Linear:
    found = model.get_submodule(name.replace("model.layers", "model.language_model.layers"))
    assert isinstance(found, torch.nn.Linear)
    return found


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Made]:
    made: dict[str, Made] = {}

    def of(case: str) -> Made:
        if case not in made:
            root = tmp_path_factory.mktemp("pair")
            arguments = dict(CASES[case][1])
            written = write(root, **{**arguments, "dtype": torch.float32})
            sizes = {k: v for k, v in arguments.items() if k not in ("tensors", "config", "recipe", "naming", "edit")}
            model = random_model(**{**SIZE, **sizes})
            if "edit" in arguments:
                arguments["edit"](model)
            original = save_checkpoint(model, root / "original")
            source = SampleSource(original)
            made[case] = Made(original, written, [source.sample(c) for c in conversations(4)])
        return made[case]

    return of


def words(sample: Sample) -> np.ndarray:
    """bool [S]: no picture's token, and none before the first of them."""
    visual = sample.visual.tolist()
    first = visual.index(True) if True in visual else 0
    return np.array([i >= first and not v for i, v in enumerate(visual)])


def logits(model: Qwen2VLForConditionalGeneration, sample: Sample) -> torch.Tensor:
    """Of the words from the first picture on."""
    inputs = {}
    if sample.vision:
        inputs["pixel_values"] = torch.from_numpy(np.concatenate([p.pixel_values for p in sample.vision]))
        inputs["image_grid_thw"] = torch.tensor([[p.grid.t, p.grid.h, p.grid.w] for p in sample.vision])
    ids, positions = torch.from_numpy(sample.ids)[None], torch.from_numpy(sample.positions)[:, None]
    with torch.no_grad():
        out = model(input_ids=ids, position_ids=positions, use_cache=False, **inputs).logits[0]
    return out[torch.from_numpy(words(sample))]


def kl(p: torch.Tensor, q: torch.Tensor) -> np.ndarray:
    """KL of every position, by the definition, in double."""
    p, q = (torch.softmax(x.double(), -1) for x in (p, q))
    return (p * (p / q).log()).sum(-1).numpy()


def measured(made: Made, tmp_path: Path) -> Comparison:
    with FloatCheckpoint.open(made.original) as a, FloatCheckpoint.open(made.written.folder) as b:
        return compare(a, b, made.samples, tmp_path)


# ---------------------------------------------------------------------- two checkpoints


LAYOUTS = (
    "gptq int4, 2B",
    "gptq int8, 7B",
    "awq, 2B, ragged",
    "desc_act",
    "v2 asymmetric",
    "mixed bits",
    "some layers plain",
    "whole columns",
    "packed asymmetric",
    "packed, activation order",
)


@pytest.mark.parametrize("case", LAYOUTS)
def test_the_divergence_is_that_of_transformers(make: Callable[[str], Made], case: str, tmp_path: Path) -> None:
    made = make(case)
    found = measured(made, tmp_path)
    models = made.model([]), made.model(None)
    for sample, divergence in zip(made.samples, found.conversations, strict=True):
        pair = [logits(m, sample) for m in models]
        assert divergence.tokens == int(words(sample).sum()) == len(pair[0])
        assert divergence.kl == pytest.approx(kl(*pair).mean(), rel=2e-3, abs=1e-8)
        same = float((pair[0].argmax(-1) == pair[1].argmax(-1)).double().mean())
        assert divergence.top1 == pytest.approx(same, abs=1.5 / len(pair[0]))
    assert not found.folded and not list(tmp_path.iterdir())


def hooked(model: torch.nn.Module, names: Sequence[str]) -> dict[str, list[torch.Tensor]]:
    """The inputs of linear layers, and the outputs of decoder layers under their names."""
    seen: dict[str, list[torch.Tensor]] = {name: [] for name in names}
    for name in names:
        module = model.get_submodule(name.replace("model.layers", "model.language_model.layers"))

        def keep(_: Any, args: Any, out: Any, name: str = name, whole: bool = name.count(".") == 2) -> None:
            value = (out[0] if isinstance(out, tuple) else out) if whole else args[0]
            seen[name].append(value.detach().reshape(-1, value.shape[-1]))

        module.register_forward_hook(keep)
    return seen


@pytest.mark.parametrize("case", ["gptq int4, 2B", "v2 asymmetric", "mixed bits", "some layers plain"])
def test_layer_errors_by_hand(make: Callable[[str], Made], case: str, tmp_path: Path) -> None:
    made = make(case)
    found = measured(made, tmp_path)
    original, quantized = made.model([]), made.model(None)
    names = [row.name for row in found.layers]
    assert len(names) == 14 and names[0] == "model.layers.0.self_attn.q_proj"
    blocks = ["model.layers.0", "model.layers.1"]
    seen, before = hooked(quantized, [*names, *blocks]), hooked(original, blocks)
    for sample in made.samples:
        for model in (quantized, original):
            logits(model, sample)
    for row in found.layers:
        weight = linear(original, row.name).weight.detach().double()
        assert row.parameters == weight.numel()
        if row.name not in made.written.layers:
            assert row.bits is None and row.error is None and row.nbytes == 4 * weight.numel()
            continue
        layer = made.written.layers[row.name]
        x = torch.cat(seen[row.name]).double()
        y, ours = x @ weight.T, x @ torch.from_numpy(layer.weight()).double().T
        assert row.bits == layer.bits and row.error is not None and row.rtn_error is not None
        assert row.error == pytest.approx(float((ours - y).square().sum() / y.square().sum()), rel=1e-3)
        # these fixtures were rounded to nearest themselves
        assert row.rtn_error == pytest.approx(row.error, rel=1e-2)
    for i, block in enumerate(blocks):
        h, other = torch.cat(before[block]).double(), torch.cat(seen[block]).double()
        shares = (other - h).square().sum(-1) / h.square().sum(-1)
        assert found.hidden_errors[i] == pytest.approx(float(shares.mean()), rel=1e-3)


def round_inputs(_: Any, args: tuple[torch.Tensor]) -> torch.Tensor:
    largest = args[0].abs().amax(-1, keepdim=True)
    unit = args[0] / largest
    low, high = unit.amin().clamp_max(0), unit.amax().clamp_min(0)
    step = (high - low) / 255
    zero = torch.round(-low / step)
    return (torch.clamp(torch.round(unit / step) + zero, 0, 255) - zero) * step * largest


def round_each_token(_: torch.nn.Module, given: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """As down_proj's kernel has them: 256 codes between the extremes of every token."""
    (x,) = given
    low, high = x.amin(-1, keepdim=True).clamp_max(0), x.amax(-1, keepdim=True).clamp_min(0)
    step = (high - low) / 255
    zero = torch.round(-low / step)
    return (torch.clamp(torch.round(x / step) + zero, 0, 255) - zero) * step


def rounding_of(name: str) -> Callable[..., torch.Tensor]:
    return round_each_token if name.endswith("down_proj") else round_inputs


def test_w8a8_rounds_activations(make: Callable[[str], Made], tmp_path: Path) -> None:
    made = make("int8 channels and activations")
    found = measured(made, tmp_path)
    model = made.model(None)
    for name in made.written.layers:
        linear(model, name).register_forward_pre_hook(rounding_of(name))
    expected = [kl(logits(made.model([]), s), logits(model, s)).mean() for s in made.samples]
    weights_only = [kl(logits(made.model([]), s), logits(made.model(None), s)).mean() for s in made.samples]
    assert [d.kl for d in found.conversations] == pytest.approx(expected, rel=0.05)  # ties may round the other way
    assert sum(expected) > 1.2 * sum(weights_only), "or the test cannot tell"


# ---------------------------------------------------------------------- sensitivities


@pytest.mark.parametrize(
    ("case", "granularity", "names"),
    [
        ("gptq int4, 2B", "linear", (Q.removeprefix("model."), "layers.0.mlp.down_proj")),
        ("gptq int4, 2B", "group", ("layers.1.qkv", "layers.0.o")),
        ("gptq int4, 2B", "layer", ("layers.0", "layers.1")),
        ("gptq int4, 2B", "kind", ("up_proj", "k_proj")),
        ("some layers plain", "group", ("layers.1.qkv",)),
    ],
)
def test_a_part_alone_by_hand(
    make: Callable[[str], Made], case: str, granularity: str, names: tuple[str, ...], tmp_path: Path
) -> None:
    """Every unit against transformers' original with just those layers replaced."""
    made = make(case)
    with FloatCheckpoint.open(made.original) as a, FloatCheckpoint.open(made.written.folder) as b:
        units = {unit.name: unit for unit in units_of(b, granularity)}
        steps: list[tuple[int, int]] = []
        found = sensitivities(
            a, b, made.samples, [units[n] for n in names], tmp_path, lambda i, n, _: steps.append((i, n))
        )
    assert not list(tmp_path.iterdir())
    assert steps[0][0] == 0 and steps[-1][0] == steps[-1][1] == len(steps) - 1, "progress ends where it said"
    original = made.model([])
    base = [logits(original, s) for s in made.samples]
    for name, result in zip(names, found, strict=True):
        assert result.name == name and result.modules == units[name].modules
        model = made.model(result.modules)
        expected = np.concatenate([kl(p, logits(model, s)) for p, s in zip(base, made.samples)])
        assert result.kl == pytest.approx(expected.mean(), rel=5e-3)
        assert result.parameters == sum(made.written.weights[m].size for m in result.modules)


def test_units(make: Callable[[str], Made]) -> None:
    with FloatCheckpoint.open(make("some layers plain").written.folder) as b:
        names = {g: [u.name for u in units_of(b, g)] for g in sensitivity.GRANULARITIES}
        assert names["kind"] == [f"{k}_proj" for k in ("q", "k", "v", "o", "gate", "up", "down")]
        assert names["layer"] == ["layers.0", "layers.1"]
        assert names["group"] == [f"layers.{i}.{p}" for i in (0, 1) for p in ("qkv", "o", "gate_up", "down")]
        assert len(names["linear"]) == 13 and "layers.1.self_attn.k_proj" not in names["linear"]
        assert K not in units_of(b, "layer")[1].modules and len(units_of(b, "layer")[1].modules) == 6
        with pytest.raises(InputError, match="granularity 'block' is unknown; expected kind, layer, group, linear"):
            units_of(b, "block")


def test_w8a8_parts_round_only_their_inputs(make: Callable[[str], Made], tmp_path: Path) -> None:
    made = make("int8 channels and activations")
    with FloatCheckpoint.open(made.original) as a, FloatCheckpoint.open(made.written.folder) as b:
        unit = Unit("x", "group", ("model.layers.0.mlp.down_proj",))
        (found,) = sensitivities(a, b, made.samples, [unit], tmp_path)
    model = made.model(unit.modules)
    linear(model, unit.modules[0]).register_forward_pre_hook(rounding_of(unit.modules[0]))
    expected = np.concatenate([kl(logits(made.model([]), s), logits(model, s)) for s in made.samples]).mean()
    assert found.kl == pytest.approx(expected, rel=0.05)


def test_folded_factors(make: Callable[[str], Made], tmp_path: Path) -> None:
    """SmoothQuant moves sizes between layers: a layer alone means nothing then, a whole decoder layer does."""
    made = make("gptq int4, 2B")
    (tmp_path / "s").mkdir()
    quantize_checkpoint(made.original, tmp_path / "q", RECIPES["w8a8"], made.samples)
    with FloatCheckpoint.open(made.original) as a, FloatCheckpoint.open(tmp_path / "q") as b:
        found = compare(a, b, made.samples, tmp_path / "s")
        assert found.folded and all(row.error is None for row in found.layers)
        assert len(found.hidden_errors) == 2 and 0 < found.hidden_errors[0] < 0.01
        assert 0 < combined(found.conversations).kl < 0.05
        with pytest.raises(InputError, match=r"folded into model.layers.0 .*ask for the sensitivity per `layer`"):
            sensitivities(a, b, made.samples, units_of(b, "linear"), tmp_path / "s")
        parts = sensitivities(a, b, made.samples, units_of(b, "layer"), tmp_path / "s")
        assert all(0 < p.kl < 2 * combined(found.conversations).kl for p in parts)


def test_what_does_not_belong_together(make: Callable[[str], Made], tmp_path: Path) -> None:
    made, other = make("gptq int4, 2B"), make("awq, 2B, ragged")
    paths = made.original, made.written.folder, other.written.folder
    with FloatCheckpoint.open(paths[0]) as a, FloatCheckpoint.open(paths[1]) as b, FloatCheckpoint.open(paths[2]) as c:
        for pair, message in (
            ((b, a), r"already quantized \(gptq\); give the original checkpoint first"),
            ((a, a), "not quantized; give the original checkpoint first, the quantized one last"),
            ((a, c), "describes another model"),
        ):
            with pytest.raises(InputError, match=message):
                compare(*pair, made.samples, tmp_path)
            with pytest.raises(InputError, match=message):
                sensitivities(*pair, made.samples, [], tmp_path)
        with pytest.raises(InputError, match="none were given"):
            sensitivities(a, b, [], units_of(b, "layer"), tmp_path)


def test_activations_that_are_not_finite(tmp_path: Path) -> None:
    def spoil(model: Any) -> None:
        with torch.no_grad():
            model.model.language_model.layers[1].post_attention_layernorm.weight.fill_(3e38)

    arguments = {"tensors": gptq_tensors, "config": gptq_config(4, **GROUP32), "recipe": all_by(Recipe())}
    written = write(tmp_path, **arguments, edit=spoil, dtype=torch.float32)
    model = random_model(**SIZE)
    spoil(model)
    original = save_checkpoint(model, tmp_path / "o")
    sample = SampleSource(original).sample(conversations(1)[0])
    (tmp_path / "s").mkdir()
    with (
        FloatCheckpoint.open(original) as a,
        FloatCheckpoint.open(written.folder) as b,
        pytest.raises(EngineError, match=r"original, model.layers.1: its output is not finite"),
    ):
        compare(a, b, [sample], tmp_path / "s")


# ---------------------------------------------------------------------- arithmetic


def test_the_mean_over_all_positions() -> None:
    whole = combined([Divergence(0.1, 0.5, 10), Divergence(0.4, 1.0, 30)])
    assert (whole.kl, whole.top1, whole.tokens) == (pytest.approx((1 + 12) / 40), pytest.approx((5 + 30) / 40), 40)
    with pytest.raises(ValueError, match="no positions"):
        combined([])


def test_the_bootstrap_is_the_slow_one() -> None:
    values, weights = [0.1, 0.5, 0.2, 0.9], [10.0, 1.0, 4.0, 2.0]
    drawn = np.random.default_rng(0).integers(0, 4, (2000, 4))
    means = sorted(sum(values[i] * weights[i] for i in row) / sum(weights[i] for i in row) for row in drawn)
    low, high = bootstrap(values, weights)
    assert low == pytest.approx(np.quantile(means, 0.025)) and high == pytest.approx(np.quantile(means, 0.975))
    assert bootstrap(values, weights) == (low, high)
    for bad in (([], None), ([1.0], [1.0, 2.0]), ([0.3], None), ([0.3, 0.4], [1.0])):
        with pytest.raises(ValueError, match="expected at least two and as many"):
            bootstrap(*bad)


def test_the_bootstrap_covers() -> None:
    """Of normal numbers, about 95 % of the intervals hold the mean; 200 draws of 40, so within 5 standard errors."""
    rng = np.random.default_rng(1)
    hits = 0
    for _ in range(200):
        low, high = bootstrap(rng.normal(1.0, 2.0, 40).tolist())
        hits += low <= 1.0 <= high
    assert hits / 200 > 0.95 - 5 * math.sqrt(0.95 * 0.05 / 200)
    assert fidelity._DRAWS == 2000


def test_the_interval_of_a_change() -> None:
    """Agresti and Min's formula on their layout; and it stays open where nothing changed."""
    low, high = paired_interval(lost=12, won=3, n=100)
    b, c, m = 12.5, 3.5, 102
    half = 1.959964 * math.sqrt((b + c) / m**2 - (c - b) ** 2 / m**3)
    assert (low, high) == (pytest.approx((c - b) / m - half), pytest.approx((c - b) / m + half))
    low, high = paired_interval(0, 0, 50)
    assert low == -high < 0


def test_answers_side_by_side() -> None:
    cases = [TASKS[t].case("test", i) for t in ("count", "where") for i in range(4)]
    right = [(1, 1), (1, 0), (0, 1), (1, 1), (0, 0), (1, 0), (1, 0), (1, 1)]
    before, after = ([Answered(c, "", Score(bool(r[k]), 0.0)) for c, r in zip(cases, right)] for k in (0, 1))
    count, where, mean = compare_answers(before, after)
    assert (count.task, count.n, count.before, count.after, count.change) == ("count", 4, 0.75, 0.75, 0.0)
    assert (count.lost, count.won, where.lost, where.won) == (1, 1, 2, 0)
    assert where.before_interval == wilson(3, 4) and where.change == -0.5
    assert (mean.task, mean.n, mean.before, mean.after, mean.lost, mean.won) == (MEAN, 8, 0.75, 0.5, 3, 1)


def test_limits_on_scores() -> None:
    assert parse_min_scores(["0.85", "where=0.5", "count=1"]) == {MEAN: 0.85, "where": 0.5, "count": 1.0}
    with pytest.raises(InputError, match=r"task 'cuont' is unknown; expected one of read_1_line, .*count"):
        parse_min_scores(["cuont=0.5"])
    for bad in ("where=high", "where=1.5", "-0.1", "where=", "nan"):
        with pytest.raises(InputError, match="expected TASK=SHARE or SHARE"):
            parse_min_scores([bad])


# ---------------------------------------------------------------------- the document and the command


def test_the_document_is_as_described(make: Callable[[str], Made], tmp_path: Path) -> None:
    made = make("mixed bits")
    wanted = report.Wanted(("kind",), max_kl=100.0)
    found = report.measure(made.original, made.written.folder, made.samples, wanted, tmp_path / "s")
    report.write_report(tmp_path / "f.json", found)
    data = report.read_report(tmp_path / "f.json")
    documented = {f.name for f in fields(report.FidelityReport)}
    assert set(data) == {"schema", "version"} | documented
    described = report.__doc__ or ""
    assert all(f"    {key}" in described or f", {key} " in described for key in documented)
    assert data["original"]["nbytes"] == sum(p.numel() * 4 for p in made.model([]).parameters())
    files = list(made.written.folder.glob("*.safetensors"))
    assert 0.9 < data["quantized"]["nbytes"] / sum(f.stat().st_size for f in files) < 1
    assert data["original"]["decoder_bits"] == 32 and 4.5 < data["quantized"]["decoder_bits"] < 7
    assert data["quantized"]["quantization"]["bits"] == [4, 8]
    low, high = data["divergence"]["kl_interval"]
    assert low <= data["divergence"]["kl"] <= high and len(data["divergence"]["conversations"]) == 4
    assert data["gates"][0]["held"] and data["provenance"]["held_out"] == 4 and data["auto"] is None
    again = report.measure(made.original, made.written.folder, made.samples, wanted, tmp_path / "s")
    report.write_report(tmp_path / "g.json", again)
    assert (tmp_path / "f.json").read_bytes() == (tmp_path / "g.json").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["f.json", "g.json"]
    for change, message in (({"version": 3}, "version 3 of the report"), ({"schema": "x"}, "no fidelity report")):
        (tmp_path / "bad.json").write_text(json.dumps({**data, **change}))
        with pytest.raises(InputError, match=message):
            report.read_report(tmp_path / "bad.json")
    with pytest.raises(InputError, match="not readable"):
        report.read_report(tmp_path / "none.json")


def save_conversations(folder: Path, count: int) -> Path:
    """The same conversations as a .jsonl beside its pictures."""
    folder.mkdir()
    lines = []
    for i, messages in enumerate(conversations(count)):
        for item in messages[0]["content"]:
            if item["type"] == "image":
                item["image"].save(folder / f"{i}.png")
                item["image"] = f"{i}.png"
        lines.append(json.dumps(messages))
    (folder / "c.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "c.jsonl"


def test_the_command_on_anyones_checkpoint(
    make: Callable[[str], Made], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    made = make("awq, 2B, ragged")
    spoken = save_conversations(tmp_path / "c", 6)
    pair = ["fidelity", str(made.original), str(made.written.folder)]
    page, document = tmp_path / "r.html", tmp_path / "f.json"
    arguments = [*pair, "--images", str(spoken), "--sensitivity", "group", "--sensitivity", "layer"]
    assert cli.run([*arguments, "--report", str(page), "--json", str(document), "--max-kl", "0.00001"]) == 1
    out, err = capfd.readouterr()
    data = report.read_report(document)
    assert f"KL to the original {data['divergence']['kl']:.4f} (95 % " in out and "layers.0.qkv" in out
    assert f"KL is {data['divergence']['kl']:.4f}, at most 1e-05 was asked (95 % interval" in err
    html = page.read_text()
    assert html.count("<svg") == 5 and "<script" not in html and "src=" not in html
    assert set(re.findall(r'href="(#|data:|.{12})', html)) == {"#", "data:"}, "nothing from elsewhere"
    assert "Sensitivity of layers over one input" in html and "does not hold" in html
    assert data["divergence"]["tokens"] > 0 and len(data["divergence"]["conversations"]) == 6


def test_one_conversation_has_no_interval(
    make: Callable[[str], Made], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    made = make("gptq int4, 2B")
    spoken = save_conversations(tmp_path / "c", 4)
    page, document = tmp_path / "r.html", tmp_path / "f.json"
    arguments = ["fidelity", str(made.original), str(made.written.folder), "--images", str(spoken), "--samples", "1"]
    assert cli.run([*arguments, "--report", str(page), "--json", str(document), "--max-kl", "0"]) == 1
    out, err = capfd.readouterr()
    assert "tokens of one conversation, too few for an interval" in out and "95 %" not in out
    assert "at most 0 was asked (of one conversation, so without an interval)" in err
    data = report.read_report(document)
    assert data["divergence"]["kl_interval"] is None and data["divergence"]["top1_interval"] is None
    assert page.read_text().count("of one conversation") == 3, "two tiles and the gate"


def test_which_tasks_are_scored(capfd: pytest.CaptureFixture[str]) -> None:
    """A task is enough to say that scores are wanted, and named twice it is one."""
    options = {"min_score": (), "max_kl": None, "report": None, "sensitivity": (), "tasks": None, "task": ()}
    assert fidelity_command.wanted(options).cases == 0
    asked = fidelity_command.wanted({**options, "task": ("count", "where", "count")})
    assert asked.tasks == ("count", "where") and asked.cases == 100
    assert fidelity_command.wanted({**options, "task": ("count",), "tasks": 7}).cases == 7
    with pytest.raises(InputError, match="task 'cuont' is unknown"):
        fidelity_command.wanted({**options, "task": ("cuont",)})


def test_earlier_reports_are_read(tmp_path: Path) -> None:
    (tmp_path / "f.json").write_text(json.dumps({"schema": "edgevl.fidelity", "version": 1}))
    assert report.read_report(tmp_path / "f.json")["version"] == 1


def test_bad_input(
    make: Callable[[str], Made], tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = make("gptq int4, 2B")
    few = save_conversations(tmp_path / "c", 3)
    pair = ["fidelity", str(made.original), str(made.written.folder)]
    spoken = ["--images", str(few)]
    for arguments, message in (
        (pair, "nothing to measure on; pass --images"),
        ([*pair, *spoken], "3 of 3 conversations can be used"),
        ([*pair[::2], *pair[1:2], *spoken], "already quantized"),
        ([*pair, *spoken, "--min-score", "nosuch=0.5"], "task 'nosuch' is unknown"),
        ([*pair, *spoken, "--min-score", "count=0.5", "--task", "where"], "count: that task is not scored"),
        ([*pair, "--tasks", "1", "--task", "nosuch"], "task 'nosuch' is unknown"),
        ([*pair, *spoken, "--max-kl", "-1"], "--max-kl is -1.0, expected 0 or more"),
        ([*pair, *spoken, "--report", str(tmp_path / "no" / "r.html")], "no such folder"),
        ([*pair, *spoken, "--report", str(tmp_path)], "a folder, expected the name of an HTML file"),
        ([*pair, *spoken, "--json", str(tmp_path / "no" / "f.json")], "no such folder"),
        ([*pair, *spoken, "--sensitivity", "block"], "'block' is not one of"),
        ([*pair, "--tasks", "1", "--sensitivity", "layer"], "none were given; pass --images"),
    ):
        assert cli.run(arguments) == 2, arguments
        err = capfd.readouterr().err
        assert message in err and "Traceback" not in err, err
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    assert cli.run([*pair, *spoken, "--report", str(tmp_path / "r.html")]) == 2
    assert "pip install 'edgevl[report]'" in capfd.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c"]


def test_a_full_disk(make: Callable[[str], Made], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = make("gptq int4, 2B")
    spoken = save_conversations(tmp_path / "c", 4)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device", str(tmp_path / "x.npy"))

    monkeypatch.setattr(np.lib.format, "open_memmap", full)
    arguments = [str(made.original), str(made.written.folder), "--images", str(spoken)]
    with pytest.raises(CheckpointError, match="the disk is full"):
        from edgevl.calibration.fidelity_command import fidelity as command

        command.main(arguments, standalone_mode=False)
