"""What a form costs per token: preparing the vocabulary, compiling the form, and the mask of every step.

Method: forms are walked with random logits (no engine runs) until `--tokens` tokens are taken; a step is mask, argmax
and accept, timed together and apart from a plain argmax. Medians, since compiling parts of a form lazily makes some
first steps slow; the slowest is shown too.

    python -m edgevl.benchmarks.guided BUNDLE
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
import numpy as np
from tabulate import tabulate

from edgevl.runtime.bundle import Bundle
from edgevl.runtime.errors import EdgeVLError
from edgevl.runtime.guided import Guide, GuideCompiler
from edgevl.runtime.tokenizer import Tokenizer

__all__ = ["main", "walk"]

FORMS: Mapping[str, dict[str, Any]] = {
    "json_schema, receipt": {
        "json_schema": {
            "type": "object",
            "properties": {
                "total": {"type": "number"},
                "items": {"type": "array", "items": {"type": "string", "maxLength": 40}, "maxItems": 8},
            },
            "required": ["total", "items"],
            "additionalProperties": False,
        }
    },
    "regex, [0-9]+\\.[0-9]{2}": {"regex": "[0-9]+\\.[0-9]{2}"},
    "regex, free text of 200": {"regex": "(?s).{200}"},
    "choices, three": {"choices": ["yes", "no", "cannot tell"]},
}


def walk(guide: Guide, vocab_size: int, tokens: int) -> list[float]:
    """Seconds of each step over as many answers as `tokens` take."""
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((16, vocab_size)).astype(np.float32)
    times: list[float] = []
    while len(times) < tokens:
        state, done = guide.start(), False
        while not done and len(times) < tokens:
            row = logits[int(rng.integers(16))]
            began = time.perf_counter()
            token = int(np.argmax(state.mask(row)))
            done = state.accept(token)
            times.append(time.perf_counter() - began)
    return times


@click.command(help="What answers held to a form cost per token with BUNDLE's vocabulary.")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--tokens", type=click.IntRange(1), default=400, show_default=True)
def main(bundle: Path, tokens: int) -> None:
    try:
        opened = Bundle.open(bundle)
        vocab = opened.model.text.vocab_size
        tokenizer = Tokenizer.from_file(opened.path("tokenizer.json"))
        compiler = GuideCompiler(tokenizer, vocab, opened.model.tokens.eos_token_ids)
        began = time.perf_counter()
        compiler.compile(choices=["a"])
        print(f"vocabulary of {vocab} prepared in {time.perf_counter() - began:.2f} s, once per model")
        row = np.random.default_rng(0).standard_normal(vocab).astype(np.float32)
        plain = []
        for _ in range(tokens):
            began = time.perf_counter()
            np.argmax(row)
            plain.append(time.perf_counter() - began)
        rows = [("none (argmax)", 0.0, statistics.median(plain) * 1e6, max(plain) * 1e6)]
        for name, form in FORMS.items():
            began = time.perf_counter()
            guide = compiler.compile(**form)
            compiled = time.perf_counter() - began
            assert guide is not None
            times = walk(guide, vocab, tokens)
            rows.append((name, compiled * 1e3, statistics.median(times) * 1e6, max(times) * 1e6))
    except EdgeVLError as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(e.exit_status)
    headers = ("form", "compile ms", "step µs, median", "slowest")
    print(tabulate(rows, headers=headers, floatfmt=("", ".1f", ".0f", ".0f")))


if __name__ == "__main__":
    main()
