"""MNN through its Python binding. Its exporter (llmexport) writes the model; end tokens are not heeded, because the
binding's `forward` gives logits and the loop is ours.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgevl.benchmarks.peers.contract import Answer, Request, Unsupported, chat_prompt, run_tool
from edgevl.runtime.image_processing import smart_resize

__all__ = ["REQUIREMENTS", "VARIANTS", "open_model", "prepare"]

REQUIREMENTS = ["torch==2.13.0", "MNN==3.6.1", "llmexport==0.0.5", "transformers==4.57.6"]
VARIANTS = {"int4": "4-bit decoder and head, blocks of 64; 4-bit vision, blocks of 128: the exporter's defaults"}
# Its modules import each other by names that are right only in its own folder. MNN's converter would install a package
# with whatever `pip` is on the PATH and report each conversion to its makers: that module is barred.
EXPORTER = """
import sys
sys.modules["MNN.tools.utils.log"] = None
sys.path.insert(0, sys.argv.pop(1))
import llmexport
llmexport.main()
"""
MIN_PIXELS, MAX_PIXELS = 3136, 12845056  # the released limits of a picture's area


def prompt(request: Request) -> str:
    """The chat template's text with MNN's marks for pictures; it puts the tokens around a picture itself."""
    pictures = "".join(f"<img>image_{i}</img>" for i in range(len(request.pictures)))
    return chat_prompt(request, pictures)


def settings(threads: int) -> dict[str, Any]:
    """What is added to the exporter's config.json."""
    processor = {"backend_type": "cpu", "thread_num": threads, "precision": "low", "memory": "low", "power": "high"}
    # async off: the vision encoder is run where it is timed, not when its result is first read.
    return {**processor, "async": False, "use_template": False, "mllm": processor}


def prepare(checkpoint: Path, folder: Path, variant: str) -> None:
    """Runs the exporter, which takes 11 GB of memory for 2B shapes (the vision encoder is traced in fp32)."""
    package = importlib.util.find_spec("llmexport")
    if package is None or package.origin is None:
        raise Unsupported("llmexport is not installed")
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    paths = ["--path", str(checkpoint.resolve()), "--dst_path", str(partial.resolve())]
    command = [sys.executable, "-c", EXPORTER, str(Path(package.origin).parent), *paths, "--export", "mnn"]
    run_tool("llmexport", command, partial, {**os.environ, "HF_HUB_OFFLINE": "1"})
    if not (partial / "config.json").exists():  # it reports a failed step and exits with status 1, or goes on
        raise RuntimeError("llmexport wrote no config.json")
    for left in (*partial.glob("*.mnn.json"), partial / ".export.log"):
        left.unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
    partial.replace(folder)


def open_model(folder: Path, variant: str, threads: int) -> Mnn:
    return Mnn(folder, threads)


class Mnn:
    """Decoder and vision encoder in memory."""

    def __init__(self, folder: Path, threads: int) -> None:
        package = importlib.import_module("MNN")
        self.versions = {"MNN": package.version()}
        self._cv = importlib.import_module("MNN.cv")
        self._llm = importlib.import_module("MNN.llm").create(str(folder / "config.json"))
        self._llm.set_config(settings(threads))
        self._llm.load()

    def answer(self, requests: Sequence[Request], new_tokens: int) -> list[Answer]:
        if len(requests) != 1:
            raise Unsupported("MNN's Python binding holds one sequence: no batch of requests")
        (request,) = requests
        began = time.perf_counter()
        self._llm.reset()
        pictures = []
        for jpeg in request.pictures:
            image = self._cv.imdecode(jpeg, self._cv.IMREAD_COLOR)
            # Without a size it takes the exporter's 420 × 420; given, it only rounds each side to a multiple of 28.
            height, width = smart_resize(image.shape[0], image.shape[1], 28, MIN_PIXELS, MAX_PIXELS)
            pictures.append({"data": image, "height": height, "width": width})
        encoding = time.perf_counter()
        tokens = self._llm.tokenizer_encode({"text": prompt(request), "images": pictures})
        prefilling = time.perf_counter()
        newest = self._greedy(tokens)
        token_s = [time.perf_counter() - began]
        while len(token_s) < new_tokens:
            newest = self._greedy([newest])
            token_s.append(time.perf_counter() - began)
        vision_s = prefilling - encoding if pictures else None
        return [Answer(len(tokens), tuple(token_s), vision_s, began + token_s[0] - prefilling)]

    def _greedy(self, tokens: list[int]) -> int:
        return int(np.asarray(self._llm.forward(tokens).read()).argmax())
