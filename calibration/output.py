"""Writes a quantized checkpoint's files: shards, index, configs, and what is copied from the original.

Weight-only layers are laid out as AutoGPTQ does, which GPTQModel, vLLM and transformers read; W8A8 as
compressed-tensors does ("int-quantized"), and so are the scales of an INT8 KV cache (`k_scale`, `v_scale`). GPTQ has
no word for activations, so a weight-only decoder beside an INT8 vision encoder is "pack-quantized" there, in one
checkpoint of "mixed-precision". Names are the released ones, the rest is as it was, and `quantization_config` is in
config.json (GPTQ's again in quantize_config.json).
"""

from __future__ import annotations

import importlib.metadata
import json
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from edgevl.calibration.formats import BlockQuantized
from edgevl.calibration.packing import Tensors, pack_compressed, pack_gptq
from edgevl.calibration.recipes import PLAIN, Recipe
from edgevl.runtime.cache_scales import KV_SCHEME_KEY, cache_scheme
from edgevl.runtime.output_file import match_umask
from edgevl.runtime.schemes import PRE_SCALED, ROTATION_KEY

if TYPE_CHECKING:
    from edgevl.calibration.weights import Stored

__all__ = ["as_stored", "pack_blocks", "quantization_config", "save_shard", "shard_name", "write_rest"]

INDEX = "model.safetensors.index.json"
_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
_TABLE_ROWS = 4096
# Layers over one input, and the name under which vLLM fuses them.
_FUSED = (("q_proj", "k_proj", "v_proj", "qkv_proj"), ("gate_proj", "up_proj", "gate_up_proj"))
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".index.json")


def shard_name(layer: int, layers: int) -> str:
    """One shard per decoder layer, then the vision encoder, then embedding, norm and head."""
    return f"model-{layer + 1:05d}-of-{layers + 2:05d}.safetensors"


def as_stored(checkpoint: Stored, name: str, value: Tensor) -> Tensor:
    """A float32 tensor in the dtype in which the checkpoint holds it: exact, as it came from there."""
    return value.to(_DTYPES[checkpoint.dtype(name)])


def save_shard(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write a safetensors file under a temporary name and rename it; its mode follows the umask.

    Raises:
        OSError: the disk is full, or the file cannot be written.
    """
    partial = path.with_name(f"{path.name}.partial")
    try:
        save_file({k: v.contiguous() for k, v in tensors.items()}, partial, metadata={"format": "pt"})
        match_umask(partial)
        partial.replace(path)
    except SafetensorError as e:  # it tells of the system's errors in words alone
        number = re.search(r"os error (\d+)", str(e))
        if number is None:
            raise
        raise OSError(int(number[1]), str(e)) from None
    finally:
        partial.unlink(missing_ok=True)


def _is_gptq(recipe: Recipe) -> bool:
    return recipe.method in ("gptq", "rtn") and recipe.vision == "none"


def _is_plain(recipe: Recipe) -> bool:
    return recipe.method == "none" and recipe.vision == "none"


def pack_blocks(recipe: Recipe, codes: BlockQuantized) -> Tensors:
    """A weight-only layer in the checkpoint's format."""
    return pack_gptq(codes, 1 if recipe.symmetric else 2) if _is_gptq(recipe) else pack_compressed(codes)


def quantization_config(recipe: Recipe) -> dict[str, Any]:
    """The dictionary that readers of such checkpoints look for."""
    meta = {"quantizer": [f"edgevl:{importlib.metadata.version('edgevl')}"], "recipe": recipe.name}
    said = _gptq(recipe) if _is_gptq(recipe) else _plain() if _is_plain(recipe) else _compressed_tensors(recipe)
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


_INT8 = {"num_bits": 8, "type": "int", "symmetric": True, "group_size": None, "actorder": None}


def _w8a8(activations: str, form: str = "int-quantized") -> dict[str, Any]:
    """int8 weights per channel; activations int8 per token at run time, or per tensor with a stored scale."""
    return {
        "format": form,
        "weights": {**_INT8, "strategy": "channel", "dynamic": False},
        "input_activations": {**_INT8, "strategy": activations, "dynamic": activations == "token"},
    }


def _plain() -> dict[str, Any]:
    """No layer is quantized, only the cache."""
    common = {"quantization_status": "compressed", "config_groups": {}, "ignore": []}
    return {"quant_method": "compressed-tensors", "format": "dense", **common}


def _packed(recipe: Recipe, bits: int) -> dict[str, Any]:
    whole = recipe.group_size == -1
    weights = {
        **_INT8,
        "num_bits": bits,
        "symmetric": recipe.symmetric,
        "strategy": "channel" if whole else "group",
        "group_size": None if whole else recipe.group_size,
        "dynamic": False,
    }
    return {"format": "pack-quantized", "weights": weights, "input_activations": None}


def _compressed_tensors(recipe: Recipe) -> dict[str, Any]:
    """Schemes by what they apply to; everything else is plain."""
    schemes: list[tuple[str, dict[str, Any]]] = []
    if recipe.method == "w8a8":
        decoder = "Linear" if recipe.vision == "none" else r"re:.*layers\.\d+\..*_proj$"
        schemes.append((decoder, _w8a8(recipe.activations)))
    elif recipe.method != "none":
        others = r"re:.*layers\.\d+\..*(q|k|v|o|gate|up)_proj$"
        schemes.append((others, _packed(recipe, recipe.bits)))
        schemes.append((r"re:.*layers\.\d+\..*down_proj$", _packed(recipe, recipe.bits_of("down_proj"))))
    if recipe.vision != "none":
        scheme = behind = _w8a8("token")
        if recipe.vision == "int8-static":
            scheme, behind = _w8a8("tensor"), _w8a8("tensor", PRE_SCALED)
        schemes.append((r"re:.*visual\.blocks\.\d+\..*(qkv|proj|fc1)$", scheme))
        schemes.append((r"re:.*visual\.merger\.mlp\.0$", scheme))
        schemes.append((r"re:.*visual\.blocks\.\d+\..*fc2$", behind))
        schemes.append((r"re:.*visual\.merger\.mlp\.2$", behind))
    groups: dict[str, dict[str, Any]] = {}
    for target, scheme in schemes:  # equal ones are one group
        same = next((g for g in groups.values() if {**g, "targets": None} == {**scheme, "targets": None}), None)
        if same is None:
            groups[f"group_{len(groups)}"] = {"targets": [target], **scheme}
        else:
            same["targets"].append(target)
    formats = {g["format"] for g in groups.values()}
    return {
        "quant_method": "compressed-tensors",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": ["lm_head", *(["re:.*visual.*"] if recipe.vision == "none" else ["re:.*patch_embed.*"])],
    }


def write_rest(checkpoint: Stored, folder: Path, layers: int, recipe: Recipe, vision: Sequence[Path] = ()) -> None:
    """The two shards that hold no layer, the index over all shards, configs and the other files; `vision`: files of
    quantized parts of the vision encoder, which take the place of the original's."""
    parts: tuple[list[str], list[str]] = ([], [])
    for name in checkpoint.names():
        if not name.startswith("model.layers."):
            parts[0 if name.startswith("visual.") else 1].append(name)
    for offset, names in enumerate(parts):
        path = folder / shard_name(layers + offset, layers)
        if not path.exists():
            tensors = {n: value for file in (vision if offset == 0 else ()) for n, value in load_file(file).items()}
            done = {n.rpartition(".")[0] for n in tensors}
            for name in names:
                if name.rpartition(".")[0] not in done:
                    tensors[name] = _stored(checkpoint, name)
            save_shard(path, tensors)
    shards = [folder / shard_name(i, layers) for i in range(layers + 2)]
    weight_map = {name: shard.name for shard in shards for name in _names(shard)}
    total = sum(shard.stat().st_size for shard in shards)
    _put(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    config = json.loads((checkpoint.folder / "config.json").read_text(encoding="utf-8"))
    if recipe.rotate != "none":
        _rotated_config(config, recipe, checkpoint.config.text.tie_word_embeddings)
    if not recipe.leaves_numbers:
        config["quantization_config"] = quantization_config(recipe)
    _put(folder / "config.json", config)
    if _is_gptq(recipe):
        _put(folder / "quantize_config.json", config["quantization_config"])
    for path in sorted(checkpoint.folder.iterdir()):
        if path.is_file() and not path.name.endswith(_WEIGHTS) and not (folder / path.name).exists():
            shutil.copyfile(path, folder / path.name)


def _rotated_config(config: dict[str, Any], recipe: Recipe, tied: bool) -> None:
    """What a reader must know (whether the head is still the embedding), and what edgevl wants to know again."""
    config["tie_word_embeddings"] = tied
    text = config.get("text_config")
    if isinstance(text, dict) and "tie_word_embeddings" in text:
        text["tie_word_embeddings"] = tied
    config[ROTATION_KEY] = {"kind": recipe.rotate, "seed": recipe.rotate_seed}


def _stored(checkpoint: Stored, name: str) -> Tensor:
    """A whole tensor in its dtype; tables some rows at a time, because in float32 they are the largest of all."""
    if name not in ("model.embed_tokens.weight", "lm_head.weight"):
        return as_stored(checkpoint, name, torch.from_numpy(checkpoint.read(name)))
    rows, columns = checkpoint.config.text.vocab_size, checkpoint.config.text.hidden_size
    out = torch.empty((rows, columns), dtype=_DTYPES[checkpoint.dtype(name)])
    for i in range(0, rows, _TABLE_ROWS):
        some = checkpoint.rows(name, i, min(i + _TABLE_ROWS, rows))
        out[i : i + len(some)] = torch.from_numpy(some)
    return out


def _names(shard: Path) -> Iterator[str]:
    with safe_open(shard, "pt") as file:
        yield from file.keys()


def _put(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
