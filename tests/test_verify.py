"""Golden vectors: written from transformers, replayed through ONNX Runtime, and tripped by every broken kernel here."""

from __future__ import annotations

import functools
import importlib.util
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from checkpoints import DEMO, random_model, save_checkpoint
from transformers import Qwen2VLForConditionalGeneration

from edgevl.export import verify
from edgevl.export.exporter import ExportOptions, export_bundle
from edgevl.export.verify import add_golden, available_memory, host_missing, write_golden
from edgevl.runtime.bundle import MANIFEST, Bundle, file_sha256
from edgevl.runtime.engine import Engine
from edgevl.runtime.errors import BundleError, CheckpointError, InputError
from edgevl.runtime.golden import COSINE_FLOORS, STAGES, StageResult, VerifyReport, _close, _equal_prefix, replay
from edgevl.runtime.golden_case import GoldenCase
from edgevl.runtime.image_processing import VisionGrid
from edgevl.runtime.ort_engine import OrtEngine
from edgevl.runtime.tensor_file import read_tensors, write_tensors

CASES = ("equal_pictures", "picture", "text", "two_pictures", "video")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A random checkpoint, and its bundles by precision, with golden vectors."""
    return Exports(save_checkpoint(random_model(), tmp_path_factory.mktemp("tiny") / "checkpoint"))


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    return Exports(Path(shutil.copytree(DEMO, folder / "checkpoint")))


class Exports:
    def __init__(self, checkpoint):
        self.checkpoint = checkpoint
        self._made = {}

    def bundle(self, precision, **options):
        key = (precision, *options.items())
        if key not in self._made:
            output = self.checkpoint.parent / f"bundle{len(self._made)}"
            finish = functools.partial(write_golden, source=self.checkpoint)
            export_bundle(self.checkpoint, output, ExportOptions(precision, **options), finish=finish)
            self._made[key] = output
        return self._made[key]

    def copy(self, precision, folder, **options):
        """A copy that a test may break."""
        return Path(shutil.copytree(self.bundle(precision, **options), folder / "broken"))


def check(folder: Path, engine: str | Engine = "ort-cpu") -> VerifyReport:
    return replay(Bundle.open(folder), engine, threads=2)


def drift(folder: Path, engine: str | Engine = "ort-cpu") -> str:
    """The stage of the first drift."""
    report = check(folder, engine)
    assert report.first_drift is not None, "\n".join(r.detail for r in report.results)
    assert not report.passed
    return report.first_drift.stage


def edit_manifest(folder, change):
    path = folder / MANIFEST
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def rehash(folder, name):
    """Make the manifest agree with a file that was changed: only then the numbers have to tell."""
    path = folder / name
    entry = {"size": path.stat().st_size, "sha256": file_sha256(path)}
    edit_manifest(folder, lambda data: data["files"].update({name: entry}))


def extent(folder, graph, name):
    """Offset and length of an initializer in the graph's data file."""
    model = onnx.load(folder / f"{graph}.onnx", load_external_data=False)
    names = [t.name for t in model.graph.initializer]
    assert name in names, names
    found = {e.key: e.value for e in model.graph.initializer[names.index(name)].external_data}
    return int(found["offset"]), int(found["length"])


def edit_data(folder, graph, change, *names):
    """`change` the bytes (uint8 arrays) of initializers in place."""
    file = f"{'decoder' if graph == 'prefill' else graph}.onnx.data"
    data = np.fromfile(folder / file, np.uint8)
    parts = [data[offset : offset + length] for offset, length in (extent(folder, graph, n) for n in names)]
    change(*parts)
    data.tofile(folder / file)
    rehash(folder, file)


class BrokenGraph:
    """A graph of a real engine whose inputs are spoilt on the way."""

    def __init__(self, graph, spoil):
        self._graph, self._spoil, self.spec = graph, spoil, graph.spec

    def run(self, feeds, cache=None):
        return self._graph.run(self._spoil(dict(feeds)), cache)


class BrokenEngine:
    """An engine some of whose graphs are broken: role -> what happens to the inputs."""

    def __init__(self, engine, spoil):
        self._engine, self._spoil, self.name = engine, spoil, engine.name

    def __getattr__(self, role):
        graph = getattr(self._engine, role)
        return BrokenGraph(graph, self._spoil[role]) if role in self._spoil else graph


def broken_engine(folder, **spoil) -> Any:
    return BrokenEngine(OrtEngine(Bundle.open(folder), threads=2), spoil)


# ---------------------------------------------------------------- what holds


def test_fp32_passes_with_every_stage_of_every_case(tiny):
    report = check(tiny.bundle("fp32"))
    assert report.first_drift is None and report.passed and report.engine == "ort-cpu"
    blind = tuple(s for s in STAGES if s not in ("preprocessing", "vision"))
    expected = [(case, stage) for case in CASES for stage in (blind if case == "text" else STAGES)]
    assert [(r.case, r.stage) for r in report.results] == expected
    for r in report.results:
        if r.stage in ("vision", "prefill", "decode"):
            assert r.value > 1 - 1e-9 and r.threshold == 0.99999
        elif r.stage == "tokens":
            assert r.value == r.threshold == 6
        else:
            assert r.value <= r.threshold


def test_the_demo_passes_in_fp32_with_equal_tokens(demo):
    report = check(demo.bundle("fp32"))
    assert report.first_drift is None
    tokens = [r for r in report.results if r.stage == "tokens"]
    assert len(tokens) == 5 and all(r.value == 6 for r in tokens)


@pytest.mark.parametrize("precision", ["fp16", "int8", "int8-weights", "int4", "hybrid"])
def test_rounded_precisions_of_the_demo_hold_their_floors(demo, precision):
    report = check(demo.bundle(precision))
    assert report.first_drift is None
    vision, decoder = ("fp16", "fp16") if precision == "fp16" else ("int8", precision)
    prefill, decode = ("int8", "int4") if precision == "hybrid" else (decoder, decoder)
    for r in report.results:
        if r.stage in ("vision", "prefill", "decode"):
            part = {"vision": ("vision", vision), "prefill": ("decoder", prefill), "decode": ("decoder", decode)}[
                r.stage
            ]
            assert r.threshold == COSINE_FLOORS[part[0]][part[1]]
            assert r.threshold <= r.value < 1 - 1e-9, r.detail  # it is not the fp32 graph
        if r.stage == "tokens":
            assert "no gate" in r.detail


def test_transformers_5_rule(tiny):
    other = tiny.bundle("fp32", mrope_rule="transformers-5")
    assert check(other).first_drift is None
    cases = [GoldenCase.load(folder / "golden/video.safetensors") for folder in (tiny.bundle("fp32"), other)]
    # The case must part the rules: 4 time steps over 2 x 3 tokens.
    grid = cases[0].vision[0].grid
    assert (grid.t, grid.h, grid.w) == (4, 4, 6)
    assert cases[0].next_position == cases[1].next_position + 1


def test_untied_head(tmp_path):
    source = save_checkpoint(random_model(3, tie_word_embeddings=False), tmp_path / "checkpoint")
    finish = functools.partial(write_golden, source=source)
    export_bundle(source, tmp_path / "bundle", ExportOptions("fp32"), finish=finish)
    assert check(tmp_path / "bundle").first_drift is None


def test_released_pixel_limits(tiny, tmp_path):
    """Qwen2-VL's own are wider than the demo's and leave room for the limits that videos have of their own."""
    checkpoint = Path(shutil.copytree(tiny.checkpoint, tmp_path / "checkpoint"))
    path = checkpoint / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"min_pixels": 3136, "max_pixels": 12845056}))
    folder = Exports(checkpoint).bundle("fp32")
    assert check(folder).passed
    assert GoldenCase.load(folder / "golden/video.safetensors").vision[0].grid == VisionGrid(4, 4, 6)


def test_golden_answer_is_that_of_transformers_generate(tiny):
    """`generate` caches and positions on its own; the golden answer comes from whole sequences."""
    model: Any = Qwen2VLForConditionalGeneration.from_pretrained(tiny.checkpoint, dtype=torch.float32)
    for name in ("text", "picture", "two_pictures", "equal_pictures"):
        case = GoldenCase.load(tiny.bundle("fp32") / f"golden/{name}.safetensors")
        ids = torch.tensor(case.input_ids)[None]
        pictures = {}
        if case.vision:
            pictures = {
                "pixel_values": torch.tensor(np.concatenate([v.pixel_values for v in case.vision])),
                "image_grid_thw": torch.tensor([[v.grid.t, v.grid.h, v.grid.w] for v in case.vision]),
                "mm_token_type_ids": (ids == model.config.image_token_id).int(),
            }
        # No end token: the golden answer does not heed them either.
        model.generation_config.eos_token_id = None
        out = model.generate(ids, max_new_tokens=6, do_sample=False, **pictures)
        assert out[0, ids.shape[1] :].tolist() == case.tokens.tolist()


def test_released_positions_of_a_video_by_hand(tiny):
    case = GoldenCase.load(tiny.bundle("fp32") / "golden/video.safetensors")
    start = int(np.flatnonzero(case.input_ids == 430)[0])
    span = case.positions[:, start : start + 24] - start
    assert span[0].tolist() == [0] * 6 + [1] * 6 + [2] * 6 + [3] * 6
    assert span[1].tolist() == [0, 0, 0, 1, 1, 1] * 4
    assert span[2].tolist() == [0, 1, 2] * 8
    assert case.positions[:, start + 24].tolist() == [start + 4] * 3
    assert case.next_position == case.positions[0, -1] + 1 == len(case.input_ids) - 24 + 4


def test_golden_pictures_are_not_blank_and_unequal(tiny):
    case = GoldenCase.load(tiny.bundle("fp32") / "golden/equal_pictures.safetensors")
    first, second = case.vision
    assert first.frames.shape == second.frames.shape and first.frames.std() > 10
    assert np.abs(first.image_embeds - second.image_embeds).max() > 0.1
    assert case.reference.startswith("transformers ")


# ---------------------------------------------------------------- what must trip


def test_wrong_pixels_trip_preprocessing(tiny, tmp_path):
    folder = tiny.copy("fp32", tmp_path)
    edit_manifest(folder, lambda data: data["image_processor"].update(image_mean=[0.5, 0.5, 0.5]))
    assert drift(folder) == "preprocessing"


def test_another_size_trips_preprocessing(tiny, tmp_path):
    folder = tiny.copy("fp32", tmp_path)
    edit_manifest(folder, lambda data: data["image_processor"].update(max_pixels=56 * 56))
    report = check(folder)
    assert report.first_drift is not None and report.first_drift.stage == "preprocessing"
    assert "expected VisionGrid" in report.first_drift.detail


def test_another_template_trips_the_prompt(tiny, tmp_path):
    folder = tiny.copy("fp32", tmp_path)
    path = folder / "chat_template.jinja"
    path.write_text(path.read_text().replace("You are a helpful assistant.", "You are helpful."))
    rehash(folder, path.name)
    assert drift(folder) == "prompt"


def test_another_mrope_rule_trips_the_positions_of_the_video_only(tiny, tmp_path):
    folder = tiny.copy("fp32", tmp_path)
    edit_manifest(folder, lambda data: data.update(mrope_rule="transformers-5"))
    report = check(folder)
    assert [r.case for r in report.results if r.stage == "positions" and not r.passed] == ["video"]
    assert report.first_drift is not None and report.first_drift.stage == "positions"


def swap_rotary(feeds):
    """Rows and columns of the picture exchanged: the 2D rotary's halves."""
    for name in ("rotary_cos", "rotary_sin"):
        feeds[name] = np.roll(feeds[name], feeds[name].shape[-1] // 2, axis=-1)
    return feeds


def plain_rotary(feeds):
    """Positions by token count instead of M-RoPE: every row as if the tokens were text."""
    size = feeds["rotary_cos"].shape
    theta = 10000.0 ** -(np.arange(size[-1]) / size[-1])
    start = int(feeds["seqlens_k"][0]) + 1 - size[1]
    angles = (start + np.arange(size[1]))[None, :, None] * theta
    return feeds | {"rotary_cos": np.cos(angles), "rotary_sin": np.sin(angles)}


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_vision_rotary_trips_vision(demo, precision):
    folder = demo.bundle(precision)
    assert drift(folder, broken_engine(folder, vision=swap_rotary)) == "vision"


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_plain_positions_trip_prefill_where_there_are_pictures(tiny, precision):
    folder = tiny.bundle(precision)
    report = check(folder, broken_engine(folder, prefill=plain_rotary))
    assert report.first_drift is not None and report.first_drift.stage == "prefill"
    failed = {r.case for r in report.results if r.stage == "prefill" and not r.passed}
    assert failed == set(CASES) - {"text"}


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_rotary_of_the_decode_steps_trips_decode(demo, precision):
    def still(feeds):
        if feeds["input_ids"].shape[1] > 1:
            return feeds
        return feeds | {
            "rotary_cos": np.ones_like(feeds["rotary_cos"]),
            "rotary_sin": np.zeros_like(feeds["rotary_sin"]),
        }

    folder = demo.bundle(precision)
    assert drift(folder, broken_engine(folder, decoder=still)) == "decode"


def test_pictures_in_the_wrong_slots_trip_prefill(tiny):
    folder = tiny.bundle("fp32")
    report = check(folder, broken_engine(folder, prefill=lambda f: f | {"image_slots": f["image_slots"][::-1]}))
    assert report.first_drift is not None and report.first_drift.stage == "prefill"
    assert report.first_drift.case != "text"


def zero(*parts):
    for part in parts:
        part[:] = 0


def swap(a, b):
    a[:], b[:] = b.copy(), a.copy()


def test_swapped_weights_trip_prefill(tiny, tmp_path):
    folder = tiny.copy("fp32", tmp_path)
    names = [f"model.layers.{i}.self_attn.o_proj.weight.T:float32" for i in (0, 1)]
    edit_data(folder, "decoder", swap, *names)
    assert drift(folder) == "prefill"


@pytest.mark.parametrize(
    ("precision", "graph", "name", "stage"),
    [
        ("int8", "vision", "visual.blocks.1.mlp.fc2.weight.int8.scales", "vision"),
        ("int8", "vision", "visual.merger.mlp.2.weight.int8.scales", "vision"),
        ("int8", "decoder", "model.layers.1.self_attn.o_proj.weight.int8.scales", "prefill"),
        ("int4", "decoder", "model.layers.0.self_attn.o_proj.weight.int4b128.scales", "prefill"),
        ("int4", "decoder", "model.embed_tokens.weight.int8b128.scales", "prefill"),
        ("hybrid", "prefill", "model.layers.0.self_attn.o_proj.weight.int8.scales", "prefill"),
        ("hybrid", "decoder", "model.layers.0.self_attn.o_proj.weight.int4b128.scales", "decode"),
    ],
)
def test_zeroed_scales_trip_the_stage_that_uses_them(demo, tmp_path, precision, graph, name, stage):
    folder = demo.copy(precision, tmp_path)
    edit_data(folder, graph, zero, name)
    assert drift(folder) == stage


def test_a_dead_feed_forward_layer_trips_prefill(tiny, tmp_path):
    """Where every layer matters; the trained demo hides one in int8 (see COSINE_FLOORS)."""
    folder = tiny.copy("hybrid", tmp_path)
    assert check(folder).passed
    edit_data(folder, "prefill", zero, "model.layers.1.mlp.down_proj.weight.int8.scales")
    assert drift(folder) == "prefill"


LAYERS = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "self_attn.o_proj", "self_attn.q_proj+k_proj+v_proj")


def exchange_nibbles(*parts):
    for part in parts:
        part[:] = (part >> 4) | (part << 4)


def wrong_zero_point(*parts):
    for part in parts:
        part ^= 0x88


def next_block(*parts):
    for part in parts:
        part[:] = np.roll(part, 4)  # one float32 scale


@pytest.mark.parametrize(("precision", "stage"), [("int4", "prefill"), ("hybrid", "decode")])
@pytest.mark.parametrize(
    ("spoil", "suffix"), [(exchange_nibbles, ""), (wrong_zero_point, ""), (next_block, ".scales"), (zero, ".scales")]
)
def test_a_wrong_4_bit_kernel_trips_the_stage_that_runs_it(demo, tmp_path, precision, stage, spoil, suffix):
    """What a kernel that reads its format wrongly computes: the same mistake in every layer."""
    folder = demo.copy(precision, tmp_path)
    names = [f"model.layers.{i}.{layer}.weight.int4b128{suffix}" for i in range(4) for layer in LAYERS]
    edit_data(folder, "decoder", spoil, *names)
    # A decoder that adds nothing at all may still say roughly which tokens begin an answer: the next ones give it away.
    assert drift(folder) in {stage, "decode" if spoil is zero else stage}


def test_nan_in_the_encoder_is_a_drift_with_its_reason(tiny, tmp_path):
    folder = tiny.copy("fp32", tmp_path)

    def spoil(part):
        part.view(np.float32)[0] = np.nan

    edit_data(folder, "vision", spoil, "visual.blocks.0.norm1.weight:float32")
    report = check(folder)
    assert report.first_drift is not None and report.first_drift.stage == "vision"
    assert "NaN" in report.first_drift.detail and math.isnan(report.first_drift.value)
    assert json.loads(json.dumps(report.to_dict(), allow_nan=False))["first_drift"] == str(report.first_drift)


def test_another_answer_trips_tokens_alone(tiny, tmp_path):
    folder = tiny.copy("fp32", tmp_path)
    path = folder / "golden/picture.safetensors"
    tensors, metadata = read_tensors(path)
    tokens = tensors["tokens"].copy()
    tokens[-1] = (tokens[-1] + 1) % 512  # the last is never fed, so only the comparison sees it
    write_tensors(path, tensors | {"tokens": tokens}, metadata)
    rehash(folder, "golden/picture.safetensors")
    report = check(folder)
    assert [(r.case, r.stage, r.value) for r in report.results if not r.passed] == [("picture", "tokens", 5.0)]


def test_hashes_are_checked_first(tiny, tmp_path):
    folder = tiny.copy("fp32", tmp_path)
    with (folder / "decoder.onnx.data").open("r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)[0]
        file.seek(-1, 2)
        file.write(bytes([last ^ 1]))
    with pytest.raises(BundleError, match=r"decoder\.onnx\.data: sha256"):
        check(folder)


# ---------------------------------------------------------------- the measures themselves


def test_close_sees_direction_and_size():
    rng = np.random.default_rng(0)
    expected = rng.normal(size=(4, 1000))
    assert _close(expected, expected, 0.99999)[2]
    value, floor, passed, _ = _close(expected + 0.5 * rng.normal(size=expected.shape), expected, 0.85)
    assert passed and floor == 0.85 and value == pytest.approx(1 / math.sqrt(1.25), abs=0.02)
    assert not _close(expected * 1.01, expected, 0.99999)[2]  # the cosine is 1
    assert not _close(expected * 2, expected, 0.85)[2]
    assert not _close(np.zeros_like(expected), expected, 0.85)[2]
    assert _close(np.zeros((2, 3)), np.zeros((2, 3)), 0.99999)[0] == 1
    assert not _close(np.full_like(expected, np.nan), expected, 0.85)[2]
    assert not _close(expected[:3], expected, 0.85)[2]


def test_a_tie_of_greedy_tokens_is_not_a_drift(tiny):
    case = GoldenCase.load(tiny.bundle("fp32") / "golden/text.safetensors")
    rank = np.argsort(case.logits[2])
    second = [*case.tokens[:2].tolist(), int(rank[-2]), 0, 0, 0]
    assert _equal_prefix(second, case) == 2
    logits = case.logits.copy()
    logits[2, rank[-2]] = logits[2, rank[-1]] - 1e-7
    tied = GoldenCase(**{**case.__dict__, "logits": logits})
    assert _equal_prefix(second, tied) == 6
    assert _equal_prefix(case.tokens.tolist()[:4], case) == 4


def test_the_first_drift_is_the_one_furthest_upstream():
    def result(case, stage, passed):
        return StageResult(case, stage, 0.0, 1.0, passed, "numbers")

    report = VerifyReport(
        "ort-cpu",
        (
            result("a", "decode", False),
            result("b", "vision", False),
            result("c", "vision", False),
            result("d", "prompt", True),
        ),
    )
    assert str(report.first_drift) == "stage 'vision' of case 'b' drifts: numbers"
    assert VerifyReport("ort-cpu", report.results[3:]).passed


# ---------------------------------------------------------------- adding golden vectors later


def test_without_golden_vectors_and_adding_them(tiny, tmp_path):
    folder = tmp_path / "bundle"
    export_bundle(tiny.checkpoint, folder, ExportOptions("fp32"))
    with pytest.raises(BundleError, match="--against CHECKPOINT"):
        check(folder)
    names = add_golden(folder, tiny.checkpoint)
    assert names == [f"golden/{case}.safetensors" for case in CASES]
    assert check(folder).first_drift is None
    # The same as those of an export, byte by byte.
    assert Bundle.open(folder, verify_hashes=True).files == Bundle.open(tiny.bundle("fp32")).files
    # Again, with fewer steps and with a file that a former version wrote.
    stale = "golden/former.safetensors"
    shutil.copy(folder / names[0], folder / stale)
    rehash(folder, stale)
    add_golden(folder, tiny.checkpoint, steps=1)
    report = check(folder)
    assert report.first_drift is None and {r.value for r in report.results if r.stage == "tokens"} == {1.0}
    assert not (folder / stale).exists() and stale not in Bundle.open(folder).files
    assert not list(folder.glob(".*"))


def test_a_failed_addition_leaves_the_bundle_as_it_was(tiny, tmp_path):
    model = random_model()
    with torch.no_grad():
        model.model.language_model.norm.weight[0] = float("nan")
    source = save_checkpoint(model, tmp_path / "checkpoint")
    folder = tiny.copy("fp32", tmp_path)
    before = (folder / MANIFEST).read_bytes()
    with pytest.raises(CheckpointError, match="NaN"):
        add_golden(folder, source)
    assert (folder / MANIFEST).read_bytes() == before
    assert check(folder).first_drift is None
    assert not list(folder.glob(".*"))


def test_an_addition_that_breaks_off_leaves_a_bundle_that_opens(tiny, tmp_path):
    folder = tmp_path / "bundle"
    export_bundle(tiny.checkpoint, folder, ExportOptions("fp32"))
    (folder / "golden/text.safetensors").mkdir(parents=True)  # in the way of the third file
    with pytest.raises(BundleError, match="cannot be written"):
        add_golden(folder, tiny.checkpoint)
    assert Bundle.open(folder, verify_hashes=True).files == Bundle.open(folder).files
    (folder / "golden/text.safetensors").rmdir()
    add_golden(folder, tiny.checkpoint)
    assert check(folder).first_drift is None


def test_no_case_that_fits_is_an_error(tiny, tmp_path):
    folder = tmp_path / "bundle"
    export_bundle(tiny.checkpoint, folder, ExportOptions("fp32", max_tokens=20))
    with pytest.raises(InputError, match="no golden case fits into 20 tokens"):
        add_golden(folder, tiny.checkpoint)


def test_another_checkpoint_is_refused_by_the_first_field(tiny, demo, tmp_path):
    folder = tiny.copy("fp32", tmp_path)
    with pytest.raises(InputError, match="text hidden_size is 256, in the bundle 64"):
        add_golden(folder, demo.checkpoint)
    assert check(folder).first_drift is None


def test_prompts_longer_than_the_bundle_takes_are_left_out(tiny, tmp_path):
    told, seen = [], []
    finish = functools.partial(write_golden, source=tiny.checkpoint, notice=told.append, progress=seen.append)
    export_bundle(tiny.checkpoint, tmp_path / "bundle", ExportOptions("fp32", max_tokens=60), finish=finish)
    assert sorted(seen) == list(CASES)
    report = check(tmp_path / "bundle")
    assert report.first_drift is None and {r.case for r in report.results} == {"text", "picture"}
    assert len(told) == 3 and all("exported for 60" in text for text in told)


def test_too_little_memory_is_said_and_not_tried(tiny, tmp_path, monkeypatch):
    free = available_memory()
    assert free is not None and free > 1 << 20
    monkeypatch.setattr(verify, "available_memory", lambda: 100_000)
    told = []
    finish = functools.partial(write_golden, source=tiny.checkpoint, notice=told.append)
    export_bundle(tiny.checkpoint, tmp_path / "bundle", ExportOptions("fp32"), finish=finish)
    assert len(told) == 1 and "memory in fp32, 0.0 GB are available" in told[0]
    with pytest.raises(InputError, match="memory in fp32"):
        add_golden(tmp_path / "bundle", tiny.checkpoint)
    with pytest.raises(BundleError, match="no golden vectors"):
        check(tmp_path / "bundle")


def test_steps_are_checked(tiny, tmp_path):
    with pytest.raises(InputError, match="steps is 0"):
        add_golden(tiny.copy("fp32", tmp_path), tiny.checkpoint, steps=0)


def test_without_torch_the_reason_is_given(tiny, tmp_path, monkeypatch):
    assert host_missing() is None
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "torch" else real(name, *a))
    assert host_missing() == "torch not installed here (pip install 'edgevl[host]')"
    with pytest.raises(InputError, match="torch not installed here"):
        add_golden(tiny.copy("fp32", tmp_path), tiny.checkpoint)


def test_replay_needs_neither_torch_nor_transformers(tiny):
    code = f"""
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "transformers", "onnx", "onnx_ir", "safetensors"):
            raise ImportError("blocked " + name)
sys.meta_path.insert(0, Block())
from edgevl.runtime.bundle import Bundle
from edgevl.runtime.golden import replay
assert replay(Bundle.open({str(tiny.bundle("fp32"))!r}), "ort-cpu", threads=1).passed
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# ---------------------------------------------------------------- the files


def changed(metadata, tensors, **changes):
    for key, value in changes.items():
        target = metadata if key in metadata else tensors
        if value is None:
            del target[key]
        else:
            target[key] = value


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "2"}, "golden format '2'"),
        ({"name": None}, "name"),
        ({"messages": "{"}, "malformed golden vectors"),
        ({"messages": "[]"}, "empty"),
        ({"kinds": '["video"]'}, r"video\.0"),
        ({"kinds": '["sound"]'}, "sound"),
        ({"kinds": "[]"}, "unknown tensors"),
        ({"tokens": None}, "tokens"),
        ({"tokens": np.zeros(5, np.int64)}, "logits"),
        ({"tokens": np.zeros(6, np.float32)}, "tokens"),
        ({"positions": np.zeros((3, 4), np.int64)}, "positions"),
        ({"picture.0": np.zeros((4, 4), np.uint8)}, r"picture\.0"),
        ({"vision.0.grid": np.array([1, 2, 2])}, "pixel_values"),
        ({"logits": np.full((6, 512), np.nan, np.float32)}, "logits"),
        ({"extra": np.zeros(1, np.uint8)}, "extra"),
    ],
)
def test_inconsistent_golden_cases_are_refused(tiny, tmp_path, changes, message):
    tensors, metadata = read_tensors(tiny.bundle("fp32") / "golden/picture.safetensors")
    changed(metadata, tensors, **changes)
    write_tensors(tmp_path / "case.safetensors", tensors, metadata)
    with pytest.raises(BundleError, match=message):
        GoldenCase.load(tmp_path / "case.safetensors")


def test_a_malformed_golden_file_stops_the_replay(tiny, tmp_path):
    folder = tiny.copy("fp32", tmp_path)
    (folder / "golden/text.safetensors").write_bytes(b"not a tensor in sight")
    rehash(folder, "golden/text.safetensors")
    with pytest.raises(BundleError, match=r"golden/text\.safetensors: not a safetensors file"):
        check(folder)


def test_golden_vectors_of_another_model_stop_the_replay(tiny, demo, tmp_path):
    folder = tiny.copy("fp32", tmp_path)
    for name, message in (("text", r"logits|input_ids"), ("picture", "image_embeds")):
        file = f"golden/{name}.safetensors"
        own = (folder / file).read_bytes()
        shutil.copy(demo.bundle("fp32") / file, folder / file)
        if name == "text":  # the same vocabulary: make it another
            tensors, metadata = read_tensors(folder / file)
            write_tensors(folder / file, tensors | {"logits": tensors["logits"][:, :500].copy()}, metadata)
        rehash(folder, file)
        with pytest.raises(BundleError, match=rf"{name}\.safetensors: ({message}) .*another model"):
            check(folder)
        (folder / file).write_bytes(own)
        rehash(folder, file)


def test_a_case_survives_its_file(tiny, tmp_path):
    case = GoldenCase.load(tiny.bundle("fp32") / "golden/video.safetensors")
    case.save(tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == (
        tiny.bundle("fp32") / "golden/video.safetensors"
    ).read_bytes()
    frames = case.filled_messages()[0]["content"][0]["video"]
    assert len(frames) == 8 and frames[0].size == (84, 56)
    broken = GoldenCase(**{**case.__dict__, "logits": case.logits * np.float32(np.inf)})
    with pytest.raises(BundleError, match="logits has NaN or infinity"):
        broken.save(tmp_path / "again.safetensors")
