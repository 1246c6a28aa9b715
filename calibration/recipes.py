"""Recipes by name: what `edgevl quantize` does to the decoder's linear layers. Data only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from edgevl.runtime.errors import InputError

__all__ = ["PLAIN", "RECIPES", "ROTATIONS", "VISION_RECIPES", "Recipe", "parse_alpha", "recipe"]

PLAIN = 16  # bits of a layer that stays as the checkpoint has it


@dataclass(frozen=True)
class Recipe:
    """bits and group_size of the layers; down_bits: of down_proj, which makes a third of int4's damage and which error
    feedback helps least; method: `rtn` rounds to nearest, `gptq` spreads every column's error over the later ones,
    `w8a8` rounds weights to int8 per output channel (with `feedback` as GPTQ does) after SmoothQuant on all four points
    with `alpha` (None: searched, point by point), for activations in int8 with one scale per `token`, found at run
    time, or per `tensor`, fixed by calibration; `none` leaves the decoder as it is. vision: `none`, `int8` (W8A8 per
    token) or `int8-static`. kv_cache: scales of an INT8 KV cache are added. true_sequential: every group of layers
    sees inputs from the groups before it
    as quantized, for four times the passes. visual_weight: how much a picture's token counts in GPTQ's Hessian against
    a word's. rotate: what is turned before anything else, exactly: `none`, the residual stream (`r1`), the values of
    every head (`r2`) or both (`r1+r2`), see edgevl.calibration.rotation; rotate_seed: of its signs. overrides: bits of
    single layers by name (8, or PLAIN), which `--auto` chooses."""

    name: str
    method: str
    bits: int
    group_size: int
    symmetric: bool = True
    clip: bool = True
    down_bits: int = 0  # 0: as `bits`
    alpha: float | None = 0.5  # of w8a8
    activations: str = "token"  # of w8a8
    feedback: bool = False  # of w8a8
    vision: str = "none"
    vision_alpha: float | None = 0.5
    kv_cache: bool = False
    true_sequential: bool = False
    visual_weight: float = 1.0
    rotate: str = "none"
    rotate_seed: int = 0
    overrides: Mapping[str, int] = field(default_factory=dict, hash=False)

    @property
    def watches_decoder(self) -> bool:
        """Rounding to nearest needs data only to weigh its clip search."""
        return self.method in ("gptq", "w8a8") or (self.method == "rtn" and self.clip)

    @property
    def needs_samples(self) -> bool:
        return self.watches_decoder or self.vision != "none" or self.kv_cache

    @property
    def leaves_numbers(self) -> bool:
        """Nothing is quantized (but perhaps rotated)."""
        return self.method == "none" and self.vision == "none" and not self.kv_cache

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
        Recipe("w8a8", "w8a8", 8, -1, clip=False, alpha=None, feedback=True),
        Recipe("w8a8-static", "w8a8", 8, -1, clip=False, alpha=0.8, activations="tensor", feedback=True),
        Recipe("kv-int8", "none", 0, -1, clip=False, kv_cache=True),
        Recipe("none", "none", 0, -1, clip=False),
    )
}
ROTATIONS = ("none", "r1", "r2", "r1+r2")
VISION_RECIPES = ("none", "int8", "int8-static")
_STATIC_VISION_ALPHA = 0.7  # KL of the demo's vision encoder 0.00035, with 0.5 0.00055


def recipe(
    name: str,
    group_size: int | None = None,
    *,
    vision: str | None = None,
    alpha: str | None = None,
    asymmetric: bool = False,
    true_sequential: bool = False,
    visual_weight: float | None = None,
    kv_cache: str = "float",
    rotate: str = "none",
    seed: int = 0,
) -> Recipe:
    """The recipe `name` with another group size, treatment of the vision encoder, alpha ("auto", or a number) of all
    that is smoothed, zero points, GPTQ's options, an INT8 KV cache or a rotation (whose signs are drawn with `seed`) if
    given.

    Raises:
        InputError: an unknown name, a value that is not offered, or an option that the recipe has no use for.
    """
    if name == "hybrid":
        raise InputError(
            "recipe 'hybrid' is int4 for decode and int8 for prefill, which no checkpoint format holds together; "
            "quantize with gptq-int4, then `edgevl export QCHECKPOINT -o BUNDLE --prefill-from CHECKPOINT`"
        )
    if name not in RECIPES:
        raise InputError(f"recipe {name!r} is unknown; expected one of {', '.join(RECIPES)}")
    chosen = RECIPES[name]
    if kv_cache not in ("float", "int8"):
        raise InputError(f"KV cache {kv_cache!r} is unknown; expected float or int8")
    chosen = _decoder_options(chosen, group_size, asymmetric, true_sequential, visual_weight)
    chosen = replace(chosen, kv_cache=chosen.kv_cache or kv_cache == "int8")
    if vision is not None:
        if vision not in VISION_RECIPES:
            raise InputError(f"vision {vision!r} is unknown; expected one of {', '.join(VISION_RECIPES)}")
        static = {"vision_alpha": _STATIC_VISION_ALPHA} if vision == "int8-static" else {}
        chosen = replace(chosen, vision=vision, **static)
    if rotate not in ROTATIONS:
        raise InputError(f"rotation {rotate!r} is unknown; expected one of {', '.join(ROTATIONS)}")
    if rotate != "none":
        chosen = replace(chosen, rotate=rotate, rotate_seed=seed)
    if chosen.leaves_numbers and rotate == "none":
        raise InputError(
            "recipe 'none' leaves the decoder as it is, and vision 'none' the rest; choose one of both, or --rotate"
        )
    if alpha is not None:
        if chosen.method != "w8a8" and chosen.vision == "none":
            raise InputError(f"recipe {name!r} smooths nothing, so it has no alpha; leave it out, or add --vision int8")
        value = parse_alpha(alpha)
        chosen = replace(chosen, alpha=value, vision_alpha=value)
    return chosen


def _decoder_options(
    chosen: Recipe, group_size: int | None, asymmetric: bool, true_sequential: bool, visual_weight: float | None
) -> Recipe:
    """What weight-only recipes, or GPTQ alone, can be told."""
    name = chosen.name
    if group_size is not None:
        if chosen.method not in ("rtn", "gptq"):
            raise InputError(f"recipe {name!r} has no groups, got a group size of {group_size}; leave it out")
        if group_size not in (-1, 32, 64, 128):
            raise InputError(f"group size {group_size} is not offered; expected 32, 64, 128, or -1 for whole rows")
        chosen = replace(chosen, group_size=group_size)
    if asymmetric:
        if chosen.method not in ("rtn", "gptq"):
            raise InputError(f"recipe {name!r} has no zero points; leave --asymmetric away, or take a weight-only one")
        chosen = replace(chosen, symmetric=False)
    if (true_sequential or visual_weight is not None) and chosen.method != "gptq":
        raise InputError(
            f"recipe {name!r} does not use GPTQ; --true-sequential and --visual-weight are for "
            f"{', '.join(r.name for r in RECIPES.values() if r.method == 'gptq')}"
        )
    if visual_weight is not None and not 0 < visual_weight <= 100:
        raise InputError(f"the weight of visual tokens is {visual_weight}, expected more than 0 and at most 100")
    weight = 1.0 if visual_weight is None else visual_weight
    return replace(chosen, true_sequential=true_sequential, visual_weight=weight)


def parse_alpha(text: str) -> float | None:
    """None for "auto".

    Raises:
        InputError: neither that nor a number from 0 to 1.
    """
    if text == "auto":
        return None
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise InputError(f"alpha is {text!r}, expected auto, or a number from 0 to 1")
    return value
