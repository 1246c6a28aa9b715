"""Endless training pictures with questions, answers and dense labels, drawn with the yardstick's own pens from the
training split: words, faces and seeds that the test split never uses.

`make(task, rng, sizes, batch)` returns a dict:
  imgs    list of uint8 [batch, H, W, 3] (or [batch, frames, H, W, 3]), H and W multiples of 28
  q, a    questions and answers
  and, where they apply, dense labels (0 or -1: nothing), cells being the merger's 28x28, patches 14x14:
  cell    [batch, cells, 8] characters whose middle lies in a cell, in reading order
  idx     [batch, cells] how many characters come before the cell's first
  patch   [batch, patches, 2] the character whose middle lies in a patch's left / right half
  thing   [batch, cells, 6] kind, colour, box (fiftieths) of what lies in a cell; centre [batch, cells, 4] how many
          of each kind have their middle there; shape, colour [batch, patches] what covers a patch's middle;
  asked   [batch, 2] kind and colour the question is about (-1: any)
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

from edgevl.tasks import cards, fonts, receipts, scenes, words

CHARS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789.,:-/$%&#!?'+()@ "
CODE = {c: i + 1 for i, c in enumerate(CHARS)}
SYSTEM_FONTS, SYSTEM_WORDS = Path("/usr/share/fonts"), Path("/usr/share/dict/words")
ODD_FACES = ("smallcaps", "title", "symbols", "math", "z003", "d050000l", "thin", "hairline", "noto", "black", "tamil")
# (rows, columns) of 28-pixel cells
SMALL = [(1, 2), (1, 3), (1, 4), (2, 2), (2, 3), (2, 4), (2, 5), (3, 3), (3, 2), (2, 6)]
MEDIUM = [(2, 6), (3, 4), (3, 5), (4, 4), (4, 5), (3, 6), (5, 4), (4, 6), (5, 5), (2, 8), (6, 4)]
LARGE = [(3, 8), (4, 8), (5, 7), (6, 6), (4, 10), (5, 9), (3, 10), (6, 9), (7, 6)]
STRIP = [(1, 5), (2, 10), (1, 6), (2, 9), (3, 15), (3, 14), (2, 12), (4, 16), (2, 11), (1, 8)]
BUCKETS = {"small": SMALL, "medium": MEDIUM, "large": LARGE, "strip": STRIP}


@cache
def training_faces() -> tuple[tuple[str, ...], ...]:
    """Families of faces (paths): the shipped calibration faces and whatever the machine has, less the test split's."""
    found = list(fonts.faces("calibration"))
    if SYSTEM_FONTS.exists():
        found += sorted(str(p) for e in ("ttf", "otf") for p in SYSTEM_FONTS.rglob("*." + e))
    families: dict[str, list[str]] = {}
    for p in found:
        name = Path(p).stem.lower().removeprefix("calibration-")
        if name.startswith(fonts.HELD_OUT_FAMILIES) or any(o in name for o in ODD_FACES) or "[" in name:
            continue
        families.setdefault(name.split("-")[0], []).append(p)
    return tuple(tuple(v) for v in families.values())


@cache
def training_words() -> tuple[str, ...]:
    """The shipped calibration words and the machine's dictionary, less every word of the test split."""
    found = set(words.pool("calibration"))
    if SYSTEM_WORDS.exists():
        every = SYSTEM_WORDS.read_text(encoding="utf8").split()
        found |= {w.lower() for w in every if w.isascii() and w.isalpha() and 2 <= len(w) <= 11}
    return tuple(sorted(w for w in found if not words.is_test_word(w)))


def pick_face(rng: np.random.Generator) -> str:
    """A face: a quarter of the time a shipped one, else of an evenly chosen family."""
    if rng.random() < 0.25:
        return words.pick(rng, fonts.faces("calibration"))
    return words.pick(rng, words.pick(rng, training_faces()))


class Labels:
    """Dense labels of a batch of equal-sized pages."""

    def __init__(self, batch: int, H: int, W: int) -> None:
        self.H, self.W = H, W
        n = H // 28 * (W // 28)
        self.cell = np.zeros((batch, n, 8), np.int64)
        self.idx = np.full((batch, n), -1)
        self.patch = np.zeros((batch, 4 * n, 2), np.int64)

    def put(self, b: int, glyphs: cards.Glyphs, kx: float, ky: float) -> None:
        """glyphs in pixels of a page that was then scaled by kx, ky."""
        fill: dict[int, int] = {}
        for i, (c, x, y) in enumerate(glyphs):
            cx, cy = int(x * kx), int(y * ky)
            if not (0 <= cx < self.W and 0 <= cy < self.H):
                continue
            k = cy // 28 * (self.W // 28) + cx // 28
            j = fill.get(k, 0)
            if j == 0:
                self.idx[b, k] = min(i, 47)
            if j < 8:
                self.cell[b, k, j] = CODE[c]
                fill[k] = j + 1
            p = self.patch[b, 4 * k + cy % 28 // 14 * 2 + cx % 28 // 14]
            if p[cx % 14 // 7] == 0:
                p[cx % 14 // 7] = CODE[c]


def raw_size(rng: np.random.Generator, H: int, W: int) -> tuple[int, int]:
    """A (width, height) that the processor resizes to W x H."""
    return W + int(rng.integers(-13, 14)), H + int(rng.integers(-13 if H > 28 else -6, 14))


def write_lines(rng: np.random.Generator, size: tuple[int, int], face: str, most: int) -> tuple[list[str], float]:
    """Lines that fit a card, and the height of capitals (9 to 66 pixels, small ones likelier)."""
    w, h = size
    n = int(rng.integers(1, max(1, min(most, h // 24)) + 1))
    room = min(66.0, 0.6 * h / n)
    cap = float(np.exp(rng.uniform(np.log(min(9.0, room)), np.log(room))))
    fits = max(1, int((w - 8) / (cap / 0.72 * 0.56)))
    pool, lines = training_words(), []
    for _ in range(n):
        s = words.token(rng, pool, min(2, fits), min(10, fits)) if fits > 1 else words.pick(rng, words.MIXED)
        while len(s) + 3 < fits and rng.random() < 0.4:
            s += " " + words.token(rng, pool, 1 if rng.random() < 0.3 else 2, min(9, fits - len(s) - 1))
        lines.append(s[:24].strip())
    best = cards.largest_cap(size, face, lines)
    while best < 8.5 and max(map(len, lines)) > 3:
        lines = [s[: max(3, len(s) * 2 // 3)].strip() for s in lines]
        best = cards.largest_cap(size, face, lines)
    return lines, min(cap * rng.uniform(0.9, 1.25), best, 66.0)


def card(rng: np.random.Generator, H: int, W: int, most: int = 3) -> tuple[Image.Image, str, cards.Page]:
    """-> picture at its raw size, its text, its page"""
    size, face = raw_size(rng, H, W), pick_face(rng)
    lines, cap = write_lines(rng, size, face, most)
    slant = float(rng.uniform(0.1, 0.3)) if rng.random() < 0.15 else 0.0
    page = cards.place(rng, size, face, lines, cap * (0.93 if slant else 1.0), slant)
    page.heavy = int(page.em * rng.uniform(0.03, 0.07)) if rng.random() < 0.08 else 0
    return cards.draw(rng, page, plain=rng.random() < 0.2), "\n".join(lines), page


def _text_batch(B: int, H: int, W: int, one) -> dict:
    labels, imgs, q, a = Labels(B, H, W), np.empty((B, H, W, 3), np.uint8), [], []
    for b in range(B):
        picture, question, answer, page = one()
        imgs[b] = np.asarray(picture.resize((W, H), Image.Resampling.BICUBIC))
        labels.put(b, page.glyphs(), W / page.size[0], H / page.size[1])
        q.append(question)
        a.append(answer)
    return dict(imgs=[imgs], q=q, a=a, cell=labels.cell, idx=labels.idx, patch=labels.patch)


def read(rng, sizes, B: int | None, bucket: str) -> dict:
    """Cards of one to three lines."""
    h, w = words.pick(sizes, BUCKETS[bucket])
    B = B or batch_size(h * w)

    def one():
        picture, text, page = card(rng, 28 * h, 28 * w)
        return picture, "Read the text.", text, page

    return _text_batch(B, 28 * h, 28 * w, one)


def two(rng, sizes, B: int | None) -> dict:
    """Two cards of a line or two each, of different sizes."""
    pair = [words.pick(sizes, SMALL[2:] + MEDIUM[:3]) for _ in range(2)]
    B = B or batch_size(sum(h * w for h, w in pair))
    parts = []
    for h, w in pair:

        def one(h=h, w=w):
            picture, text, page = card(rng, 28 * h, 28 * w, 1)
            return picture, "Read both.", text, page

        parts.append(_text_batch(B, 28 * h, 28 * w, one))
    x, y = parts
    cat = {k: np.concatenate([x[k], y[k]], 1) for k in ("cell", "idx", "patch")}
    return dict(imgs=x["imgs"] + y["imgs"], q=x["q"], a=[s + "\n" + t for s, t in zip(x["a"], y["a"])], **cat)


def receipt(rng, sizes, B: int | None) -> dict:
    """Receipts: their total or their items."""
    n, h, w = words.pick(
        sizes, [(2, 3, 5), (3, 4, 5), (4, 5, 5), (2, 4, 5), (3, 5, 5), (4, 5, 6), (4, 6, 6), (3, 5, 7)]
    )

    def one():
        face, pool = pick_face(rng), training_words()
        # the listed items would soon be known by heart: half of the receipts sell any words
        items = words.ITEMS if rng.random() < 0.5 else [words.token(rng, pool, 3, 8).lower() for _ in range(n)]
        page, names, total = receipts.receipt(rng, raw_size(rng, 28 * h, 28 * w), face, n, items, pool)
        picture = cards.draw(rng, page, plain=rng.random() < 0.2)
        if rng.random() < 0.5:
            return picture, "List the items.", "\n".join(names), page
        return picture, "What is the total?", total, page

    batch = _text_batch(B or batch_size(h * w), 28 * h, 28 * w, one)
    batch.pop("idx")
    return batch


def _grid_box(s: scenes.Shape, size: tuple[int, int]) -> list[int]:
    (w, h) = size
    edges = ((s.x, w), (s.y, h), (s.x + s.s, w), (s.y + s.s, h))
    return [int(min(50, max(0, round(v / n * 50)))) for v, n in edges]


def ask_scene(rng, shapes: list[scenes.Shape], kind: str, pair, size) -> tuple[str, str, tuple[int, int]]:
    """A question of a kind about a scene, as far as the scene allows -> question, answer, (kind, colour) asked for."""
    names = list(scenes.COLOURS)
    lone = [o for o in shapes if sum(p.kind == o.kind for p in shapes) == 1]
    only = [o for o in shapes if sum((p.kind, p.colour) == (o.kind, o.colour) for p in shapes) == 1]
    if kind == "colour" and lone:
        o = words.pick(rng, lone)
        return f"What colour is the {scenes.SHAPES[o.kind]}?", names[o.colour], (o.kind, -1)
    if kind == "where" and only:
        o = words.pick(rng, only)
        answer = scenes.box_answer(o.name, (o.x, o.y, o.x + o.s, o.y + o.s), size)
        return f"Where is the {o.name}?", answer, (o.kind, o.colour)
    if rng.random() < 0.2:
        return "How many shapes?", str(len(shapes)), (-1, -1)
    k = int(pair[0])
    return f"How many {scenes.SHAPES[k]}s?", str(sum(o.kind == k for o in shapes)), (k, -1)


def scene(rng, sizes, B: int | None, ask: str = "") -> dict:
    """Up to four shapes: their colour, number, place."""
    h, w = words.pick(sizes, [(3, 4), (4, 3), (4, 4), (3, 5), (4, 5), (3, 3), (5, 5), (4, 6)])
    H, W = 28 * h, 28 * w
    B = B or batch_size(h * w)
    imgs, q, a = np.empty((B, H, W, 3), np.uint8), [], []
    thing, centre = np.full((B, h * w, 6), -1), np.zeros((B, h * w, 4), np.int64)
    asked, cover = np.full((B, 2), -1), np.zeros((B, 2 * h, 2 * w), np.int64)
    for b in range(B):
        size = raw_size(rng, H, W)
        kx, ky = W / size[0], H / size[1]
        kind = ask or ("colour", "count", "where")[int(rng.choice(3, p=[0.3, 0.35, 0.35]))]
        pair = rng.permutation(4)[:2] if kind == "count" else np.arange(4)
        n = int(rng.integers(1 if kind == "count" else 2, 5))
        shapes = scenes.scatter(rng, size, n, pair, (18, 35 if n > 2 else 50))
        if kind == "count" and rng.random() < 0.15:
            pair = rng.permutation(4)
        question, answer, asked[b] = ask_scene(rng, shapes, kind, pair, size)
        q.append(question)
        a.append(answer)
        im = scenes.paint(rng, size, shapes).resize((W, H), Image.Resampling.BICUBIC)
        imgs[b] = np.asarray(im)
        for o in shapes:
            x, y = (o.x + o.s / 2) * kx, (o.y + o.s / 2) * ky
            r, c = int(y) // 28, int(x) // 28
            centre[b, r * w + c, o.kind] = min(2, centre[b, r * w + c, o.kind] + 1)
            row = [o.kind, o.colour, *_grid_box(o, size)]
            thing[b, r * w + c] = row
            px = ((np.arange(2 * w) * 14 + 7) / kx - o.x).astype(int)
            py = ((np.arange(2 * h) * 14 + 7) / ky - o.y).astype(int)
            m = scenes.mask(o.kind, o.s)
            inside = np.ix_((py >= 0) & (py < o.s), (px >= 0) & (px < o.s))
            hit = np.zeros((2 * h, 2 * w), bool)
            hit[inside] = m[np.ix_(py[(py >= 0) & (py < o.s)], px[(px >= 0) & (px < o.s)])] > 0.5
            cover[b][hit] = o.kind * 6 + o.colour + 1
            for i, j in zip(*np.nonzero(hit)):
                thing[b, i // 2 * w + j // 2] = row
    flat = cover.reshape(B, h, 2, w, 2).transpose(0, 1, 3, 2, 4).reshape(B, -1)
    shape, colour = np.where(flat > 0, (flat - 1) // 6 + 1, 0), np.where(flat > 0, (flat - 1) % 6 + 1, 0)
    return dict(imgs=[imgs], q=q, a=a, thing=thing, centre=centre, asked=asked, shape=shape, colour=colour)


def motion(rng, sizes, B: int | None) -> dict:
    """A shape that moves in 4 to 16 frames."""
    h, w, f = words.pick(
        sizes, [(3, 3, 4), (3, 3, 6), (2, 4, 8), (3, 4, 6), (3, 3, 10), (3, 4, 12), (3, 3, 16), (3, 3, 14)]
    )
    B = B or batch_size(h * w * f // 2)
    imgs, a = np.empty((B, f, 28 * h, 28 * w, 3), np.uint8), []
    thing = np.full((B, f // 2, h * w, 6), -1)
    for b in range(B):
        size = raw_size(rng, 28 * h, 28 * w)
        frames, way, places = scenes.motion(rng, size, f)
        for i, im in enumerate(frames):
            imgs[b, i] = np.asarray(im.resize((28 * w, 28 * h), Image.Resampling.BICUBIC))
        for i, o in enumerate(places[1::2]):
            r, c = int((o.y + o.s / 2) * h / size[1]), int((o.x + o.s / 2) * w / size[0])
            thing[b, i, r * w + c] = [o.kind, o.colour, *_grid_box(o, size)]
        a.append(way)
    return dict(imgs=[imgs], q=["Which way does the shape move?"] * B, a=a, thing=thing.reshape(B, -1, 6))


MAKERS = {"read": read, "two": two, "receipt": receipt, "scene": scene, "motion": motion}
PATCHES = 2400


def batch_size(cells: int) -> int:
    """Pictures in a batch such that batches cost about the same."""
    return int(np.clip(PATCHES / (4 * cells), 4, 40))


def make(task: str, rng: np.random.Generator, sizes: np.random.Generator, batch: int | None = None) -> dict:
    """task: "read:small|medium|large|strip", "two", "receipt", "scene", "scene:where", "motion". sizes: decides the
    picture sizes only; workers that share its seed get batches of equal cost."""
    name, *rest = task.split(":")
    return MAKERS[name](rng, sizes, batch, *rest)
