"""Writes a quantized checkpoint's files: shards, index, configs, and what is copied from the original.

Weight-only layers are laid out as AutoGPTQ does, which GPTQModel, vLLM and transformers read; W8A8 as
compressed-tensors does ("int-quantized"), and so are the scales of an INT8 KV cache (`k_scale`, `v_scale`). Names are
the released ones, the rest is as it was, and `quantization_config` is in config.json (GPTQ's again in
quantize_config.json).
"""

from __future__ import annotations

import importlib.metadata
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from edgevl.calibration.recipes import Recipe
from edgevl.runtime.cache_scales import KV_SCHEME_KEY, cache_scheme
from edgevl.runtime.checkpoint import Checkpoint

__all__ = ["as_stored", "quantization_config", "save_shard", "shard_name", "write_rest"]

INDEX = "model.safetensors.index.json"
_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".index.json")


def shard_name(layer: int, layers: int) -> str:
    """One shard per decoder layer, then the vision encoder, then embedding, norm and head."""
    return f"model-{layer + 1:05d}-of-{layers + 2:05d}.safetensors"


def as_stored(checkpoint: Checkpoint, name: str, value: Tensor) -> Tensor:
    """A float32 tensor in the dtype in which the checkpoint holds it: exact, as it came from there."""
    return value.to(_DTYPES[checkpoint.dtype(name)])


def save_shard(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write a safetensors file under a temporary name and rename it.

    Raises:
        OSError: the disk is full, or the file cannot be written.
    """
    partial = path.with_name(f"{path.name}.partial")
    try:
        save_file({k: v.contiguous() for k, v in tensors.items()}, partial, metadata={"format": "pt"})
    except SafetensorError as e:  # it tells of the system's errors in words alone
        number = re.search(r"os error (\d+)", str(e))
        if number is None:
            raise
        raise OSError(int(number[1]), str(e)) from None
    partial.replace(path)


def quantization_config(recipe: Recipe) -> dict[str, Any]:
    """The dictionary that readers of such checkpoints look for."""
    meta = {"quantizer": [f"edgevl:{importlib.metadata.version('edgevl')}"], "recipe": recipe.name}
    said = {"w8a8": _compressed_tensors, "none": _plain}.get(recipe.method, lambda: _gptq(recipe))()
    return {**said, **({KV_SCHEME_KEY: cache_scheme()} if recipe.kv_cache else {}), "meta": meta}


def _gptq(recipe: Recipe) -> dict[str, Any]:
    """Activation order with static groups leaves g_idx trivial, so readers are told desc_act false."""
    config: dict[str, Any] = {
        "quant_method": "gptq",
        "bits": recipe.bits,
        "group_size": recipe.group_size,
        "sym": recipe.symmetric,
        "desc_act": False,
        "static_groups": True,
        "true_sequential": recipe.true_sequential,
        "damp_percent": 0.01,
        # Version 1 stores zero points less one and has no code for 0.
        "checkpoint_format": "gptq" if recipe.symmetric else "gptq_v2",
        "pack_dtype": "int32",
        "lm_head": False,
        "modules_in_block_to_quantize": None,
    }
    if recipe.down_bits and recipe.down_bits != recipe.bits:
        config["dynamic"] = {r"+:.*mlp\.down_proj.*": {"bits": recipe.down_bits}}
    return config


def _compressed_tensors() -> dict[str, Any]:
    """int8 weights per channel, activations int8 per token at run time."""
    common = {"num_bits": 8, "type": "int", "symmetric": True, "group_size": None, "actorder": None}
    return {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {**common, "strategy": "channel", "dynamic": False},
                "input_activations": {**common, "strategy": "token", "dynamic": True},
            }
        },
        "ignore": ["lm_head", "re:.*visual.*"],
    }


def _plain() -> dict[str, Any]:
    """No layer is quantized, only the cache."""
    common = {"quantization_status": "compressed", "config_groups": {}, "ignore": []}
    return {"quant_method": "compressed-tensors", "format": "dense", **common}


def write_rest(checkpoint: Checkpoint, folder: Path, layers: int, recipe: Recipe) -> None:
    """The two shards that hold no layer, the index over all shards, configs and the other files."""
    parts: tuple[list[str], list[str]] = ([], [])
    for name in checkpoint.names():
        if not name.startswith("model.layers."):
            parts[0 if name.startswith("visual.") else 1].append(name)
    for offset, names in enumerate(parts):
        path = folder / shard_name(layers + offset, layers)
        if not path.exists():
            read = ((n, torch.from_numpy(checkpoint.read(n))) for n in names)
            save_shard(path, {n: as_stored(checkpoint, n, value) for n, value in read})
    shards = [folder / shard_name(i, layers) for i in range(layers + 2)]
    weight_map = {name: shard.name for shard in shards for name in _names(shard)}
    total = sum(shard.stat().st_size for shard in shards)
    _put(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    config = json.loads((checkpoint.folder / "config.json").read_text(encoding="utf-8"))
    quantization = quantization_config(recipe)
    _put(folder / "config.json", {**config, "quantization_config": quantization})
    if quantization["quant_method"] == "gptq":
        _put(folder / "quantize_config.json", quantization)
    for path in sorted(checkpoint.folder.iterdir()):
        if path.is_file() and not path.name.endswith(_WEIGHTS) and not (folder / path.name).exists():
            shutil.copyfile(path, folder / path.name)


def _names(shard: Path) -> Iterator[str]:
    with safe_open(shard, "pt") as file:
        yield from file.keys()


def _put(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
