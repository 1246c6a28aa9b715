"""Checkpoints for TensorRT's builder: true widths with few layers and a small vocabulary; static W8A8."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import torch
from checkpoints import DEMO
from safetensors.torch import load_file, save_file

from edgevl.benchmarks.random_checkpoint import released_config
from edgevl.calibration.formats import quantize_channels
from edgevl.runtime.checkpoint import expected_shapes
from edgevl.runtime.config import ModelConfig

VOCABULARY = 512  # the demo tokenizer's


def shaped_checkpoint(folder: Path, shape: str, layers: int = 1, vision_depth: int = 1, **fields: Any) -> Path:
    """A checkpoint in bfloat16 of the widths of `shape` ("2b", "7b", "72b"), random weights; `fields` of its config."""
    folder.mkdir(parents=True)
    config = released_config(shape, layers, vision_depth)
    demo = json.loads((DEMO / "config.json").read_text())
    config.update({k: v for k, v in demo.items() if k.endswith("token_id")}, vocab_size=VOCABULARY, **fields)
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.json", "preprocessor_config.json"):
        shutil.copy(DEMO / name, folder / name)
    shapes = expected_shapes(ModelConfig.from_folder(folder))
    if config["tie_word_embeddings"]:
        shapes.pop("lm_head.weight", None)
    pool = np.random.default_rng(0).standard_normal(1_048_573).astype(np.float32)  # prime: rows do not line up
    header, offset = {}, 0
    for name, dims in shapes.items():
        size = int(np.prod(dims, dtype=np.int64)) * 2
        header[name] = {"dtype": "BF16", "shape": list(dims), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for name, dims in shapes.items():
            spread = dims[-1] ** -0.5 if len(dims) > 1 else 0.02
            window = (pool * spread + ("norm" in name and name.endswith("weight"))).astype(ml_dtypes.bfloat16)
            left = int(np.prod(dims, dtype=np.int64))
            while left:
                part = window[:left]
                f.write(part.tobytes())
                left -= len(part)
    return folder


STATIC_LAYERS = re.compile(
    r"(model\.layers\.\d+\.(self_attn|mlp)\.\w+_proj|visual\.blocks\.\d+\.(attn\.(qkv|proj)|mlp\.fc[12]))\.weight"
)


def static_int8_checkpoint(folder: Path, step: float = 0.0625) -> Path:
    """The demo model in W8A8 with one static scale for every activation, in the vision encoder too."""
    shutil.copytree(DEMO, folder)
    tensors = load_file(DEMO / "model.safetensors")
    out: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        if not STATIC_LAYERS.fullmatch(name):
            out[name] = tensor
            continue
        q = quantize_channels(tensor.float().numpy())
        module = name.removesuffix(".weight")
        out[name] = torch.from_numpy(q.codes)
        out[f"{module}.weight_scale"] = torch.from_numpy(q.scales[:, None])
        out[f"{module}.input_scale"] = torch.tensor([step])
    save_file(out, folder / "model.safetensors", metadata={"format": "pt"})
    weights = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
    inputs = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "tensor", "dynamic": False}
    said = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": inputs}},
        "ignore": ["lm_head"],
        "quantization_status": "compressed",
    }
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": said}))
    return folder
