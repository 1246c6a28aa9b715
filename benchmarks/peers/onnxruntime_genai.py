"""onnxruntime-genai: the decoder alone, because its model builder takes no Qwen2-VL.

The decoder's tensors have the names of a text-only Qwen2 already, so the builder is given the checkpoint's files beside
the configuration of a Qwen2: the same matrices, rotary positions of one dimension in place of three. A picture is as
many placeholder tokens as Qwen2-VL would make of it, embedded like words.
"""

from __future__ import annotations

import importlib
import io
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from edgevl.benchmarks.peers.contract import Answer, Request, Unsupported, chat_prompt, placeholders, run_tool
from edgevl.runtime.image_processing import smart_resize

__all__ = ["NO_VISION", "REQUIREMENTS", "VARIANTS", "open_model", "picture_tokens", "prepare", "prompt", "text_config"]

NO_VISION = True  # a TTFT from here is that of a prompt of the same length, not of a picture

# torch, transformers and onnx-ir are the model builder's.
REQUIREMENTS = [
    "torch==2.13.0",
    "transformers==5.24.0",
    "onnx==1.23.2",
    "onnx-ir==1.1.0",
    "onnxruntime==1.32.0",
    "onnxruntime-genai==0.18.0",
    "pillow",
    "numpy",
]
VARIANTS = {"int4": "decoder alone: no vision; int4, blocks of 128, output layer too, int8 activations"}
# Blocks of 128 took 0.74 of the time with the builder's 32, prefill and decoding alike. Logits of the last token only.
BUILD = ["accuracy_level=4", "block_size=128", "prune_lm_head=true", "fuse_mlp_gate_up=true"]
PREPROCESSOR = "preprocessor_config.json"
_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "generation_config.json")


def text_config(config: dict[str, Any]) -> dict[str, Any]:
    """config.json of the Qwen2 that is the decoder of a Qwen2-VL (either layout of its configuration)."""
    text = {**config, **config.get("text_config", {})}
    for name in [n for n in text if n.startswith(("vision_", "image_", "video_")) or n == "text_config"]:
        del text[name]
    del text["rope_scaling"]
    return {**text, "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}


def prepare(checkpoint: Path, folder: Path, variant: str) -> None:
    """The model builder, in a process of its own, on links to the checkpoint's files."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as name:
        decoder = Path(name)
        for file in [*checkpoint.glob("*.safetensors*"), *(checkpoint / f for f in _FILES)]:
            (decoder / file.name).symlink_to(file.resolve())
        config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
        (decoder / "config.json").write_text(json.dumps(text_config(config)), encoding="utf-8")
        builder = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", name, "-o", str(partial)]
        options = ["-p", "int4", "-e", "cpu", "-c", str(decoder / "cache"), "--extra_options", *BUILD]
        run_tool("the model builder", [*builder, *options], environment={**os.environ, "HF_HUB_OFFLINE": "1"})
    shutil.copy(checkpoint / PREPROCESSOR, partial)
    partial.rename(folder)


def prompt(request: Request, pictures: Sequence[int]) -> str:
    """The chat template's text; `pictures` are the token counts of the request's."""
    return chat_prompt(request, placeholders(pictures))


def picture_tokens(jpeg: bytes, settings: dict[str, Any]) -> int:
    """Tokens that Qwen2-VL makes of a picture, by the checkpoint's preprocessor_config.json."""
    width, height = Image.open(io.BytesIO(jpeg)).size
    factor = settings["patch_size"] * settings["merge_size"]
    rows, columns = smart_resize(height, width, factor, settings["min_pixels"], settings["max_pixels"])
    return rows // factor * (columns // factor)


class _Decoder:
    def __init__(self, folder: Path, threads: int) -> None:
        self._og: Any = importlib.import_module("onnxruntime_genai")
        self.versions = {name: version(name) for name in ("onnxruntime-genai", "onnxruntime")}
        config = self._og.Config(str(folder))
        session = {"intra_op_num_threads": threads, "inter_op_num_threads": 1}
        config.overlay(json.dumps({"model": {"decoder": {"session_options": session}}}))
        self._model = self._og.Model(config)
        self._tokenizer = self._og.Tokenizer(self._model)
        self._preprocessor = json.loads((folder / PREPROCESSOR).read_text(encoding="utf-8"))

    def answer(self, requests: Sequence[Request], new_tokens: int) -> list[Answer]:
        """All requests in one batch. The clock starts with the prefill: what comes before it is not here."""
        counts = [[picture_tokens(p, self._preprocessor) for p in r.pictures] for r in requests]
        prompts = [self._tokenizer.encode(prompt(r, n)) for r, n in zip(requests, counts)]
        length = len(prompts[0])
        if any(len(p) != length for p in prompts):
            raise Unsupported("requests of unequal length in one batch")
        parameters = self._og.GeneratorParams(self._model)
        total = length + new_tokens
        parameters.set_search_options(do_sample=False, batch_size=len(prompts), min_length=total, max_length=total)
        began, times = time.perf_counter(), []
        generator = self._og.Generator(self._model, parameters)
        generator.append_tokens(np.stack(prompts) if len(prompts) > 1 else prompts[0])
        while not generator.is_done():
            generator.generate_next_token()
            generator.get_next_tokens()
            times.append(time.perf_counter() - began)
        return [Answer(length, tuple(times), prefill_s=times[0]) for _ in prompts]


def open_model(folder: Path, variant: str, threads: int) -> _Decoder:
    return _Decoder(folder, threads)
