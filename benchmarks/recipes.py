"""What each recipe of `edgevl quantize` costs the demo model: size, KL, scores; and what it gains in speed on a
checkpoint of full size. One row per recipe, all in one run.

Calibrated on the yardstick's calibration split (questions with their true answers). KL is over the answers of other
conversations of that split, through the engine; scores are of its test split: other words, other faces, other random
streams. Every step is the command that a user would type.

    python -m edgevl.benchmarks.recipes demo/model [--samples 64] [--cases 200] [--speed 2b --bundles speed]
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
from tabulate import tabulate
from tqdm import tqdm

from edgevl.benchmarks.divergence import answer_logits, divergence
from edgevl.benchmarks.recipe_speed import Speeds, edgevl, measure_speeds
from edgevl.runtime.doctor import cpu_model
from edgevl.tasks import TASKS, Answered, Case, score_bundle, summarize

__all__ = ["main", "write_conversations"]

RECIPES = (
    *("rtn-int4", "rtn-int4-clip", "gptq-int4", "gptq-int4-g32", "gptq-int4-down8", "int8", "w8a8", "w8a8-static"),
    "hybrid",  # gptq-int4 for decode, W8A8 for prefill
    *("gptq-int4@r1+r2", "w8a8@r1+r2", "w8a8-static@r1+r2"),  # rotated
    *("none+int8", "none+int8-static", "w8a8+int8", "w8a8-static+int8-static", "gptq-int4+int8"),  # decoder+vision
)
CONVERSATIONS = 96  # that the divergence is measured on

Answers = list[tuple[np.ndarray, np.ndarray]]  # logits of a bundle, see divergence.answer_logits


@dataclass(frozen=True)
class Row:
    name: str
    vision_mb: float
    decoder_mb: float
    kl: float | None
    top1: float | None
    answered: list[Answered]


@dataclass(frozen=True)
class Quantizer:
    """Runs the commands of one recipe in a folder of its own."""

    checkpoint: Path
    folder: Path
    conversations: Path
    samples: int

    def bundle(self, name: str) -> Path:
        """The bundle of a recipe such as `w8a8@r1+r2` or `gptq-int4+int8`; parts that none is named for in fp32."""
        decoder, vision, rotation = parts(name)
        output, bundle = self.folder / name, self.folder / f"bundle-{name}"
        options = ["--vision", vision] if vision != "none" else []
        options += ["--rotate", rotation] if rotation else []
        recipe = "gptq-int4" if decoder == "hybrid" else decoder
        given = ("--recipe", recipe, "--images", self.conversations, "--samples", self.samples, *options)
        edgevl("quantize", self.checkpoint, "-o", output, *given)
        plain = [] if vision != "none" else ["--vision-precision", "fp32"]
        plain += ["--decoder-precision", "fp32"] if decoder == "none" else []
        plain += ["--prefill-from", str(self.checkpoint)] if decoder == "hybrid" else []
        edgevl("export", output, "-o", bundle, "--no-verify", *plain)
        return bundle


def parts(name: str) -> tuple[str, str, str]:
    """(decoder, vision, rotation) of a recipe's name: `none` and "" where it says nothing of them."""
    kinds, _, rotation = name.partition("@")
    decoder, _, vision = kinds.partition("+")
    return decoder, vision or "none", rotation


def write_conversations(folder: Path, count: int) -> Path:
    """`count` cases of the calibration split, in turn of all tasks, as a .jsonl with its pictures beside it."""
    lines = []
    for index in range(count):
        task = list(TASKS)[index % len(TASKS)]
        case = TASKS[task].case("calibration", index // len(TASKS))
        answer = {"role": "assistant", "content": case.truth}
        lines.append(json.dumps([_saved(case, folder, f"{index:04d}"), answer]))
    path = folder / "conversations.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def _saved(case: Case, folder: Path, stem: str) -> dict[str, Any]:
    names = [f"{stem}-{i:02d}.png" for i in range(len(case.pictures))]
    for name, picture in zip(names, case.pictures):
        picture.save(folder / name)
    if case.video:
        items: list[dict[str, Any]] = [{"type": "video", "video": names}]
    else:
        limit = {"max_pixels": case.max_pixels} if case.max_pixels else {}
        items = [{"type": "image", "image": name, **limit} for name in names]
    return {"role": "user", "content": [*items, {"type": "text", "text": case.question}]}


def _measure(name: str, bundle: Path, cases: int, told: list[tuple[Any, str]], base: Answers | None) -> Row:
    found = None if base is None else divergence(base, answer_logits(bundle, told))
    vision_mb, decoder_mb = ((bundle / f"{part}.onnx.data").stat().st_size / 1e6 for part in ("vision", "decoder"))
    kl, top1 = (None, None) if found is None else (found.kl, found.top1)
    return Row(name, vision_mb, decoder_mb, kl, top1, score_bundle(bundle, list(TASKS), cases))


def _line(row: Row, base: Row) -> tuple[str, ...]:
    """Scores in points of the mean over tasks, and how many answers became right or wrong against the base."""
    scores = summarize(row.answered)
    right = 100 * sum(s.right for s in scores) / len(scores)
    worst = min(zip(scores, summarize(base.answered)), key=lambda pair: pair[0].right - pair[1].right)
    lost = sum(b.score.correct and not a.score.correct for a, b in zip(row.answered, base.answered))
    won = sum(a.score.correct and not b.score.correct for a, b in zip(row.answered, base.answered))
    kl = "" if row.kl is None else f"{row.kl:.4f}" if row.kl >= 1e-4 else f"{row.kl:.1e}"
    top1 = "" if row.top1 is None else f"{row.top1:.1%}"
    drop = 100 * (worst[0].right - worst[1].right)
    changed = "" if row is base else f"+{won} −{lost}"
    most = "" if row is base else f"{worst[0].task} {drop:+.1f}"
    return row.name, f"{row.vision_mb:.2f}", f"{row.decoder_mb:.2f}", kl, top1, f"{right:.1f}", changed, most


def _details(row: Row) -> str:
    return f"{row.name}: " + ", ".join(f"{s.task} {100 * s.right:.1f}" for s in summarize(row.answered))


@click.command()
@click.argument("checkpoint", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--samples", default=64, show_default=True, type=click.IntRange(1), help="Conversations to calibrate on.")
@click.option("--cases", default=200, show_default=True, type=click.IntRange(1), help="Of every task, to score on.")
@click.option("--recipes", default=",".join(RECIPES), show_default=True)
@click.option(
    "--speed",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="A checkpoint of full size, to measure the speed of every recipe's formats on.",
)
@click.option(
    "--bundles",
    default=Path("out/speed"),
    show_default=True,
    type=click.Path(path_type=Path),
    help="Where the bundles of --speed are kept; those there already are used.",
)
def main(checkpoint: Path, samples: int, cases: int, recipes: str, speed: Path | None, bundles: Path) -> None:
    """Quantize CHECKPOINT (the demo model) by every recipe and score what came out."""
    names = recipes.split(",")
    _check_names(names)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        quantizer = Quantizer(checkpoint, folder, write_conversations(folder, samples + 8), samples)
        told = _held_out(samples + 8)
        edgevl("export", checkpoint, "-o", folder / "fp32", "--no-verify", "--precision", "fp32")
        base = _measure("fp32", folder / "fp32", cases, told, None)
        original = list(answer_logits(folder / "fp32", told))
        click.echo(_details(base), err=True)
        rows = [base]
        for name in tqdm(names, file=sys.stderr, disable=None):
            rows.append(_measure(name, quantizer.bundle(name), cases, told, original))
            click.echo(_details(rows[-1]), err=True)
        speeds = Speeds({}, {}, {}, "")
        if speed is not None:
            speeds = measure_speeds(speed, bundles, [parts(name)[:2] for name in names])
    headers = ["recipe", "vision MB", "decoder MB", "KL", "same top token", "mean score", "answers", "worst task"]
    headers += ["vision s", "prefill s", "tokens / s"] if speeds.what else []
    table = [_line(row, base) + (_speed(row.name, speeds) if speeds.what else ()) for row in rows]
    click.echo(tabulate(table, headers=headers, tablefmt="github", disable_numparse=True))
    total, positions = len(base.answered), sum(len(logits) for logits, _ in original)
    click.echo(
        f"\n{samples} samples; KL over {positions} tokens of {len(told)} answers; scores over {total} cases; what"
    )
    click.echo(f"no recipe quantizes in fp32; {cpu_model()}")
    if speeds.what:
        click.echo(f"speed: {speeds.what}")


def _check_names(names: Sequence[str]) -> None:
    """Before minutes of measuring: of the parts that RECIPES is made of, put together as they may be."""
    known = [[*dict.fromkeys(of)] for of in zip(*map(parts, RECIPES))]
    for name in names:
        for part, what, among in zip(parts(name), ("recipe", "vision recipe", "rotation"), known):
            if part not in among:
                expected = ", ".join(filter(None, among))
                raise click.UsageError(f"--recipes: {name!r}: {what} {part!r} is unknown; expected one of {expected}")


def _held_out(start: int) -> list[tuple[Any, str]]:
    """(messages, answer) of conversations behind the first `start`, which calibration may see."""
    cases = (
        TASKS[list(TASKS)[i % len(TASKS)]].case("calibration", i // len(TASKS))
        for i in range(start, start + CONVERSATIONS)
    )
    return [(case.messages, case.truth) for case in cases]


def _speed(name: str, speeds: Speeds) -> tuple[str, str, str]:
    decoder, vision, rotation = parts(name)
    return ("", "", "") if rotation or name == "fp32" else speeds.row(decoder, vision)


if __name__ == "__main__":
    main()
