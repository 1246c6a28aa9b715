"""What each recipe of `edgevl quantize` costs the demo model: size, KL, scores. One row per recipe, all in one run.

Calibrated on the yardstick's calibration split (questions with their true answers), scored on its test split: other
words, other faces, other random streams. Every step is the command that a user would type.

    python -m edgevl.benchmarks.recipes demo/model [--samples 64] [--cases 200]
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from tabulate import tabulate
from tqdm import tqdm

from edgevl.runtime.doctor import cpu_model
from edgevl.tasks import TASKS, Answered, Case, score_bundle, summarize

__all__ = ["main", "write_conversations"]

RECIPES = (
    *("rtn-int4", "rtn-int4-clip", "gptq-int4", "gptq-int4-g32", "gptq-int4-down8", "int8", "w8a8", "w8a8-static"),
    *("gptq-int4@r1+r2", "w8a8@r1+r2", "w8a8-static@r1+r2"),  # rotated
    *("none+int8", "none+int8-static", "w8a8+int8", "w8a8-static+int8-static", "gptq-int4+int8"),  # decoder+vision
)
REPORT = "edgevl_quantize.json"


@dataclass(frozen=True)
class Row:
    name: str
    vision_mb: float
    decoder_mb: float
    kl: float | None
    top1: float | None
    answered: list[Answered]


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


def _edgevl(*arguments: object) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "edgevl.runtime", *map(str, arguments)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise click.ClickException(f"edgevl {' '.join(map(str, arguments))}: {done.stderr.strip()}")


def _measure(checkpoint: Path, name: str, cases: int, folder: Path, report: Path | None, *options: str) -> Row:
    bundle = folder / f"bundle-{name}"
    _edgevl("export", checkpoint, "-o", bundle, "--no-verify", *options)
    data = {} if report is None else json.loads(report.read_text(encoding="utf-8"))["divergence"]
    sizes = ((bundle / f"{part}.onnx.data").stat().st_size / 1e6 for part in ("vision", "decoder"))
    return Row(name, *sizes, data.get("kl"), data.get("top1"), score_bundle(bundle, list(TASKS), cases))


def _line(row: Row, base: Row) -> tuple[str, ...]:
    """Scores in points of the mean over tasks, and how many answers became right or wrong against the base."""
    scores = summarize(row.answered)
    right = 100 * sum(s.right for s in scores) / len(scores)
    worst = min(zip(scores, summarize(base.answered)), key=lambda pair: pair[0].right - pair[1].right)
    lost = sum(b.score.correct and not a.score.correct for a, b in zip(row.answered, base.answered))
    won = sum(a.score.correct and not b.score.correct for a, b in zip(row.answered, base.answered))
    kl, top1 = ("" if row.kl is None else f"{row.kl:.4f}"), ("" if row.top1 is None else f"{row.top1:.1%}")
    drop = 100 * (worst[0].right - worst[1].right)
    changed = "" if row is base else f"+{won} −{lost}"
    most = "" if row is base else f"{worst[0].task} {drop:+.1f}"
    return row.name, f"{row.vision_mb:.2f}", f"{row.decoder_mb:.2f}", kl, top1, f"{right:.1f}", changed, most


def _details(row: Row) -> str:
    return f"{row.name}: " + ", ".join(f"{s.task} {100 * s.right:.1f}" for s in summarize(row.answered))


@click.command()
@click.argument("checkpoint", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--samples", default=64, show_default=True, help="Conversations to calibrate on.")
@click.option("--cases", default=200, show_default=True, help="Of every task, to score on.")
@click.option("--recipes", default=",".join(RECIPES), show_default=True)
def main(checkpoint: Path, samples: int, cases: int, recipes: str) -> None:
    """Quantize CHECKPOINT (the demo model) by every recipe and score what came out."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        conversations = write_conversations(folder, samples + 8)
        base = _measure(checkpoint, "fp32", cases, folder, None, "--precision", "fp32")
        click.echo(_details(base), err=True)
        rows = [base]
        for name in tqdm(recipes.split(","), file=sys.stderr, disable=None):
            output = folder / name
            kinds, _, rotation = name.partition("@")
            decoder, _, vision = kinds.partition("+")
            given = ("--images", conversations, "--samples", samples, *(["--vision", vision] if vision else []))
            given += ("--rotate", rotation) if rotation else ()
            _edgevl("quantize", checkpoint, "-o", output, "--recipe", decoder, *given)
            plain = [] if vision else ["--vision-precision", "fp32"]
            plain += ["--decoder-precision", "fp32"] if decoder == "none" else []
            rows.append(_measure(output, name, cases, folder, output / REPORT, *plain))
            click.echo(_details(rows[-1]), err=True)
        headers = ("recipe", "vision MB", "decoder MB", "KL", "same top token", "mean score", "answers", "worst task")
        table = [_line(row, base) for row in rows]
    click.echo(tabulate(table, headers=headers, tablefmt="github", disable_numparse=True))
    total = len(base.answered)
    click.echo(f"\n{samples} samples; scores over {total} cases; what no recipe quantizes in fp32; {cpu_model()}")


if __name__ == "__main__":
    main()
