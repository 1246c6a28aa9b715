"""Recipes by name: what `edgevl quantize` does to the decoder's linear layers. Data only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from edgevl.runtime.errors import InputError

__all__ = ["PLAIN", "RECIPES", "Recipe", "recipe"]

PLAIN = 16  # bits of a layer that stays as the checkpoint has it


@dataclass(frozen=True)
class Recipe:
    """bits and group_size of the layers; down_bits: of down_proj, which makes a third of int4's damage and which error
    feedback helps least; method: `rtn` rounds to nearest, `gptq` spreads every column's error over the later ones,
    `w8a8` rounds weights to int8 per output channel for activations in int8 per token, after SmoothQuant on all four
    points with `alpha`; overrides: bits of single layers by name (8, or PLAIN), which `--auto` chooses."""

    name: str
    method: str
    bits: int
    group_size: int
    symmetric: bool = True
    clip: bool = True
    down_bits: int = 0  # 0: as `bits`
    alpha: float = 0.0  # of w8a8
    overrides: Mapping[str, int] = field(default_factory=dict, hash=False)

    @property
    def needs_samples(self) -> bool:
        """Rounding to nearest needs data only to weigh its clip search."""
        return self.method != "rtn" or self.clip

    def bits_of(self, layer: str) -> int:
        """Of a linear layer by its name, such as `model.layers.0.mlp.down_proj`."""
        if layer in self.overrides:
            return self.overrides[layer]
        return self.down_bits if self.down_bits and layer.endswith("down_proj") else self.bits


RECIPES = {
    r.name: r
    for r in (
        Recipe("gptq-int4", "gptq", 4, 128),
        Recipe("gptq-int4-g32", "gptq", 4, 32),
        Recipe("gptq-int4-down8", "gptq", 4, 128, down_bits=8),
        Recipe("rtn-int4", "rtn", 4, 128, clip=False),
        Recipe("rtn-int4-clip", "rtn", 4, 128),
        Recipe("int8", "rtn", 8, 128, clip=False),
        Recipe("w8a8", "w8a8", 8, -1, clip=False, alpha=0.5),
    )
}


def recipe(name: str, group_size: int | None = None) -> Recipe:
    """The recipe `name`, with another group size if given.

    Raises:
        InputError: an unknown name, or a group size that is not offered.
    """
    if name not in RECIPES:
        raise InputError(f"recipe {name!r} is unknown; expected one of {', '.join(RECIPES)}")
    if group_size is None:
        return RECIPES[name]
    if RECIPES[name].method == "w8a8":
        raise InputError(f"recipe {name!r} has one scale per output channel; leave the group size out")
    if group_size not in (-1, 32, 64, 128):
        raise InputError(f"group size {group_size} is not offered; expected 32, 64, 128, or -1 for whole rows")
    return replace(RECIPES[name], group_size=group_size)
