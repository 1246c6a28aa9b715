"""Writes Qwen2-VL checkpoints of true shape with random weights, for timing where the released ones cannot be had.

    python -m edgevl.benchmarks.random_checkpoint FOLDER --shape 2b

Files, layout, names, special tokens and settings are those of the release, so latency and memory are too; the answers
are noise. The vocabulary has the release's size: the demo model's byte-pair tokens, then dummy words that text is never
split into but that a random model says. Weights stream to disk: memory does not grow with the model.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import click
import numpy as np
from tqdm import tqdm

from edgevl.runtime.errors import EdgeVLError, InputError

__all__ = ["SHAPES", "released_config", "released_tokenizer", "write_random_checkpoint"]

DEMO = Path(__file__).resolve().parent.parent / "demo" / "model"

# hidden, intermediate, layers, heads, key/value heads, vocabulary, tied, vision depth, vision width, vision heads
SHAPES: dict[str, tuple[int, int, int, int, int, int, bool, int, int, int]] = {
    "tiny": (64, 96, 2, 4, 2, 512, True, 2, 32, 2),
    "2b": (1536, 8960, 28, 12, 2, 151936, True, 32, 1280, 16),
    "7b": (3584, 18944, 28, 28, 4, 152064, False, 32, 1280, 16),
    "72b": (8192, 29568, 80, 64, 8, 152064, False, 32, 1280, 16),
}
DTYPES = {"bf16": ("BF16", "bfloat16", 2), "fp16": ("F16", "float16", 2), "fp32": ("F32", "float32", 4)}
SHARD_BYTES = 2_000_000_000
POOL = 16_777_213  # random numbers drawn once (prime, so that windows into it do not line up with rows)
CHUNK = 1 << 21  # numbers scaled, rounded and written at once
SPREAD = 0.02  # standard deviation of biases
FIRST_SPECIAL = 151643  # id of <|endoftext|> in the release; the others follow in the demo tokenizer's order


def released_config(
    shape: str, layers: int | None = None, vision_depth: int | None = None, dtype: str = "bf16"
) -> dict[str, Any]:
    """The flat `config.json` of the release for a shape of `SHAPES`, with other depths if given."""
    hidden, inter, depth, heads, kv_heads, vocab, tied, v_depth, v_width, v_heads = SHAPES[shape]
    half = hidden // heads // 2
    sections = [half - 2 * (half * 3 // 8), half * 3 // 8, half * 3 // 8]  # [16, 24, 24] of 64
    first = 417 if shape == "tiny" else FIRST_SPECIAL  # tiny has the demo model's vocabulary
    return {
        "architectures": ["Qwen2VLForConditionalGeneration"],
        "attention_dropout": 0.0,
        "bos_token_id": first,
        "eos_token_id": first + 2,
        "vision_start_token_id": first + 9,
        "vision_end_token_id": first + 10,
        "vision_token_id": first + 11,
        "image_token_id": first + 12,
        "video_token_id": first + 13,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "initializer_range": 0.02,
        "intermediate_size": inter,
        "max_position_embeddings": 32768,
        "max_window_layers": depth,
        "model_type": "qwen2_vl",
        "num_attention_heads": heads,
        "num_hidden_layers": layers or depth,
        "num_key_value_heads": kv_heads,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "sliding_window": 32768,
        "tie_word_embeddings": tied,
        "torch_dtype": DTYPES[dtype][1],
        "use_cache": True,
        "use_sliding_window": False,
        "vision_config": {
            "depth": vision_depth or v_depth,
            "embed_dim": v_width,
            "mlp_ratio": 4,
            "num_heads": v_heads,
            "in_chans": 3,
            "hidden_size": hidden,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "spatial_patch_size": 14,
            "temporal_patch_size": 2,
        },
        "rope_scaling": {"type": "mrope", "mrope_section": sections},
        "vocab_size": vocab,
    }


def _tensors(config: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...], float, float]]:
    """(name, shape, mean, standard deviation) in the release's order; variances keep activations near 1."""
    hidden, inter, layers = config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]
    heads, kv_heads, vocab = config["num_attention_heads"], config["num_key_value_heads"], config["vocab_size"]
    vision = config["vision_config"]
    depth, width = vision["depth"], vision["embed_dim"]
    fc, merged, kv = width * vision["mlp_ratio"], width * vision["spatial_merge_size"] ** 2, hidden // heads * kv_heads

    def linear(name: str, out: int, into: int, bias: bool, last_of: int = 0) -> Iterator[Any]:
        # Whatever is added to the residual stream is divided by the root of the number of additions (GPT-2, 2.3).
        yield f"{name}.weight", (out, into), 0.0, (into * max(1, 2 * last_of)) ** -0.5
        if bias:
            yield f"{name}.bias", (out,), 0.0, SPREAD

    yield "model.embed_tokens.weight", (vocab, hidden), 0.0, hidden**-0.5
    for layer in (f"model.layers.{i}" for i in range(layers)):
        yield f"{layer}.input_layernorm.weight", (hidden,), 1.0, 0.0
        yield from linear(f"{layer}.self_attn.q_proj", hidden, hidden, True)
        yield from linear(f"{layer}.self_attn.k_proj", kv, hidden, True)
        yield from linear(f"{layer}.self_attn.v_proj", kv, hidden, True)
        yield from linear(f"{layer}.self_attn.o_proj", hidden, hidden, False, last_of=layers)
        yield f"{layer}.post_attention_layernorm.weight", (hidden,), 1.0, 0.0
        yield from linear(f"{layer}.mlp.gate_proj", inter, hidden, False)
        yield from linear(f"{layer}.mlp.up_proj", inter, hidden, False)
        yield from linear(f"{layer}.mlp.down_proj", hidden, inter, False, last_of=layers)
    yield "model.norm.weight", (hidden,), 1.0, 0.0
    patch = (width, vision["in_chans"], vision["temporal_patch_size"], vision["patch_size"], vision["patch_size"])
    yield "visual.patch_embed.proj.weight", patch, 0.0, float(np.prod(patch[1:])) ** -0.5
    for block in (f"visual.blocks.{i}" for i in range(depth)):
        for norm in ("norm1", "norm2"):
            yield f"{block}.{norm}.weight", (width,), 1.0, 0.0
            yield f"{block}.{norm}.bias", (width,), 0.0, SPREAD
        yield from linear(f"{block}.attn.qkv", 3 * width, width, True)
        yield from linear(f"{block}.attn.proj", width, width, True, last_of=depth)
        yield from linear(f"{block}.mlp.fc1", fc, width, True)
        yield from linear(f"{block}.mlp.fc2", width, fc, True, last_of=depth)
    yield "visual.merger.ln_q.weight", (width,), 1.0, 0.0
    yield "visual.merger.ln_q.bias", (width,), 0.0, SPREAD
    yield from linear("visual.merger.mlp.0", merged, merged, True)
    yield from linear("visual.merger.mlp.2", hidden, merged, True)
    if not config["tie_word_embeddings"]:
        yield "lm_head.weight", (vocab, hidden), 0.0, hidden**-0.5


class _Noise:
    """Normal numbers by the gigabyte: windows at random places of one pool, scaled."""

    def __init__(self, seed: int, dtype: str, largest: int) -> None:
        self._rng = np.random.default_rng(seed)
        self._pool = self._rng.standard_normal(min(POOL, 2 * largest) + CHUNK, np.float32)
        self._dtype = dtype

    def write(self, file: BinaryIO, count: int, mean: float, deviation: float) -> None:
        """`count` numbers to `file`, little-endian."""
        for start in range(0, count, CHUNK):
            size = min(CHUNK, count - start)
            if deviation:
                at = int(self._rng.integers(0, len(self._pool) - CHUNK))
                numbers = self._pool[at : at + size] * np.float32(deviation)
            else:
                numbers = np.full(size, mean, np.float32)
            file.write(_stored(numbers, self._dtype).data)


def _stored(numbers: np.ndarray, dtype: str) -> np.ndarray:
    """float32 in place to the stored form; bfloat16 rounds half to even, as its bit patterns."""
    if dtype == "bf16":
        bits = numbers.view(np.uint32)
        bits += np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
        bits >>= np.uint32(16)
        return bits.astype("<u2")
    return numbers.astype("<f2" if dtype == "fp16" else "<f4")


def _shards(tensors: list[Any], item_size: int) -> list[list[Any]]:
    """Tensors in order, cut before the shard that would grow over SHARD_BYTES."""
    shards: list[list[Any]] = [[]]
    used = 0
    for tensor in tensors:
        size = int(np.prod(tensor[1])) * item_size
        if shards[-1] and used + size > SHARD_BYTES:
            shards.append([])
            used = 0
        shards[-1].append(tensor)
        used += size
    return shards


def _header(tensors: list[Any], stored: str, item_size: int) -> bytes:
    lines: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, shape, _, _ in tensors:
        end = position + int(np.prod(shape)) * item_size
        lines[name] = {"dtype": stored, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(lines, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _write_weights(folder: Path, config: dict[str, Any], dtype: str, seed: int) -> None:
    stored, _, item_size = DTYPES[dtype]
    tensors = list(_tensors(config))
    sizes = [int(np.prod(shape)) for _, shape, _, _ in tensors]
    shards = _shards(tensors, item_size)
    noise = _Noise(seed, dtype, max(sizes))
    index: dict[str, str] = {}
    total = sum(sizes) * item_size
    with tqdm(total=total, unit="B", unit_scale=True, file=sys.stderr, disable=None, desc="weights") as bar:
        for number, shard in enumerate(shards, 1):
            name = f"model-{number:05}-of-{len(shards):05}.safetensors" if len(shards) > 1 else "model.safetensors"
            with (folder / name).open("wb") as file:
                file.write(_header(shard, stored, item_size))
                for tensor, shape, mean, deviation in shard:
                    count = int(np.prod(shape))
                    noise.write(file, count, mean, deviation)
                    index[tensor] = name
                    bar.update(count * item_size)
    if len(shards) > 1:
        _write_json(
            folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": dict(index)}
        )


def released_tokenizer(source: Path = DEMO) -> tuple[dict[str, Any], dict[str, Any]]:
    """(tokenizer.json, tokenizer_config.json) with the demo's byte-pair merges and the release's size and special ids.

    Ordinary ids past the demo's are dummy words of a space and five letters, which no merge makes: they only come out.

    Raises:
        InputError: `source` has no tokenizer (an installed wheel has no demo folder).
    """
    tokenizer, settings = _demo_json(source, "tokenizer.json"), _demo_json(source, "tokenizer_config.json")
    vocab = tokenizer["model"]["vocab"]
    for i in range(len(vocab), FIRST_SPECIAL):
        letters = "".join(chr(ord("a") + i // 26**power % 26) for power in (2, 1, 0))
        word = f"Ġ{'bcdfghjklmnpqrstvwxz'[i // 26**3]}{letters}q"
        if word in vocab:
            raise InputError(f"{source / 'tokenizer.json'}: holds {word!r}, which a dummy token needs")
        vocab[word] = i
    for i, token in enumerate(tokenizer["added_tokens"]):
        token["id"] = FIRST_SPECIAL + i
    settings["added_tokens_decoder"] = {
        str(token["id"]): {key: value for key, value in token.items() if key != "id"}
        for token in tokenizer["added_tokens"]
    }
    settings["model_max_length"] = 32768
    return tokenizer, settings


def _demo_json(source: Path, name: str) -> dict[str, Any]:
    try:
        return json.loads((source / name).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(
            f"{source / name}: not found; the tokenizer is derived from the demo model's, so run this from a checkout"
        ) from None


def _write_json(path: Path, value: dict[str, Any], indent: int | None = 2) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=indent) + "\n", encoding="utf-8")


def _write_side_files(folder: Path, shape: str, config: dict[str, Any]) -> None:
    """Everything but the weights."""
    _write_json(folder / "config.json", config)
    generation = {
        "bos_token_id": config["bos_token_id"],
        "pad_token_id": config["bos_token_id"],
        "do_sample": True,
        "eos_token_id": [config["eos_token_id"], config["bos_token_id"]],
        "repetition_penalty": 1.0,
        "temperature": 0.01,
        "top_p": 0.001,
        "top_k": 1,
    }
    _write_json(folder / "generation_config.json", generation)
    preprocessor = _demo_json(DEMO, "preprocessor_config.json")
    _write_json(folder / "preprocessor_config.json", {**preprocessor, "min_pixels": 3136, "max_pixels": 12845056})
    _write_json(folder / "chat_template.json", _demo_json(DEMO, "chat_template.json"))
    if shape == "tiny":
        tokenizer, settings = _demo_json(DEMO, "tokenizer.json"), _demo_json(DEMO, "tokenizer_config.json")
    else:
        tokenizer, settings = released_tokenizer()
    _write_json(folder / "tokenizer.json", tokenizer, indent=None)
    _write_json(folder / "tokenizer_config.json", settings)
    _write_json(folder / "vocab.json", tokenizer["model"]["vocab"], indent=None)
    shutil.copyfile(DEMO / "merges.txt", folder / "merges.txt")


def write_random_checkpoint(
    folder: str | Path,
    shape: str,
    layers: int | None = None,
    vision_depth: int | None = None,
    seed: int = 0,
    dtype: str = "bf16",
) -> Path:
    """Write a checkpoint to `folder`, which appears only when it is complete; the same arguments, the same bytes.

    Raises:
        InputError: `folder` exists, an unknown shape or dtype, a depth below 1, too little disk space, no demo model.
    """
    folder = Path(folder)
    if shape not in SHAPES or dtype not in DTYPES:
        raise InputError(f"shape {shape!r}, dtype {dtype!r}: expected one of {[*SHAPES]} and one of {[*DTYPES]}")
    if any(depth is not None and depth < 1 for depth in (layers, vision_depth)):
        raise InputError(f"layers {layers}, vision depth {vision_depth}: expected at least 1")
    if folder.exists():
        raise InputError(f"{folder}: exists; name a new folder or remove it")
    config = released_config(shape, layers, vision_depth, dtype)
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
    partial.mkdir(parents=True)
    try:
        needed = sum(int(np.prod(tensor[1])) for tensor in _tensors(config)) * DTYPES[dtype][2]
        free = shutil.disk_usage(partial).free
        if free < needed * 1.01:
            raise InputError(f"{folder}: {needed / 1e9:.1f} GB needed, {free / 1e9:.1f} GB free; choose another disk")
        _write_side_files(partial, shape, config)
        _write_weights(partial, config, dtype, seed)
        partial.rename(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return folder


@click.command(help="Write a Qwen2-VL checkpoint with random weights to FOLDER, which must not exist.")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--shape", type=click.Choice([*SHAPES]), default="2b", show_default=True)
@click.option("--layers", type=click.IntRange(1), help="Decoder layers, if not the shape's own.")
@click.option("--vision-depth", type=click.IntRange(1), help="Vision blocks, if not the shape's own.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@click.option("--dtype", type=click.Choice([*DTYPES]), default="bf16", show_default=True)
def main(folder: Path, shape: str, layers: int | None, vision_depth: int | None, seed: int, dtype: str) -> None:
    start = time.perf_counter()
    try:
        write_random_checkpoint(folder, shape, layers, vision_depth, seed, dtype)
    except EdgeVLError as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(e.exit_status)
    except OSError as e:
        print(f"error: {folder}: cannot be written ({e.strerror}); name another folder", file=sys.stderr)
        sys.exit(2)
    size = sum(file.stat().st_size for file in folder.iterdir())
    print(f"{folder}: {size / 1e9:.2f} GB in {time.perf_counter() - start:.1f} s")


if __name__ == "__main__":
    main()
