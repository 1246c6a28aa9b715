"""Which parts of a quantized model cost most: the logits' divergence when one part alone is quantized.

A unit is some of the decoder's linear layers: one of them, those over one input, all of a decoder layer, or all of one
kind. Every unit has a stream of its own from its first layer on, and all streams go through a layer together: weights
are read once, two decoder layers are in memory at a time, hidden states lie on disk (samples' tokens × hidden size × 4
bytes for each unit). The work is one run of the model for every unit, less the layers before its first.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from edgevl.calibration.comparison import Progress, check_pair, folded, heads_of, layer_kinds, reference_of, rounding
from edgevl.calibration.dataset import Sample
from edgevl.calibration.dequantized import FloatCheckpoint
from edgevl.calibration.fidelity import combined
from edgevl.calibration.layers import DECODER_GROUPS, Watch
from edgevl.calibration.streams import Streams
from edgevl.calibration.weights import Tensors, layer_weights
from edgevl.runtime.errors import InputError
from edgevl.runtime.quantized_layers import QuantizedLayer

__all__ = ["GRANULARITIES", "Sensitivity", "Unit", "sensitivities", "units_of"]

GRANULARITIES = ("kind", "layer", "group", "linear")


@dataclass(frozen=True)
class Unit:
    """Linear layers that are quantized together. granularity: one of GRANULARITIES; modules: in order, such as
    `model.layers.0.mlp.down_proj`."""

    name: str
    granularity: str
    modules: tuple[str, ...]


@dataclass(frozen=True)
class Sensitivity:
    """What a unit costs alone: kl and top1 as in `Divergence`; parameters and nbytes (as stored) of its layers."""

    name: str
    granularity: str
    modules: tuple[str, ...]
    kl: float
    top1: float
    parameters: int
    nbytes: int


def units_of(quantized: FloatCheckpoint, granularity: str) -> list[Unit]:
    """The units of one granularity that hold something quantized.

    kind: `down_proj` of all layers and so on, 7 units. layer: one per decoder layer. group: layers over one input
    (`layers.0.qkv`, `.o`, `.gate_up`, `.down`), 4 per decoder layer. linear: every linear layer, 7 per decoder layer.

    Raises:
        InputError: an unknown granularity.
    """
    if granularity not in GRANULARITIES:
        raise InputError(f"granularity {granularity!r} is unknown; expected {', '.join(GRANULARITIES)}")
    found: dict[str, list[str]] = {}
    for i in range(quantized.config.text.num_hidden_layers):
        for point, names in DECODER_GROUPS.items():
            for name in names:
                module = f"model.layers.{i}.{name}"
                if quantized.layer(module) is None:
                    continue
                unit = {
                    "kind": name.rsplit(".", 1)[-1],
                    "layer": f"layers.{i}",
                    "group": f"layers.{i}.{point}",
                    "linear": f"layers.{i}.{name}",
                }[granularity]
                found.setdefault(unit, []).append(module)
    return [Unit(name, granularity, tuple(modules)) for name, modules in found.items()]


def sensitivities(
    plain: FloatCheckpoint,
    quantized: FloatCheckpoint,
    samples: Sequence[Sample],
    units: Sequence[Unit],
    scratch: Path,
    progress: Progress | None = None,
) -> list[Sensitivity]:
    """What every unit costs alone in the unquantized checkpoint `plain`, in the units' order; hidden states lie in the
    folder `scratch`.

    Raises:
        InputError: see `check_pair`; no samples; or factors were folded into a layer of which only a part is asked for
            (SmoothQuant, AWQ: such a part means nothing among the original weights).
        CheckpointError, EngineError: as `compare`.
    """
    check_pair(plain, quantized)
    if not samples:
        raise InputError("sensitivities are measured on samples, none were given; pass pictures or conversations")
    original = reference_of(plain, quantized)
    sweep = _Sweep(original, quantized, Streams(samples, original.config.text, scratch), units)
    report = progress or (lambda *_: None)
    steps = sweep.steps
    with torch.inference_mode():
        report(0, steps, "pictures")
        sweep.streams.start("base", original)
        done = 0
        for layer in range(original.config.text.num_hidden_layers):
            for what in sweep.layer(layer):
                done += 1
                report(done, steps, what)
        heads = heads_of(original, quantized)
        out = []
        for i, unit in enumerate(units):
            done += 1
            report(done, steps, unit.name)
            d = combined(sweep.streams.divergences("base", f"unit-{i}", (heads[0], heads[0])))
            sweep.streams.remove(f"unit-{i}")
            sizes = [quantized.stored.shape(f"{m}.weight") for m in unit.modules]
            nbytes = sum(quantized.stored.nbytes(f"{m}.weight") for m in unit.modules)
            parameters = sum(rows * columns for rows, columns in sizes)
            out.append(Sensitivity(unit.name, unit.granularity, unit.modules, d.kl, d.top1, parameters, nbytes))
        sweep.streams.remove("base")
    return out


class _Sweep:
    """All units' streams on their way through the layers; `base` is the original model's."""

    def __init__(self, original: Tensors, quantized: FloatCheckpoint, streams: Streams, units: Sequence[Unit]) -> None:
        self.original, self.quantized, self.streams, self.units = original, quantized, streams, units
        self._started: set[int] = set()
        # unit -> layer -> its linear layers there, by their names within
        self._inside: list[dict[int, set[str]]] = []
        for unit in units:
            inside: dict[int, set[str]] = {}
            for module in unit.modules:
                _, _, layer, name = module.split(".", 3)
                inside.setdefault(int(layer), set()).add(name)
            self._inside.append(inside)

    @property
    def steps(self) -> int:
        """Runs of one stream through one layer, and the logits of each unit."""
        layers = self.original.config.text.num_hidden_layers
        return layers + sum(layers - min(inside) + 1 for inside in self._inside)

    def layer(self, layer: int) -> Iterator[str]:
        """All streams through one layer; says what was done after each."""
        before, after = layer_weights(self.original, layer), layer_weights(self.quantized, layer)
        kinds = layer_kinds(self.quantized, layer)
        moved = folded(before, after)
        for i, inside in enumerate(self._inside):
            names = inside.get(layer, set())
            if not names and i not in self._started:
                continue
            weights, watch = self._mixed(layer, before, after, kinds, names, moved)
            source = None if i in self._started else "base"
            where = f"{self.units[i].name} quantized, model.layers.{layer}"
            self.streams.advance(f"unit-{i}", weights, watch, source=source, where=where)
            self._started.add(i)
            yield f"{self.units[i].name} through layer {layer}"
        self.streams.advance("base", before, where=f"original, model.layers.{layer}")
        yield f"original through layer {layer}"

    def _mixed(
        self,
        layer: int,
        before: Mapping[str, Tensor],
        after: Mapping[str, Tensor],
        kinds: Mapping[str, QuantizedLayer | None],
        names: set[str],
        moved: bool,
    ) -> tuple[Mapping[str, Tensor], Watch | None]:
        """One layer's weights with those of `names` quantized, and what rounds their inputs."""
        if not names:
            return before, None
        whole = names == {n for n, q in kinds.items() if q is not None}
        if moved and not whole:
            raise InputError(
                f"{self.quantized.folder}: factors were folded into model.layers.{layer} (SmoothQuant, AWQ), so its "
                "linear layers cannot be put among the original ones; ask for the sensitivity per `layer`"
            )
        watch = rounding({n: q for n, q in kinds.items() if n in names})
        if moved:
            return after, watch
        return {n: (after if n.removesuffix(".weight") in names else before)[n] for n in before}, watch
