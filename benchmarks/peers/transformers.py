"""The reference: transformers in bfloat16 with sdpa. `folder` is the checkpoint itself."""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from edgevl.benchmarks.peers.contract import Answer, Request, chat_prompt, placeholders

__all__ = ["REQUIREMENTS", "VARIANTS", "TransformersModel", "open_model", "prepare"]

REQUIREMENTS: Sequence[str] = ("torch==2.13.0", "transformers==5.24.0", "pillow", "numpy")
VARIANTS: Mapping[str, str] = {"bf16": "bfloat16, sdpa, PIL image processor"}


def prepare(checkpoint: Path, folder: Path, variant: str) -> None:
    """Nothing is converted: the folder is a link to the checkpoint."""
    folder.symlink_to(checkpoint.resolve())


class _VisionClock:
    """Adds up the seconds spent in a module's calls; `wait` waits for the device."""

    def __init__(self, module: Any, wait: Callable[[], object]) -> None:
        self.seconds, self.ended, self._began = 0.0, 0.0, 0.0
        self._wait = wait
        module.register_forward_pre_hook(self._before)
        module.register_forward_hook(self._after)

    def _before(self, *_: Any) -> None:
        self._wait()
        self._began = time.perf_counter()

    def _after(self, *_: Any) -> None:
        self._wait()
        self.ended = time.perf_counter()
        self.seconds += self.ended - self._began


class _StepClock:
    """A stopping criterion that stops nothing and keeps when every step ended; unlike a streamer it takes batches."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
        input_ids[:, -1].cpu()  # the token is there when it can be read
        self.times.append(time.perf_counter())
        return input_ids.new_zeros(len(input_ids)).bool()


class TransformersModel:
    """The model in bfloat16 with sdpa, on `device`; `compiled` decodes over a static cache with torch.compile."""

    def __init__(self, folder: Path, device: str = "cpu", compiled: bool = False) -> None:
        import torch
        import transformers

        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        self.versions = {"torch": torch.__version__, "transformers": transformers.__version__}
        self._device = device
        # A static cache is what transformers compiles its decode step over, on CUDA by itself.
        self._cache = {"cache_implementation": "static"} if compiled else {"disable_compile": True}
        self._model: Any = transformers.Qwen2VLForConditionalGeneration.from_pretrained(
            folder, dtype=torch.bfloat16, attn_implementation="sdpa"
        )
        self._model = self._model.eval().to(device)
        self._tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        self._tokenizer.padding_side = "left"
        self._images = transformers.AutoImageProcessor.from_pretrained(folder, backend="pil")
        wait = torch.cuda.synchronize if device == "cuda" else lambda: None
        self._vision = _VisionClock(self._model.model.visual, wait)

    def answer(self, requests: Sequence[Request], new_tokens: int) -> list[Answer]:
        import torch

        began, self._vision.seconds = time.perf_counter(), 0.0
        pictures = [Image.open(io.BytesIO(p)) for r in requests for p in r.pictures]
        vision = dict(self._images(pictures, return_tensors="pt")) if pictures else {}
        grids = iter(vision["image_grid_thw"].prod(-1).tolist() if pictures else ())
        prompts = [chat_prompt(r, placeholders([next(grids) // 4 for _ in r.pictures])) for r in requests]
        inputs = self._tokenizer(prompts, return_tensors="pt", padding=True)
        ids, clock = inputs["input_ids"], _StepClock()
        if pictures:
            vision["pixel_values"] = vision["pixel_values"].to(torch.bfloat16)
            vision["mm_token_type_ids"] = (ids == self._model.config.image_token_id).int()
        given = {"input_ids": ids, "attention_mask": inputs["attention_mask"], **vision}
        with torch.inference_mode():
            self._model.generate(
                **{name: tensor.to(self._device) for name, tensor in given.items()},
                max_new_tokens=new_tokens,
                min_new_tokens=new_tokens,
                do_sample=False,
                stopping_criteria=[clock],
                **self._cache,
            )
        token_s = tuple(t - began for t in clock.times)
        lengths = inputs["attention_mask"].sum(-1).tolist()
        if not pictures:
            return [Answer(n, token_s) for n in lengths]
        return [Answer(n, token_s, self._vision.seconds, clock.times[0] - self._vision.ended) for n in lengths]


def open_model(folder: Path, variant: str, threads: int) -> TransformersModel:
    import torch

    torch.set_num_threads(threads)
    return TransformersModel(folder)
