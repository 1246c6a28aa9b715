"""One golden case as a file: a conversation and what the reference makes of it, stage by stage. Knows no engine.

Written on a host by `edgevl.export.verify`, read on a device by `edgevl.runtime.golden`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from edgevl.runtime.errors import BundleError, EdgeVLError
from edgevl.runtime.image_processing import VisionGrid
from edgevl.runtime.prompt import collect_vision
from edgevl.runtime.tensor_file import read_tensors, write_tensors

__all__ = ["GoldenCase", "GoldenVision", "vision_name"]

FORMAT = "1"


@dataclass(frozen=True)
class GoldenVision:
    """One picture or video of a case.

    frames: uint8 [T, H, W, 3], RGB as a user would hand it in; T is 1 for a picture.
    pixel_values: float32 [t * h * w, patch_dim]. image_embeds: float32 [tokens, hidden].
    """

    kind: str
    frames: np.ndarray
    grid: VisionGrid
    pixel_values: np.ndarray
    image_embeds: np.ndarray

    def source(self) -> Image.Image | list[Image.Image]:
        """What stands in a message for it."""
        frames = [Image.fromarray(frame) for frame in self.frames]
        return frames[0] if self.kind == "image" else frames


@dataclass(frozen=True)
class GoldenCase:
    """One conversation and what the reference makes of it, stage by stage.

    messages: as for `VisionLanguageModel.generate`, with `picture.N` or `video.N` in place of vision item N.
    input_ids: int64 [S]. positions: int64 [3, S]. next_position: of the first answer token.
    tokens: int64 [steps], the greedy answer, end tokens not heeded.
    logits: float32 [steps, vocab]; row i is what token i was chosen from.
    """

    name: str
    messages: list[dict[str, Any]]
    vision: tuple[GoldenVision, ...]
    input_ids: np.ndarray
    positions: np.ndarray
    next_position: int
    logits: np.ndarray
    tokens: np.ndarray
    reference: str = "unknown"

    @property
    def steps(self) -> int:
        return len(self.tokens)

    def filled_messages(self) -> list[dict[str, Any]]:
        """The messages with the pictures in their places."""
        sources = {vision_name(i, item.kind): item.source() for i, item in enumerate(self.vision)}

        def filled(item: dict[str, Any]) -> dict[str, Any]:
            return {k: sources.get(v, v) if k == item["type"] else v for k, v in item.items()}

        return [
            m if isinstance(m["content"], str) else m | {"content": [filled(i) for i in m["content"]]}
            for m in self.messages
        ]

    def save(self, path: Path) -> None:
        """Write the case; a reader sees the whole file or none.

        Raises:
            BundleError: numbers that are not finite: the reference itself overflowed.
        """
        tensors: dict[str, np.ndarray] = {
            "input_ids": self.input_ids,
            "positions": self.positions,
            "next_position": np.array([self.next_position], np.int64),
            "logits": self.logits,
            "tokens": self.tokens,
        }
        for i, item in enumerate(self.vision):
            tensors[vision_name(i, item.kind)] = item.frames[0] if item.kind == "image" else item.frames
            tensors[f"vision.{i}.grid"] = np.array([item.grid.t, item.grid.h, item.grid.w], np.int64)
            tensors[f"vision.{i}.pixel_values"] = item.pixel_values
            tensors[f"vision.{i}.image_embeds"] = item.image_embeds
        for name, tensor in tensors.items():
            if not np.isfinite(tensor).all():
                raise BundleError(f"{path}: {name} has NaN or infinity; the checkpoint cannot be verified in fp32")
        metadata = {
            "format": FORMAT,
            "name": self.name,
            "messages": json.dumps(self.messages, ensure_ascii=False),
            "kinds": json.dumps([item.kind for item in self.vision]),
            "reference": self.reference,
        }
        write_tensors(path, tensors, metadata)

    @classmethod
    def load(cls, path: Path) -> GoldenCase:
        """Read a case, checking that its parts fit one another.

        Raises:
            BundleError: not such a file, of another format version, or inconsistent.
        """
        tensors, metadata = read_tensors(path)
        if metadata.get("format") != FORMAT:
            raise BundleError(
                f"{path}: golden format {metadata.get('format')!r}, this edgevl reads {FORMAT!r}; "
                "write it again with `edgevl verify BUNDLE --against CHECKPOINT`"
            )
        try:
            case = cls._parse(tensors, metadata)
        except (KeyError, TypeError, ValueError, IndexError, EdgeVLError) as e:
            raise BundleError(
                f"{path}: malformed golden vectors ({type(e).__name__}: {e}); "
                "write them again with `edgevl verify BUNDLE --against CHECKPOINT`"
            ) from None
        return case

    @classmethod
    def _parse(cls, tensors: dict[str, np.ndarray], metadata: dict[str, str]) -> GoldenCase:
        rest = dict(tensors)

        def take(name: str, dtype: str, *shape: int) -> np.ndarray:
            tensor = rest.pop(name)
            fits = tensor.ndim == len(shape) and all(want in (-1, got) for want, got in zip(shape, tensor.shape))
            if tensor.dtype != dtype or not fits or not np.isfinite(tensor).all():
                raise ValueError(f"{name}: {tensor.dtype} {list(tensor.shape)}, expected {dtype} {list(shape)}, finite")
            return tensor

        vision = []
        for i, kind in enumerate(json.loads(metadata["kinds"])):
            shape = {"image": (-1, -1, 3), "video": (-1, -1, -1, 3)}[kind]
            frames = take(vision_name(i, kind), "uint8", *shape)
            grid = VisionGrid(*take(f"vision.{i}.grid", "int64", 3).tolist())
            pixels = take(f"vision.{i}.pixel_values", "float32", grid.t * grid.h * grid.w, -1)
            embeds = take(f"vision.{i}.image_embeds", "float32", -1, -1)
            vision.append(GoldenVision(kind, frames[None] if kind == "image" else frames, grid, pixels, embeds))
        ids = take("input_ids", "int64", -1)
        tokens = take("tokens", "int64", -1)
        case = cls(
            name=metadata["name"],
            messages=json.loads(metadata["messages"]),
            vision=tuple(vision),
            input_ids=ids,
            positions=take("positions", "int64", 3, len(ids)),
            next_position=int(take("next_position", "int64", 1)[0]),
            logits=take("logits", "float32", len(tokens), -1),
            tokens=tokens,
            reference=metadata["reference"],
        )
        if rest or not len(ids) or not len(tokens):
            raise ValueError(f"unknown tensors {sorted(rest)}, {len(ids)} input_ids, {len(tokens)} tokens")
        if [v.kind for v in collect_vision(case.filled_messages())] != [v.kind for v in vision]:
            raise ValueError("the messages do not hold the pictures in their order")
        return case


def vision_name(index: int, kind: str) -> str:
    """Name of vision item `index`, in the messages and as a tensor."""
    return f"{'picture' if kind == 'image' else 'video'}.{index}"
