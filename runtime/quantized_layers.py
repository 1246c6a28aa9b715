"""How quantized checkpoints name and shape their layers.

It decides from names, dtypes and shapes alone; the numbers are read by edgevl.calibration.quantized. A layer is
quantized where its codes are stored: the configs of the released Qwen2-VL GPTQ and AWQ checkpoints do not list what is
left plain. Bits and groups come from the shapes, so a checkpoint may mix them (GPTQModel's `dynamic`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from edgevl.runtime.errors import CheckpointError
from edgevl.runtime.schemes import INSTEAD, SIDECAR, Quantization
from edgevl.runtime.shards import AGAIN, DTYPES, Entry, more

__all__ = ["QuantizedLayer", "own_precision", "take_layers"]

# What a quantized layer consists of, by the suffix of the tensor's name.
CODES = {"gptq": ("qweight",), "awq": ("qweight",), "compressed-tensors": ("weight_packed", "weight")}
COMPANIONS = (
    *("qzeros", "scales", "g_idx"),
    *("weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx"),
)
# What else W8A8 may have: the static scale of its input (a zero point of zero beside it), and what the input is
# multiplied with before it is rounded (ModelOpt's name; compressed-tensors has none).
STATIC = ("input_scale", "input_zero_point", "pre_quant_scale")
UNREAD = ("input_global_scale",)
LARGEST_BLOCK, SMALLEST_BLOCK = 128, 16


@dataclass(frozen=True)
class QuantizedLayer:
    """One linear layer stored as codes. `kind`: gptq, awq, packed (weight-only), int8 (W8A8)."""

    name: str
    kind: str
    version: int  # of GPTQ: 1 or 2
    bits: int
    group_size: int  # inputs that share a scale; -1: all of them
    shape: tuple[int, int]  # [N, K]
    entries: Mapping[str, Entry]  # by suffix
    input_scale: float | None = None  # of W8A8: the input's static scale, x ≈ scale × int8; None: found per token

    @property
    def group(self) -> int:
        return self.shape[1] if self.group_size == -1 else self.group_size

    @property
    def block_size(self) -> int:
        """Of MatMulNBits, which wants a power of two: the largest that divides the group, at most 128."""
        if self.group_size == -1:
            return LARGEST_BLOCK
        return min(self.group_size & -self.group_size, LARGEST_BLOCK)

    @property
    def has_zero_points(self) -> bool:
        """By the shapes: the zero points of a symmetric GPTQ layer all say the same and are dropped later."""
        return self.kind == "awq" or "weight_zero_point" in self.entries

    def error(self, suffix: str, problem: str) -> CheckpointError:
        entry = self.entries[suffix]
        return CheckpointError(f"{entry.path}: tensor {entry.stored_name!r} {problem}")


def own_precision(layers: Iterable[QuantizedLayer], part: str = "model.layers.") -> str | None:
    """The precision that the layers of `part` ("visual." for the vision encoder) are: the name of the smallest among
    them; None where none is quantized."""
    kinds = {(layer.kind == "int8", layer.bits) for layer in layers if layer.name.startswith(part)}
    if not kinds:
        return None
    if any(bits == 4 for _, bits in kinds):
        return "int4"
    return "int8" if all(w8a8 for w8a8, _ in kinds) else "int8-weights"


def take_layers(
    folder: Path, named: dict[str, Entry], shapes: Mapping[str, tuple[int, ...]], said: Quantization | None
) -> tuple[dict[str, QuantizedLayer], dict[str, Entry]]:
    """Take the tensors of quantized layers out of `named` (released name -> entry).

    Args:
        shapes: of the plain checkpoint.

    Returns:
        Layer name -> layer, and the biases of layers that have none (old AutoGPTQ writes zeros), by tensor name.

    Raises:
        CheckpointError: a layer that is incomplete, mis-shaped, not expected to be quantized, or of another method.
    """
    found: dict[str, dict[str, Entry]] = {}
    for name in [n for n in named if _is_part(n, named)]:  # all are found before the first is taken out
        module, suffix = name.rsplit(".", 1)
        found.setdefault(module, {})[suffix] = named.pop(name)
    if said is None:
        if found:
            entry = next(iter(next(iter(found.values())).values()))
            raise CheckpointError(
                f"{entry.path}: tensor {entry.stored_name!r}: part of a quantized layer, but neither config.json nor "
                f"{SIDECAR} says how it is quantized; add the quantization_config that belongs to it, or {AGAIN}"
            )
        return {}, {}
    if not found:
        raise CheckpointError(
            f"{said.where}: says that it is a {said.method} checkpoint, but no layer is stored quantized; "
            "remove that entry if the weights are plain, or export the unquantized checkpoint"
        )
    layers = {module: _layer(module, entries, named, shapes, said) for module, entries in found.items()}
    biases = [f"{module}.bias" for module in layers]
    return layers, {name: named.pop(name) for name in biases if name in named and name not in shapes}


def _is_part(name: str, named: Mapping[str, Entry]) -> bool:
    module, _, suffix = name.rpartition(".")
    if suffix == "weight":
        return named[name].dtype == "I8" and f"{module}.weight_scale" in named
    return suffix in (*COMPANIONS, *STATIC, *UNREAD, "qweight", "weight_packed")


def _layer(
    module: str,
    entries: dict[str, Entry],
    named: Mapping[str, Entry],
    shapes: Mapping[str, tuple[int, ...]],
    said: Quantization,
) -> QuantizedLayer:
    first = next(iter(entries.values()))
    codes = next((entries[s] for s in ("qweight", "weight_packed", "weight") if s in entries), None)
    suffix = next((s for s in CODES[said.method] if s in entries), None)
    if codes is None:
        raise CheckpointError(
            f"{first.path}: tensor {first.stored_name!r} has no codes beside it ({' or '.join(CODES[said.method])} of "
            f"{module}); {AGAIN}"
        )
    if suffix is None:
        raise CheckpointError(
            f"{codes.path}: tensor {codes.stored_name!r} is not how {said.method} stores a layer; {said.where.name} is "
            f"of another checkpoint: {AGAIN}"
        )
    shape = shapes.get(f"{module}.weight", ())
    w8a8 = said.method == "compressed-tensors" and suffix == "weight"
    if not module.startswith(("model.layers.", "visual.") if w8a8 else "model.layers.") or len(shape) != 2:
        raise CheckpointError(
            f"{codes.path}: tensor {codes.stored_name!r}: {module} is quantized; read are quantized linear layers of "
            "the decoder that config.json describes, and of the vision encoder in int-quantized W8A8; embedding and "
            f"head must be plain: {INSTEAD}"
        )
    plain = named.get(f"{module}.weight")
    if plain is not None:
        raise CheckpointError(
            f"{plain.path}: tensor {plain.stored_name!r} and {codes.stored_name!r} (in {codes.path.name}) are both "
            "there; remove the one that does not belong to the checkpoint"
        )
    static = [entries[s] for s in (*STATIC, *UNREAD) if s in entries]
    if static and (suffix != "weight" or any(s in entries for s in UNREAD)):
        raise CheckpointError(
            f"{static[0].path}: tensor {static[0].stored_name!r}: scales of activations are read beside int8 weights "
            f"per channel only: {INSTEAD}"
        )
    n, k = shape
    match said.method:
        case "gptq":
            return _gptq(module, entries, n, k, said)
        case "awq":
            return _awq(module, entries, n, k, said)
        case _:
            return (_packed if suffix == "weight_packed" else _int8)(module, entries, n, k, said)


def _gptq(module: str, entries: dict[str, Entry], n: int, k: int, said: Quantization) -> QuantizedLayer:
    required = ("qweight", "qzeros", "scales", *(["g_idx"] if said.needs_g_idx else []))
    kept = _complete(module, entries, required, ("g_idx",))
    bits = _bits(kept["qweight"], "qweight [inputs × bits / 32, outputs]", 0, k, (4, 8))
    _expect(kept["qweight"], ("I32",), (k * bits // 32, n))
    groups = _groups(kept["scales"], 0)
    _expect(kept["scales"], DTYPES, (groups, n))
    _expect(kept["qzeros"], ("I32",), (groups, n * bits // 32))
    if "g_idx" in kept:
        _expect(kept["g_idx"], ("I32", "I64"), (k,))
    size = _group_size(kept["scales"], groups, k, said.group_size)
    return QuantizedLayer(module, "gptq", 2 if said.format == "gptq_v2" else 1, bits, size, (n, k), kept)


def _awq(module: str, entries: dict[str, Entry], n: int, k: int, said: Quantization) -> QuantizedLayer:
    kept = _complete(module, entries, ("qweight", "qzeros", "scales"), ())
    bits = _bits(kept["qweight"], "qweight [inputs, outputs × bits / 32]", 1, n, (4,))
    _expect(kept["qweight"], ("I32",), (k, n // 8))
    groups = _groups(kept["scales"], 0)
    _expect(kept["scales"], DTYPES, (groups, n))
    _expect(kept["qzeros"], ("I32",), (groups, n // 8))
    return QuantizedLayer(module, "awq", 1, bits, _group_size(kept["scales"], groups, k, said.group_size), (n, k), kept)


def _packed(module: str, entries: dict[str, Entry], n: int, k: int, said: Quantization) -> QuantizedLayer:
    required = ("weight_packed", "weight_scale", "weight_shape")
    kept = _complete(module, entries, required, ("weight_zero_point", "weight_g_idx"))
    packed = kept["weight_packed"]
    bits = next((b for b in (4, 8) if packed.shape[1:] == (-(-k * b // 32),)), None)
    if bits is None:
        raise CheckpointError(
            f"{packed.path}: tensor {packed.stored_name!r} is {list(packed.shape)} for {k} inputs: 4 and 8 bits are "
            f"read, expected [{n}, {-(-k * 4 // 32)}] or [{n}, {-(-k * 8 // 32)}]: {INSTEAD}"
        )
    _expect(packed, ("I32",), (n, -(-k * bits // 32)))
    _expect(kept["weight_shape"], ("I32", "I64"), (2,))
    groups = _groups(kept["weight_scale"], 1)
    _expect(kept["weight_scale"], DTYPES, (n, groups))
    if "weight_zero_point" in kept:
        unpacked = kept["weight_zero_point"].dtype == "I8"
        _expect(kept["weight_zero_point"], ("I8", "I32"), (n if unpacked else -(-n * bits // 32), groups))
    if "weight_g_idx" in kept:
        _expect(kept["weight_g_idx"], ("I32", "I64"), (k,))
    size = _group_size(kept["weight_scale"], groups, k, said.group_size)
    return QuantizedLayer(module, "packed", 1, bits, size, (n, k), kept)


def _int8(module: str, entries: dict[str, Entry], n: int, k: int, said: Quantization) -> QuantizedLayer:
    kept = _complete(module, entries, ("weight", "weight_scale"), ("weight_zero_point", *STATIC))
    _expect(kept["weight"], ("I8",), (n, k))
    scale = kept["weight_scale"]
    _expect(scale, DTYPES, (n, 1) if len(scale.shape) == 2 else (n,))
    if "weight_zero_point" in kept:
        _expect(kept["weight_zero_point"], ("I8",), scale.shape)
    if "pre_quant_scale" in kept:
        _expect(kept["pre_quant_scale"], DTYPES, (k,))
    first = kept.get("input_scale") or kept.get("input_zero_point")
    if first is not None and "tensor" not in said.activations:
        raise CheckpointError(
            f"{first.path}: tensor {first.stored_name!r} is a static scale of activations, but {said.where.name} says "
            f"that they are rounded at run time; {AGAIN}"
        )
    if said.activations == {"tensor"} or "input_zero_point" in kept:
        kept = _complete(module, kept, ("input_scale",), tuple(kept))
    for suffix, dtypes in (("input_scale", DTYPES), ("input_zero_point", ("I8",))):
        if suffix in kept:
            _expect(kept[suffix], dtypes, () if not kept[suffix].shape else (1,))
    return QuantizedLayer(module, "int8", 1, 8, -1, (n, k), kept)


def _complete(
    module: str, entries: dict[str, Entry], required: tuple[str, ...], optional: tuple[str, ...]
) -> dict[str, Entry]:
    first = next(iter(entries.values()))
    absent = [s for s in required if s not in entries]
    if absent:
        raise CheckpointError(
            f"{first.path}: tensor '{module}.{absent[0]}' is missing, but {first.stored_name!r} is there"
            f"{more(absent, 'tensors')}; {AGAIN}"
        )
    odd = [entry for s, entry in entries.items() if s not in (*required, *optional)]
    if odd:
        raise CheckpointError(
            f"{odd[0].path}: unexpected tensor {odd[0].stored_name!r} in a layer of {', '.join(required)}; {AGAIN}"
        )
    return entries


def _bits(entry: Entry, what: str, axis: int, count: int, read: tuple[int, ...]) -> int:
    stored = entry.shape[axis] if len(entry.shape) == 2 else 0
    bits = stored * 32 / count
    if bits not in read:
        raise CheckpointError(
            f"{entry.path}: tensor {entry.stored_name!r} is {list(entry.shape)}, expected {what}: {bits:g} bits, read "
            f"are {' and '.join(map(str, read))}: {INSTEAD}"
        )
    return int(bits)


def _groups(scales: Entry, axis: int) -> int:
    return max(1, scales.shape[axis]) if len(scales.shape) == 2 else 1


def _group_size(scales: Entry, groups: int, columns: int, said: int) -> int:
    """Inputs per group, -1 for all: the config's size where it fits the number of groups, else the even one."""
    if said == -1 and groups == 1:
        return -1
    if said > 0 and math.ceil(columns / said) == groups:
        size = said
    elif groups == 1:
        return -1
    elif columns % groups == 0:
        size = columns // groups
    else:
        raise CheckpointError(
            f"{scales.path}: tensor {scales.stored_name!r} has {groups} groups for {columns} inputs, which the "
            f"config's group_size {said} does not give; {AGAIN}"
        )
    if size % SMALLEST_BLOCK:
        raise CheckpointError(
            f"{scales.path}: tensor {scales.stored_name!r} has groups of {size} inputs, read are multiples of "
            f"{SMALLEST_BLOCK}: {INSTEAD}"
        )
    return size


def _expect(entry: Entry, dtypes: Iterable[str], shape: tuple[int, ...]) -> None:
    if entry.dtype not in dtypes or entry.shape != shape:
        raise CheckpointError(
            f"{entry.path}: tensor {entry.stored_name!r} is {entry.dtype} {list(entry.shape)}, expected "
            f"{' or '.join(dtypes)} {list(shape)} by config.json; {AGAIN}"
        )
