"""OpenVINO GenAI: optimum-intel exports and compresses, its pipeline of continuous batching answers.

That pipeline is what VLMPipeline wraps on a CPU; used itself it takes several requests.

The exporter's own defaults for `--weight-format`: decoder in int4 (asymmetric, groups of 128; int8 output layer) or
int8, vision encoder and embeddings in int8 (per channel) either way.
"""

from __future__ import annotations

import importlib
import io
import os
import shutil
import sys
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from edgevl.benchmarks.peers.contract import Answer, Request, chat_prompt, run_tool

__all__ = ["REQUIREMENTS", "VARIANTS", "open_model", "prepare", "prompt"]

# transformers: the exporter takes no newer one for this model.
REQUIREMENTS = [
    "torch==2.13.0",
    "torchvision==0.28.0",
    "transformers==4.57.6",
    "optimum-intel==2.2.0",
    "nncf==3.4.0",
    "openvino==2026.4.1",
    "openvino-tokenizers==2026.4.1.0",
    "openvino-genai==2026.4.1.0",
    "pillow",
    "numpy",
]
VARIANTS = {
    "int4": "decoder int4, groups of 128, asymmetric; vision int8; 8-bit KV cache",
    "int8": "decoder int8 per channel, vision int8; 8-bit KV cache",
}
PROPERTIES = {"PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": 1}
# Activations of the decoder are quantized in groups, of 32 unless told otherwise. 128 take some 0.8 of the time to the
# first token; in int4 longer ones turn it off, in int8 640 are not shown to be better. No size changed vision's time.
GROUPS = {"int4": 128, "int8": 640}
BATCHED_TOKENS = 8192  # prompts of all requests prefilled in one step

# optimum-intel wants torchvision, of which the registry has a build for CUDA only. Its operators do not load beside a
# CPU build of torch; importing it then asks that two of them be declared, and the export calls none.
_EXPORT = """
import sys, torch
try:
    import torchvision
except RuntimeError:
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(name + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    for name in [n for n in sys.modules if n.partition(".")[0] == "torchvision"]:
        del sys.modules[name]
from optimum.commands.optimum_cli import main
main()
"""


def prepare(checkpoint: Path, folder: Path, variant: str) -> None:
    """`optimum-cli export openvino` in a process of its own (its peak: 14 GB at 2B shapes)."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    options = ["-m", str(checkpoint), "--task", "image-text-to-text", "--weight-format", variant, str(partial)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    run_tool("optimum-cli", [sys.executable, "-c", _EXPORT, "export", "openvino", *options], environment=environment)
    partial.rename(folder)


def prompt(request: Request) -> str:
    """The chat template's text, with the pipeline's tag for each picture where its tokens go."""
    pictures = "".join(f"<ov_genai_image_{i}>" for i in range(len(request.pictures)))
    return chat_prompt(request, pictures)


class _OpenVINO:
    def __init__(self, folder: Path, variant: str, threads: int) -> None:
        self._genai: Any = importlib.import_module("openvino_genai")
        self._tensor: Any = importlib.import_module("openvino").Tensor
        self.versions = {name: version(name) for name in ("openvino", "openvino-genai", "optimum-intel", "nncf")}
        properties = {
            **PROPERTIES,
            "INFERENCE_NUM_THREADS": threads,
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": GROUPS[variant],
        }
        scheduler = self._genai.SchedulerConfig()
        scheduler.max_num_batched_tokens = BATCHED_TOKENS
        create = self._genai.ContinuousBatchingPipeline
        self._pipeline: Any = create(str(folder), scheduler, "CPU", properties, {}, properties)

    def answer(self, requests: Sequence[Request], new_tokens: int) -> list[Answer]:
        """Pictures are encoded as requests are added, one after the other; all prompts are prefilled in one step."""
        config = self._genai.GenerationConfig(
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            ignore_eos=True,
            do_sample=False,
            apply_chat_template=False,  # `prompt` is the template filled in
        )
        began = time.perf_counter()
        handles = [self._add(i, r, config) for i, r in enumerate(requests)]
        added = time.perf_counter() - began
        times: list[list[float]] = [[] for _ in requests]
        while self._pipeline.has_non_finished_requests():
            self._pipeline.step()
            now = time.perf_counter() - began
            for handle, arrived in zip(handles, times):
                while handle.can_read():
                    arrived += [now] * len(handle.read()[0].generated_ids)
        return [
            _answer(h.get_vlm_perf_metrics(), tuple(t), added, bool(r.pictures))
            for h, t, r in zip(handles, times, requests)
        ]

    def _add(self, number: int, request: Request, config: Any) -> Any:
        pictures = (Image.open(io.BytesIO(p)).convert("RGB") for p in request.pictures)
        images = [self._tensor(np.asarray(p)) for p in pictures]
        return self._pipeline.add_request(number, prompt(request), images=images, generation_config=config)


def _answer(metrics: Any, token_s: tuple[float, ...], added_s: float, seen: bool) -> Answer:
    """metrics: VLMPerfMetrics, in milliseconds; embeddings are prepared by the encoder with its projector, then the
    tokens' are looked up."""
    vision = metrics.get_prepare_embeddings_duration().mean - metrics.get_text_embedding_duration().mean
    return Answer(metrics.get_num_input_tokens(), token_s, vision / 1e3 if seen else None, token_s[0] - added_s)


def open_model(folder: Path, variant: str, threads: int) -> _OpenVINO:
    return _OpenVINO(folder, variant, threads)
