"""Ours: a bundle on the CPU. `folder` is the bundle; a variant is the engine."""

from __future__ import annotations

import io
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from edgevl.benchmarks.peers.contract import Answer, Request, Unsupported

__all__ = ["REQUIREMENTS", "VARIANTS", "BundleModel", "open_model", "prepare"]

REQUIREMENTS: Sequence[str] = ()
VARIANTS: Mapping[str, str] = {
    "ort-cpu": "",
    "openvino": "vision (and prompts where the bundle has a graph for them) on OpenVINO",
}


def prepare(checkpoint: Path, folder: Path, variant: str) -> None:
    raise Unsupported(f"{folder}: no such bundle; make it with `edgevl export`")


class BundleModel:
    """A bundle on an engine, the picture cache off: no picture is asked about twice."""

    def __init__(self, folder: Path, engine: str, threads: int | None = None, cuda_graph: bool | None = None) -> None:
        from edgevl.runtime import VisionLanguageModel
        from edgevl.runtime.doctor import machine
        from edgevl.runtime.engine import GpuOptions

        options = GpuOptions(cuda_graph=cuda_graph)
        self._model = VisionLanguageModel.open(folder, engine, threads=threads, image_cache_mb=0, gpu=options)
        self.versions = {k: v for k, v in machine().items() if k.startswith(("onnxruntime", engine.split("-")[0]))}

    def answer(self, requests: Sequence[Request], new_tokens: int) -> list[Answer]:
        model, began = self._model, time.perf_counter()
        config = model.generation_config(
            max_new_tokens=new_tokens, eos_token_ids=(-1,), do_sample=False, repetition_penalty=1.0
        )
        prompts = [model.prepare(_messages(r), new_tokens) for r in requests]
        times: dict[int, list[float]] = {}
        rows, pieces = model.stream_prompts(prompts, config, began)
        for row, _ in pieces:
            times.setdefault(id(row), []).append(time.perf_counter() - began)
        return [
            Answer(len(p.ids), tuple(times[id(row)]), p.preprocess_s + p.vision_s, row.prefill_s)
            for p, row in zip(prompts, rows)
        ]


def _messages(request: Request) -> list[dict[str, Any]]:
    pictures = [{"type": "image", "image": Image.open(io.BytesIO(p))} for p in request.pictures]
    user = [*pictures, {"type": "text", "text": request.text}]
    return [{"role": "system", "content": request.system}, {"role": "user", "content": user}]


def open_model(folder: Path, variant: str, threads: int) -> BundleModel:
    return BundleModel(folder, variant, threads)
