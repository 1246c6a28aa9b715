"""Rotations that fold into a checkpoint exactly, so that no channel is much larger than another before it is rounded.

R1 turns the residual stream (QuaRot, arXiv 2404.00456, section 4.1; SpinQuant, arXiv 2405.16406): the weights of
RMSNorms go into the layers behind them, after which the norms commute with an orthogonal Q, and everything that writes
to the stream (embedding, o_proj, down_proj, the last layer of the vision encoder's merger) or reads from it (q, k, v,
gate, up, head) takes Q in. R2 turns the values of every head between v_proj and o_proj. The model computes what it did;
the checkpoint stays Qwen2-VL's, but for a head of its own: the final norm's weights are in the head and not in the
embedding, so the two can be one table only where all those weights are equal.

Rotations in front of down_proj or of queries and keys would need work at run time and are not made.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from edgevl.calibration.hadamard import hadamard_factors
from edgevl.calibration.recipes import ROTATIONS
from edgevl.runtime.checkpoint import Checkpoint, expected_shapes
from edgevl.runtime.config import ModelConfig, TextConfig
from edgevl.runtime.errors import CheckpointError

__all__ = ["RotatedCheckpoint", "Rotation", "random_rotation"]

_ROWS = 1 << 24  # numbers that are turned at once: 64 MB
_R2 = 1  # second word of the seed of R2's signs, so that they are not R1's
_EMBEDDING, _HEAD, _NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
_MERGER = "visual.merger.mlp.2"
# Layers that read the residual stream, and the norm in front of them.
_READERS = {
    **{f"self_attn.{p}_proj.weight": "input_layernorm.weight" for p in "qkv"},
    **{f"mlp.{p}_proj.weight": "post_attention_layernorm.weight" for p in ("gate", "up")},
}
_WRITERS = ("self_attn.o_proj.weight", "mlp.down_proj.weight")
_VALUES = ("self_attn.v_proj.weight", "self_attn.v_proj.bias")
_FLOAT16_MAX = 65504.0


@dataclass(frozen=True)
class Rotation:
    """An orthogonal Q [n, n] = diag(signs) (F1 ⊗ F2 ⊗ ...), float32 factors, applied without being written out."""

    signs: np.ndarray
    factors: tuple[np.ndarray, ...]

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """x Q, for x float32 [..., n]."""
        shape, y = x.shape, (x * self.signs).reshape(-1)
        for factor in self.factors:  # each is contracted with the first axis, which becomes the last one
            size = len(factor)
            y = y.reshape(-1, size, shape[-1] // size).transpose(0, 2, 1).reshape(-1, size) @ factor
        return y.reshape(shape)

    def turn_columns(self, weight: np.ndarray) -> np.ndarray:
        """W Q for W [N, K] that reads what is turned, K any multiple of n: blocks of n columns are turned alike."""
        rows, columns = weight.shape
        out = np.empty_like(weight, dtype=np.float32)
        step = max(1, _ROWS // columns)
        for i in range(0, rows, step):
            some = weight[i : i + step]
            out[i : i + step] = self(some.reshape(len(some), -1, len(self.signs))).reshape(some.shape)
        return out

    def turn_rows(self, weight: np.ndarray) -> np.ndarray:
        """Qᵀ W for W [N] or [N, K] that writes what is turned, N any multiple of n."""
        return np.ascontiguousarray(
            self.turn_columns(np.ascontiguousarray(weight.reshape(len(weight), -1).T)).T
        ).reshape(weight.shape)


def random_rotation(size: int, *seed: int) -> Rotation:
    """A Hadamard matrix with random signs, scaled to be orthogonal; where none is known for the size, the Q of a random
    matrix (Haar measure: Mezzadri, How to generate random matrices from the classical compact groups, 2007)."""
    generator = np.random.default_rng(seed)
    factors = hadamard_factors(size)
    if factors is not None:
        signs = generator.choice(np.array([-1.0, 1.0], np.float32), size)
        return Rotation(signs, tuple((f / math.sqrt(len(f))).astype(np.float32) for f in factors))
    q, r = np.linalg.qr(generator.standard_normal((size, size)))
    return Rotation(np.ones(size, np.float32), ((q * np.sign(np.diag(r))).astype(np.float32),))


class RotatedCheckpoint:
    """A plain checkpoint as it is after rotation, tensor by tensor as they are read: nothing is held.

    Numbers that change are those of the `dtype` in which they will be stored: float32 where the checkpoint is, else
    float16, whose 11 bits of mantissa round a turned weight by an eighth of what bfloat16 rounded the original one.
    A context manager.
    """

    def __init__(self, checkpoint: Checkpoint, rotation: str, seed: int = 0) -> None:
        """`rotation`: one of ROTATIONS but "none". ValueError for another."""
        if rotation not in ROTATIONS[1:]:
            raise ValueError(f"rotation {rotation!r}, expected one of {', '.join(ROTATIONS[1:])}")
        text = checkpoint.config.text
        self.stored = checkpoint
        self.config: ModelConfig = checkpoint.config
        self.residual = random_rotation(text.hidden_size, seed) if "r1" in rotation else None
        self._values = random_rotation(text.head_dim, seed, _R2) if "r2" in rotation else None
        self._final = np.ones(0, np.float32)
        self._plain_norm = True  # whether the final norm stays as it is
        if self.residual is not None:
            self._final = checkpoint.read(_NORM)
            self._plain_norm = text.tie_word_embeddings and bool((self._final == self._final[0]).all())
            if not self._plain_norm:
                untied: TextConfig = replace(text, tie_word_embeddings=False)
                self.config = replace(checkpoint.config, text=untied)

    @property
    def folder(self) -> Path:
        return self.stored.folder

    @property
    def quantization(self) -> None:
        return None

    def names(self) -> list[str]:
        return list(expected_shapes(self.config))

    def dtype(self, name: str) -> str:
        """ "BF16", "F16" or "F32", as it will be stored."""
        source = self.stored.dtype(self._source(name))
        return "F16" if source == "BF16" and self._changes(name) else source

    def read(self, name: str) -> np.ndarray:
        """The whole tensor, float32, in its shape. Raises CheckpointError as `Checkpoint.read`."""
        value = self.stored.read(self._source(name))
        return self._rounded(name, self._turned(name, value)) if self._changes(name) else value

    def rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows start..stop of a table (embedding, head), or of a tensor that stays; else as `Checkpoint.rows`."""
        if self._changes(name) and name not in (_EMBEDDING, _HEAD):
            return self.read(name)[start:stop].reshape(stop - start, -1)
        value = self.stored.rows(self._source(name), start, stop)
        return self._rounded(name, self._turned(name, value)) if self._changes(name) else value

    def close(self) -> None:
        self.stored.close()

    # ------------------------------------------------------------------ one tensor

    def _source(self, name: str) -> str:
        """The tensor from which `name` is made."""
        return _EMBEDDING if name == _HEAD and self.stored.config.text.tie_word_embeddings else name

    def _changes(self, name: str) -> bool:
        if not name.startswith("model.layers."):
            tables = (_EMBEDDING, _HEAD, f"{_MERGER}.weight", f"{_MERGER}.bias")
            return self.residual is not None and (name in tables or (name == _NORM and not self._plain_norm))
        inner = name.split(".", 3)[3]
        if self._values is not None and (inner in _VALUES or inner == "self_attn.o_proj.weight"):
            return True
        return self.residual is not None and (inner in (*_READERS, *_WRITERS) or inner.endswith("layernorm.weight"))

    def _turned(self, name: str, value: np.ndarray) -> np.ndarray:
        r1, r2 = self.residual, self._values
        if name.startswith("model.layers."):
            _, _, layer, inner = name.split(".", 3)
            if inner.endswith("layernorm.weight"):
                return np.ones_like(value)
            if r2 is not None:
                if inner in _VALUES:
                    value = r2.turn_rows(value)
                elif inner == "self_attn.o_proj.weight":
                    value = r2.turn_columns(value)
            if r1 is not None and inner in _READERS:
                value = r1.turn_columns(value * self.stored.read(f"model.layers.{layer}.{_READERS[inner]}"))
            elif r1 is not None and inner in _WRITERS:
                value = r1.turn_rows(value)
            return value
        if r1 is None or name == _NORM:
            return np.ones_like(value)
        if name.startswith(_MERGER):
            return r1.turn_rows(value)
        return r1.turn_columns(value if name == _EMBEDDING or self._plain_norm else value * self._final)

    def _rounded(self, name: str, value: np.ndarray) -> np.ndarray:
        if self.dtype(name) != "F16":
            return value
        largest = float(np.abs(value).max(initial=0))
        if largest > _FLOAT16_MAX:
            raise CheckpointError(
                f"{self.folder}: {name!r} holds {largest:g} when rotated, more than float16 can; convert the "
                "checkpoint to float32 first, or leave --rotate away"
            )
        return value.astype(np.float16).astype(np.float32)
