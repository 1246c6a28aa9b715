"""Checkpoint against torch's tensors, in every layout transformers writes; and every way a checkpoint can be broken."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import random_model
from safetensors.torch import load_file, save_file
from test_config import RELEASED, released
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

from edgevl.runtime.checkpoint import Checkpoint, canonical_name, expected_shapes
from edgevl.runtime.config import ModelConfig
from edgevl.runtime.errors import CheckpointError

Q0 = "model.layers.0.self_attn.q_proj.weight"
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


def save(folder: Path, *, tied: bool = True, dtype: torch.dtype = torch.float32, **options: Any) -> dict[str, Any]:
    """A tiny model saved by transformers; returns its tensors by their names in memory."""
    model = random_model(tie_word_embeddings=tied)
    torch.nn.Module.to(model, dtype)
    model.save_pretrained(folder, **options)
    return dict(model.state_dict())


def in_released_names(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Renamed by hand, as the oracle of the rename table."""
    out = {}
    for name, value in tensors.items():
        out[name.replace("model.language_model.", "model.").replace("model.visual.", "visual.")] = value.contiguous()
    return out


def edit(folder: Path, change: Any) -> None:
    """Rewrite model.safetensors after `change` has altered its tensors in place."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def header_of(path: Path) -> tuple[dict[str, Any], bytes]:
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def write_raw(path: Path, header: dict[str, Any] | bytes, data: bytes, length: int | None = None) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)


def error(folder: Path) -> str:
    with pytest.raises(CheckpointError) as raised:
        Checkpoint.open(folder)
    assert "\n" not in str(raised.value)
    return str(raised.value)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "model"
    save(folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A good tied checkpoint in one file, to break."""
    return Path(shutil.copytree(saved, tmp_path / "model"))


def check_equal(folder: Path, tensors: dict[str, torch.Tensor], dtype: str) -> None:
    tensors = in_released_names(tensors)
    with Checkpoint.open(folder) as checkpoint:
        if checkpoint.config.text.tie_word_embeddings:
            tensors.pop("lm_head.weight", None)
        assert set(checkpoint.names()) == set(tensors)
        for name, theirs in tensors.items():
            expected = theirs.float().numpy()
            ours = checkpoint.read(name)
            assert checkpoint.dtype(name) == dtype and checkpoint.shape(name) == expected.shape
            assert ours.dtype == np.float32 and ours.shape == expected.shape
            assert np.array_equal(ours.view(np.uint32), expected.view(np.uint32)), name
            count = expected.shape[0]
            rows = checkpoint.rows(name, count // 3, count - 1)
            assert np.array_equal(rows, expected.reshape(count, -1)[count // 3 : count - 1]), name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("naming", ["released", "in memory"])
@pytest.mark.parametrize("tied", [True, False])
def test_values_equal_torch(dtype: str, naming: str, tied: bool, tmp_path: Path) -> None:
    tensors = save(tmp_path, tied=tied, dtype=DTYPES[dtype], save_original_format=naming == "released")
    stored = set(load_file(tmp_path / "model.safetensors"))
    assert any(name.startswith("model.language_model.") for name in stored) == (naming == "in memory")
    assert ("lm_head.weight" in stored) == (not tied)
    check_equal(tmp_path, tensors, dtype)


@pytest.mark.parametrize("naming", ["released", "in memory"])
def test_sharded(naming: str, tmp_path: Path) -> None:
    tensors = save(tmp_path, tied=False, max_shard_size="100KB", save_original_format=naming == "released")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 3
    check_equal(tmp_path, tensors, "F32")
    (tmp_path / "model.safetensors.index.json").unlink()
    check_equal(tmp_path, tensors, "F32")


def test_base_model_saved_alone(tmp_path: Path) -> None:
    model = random_model()
    model.model.save_pretrained(tmp_path)
    assert any(name.startswith("language_model.layers.") for name in load_file(tmp_path / "model.safetensors"))
    check_equal(tmp_path, {f"model.{name}": value for name, value in model.model.state_dict().items()}, "F32")


def test_flat_config(folder: Path) -> None:
    before = Checkpoint.open(folder).config
    nested = json.loads((folder / "config.json").read_text())
    text = nested.pop("text_config")
    rope = text.pop("rope_parameters")
    scaling = {"rope_theta": rope["rope_theta"], "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}}
    (folder / "config.json").write_text(json.dumps({**text, **nested, **scaling}))
    with Checkpoint.open(str(folder)) as checkpoint:
        assert checkpoint.config == before and checkpoint.folder == folder
        assert checkpoint.read(Q0).shape == (64, 64)


@pytest.mark.parametrize("size", RELEASED)
def test_expected_shapes_are_those_of_transformers(size: str) -> None:
    config = released(size)
    with torch.device("meta"):
        model = Qwen2VLForConditionalGeneration(Qwen2VLConfig(**config))
    theirs = {canonical_name(name): tuple(value.shape) for name, value in model.state_dict().items()}
    if config["tie_word_embeddings"]:
        del theirs["lm_head.weight"]
    assert expected_shapes(ModelConfig.from_hf(config, {})) == theirs


def test_tied_head_present_and_equal(folder: Path) -> None:
    edit(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    with Checkpoint.open(folder) as checkpoint:
        assert "lm_head.weight" not in checkpoint.names()
        with pytest.raises(KeyError):
            checkpoint.read("lm_head.weight")


def test_tied_head_that_differs(folder: Path) -> None:
    edit(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 1e-3}))
    assert "'lm_head.weight' differs from 'model.embed_tokens.weight'" in error(folder)


def test_untied_without_head(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    assert "model.safetensors: tensor 'lm_head.weight' is missing;" in error(folder)


def test_known_extras_are_ignored(folder: Path) -> None:
    names = ["model.layers.0.self_attn.rotary_emb.inv_freq", "visual.rotary_pos_emb.inv_freq"]
    edit(folder, lambda t: t.update({name: torch.ones(8, dtype=torch.float64) for name in names}))
    with Checkpoint.open(folder) as checkpoint:
        assert not set(names) & set(checkpoint.names())


def test_missing(folder: Path) -> None:
    edit(folder, lambda t: t.pop(Q0))
    message = error(folder)
    assert f"model.safetensors: tensor '{Q0}' is missing;" in message and "[64, 64]" in message
    edit(folder, lambda t: (t.pop("model.norm.weight"), t.pop("visual.merger.mlp.2.bias")))
    assert "'visual.merger.mlp.2.bias' is missing (and 2 more tensors)" in error(folder)


def test_unexpected(folder: Path) -> None:
    edit(folder, lambda t: t.update({"model.layers.2.mlp.up_proj.weight": torch.ones(2), "zzz": torch.ones(1)}))
    message = error(folder)
    assert "model.safetensors: unexpected tensor" in message and "(and 1 more tensors)" in message


def test_mis_shaped(folder: Path) -> None:
    edit(folder, lambda t: t.update({Q0: t[Q0][:32].contiguous()}))
    assert f"model.safetensors: tensor '{Q0}' is [32, 64], expected [64, 64]" in error(folder)
    edit(folder, lambda t: t.update({"model.norm.weight": t["model.norm.weight"][:1].clone()}))
    assert "expected [64, 64] by config.json (and 1 more tensors)" in error(folder)


def test_flat_patch_embedding(folder: Path) -> None:
    patch = "visual.patch_embed.proj.weight"
    edit(folder, lambda t: t.update({patch: t[patch].reshape(32, -1).contiguous()}))
    assert f"'{patch}' is [32, 1176], expected [32, 3, 2, 14, 14] by config.json" in error(folder)


@pytest.mark.parametrize(("dtype", "stored"), [(torch.float64, "F64"), (torch.int8, "I8"), (torch.float8_e4m3fn, "F8")])
def test_wrong_dtype(dtype: torch.dtype, stored: str, folder: Path) -> None:
    edit(folder, lambda t: t.update({Q0: t[Q0].to(dtype)}))
    message = error(folder)
    assert f"model.safetensors: tensor '{Q0}' is {stored}" in message and "BF16, F16, F32" in message


def test_same_tensor_under_two_names(folder: Path) -> None:
    edit(folder, lambda t: t.update({"model.language_model.norm.weight": t["model.norm.weight"].clone()}))
    assert "'model.language_model.norm.weight'" in error(folder) and "under two names" in error(folder)


def test_same_tensor_in_two_files(tmp_path: Path) -> None:
    save(tmp_path, max_shard_size="100KB")
    (tmp_path / "model.safetensors.index.json").unlink()
    shutil.copy(tmp_path / "model-00002-of-00007.safetensors", tmp_path / "copy.safetensors")
    message = error(tmp_path)
    assert "is also in copy.safetensors" in message and "model-00002" in message


def test_index(tmp_path: Path) -> None:
    save(tmp_path, max_shard_size="100KB")
    path = tmp_path / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    shard = index["weight_map"][Q0]

    def with_map(**changes: Any) -> str:
        path.write_text(json.dumps({"weight_map": {**index["weight_map"], **changes}}))
        return error(tmp_path)

    assert "'../x.safetensors', expected a *.safetensors file beside it" in with_map(**{Q0: "../x.safetensors"})
    assert "'x.bin', expected" in with_map(**{Q0: "x.bin"})
    assert "7, expected" in with_map(**{Q0: 7})
    message = with_map(**{Q0: "model-00009-of-00007.safetensors"})
    assert "model-00009-of-00007.safetensors: not found" in message and f"'{Q0}'" in message
    other = next(file for file in index["weight_map"].values() if file != shard)
    assert f"{other}: tensor '{Q0}' is not in it" in with_map(**{Q0: other})
    assert "tensor 'nowhere' is not in it" in with_map(nowhere=shard)
    path.write_text(json.dumps({"weight_map": []}))
    assert "index.json: weight_map must map" in error(tmp_path)
    path.write_text("{")
    assert "index.json: not readable as JSON" in error(tmp_path)
    path.write_text(json.dumps(index))
    (tmp_path / shard).unlink()
    assert f"{shard}: not found" in error(tmp_path)


def test_truncated(folder: Path) -> None:
    path = folder / "model.safetensors"
    header, data = header_of(path)
    last = max((name for name in header if name != "__metadata__"), key=lambda n: header[n]["data_offsets"][1])
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    assert f"model.safetensors: truncated: tensor '{last}' ends at byte {len(whole)}" in error(folder)
    path.write_bytes(whole[: len(whole) - len(data)])
    assert "truncated: tensor" in error(folder)
    for size in (0, 7, 8, 100):
        path.write_bytes(whole[:size])
        assert "truncated or not safetensors" in error(folder)
    path.write_bytes(whole + b"\0")
    assert "1 bytes after the last tensor" in error(folder)


def test_file_that_shrinks_after_opening(folder: Path) -> None:
    with Checkpoint.open(folder) as checkpoint:
        os.truncate(folder / "model.safetensors", 20000)
        with pytest.raises(CheckpointError, match=r"model.safetensors: ended within tensor 'visual"):
            for name in checkpoint.names():
                checkpoint.read(name)


def test_file_that_goes_after_opening(folder: Path) -> None:
    checkpoint = Checkpoint.open(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model.safetensors: cannot be read"):
        checkpoint.read(Q0)


@pytest.mark.parametrize("length", [0, 1, 10**8 + 1, 2**64 - 1])
def test_absurd_header_length(length: int, folder: Path) -> None:
    header, data = header_of(folder / "model.safetensors")
    write_raw(folder / "model.safetensors", header, data, length)
    expected = "not readable as JSON" if length <= 1 else f"header of {length} bytes"
    assert expected in error(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"{", "not readable as JSON"),
        (b"\xff\xfe", "not readable as JSON"),
        (b"[" * 50000, "not readable as JSON"),
        (b"[]", "not a JSON object"),
        (b'{"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]},"a":{}}', "'a' twice"),
    ],
)
def test_broken_header(text: bytes, message: str, folder: Path) -> None:
    write_raw(folder / "model.safetensors", text, b"")
    assert message in error(folder) and "model.safetensors: " in error(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": 5}, "expected dtype, shape and data_offsets"),
        ({"shape": "64"}, "shape is '64'"),
        ({"shape": [64, -64]}, "shape is [64, -64]"),
        ({"shape": [64, 64.0]}, "shape is [64, 64.0]"),
        ({"shape": [True, 64]}, "shape is [True, 64]"),
        ({"shape": [64, 65]}, "F32 [64, 65] does not fill the bytes"),
        ({"shape": [2**62, 2**62]}, "does not fill the bytes"),
        ({"dtype": "BF16"}, "BF16 [64, 64] does not fill the bytes"),
        ({"data_offsets": [0]}, "data_offsets is [0]"),
        ({"data_offsets": [-4, 16380]}, "data_offsets is [-4, 16380]"),
        ({"data_offsets": [16384, 0]}, "does not fill the bytes"),
        ({"data_offsets": [0, 16384]}, "overlaps the tensor before it"),
        ({"data_offsets": [10**12, 10**12 + 16384]}, "ends at byte"),
    ],
)
def test_malformed_tensor_line(changes: dict[str, Any], message: str, folder: Path) -> None:
    path = folder / "model.safetensors"
    header, data = header_of(path)
    header[Q0].update(changes)
    write_raw(path, header, data)
    assert message in error(folder) and "model.safetensors: " in error(folder)


def test_hole_between_tensors(folder: Path) -> None:
    path = folder / "model.safetensors"
    header, data = header_of(path)
    for line in header.values():
        if "data_offsets" in line and line["data_offsets"][0] >= header[Q0]["data_offsets"][0]:
            line["data_offsets"] = [offset + 4 for offset in line["data_offsets"]]
    write_raw(path, header, data + bytes(4))
    assert f"tensor '{Q0}' leaves a hole before it" in error(folder)


def test_quantized(folder: Path) -> None:
    edit(folder, lambda t: t.update({Q0.replace("weight", "qweight"): torch.ones(8, 8, dtype=torch.int32)}))
    message = error(folder)
    assert "q_proj.qweight'" in message and "neither config.json nor quantize_config.json says" in message


def test_quantized_by_config_alone(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (folder / "config.json").write_text(json.dumps(config))
    message = error(folder)
    assert "config.json: says that it is a gptq checkpoint, but no layer is stored quantized" in message
    assert "export the unquantized checkpoint" in message


def test_pickle_only(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    assert "no model.safetensors" in error(folder)
    torch.save({"a": torch.ones(1)}, folder / "pytorch_model-00001-of-00002.bin")
    message = error(folder)
    assert "pytorch_model-00001-of-00002.bin: a pickle, which runs code when it is read" in message
    assert "convert it" in message


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite(dtype: str, value: float, tmp_path: Path) -> None:
    save(tmp_path, dtype=DTYPES[dtype])

    def poison(tensors: dict[str, torch.Tensor]) -> None:
        tensors[Q0][3, 7] = value

    edit(tmp_path, poison)
    with Checkpoint.open(tmp_path) as checkpoint:
        with pytest.raises(CheckpointError, match=rf"model.safetensors: tensor '{Q0}' holds {value} at \[3, 7\]"):
            checkpoint.read(Q0)
        with pytest.raises(CheckpointError, match=rf"holds {value} at \[3, 7\]"):
            checkpoint.rows(Q0, 2, 5)
        assert checkpoint.rows(Q0, 0, 3).shape == (3, 64)


def test_rows_out_of_range(saved: Path) -> None:
    with Checkpoint.open(saved) as checkpoint:
        assert checkpoint.rows(Q0, 64, 64).shape == (0, 64)
        assert checkpoint.rows("visual.patch_embed.proj.weight", 1, 3).shape == (2, 1176)
        assert checkpoint.rows("model.norm.weight", 0, 64).shape == (64, 1)
        for start, stop in ((-1, 3), (5, 4), (0, 65)):
            with pytest.raises(IndexError):
                checkpoint.rows(Q0, start, stop)
    with pytest.raises(ValueError, match="closed"):
        checkpoint.read(Q0)


def test_other_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("x")
    assert "file: a file, expected the checkpoint's folder" in error(tmp_path / "file")
    assert "no such folder, and not a hub id" in error(tmp_path / "nowhere")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)  # as where it is not installed
    with pytest.raises(CheckpointError, match=r"owner/name: no such folder; .*pip install 'edgevl\[hub\]'"):
        Checkpoint.open("owner/name")


def in_process(code: str, **environment: str) -> str:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", **environment}
    return subprocess.run([sys.executable, "-c", code], env=env, check=True, capture_output=True, text=True).stdout


def test_hub_id(saved: Path, tmp_path: Path) -> None:
    """Offline, the hub client gives what its cache has: reached and not reached without a network."""
    cache = tmp_path / "hub" / "models--owner--tiny"
    (cache / "refs").mkdir(parents=True)
    commit = "0123456789abcdef0123456789abcdef01234567"
    (cache / "refs" / "main").write_text(commit)
    shutil.copytree(saved, cache / "snapshots" / commit)
    code = (
        "from edgevl.runtime.checkpoint import Checkpoint, CheckpointError\n"
        "print(len(Checkpoint.open('owner/tiny').names()))\n"
        "try: Checkpoint.open('owner/absent')\n"
        "except CheckpointError as e: print(e)\n"
    )
    first, second = in_process(code, HF_HUB_OFFLINE="1", HF_HUB_CACHE=str(tmp_path / "hub")).splitlines()
    assert first == str(len(Checkpoint.open(saved).names()))
    assert second.startswith("owner/absent: no such folder, and the hub did not give it: ")


# VmHWM, because the peak that getrusage gives is inherited from the parent process.
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_memory_is_bounded_by_one_tensor(tmp_path: Path) -> None:
    """280 MB of sparse bfloat16, read whole: the peak grows by the largest tensor (105 MB) and little more."""
    hidden, vocab = 1024, 12288
    config = released()
    config.update(hidden_size=hidden, intermediate_size=8192, num_attention_heads=8, num_hidden_layers=3)
    config.update(vocab_size=vocab)
    config["vision_config"].update(hidden_size=hidden, depth=1)
    (tmp_path / "config.json").write_text(json.dumps(config))
    header, at = {}, 0
    for name, shape in expected_shapes(ModelConfig.from_hf(config, {})).items():
        size = int(np.prod(shape)) * 2
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    write_raw(tmp_path / "model.safetensors", header, b"")
    path = tmp_path / "model.safetensors"
    os.truncate(path, path.stat().st_size + at)
    largest = 5120 * 5120 * 4  # visual.merger.mlp.0
    assert 2.2e8 < at < 3.2e8
    code = (
        "import re\n"
        "from edgevl.runtime.checkpoint import Checkpoint\n"
        "peak = lambda: 1024 * int(re.search(r'VmHWM:\\s*(\\d+)', open('/proc/self/status').read())[1])\n"
        f"checkpoint = Checkpoint.open({str(tmp_path)!r})\n"
        "before = peak()\n"
        "for name in checkpoint.names():\n"
        "    for at in range(0, checkpoint.shape(name)[0], 256):\n"
        "        checkpoint.rows(name, at, min(at + 256, checkpoint.shape(name)[0]))\n"
        "rows = peak() - before\n"
        "for name in checkpoint.names(): checkpoint.read(name)\n"
        "print(rows, peak() - before)\n"
    )
    rows, whole = map(int, in_process(code).split())
    # The allocator may keep freed blocks of up to 32 MB; the file mapped, or a copy of the largest, would be 105 more.
    assert rows < 16e6 + 256 * 8192 * 4 and largest * 0.9 < whole < largest + 48e6, (rows, whole)


def test_several_threads(tmp_path: Path) -> None:
    save(tmp_path, max_shard_size="100KB")
    with Checkpoint.open(tmp_path) as checkpoint, ThreadPoolExecutor(8) as pool:
        names = checkpoint.names()
        alone = [checkpoint.read(name) for name in names]
        for values in pool.map(lambda _: [checkpoint.read(name) for name in names], range(16)):
            assert all(np.array_equal(a, b) for a, b in zip(alone, values, strict=True))
