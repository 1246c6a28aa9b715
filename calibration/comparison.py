"""Two checkpoints of one model side by side on the same samples: every layer's error, and the logits' divergence.

Works from the files alone, so it measures any quantized checkpoint that can be read, ours or another tool's. Two
decoder layers are in memory at a time. Arithmetic is float32 with dequantized weights; inputs of W8A8 layers, also the
vision encoder's, are rounded as their kernels do, and keys and values as an INT8 KV cache with the checkpoint's scales
does. What a bundle adds (embedding and head in 8 bits, activations rounded inside weight-only kernels) is not in here:
scores of bundles hold it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from edgevl.calibration.cache_rounding import cache_rounding
from edgevl.calibration.dataset import Sample
from edgevl.calibration.dequantized import FloatCheckpoint
from edgevl.calibration.fidelity import Divergence
from edgevl.calibration.formats import quantize_channels
from edgevl.calibration.grids import dequantized, round_to_nearest
from edgevl.calibration.kv_cache import chained
from edgevl.calibration.layers import DECODER_GROUPS, MERGER_GROUPS, VISION_GROUPS, Watch
from edgevl.calibration.rotation import RotatedCheckpoint
from edgevl.calibration.streams import Streams
from edgevl.calibration.vision import vision_prefix
from edgevl.calibration.w8a8 import AFFINE
from edgevl.calibration.w8a8 import rounding as rounded_activations
from edgevl.calibration.weights import Head, Tensors, layer_weights, same_head
from edgevl.runtime.errors import InputError
from edgevl.runtime.quantized_layers import QuantizedLayer

__all__ = [
    "Comparison",
    "LinearReport",
    "check_pair",
    "compare",
    "folded",
    "heads_of",
    "layer_kinds",
    "reference_of",
    "rounding",
    "vision_rounding",
]

Progress = Callable[[int, int, str], None]  # steps done, steps in all, what is being done
_SAME_NORM = 0.02  # of its size: float16 and bfloat16 round by less, folded factors change more
_SAME_WEIGHT = 0.5  # int4 changes a weight by about a tenth of its size, a fold or a rotation by all of it


@dataclass(frozen=True)
class LinearReport:
    """One linear layer of the decoder.

    bits, group_size (-1: whole rows): None where it is plain. error: |y' - y|² / |y|² of its outputs over the samples'
    tokens, on the inputs that it has in the quantized model; rtn_error: the same for the original weight rounded to
    nearest on as many bits and the same groups. Both None where factors were folded into the layer (SmoothQuant, AWQ),
    whose inputs are then others, and where there were no samples.
    """

    name: str
    bits: int | None
    group_size: int | None
    parameters: int
    nbytes: int
    error: float | None
    rtn_error: float | None


@dataclass(frozen=True)
class Comparison:
    """layers: in the order of computation. hidden_errors: after each decoder layer, the mean over tokens of
    |h' - h|² / |h|². conversations: the divergence of every sample. folded: whether factors lie in a layer."""

    layers: tuple[LinearReport, ...]
    hidden_errors: tuple[float, ...]
    conversations: tuple[Divergence, ...]
    folded: bool


def check_pair(original: FloatCheckpoint, quantized: FloatCheckpoint) -> None:
    """Whether the first is plain and the second the same model with something quantized: layers, or the KV cache alone.

    Raises:
        InputError: they are not.
        CheckpointError: all that the second has is scales of a KV cache, and they are not those of an INT8 cache.
    """
    if original.stored.quantization is not None:
        raise InputError(
            f"{original.folder}: already quantized ({original.stored.quantization.method}); give the original "
            "checkpoint first"
        )
    if quantized.stored.quantization is None and quantized.stored.rotation is None:
        if quantized.stored.cache.entries:
            quantized.stored.cache.check()
        else:
            raise InputError(
                f"{quantized.folder}: not quantized; give the original checkpoint first, the quantized one last"
            )
    first, second = original.stored.rotation, quantized.stored.rotation
    if first is not None and first != second:
        raise InputError(
            f"{original.folder}: rotated ({first}), which {quantized.folder} is not in the same way ({second}); "
            "give the checkpoint that it was made from"
        )
    # the head may have been untied, with the same numbers
    ours, theirs = ((c.vision, replace(c.text, tie_word_embeddings=False)) for c in (original.config, quantized.config))
    if ours != theirs:
        raise InputError(
            f"{quantized.folder}: its config.json describes another model than {original.folder}'s; "
            "give the checkpoint that it was made from"
        )


def reference_of(original: FloatCheckpoint, quantized: FloatCheckpoint) -> Tensors:
    """The original whose layers compute what those of `quantized` do: rotated, where that one says that it was."""
    rotation = quantized.stored.rotation
    if rotation is None or rotation == original.stored.rotation:
        return original
    return RotatedCheckpoint(original.stored, rotation["kind"], rotation["seed"])


def rounding(layers: Mapping[str, QuantizedLayer | None]) -> Watch | None:
    """What W8A8 layers (by their names within a decoder layer) do to their inputs: rounded with the static scale that
    they hold, or per token; None where there are none."""
    scales: dict[str, float | None] = {}
    for point, names in DECODER_GROUPS.items():
        w8a8 = [q for name in names if (q := layers.get(name)) is not None and q.kind == "int8"]
        if w8a8:
            scales[point] = w8a8[0].input_scale
    return rounded_activations(scales, affine=AFFINE) if scales else None


def vision_rounding(quantized: FloatCheckpoint, block: int) -> Watch | None:
    """As `rounding`, for a block of the vision encoder; the merger is block `depth`.

    What the engine multiplies an input with is part of the weights that are read: it is taken away again once the
    input is rounded.
    """
    groups = MERGER_GROUPS if block == quantized.config.vision.depth else VISION_GROUPS
    prefix = vision_prefix(quantized, block)
    scales: dict[str, float | None] = {}
    factors: dict[str, Tensor] = {}
    for point, (name,) in groups.items():
        layer = quantized.layer(f"{prefix}.{name}")
        if layer is not None and layer.kind == "int8":
            scales[point] = layer.input_scale
            if (pre := quantized.factors(layer)) is not None:
                factors[point] = torch.from_numpy(pre)
    if not scales:
        return None
    rounded = rounded_activations(scales, factors)

    def watch(point: str, x: Tensor) -> Tensor | None:
        found = rounded(point, x)
        return found if found is None or point not in factors else found / factors[point]

    return watch


def folded(original: Mapping[str, Tensor], quantized: Mapping[str, Tensor]) -> bool:
    """Whether factors were moved between a layer's tensors: its norms, or a whole weight, are not the original's."""
    for name, value in original.items():
        limit = _SAME_NORM if name.endswith("layernorm.weight") else _SAME_WEIGHT
        if name.endswith(".weight") and (quantized[name] - value).norm() > limit * value.norm():
            return True
    return False


def heads_of(original: Tensors, quantized: Tensors) -> tuple[Head, Head]:
    """One head in memory where both have the same: with the released vocabulary it is the largest tensor."""
    first = Head(original)
    return first, first if same_head(original, quantized) else Head(quantized)


def layer_kinds(quantized: FloatCheckpoint, layer: int) -> dict[str, QuantizedLayer | None]:
    """How the linear layers of a decoder layer are stored, by their names within it."""
    return {n: quantized.layer(f"model.layers.{layer}.{n}") for names in DECODER_GROUPS.values() for n in names}


def compare(
    original: FloatCheckpoint,
    quantized: FloatCheckpoint,
    samples: Sequence[Sample],
    scratch: Path,
    progress: Progress | None = None,
) -> Comparison:
    """Both models over `samples`, layer by layer; hidden states lie in the folder `scratch`.

    Without samples only what the files say is reported.

    Raises:
        InputError: see `check_pair`.
        CheckpointError: values that cannot be.
        EngineError: activations that are not finite; the layer is named.
    """
    check_pair(original, quantized)
    report = progress or (lambda *_: None)
    count = original.config.text.num_hidden_layers
    if not samples:
        return Comparison(tuple(r for i in range(count) for r in _plain_reports(quantized, i)), (), (), False)
    reference = reference_of(original, quantized)
    streams = Streams(samples, original.config.text, scratch)
    with torch.inference_mode():
        for name, tensors in (("original", original), ("quantized", quantized)):
            report(0, count + 1, f"pictures ({name})")
            rounds = functools.partial(vision_rounding, tensors) if tensors is quantized else None
            streams.start(name, tensors, rounds)
        layers: list[LinearReport] = []
        hidden: list[float] = []
        any_folded = False
        for i in range(count):
            report(i, count + 1, f"layer {i}")
            before, after = layer_weights(reference, i), layer_weights(quantized, i)
            kinds = layer_kinds(quantized, i)
            moved = folded(before, after)
            any_folded |= moved
            watch = _Errors(before, after, kinds, quantized, rounding(kinds), measured=not moved)
            rounded = chained(watch, cache_rounding(quantized, i))
            plain = before if reference is original else layer_weights(original, i)
            streams.advance("original", plain, where=f"original, model.layers.{i}")
            streams.advance("quantized", after, rounded, where=f"quantized, model.layers.{i}")
            layers += [watch.report(r) for r in _plain_reports(quantized, i)]
            hidden.append(_hidden_error(streams, reference))
        report(count, count + 1, "logits")
        conversations = streams.divergences("original", "quantized", heads_of(original, quantized))
        for name in ("original", "quantized"):
            streams.remove(name)
    return Comparison(tuple(layers), tuple(hidden), tuple(conversations), any_folded)


def _hidden_error(streams: Streams, reference: Tensors) -> float:
    """Token by token, because the first one's activations are a thousand times the others'."""
    total, tokens = 0.0, 0
    for h, other in zip(streams.read("original"), streams.read("quantized")):
        if isinstance(reference, RotatedCheckpoint) and reference.residual is not None:
            h = torch.from_numpy(reference.residual(h.numpy()))
        shares = (other - h).square().sum(-1) / h.square().sum(-1).clamp_min(1e-30)
        total, tokens = total + float(shares.double().sum()), tokens + len(h)
    return total / tokens


def _plain_reports(quantized: FloatCheckpoint, layer: int) -> list[LinearReport]:
    """What the files say, without errors."""
    out = []
    for name, q in layer_kinds(quantized, layer).items():
        full = f"model.layers.{layer}.{name}"
        rows, columns = quantized.stored.shape(f"{full}.weight")
        nbytes = quantized.stored.nbytes(f"{full}.weight")
        out.append(LinearReport(full, q and q.bits, q and q.group_size, rows * columns, nbytes, None, None))
    return out


class _Errors:
    """A watcher of the quantized model's layer that compares every linear layer's output with the original's."""

    def __init__(
        self,
        original: Mapping[str, Tensor],
        quantized: Mapping[str, Tensor],
        kinds: Mapping[str, QuantizedLayer | None],
        checkpoint: FloatCheckpoint,
        rounds: Watch | None,
        *,
        measured: bool,
    ) -> None:
        self._original, self._quantized, self._rounds = original, quantized, rounds
        self._nearest = {}
        if measured:
            self._nearest = {n: _nearest(original[f"{n}.weight"], q, checkpoint) for n, q in kinds.items() if q}
        self._sums = {name: [0.0, 0.0, 0.0] for name in self._nearest}  # squares of both errors, of the output

    def __call__(self, point: str, x: Tensor) -> Tensor | None:
        rounded = None if self._rounds is None else self._rounds(point, x)
        seen = x if rounded is None else rounded
        for name in DECODER_GROUPS.get(point, ()):
            if name in self._sums:
                y = F.linear(x, self._original[f"{name}.weight"])
                ours, nearest = (F.linear(seen, w) for w in (self._quantized[f"{name}.weight"], self._nearest[name]))
                for i, value in enumerate((ours - y, nearest - y, y)):
                    self._sums[name][i] += float(value.double().square().sum())
        return rounded

    def report(self, row: LinearReport) -> LinearReport:
        sums = self._sums.get(row.name.split(".", 3)[3])
        if sums is None:
            return row
        error, nearest = ((s / sums[2] if sums[2] else 0.0) for s in sums[:2])
        return LinearReport(row.name, row.bits, row.group_size, row.parameters, row.nbytes, error, nearest)


def _nearest(weight: Tensor, layer: QuantizedLayer, checkpoint: FloatCheckpoint) -> Tensor:
    """`weight` rounded to nearest on the kind of grid that the layer is stored on."""
    if layer.kind == "int8":
        q = quantize_channels(weight.numpy())
        return torch.from_numpy(q.codes * q.scales[:, None])
    symmetric = checkpoint.symmetric(layer)
    return dequantized(round_to_nearest(weight, bits=layer.bits, group_size=layer.group_size, symmetric=symmetric))
