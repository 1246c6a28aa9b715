"""llm-compressor's GPTQ on the samples of `edgevl quantize`: an independent yardstick for what our recipes lose.

Outside `make test`, in an environment of its own (it pins another transformers):

    python -m venv llmc && llmc/bin/pip install torch llmcompressor tabulate jinja2
    edgevl quantize demo/model -o q --recipe gptq-int4 --images conversations.jsonl --samples 64
    PYTHONPATH=.typing llmc/bin/python tests/external/llmcompressor_gptq.py demo/model conversations.jsonl q

Calibration samples and held-out ones are those that the command took (64 and 8, seed 0), with its pixels and positions;
group 128, symmetric, 4 bits; the divergence is over held-out words, weights dequantized, everything in float32.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gptqmodel_logits import dequantized
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import GPTQModifier, QuantizationModifier
from torch.utils.data import DataLoader
from transformers import AutoTokenizer, Qwen2VLForConditionalGeneration

from edgevl.calibration.dataset import Sample, SampleSource, read_conversations

SAMPLES, HELD_OUT = 64, 8
IGNORE = ["lm_head", "re:.*visual.*"]


def inputs(sample: Sample) -> dict[str, torch.Tensor]:
    out = {
        "input_ids": torch.from_numpy(sample.ids)[None],
        "position_ids": torch.from_numpy(sample.positions)[:, None],
        "attention_mask": torch.ones(1, len(sample.ids), dtype=torch.int64),
    }
    for kind in ("image", "video"):  # a picture with one time step and a video differ in their placeholders alone
        found = [v for v in sample.vision if (v.grid.t > 1) == (kind == "video")]
        if found:
            key = "pixel_values" if kind == "image" else "pixel_values_videos"
            out[key] = torch.from_numpy(np.concatenate([v.pixel_values for v in found]))
            out[f"{kind}_grid_thw"] = torch.tensor([[v.grid.t, v.grid.h, v.grid.w] for v in found])
    return out


def logits(model: Any, samples: list[Sample]) -> list[torch.Tensor]:
    with torch.no_grad():
        return [model(**inputs(s), use_cache=False).logits[0][torch.from_numpy(~s.visual)].double() for s in samples]


def divergence(original: list[torch.Tensor], other: list[torch.Tensor]) -> str:
    p, q = (torch.log_softmax(torch.cat(x), -1) for x in (original, other))
    same = (p.argmax(-1) == q.argmax(-1)).double().mean()
    return f"KL {float((p.exp() * (p - q)).sum(-1).mean()):.4f}, same top token {float(same):.1%} of {len(p)}"


def main(plain: Path, conversations: Path, *quantized: Path) -> None:
    def load() -> Any:
        return Qwen2VLForConditionalGeneration.from_pretrained(plain, dtype=torch.float32).eval()

    found = SampleSource(plain).samples(read_conversations(conversations), SAMPLES + HELD_OUT, 0)
    held_out, samples = found[:HELD_OUT], found[HELD_OUT:]
    original = logits(load(), held_out)
    for folder in quantized:
        model = load()
        names = {
            k.replace("model.language_model.", "model.").replace("model.visual.", "visual."): k
            for k in model.state_dict()
        }
        model.load_state_dict({names[k]: v for k, v in dequantized(folder).items() if k in names}, strict=False)
        print(f"edgevl, {folder.name}: {divergence(original, logits(model, held_out))}", flush=True)
    anything: Any = samples  # a list will do
    loader = DataLoader(anything, batch_size=1, collate_fn=lambda batch: inputs(batch[0]))
    modifiers = {"GPTQ": GPTQModifier, "round to nearest": QuantizationModifier}
    for name, modifier in modifiers.items():
        model = load()
        oneshot(
            model=model,
            processor=AutoTokenizer.from_pretrained(plain),  # of Qwen2-VL's the video part wants torchvision
            dataset=loader,
            recipe=modifier(targets="Linear", scheme="W4A16", ignore=IGNORE),
            num_calibration_samples=len(samples),
        )
        print(f"llm-compressor, {name}: {divergence(original, logits(model, held_out))}", flush=True)


if __name__ == "__main__":
    main(*(Path(a) for a in sys.argv[1:]))
