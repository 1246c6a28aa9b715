"""llama.cpp through the C interface of llama-cpp-python: its multimodal library (mtmd) and its decoder.

Its wheel is built where it is installed, with the machine's own instructions. GGUF files come from llama.cpp's own
converter, which only the source distribution holds, and its own quantizer.
"""

from __future__ import annotations

import ctypes
import importlib
import io
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from edgevl.benchmarks.peers.contract import Answer, Request, Unsupported, chat_prompt, run_tool

__all__ = ["REQUIREMENTS", "VARIANTS", "open_model", "prepare"]

PACKAGE = "llama-cpp-python==0.3.36"
# torch, transformers and what follows are the converter's.
REQUIREMENTS = ["torch==2.13.0", PACKAGE, "transformers==4.57.6", "sentencepiece==0.2.3", "pyyaml==6.0.4"]
VARIANTS = {
    "Q4_0": "Q4_0 decoder, f16 vision",
    "Q4_K_M": "Q4_K_M decoder, f16 vision",
    "Q8_0": "Q8_0 decoder, f16 vision",
    "Q4_0-vision-Q8_0": "Q4_0 decoder, Q8_0 vision",
    "Q4_0-vision-BF16": "Q4_0 decoder, bf16 vision: faster than f16 where the processor multiplies bf16",
}
BATCH = 2048  # tokens of a prompt given to one llama_decode
STEP = 256  # contexts grow by so many tokens

# The converter knows a tokenizer by a hash of what it makes of a fixed text; that of a random checkpoint is not in its
# list. Qwen2-VL's is "qwen2".
CONVERTER = """
import runpy, sys
source = sys.argv.pop(1)
sys.path[:0] = [source, source + "/gguf-py"]
from conversion.base import TextModel
TextModel.get_vocab_base_pre = lambda self, tokenizer: "qwen2"
runpy.run_path(source + "/convert_hf_to_gguf.py", run_name="__main__")
"""


def precisions(variant: str) -> tuple[str, str]:
    """Types of the decoder's and the vision encoder's file, as llama.cpp's quantizer and converter call them."""
    decoder, _, vision = variant.partition("-vision-")
    return decoder, vision.lower() or "f16"


def prompt(request: Request, marker: str) -> str:
    """The chat template's text. mtmd puts the tokens around a picture itself."""
    return chat_prompt(request, marker * len(request.pictures))


def context_tokens(prompts: Sequence[int], new_tokens: int) -> int:
    """Room in the KV cache for all sequences, each with as much as the longest needs."""
    longest = max(prompts) + new_tokens
    return len(prompts) * -(-longest // STEP) * STEP


def prepare(checkpoint: Path, folder: Path, variant: str) -> None:
    """Writes decoder.gguf and vision.gguf."""
    decoder, vision = precisions(variant)
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    with tempfile.TemporaryDirectory(dir=partial) as scratch:
        source, whole = _source(Path(scratch)), Path(scratch) / "f16.gguf"
        command = [sys.executable, "-c", CONVERTER, str(source), str(checkpoint), "--outfile"]
        offline = {**os.environ, "HF_HUB_OFFLINE": "1"}
        run_tool("convert_hf_to_gguf", [*command, str(whole), "--outtype", "f16"], environment=offline)
        picture = [str(partial / "vision.gguf"), "--mmproj", "--outtype", vision]
        run_tool("convert_hf_to_gguf --mmproj", [*command, *picture], environment=offline)
        _quantize(whole, partial / "decoder.gguf", decoder)
    shutil.rmtree(folder, ignore_errors=True)
    partial.replace(folder)


def _source(scratch: Path) -> Path:
    """llama.cpp as the source distribution vendors it: the converter that goes with the library."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    run_tool("pip download", [*command, "--no-binary", ":all:", "--dest", str(scratch), PACKAGE])
    shutil.unpack_archive(next(scratch.glob("*.tar.gz")), scratch)
    return next(scratch.glob("*/vendor/llama.cpp"))


def _quantize(source: Path, out: Path, kind: str) -> None:
    llama = importlib.import_module("llama_cpp.llama_cpp")
    settings = llama.llama_model_quantize_default_params()
    settings.ftype = getattr(llama, f"LLAMA_FTYPE_MOSTLY_{kind}")
    if llama.llama_model_quantize(bytes(source), bytes(out), ctypes.byref(settings)):
        raise RuntimeError(f"llama.cpp did not quantize {source} to {kind}")


def open_model(folder: Path, variant: str, threads: int) -> LlamaCpp:
    return LlamaCpp(folder, threads)


@dataclass
class _Sequence:
    """One request under way. past: positions used; tokens: of the prompt; last: the newest token."""

    past: int = 0
    tokens: int = 0
    last: int = 0
    vision_s: float = 0.0
    prefill_s: float = 0.0
    token_s: list[float] = field(default_factory=list)


class LlamaCpp:
    """Decoder and vision encoder in memory; the context (KV cache, buffers) is made as large as requests need."""

    def __init__(self, folder: Path, threads: int) -> None:
        self._llama = llama = importlib.import_module("llama_cpp.llama_cpp")
        self._mtmd = mtmd = importlib.import_module("llama_cpp.mtmd_cpp")
        self.versions = {"llama-cpp-python": importlib.import_module("llama_cpp").__version__}
        self._threads = threads
        llama.llama_backend_init()
        settings = llama.llama_model_default_params()
        # Not mapped: quantized weights are packed anew for this processor, and a mapped file would count beside them.
        settings.load_mode = llama.LLAMA_LOAD_MODE_NONE
        self._model = llama.llama_model_load_from_file(bytes(folder / "decoder.gguf"), settings)
        vision = mtmd.mtmd_context_params_default()
        vision.use_gpu, vision.n_threads = False, threads
        vision.warmup = False  # it would set aside buffers for a picture of 1288 × 1288
        # 0.7 to 0.8 of the vision encoder's time without; for the decoder little, and less memory.
        vision.flash_attn_type = llama.LLAMA_FLASH_ATTN_TYPE_ENABLED
        self._vision = mtmd.mtmd_init_from_file(bytes(folder / "vision.gguf"), self._model, vision)
        if not self._model or not self._vision:
            raise RuntimeError(f"llama.cpp did not load {folder}")
        vocabulary = llama.llama_model_get_vocab(self._model)
        self._vocabulary = int(llama.llama_vocab_n_tokens(vocabulary))
        self._context: Any = None
        self._room = (0, 0)  # tokens, sequences

    def answer(self, requests: Sequence[Request], new_tokens: int) -> list[Answer]:
        """Pictures and prompts one after another, then a token of every request per step."""
        began = time.perf_counter()
        prompts = [self._tokenize(request) for request in requests]
        sequences = [_Sequence(tokens=int(self._mtmd.mtmd_helper_get_n_tokens(p))) for p in prompts]
        self._make_room(context_tokens([s.tokens for s in sequences], new_tokens), len(sequences))
        for number, chunks in enumerate(prompts):
            self._prefill(sequences[number], number, chunks)
            self._mtmd.mtmd_input_chunks_free(chunks)
            sequences[number].token_s.append(time.perf_counter() - began)
        batch = self._llama.llama_batch_init(len(sequences), 0, 1)
        for _ in range(new_tokens - 1):
            self._step(batch, sequences)
            now = time.perf_counter() - began
            for s in sequences:
                s.token_s.append(now)
        self._llama.llama_batch_free(batch)
        return [
            Answer(s.tokens, tuple(s.token_s), s.vision_s if r.pictures else None, s.prefill_s)
            for s, r in zip(sequences, requests)
        ]

    def _tokenize(self, request: Request) -> Any:
        """Chunks of text and of resized pictures."""
        mtmd = self._mtmd
        bitmaps = []
        for jpeg in request.pictures:
            image = Image.open(io.BytesIO(jpeg)).convert("RGB")
            pixels = (ctypes.c_uint8 * (image.width * image.height * 3)).from_buffer_copy(image.tobytes())
            bitmaps.append(mtmd.mtmd_bitmap_init(image.width, image.height, pixels))
        raw = prompt(request, mtmd.mtmd_default_marker().decode()).encode()
        text = mtmd.mtmd_input_text(raw, len(raw), False, True)
        chunks = mtmd.mtmd_input_chunks_init()
        pointers = (mtmd.mtmd_bitmap_p_ctypes * len(bitmaps))(*bitmaps)
        failed = mtmd.mtmd_tokenize(self._vision, chunks, ctypes.byref(text), pointers, len(bitmaps))
        for bitmap in bitmaps:
            mtmd.mtmd_bitmap_free(bitmap)
        if failed:
            raise Unsupported(f"mtmd_tokenize refused the request (status {failed})")
        return chunks

    def _make_room(self, tokens: int, sequences: int) -> None:
        llama = self._llama
        if tokens > self._room[0] or sequences != self._room[1]:
            if self._context is not None:
                llama.llama_free(self._context)
            settings = llama.llama_context_default_params()
            settings.n_ctx, settings.n_seq_max = tokens, sequences
            settings.n_batch = BATCH
            settings.n_threads = settings.n_threads_batch = self._threads
            settings.flash_attn_type = llama.LLAMA_FLASH_ATTN_TYPE_ENABLED
            settings.kv_unified = False  # a cache per sequence: 3 % faster than one for all with four requests
            settings.n_outputs_max = sequences  # of every token of a batch, the default, takes 240 MB more
            self._context = llama.llama_init_from_model(self._model, settings)
            self._room = (tokens, sequences)
        llama.llama_memory_clear(llama.llama_get_memory(self._context), False)

    def _prefill(self, s: _Sequence, number: int, chunks: Any) -> None:
        mtmd = self._mtmd
        count = int(mtmd.mtmd_input_chunks_size(chunks))
        past = ctypes.c_int32(0)
        for i in range(count):
            chunk = mtmd.mtmd_input_chunks_get(chunks, i)
            began = time.perf_counter()
            common = (self._vision, self._context, chunk)
            if mtmd.mtmd_input_chunk_get_type(chunk) == mtmd.MTMD_INPUT_CHUNK_TYPE_TEXT:
                last = i == count - 1
                status = mtmd.mtmd_helper_eval_chunk_single(
                    *common, past.value, number, BATCH, last, ctypes.byref(past)
                )
            else:
                status = mtmd.mtmd_encode_chunk(self._vision, chunk)
                s.vision_s += time.perf_counter() - began
                began = time.perf_counter()
                features = mtmd.mtmd_get_output_embd(self._vision)
                nothing = mtmd.mtmd_helper_post_decode_callback()
                status = status or mtmd.mtmd_helper_decode_image_chunk(
                    *common, features, past.value, number, BATCH, ctypes.byref(past), nothing, None
                )
            if status:
                raise RuntimeError(f"llama.cpp failed in chunk {i} of the prompt (status {status})")
            if i == count - 1:
                s.last = self._greedy(-1)
            s.prefill_s += time.perf_counter() - began
        s.past = past.value

    def _step(self, batch: Any, sequences: Sequence[_Sequence]) -> None:
        batch.n_tokens = len(sequences)
        for i, s in enumerate(sequences):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0] = s.last, s.past, 1, i
            batch.logits[i] = True
            s.past += 1
        if status := self._llama.llama_decode(self._context, batch):
            raise RuntimeError(f"llama_decode failed (status {status})")
        for i, s in enumerate(sequences):
            s.last = self._greedy(i)

    def _greedy(self, row: int) -> int:
        logits = self._llama.llama_get_logits_ith(self._context, row)
        return int(np.ctypeslib.as_array(logits, (self._vocabulary,)).argmax())
