"""runtime/preflight.py, admission.py and memory.py: plans against measured peaks and against the graphs' own tensors,
and every refusal."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from checkpoints import DEMO, random_model, save_checkpoint
from conftest import MakePair
from native_oracle import usable_library
from PIL import Image

from edgevl.benchmarks.memory import Case, measure, predict
from edgevl.export.exporter import ExportOptions, export_bundle
from edgevl.runtime import admission, cli
from edgevl.runtime.admission import Admission, check_opening
from edgevl.runtime.bundle import NATIVE_ROLES, Bundle
from edgevl.runtime.errors import CapacityError, EngineError, InputError
from edgevl.runtime.generation import VisionLanguageModel
from edgevl.runtime.image_processing import VisionGrid
from edgevl.runtime.kv_cache import KVCache
from edgevl.runtime.memory import available_bytes, parse_size, resident_bytes, shown
from edgevl.runtime.native_kernels import SWITCH, has_int8_kernels, native_role
from edgevl.runtime.preflight import Planner, largest_that_fits, picture_of

MB = 1_000_000


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("preflight")
    for precision in ("fp32", "int4", "hybrid", "int8"):
        export_bundle(DEMO, root / precision, ExportOptions(precision=precision))
    untied = save_checkpoint(random_model(tie_word_embeddings=False), root / "checkpoint")
    export_bundle(untied, root / "untied", ExportOptions(precision="int4", block_size=32))
    return {name: root / name for name in ("fp32", "int4", "hybrid", "int8", "untied")}


@pytest.fixture(params=["on", "off"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """With our own kernels, where they can be used, and without."""
    if request.param == "on":
        usable_library()
    monkeypatch.setenv(SWITCH, request.param)
    return request.param == "on"


@pytest.fixture(scope="module")
def demo(bundles: dict[str, Path]) -> Iterator[VisionLanguageModel]:
    with VisionLanguageModel.open(bundles["fp32"], "ort-cpu", threads=1) as model:
        yield model


# --------------------------------------------------------------------------------------- against what is measured


def test_peaks_are_predicted_within_15_percent(bundles: dict[str, Path]) -> None:
    """Processes of their own. What a larger picture adds is predicted too, without the large constant part."""
    small, large = Case(112, 112, 1, 40, 4, 1), Case(924, 924, 1, 40, 4, 1)
    long = Case(112, 112, 1, 900, 4, 3)
    bundle = Bundle.open(bundles["fp32"])
    peaks = {}
    for case in (small, large, long):
        measured = measure(str(bundles["fp32"]), case)
        plan = predict(bundle, case, measured)
        assert abs(plan.opening / measured.opening - 1) < 0.15, case
        peaks[case] = measured.answering, max(plan.picture, plan.answer)
        assert abs(peaks[case][1] / peaks[case][0] - 1) < 0.15, case
    added = [peaks[large][i] - peaks[small][i] for i in (0, 1)]
    assert added[0] > 40 * MB and abs(added[1] / added[0] - 1) < 0.25


def test_weights_are_counted_as_the_kernels_read_them(make_pair: MakePair, kernels: bool) -> None:
    """Packed as the bundle opens, by our own kernels or ONNX Runtime's, and the file's pages given back."""
    pair = make_pair("int4", hidden_size=512, intermediate_size=6144, num_hidden_layers=8)
    case = Case(112, 112, 1, 40, 4, 1)
    measured = measure(str(pair.bundle), case)
    plan = predict(Bundle.open(pair.bundle), case, measured)
    assert plan.weights > 40 * MB and plan.mapped == (0 if kernels else Planner(Bundle.open(pair.bundle)).table)
    assert abs(plan.opening / measured.opening - 1) < 0.15
    assert abs(max(plan.picture, plan.answer) / measured.answering - 1) < 0.15
    assert measured.answering - measured.opening < 0.5 * plan.weights


# --------------------------------------------------------------------------------------- against the graphs' tensors


def tensors(path: Path) -> dict[str, int]:
    """Bytes of every initializer of a graph, by name, those that share their bytes with another left out."""
    graph = onnx.load(str(path), load_external_data=False).graph
    sizes = {}
    for t in graph.initializer:
        if t.name.endswith(".gather"):  # the same scales in another shape
            continue
        item = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(t.data_type)).itemsize
        sizes[t.name] = int(np.prod(t.dims)) * item
    return sizes


def opened_files(bundle: Bundle) -> dict[str, Path]:
    """The graphs that ONNX Runtime opens, by role."""
    roles = [role for role in NATIVE_ROLES if role in bundle.graphs]
    return {role: bundle.path(bundle.graphs[native_role(bundle, role) or role].file) for role in roles}


@pytest.mark.parametrize("name", ["fp32", "int4", "hybrid", "int8", "untied"])
def test_the_table_and_the_weights_are_the_graphs_own(bundles: dict[str, Path], name: str, kernels: bool) -> None:
    bundle = Bundle.open(bundles[name])
    planner = Planner(bundle)
    graphs = {role: tensors(path) for role, path in opened_files(bundle).items()}
    table = sum(size for n, size in graphs["decoder"].items() if "embed_tokens" in n)
    assert planner.table == pytest.approx(table, rel=0.02)
    kept = sum(sum(sizes.values()) for sizes in graphs.values())
    if name == "untied":
        kept -= table  # the embedding's rows are few
    if all(role in graphs and native_role(bundle, role) for role in ("prefill", "decoder")):
        kept -= table  # both decoders' head, laid out once
    assert planner.weights == pytest.approx(kept + planner._block_sums(), rel=0.03, abs=60_000)


@pytest.mark.parametrize("name", ["int4", "hybrid", "int8", "untied"])
def test_block_sums_are_counted_layer_by_layer(bundles: dict[str, Path], name: str, kernels: bool) -> None:
    """MatMulNBits' own attributes are the oracle: N × K / block sums of four bytes; our own has none."""
    bundle = Bundle.open(bundles[name])
    sums = 0
    for path in opened_files(bundle).values():
        for node in onnx.load(str(path), load_external_data=False).graph.node:
            if (node.domain, node.op_type) == ("com.microsoft", "MatMulNBits"):
                a = {x.name: x.i for x in node.attribute}
                sums += a["N"] * -(-a["K"] // a["block_size"]) * 4
    assert (sums == 0) == all(native_role(bundle, role) for role in ("prefill", "decoder") if role in bundle.graphs)
    assert Planner(bundle)._block_sums() == pytest.approx(sums, rel=0.02)


def test_the_cache_is_that_of_the_kv_cache(demo: VisionLanguageModel) -> None:
    spec, planner = demo.engine.decoder.spec, Planner(demo.bundle)
    for tokens in (1, 100, 1000):
        exact = KVCache(spec, tokens).nbytes
        heads = 2 * demo.config.text.num_hidden_layers * demo.config.text.num_key_value_heads
        assert exact <= planner.cache(tokens) < exact + heads * 4096


def test_embeddings_and_pixels_are_what_the_stage_makes(demo: VisionLanguageModel) -> None:
    picture = demo.encode_image(Image.new("RGB", (280, 140)))
    planner = Planner(demo.bundle)
    assert planner.embeds(planner.image_tokens(picture.grid)) == 2 * picture.embeds.nbytes
    patches = picture.grid.patches * demo.config.vision.patch_dim * 4
    assert patches < planner.pixels(picture.grid) < 1.2 * patches


def test_a_plan_adds_up(demo: VisionLanguageModel) -> None:
    planner = Planner(demo.bundle, prefill_chunk=100)
    grid, other = VisionGrid(1, 20, 30), VisionGrid(1, 10, 10)
    plan = planner.plan([grid, other], text_tokens=50, new_tokens=20, batch=3)
    assert (plan.images, plan.image_tokens, plan.cache_tokens) == (2, 175, 245)
    assert plan.vision == planner.vision(grid) > planner.vision(other)
    assert plan.cache == 3 * planner.cache(245) and plan.embeds == 3 * planner.embeds(175)
    assert plan.prefill == planner.prefill(100) < planner.prefill(101) or plan.prefill == planner.prefill(5000)
    assert plan.peak == max(plan.opening, plan.picture, plan.answer)
    assert planner.plan([], 10, 1).peak == max(plan.opening, planner.plan([], 10, 1).answer)
    assert set(plan.to_dict()) >= {"base", "weights", "vision", "prefill", "cache", "opening", "peak"}


def test_a_video_goes_through_the_encoder_in_groups(demo: VisionLanguageModel) -> None:
    planner = Planner(demo.bundle)
    one, all_, more = (planner.vision(VisionGrid(t, 64, 64)) for t in (1, 4, 400))
    assert all_ == more == 4 * one  # 16,384 patches at once


@pytest.mark.parametrize("name", ["hybrid", "int4", "int8", "fp32"])
def test_what_is_read_to_be_packed(bundles: dict[str, Path], name: str, kernels: bool) -> None:
    """A head for every graph but our own, which give back what they pack at once."""
    bundle = Bundle.open(bundles[name])
    planner, files = Planner(bundle), opened_files(bundle)
    own = {role for role in files if native_role(bundle, role)}
    assert bool(own) == (kernels and name != "fp32" and (name != "int8" or has_int8_kernels()))
    packed = sum(role not in own for role in files if role != "vision")
    assert planner.mapped == packed * planner.table


# --------------------------------------------------------------------------------------- helpers


def test_the_largest_that_fits() -> None:
    for low, high in itertools.product((1, 5), (5, 90)):
        for limit in (0, 4, 5, 6, 89, 90, 99):
            expected = next((n for n in range(high, low - 1, -1) if n <= limit), None)
            assert largest_that_fits(low, high, lambda n, limit=limit: n <= limit) == expected


@pytest.mark.parametrize("pixels", [784, 785, 1567, 1568, 602_112, 12_845_056])
def test_a_picture_of_so_many_pixels(pixels: int) -> None:
    height, width = picture_of(pixels, 28)
    assert height % 28 == width % 28 == 0 and height * width <= pixels < (height + 28) * (width + 28)


def test_less_than_a_tile_is_no_picture() -> None:
    with pytest.raises(InputError, match="expected at least 784"):
        picture_of(783, 28)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        (5, 5),
        ("7", 7),
        ("4GB", 4 * 10**9),
        ("1.5 GiB", 3 * 2**29),
        ("512mb", 512 * MB),
        ("2k", 2000),
        (" 3 KiB ", 3072),
    ],
)
def test_sizes(text: int | str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "4 apples", "-1GB", "0", 0, -5, True, None, "GB", "1e9", "4TB"])
def test_what_is_no_size(text: Any) -> None:
    with pytest.raises(InputError, match="expected a size such as 4GB"):
        parse_size(text)


def test_sizes_for_people() -> None:
    assert (shown(1_234_000_000), shown(56_700_000)) == ("1.23 GB", "57 MB")


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_available_memory_is_the_tightest_of_machine_and_groups(tmp_path: Path) -> None:
    assert available_bytes(root=tmp_path) is None  # not Linux
    write(tmp_path / "proc/meminfo", "MemTotal: 9000 kB\nMemAvailable:    5000 kB\nSwapFree: 100 kB\n")
    assert available_bytes(root=tmp_path) == 5100 * 1024
    write(tmp_path / "proc/self/cgroup", "0::/a/b\n")
    write(tmp_path / "sys/fs/cgroup/a/b/memory.max", "max\n")
    write(tmp_path / "sys/fs/cgroup/a/b/memory.current", "1\n")
    assert available_bytes(root=tmp_path) == 5100 * 1024
    write(tmp_path / "sys/fs/cgroup/a/memory.max", "1000000\n")
    write(tmp_path / "sys/fs/cgroup/a/memory.current", "900000\n")
    assert available_bytes(root=tmp_path) == 100_000
    write(tmp_path / "sys/fs/cgroup/a/memory.stat", "anon 5\ninactive_file 50000\n")
    assert available_bytes(root=tmp_path) == 150_000
    write(tmp_path / "sys/fs/cgroup/a/memory.current", "9900000\n")
    assert available_bytes(root=tmp_path) == 0
    write(tmp_path / "proc/self/cgroup", "5:memory:/x\n4:cpu:/\n")
    write(tmp_path / "sys/fs/cgroup/memory/memory.limit_in_bytes", str(2**63 - 4096))
    write(tmp_path / "sys/fs/cgroup/memory/memory.usage_in_bytes", "7")
    assert available_bytes(root=tmp_path) == 5100 * 1024
    write(tmp_path / "sys/fs/cgroup/memory/x/memory.limit_in_bytes", "3000")
    write(tmp_path / "sys/fs/cgroup/memory/x/memory.usage_in_bytes", "2000")
    write(tmp_path / "sys/fs/cgroup/memory/x/memory.stat", "total_inactive_file 500\n")
    assert available_bytes(root=tmp_path) == 1500


def test_this_machine_tells() -> None:
    assert (resident_bytes() or 0) > 10 * MB and (available_bytes() or 0) > 0


# --------------------------------------------------------------------------------------- admission


def ask(width: int, height: int) -> list[dict[str, Any]]:
    picture = Image.new("RGB", (width, height), (90, 120, 200))
    content = [{"type": "image", "image": picture, "max_pixels": width * height}, {"type": "text", "text": "What?"}]
    return [{"role": "user", "content": content}]


@pytest.fixture
def room(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Sets what the machine has left."""

    def set_room(size: int | None) -> None:
        monkeypatch.setattr(admission, "available_bytes", lambda: size)

    return set_room


def test_a_picture_that_does_not_fit_is_refused_with_a_size_that_does(
    demo: VisionLanguageModel, room: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    room(60 * MB)
    with pytest.raises(
        CapacityError, match=r"1120×1120 pixels .* 60 MB are available here; max_pixels (\d+)"
    ) as caught:
        demo.generate(ask(1120, 1120))
    advised = int(str(caught.value).rsplit("max_pixels ", 1)[1].split()[0])
    messages = ask(1120, 1120)
    messages[0]["content"][0]["max_pixels"] = advised
    assert demo.generate(messages, max_new_tokens=2).finish_reason  # what was advised runs under the same limit
    messages[0]["content"][0]["max_pixels"] = round(advised * 1.1)
    with pytest.raises(CapacityError):
        demo.generate(messages, max_new_tokens=2)
    room(1000)
    monkeypatch.setattr("edgevl.runtime.vision.preprocess_image", None)  # what is refused takes no memory before
    with pytest.raises(CapacityError, match="no smaller size fits either"):
        demo.generate(ask(56, 56))


def test_a_prompt_that_does_not_fit_is_refused(bundles: dict[str, Path], room: Any) -> None:
    with VisionLanguageModel.open(bundles["fp32"], "ort-cpu", threads=1) as model:
        images = [model.encode_image(Image.new("RGB", (560, 560))) for _ in range(3)]
        content = [{"type": "image", "image": i} for i in images]
        prompt = [{"role": "user", "content": [*content, {"type": "text", "text": "Which?"}]}]
        tokens = len(model.prepare(prompt).ids)
        planner = Planner(model.bundle)
        needed = planner.prefill(tokens) + planner.cache(tokens + 8)
        room(needed - 1)
        with pytest.raises(CapacityError, match=r"a prompt of \d+ tokens with answers of 8 .*max_pixels \d+ would fit"):
            model.generate(prompt, max_new_tokens=8)
        room(needed)
        model.generate(prompt, max_new_tokens=8)
        # What the arena kept is not asked for again.
        room(planner.cache(tokens + 8))
        model.generate(prompt, max_new_tokens=8)
        with pytest.raises(CapacityError, match="2 prompts"):
            model.generate_batch([prompt, prompt], max_new_tokens=8)
        text = [{"role": "user", "content": "a " * 1500}]
        room(planner.prefill(1200) - planner.prefill(tokens) + planner.cache(2000))
        with pytest.raises(CapacityError, match=r"a prefill chunk of [0-9]+ would fit|send fewer or shorter"):
            model.generate(text, max_new_tokens=8)


def test_a_cache_that_is_there_is_not_asked_for_again(bundles: dict[str, Path], room: Any) -> None:
    """Of a chat that starts over, and of an answer longer than the KV cache."""
    words = "a " * 300
    with VisionLanguageModel.open(bundles["fp32"], "ort-cpu", threads=1, capacity=1000) as model:
        planner, chat = Planner(model.bundle), model.chat()
        held = chat.send(words, max_new_tokens=8).usage.prompt_tokens
        chat.reset()
        room(planner.cache(64))
        assert chat.send(words + "b", max_new_tokens=8).usage.cached_tokens < held
        with pytest.raises(CapacityError, match="a prompt of"):
            model.chat().send(words, max_new_tokens=8)
        room(planner.cache(1000))
        model.generate([{"role": "user", "content": words}], max_new_tokens=10**9, eos_token_ids=range(10**4))


def test_nothing_is_refused_where_it_is_off_or_unknown(bundles: dict[str, Path], room: Any) -> None:
    room(1)
    with VisionLanguageModel.open(bundles["fp32"], "ort-cpu", threads=1, memory_limit="off") as model:
        assert model.generate(ask(112, 112), max_new_tokens=2).finish_reason
    room(None)
    with VisionLanguageModel.open(bundles["fp32"], "ort-cpu", threads=1) as model:
        assert model.generate(ask(112, 112), max_new_tokens=2).finish_reason


def test_a_limit_counts_what_the_process_has(bundles: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = Bundle.open(bundles["fp32"])
    weights = Planner(bundle).weights
    monkeypatch.setattr(admission, "resident_bytes", lambda: 100 * MB)
    check_opening(bundle, 100 * MB + weights)
    with pytest.raises(CapacityError, match=r"its weights need 2\d MB .* left of the memory limit of 1\d\d MB; export"):
        check_opening(bundle, 100 * MB + weights - 1)
    with pytest.raises(InputError, match="expected a size"):
        VisionLanguageModel.open(bundles["fp32"], memory_limit="lots")


def test_opening_is_refused_where_the_weights_do_not_fit(bundles: dict[str, Path], room: Any) -> None:
    room(5 * MB)
    with pytest.raises(CapacityError, match=r"its weights need .* 5 MB are available here"):
        VisionLanguageModel.open(bundles["fp32"], "ort-cpu")


def test_a_limit_on_another_engine_is_refused_and_no_limit_checks_nothing(demo: VisionLanguageModel, room: Any) -> None:
    with pytest.raises(EngineError, match="known for ort-cpu only"):
        Admission(demo.bundle, "ort-cuda", memory_limit="4GB")
    room(1)
    prompt = demo.prepare([{"role": "user", "content": "x"}])
    Admission(demo.bundle, "ort-cuda").answers([prompt], 10)
    with pytest.raises(CapacityError):
        Admission(demo.bundle, "ort-cpu").answers([prompt], 10)


# --------------------------------------------------------------------------------------- the command line


def test_inspect_plan(bundles: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    base = ["inspect", str(bundles["int4"]), "--plan"]
    assert cli.run(base) == 0
    out = capsys.readouterr().out
    assert "224×224" in out and "peak MB" in out and "fits" in out
    assert cli.run([*base, "--json", "--max-pixels", "100352", "--images", "2", "--batch", "3", "--max-tokens", "99",
                    "--memory-limit", "100MB"]) == 0  # fmt: skip
    (plan,) = json.loads(capsys.readouterr().out)["plans"]
    assert (plan["image_tokens"], plan["cache_tokens"], plan["batch"], plan["fits"]) == (242, 341, 3, False)
    assert cli.run([*base, "--images", "0"]) == 0
    assert "none" in capsys.readouterr().out
    for arguments, message in (
        (["--max-pixels", "100"], "expected at least 784"),
        (["--max-pixels", "-5"], "--max-pixels is -5, expected at least 1"),
        (["--max-pixels", "-5", "--images", "0"], "--max-pixels is -5"),
        (["--max-pixels", "9" * 400], "expected at most 1000000000000"),
        (["--prefill-chunk", "0"], "--prefill-chunk is 0, expected at least 1"),
        (["--batch", "0"], "--batch is 0, expected at least 1"),
        (["--memory-limit", "x"], "expected a size"),
    ):
        assert cli.run([*base, *arguments]) == 2
        assert message in capsys.readouterr().err
    with pytest.raises(InputError, match="max_pixels is -5, expected at least 784"):
        picture_of(-5, 28)
    assert cli.run(["inspect", str(bundles["int4"]), "--batch", "2"]) == 2
    assert "--batch goes with --plan" in capsys.readouterr().err


def test_run_with_a_memory_limit(bundles: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["run", str(bundles["int4"]), "x", "--engine", "ort-cpu", "--memory-limit", "1MB"]) == 2
    assert "left of the memory limit of 1 MB" in capsys.readouterr().err
    assert cli.run(["run", str(bundles["int4"]), "x", "--engine", "ort-cpu", "--memory-limit", "off"]) == 0
