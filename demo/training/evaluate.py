"""Scores on the yardstick's test split, stored as JSON with 95 % intervals.

    python -m demo.training.evaluate demo/model --out demo/eval.json --name "demo/model" [--cases 500]
        [--tasks read_1_line,where] [--variants rounding|reading|all] [--variant-cases 200] [--verify 66]

Variants round the decoder's matrices to few bits, or read pictures wrongly: evidence that the yardstick notices.
--verify compares with transformers' generate on the same pictures.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from demo.training.answer import Reading, answers, load, prepare, reading_of
from demo.training.model import Model
from edgevl.tasks import TASKS, Case, wilson

ROUNDINGS = {
    "decoder 8 bit, per channel": (8, 0),
    "decoder 4 bit, group 128": (4, 128),
    "decoder 3 bit, group 128": (3, 128),
}
READINGS = {
    "plain positions instead of M-RoPE": dict(plain_positions=True),
    "bilinear, anti-aliased": dict(resize="bilinear"),
    "bilinear, no antialias": dict(resize="bilinear, no antialias"),
    "bicubic, no antialias": dict(resize="bicubic, no antialias"),
}


def round_to_nearest(w: torch.Tensor, bits: int, group: int) -> torch.Tensor:
    """Symmetric, one scale per output row and group of inputs (0: the whole row)."""
    out, top = w.clone(), 2 ** (bits - 1) - 1
    for a in range(0, w.shape[1], group or w.shape[1]):
        v = w[:, a : a + (group or w.shape[1])]
        s = v.abs().amax(1, keepdim=True).clamp_min(1e-8) / top
        out[:, a : a + v.shape[1]] = (v / s).round().clamp(-top - 1, top) * s
    return out


def rounded(model: Model, bits: int, group: int) -> Model:
    """A copy whose decoder matrices (not the embedding) are rounded."""
    model = copy.deepcopy(model)
    for n, p in model.named_parameters():
        if n.startswith("model.layers.") and p.dim() == 2:
            p.data = round_to_nearest(p.data, bits, group)
    return model


def score_task(model: Model, name: str, n: int, reading: Reading, seed: int = 0) -> tuple[dict[str, Any], list]:
    """-> share right with its interval, mean value, token accuracy; and (case, answer) of all."""
    task = TASKS[name]
    cases = task.cases("test", n, seed)
    began = time.time()
    said, tokens = answers(model, cases, reading)
    scores = [task.score(a, c) for a, c in zip(said, cases)]
    right = sum(s.correct for s in scores)
    low, high = wilson(right, n)
    row = dict(n=n, right=right / n, interval=[low, high], value=float(np.mean([s.value for s in scores])))
    row |= dict(tokens=float(tokens[:, 0].sum() / tokens[:, 1].sum()), seconds=time.time() - began)
    rounded_row = {k: [round(x, 4) for x in v] if isinstance(v, list) else round(v, 4) for k, v in row.items()}
    return rounded_row, list(zip(cases, said))


def transformers_answers(folder: Path, cases: list[Case]) -> list[str]:
    """The same pictures through transformers' chat template, PIL processor and generate()."""
    from transformers import AutoTokenizer, Qwen2VLForConditionalGeneration
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    model = Qwen2VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    tokenizer, processor = AutoTokenizer.from_pretrained(folder), Qwen2VLImageProcessorPil.from_pretrained(folder)
    reading, out = reading_of(folder), []
    for case in cases:
        if case.video:
            frames = torch.from_numpy(prepare(case, reading)[0])
            pixels = Model().patches(frames[None]).flatten(0, 2)
            grid = torch.tensor([[len(frames) // 2, frames.shape[1] // 14, frames.shape[2] // 14]])
            seen = {"pixel_values_videos": pixels, "video_grid_thw": grid}
        else:
            limit = {"max_pixels": case.max_pixels, "min_pixels": 784} if case.max_pixels else {}
            p = processor(list(case.pictures), return_tensors="pt", **limit)
            grid = p["image_grid_thw"]
            seen = {"pixel_values": p["pixel_values"], "image_grid_thw": grid}
        text = tokenizer.apply_chat_template(case.messages, tokenize=False, add_generation_prompt=True)
        pad = "<|video_pad|>" if case.video else "<|image_pad|>"
        first, *rest = text.split(pad)
        text = first + "".join(pad * int(g.prod() // 4) + part for g, part in zip(grid, rest))
        x = tokenizer(text, return_tensors="pt")
        ids = x["input_ids"]
        kinds = (ids == model.config.image_token_id).int() + 2 * (ids == model.config.video_token_id).int()
        y = model.generate(  # pyright: ignore[reportAttributeAccessIssue]
            input_ids=ids,
            attention_mask=x["attention_mask"],
            mm_token_type_ids=kinds,
            max_new_tokens=case.max_new_tokens,
            do_sample=False,
            **seen,
        )[0, ids.shape[1] :]
        end = {tokenizer.convert_tokens_to_ids(t) for t in ("<|im_end|>", "<|endoftext|>")}
        out.append(tokenizer.decode([int(t) for t in y if int(t) not in end]))
    return out


def cpu_name() -> str:
    """Of this machine."""
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            return line.split(":")[1].strip()
    return "unknown"


def main() -> None:
    """See the module."""
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("folder", type=Path)
    ap.add_argument("--out", type=Path)
    ap.add_argument("--name", default="")
    ap.add_argument("--cases", type=int, default=500)
    ap.add_argument("--variant-cases", type=int, default=200)
    ap.add_argument("--tasks", default=",".join(TASKS))
    ap.add_argument("--variants", default="")
    ap.add_argument("--verify", type=int, default=0)
    o = ap.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    model, reading, name = load(o.folder), reading_of(o.folder), o.name or str(o.folder)
    whole = json.loads(o.out.read_text()) if o.out and o.out.exists() else {}
    mine = whole.setdefault(name, {})

    def keep(label: str, key: str, row: Any) -> None:
        mine.setdefault(label, {})[key] = row
        print(label, key, json.dumps(row), flush=True)
        if o.out:
            o.out.write_text(json.dumps(whole, indent=1) + "\n")

    names = [t for t in o.tasks.split(",") if t]
    mine["machine"] = cpu_name()
    for task in names if o.cases else []:
        keep("scores", task, score_task(model, task, o.cases, reading)[0])
    if o.cases and len(names) == len(TASKS):
        keep("mean", "right", round(float(np.mean([mine["scores"][t]["right"] for t in names])), 4))
    variants: dict[str, tuple[Model, Reading]] = {}
    if o.variants in ("rounding", "all"):
        variants |= {k: (rounded(model, *v), reading) for k, v in ROUNDINGS.items()}
    if o.variants in ("reading", "all"):
        variants |= {k: (model, replace(reading, **v)) for k, v in READINGS.items()}
    if variants:
        variants = {"as saved": (model, reading)} | variants
    for label, (m, r) in variants.items():
        for task in names:
            keep(f"variant: {label}", task, score_task(m, task, o.variant_cases, r)[0])
    if o.verify:
        each = -(-o.verify // len(names))
        cases = [c for t in names for c in TASKS[t].cases("test", each, seed=1)]
        # transformers 5 lets the text go on after rows and columns only: compare under its rule
        ours = answers(model, cases, replace(reading, time_counts=False))[0]
        theirs = transformers_answers(o.folder, cases)
        keep("transformers", "same answers", [sum(a == b for a, b in zip(ours, theirs)), len(cases)])
        keep("transformers", "differ", [[c.task, c.index, a, b] for c, a, b in zip(cases, ours, theirs) if a != b])


if __name__ == "__main__":
    main()
