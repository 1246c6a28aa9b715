"""OpenVINO GenAI: optimum-intel exports and compresses, VLMPipeline answers one request, continuous batching several.

The exporter's own defaults for `--weight-format`: decoder in int4 (asymmetric, groups of 128; int8 output layer) or
int8, vision encoder and embeddings in int8 (per channel) either way.
"""

from __future__ import annotations

import importlib
import io
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from edgevl.benchmarks.peers.contract import Answer, Request

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
BACKEND = "PA"
BATCHED_TOKENS = 8192  # prompts of all requests prefilled in one step

# optimum-intel wants torchvision, of which the registry has a CUDA build only. Its operators do not load beside a CPU
# build of torch; importing it only asks that two of them be declared, and the export calls none.
_EXPORT = """
import sys, torch
library = torch.library.Library("torchvision", "FRAGMENT")
for name in ("nms", "qnms"):
    if not hasattr(torch.ops.torchvision, name):
        library.define(name + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
from optimum.commands.optimum_cli import main
main()
"""


def prepare(checkpoint: Path, folder: Path, variant: str) -> None:
    """`optimum-cli export openvino` in a process of its own (its peak: 14 GB at 2B shapes)."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    options = ["-m", str(checkpoint), "--task", "image-text-to-text", "--weight-format", variant, str(partial)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, "-c", _EXPORT, "export", "openvino", *options], check=True, env=environment)
    partial.rename(folder)


def prompt(request: Request) -> str:
    """The chat template's text, with the pipeline's tag for each picture where its tokens go."""
    pictures = "".join(f"<ov_genai_image_{i}>" for i in range(len(request.pictures)))
    return (
        f"<|im_start|>system\n{request.system}<|im_end|>\n<|im_start|>user\n{pictures}{request.text}<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


class _OpenVINO:
    """One request goes through VLMPipeline, several through ContinuousBatchingPipeline; the one in use is in memory."""

    def __init__(self, folder: Path, threads: int) -> None:
        self._genai: Any = importlib.import_module("openvino_genai")
        self._tensor: Any = importlib.import_module("openvino").Tensor
        self.versions = {name: version(name) for name in ("openvino", "openvino-genai", "optimum-intel", "nncf")}
        self._folder = str(folder)
        self._properties = {**PROPERTIES, "INFERENCE_NUM_THREADS": threads}
        self._single: Any = self._genai.VLMPipeline(self._folder, "CPU", ATTENTION_BACKEND=BACKEND, **self._properties)
        self._batched: Any = None

    def answer(self, requests: Sequence[Request], new_tokens: int) -> list[Answer]:
        config = self._genai.GenerationConfig(
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            ignore_eos=True,
            do_sample=False,
            apply_chat_template=False,  # `prompt` is the template filled in
        )
        return self._one(requests[0], config) if len(requests) == 1 else self._several(requests, config)

    def _pictures(self, request: Request) -> list[Any]:
        pictures = (Image.open(io.BytesIO(p)).convert("RGB") for p in request.pictures)
        return [self._tensor(np.asarray(p)) for p in pictures]

    def _one(self, request: Request, config: Any) -> list[Answer]:
        began, clock = time.perf_counter(), _token_clock(self._genai)
        pictures = self._pictures(request)
        given = time.perf_counter() - began
        result = self._single.generate(prompt(request), images=pictures, generation_config=config, streamer=clock)
        metrics, token_s = result.perf_metrics, tuple(t - began for t in clock.times)
        embedded = metrics.get_prepare_embeddings_duration().mean / 1e3  # encoder, projector, tokens' embeddings
        vision = embedded - metrics.get_text_embedding_duration().mean / 1e3
        tokens = metrics.get_num_input_tokens()
        return [Answer(tokens, token_s, vision if pictures else None, token_s[0] - given - embedded)]

    def _several(self, requests: Sequence[Request], config: Any) -> list[Answer]:
        if self._batched is None:
            self._single = None
            scheduler = self._genai.SchedulerConfig()
            scheduler.max_num_batched_tokens = BATCHED_TOKENS
            self._batched = self._genai.ContinuousBatchingPipeline(
                self._folder, scheduler, "CPU", self._properties, {}, self._properties
            )
        began = time.perf_counter()
        handles = [
            self._batched.add_request(i, prompt(r), images=self._pictures(r), generation_config=config)
            for i, r in enumerate(requests)
        ]
        times: list[list[float]] = [[] for _ in requests]
        while self._batched.has_non_finished_requests():
            self._batched.step()
            now = time.perf_counter() - began
            for handle, arrived in zip(handles, times):
                while handle.can_read():
                    arrived += [now] * len(handle.read()[0].generated_ids)
        tokens = [h.get_vlm_perf_metrics().get_num_input_tokens() for h in handles]
        return [Answer(n, tuple(t)) for n, t in zip(tokens, times)]


def _token_clock(genai: Any) -> Any:
    """A streamer that keeps when every token came; the one for text holds some back until a word is whole."""

    class TokenClock(genai.StreamerBase):
        def __init__(self) -> None:
            super().__init__()
            self.times: list[float] = []

        def write(self, token: int | Sequence[int]) -> Any:
            now = time.perf_counter()
            self.times += [now] * (1 if isinstance(token, int) else len(token))
            return genai.StreamingStatus.RUNNING

        def end(self) -> None:
            pass

    return TokenClock()


def open_model(folder: Path, variant: str, threads: int) -> _OpenVINO:
    return _OpenVINO(folder, threads)
