"""How fast the graphs are that each recipe leads to, on a checkpoint of full size, all in one run of `edgevl bench`.

Speed depends on formats, not on what is in them: recipes of one format share a bundle, and what `edgevl export` can
round by itself needs no calibration. Formats that only a calibrated checkpoint has (most of an hour at full size) are
measured where their bundle lies in the folder already.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import click

__all__ = ["DECODERS", "VISIONS", "Speeds", "edgevl", "measure_speeds"]


# bundle -> the options of `edgevl export` that make it; None: it takes `edgevl quantize` first
_BUNDLES: dict[str, tuple[str, ...] | None] = {
    "int4": ("--precision", "int4"),
    "int4-g32": ("--precision", "int4", "--block-size", "32"),
    "int4-down8": None,
    "int8-weights": ("--precision", "int8-weights"),
    "w8a8": ("--precision", "int8"),
    "w8a8-static": None,
    "hybrid": ("--precision", "hybrid"),
    "vision-fp32": ("--precision", "int4", "--vision-precision", "fp32"),
}
# recipe -> the bundle whose decoder, or vision encoder, has its format
DECODERS = {
    **dict.fromkeys(("rtn-int4", "rtn-int4-clip", "gptq-int4"), "int4"),
    "gptq-int4-g32": "int4-g32",
    "gptq-int4-down8": "int4-down8",
    "int8": "int8-weights",
    "w8a8": "w8a8",
    "w8a8-static": "w8a8-static",
    "hybrid": "hybrid",
}
VISIONS = {"none": "vision-fp32", "int8": "int4", "int8-static": "w8a8-static"}


@dataclass(frozen=True)
class Speeds:
    """Medians by bundle: seconds of vision and prefill, tokens per second."""

    vision_s: dict[str, float]
    prefill_s: dict[str, float]
    tokens_per_s: dict[str, float]
    what: str  # "" where nothing was measured

    def row(self, decoder: str, vision: str) -> tuple[str, str, str]:
        """Vision s, prefill s, tokens / s; empty where a format was not measured."""
        of, seen = DECODERS.get(decoder, ""), VISIONS.get(vision, "")
        return (
            f"{self.vision_s[seen]:.2f}" if seen in self.vision_s else "",
            f"{self.prefill_s[of]:.2f}" if of in self.prefill_s else "",
            f"{self.tokens_per_s[of]:.1f}" if of in self.tokens_per_s else "",
        )


def edgevl(*arguments: object) -> None:
    """Run the command line tool.

    Raises:
        click.ClickException: it failed; what it said.
    """
    done = subprocess.run(
        [sys.executable, "-m", "edgevl.runtime", *map(str, arguments)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise click.ClickException(f"edgevl {' '.join(map(str, arguments))}: {done.stderr.strip()}")


def measure_speeds(checkpoint: Path, folder: Path, recipes: Sequence[tuple[str, str]], rounds: int = 3) -> Speeds:
    """A 448×448 picture and 64 new tokens through the formats of `recipes` (decoder, vision).

    Args:
        folder: where the bundles are kept; those that are there already are used.
    """
    named = [table.get(name, "") for recipe in recipes for table, name in zip((DECODERS, VISIONS), recipe)]
    folder.mkdir(parents=True, exist_ok=True)
    bundles = []
    for name, options in _BUNDLES.items():
        there = (folder / name).exists()
        if name not in named or (options is None and not there):
            continue
        bundles.append(folder / name)
        if options is not None and not there:
            click.echo(f"making {folder / name}", err=True)
            edgevl("export", checkpoint, "-o", folder / name, "--no-verify", *options)
    if not bundles:
        return Speeds({}, {}, {}, "")
    with tempfile.TemporaryDirectory() as temporary:
        lines = Path(temporary) / "bench.jsonl"
        given = ("--new-tokens", 64, "--rounds", rounds, "--requests", 2, "--json", lines)
        edgevl("bench", *bundles, "--workload", "picture", *given)
        cases = [json.loads(line) for line in lines.read_text(encoding="utf-8").splitlines()]
    stages = {c["bundle"]: c["stages"] for c in cases}
    return Speeds(
        {name: s["vision_s"]["p50"] for name, s in stages.items()},
        {name: s["prefill_s"]["p50"] for name, s in stages.items()},
        {c["bundle"]: c["tokens_per_s"]["p50"] for c in cases},
        f"{checkpoint.name}, {cases[0]['describe']}; {rounds} rounds of 2 requests, median",
    )
