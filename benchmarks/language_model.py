"""What quantization costs a language model with real weights: KL of every recipe, through the engine, in one table.

SmolLM2-135M-Instruct (edgevl.benchmarks.smollm2) through the commands that a user would type. Calibrated on docstrings
of some modules of the standard library, compared on those of other modules and on a few texts written for this.

    python -m edgevl.benchmarks.language_model OUT [--recipes gptq-int4,w8a8]
"""

from __future__ import annotations

import ast
import hashlib
import json
import platform
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
from tabulate import tabulate
from tqdm import tqdm

from edgevl.benchmarks.divergence import Divergence, conversation_logits, divergence
from edgevl.benchmarks.output_option import OutputFile
from edgevl.benchmarks.smollm2 import write_smollm2
from edgevl.runtime.doctor import cpu_model
from edgevl.runtime.output_file import write_output

__all__ = ["calibration_texts", "held_out_texts", "main"]

Conversation = list[dict[str, Any]]


@dataclass(frozen=True)
class Variant:
    """`quantize`: options of `edgevl quantize`, None for the plain checkpoint; `export`: of `edgevl export`."""

    quantize: tuple[str, ...] | None
    export: tuple[str, ...] = ()


_PLAIN = ("--decoder-precision", "fp32")
_GROUP = ("--group-size", "64")  # 128 does not divide the width of 576
_ROTATED = ("--rotate", "r1+r2")
VARIANTS = {
    "rtn-int4": Variant(("--recipe", "rtn-int4", *_GROUP)),
    "rtn-int4-clip": Variant(("--recipe", "rtn-int4-clip", *_GROUP)),
    "gptq-int4": Variant(("--recipe", "gptq-int4", *_GROUP)),
    "gptq-int4-asymmetric": Variant(("--recipe", "gptq-int4", *_GROUP, "--asymmetric")),
    "gptq-int4-sequential": Variant(("--recipe", "gptq-int4", *_GROUP, "--true-sequential")),
    "gptq-int4-g32": Variant(("--recipe", "gptq-int4-g32")),
    "gptq-int4-down8": Variant(("--recipe", "gptq-int4-down8", *_GROUP)),
    "gptq-int4-head4": Variant(("--recipe", "gptq-int4", *_GROUP), ("--head-bits", "4")),
    "int8": Variant(("--recipe", "int8", *_GROUP)),
    "rtn-int4-rotated": Variant(("--recipe", "rtn-int4", *_GROUP, *_ROTATED)),
    "gptq-int4-rotated": Variant(("--recipe", "gptq-int4", *_GROUP, *_ROTATED)),
    "gptq-int4-down8-rotated": Variant(("--recipe", "gptq-int4-down8", *_GROUP, *_ROTATED)),
    "w8a8": Variant(("--recipe", "w8a8")),
    "w8a8-rotated": Variant(("--recipe", "w8a8", *_ROTATED)),
    "w8a8-static": Variant(("--recipe", "w8a8-static")),
    "w8a8-static-rotated": Variant(("--recipe", "w8a8-static", *_ROTATED)),
    "w8a8-export": Variant(None, ("--decoder-precision", "int8")),
    "kv-int8": Variant(("--recipe", "kv-int8"), (*_PLAIN, "--kv-cache", "int8")),
}
_CALIBRATION = (
    *("argparse", "asyncio", "calendar", "collections", "configparser", "contextlib", "csv", "dataclasses", "datetime"),
    *("difflib", "email", "enum", "fractions", "ftplib", "heapq", "http", "imaplib", "inspect", "logging", "mailbox"),
    *("pathlib", "pickle", "random", "shutil", "smtplib", "statistics", "subprocess", "tarfile", "threading", "urllib"),
)
_HELD_OUT = ("bisect", "concurrent", "copy", "decimal", "functools", "gettext", "json", "ssl", "textwrap", "uuid")
_CHARACTERS = (300, 700)  # of an answer: shorter docstrings are left out, longer ones are cut
_OWN = {
    "Tell me a short story about a lighthouse.": (
        "For thirty years nobody had climbed the lighthouse at the end of the bay. Then, one winter, a girl from the "
        "village found the key under a flat stone. The stairs were wet and some of them were missing, but she counted "
        "each step aloud until she stood at the top. The lamp was broken. She lit a candle instead, put it behind the "
        "old glass, and went home for supper. That night three fishing boats came back through the fog, and their "
        "captains asked everyone in the harbour who had turned the light on again."
    ),
    "What should I look at before I buy a used bicycle?": (
        "Start with the frame: look for cracks near the welds and for dents under the paint. Spin both wheels and "
        "watch whether they wobble or touch the brakes. Then try the gears under load, not only on a stand. A worn "
        "chain costs little, but if the cassette and the chainrings are worn as well, the repair may cost more than "
        "the bicycle. Finally, ask for a receipt and compare the number on the frame with the papers."
    ),
    "Write a news item about a library that opens on Sundays.": (
        "The city library will open its doors on Sundays from next month. The council approved the plan on Tuesday by "
        "twenty votes to eleven, after two years of debate about the cost. Visitors will be able to read, borrow and "
        "return books between ten and four, although the reading room on the second floor stays closed. The director "
        "said that families had asked for the change more than anyone else, and that six new people were hired."
    ),
    "Explain why the sky is red in the evening.": (
        "In the evening the light of the sun comes in at a low angle and crosses much more air than at noon. On its "
        "way the short waves, blue and violet, are scattered to all sides, so little of them is left at the end. "
        "The long waves, orange and red, go almost straight on. Dust and water drops in the air make the colours "
        "stronger, which is why the sky can be so bright after a volcano has erupted or when rain is near."
    ),
}


def _docstrings(modules: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """(qualified name, docstring) of functions, classes and modules of the standard library, in order."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for module in modules:
        path = root / module
        for file in sorted(path.glob("*.py")) if path.is_dir() else [path.with_suffix(".py")]:
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                    text = ast.get_docstring(node) or ""
                    if len(text) >= _CHARACTERS[0]:
                        yield f"{module}.{getattr(node, 'name', file.stem)}", text[: _CHARACTERS[1]]


def _conversation(question: str, answer: str) -> Conversation:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _asked(found: list[tuple[str, str]], count: int) -> list[Conversation]:
    """`count` of them, evenly spread."""
    chosen = [found[i] for i in np.linspace(0, len(found) - 1, count).astype(int)]
    return [_conversation(f"Explain {name} in Python.", text) for name, text in chosen]


def calibration_texts(count: int) -> list[Conversation]:
    return _asked(list(_docstrings(_CALIBRATION)), count)


def held_out_texts(count: int = 8) -> list[Conversation]:
    """Other modules' docstrings, and texts of another kind."""
    return _asked(list(_docstrings(_HELD_OUT)), count) + [_conversation(*pair) for pair in _OWN.items()]


def _edgevl(*arguments: object) -> None:
    command = [sys.executable, "-m", "edgevl.runtime", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise click.ClickException(f"edgevl {' '.join(map(str, arguments))}: {done.stderr.strip()}")


def _kept(folder: Path, options: tuple[str, ...], samples: int) -> Path:
    """Where a checkpoint that these options made lies. It was calibrated on some texts: other ones (of another number
    of samples, or of another Python) have a folder of their own."""
    texts = hashlib.sha256((folder / "calibration.jsonl").read_bytes()).hexdigest()[:8]
    return folder / "-".join([*(o.lstrip("-") for o in options[1:]), str(samples), texts])


def _measure(name: str, folder: Path, reference: list[Any], held_out: list[Conversation], samples: int) -> Any:
    """Quantize, export and compare one variant; what was quantized is kept for a variant with the same options."""
    variant, checkpoint = VARIANTS[name], folder / "smollm2"
    if variant.quantize is not None:
        checkpoint = _kept(folder, variant.quantize, samples)
        if not checkpoint.exists():
            given = ("--images", folder / "calibration.jsonl", "--samples", samples, "--resume")
            _edgevl("quantize", folder / "smollm2", "-o", checkpoint, *variant.quantize, *given)
    bundle = folder / "bundle"
    _edgevl(
        "export", checkpoint, "-o", bundle, "--overwrite", "--no-verify", "--vision-precision", "fp32", *variant.export
    )
    size = (bundle / "decoder.onnx.data").stat().st_size / 1e6
    return size, divergence(reference, conversation_logits(bundle, held_out))


@click.command()
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path))
@click.option("--samples", default=64, show_default=True, type=click.IntRange(1), help="Conversations to calibrate on.")
@click.option("--recipes", default=",".join(VARIANTS), show_default=True, help="Separated by commas.")
@click.option("--json", "as_json", type=OutputFile(), help="Write the figures there too.")
def main(folder: Path, samples: int, recipes: str, as_json: Path | None) -> None:
    """Quantize SmolLM2-135M by every recipe into FOLDER and compare what came out with the original."""
    names = recipes.split(",")
    unknown = sorted(set(names) - set(VARIANTS))
    if unknown:
        raise click.UsageError(f"recipes {', '.join(unknown)} are unknown; expected some of {', '.join(VARIANTS)}")
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "smollm2").exists():
        partial = folder / ".smollm2.partial"
        shutil.rmtree(partial, ignore_errors=True)
        write_smollm2(partial)
        partial.rename(folder / "smollm2")
    lines = [json.dumps(c) for c in calibration_texts(samples + 8)]
    (folder / "calibration.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    held_out = held_out_texts()
    _edgevl("export", folder / "smollm2", "-o", folder / "fp32", "--overwrite", "--no-verify", "--precision", "fp32")
    reference = list(conversation_logits(folder / "fp32", held_out))
    base = divergence(reference, iter(reference))
    rows: dict[str, tuple[float, Divergence]] = {}
    for name in tqdm(names, file=sys.stderr, disable=None):
        rows[name] = _measure(name, folder, reference, held_out, samples)
        if as_json is not None:
            found = {n: {"decoder_mb": s, **asdict(d)} for n, (s, d) in rows.items()}
            write_output(as_json, json.dumps({"fp32": asdict(base), **found}, indent=1) + "\n")
    rounding = rows.get("rtn-int4")
    table = [("fp32", "", "", "", "", f"{base.perplexity:.2f}")]
    for name, (size, d) in rows.items():
        ratio = f"{d.kl / rounding[1].kl:.3f}" if rounding else ""
        table.append((name, f"{size:.1f}", f"{d.kl:.4f}", ratio, f"{d.top1:.1%}", f"{d.perplexity:.2f}"))
    headers = ("recipe", "decoder MB", "KL", "of rtn-int4's", "same top token", "perplexity")
    click.echo(tabulate(table, headers=headers, tablefmt="github", disable_numparse=True))
    python = platform.python_version()
    click.echo(f"\n{samples} samples; {base.tokens} held-out tokens; texts of Python {python}; {cpu_model()}")


if __name__ == "__main__":
    main()
