"""Small bundles, exported once per worker and shared by the tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import random_model, save_checkpoint
from reference import Reference
from transformers import Qwen2VLForConditionalGeneration

from edgevl.export.exporter import ExportOptions, export_bundle
from edgevl.runtime.bundle import Bundle
from edgevl.runtime.generation import VisionLanguageModel

# What a machine without a GPU runs: the test group installs openvino, a device may not have it.
USABLE = {"ort-cpu": True, "openvino": find_spec("openvino") is not None, "ort-cuda": False, "tensorrt": False}


@pytest.fixture(autouse=True)
def same_threads() -> Iterator[None]:
    """What a test sets (the peer transformers does) is not what the next one has: sums are rounded by threads."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@dataclass(frozen=True)
class Pair:
    """A checkpoint in transformers, and the same exported."""

    model: Qwen2VLForConditionalGeneration
    checkpoint: Path
    bundle: Path

    def reference(self) -> Reference:
        return Reference(self.model, Bundle.open(self.bundle).image_processor)

    def open(self, **options: Any) -> VisionLanguageModel:
        return VisionLanguageModel.open(self.bundle, "ort-cpu", threads=2, **options)


MakePair = Callable[..., Pair]


@pytest.fixture(scope="session")
def make_pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MakePair]:
    """make_pair(precision=..., **text config): exported once for equal arguments."""
    made: dict[str, Pair] = {}

    def make(precision: str = "fp32", **fields: Any) -> Pair:
        key = repr((precision, sorted(fields.items())))
        if key not in made:
            folder = tmp_path_factory.mktemp("pair")
            model = random_model(**fields)
            checkpoint = save_checkpoint(model, folder / "checkpoint")
            export_bundle(checkpoint, folder / "bundle", ExportOptions(precision=precision))
            made[key] = Pair(model, checkpoint, folder / "bundle")
        return made[key]

    yield make


@pytest.fixture(scope="session")
def tiny(make_pair: MakePair) -> Pair:
    """Random weights, fp32, tied head."""
    return make_pair()
