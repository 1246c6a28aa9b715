"""export/: precisions keep the model, memory stays flat, and nothing half-written is left."""

from __future__ import annotations

import errno
import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from checkpoints import random_model, save_checkpoint
from conftest import MakePair, Pair

from edgevl.benchmarks.random_checkpoint import write_random_checkpoint
from edgevl.export import exporter
from edgevl.export.exporter import PRECISIONS, ExportOptions, export_bundle
from edgevl.export.graph import DataFile, GraphBuilder
from edgevl.export.precision import decoder_precision, vision_precision
from edgevl.runtime.bundle import Bundle
from edgevl.runtime.errors import BundleError, CheckpointError, InputError
from edgevl.runtime.graph_spec import GraphSpec, TensorSpec
from edgevl.runtime.prompt import VisionInput

FLOORS = {  # cosine of the last row's logits against fp32, random weights of width 128; a wrong kernel gives about 0
    ("fp16", 128, True): 0.9999,
    ("int8", 128, True): 0.99,
    ("int8-weights", 128, True): 0.995,
    ("int8-weights", 32, False): 0.995,
    ("int4", 128, True): 0.85,
    ("int4", 64, True): 0.88,
    ("int4", 32, True): 0.9,
    ("int4", 32, False): 0.92,
    ("hybrid", 128, True): 0.99,
}


def _logits(bundle: Path, prefill: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """(logits of a prompt with a picture, image embeddings) of a bundle."""
    from edgevl.runtime.generation import VisionLanguageModel

    picture = np.random.default_rng(5).integers(0, 256, (112, 84, 3), dtype=np.uint8)
    message = {"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": "Read it."}]}
    with VisionLanguageModel.open(bundle, "ort-cpu", threads=2) as model:
        prompt, decoder = model.prepare([message]), model.decoder()
        embeds = np.asarray(prompt.images[0].embeds)
        if prefill:
            return decoder.prefill(0, prompt.ids, prompt.positions, embeds), embeds
        decoder.prefill(0, prompt.ids[:-1], prompt.positions[:, :-1], embeds)
        return decoder.step(prompt.ids[-1:], prompt.positions[0, -1:])[0], embeds


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    a, b = a.astype(np.float64).ravel(), b.astype(np.float64).ravel()
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


@pytest.fixture(scope="module")
def wide(make_pair: MakePair) -> Pair:
    return make_pair(hidden_size=128, intermediate_size=256)


@pytest.mark.parametrize(("precision", "block", "symmetric"), FLOORS)
def test_decoder_precisions_keep_the_model(
    wide: Pair, tmp_path: Path, precision: str, block: int, symmetric: bool
) -> None:
    options = ExportOptions(decoder_precision=precision, vision_precision="fp32", block_size=block, symmetric=symmetric)
    export_bundle(wide.checkpoint, tmp_path / "b", options)
    expected = _logits(wide.bundle)[0]
    floor = FLOORS[precision, block, symmetric]
    assert cosine(_logits(tmp_path / "b")[0], expected) > floor
    decode_floor = FLOORS["int4", 128, True] if precision == "hybrid" else floor
    assert cosine(_logits(tmp_path / "b", prefill=False)[0], expected) > decode_floor


@pytest.mark.parametrize(("precision", "floor"), [("fp16", 0.99999), ("int8", 0.999)])
def test_vision_precisions_keep_the_model(wide: Pair, tmp_path: Path, precision: str, floor: float) -> None:
    export_bundle(wide.checkpoint, tmp_path / "b", ExportOptions(vision_precision=precision, decoder_precision="fp32"))
    got, expected = _logits(tmp_path / "b")[1], _logits(wide.bundle)[1]
    assert np.abs(got - expected).max() > 0  # it is another graph
    assert cosine(got, expected) > floor


def test_int4_head_and_padded_blocks(make_pair: MakePair, tmp_path: Path) -> None:
    """A width that is no multiple of the block, and a 4-bit table that serves embedding and head."""
    pair = make_pair(hidden_size=96, num_attention_heads=4, num_key_value_heads=2)
    for symmetric in (True, False):
        for untied in (False, True):
            source = pair
            if untied:
                source = make_pair(
                    hidden_size=96, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=False
                )
            options = ExportOptions("int4", "fp32", block_size=64, symmetric=symmetric, head_bits=4)
            folder = tmp_path / f"{symmetric}{untied}"
            export_bundle(source.checkpoint, folder, options)
            assert cosine(_logits(folder)[0], _logits(source.bundle)[0]) > 0.8


def test_w8a8_is_per_token(wide: Pair, tmp_path: Path) -> None:
    """One token 1000 times larger must not ruin the others: per tensor it would, and ruins real models."""
    export_bundle(wide.checkpoint, tmp_path / "b", ExportOptions(precision="int8"))
    from edgevl.runtime.generation import VisionLanguageModel

    picture = np.random.default_rng(5).integers(0, 256, (112, 84, 3), dtype=np.uint8)
    outputs = []
    for bundle in (wide.bundle, tmp_path / "b"):
        with VisionLanguageModel.open(bundle, "ort-cpu", threads=2) as model:
            processed = model._vision.preprocess(VisionInput("image", picture))
            processed.pixel_values[:4] *= 1000
            outputs.append(model._vision.run(processed))
    for row in range(1, len(outputs[0])):  # row 0 holds the large patches
        assert cosine(outputs[0][row], outputs[1][row]) > 0.995


def test_every_precision_is_a_valid_onnx_file(tiny: Pair, tmp_path: Path) -> None:
    for precision in PRECISIONS:
        folder = tmp_path / precision
        export_bundle(tiny.checkpoint, folder, ExportOptions(precision=precision))
        bundle = Bundle.open(folder, verify_hashes=True)
        assert ("prefill" in bundle.graphs) == (precision == "hybrid")
        for graph in bundle.graphs.values():
            model = onnx.load(folder / graph.file, load_external_data=False)
            assert [i.name for i in model.graph.input] == [t.name for t in graph.spec.inputs]
            assert {o.name for o in model.graph.output} == {t.name for t in graph.spec.outputs}


def test_tied_table_is_stored_once(tiny: Pair, tmp_path: Path) -> None:
    sizes = {}
    for tied in (True, False):
        model = random_model(tie_word_embeddings=tied)
        checkpoint = save_checkpoint(model, tmp_path / f"c{tied}")
        for precision in ("fp32", "int8"):
            folder = tmp_path / f"{tied}{precision}"
            export_bundle(checkpoint, folder, ExportOptions(precision=precision))
            sizes[tied, precision] = (folder / "decoder.onnx.data").stat().st_size
    assert sizes[False, "fp32"] - sizes[True, "fp32"] >= 512 * 64 * 4
    assert sizes[False, "int8"] - sizes[True, "int8"] >= 512 * 64


def test_exports_are_equal_byte_for_byte(tiny: Pair, tmp_path: Path) -> None:
    for name in ("a", "b"):
        export_bundle(tiny.checkpoint, tmp_path / name, ExportOptions(precision="hybrid"))
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


def test_memory_does_not_grow_with_depth(tmp_path: Path) -> None:
    peaks = []
    for layers in (2, 8):
        write_random_checkpoint(tmp_path / f"c{layers}", "tiny", layers=layers)
        code = (
            "import sys; from edgevl.export.exporter import *;"
            "export_bundle(sys.argv[1], sys.argv[2], ExportOptions(precision='hybrid'));"
            "print(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])"
        )
        command = [sys.executable, "-c", code, str(tmp_path / f"c{layers}"), str(tmp_path / f"b{layers}")]
        peaks.append(int(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    assert peaks[1] < peaks[0] * 1.05


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "int3"}, "precision 'int3' is unknown"),
        ({"vision_precision": "int4"}, "vision precision 'int4'"),
        ({"decoder_precision": "fp8"}, "decoder precision 'fp8'"),
        ({"block_size": 48}, "block size 48"),
        ({"head_bits": 2}, "head bits 2"),
        ({"target": "toaster"}, "target 'toaster'"),
        ({"mrope_rule": "mine"}, "M-RoPE rule 'mine'"),
        ({"max_tokens": 0}, "max tokens is 0"),
        ({"max_tokens": 10**6}, "expected 1 to 2048"),
    ],
)
def test_bad_options(tiny: Pair, tmp_path: Path, options: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        export_bundle(tiny.checkpoint, tmp_path / "b", ExportOptions(**options))
    assert list(tmp_path.iterdir()) == []


def test_existing_output(tiny: Pair, tmp_path: Path) -> None:
    target = tmp_path / "b"
    export_bundle(tiny.checkpoint, target)
    with pytest.raises(BundleError, match="exists already"):
        export_bundle(tiny.checkpoint, target)
    export_bundle(tiny.checkpoint, target, ExportOptions(precision="fp32"), overwrite=True)
    assert Bundle.open(target).precision == "vision fp32, decoder fp32"
    (tmp_path / "photos").mkdir()
    with pytest.raises(BundleError, match="is not a bundle"):
        export_bundle(tiny.checkpoint, tmp_path / "photos", overwrite=True)
    with pytest.raises(BundleError, match="no such folder"):
        export_bundle(tiny.checkpoint, tmp_path / "absent" / "b")


def test_overwrite_is_a_swap(tiny: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The old bundle is whole until the new one is: it is renamed, never emptied in place. What a kill between the two
    renames leaves behind, the next export removes."""
    target = tmp_path / "b"
    export_bundle(tiny.checkpoint, target, ExportOptions(precision="fp32"))
    removed: list[str] = []
    rmtree = shutil.rmtree

    def watched(path: Path, ignore_errors: bool = False) -> None:
        if Path(path).exists():
            removed.append(Path(path).name)
            assert Bundle.open(target).files
        rmtree(path, ignore_errors=ignore_errors)

    (tmp_path / ".b.old").mkdir()
    (tmp_path / ".b.partial").mkdir()
    monkeypatch.setattr(exporter.shutil, "rmtree", watched)
    export_bundle(tiny.checkpoint, target, overwrite=True)
    assert removed == [".b.partial", ".b.old", ".b.old"]
    assert Bundle.open(target).precision == "vision int8, decoder int4"
    assert [p.name for p in tmp_path.iterdir()] == ["b"]


def test_failed_overwrite_keeps_the_old_bundle(tiny: Pair, tmp_path: Path) -> None:
    target = tmp_path / "b"
    export_bundle(tiny.checkpoint, target, ExportOptions(precision="fp32"))
    broken = tmp_path / "broken"
    shutil.copytree(tiny.checkpoint, broken)
    (broken / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match="tokenizer"):
        export_bundle(broken, target, overwrite=True)
    assert Bundle.open(target, verify_hashes=True).precision == "vision fp32, decoder fp32"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["b", "broken"]


def test_disk_full(tiny: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(exporter.shutil, "disk_usage", lambda _: usage._replace(free=1000))
        with pytest.raises(BundleError, match=r"are needed, 0\.00 GB are free"):
            export_bundle(tiny.checkpoint, tmp_path / "b")

    def full(self: DataFile, data: memoryview) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(DataFile, "_write", full)
    with pytest.raises(BundleError, match="the disk is full"):
        export_bundle(tiny.checkpoint, tmp_path / "b")
    assert list(tmp_path.iterdir()) == []


def test_killed_export_leaves_nothing_that_opens(tmp_path: Path) -> None:
    """A real process, killed with SIGKILL in the middle of the weights; the next export cleans up."""
    write_random_checkpoint(tmp_path / "c", "tiny", layers=4)
    code = (
        "import sys, time; from edgevl.export.exporter import *\n"
        "def slow(name, size, total):\n"
        "    print(name, flush=True); time.sleep(0.05)\n"
        "export_bundle(sys.argv[1], sys.argv[2], ExportOptions(), progress=slow)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "c"), str(tmp_path / "b")], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    for _ in range(12):
        process.stdout.readline()
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert process.returncode == -signal.SIGKILL
    left = [p for p in tmp_path.iterdir() if p.name != "c"]
    assert [p.name for p in left] == [".b.partial"]
    with pytest.raises(BundleError):
        Bundle.open(left[0])
    export_bundle(tmp_path / "c", tmp_path / "b")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["b", "c"]
    Bundle.open(tmp_path / "b", verify_hashes=True)


def test_interrupt_cleans_up(tiny: Pair, tmp_path: Path) -> None:
    def stop(name: str, size: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_bundle(tiny.checkpoint, tmp_path / "b", progress=stop)
    assert list(tmp_path.iterdir()) == []


def test_progress_counts_to_the_end(tiny: Pair, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    export_bundle(tiny.checkpoint, tmp_path / "b", progress=lambda _, size, total: seen.append((size, total)))
    written, total = sum(size for size, _ in seen), seen[-1][1]
    assert 0.8 < written / total < 1.25  # the estimate that also guards the disk


def test_data_file_refuses_wrong_chunks(tmp_path: Path) -> None:
    with DataFile(tmp_path / "x.data") as data:
        with pytest.raises(ValueError, match="a chunk of float64"):
            data.append("w", np.dtype("float32"), (2,), [np.zeros(2)])
        with pytest.raises(ValueError, match="4 bytes were written"):
            data.append("v", np.dtype("float32"), (2,), [np.zeros(1, np.float32)])


def test_builder_refuses_an_unfinished_graph(tmp_path: Path) -> None:
    spec = GraphSpec("g", (TensorSpec("x", "float32", (1,)),), (TensorSpec("y", "float32", (1,)),))
    with DataFile(tmp_path / "x.data") as data, pytest.raises(ValueError, match=r"no value for its outputs \['y'\]"):
        GraphBuilder(spec, data, 21, 10).save(tmp_path / "g.onnx")


def test_builder_leaves_out_what_nothing_uses(tmp_path: Path) -> None:
    """And what only that used; an output is used."""
    names = "y", "z"
    spec = GraphSpec("g", (TensorSpec("x", "float32", (1,)),), tuple(TensorSpec(n, "float32", (1,)) for n in names))
    with DataFile(tmp_path / "x.data") as data:
        builder = GraphBuilder(spec, data, 21, 10)
        used, unused = builder.op("Neg", [builder.input("x")]), builder.op("Abs", [builder.input("x")])
        builder.op("Sqrt", [unused])
        builder.output("y", builder.op("Exp", [used]))
        builder.output("z", builder.op("Cos", [builder.input("x")]))
        builder.save(tmp_path / "g.onnx")
    assert [n.op_type for n in onnx.load(tmp_path / "g.onnx").graph.node] == ["Neg", "Exp", "Cos"]


def test_shared_data_is_mapped_right(tmp_path: Path) -> None:
    """Two graphs over one data file, with an alias: what onnx reads back is what was written."""
    spec = GraphSpec("g", (TensorSpec("x", "float32", (2, 3)),), (TensorSpec("y", "float32", (2, 3)),))
    table = np.arange(6, dtype=np.float32)
    with DataFile(tmp_path / "x.data") as data:
        for name in ("a", "b"):
            builder = GraphBuilder(spec, data, 21, 10)
            builder.weight("w", np.float32, (6,), lambda: [table[:4], table[4:]])
            builder.output("y", builder.op("Add", [builder.input("x"), builder.alias("w2", "w", (2, 3))]))
            builder.save(tmp_path / f"{name}.onnx")
    assert (tmp_path / "x.data").stat().st_size == 24
    loaded = {i.name: onnx.numpy_helper.to_array(i) for i in onnx.load(tmp_path / "b.onnx").graph.initializer}
    np.testing.assert_array_equal(loaded["w2"], table.reshape(2, 3))
    assert ir.load(tmp_path / "a.onnx").graph.name == "g"


def test_precision_names() -> None:
    assert [p.name for p in decoder_precision("hybrid")] == ["int8", "int4"]
    assert vision_precision("fp16").dtype == "float16"
    assert decoder_precision("int4", 32, False, 4)[0].table.bits == 4


def test_export_leaves_no_torch(tiny: Pair, tmp_path: Path) -> None:
    """The whole export in a process where torch and transformers cannot be imported."""
    code = (
        "import sys; sys.modules['torch'] = sys.modules['transformers'] = None\n"
        "from edgevl.export.exporter import *\n"
        "export_bundle(sys.argv[1], sys.argv[2])"
    )
    subprocess.run([sys.executable, "-c", code, str(tiny.checkpoint), str(tmp_path / "b")], check=True)
    assert json.loads((tmp_path / "b" / "manifest.json").read_text())["schema_version"] == 1
