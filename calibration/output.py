"""Writes a quantized checkpoint's files: shards, index, configs, and what is copied from the original.

Weight-only layers are laid out as AutoGPTQ does, which GPTQModel, vLLM and transformers read; W8A8 as
compressed-tensors does ("int-quantized"). Names are the released ones, the rest is as it was, and
`quantization_config` is in config.json (GPTQ's again in quantize_config.json).
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
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from edgevl.calibration.recipes import PLAIN, Recipe
from edgevl.runtime.checkpoint import Checkpoint

__all__ = ["as_stored", "quantization_config", "save_shard", "shard_name", "write_rest"]

INDEX = "model.safetensors.index.json"
_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
# Layers over one input, and the name under which vLLM fuses them.
_FUSED = (("q_proj", "k_proj", "v_proj", "qkv_proj"), ("gate_proj", "up_proj", "gate_up_proj"))
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".index.json")


def shard_name(layer: int, layers: int) -> str:
    """One shard per decoder layer, then the vision encoder, then embedding, norm and head."""
    return f"model-{layer + 1:05d}-of-{layers + 2:05d}.safetensors"


def as_stored(checkpoint: Checkpoint, name: str, value: Tensor) -> Tensor:
    """A float32 tensor in the dtype in which the checkpoint holds it: exact, as it came from there."""
    return value.to(_DTYPES[checkpoint.dtype(name)])


def save_shard(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write a safetensors file under a temporary name and rename it."""
    partial = path.with_name(f"{path.name}.partial")
    save_file({k: v.contiguous() for k, v in tensors.items()}, partial, metadata={"format": "pt"})
    partial.replace(path)


def quantization_config(recipe: Recipe) -> dict[str, Any]:
    """The dictionary that readers of such checkpoints look for."""
    meta = {"quantizer": [f"edgevl:{importlib.metadata.version('edgevl')}"], "recipe": recipe.name}
    return {**(_compressed_tensors() if recipe.method == "w8a8" else _gptq(recipe)), "meta": meta}


def _gptq(recipe: Recipe) -> dict[str, Any]:
    """Activation order with static groups leaves g_idx trivial, so readers are told desc_act false."""
    config: dict[str, Any] = {
        "quant_method": "gptq",
        "bits": recipe.bits,
        "group_size": recipe.group_size,
        "sym": recipe.symmetric,
        "desc_act": False,
        "static_groups": True,
        "true_sequential": False,
        "damp_percent": 0.01,
        "checkpoint_format": "gptq",
        "pack_dtype": "int32",
        "lm_head": False,
        "modules_in_block_to_quantize": None,
    }
    dynamic = _overrides(recipe)
    if recipe.down_bits and recipe.down_bits != recipe.bits:
        dynamic[r"+:.*mlp\.down_proj.*"] = {"bits": recipe.down_bits}
    if dynamic:
        config["dynamic"] = dynamic
    return config


def _overrides(recipe: Recipe) -> dict[str, dict[str, int]]:
    """GPTQModel's `dynamic`: patterns for re.match on module names, the first that fits counts; `-:` leaves a module
    plain. Layers over one input share a pattern that also fits the name of their product (vLLM's qkv_proj)."""
    found: dict[str, dict[str, int]] = {}
    for name, bits in recipe.overrides.items():
        block, kind = name.removeprefix("model.").rsplit(".", 1)
        *parts, fused = next((f for f in _FUSED if kind in f), (kind,))
        alike = all(recipe.bits_of(f"model.{block}.{part}") == bits for part in parts)
        kinds = (*parts, fused) if alike else (kind,)
        some = "|".join(kinds) if len(kinds) == 1 else f"({'|'.join(kinds)})"
        pattern = rf":.*{re.escape(block)}\.{some}$"
        found[f"-{pattern}" if bits == PLAIN else f"+{pattern}"] = {} if bits == PLAIN else {"bits": bits}
    return found


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
    if recipe.method != "w8a8":
        _put(folder / "quantize_config.json", quantization)
    for path in sorted(checkpoint.folder.iterdir()):
        if path.is_file() and not path.name.endswith(_WEIGHTS) and not (folder / path.name).exists():
            shutil.copyfile(path, folder / path.name)


def _names(shard: Path) -> Iterator[str]:
    with safe_open(shard, "pt") as file:
        yield from file.keys()


def _put(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
