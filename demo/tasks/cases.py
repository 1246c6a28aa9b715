"""The yardstick: named tasks that draw pictures, ask about them and score answers.

    from edgevl.tasks import TASKS
    task = TASKS["read_1_line"]
    for case in task.cases("test", 500):
        answer = model.generate(list(case.messages), max_new_tokens=case.max_new_tokens).text
        score = task.score(answer, case)

A case depends on (task, split, seed, index) only, never on what else was drawn, on installed fonts or word lists. The
"calibration" split (pictures to calibrate or train on) and the "test" split share no words, no item names, no faces
and no random stream. Needs numpy and Pillow; knows nothing of models.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from edgevl.tasks import cards, fonts, receipts, scenes, scoring, words

SPLITS = ("calibration", "test")
MAX_PIXELS = 100_352  # of the demo model's preprocessor; every picture but those of read_reduced stays below


@dataclass(frozen=True)
class Case:
    """One question. pictures: as drawn; for a video its frames. box: the truth in thousandths (where only). note: how
    the picture was made, for tables."""

    task: str
    split: str
    index: int
    question: str
    truth: str
    pictures: tuple[Image.Image, ...]
    video: bool = False
    box: tuple[float, float, float, float] | None = None
    max_pixels: int | None = None
    note: str = ""
    max_new_tokens: int = 64

    @property
    def messages(self) -> list[dict[str, Any]]:
        """As transformers' chat templates, qwen_vl_utils and the runtime take them."""
        limit = {"max_pixels": self.max_pixels} if self.max_pixels else {}
        if self.video:
            seen: list[dict[str, Any]] = [{"type": "video", "video": list(self.pictures)}]
        else:
            seen = [{"type": "image", "image": p, **limit} for p in self.pictures]
        return [{"role": "user", "content": [*seen, {"type": "text", "text": self.question}]}]


@dataclass(frozen=True)
class Split:
    """What a split draws from."""

    name: str
    words: tuple[str, ...] = field(repr=False)
    faces: tuple[str, ...] = field(repr=False)
    items: tuple[str, ...] = field(repr=False)


def _split(name: str) -> Split:
    items = words.TEST_ITEMS if name == "test" else words.ITEMS
    return Split(name, words.pool(name), fonts.faces(name), tuple(items))


Builder = Callable[[np.random.Generator, Split], dict[str, Any]]


@dataclass(frozen=True)
class Task:
    """name; what it asks, in a line; build: random numbers and a split -> fields of a Case."""

    name: str
    about: str
    build: Builder = field(repr=False)

    def case(self, split: str, index: int, seed: int = 0) -> Case:
        """The case of that index.

        Raises:
            ValueError: an unknown split.
        """
        if split not in SPLITS:
            raise ValueError(f"split: got {split!r}, expected one of {', '.join(SPLITS)}")
        key = [zlib.crc32(self.name.encode()), SPLITS.index(split), seed, index]
        return Case(self.name, split, index, **self.build(np.random.default_rng(key), _split(split)))

    def cases(self, split: str, n: int, seed: int = 0) -> list[Case]:
        """The first n cases of a split."""
        return list(self.stream(split, n, seed))

    def stream(self, split: str, n: int, seed: int = 0) -> Iterator[Case]:
        """The same, one at a time."""
        return (self.case(split, i, seed) for i in range(n))

    def score(self, answer: str, case: Case) -> scoring.Score:
        """The answer against the case's truth; anything malformed scores 0 and never raises."""
        if case.box is not None:
            return scoring.score_box(answer, case.box)
        return scoring.score_text(answer, case.truth)


def _log_uniform(rng: np.random.Generator, low: float, high: float) -> float:
    return float(np.exp(rng.uniform(np.log(low), np.log(high))))


def _text(rng: np.random.Generator, split: Split, longest: int) -> str:
    s = words.token(rng, split.words, 2, min(10, longest))
    if len(s) + 3 <= longest and rng.random() < 0.3:
        s += " " + words.token(rng, split.words, 2, min(6, longest - len(s) - 1))
    return s


Card = tuple[Image.Image, str, str]


def _card(rng: np.random.Generator, split: Split, lines: int, cap: float, strip: bool = False) -> Card:
    """A card around `lines` lines with capitals `cap` pixels high -> (picture, text, cut)."""
    face = words.pick(rng, split.faces)
    longest = int(np.clip(300 / (cap * 0.78), 4, 16 if lines == 1 else 12))
    texts = [_text(rng, split, longest) for _ in range(lines)]
    em = cap / fonts.cap_ratio(face)
    u = rng.random()
    slant = float(rng.uniform(0.12, 0.26)) if u < 0.12 else 0.0
    w = max(fonts.width(face, s) for s in texts) * em + slant * em + 10
    h = 1.2 * em * lines + 6
    if strip:
        h = max(h, w / 5)
        w = 5 * h
    else:
        w, h = w + rng.uniform(0, 0.25 * w + 20), h + rng.uniform(0, 0.4 * h + 12)
    page = cards.place(rng, (round(w), round(h)), face, texts, cap, slant)
    page.heavy = max(1, int(em * 0.04)) if 0.12 <= u < 0.2 and em > 20 else 0
    cut = "oblique" if slant else "heavy" if page.heavy else "own"
    return cards.draw(rng, page, plain=rng.random() < 0.25), "\n".join(texts), cut


def _read(lines: int) -> Builder:
    def build(rng: np.random.Generator, split: Split) -> dict[str, Any]:
        cap = _log_uniform(rng, 10, 28)
        picture, text, cut = _card(rng, split, lines, cap)
        note = f"capitals {cap:.0f} px, {cut}"
        return dict(question="Read the text.", truth=text, pictures=(picture,), note=note)

    return build


def _read_any_size(rng: np.random.Generator, split: Split) -> dict[str, Any]:
    """A third as drawn with capitals of 10 to 64 pixels, a third drawn once and resized to 0.5, 1 or 2 times, a third
    on strips of 5:1."""
    kind = int(rng.integers(3))
    while True:
        if kind == 1:
            scale, cap = float(words.pick(rng, (0.5, 1.0, 2.0))), rng.uniform(20, 32)
        else:
            scale, cap = 1.0, _log_uniform(rng, 10, 64 if kind == 0 else 40)
        picture, text, cut = _card(rng, split, 1 if kind == 2 else int(rng.integers(1, 3)), cap, kind == 2)
        size = round(picture.width * scale), round(picture.height * scale)
        if size[0] * size[1] <= 0.9 * MAX_PIXELS:
            break
    if scale != 1.0:
        picture = picture.resize(size, words.pick(rng, (Image.Resampling.BICUBIC, Image.Resampling.LANCZOS)))
    how = ("drawn", f"x{scale:g}", "5:1")[kind]
    note = f"{how}, capitals {cap * scale:.0f} px, {cut}"
    return dict(question="Read the text.", truth=text, pictures=(picture,), note=note)


def _read_reduced(rng: np.random.Generator, split: Split) -> dict[str, Any]:
    """A large picture that the processor has to shrink 2.5 to 4 times: what the resize filter does shows here."""
    cap, shrink = _log_uniform(rng, 14, 24), float(rng.uniform(2.5, 4))
    picture, text, cut = _card(rng, split, 1, cap * shrink)
    limit = max(784, int(picture.width * picture.height / shrink**2))
    note = f"capitals {cap * shrink:.0f} px shrunk {shrink:.1f} times, {cut}"
    return dict(question="Read the text.", truth=text, pictures=(picture,), note=note, max_pixels=limit)


def _scene(ask: str) -> Builder:
    def build(rng: np.random.Generator, split: Split) -> dict[str, Any]:
        while True:
            size = int(rng.integers(84, 168)), int(rng.integers(84, 141))
            kinds = rng.permutation(4)[:2] if ask == "count" else np.arange(4)
            n = int(rng.integers(1 if ask == "count" else 2, 5))
            shapes = scenes.scatter(rng, size, n, kinds, (18, 35 if n > 2 else 46))
            asked = _ask(rng, ask, shapes, kinds, size)
            if asked:
                return dict(**asked, pictures=(scenes.paint(rng, size, shapes),), note=f"{len(shapes)} shapes")

    return build


def _ask(rng: np.random.Generator, ask: str, shapes: list[scenes.Shape], kinds: np.ndarray, size: tuple[int, int]):
    if ask == "count":
        if rng.random() < 0.2:
            return dict(question="How many shapes?", truth=str(len(shapes)))
        kind = int(kinds[0])
        return dict(question=f"How many {scenes.SHAPES[kind]}s?", truth=str(sum(s.kind == kind for s in shapes)))
    if ask == "colour":
        lone = [s for s in shapes if sum(o.kind == s.kind for o in shapes) == 1]
        if not lone:
            return None
        s = words.pick(rng, lone)
        return dict(question=f"What colour is the {scenes.SHAPES[s.kind]}?", truth=list(scenes.COLOURS)[s.colour])
    lone = [s for s in shapes if sum(o.name == s.name for o in shapes) == 1]
    if not lone:
        return None
    s = words.pick(rng, lone)
    edges = (s.x, s.y, s.x + s.s, s.y + s.s)
    box = tuple(1000 * v / n for v, n in zip(edges, (*size, *size)))
    return dict(question=f"Where is the {s.name}?", truth=scenes.box_answer(s.name, edges, size), box=box)


def _receipt(ask: str) -> Builder:
    def build(rng: np.random.Generator, split: Split) -> dict[str, Any]:
        n = int(rng.integers(2, 5))
        size = int(rng.integers(130, 190)), int(rng.integers(28 * n + 30, 28 * n + 62))
        face = words.pick(rng, split.faces)
        page, names, total = receipts.receipt(rng, size, face, n, list(split.items), split.words)
        picture = cards.draw(rng, page, plain=rng.random() < 0.25)
        if ask == "items":
            return dict(question="List the items.", truth="\n".join(names), pictures=(picture,), note=f"{n} items")
        return dict(question="What is the total?", truth=total, pictures=(picture,), note=f"{n} items")

    return build


def _two_pictures(rng: np.random.Generator, split: Split) -> dict[str, Any]:
    caps = [_log_uniform(rng, 10, 24) for _ in range(2)]
    (a, s, _), (b, t, _) = (_card(rng, split, 1, cap) for cap in caps)
    note = "capitals " + " and ".join(f"{cap:.0f}" for cap in caps) + " px"
    return dict(question="Read both.", truth=f"{s}\n{t}", pictures=(a, b), note=note)


def _motion(rng: np.random.Generator, split: Split) -> dict[str, Any]:
    frames = 2 * int(rng.integers(2, 9))
    size = int(rng.integers(84, 113)), int(rng.integers(72, 98))
    pictures, way, _ = scenes.motion(rng, size, frames)
    question = "Which way does the shape move?"
    return dict(question=question, truth=way, pictures=tuple(pictures), video=True, note=f"{frames} frames")


def _tasks() -> dict[str, Task]:
    rows: Sequence[tuple[str, str, Builder]] = (
        ("read_1_line", "one line, capitals 10 to 28 pixels high", _read(1)),
        ("read_2_lines", "two lines", _read(2)),
        ("read_3_lines", "three lines", _read(3)),
        ("read_any_size", "capitals 10 to 64 pixels, cards at 0.5, 1, 2 times, strips of 5:1", _read_any_size),
        ("read_reduced", "large pictures that the processor shrinks 2.5 to 4 times", _read_reduced),
        ("colour", "the colour of one of 2 to 4 shapes", _scene("colour")),
        ("count", "how many of a kind, of 1 to 4 shapes", _scene("count")),
        ("where", "the box of one of 2 to 4 shapes; right when IoU > 0.5", _scene("where")),
        ("receipt_total", "the total of a receipt of 2 to 4 items", _receipt("total")),
        ("receipt_items", "all item names of a receipt, in order", _receipt("items")),
        ("two_pictures", "the text of two pictures", _two_pictures),
        ("motion", "which way a shape moves in 4 to 16 frames", _motion),
    )
    return {name: Task(name, about, build) for name, about, build in rows}


TASKS = _tasks()
