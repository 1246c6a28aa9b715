"""Quantized checkpoints in other tools' layouts, written by slow loops that share nothing with the code under test."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from checkpoints import random_model, save_checkpoint
from safetensors.torch import load_file, save_file

LINEAR = re.compile(r"model\.layers\.\d+\.(self_attn|mlp)\.(\w+_proj)\.weight")
AWQ_NIBBLES = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass
class Layer:
    """`W[k, n] = (q[k, n] - z[g_idx[k], n]) * s[g_idx[k], n]`."""

    bits: int
    q: np.ndarray  # [K, N]
    z: np.ndarray  # [G, N]
    s: np.ndarray  # float16 [G, N]
    g_idx: np.ndarray  # [K]

    def weight(self) -> np.ndarray:
        """[N, K]: the formula, row by row."""
        rows = []
        for k, g in enumerate(self.g_idx):
            rows.append((self.q[k].astype(np.float32) - self.z[g].astype(np.float32)) * self.s[g].astype(np.float32))
        return np.stack(rows).T


@dataclass(frozen=True)
class Recipe:
    bits: int = 4
    group: int = 32
    symmetric: bool = True
    act_order: bool = False
    least_zero: int = 1  # 0 where the format has a code for it


def quantize(weight: np.ndarray, recipe: Recipe, order_seed: int) -> Layer:
    """Round to nearest; with act_order the columns of a group are drawn at random."""
    n, k = weight.shape
    group = k if recipe.group == -1 else recipe.group
    g_idx = np.arange(k) // group
    if recipe.act_order:
        g_idx = np.random.default_rng(order_seed).permutation(g_idx)
    groups = int(g_idx.max()) + 1
    top, middle = 2**recipe.bits - 1, 2 ** (recipe.bits - 1)
    z, s = np.full((groups, n), middle, np.int64), np.ones((groups, n), np.float16)
    q = np.zeros((k, n), np.int64)
    for g in range(groups):
        w = weight[:, g_idx == g].T
        if recipe.symmetric:
            s[g] = np.maximum(np.abs(w).max(0) / (middle - 0.5), 1e-4)
        else:
            low, high = np.minimum(w.min(0), 0), np.maximum(w.max(0), 0)
            s[g] = np.maximum((high - low) / top, 1e-4)
            z[g] = np.clip(np.rint(-low / s[g].astype(np.float32)), recipe.least_zero, top)
        q[g_idx == g] = np.clip(np.rint(w / s[g].astype(np.float32)) + z[g], 0, top)
    return Layer(recipe.bits, q, z, s, g_idx)


def words(codes: np.ndarray, bits: int, places: tuple[int, ...] | None = None) -> np.ndarray:
    """[R, C] -> int32 [R, ceil(C * bits / 32)], code by code."""
    per = 32 // bits
    out = np.zeros((codes.shape[0], -(-codes.shape[1] // per)), np.int64)
    for r in range(codes.shape[0]):
        for c in range(codes.shape[1]):
            place = c % per if places is None else places.index(c % per)
            out[r, c // per] |= int(codes[r, c]) << (bits * place)
    return out.astype(np.uint32).view(np.int32)


def gptq_tensors(layer: Layer, version: int = 1) -> dict[str, np.ndarray]:
    stored = layer.z - 1 if version == 1 else layer.z
    return {
        "qweight": words(layer.q.T, layer.bits).T,
        "qzeros": words(stored, layer.bits),
        "scales": layer.s,
        "g_idx": layer.g_idx.astype(np.int32),
    }


def awq_tensors(layer: Layer) -> dict[str, np.ndarray]:
    return {
        "qweight": words(layer.q, 4, AWQ_NIBBLES),
        "qzeros": words(layer.z, 4, AWQ_NIBBLES),
        "scales": layer.s,
    }


def packed_tensors(layer: Layer) -> dict[str, np.ndarray]:
    out = {
        "weight_packed": words(layer.q.T, layer.bits),
        "weight_scale": layer.s.T,
        "weight_shape": np.array(layer.q.T.shape, np.int64),
    }
    if (layer.z != 2 ** (layer.bits - 1)).any():
        out["weight_zero_point"] = words(layer.z, layer.bits).T
    if (np.diff(layer.g_idx) < 0).any():
        out["weight_g_idx"] = layer.g_idx.astype(np.int32)
    return out


def int8_tensors(layer: Layer) -> dict[str, np.ndarray]:
    return {"weight": (layer.q - 128).T.astype(np.int8), "weight_scale": layer.s.T}


def static_tensors(layer: Layer) -> dict[str, np.ndarray]:
    """As `int8_tensors`, with a static scale of the input, large enough for all."""
    return {**int8_tensors(layer), "input_scale": np.array([0.0625], np.float32)}


@dataclass
class Written:
    """A quantized checkpoint, and the plain one of its dequantized weights."""

    folder: Path
    plain: Path
    weights: dict[str, np.ndarray]  # canonical module -> [N, K]
    layers: dict[str, Layer]


def write(
    root: Path,
    tensors: Callable[[Layer], dict[str, np.ndarray]],
    config: dict[str, Any],
    recipe: Callable[[str], Recipe | None],
    *,
    naming: str = "released",
    dtype: torch.dtype = torch.float16,
    edit: Callable[[torch.nn.Module], None] | None = None,
    **text: Any,
) -> Written:
    """Write `root`/quantized and `root`/plain: `recipe` says how to store a layer by its name, None leaves it plain."""
    model = random_model(**{"hidden_size": 128, "intermediate_size": 256, **text})
    if edit is not None:
        edit(model)
    torch.nn.Module.to(torch.nn.Module.to(model, dtype), torch.float32)  # what is plain has the same numbers in both
    save_checkpoint(model, root / "plain")
    stored = load_file(root / "plain" / "model.safetensors")
    plain, packed = dict(stored), {n: t.to(dtype) for n, t in stored.items()}
    weights, layers = {}, {}
    for name in [n for n in stored if LINEAR.fullmatch(n)]:
        module = name.removesuffix(".weight")
        how = recipe(module)
        if how is None:
            continue
        shared = re.sub(r"[qkv]_proj$", "qkv", re.sub(r"(gate|up)_proj$", "gate_up", module))
        layer = quantize(stored[name].numpy(), how, sum(shared.encode()))
        layers[module], weights[module] = layer, layer.weight()
        del packed[name]
        packed |= {f"{module}.{k}": torch.from_numpy(np.ascontiguousarray(v)) for k, v in tensors(layer).items()}
        plain[name] = torch.from_numpy(np.ascontiguousarray(weights[module]))
    save_file(plain, root / "plain" / "model.safetensors", metadata={"format": "pt"})
    folder = root / "quantized"
    folder.mkdir()
    for path in (root / "plain").iterdir():
        if path.suffix != ".safetensors":
            (folder / path.name).write_bytes(path.read_bytes())
    if naming == "in memory":
        packed = {
            n.replace("model.", "model.language_model.", 1)
            if n.startswith("model.")
            else f"model.{n}"
            if n.startswith("visual.")
            else n: t
            for n, t in packed.items()
        }
    save_file(packed, folder / "model.safetensors", metadata={"format": "pt"})
    said = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**said, **config}))
    return Written(folder, root / "plain", weights, layers)


def gptq_config(bits: int, **changes: Any) -> dict[str, Any]:
    """As in the released Qwen2-VL GPTQ checkpoints: no list of what is left plain."""
    base = {
        "bits": bits,
        "damp_percent": 0.1,
        "dataset": None,
        "desc_act": False,
        "group_size": 128,
        "modules_in_block_to_quantize": None,
        "quant_method": "gptq",
        "sym": True,
        "true_sequential": True,
    }
    return {"quantization_config": {**base, **changes}}


def awq_config(**changes: Any) -> dict[str, Any]:
    base = {"bits": 4, "group_size": 128, "modules_to_not_convert": ["visual"], "quant_method": "awq"}
    return {"quantization_config": {**base, "version": "gemm", "zero_point": True, **changes}}


def compressed_config(
    form: str, bits: int, group: int = 32, symmetric: bool = True, inputs: str | None = None
) -> dict[str, Any]:
    weights = {"num_bits": bits, "type": "int", "symmetric": symmetric}
    weights |= (
        {"strategy": "channel", "group_size": None} if group == -1 else {"strategy": "group", "group_size": group}
    )
    activations = {"num_bits": 8, "type": "int", "dynamic": inputs == "token", "strategy": inputs} if inputs else None
    scheme = {"targets": ["Linear"], "weights": weights, "input_activations": activations, "output_activations": None}
    return {
        "quantization_config": {
            "quant_method": "compressed-tensors",
            "format": form,
            "config_groups": {"group_0": scheme},
            "ignore": ["lm_head", "re:.*visual.*"],
            "quantization_status": "compressed",
        }
    }


def all_by(recipe: Recipe) -> Callable[[str], Recipe]:
    return lambda _: recipe


def mixed(module: str) -> Recipe:
    return Recipe(8 if "down_proj" in module else 4)


def some_plain(module: str) -> Recipe | None:
    return None if module == "model.layers.1.self_attn.k_proj" else Recipe()


def some_asymmetric(module: str) -> Recipe:
    return Recipe(symmetric="k_proj" not in module and "up_proj" not in module)


def pad(model: Any) -> None:
    """As the 72B: channels of zeros among the first ones, so that the intermediate size splits over devices."""
    for layer in model.model.language_model.layers:
        with torch.no_grad():
            for at in range(1, 96, 3):
                layer.mlp.gate_proj.weight[at] = 0
                layer.mlp.up_proj.weight[at] = 0
                layer.mlp.down_proj.weight[:, at] = 0


def v2(layer: Layer) -> dict[str, np.ndarray]:
    return gptq_tensors(layer, 2)


def without_g_idx(layer: Layer) -> dict[str, np.ndarray]:
    out = gptq_tensors(layer)
    del out["g_idx"]
    return out


def early_zero_points(layer: Layer) -> dict[str, np.ndarray]:
    out = packed_tensors(layer)
    out["weight_zero_point"] = (layer.z.T - 8).astype(np.int8)
    return out


UNTIED = {"tie_word_embeddings": False}
GROUP32 = {"group_size": 32}
CASES: dict[str, tuple[str, dict[str, Any]]] = {  # name -> (decoder precision, arguments of write)
    "gptq int4, 2B": (
        "int4",
        {"tensors": gptq_tensors, "config": gptq_config(4), "recipe": all_by(Recipe(4, 128))},
    ),
    "gptq int4, 72B": (
        "int4",
        {
            "tensors": gptq_tensors,
            "config": gptq_config(4),
            "recipe": all_by(Recipe(4, 128)),
            "edit": pad,
            "intermediate_size": 384,
            **UNTIED,
        },
    ),
    "gptq int8, 7B": (
        "int8-weights",
        {"tensors": gptq_tensors, "config": gptq_config(8), "recipe": all_by(Recipe(8, 128)), **UNTIED},
    ),
    "awq, 7B": (
        "int4",
        {
            "tensors": awq_tensors,
            "config": awq_config(),
            "recipe": all_by(Recipe(4, 128, False, least_zero=0)),
            **UNTIED,
        },
    ),
    "awq, 2B, ragged": (
        "int4",
        {
            "tensors": awq_tensors,
            "config": awq_config(group_size=64),
            "recipe": all_by(Recipe(4, 64, False)),
            "hidden_size": 96,
        },
    ),
    "gptqmodel": (
        "int4",
        {
            "tensors": gptq_tensors,
            "config": gptq_config(4, checkpoint_format="gptq", pack_dtype="int32", **GROUP32),
            "recipe": all_by(Recipe()),
            "naming": "in memory",
        },
    ),
    "desc_act": (
        "int4",
        {
            "tensors": gptq_tensors,
            "config": gptq_config(4, desc_act=True, **GROUP32),
            "recipe": all_by(Recipe(act_order=True)),
        },
    ),
    "v2 asymmetric": (
        "int4",
        {
            "tensors": v2,
            "config": gptq_config(4, sym=False, checkpoint_format="gptq_v2", **GROUP32),
            "recipe": all_by(Recipe(symmetric=False, least_zero=0)),
        },
    ),
    "v1 asymmetric int8": (
        "int8-weights",
        {
            "tensors": gptq_tensors,
            "config": gptq_config(8, sym=False, **GROUP32),
            "recipe": all_by(Recipe(8, symmetric=False)),
        },
    ),
    "mixed bits": (
        "int4",
        {
            "tensors": gptq_tensors,
            "config": gptq_config(4, dynamic={r"+:.*down_proj.*": {"bits": 8}}, **GROUP32),
            "recipe": mixed,
        },
    ),
    "some layers plain": (
        "int4",
        {"tensors": gptq_tensors, "config": gptq_config(4, **GROUP32), "recipe": some_plain},
    ),
    "some layers asymmetric": (
        "int4",
        {"tensors": gptq_tensors, "config": gptq_config(4, sym=False, **GROUP32), "recipe": some_asymmetric},
    ),
    "whole columns": (
        "int4",
        {
            "tensors": without_g_idx,
            "config": gptq_config(4, group_size=-1),
            "recipe": all_by(Recipe(4, -1)),
            "intermediate_size": 224,
        },
    ),
    "groups of 48": (
        "int4",
        {
            "tensors": gptq_tensors,
            "config": gptq_config(4, group_size=48),
            "recipe": all_by(Recipe(4, 48, False)),
            "hidden_size": 96,
            "intermediate_size": 192,
        },
    ),
    "packed symmetric": (
        "int4",
        {"tensors": packed_tensors, "config": compressed_config("pack-quantized", 4), "recipe": all_by(Recipe())},
    ),
    "packed asymmetric": (
        "int4",
        {
            "tensors": packed_tensors,
            "config": compressed_config("pack-quantized", 4, symmetric=False),
            "recipe": all_by(Recipe(symmetric=False, least_zero=0)),
        },
    ),
    "packed, zero points as bytes": (
        "int4",
        {
            "tensors": early_zero_points,
            "config": compressed_config("pack-quantized", 4, symmetric=False),
            "recipe": all_by(Recipe(symmetric=False, least_zero=0)),
        },
    ),
    "packed int8 channels": (
        "int8-weights",
        {
            "tensors": packed_tensors,
            "config": compressed_config("pack-quantized", 8, -1),
            "recipe": all_by(Recipe(8, -1)),
        },
    ),
    "packed, activation order": (
        "int4",
        {
            "tensors": packed_tensors,
            "config": compressed_config("pack-quantized", 4, symmetric=False),
            "recipe": all_by(Recipe(symmetric=False, act_order=True)),
        },
    ),
    "int8 channels and activations": (
        "int8",
        {
            "tensors": int8_tensors,
            "config": compressed_config("int-quantized", 8, -1, inputs="token"),
            "recipe": all_by(Recipe(8, -1)),
        },
    ),
    "static activations": (
        "int8",
        {
            "tensors": static_tensors,
            "config": compressed_config("int-quantized", 8, -1, inputs="tensor"),
            "recipe": all_by(Recipe(8, -1)),
        },
    ),
}
