"""GPTQModel reads a checkpoint of `edgevl quantize` and gives the logits of its weights dequantized by the textbook.

Outside `make test`, in an environment of its own (GPTQModel pins numpy and compiles a packer):

    python -m venv gptqmodel && gptqmodel/bin/pip install torch setuptools wheel ninja numpy
    gptqmodel/bin/pip install --no-build-isolation gptqmodel
    edgevl quantize demo/model -o q --recipe gptq-int4 --images pictures
    gptqmodel/bin/python tests/external/gptqmodel_logits.py demo/model q
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # its thread pools ask for two where there are two cores

import numpy as np
import torch
import transformers
from safetensors.torch import load_file, save_file


class _NoProcessor:
    """AutoProcessor wants torchvision, which nothing here needs."""

    @classmethod
    def from_pretrained(cls, *_: Any, **__: Any) -> None:
        return None


transformers.AutoProcessor = _NoProcessor


def dequantized(folder: Path) -> dict[str, torch.Tensor]:
    """W[n, k] = (q[k, n] - z[g_idx[k], n]) * s[g_idx[k], n] of every layer, float32, by the plain weight's name."""
    said = json.loads((folder / "config.json").read_text())["quantization_config"]
    one = 0 if said["checkpoint_format"] == "gptq_v2" else 1  # version 1 stores zero points less one
    tensors = {k: v for f in sorted(folder.glob("*.safetensors")) for k, v in load_file(f).items()}
    out = {}
    for name in [k.removesuffix(".qweight") for k in tensors if k.endswith(".qweight")]:
        words, zeros, scales, g_idx = (tensors.pop(f"{name}.{p}") for p in ("qweight", "qzeros", "scales", "g_idx"))
        bits = 32 * len(words) // len(g_idx)
        shifts = torch.arange(0, 32, bits)
        q = ((words[:, None] >> shifts[:, None]) & (2**bits - 1)).flatten(0, 1)  # [K, N]
        z = ((zeros[:, :, None] >> shifts) & (2**bits - 1)).flatten(1) + one  # [G, N]
        out[f"{name}.weight"] = ((q - z[g_idx.long()]) * scales.float()[g_idx.long()]).T
    return {k: v.float() for k, v in tensors.items()} | out


def renamed(folder: Path, target: Path) -> Path:
    """A copy under the names that GPTQModel looks for: it knows transformers' of today, not the released ones."""
    shutil.copytree(folder, target)
    index = {}
    for path in sorted(target.glob("*.safetensors")):
        tensors = {}
        for name, value in load_file(path).items():
            new = name.replace("visual.", "model.visual.", 1) if name.startswith("visual.") else name
            new = (
                new.replace("model.", "model.language_model.", 1)
                if new.startswith(("model.l", "model.e", "model.n"))
                else new
            )
            tensors[new], index[new] = value, path.name
        save_file(tensors, path, {"format": "pt"})
    (target / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return target


def inputs(config: Any) -> dict[str, torch.Tensor]:
    """A picture of random pixels and random words."""
    rng = np.random.default_rng(0)
    grid = torch.tensor([[1, 6, 8]])
    count = 6 * 8 // 4
    words = [int(i) for i in rng.integers(0, 400, 40)]
    picture = [config.vision_start_token_id, *[config.image_token_id] * count, config.vision_end_token_id]
    ids = torch.tensor([[*words[:8], *picture, *words[8:]]])
    pixels = torch.from_numpy(rng.normal(size=(48, 1176)).astype(np.float32))
    kinds = (ids == config.image_token_id).int()
    return {"input_ids": ids, "pixel_values": pixels, "image_grid_thw": grid, "mm_token_type_ids": kinds}


def main(plain: Path, quantized: Path) -> int:
    from gptqmodel import BACKEND, GPTQModel

    reference = transformers.Qwen2VLForConditionalGeneration.from_pretrained(plain, dtype=torch.float32).eval()
    names = {
        k.replace("model.language_model.", "model.").replace("model.visual.", "visual."): k
        for k in reference.state_dict()
    }
    weights = {names[k]: v for k, v in dequantized(quantized).items() if k in names}
    missing = [k for k in names if "lm_head" not in k and names[k] not in weights]
    assert not missing, f"not in the quantized checkpoint: {missing[:3]}"
    original = {k: v.clone() for k, v in reference.state_dict().items()}
    reference.load_state_dict(weights, strict=False)
    # Its kernels are offered for 16 bits; they compute in the input's type, so everything is widened after loading.
    with tempfile.TemporaryDirectory() as temporary:
        copy = renamed(quantized, Path(temporary) / "renamed")
        loaded = GPTQModel.load(str(copy), device="cpu", backend=BACKEND.TORCH, dtype=torch.float16)
        loaded.model.float()
    kinds = {type(m).__name__ for m in loaded.model.modules() if hasattr(m, "qweight")}
    given = inputs(reference.config)
    with torch.no_grad():
        ours = reference(**given).logits
        theirs = loaded.model(**given).logits
        reference.load_state_dict(original)
        plain_logits = reference(**given).logits
    error = float((ours - theirs).norm() / ours.norm())
    moved = float((ours - plain_logits).norm() / ours.norm())
    shares = f"relative error {error:.1e} (quantization itself {moved:.1e})"
    print(f"gptqmodel's {', '.join(kinds)} against the textbook: {shares}")
    return 0 if kinds and error < 0.05 * moved else 1


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
