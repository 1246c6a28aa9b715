"""Scales of an INT8 KV cache as checkpoints store them: what config.json says, and where the numbers are.

`quantization_config.kv_cache_scheme` and the tensors `model.layers.N.self_attn.k_scale` and `v_scale` are the names of
compressed-tensors (quantization/lifecycle/initialize.py) and vLLM. A scale is one number, one per head, or, as written
by edgevl.calibration, one per channel of every head: [kv_heads, 1, head_dim]. Knows files, not graphs.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgevl.runtime.config import TextConfig
from edgevl.runtime.errors import CheckpointError
from edgevl.runtime.shards import AGAIN, DTYPES, Entry, ShardReader

__all__ = ["KV_SCHEME_KEY", "CacheScales", "cache_scheme", "cache_scheme_only", "take_cache_scales"]

KV_SCHEME_KEY = "kv_cache_scheme"
CALIBRATE = "make them with `edgevl quantize CHECKPOINT -o QCHECKPOINT --recipe R --kv-cache int8 --images PICTURES`"
_SCALE = re.compile(r"model\.layers\.(\d+)\.self_attn\.([kv])_scale")


def cache_scheme(bits: int = 8) -> dict[str, Any]:
    """What config.json says of static symmetric scales per channel."""
    return {
        **{"num_bits": bits, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False},
        **{"group_size": None, "actorder": None},
    }


def cache_scheme_only(said: dict[str, Any]) -> bool:
    """Whether a quantization_config is about the cache and no layer: its weights are plain."""
    return bool(said.get(KV_SCHEME_KEY)) and said.get("config_groups") == {}


@dataclass(frozen=True)
class CacheScales:
    """Where a checkpoint's scales are; made by `take_cache_scales`. `scheme` is the config's word, None where it says
    nothing."""

    folder: Path
    config: TextConfig
    scheme: dict[str, Any] | None
    entries: dict[tuple[int, str], Entry]

    def check(self) -> None:
        """Raises CheckpointError unless there is a symmetric int8 scale for the keys and values of every layer."""
        if not self.entries:
            raise CheckpointError(
                f"{self.folder}: an INT8 KV cache needs scales of keys and values (self_attn.k_scale, v_scale), this "
                f"checkpoint has none; {CALIBRATE} (recipe kv-int8 leaves the weights as they are)"
            )
        scheme = self.scheme or {}
        wrong = {k: scheme.get(k) for k, v in _WANTED.items() if scheme.get(k) != v}
        if wrong:
            raise CheckpointError(
                f"{self.folder / 'config.json'}: {KV_SCHEME_KEY} has {wrong}, an INT8 KV cache needs "
                f"{ {k: _WANTED[k] for k in wrong} }; {CALIBRATE}"
            )
        for layer in range(self.config.num_hidden_layers):
            for kind in "kv":
                if (layer, kind) not in self.entries:
                    raise CheckpointError(
                        f"{self.folder}: tensor 'model.layers.{layer}.self_attn.{kind}_scale' is missing, scales of "
                        f"other layers are there; {AGAIN}"
                    )

    def read(self, files: ShardReader, layer: int, kind: str) -> np.ndarray:
        """float32 [kv_heads, head_dim] of `kind` "k" or "v".

        Raises:
            CheckpointError: a scale that is not finite or not positive.
        """
        entry = self.entries[layer, kind]
        flat = files.floats(entry.stored_name, entry, 0, math.prod(entry.shape))
        if not (flat > 0).all():
            raise CheckpointError(
                f"{entry.path}: tensor {entry.stored_name!r} holds {flat.min():g}; scales must be positive: {AGAIN}"
            )
        shape = (self.config.num_key_value_heads, self.config.head_dim)
        return np.broadcast_to(flat.reshape(_broadcast(entry.shape, self.config)), shape).astype(np.float32)


_WANTED: dict[str, Any] = {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": False}


def take_cache_scales(
    folder: Path, config: TextConfig, named: dict[str, Entry], said: dict[str, Any] | None
) -> CacheScales:
    """Take the scales out of `named` (released name -> entry); `said` is the whole quantization_config.

    Raises:
        CheckpointError: a scale of a layer that does not exist, or of a shape or dtype that is not read.
    """
    entries: dict[tuple[int, str], Entry] = {}
    for name in [n for n in named if _SCALE.fullmatch(n)]:
        match = _SCALE.fullmatch(name)
        layer, kind = (int(match[1]), match[2]) if match else (0, "")
        entry = named.pop(name)
        heads, dim = config.num_key_value_heads, config.head_dim
        if layer >= config.num_hidden_layers or entry.dtype not in DTYPES or not _broadcast(entry.shape, config):
            raise CheckpointError(
                f"{entry.path}: tensor {entry.stored_name!r} is {entry.dtype} {list(entry.shape)}, expected a scale of "
                f"one of {config.num_hidden_layers} layers: [1], [{heads}, 1, 1] or [{heads}, 1, {dim}]; {AGAIN}"
            )
        entries[layer, kind] = entry
    scheme = (said or {}).get(KV_SCHEME_KEY)
    return CacheScales(folder, config, scheme if isinstance(scheme, dict) else None, entries)


def _broadcast(shape: tuple[int, ...], config: TextConfig) -> tuple[int, int] | None:
    """The shape that broadcasts to [kv_heads, head_dim], None for one that is not a scale's."""
    heads, dim = config.num_key_value_heads, config.head_dim
    known = {(): (1, 1), (1,): (1, 1), (heads, 1, 1): (heads, 1), (heads, 1, dim): (heads, dim)}
    return known.get(shape)
