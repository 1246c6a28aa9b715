"""Coloured shapes on plain ground, still or moving, with their boxes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image, ImageDraw

COLOURS = {
    "red": (215, 30, 35),
    "green": (30, 150, 50),
    "blue": (35, 70, 215),
    "yellow": (240, 205, 25),
    "purple": (140, 40, 165),
    "black": (15, 15, 15),
}
SHAPES = ("circle", "square", "triangle", "star")
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}


@dataclass(frozen=True)
class Shape:
    """kind and colour by index; x, y: top left corner; s: side of the square box; all in pixels."""

    kind: int
    colour: int
    x: int
    y: int
    s: int

    @property
    def name(self) -> str:
        """Its colour and kind in words."""
        return f"{list(COLOURS)[self.colour]} {SHAPES[self.kind]}"


@cache
def mask(kind: int, s: int) -> np.ndarray:
    """float32 [s, s] coverage of a shape filling its box (drawn 4x larger and averaged)."""
    k = 4
    im = Image.new("L", (s * k, s * k))
    d, m = ImageDraw.Draw(im), s * k - 1
    if kind == 0:
        d.ellipse((0, 0, m, m), 255)
    elif kind == 1:
        d.rectangle((0, 0, m, m), 255)
    elif kind == 2:
        d.polygon([(m / 2, 0), (m, m), (0, m)], 255)
    else:
        turn = np.arange(10) * np.pi / 5 - np.pi / 2
        r = np.where(np.arange(10) % 2, 0.42, 1.0)
        x, y = np.cos(turn) * r, np.sin(turn) * r
        x, y = (x - x.min()) / np.ptp(x), (y - y.min()) / np.ptp(y)
        d.polygon([(float(u * m), float(v * m)) for u, v in zip(x, y)], 255)
    return np.asarray(im.resize((s, s), Image.Resampling.BOX), np.float32) / 255


def ground(rng: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
    """A light, nearly grey ground: float32 [height, width, 3]."""
    tone = rng.uniform(200, 255) + rng.uniform(-12, 12, 3)
    return np.ones((size[1], size[0], 3), np.float32) * np.clip(tone, 0, 255).astype(np.float32)


def paste(canvas: np.ndarray, shape: Shape, shade: np.ndarray | None = None) -> None:
    """Paints a shape into float32 [height, width, 3]; shade: RGB, else the colour's own."""
    m = mask(shape.kind, shape.s)[..., None]
    tone = np.asarray(list(COLOURS.values())[shape.colour] if shade is None else shade, np.float32)
    v = canvas[shape.y : shape.y + shape.s, shape.x : shape.x + shape.s]
    v += (tone - v) * m


def scatter(
    rng: np.random.Generator, size: tuple[int, int], n: int, kinds: np.ndarray, sides: tuple[int, int]
) -> list[Shape]:
    """Up to n shapes that keep 5 pixels apart."""
    (w, h), out = size, []
    for _ in range(n):
        for _ in range(12):
            s = int(rng.integers(sides[0], min(sides[1], w, h) + 1))
            x, y = int(rng.integers(0, w - s + 1)), int(rng.integers(0, h - s + 1))
            if all(x + s + 5 < o.x or o.x + o.s + 5 < x or y + s + 5 < o.y or o.y + o.s + 5 < y for o in out):
                out.append(Shape(int(kinds[int(rng.integers(len(kinds)))]), int(rng.integers(6)), x, y, s))
                break
    return out


def paint(rng: np.random.Generator, size: tuple[int, int], shapes: list[Shape]) -> Image.Image:
    """The scene with slightly varied colours and noise."""
    im = ground(rng, size)
    tones = np.array(list(COLOURS.values()), np.float32)
    for s in shapes:
        paste(im, s, np.clip(tones[s.colour] + rng.uniform(-14, 14, 3), 0, 255))
    im += rng.standard_normal(im.shape[:2], np.float32)[..., None] * np.float32(rng.uniform(0, 5))
    return Image.fromarray(np.clip(im, 0, 255).astype(np.uint8))


def motion(rng: np.random.Generator, size: tuple[int, int], frames: int) -> tuple[list[Image.Image], str, list[Shape]]:
    """A shape that moves steadily: the frames, the direction's name, and where the shape is in each."""
    way = list(DIRECTIONS)[int(rng.integers(4))]
    dx, dy = DIRECTIONS[way]
    w, h = size
    s = int(rng.integers(14, 28))
    free = (w - s) if dx else (h - s)
    low = min(2.2, free / frames)
    go = rng.uniform(low, max(low + 0.1, min(9.0, free / (frames - 1)))) * (frames - 1)
    start = rng.uniform(0, max(0.0, free - go))
    start = start if dx + dy > 0 else free - start
    other = rng.uniform(0, (h - s) if dx else (w - s))
    kind, colour, base = int(rng.integers(4)), int(rng.integers(6)), ground(rng, size)
    pictures, places = [], []
    for f in range(frames):
        u = start + go * f / (frames - 1) * (dx + dy)
        x, y = (u, other) if dx else (other, u)
        x, y = int(np.clip(round(x), 0, w - s)), int(np.clip(round(y), 0, h - s))
        im = base.copy()
        places.append(Shape(kind, colour, x, y, s))
        paste(im, places[-1])
        pictures.append(Image.fromarray(np.clip(im, 0, 255).astype(np.uint8)))
    return pictures, way, places


def box_answer(name: str, box: tuple[float, float, float, float], size: tuple[int, int]) -> str:
    """A box (left, top, right, bottom in pixels) in Qwen2-VL's grounding tokens: thousandths of the picture, here
    rounded to fiftieths of it, which is what the model is taught to say."""
    w, h = size
    x0, y0, x1, y1 = (20 * int(min(50, max(0, round(v / n * 50)))) for v, n in zip(box, (w, h, w, h)))
    return f"<|object_ref_start|>{name}<|object_ref_end|><|box_start|>({x0},{y0}),({x1},{y1})<|box_end|>"
