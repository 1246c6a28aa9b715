"""Golden vectors from the reference: transformers in fp32 on the host, written into a bundle for any device to replay.

The one module of export that uses torch and transformers, and only inside its functions: without them a bundle is
exported all the same, without golden vectors. What a stage's golden output comes from:

    pixel values  transformers' PIL image processor. For a video there is no reference function on PIL pictures: the
                  processor patches every frame as a still, and patches of consecutive frames are paired in time
    token ids     the checkpoint's tokenizer and template in transformers, placeholders repeated for their tokens
    positions     Qwen2VLModel.get_rope_index; for a video under the rule "released" the published rule
                  (arXiv:2409.12191, section 2.1; transformers 4.45) as a loop over tokens, because transformers 5
                  positions the text after a video otherwise
    embeddings    Qwen2VLModel.get_image_features / get_video_features
    logits        Qwen2VLForConditionalGeneration with those positions, the whole sequence again for every token
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from edgevl.runtime.bundle import Bundle, FileEntry, file_sha256
from edgevl.runtime.checkpoint import Checkpoint, expected_shapes
from edgevl.runtime.config import ModelConfig
from edgevl.runtime.errors import BundleError, CheckpointError, InputError
from edgevl.runtime.golden import GOLDEN_FOLDER
from edgevl.runtime.golden_case import GoldenCase, GoldenVision, vision_name
from edgevl.runtime.image_processing import VisionGrid
from edgevl.runtime.prompt import load_chat_template

__all__ = ["add_golden", "available_memory", "host_missing", "write_golden"]

Notice = Callable[[str], None]
DEFAULT_STEPS = 6
_OVERHEAD = 1.3  # of the fp32 weights: activations, and what from_pretrained holds while it converts

# case -> (kind, frames, height, width) of its pictures, and what is asked. Sizes are small, not all multiples of 28,
# and the video is longer than it is high or wide (in tokens), which is where the M-RoPE rules part.
_CASES: dict[str, tuple[tuple[tuple[str, int, int, int], ...], str]] = {
    "text": ((), "What is the answer to 6 times 7?"),
    "picture": ((("image", 1, 90, 140),), "What is in the picture?"),
    "two_pictures": ((("image", 1, 112, 84), ("image", 1, 60, 150)), "Compare the two pictures."),
    "equal_pictures": ((("image", 1, 84, 112), ("image", 1, 84, 112)), "Compare the two pictures."),
    "video": ((("video", 8, 56, 84),), "What happens in the video?"),
}


def host_missing() -> str | None:
    """Why golden vectors cannot be written on this machine, or None where they can."""
    missing = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
    if not missing:
        return None
    return f"{' and '.join(missing)} not installed here (pip install 'edgevl[host]')"


def write_golden(
    folder: Path,
    bundle: Bundle,
    source: str | Path,
    *,
    steps: int = DEFAULT_STEPS,
    notice: Notice | None = None,
    progress: Notice | None = None,
) -> dict[str, FileEntry]:
    """Run the reference on every case and write `golden/<case>.safetensors` below `folder`.

    Args:
        folder: the bundle's folder; the manifest is the caller's, as for `export_bundle(finish=...)`.
        source: the checkpoint that the bundle was made from, a folder or hub id.
        steps: answer tokens of every case.
        notice: told of cases, or of all of them, that cannot be written here, and why.
        progress: told of every case before it is computed; each takes some 10 s with 2B shapes on two cores.

    Returns:
        Name (relative to `folder`) -> size and hash of every file written; {} where memory does not suffice.

    Raises:
        InputError: torch or transformers missing, steps below 1, a checkpoint with another config than the bundle.
        CheckpointError: transformers cannot load the checkpoint, or it gives NaN in fp32.
    """
    told = notice or (lambda _: None)
    reason = host_missing()
    if reason is not None:
        raise InputError(f"golden vectors cannot be written: {reason}")
    if steps < 1:
        raise InputError(f"steps is {steps}, expected at least 1")
    with Checkpoint.open(source) as checkpoint:
        _check_same(bundle, checkpoint)
        short = _no_reference(checkpoint) or _memory_short(checkpoint.config)
        if short is not None:
            told(f"no golden vectors: {short}")
            return {}
        where = checkpoint.folder
    reference = _Reference.load(where, bundle)
    (folder / GOLDEN_FOLDER).mkdir(exist_ok=True)
    written: dict[str, FileEntry] = {}
    for name in _CASES:
        if progress is not None:
            progress(name)
        case = reference.case(name, steps)
        needed = len(case.input_ids) + steps
        if needed > bundle.max_tokens:
            told(f"golden case {name!r} left out: {needed} tokens, the bundle was exported for {bundle.max_tokens}")
            continue
        file = f"{GOLDEN_FOLDER}/{name}.safetensors"
        case.save(folder / file)
        written[file] = FileEntry((folder / file).stat().st_size, file_sha256(folder / file))
    return written


def add_golden(
    bundle_folder: str | Path,
    source: str | Path,
    *,
    steps: int = DEFAULT_STEPS,
    notice: Notice | None = None,
    progress: Notice | None = None,
) -> list[str]:
    """Write golden vectors into an existing bundle (`edgevl verify BUNDLE --against CHECKPOINT`); returns the files.

    Killed at any moment it leaves a bundle that opens: the files are made beside the old ones; only when all are there
    the old ones are taken off the manifest, replaced, and the new ones listed.

    Raises:
        InputError, CheckpointError: see `write_golden`; also where memory does not suffice.
        BundleError: the bundle cannot be opened or written.
    """
    folder = Path(bundle_folder)
    bundle = Bundle.open(folder)
    before = [name for name in bundle.files if name.startswith(f"{GOLDEN_FOLDER}/")]
    with Checkpoint.open(source) as checkpoint:
        short = _no_reference(checkpoint) or _memory_short(checkpoint.config)
    if short is not None:
        raise InputError(f"{folder}: {short}")
    partial = folder / ".golden.partial"
    try:
        shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
        partial.mkdir()
        written = write_golden(partial, bundle, source, steps=steps, notice=notice, progress=progress)
        if not written:
            raise InputError(
                f"{folder}: no golden case fits into {bundle.max_tokens} tokens; export with more max tokens"
            )
        kept = {name: entry for name, entry in bundle.files.items() if name not in before}
        replace(bundle, files=kept).write_manifest()
        for name in before:
            (folder / name).unlink(missing_ok=True)
        (folder / GOLDEN_FOLDER).mkdir(exist_ok=True)
        for name in written:
            (partial / name).replace(folder / name)
        replace(bundle, files={**kept, **written}).write_manifest()
    except OSError as e:
        raise BundleError(f"{folder}: golden vectors cannot be written ({e})") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return sorted(written)


def available_memory() -> int | None:
    """Bytes that this process may still take: the machine's, or its control group's where that is less."""
    found = []
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        found += [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    except OSError:  # not Linux
        if "SC_PHYS_PAGES" in os.sysconf_names:
            found.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    try:
        group = Path("/sys/fs/cgroup")
        limit = (group / "memory.max").read_text(encoding="ascii").strip()
        if limit != "max":
            found.append(int(limit) - int((group / "memory.current").read_text(encoding="ascii")))
    except (OSError, ValueError):  # no control group of version 2
        pass
    return min(found, default=None)


def _no_reference(checkpoint: Checkpoint) -> str | None:
    if checkpoint.quantization is None:
        return None
    return (
        f"the checkpoint is quantized ({checkpoint.quantization.method}), the reference needs plain numbers; "
        "run `edgevl verify BUNDLE --against CHECKPOINT` with the unquantized checkpoint"
    )


def _memory_short(config: ModelConfig) -> str | None:
    """Why the checkpoint does not fit into memory in fp32, or None where it does (or nobody knows)."""
    needed = int(4 * sum(int(np.prod(shape)) for shape in expected_shapes(config).values()) * _OVERHEAD)
    free = available_memory()
    if free is None or needed <= free:
        return None
    return (
        f"the reference needs about {needed / 1e9:.1f} GB of memory in fp32, {free / 1e9:.1f} GB are available; "
        "run `edgevl verify BUNDLE --against CHECKPOINT` on a larger host"
    )


def _check_same(bundle: Bundle, checkpoint: Checkpoint) -> None:
    """Raises InputError naming the first field in which the checkpoint is not the bundle's."""
    ours, theirs = bundle.model.to_dict(), checkpoint.config.to_dict()
    for part in ("text", "vision", "tokens"):
        for key, value in ours[part].items():
            if value != theirs[part][key]:
                raise InputError(
                    f"{checkpoint.folder}: {part} {key} is {theirs[part][key]!r}, in the bundle {value!r}; "
                    "give the checkpoint that the bundle was exported from"
                )


def _plain_config(folder: Path) -> Any:
    """The config less its word on quantization: what comes here has plain weights, and scales for a cache at most."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config


@dataclass(frozen=True)
class _Reference:
    """transformers' model, tokenizer and image processor of one checkpoint."""

    model: Any
    tokenizer: Any
    processor: Any
    template: str
    config: ModelConfig
    limits: tuple[int, int]
    rule: str
    versions: str

    @classmethod
    def load(cls, folder: Path, bundle: Bundle) -> _Reference:
        import torch
        import transformers
        from transformers import AutoTokenizer, Qwen2VLForConditionalGeneration
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

        bars = transformers.utils.logging.is_progress_bar_enabled()
        verbosity = transformers.utils.logging.get_verbosity()
        transformers.utils.logging.disable_progress_bar()  # the caller tells of progress
        transformers.utils.logging.set_verbosity_error()  # it warns of a cache's scales; what is absent is told below
        from_pretrained: Any = Qwen2VLForConditionalGeneration.from_pretrained  # its type forgets the loading info
        try:
            model, info = from_pretrained(
                folder,
                config=_plain_config(folder),
                dtype=torch.float32,
                attn_implementation="eager",
                local_files_only=True,
                output_loading_info=True,
            )
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            processor = Qwen2VLImageProcessorPil.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError, RuntimeError, KeyError, TypeError) as e:
            reason = " ".join(str(e).split())[:300]
            raise CheckpointError(
                f"{folder}: transformers {transformers.__version__} cannot load it: {reason}"
            ) from None
        finally:
            transformers.utils.logging.set_verbosity(verbosity)
            if bars:
                transformers.utils.logging.enable_progress_bar()
        absent = sorted(info["missing_keys"]) or sorted(str(key) for key in info["mismatched_keys"])
        if absent:  # transformers would fill them with random numbers and warn
            raise CheckpointError(
                f"{folder}: transformers {transformers.__version__} finds no {absent[0]!r} in it; re-download it"
            )
        versions = f"transformers {transformers.__version__}, torch {torch.__version__}, float32"
        template = load_chat_template(folder).source
        limits = bundle.image_processor.min_pixels, bundle.image_processor.max_pixels
        return cls(model.eval(), tokenizer, processor, template, bundle.model, limits, bundle.mrope_rule, versions)

    def case(self, name: str, steps: int) -> GoldenCase:
        """All stages of one case, greedy over `steps` tokens, end tokens not heeded."""
        shapes, question = _CASES[name]
        frames = [_frames(number, *shape[1:]) for number, shape in enumerate(shapes)]
        vision = tuple(self._vision(shape[0], f) for shape, f in zip(shapes, frames))
        content = [self._item(i, shape[0]) for i, shape in enumerate(shapes)]
        messages = [{"role": "user", "content": [*content, {"type": "text", "text": question}]}]
        ids = self._ids(messages, vision)
        positions, next_position = self._positions(ids, vision)
        logits, tokens = self._answer(ids, positions, next_position, vision, steps)
        return GoldenCase(
            name, messages, vision, ids, positions, next_position, logits, tokens, reference=self.versions
        )

    def _item(self, number: int, kind: str) -> dict[str, Any]:
        """A video with the limits of pictures, because its frames go through the processor as stills here; its own
        would make a tiny one 15 times as large."""
        item: dict[str, Any] = {"type": kind, kind: vision_name(number, kind)}
        return item if kind == "image" else item | {"min_pixels": self.limits[0], "max_pixels": self.limits[1]}

    def _vision(self, kind: str, frames: np.ndarray) -> GoldenVision:
        import torch

        v = self.config.vision
        stills = [self.processor(images=Image.fromarray(f), return_tensors="np") for f in frames]
        _, h, w = (int(n) for n in stills[0]["image_grid_thw"][0])
        if kind == "image":
            times, pixels = 1, stills[0]["pixel_values"]
        else:
            # A still's patches hold it temporal_patch_size times over: [h * w, channels, time, patch * patch].
            apart = [
                s["pixel_values"].reshape(h * w, v.in_channels, v.temporal_patch_size, -1)[:, :, 0] for s in stills
            ]
            groups = [apart[i : i + v.temporal_patch_size] for i in range(0, len(apart), v.temporal_patch_size)]
            times, pixels = len(groups), np.concatenate([np.stack(g, axis=2).reshape(h * w, -1) for g in groups])
        pixels = np.ascontiguousarray(pixels, np.float32)
        features = self.model.model.get_image_features if kind == "image" else self.model.model.get_video_features
        with torch.no_grad():
            found = features(torch.from_numpy(pixels), torch.tensor([[times, h, w]]))
        # Releases before 5.1 returned the tuple itself.
        (embeds,) = getattr(found, "pooler_output", found)
        return GoldenVision(kind, frames, VisionGrid(times, h, w), pixels, embeds.numpy())

    def _ids(self, messages: list[dict[str, Any]], vision: Sequence[GoldenVision]) -> np.ndarray:
        text = self.tokenizer.apply_chat_template(
            messages, chat_template=self.template, tokenize=False, add_generation_prompt=True
        )
        counts = iter([len(item.image_embeds) for item in vision])
        placeholders = (self.config.tokens.image_token_id, self.config.tokens.video_token_id)
        ids: list[int] = []
        for token in self.tokenizer(text, add_special_tokens=False)["input_ids"]:
            ids += [token] * (next(counts) if token in placeholders else 1)
        return np.array(ids, np.int64)

    def _positions(self, ids: np.ndarray, vision: Sequence[GoldenVision]) -> tuple[np.ndarray, int]:
        """[3, S], and the position of the first answer token."""
        import torch

        if self.rule == "released" and any(item.kind == "video" for item in vision):
            positions = _released_positions(ids, vision, self.config)
        elif not vision:
            positions = np.broadcast_to(np.arange(len(ids)), (3, len(ids))).copy()
        else:
            tokens = self.config.tokens
            kinds = 1 * (ids == tokens.image_token_id) + 2 * (ids == tokens.video_token_id)
            found, _ = self.model.model.get_rope_index(
                torch.from_numpy(ids)[None],
                mm_token_type_ids=torch.from_numpy(kinds)[None],
                **_grids(vision),
            )
            positions = found[:, 0].numpy()
        return np.ascontiguousarray(positions, np.int64), int(positions.max()) + 1

    def _answer(
        self, ids: np.ndarray, positions: np.ndarray, following: int, vision: Sequence[GoldenVision], steps: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Logits float32 [steps, vocab] and the tokens chosen from them: no cache, the whole sequence every time."""
        import torch

        pixels: dict[str, Any] = {}
        for kind, key in (("image", "pixel_values"), ("video", "pixel_values_videos")):
            found = [item.pixel_values for item in vision if item.kind == kind]
            if found:
                pixels[key] = torch.from_numpy(np.concatenate(found))
        logits, tokens = [], []
        for step in range(steps):
            answer = np.arange(following, following + step)
            at = np.concatenate([positions, np.broadcast_to(answer, (3, step))], axis=1)
            sequence = np.concatenate([ids, np.array(tokens, np.int64)])
            with torch.no_grad():
                out = self.model(
                    input_ids=torch.from_numpy(sequence)[None],
                    position_ids=torch.from_numpy(at)[:, None],
                    attention_mask=torch.ones(1, len(sequence), dtype=torch.int64),
                    use_cache=False,
                    logits_to_keep=1,
                    **pixels,
                    **_grids(vision),
                )
            row = out.logits[0, -1].float().numpy()
            if not np.isfinite(row).all():
                raise CheckpointError("transformers gives NaN or infinity for this checkpoint in fp32; it is damaged")
            logits.append(row)
            tokens.append(int(row.argmax()))
        return np.stack(logits), np.array(tokens, np.int64)


def _grids(vision: Sequence[GoldenVision]) -> dict[str, Any]:
    import torch

    out: dict[str, Any] = {}
    for kind in ("image", "video"):
        found = [[item.grid.t, item.grid.h, item.grid.w] for item in vision if item.kind == kind]
        if found:
            out[f"{kind}_grid_thw"] = torch.tensor(found)
    return out


def _released_positions(ids: np.ndarray, vision: Sequence[GoldenVision], config: ModelConfig) -> np.ndarray:
    """The rule that Qwen2-VL was released with, token by token: a vision token stands at (t, h, w) of its grid beyond
    the start of its span, and the text after a span one past the highest position in it, on all three axes."""
    merge, placeholders = config.vision.spatial_merge_size, (config.tokens.image_token_id, config.tokens.video_token_id)
    columns: list[tuple[int, int, int]] = []
    remaining = list(vision)
    i = 0
    while i < len(ids):
        start = 1 + max((max(column) for column in columns), default=-1)
        if ids[i] not in placeholders:
            columns.append((start, start, start))
            i += 1
            continue
        grid = remaining.pop(0).grid
        for t in range(grid.t):
            for h in range(grid.h // merge):
                for w in range(grid.w // merge):
                    columns.append((start + t, start + h, start + w))
                    i += 1
    return np.array(columns, np.int64).T


def _frames(number: int, count: int, height: int, width: int) -> np.ndarray:
    """uint8 [count, height, width, 3]: colour gradients, a disc that moves from frame to frame, and some noise."""
    rng = np.random.default_rng(1000 * height + width + number)
    y, x = np.mgrid[:height, :width]
    slopes = rng.uniform(-1, 1, (3, 2))
    base = 128 + 60 * (slopes[:, :1, None] * (y / height - 0.5) + slopes[:, 1:, None] * (x / width - 0.5)) * 2
    colour = rng.integers(0, 256, 3)
    out = np.empty((count, height, width, 3), np.uint8)
    for i in range(count):
        cy, cx = height * rng.uniform(0.3, 0.7), width * (i + 1) / (count + 1)
        disc = (y - cy) ** 2 + (x - cx) ** 2 < (min(height, width) / 4) ** 2
        frame = np.where(disc[..., None], colour, base.transpose(1, 2, 0)) + rng.normal(0, 12, (height, width, 3))
        out[i] = np.clip(frame, 0, 255)
    return out
