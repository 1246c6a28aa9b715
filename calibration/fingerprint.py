"""What a run of the quantization was asked, as JSON that a later run compares before it goes on.

Weights are told apart by bytes of every tensor, not by their files' times, which copying changes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from edgevl.calibration.dataset import Sample
from edgevl.calibration.recipes import Recipe
from edgevl.calibration.weights import Stored
from edgevl.runtime.errors import CheckpointError, InputError
from edgevl.runtime.shards import Entry, read_header, weight_files

__all__ = ["check_same_run", "fingerprint"]

_SAMPLE = 4096  # bytes of every tensor's beginning, middle and end: norms and biases are seen whole


def fingerprint(
    checkpoint: Stored, recipe: Recipe, samples: Sequence[Sample], held_out: Sequence[Sample]
) -> dict[str, Any]:
    """What must be equal for a run to go on: the recipe, config.json, the weights, and both kinds of samples.

    Raises:
        CheckpointError: a file cannot be read.
    """
    config = checkpoint.folder / "config.json"
    try:
        said = hashlib.sha256(config.read_bytes()).hexdigest()
    except OSError as e:
        raise CheckpointError(f"{config}: cannot be read ({e})") from None
    return {
        "recipe": asdict(recipe),
        "config": said,
        "weights": {path.name: _weights(path) for path in weight_files(checkpoint.folder)[0]},
        "samples": _samples(samples),
        "held-out samples": _samples(held_out),
    }


def check_same_run(folder: Path, state: Path, wanted: dict[str, Any]) -> None:
    """Whether the run in `folder` was asked the same, as its file `state` says.

    Raises:
        InputError: it was not, or the file is damaged.
    """
    try:
        found = json.loads(state.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise InputError(f"{state}: cannot be read ({e}); run without --resume to start over") from None
    known = found if isinstance(found, dict) else {}
    different = [key for key, value in wanted.items() if known.get(key) != value]
    if different:
        raise InputError(f"{folder}: was begun with other {', '.join(different)}; run without --resume to start over")


def _weights(path: Path) -> str:
    """Of a file's size, every tensor's name, dtype and shape, and some of its bytes. Whatever changes a model moves
    all values of a tensor, so that samples tell: a second's work for gigabytes."""
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            digest.update(str(path.stat().st_size).encode())
            for entry in read_header(path):
                digest.update(json.dumps([entry.stored_name, entry.dtype, entry.shape]).encode())
                for start, stop in _spans(entry):
                    file.seek(start)
                    digest.update(file.read(stop - start))
    except OSError as e:
        raise CheckpointError(f"{path}: cannot be read ({e})") from None
    return digest.hexdigest()


def _spans(entry: Entry) -> list[tuple[int, int]]:
    """Byte ranges of a tensor that are looked at: all of a small one."""
    if entry.end - entry.begin <= 3 * _SAMPLE:
        return [(entry.begin, entry.end)]
    middle = (entry.begin + entry.end - _SAMPLE) // 2
    return [(start, start + _SAMPLE) for start in (entry.begin, middle, entry.end - _SAMPLE)]


def _samples(samples: Sequence[Sample]) -> dict[str, Any]:
    digest = hashlib.sha256()
    for sample in samples:
        digest.update(json.dumps([len(sample.ids), len(sample.vision)]).encode())
        digest.update(sample.ids.tobytes() + sample.positions.tobytes())
        for picture in sample.vision:
            digest.update(np.ascontiguousarray(picture.pixel_values).data)
    return {"count": len(samples), "sha256": digest.hexdigest()}
