"""Random checkpoints: read by transformers and by Checkpoint, shaped as the release, repeatable, atomic."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import DEMO
from safetensors.torch import load_file
from test_config import RELEASED, released
from tokenizers import Tokenizer
from transformers import AutoTokenizer, Qwen2VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from edgevl.benchmarks import random_checkpoint
from edgevl.benchmarks.random_checkpoint import released_config, released_tokenizer, write_random_checkpoint
from edgevl.runtime.checkpoint import Checkpoint, expected_shapes
from edgevl.runtime.config import ModelConfig
from edgevl.runtime.errors import InputError


def load(folder: Path) -> tuple[Qwen2VLForConditionalGeneration, dict[str, Any]]:
    loaded: Any = Qwen2VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    return loaded


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_checkpoint(tmp_path_factory.mktemp("random") / "tiny", "tiny")


def test_transformers_loads_and_runs_it(tiny: Path) -> None:
    model, info = load(tiny)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    ids = torch.tensor([[417, 426, *[429] * 4, 427, 5, 6, 7]])
    inputs = {"pixel_values": torch.randn(16, 1176), "image_grid_thw": torch.tensor([[1, 4, 4]])}
    with torch.no_grad():
        logits = model.eval()(input_ids=ids, mm_token_type_ids=(ids == 429).int(), **inputs).logits
    assert logits.isfinite().all() and 0.2 < logits.std() < 5


def test_checkpoint_reads_the_same_values(tiny: Path) -> None:
    stored = load_file(tiny / "model.safetensors")
    with Checkpoint.open(tiny) as checkpoint:
        assert set(checkpoint.names()) == set(stored)
        for name, theirs in stored.items():
            assert theirs.dtype == torch.bfloat16 and np.array_equal(checkpoint.read(name), theirs.float().numpy())
        up = checkpoint.read("model.layers.0.mlp.up_proj.weight")
        assert abs(up.std() * 64**0.5 - 1) < 0.05 and abs(up.mean()) < 0.01
        assert (checkpoint.read("model.norm.weight") == 1).all()


@pytest.mark.parametrize("size", RELEASED)
def test_config_is_the_released_one(size: str) -> None:
    assert released_config(size) == released(size)


@pytest.mark.parametrize("size", [*RELEASED, "tiny"])
def test_shapes_are_those_of_the_config(size: str) -> None:
    config = released_config(size, layers=3, vision_depth=2)
    shapes = {name: shape for name, shape, _, _ in random_checkpoint._tensors(config)}
    assert shapes == expected_shapes(ModelConfig.from_hf(config, {}))


def test_the_2b_has_as_many_numbers_as_the_release() -> None:
    assert sum(int(np.prod(t[1])) for t in random_checkpoint._tensors(released_config("2b"))) == 2_208_985_600


def test_depths_dtypes_and_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(random_checkpoint, "SHARD_BYTES", 100_000)
    for dtype, stored in (("bf16", "BF16"), ("fp16", "F16"), ("fp32", "F32")):
        folder = write_random_checkpoint(tmp_path / dtype, "tiny", layers=5, vision_depth=1, dtype=dtype)
        assert len(list(folder.glob("*.safetensors"))) > 2
        model, info = load(folder)
        assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
        values = {name.replace(".language_model", ""): value for name, value in model.state_dict().items()}
        with Checkpoint.open(folder) as checkpoint:
            assert checkpoint.config.text.num_hidden_layers == 5 and checkpoint.config.vision.depth == 1
            name = "model.layers.4.mlp.down_proj.weight"
            assert checkpoint.dtype(name) == stored
            assert np.array_equal(checkpoint.read(name), values[name].numpy())


def test_same_seed_same_bytes_and_no_two_layers_alike(tiny: Path, tmp_path: Path) -> None:
    again = write_random_checkpoint(tmp_path / "again", "tiny")
    assert {f.name: f.read_bytes() for f in again.iterdir()} == {f.name: f.read_bytes() for f in tiny.iterdir()}
    other = write_random_checkpoint(tmp_path / "other", "tiny", seed=1)
    assert (other / "model.safetensors").read_bytes() != (tiny / "model.safetensors").read_bytes()
    with Checkpoint.open(tiny) as checkpoint:
        first, second = (checkpoint.read(f"model.layers.{i}.mlp.up_proj.weight") for i in (0, 1))
    assert abs(np.corrcoef(first.ravel(), second.ravel())[0, 1]) < 0.1


def test_bfloat16_rounds_as_torch() -> None:
    numbers = np.random.default_rng(0).standard_normal(100_000).astype(np.float32)
    numbers[:4] = [0.0, -0.0, 1.00390625, 1.01171875]  # the last two lie half way
    theirs = torch.from_numpy(numbers.copy()).bfloat16().view(torch.int16).numpy().view(np.uint16)
    assert np.array_equal(random_checkpoint._stored(numbers.copy(), "bf16"), theirs)


SPECIALS = {
    "<|endoftext|>": 151643,
    "<|im_start|>": 151644,
    "<|im_end|>": 151645,
    "<|object_ref_start|>": 151646,
    "<|object_ref_end|>": 151647,
    "<|box_start|>": 151648,
    "<|box_end|>": 151649,
    "<|quad_start|>": 151650,
    "<|quad_end|>": 151651,
    "<|vision_start|>": 151652,
    "<|vision_end|>": 151653,
    "<|vision_pad|>": 151654,
    "<|image_pad|>": 151655,
    "<|video_pad|>": 151656,
}


def test_tokenizer_has_the_released_ids(tmp_path: Path) -> None:
    tokenizer, settings = released_tokenizer()
    ours, demo = Tokenizer.from_str(json.dumps(tokenizer)), Tokenizer.from_file(str(DEMO / "tokenizer.json"))
    assert ours.get_vocab_size() == 151657 and {name: ours.token_to_id(name) for name in SPECIALS} == SPECIALS
    text = "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>Which shapes? bbaaq 12,(3) 你好🙂<|im_end|>\n"
    expected = [i if i < 417 else i - 417 + 151643 for i in demo.encode(text).ids]
    assert ours.encode(text).ids == expected and ours.decode(expected, skip_special_tokens=False) == text
    words = [ours.decode([i]) for i in range(417, 151643, 997)]
    assert len({*words}) == len(words) and all(word.strip().isalpha() and word.isascii() for word in words)
    # transformers, which reads its own file of settings, agrees
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert theirs(text).input_ids == expected and theirs.eos_token_id == 151645


def test_side_files(tiny: Path) -> None:
    processor = Qwen2VLImageProcessorPil.from_pretrained(tiny)
    assert (processor.size["shortest_edge"], processor.size["longest_edge"]) == (3136, 12845056)
    assert "<|vision_start|>" in json.loads((tiny / "chat_template.json").read_text())["chat_template"]
    config = ModelConfig.from_folder(tiny)
    assert config.tokens.eos_token_ids == (419, 417) and config.generation["top_k"] == 1
    assert (
        Tokenizer.from_file(str(tiny / "tokenizer.json")).token_to_id("<|image_pad|>") == config.tokens.image_token_id
    )
    files = {file.name for file in tiny.iterdir()}
    assert {"tokenizer_config.json", "vocab.json", "merges.txt", "preprocessor_config.json"} <= files


def test_atomic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stale = tmp_path / "model.partial"
    stale.mkdir()
    (stale / "rubbish").write_text("of a run that was killed")

    def fail(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(random_checkpoint._Noise, "write", fail)
        with pytest.raises(KeyboardInterrupt):
            write_random_checkpoint(tmp_path / "model", "tiny")
    assert not list(tmp_path.iterdir())
    write_random_checkpoint(tmp_path / "model", "tiny")
    assert [path.name for path in tmp_path.iterdir()] == ["model"] and not (tmp_path / "model" / "rubbish").exists()
    with pytest.raises(InputError, match=r"model: exists"):
        write_random_checkpoint(tmp_path / "model", "tiny")


def test_bad_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="shape '3b'"):
        write_random_checkpoint(tmp_path / "a", "3b")
    with pytest.raises(InputError, match="dtype 'int8'"):
        write_random_checkpoint(tmp_path / "a", "tiny", dtype="int8")
    with pytest.raises(InputError, match="layers 0"):
        write_random_checkpoint(tmp_path / "a", "tiny", layers=0)
    with pytest.raises(InputError, match="GB free; choose another disk"):
        write_random_checkpoint(tmp_path / "a", "72b", layers=10_000)
    monkeypatch.setattr(random_checkpoint, "DEMO", tmp_path / "nowhere")
    with pytest.raises(InputError, match="so run this from a checkout"):
        write_random_checkpoint(tmp_path / "a", "tiny")
    with pytest.raises(InputError, match="so run this from a checkout"):
        released_tokenizer(tmp_path / "nowhere")
    assert not list(tmp_path.iterdir())


def test_command_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "edgevl.benchmarks.random_checkpoint", str(tmp_path / "model"), "--shape", "tiny"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and str(tmp_path / "model") in done.stdout and done.stderr == ""
    assert Checkpoint.open(tmp_path / "model").config.text.num_hidden_layers == 2
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 2 and again.stdout == "" and again.stderr.count("\n") == 1 and "exists" in again.stderr


# VmHWM, because the peak that getrusage gives is inherited from the parent process.
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_memory_is_bounded(tmp_path: Path) -> None:
    """A model of 2B width and one layer (700 MB) is written with far less memory than it has."""
    code = (
        "import re\n"
        "from edgevl.benchmarks.random_checkpoint import write_random_checkpoint\n"
        f"write_random_checkpoint({str(tmp_path / 'model')!r}, '2b', layers=1, vision_depth=1)\n"
        "print(1024 * int(re.search(r'VmHWM:\\s*(\\d+)', open('/proc/self/status').read())[1]))\n"
    )
    peak = int(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)
    assert (tmp_path / "model" / "model.safetensors").stat().st_size > 6e8
    assert peak < 3e8, peak
