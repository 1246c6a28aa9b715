"""Small synthetic videos, and qwen_vl_utils as the oracle for sampling and sizes."""

from __future__ import annotations

import importlib
import sys
import types
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from PIL import Image


def frame(number: int, size: tuple[int, int] = (96, 64)) -> np.ndarray:
    """uint8 [H, W, 3] of one grey that tells the number, but for its left half: half as bright."""
    out = np.full((size[1], size[0], 3), 16 + number * 14 % 224, np.uint8)
    out[:, : size[0] // 2] //= 2
    return out


def write_video(
    path: Path,
    frames: int | Sequence[np.ndarray],
    fps: int = 10,
    codec: str = "libx264",
    size: tuple[int, int] = (96, 64),
    times_ms: Sequence[int] | None = None,
    rotation: float | None = None,
    gop: int = 12,
    movflags: str = "",
) -> Path:
    """`frames` numbered frames (or these) at a constant rate, or at times_ms."""
    pictures = [frame(i, size) for i in range(frames)] if isinstance(frames, int) else frames
    with av.open(str(path), "w", options={"movflags": movflags} if movflags else {}) as container:
        stream: Any = container.add_stream(codec, rate=fps)
        stream.height, stream.width = pictures[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        stream.bit_rate = 1_000_000  # plenty, so that the frames can be told apart
        stream.codec_context.gop_size = gop
        stream.codec_context.time_base = Fraction(1, 1000) if times_ms else Fraction(1, fps)
        if rotation is not None:
            stream.set_display_rotation(rotation)
        for i, pixels in enumerate(pictures):
            picture = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            picture.pts = times_ms[i] if times_ms else i
            picture.time_base = stream.codec_context.time_base
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
    return path


def number_of(picture: Image.Image) -> int:
    """The number of a frame, modulo 16, whichever codec it went through."""
    grey = float(np.asarray(picture.convert("L"), np.float32)[:, picture.width // 2 + 4 :].mean())
    return round((grey - 16) / 14) % 16


def reference() -> Any:
    """qwen_vl_utils.vision_process as installed. It imports torchvision, which it needs for two functions only: they
    are given here as torchvision implements them (a decode of the whole file with PyAV; an antialiased cubic)."""
    if "qwen_vl_utils.vision_process" in sys.modules:
        return sys.modules["qwen_vl_utils.vision_process"]

    def read_video(path: str, **_: Any) -> tuple[torch.Tensor, None, dict[str, float]]:
        with av.open(path) as container:
            rate = container.streams.video[0].average_rate
            assert rate is not None
            decoded = np.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=0)])
        return torch.from_numpy(decoded.transpose(0, 3, 1, 2)), None, {"video_fps": float(rate)}

    def resize(video: torch.Tensor, size: list[int], interpolation: str, antialias: bool) -> torch.Tensor:
        assert interpolation == "bicubic" and antialias
        resized = torch.nn.functional.interpolate(video.float(), size, mode="bicubic", antialias=True)
        return resized.round().clamp(0, 255).to(torch.uint8)

    stand_ins = {name: types.ModuleType(name) for name in ("torchvision", "torchvision.io", "torchvision.transforms")}
    top, io, transforms = stand_ins.values()
    io.read_video = read_video  # type: ignore[attr-defined]
    transforms.functional = types.SimpleNamespace(resize=resize)  # type: ignore[attr-defined]
    transforms.InterpolationMode = types.SimpleNamespace(BICUBIC="bicubic")  # type: ignore[attr-defined]
    top.io, top.transforms, top.__version__ = io, transforms, "0.20.0"  # type: ignore[attr-defined]
    sys.modules.update(stand_ins)
    try:
        module = importlib.import_module("qwen_vl_utils.vision_process")
    finally:
        for name in stand_ins:
            del sys.modules[name]
    module.logger.disabled = True  # it warns of every limit that it applies
    module.get_video_reader_backend = lambda: "torchvision"  # type: ignore[attr-defined]
    return module
