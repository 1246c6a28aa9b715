"""Cards with text: planned, drawn by one of several renderers, coloured. Knows where every character lies.

Renderers: "plain" (hinted FreeType at the final size), "fine" (drawn 3x larger and averaged down: no hinting, true
sub-pixel places), "scaled" (the finished picture resized from half, double or an odd size), "hard" (no anti-aliasing).
Cuts: the face's own; "oblique" shears it; "heavy" thickens its strokes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from edgevl.tasks.fonts import cap_ratio, font, width
from edgevl.tasks.words import pick

RENDERERS = ("plain", "fine", "scaled", "hard")
Glyphs = list[tuple[str, float, float]]


@dataclass
class TextLine:
    """One run of text: `x` of its start and `baseline`, in pixels of the picture."""

    text: str
    x: float
    baseline: float


@dataclass
class Page:
    """What is to be drawn. size: (width, height) in pixels; em: pixels; slant: x shift per pixel of height."""

    size: tuple[int, int]
    face: str
    em: float
    lines: list[TextLine]
    slant: float = 0.0
    heavy: int = 0

    def glyphs(self) -> Glyphs:
        """(character, x, y) of the middle of every character, spaces included, in reading order."""
        f, out = font(self.face, 100.0), []
        for line in self.lines:
            at = 0.0
            for i, c in enumerate(line.text):
                end = f.getlength(line.text[: i + 1]) * self.em / 100
                out.append((c, line.x + (at + end) / 2 + self.slant * 0.35 * self.em, line.baseline - 0.35 * self.em))
                at = end
        return out


def place(
    rng: np.random.Generator, size: tuple[int, int], face: str, lines: list[str], cap: float, slant: float = 0.0
) -> Page:
    """Lines put on a card of `size` (width, height): left, centred or scattered, at a random height.
    cap: height of the capitals in pixels."""
    em = cap / cap_ratio(face)
    w, h = size
    n = len(lines)
    pitch = min(em * rng.uniform(1.12, 1.5) if n > 1 else em * 1.1, max(em, (h - 4) / n))
    top = rng.uniform(0, max(0.5, h - 2 - n * pitch))
    mode, x0, out = int(rng.integers(3)), None, []
    lean = slant * em * 0.75
    for i, s in enumerate(lines):
        free = max(0.0, w - 4 - lean - width(face, s) * em)
        x = 2 + free / 2 if mode == 2 else 2 + rng.uniform(0, free) if mode == 0 or x0 is None else min(x0, 2 + free)
        x0 = x
        out.append(TextLine(s, x, top + i * pitch + em * 0.9))
    return Page(size, face, em, out, slant)


def largest_cap(size: tuple[int, int], face: str, lines: list[str]) -> float:
    """The height of capitals with which the lines still fit the card."""
    widest = max(width(face, s) for s in lines)
    em = min((size[0] - 8) / (widest + 0.15), (size[1] - 6) / (1.15 * len(lines)))
    return em * cap_ratio(face)


def coverage(page: Page, renderer: str = "plain", factor: float = 1.0) -> np.ndarray:
    """Draws the page: float32 [height, width], 0 paper, 1 ink. factor: for "scaled", the size it is first drawn at."""
    w, h = page.size
    k = {"plain": 1.0, "hard": 1.0, "fine": 3.0, "scaled": factor}[renderer]
    if page.slant and renderer in ("plain", "hard"):
        k, renderer = 3.0, "fine"
    big = Image.new("L", (max(1, round(w * k)), max(1, round(h * k))))
    draw = ImageDraw.Draw(big)
    if renderer == "hard":
        draw.fontmode = "1"
    f = font(page.face, round(page.em * k * 4) / 4)
    for line in page.lines:
        at = (line.x * k, line.baseline * k)
        if renderer != "fine":
            at = (round(at[0]), round(at[1]))
        if not page.slant:
            draw.text(at, line.text, 255, font=f, anchor="ls", stroke_width=round(page.heavy * k / 2))
            continue
        layer = Image.new("L", big.size)
        ImageDraw.Draw(layer).text(at, line.text, 255, font=f, anchor="ls", stroke_width=round(page.heavy * k / 2))
        lean = (1, page.slant, -page.slant * at[1], 0, 1, 0)
        layer = layer.transform(big.size, Image.Transform.AFFINE, lean, Image.Resampling.BILINEAR)
        big.paste(255, (0, 0), layer)
    if big.size != (w, h):
        kind = Image.Resampling.BOX if renderer == "fine" else Image.Resampling.BICUBIC
        big = big.resize((w, h), kind)
    return np.asarray(big, np.float32) / 255


def inks(rng: np.random.Generator, plain: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Paper and ink, RGB 0..255, at least 90 levels of luminance apart; light on dark a third of the time."""
    if plain:
        return rng.uniform(235, 255) * np.ones(3), rng.uniform(0, 40) * np.ones(3)
    paper, ink = rng.uniform(150, 255, 3), rng.uniform(0, 110, 3)
    if (paper - ink) @ np.array([0.3, 0.59, 0.11]) < 90:
        paper, ink = paper * 0.3 + 255 * 0.7, ink * 0.4
    return (ink, paper) if rng.random() < 0.33 else (paper, ink)


def colourise(rng: np.random.Generator, cover: np.ndarray, plain: bool = False) -> Image.Image:
    """Coverage to an RGB picture with a slight gradient and noise (neither when plain)."""
    paper, ink = inks(rng, plain)
    out = paper.astype(np.float32) + (ink - paper).astype(np.float32) * cover[..., None]
    if not plain:
        out += (rng.uniform(-25, 25) * np.linspace(-1, 1, cover.shape[1], dtype=np.float32))[None, :, None]
        grain = rng.standard_normal(cover.shape, np.float32) * np.float32(rng.uniform(0, 7))
        out += grain[..., None]
    return Image.fromarray(np.clip(out, 0, 255).astype(np.uint8))


def draw(rng: np.random.Generator, page: Page, plain: bool = False) -> Image.Image:
    """The page through a random renderer, coloured."""
    u = rng.random()
    renderer = "plain" if u < 0.45 else "fine" if u < 0.72 else "scaled" if u < 0.95 else "hard"
    if page.em < 22 and renderer == "hard":
        renderer = "plain"
    factor = float(pick(rng, (0.5, 0.75, 1.4, 2.0))) if page.em >= 30 else float(pick(rng, (0.8, 1.4, 2.0)))
    return colourise(rng, coverage(page, renderer, factor), plain)
