"""What config.json says of how a checkpoint is quantized; the layers themselves: edgevl.runtime.quantized_layers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgevl.runtime.cache_scales import cache_scheme_only
from edgevl.runtime.errors import CheckpointError
from edgevl.runtime.shards import AGAIN, read_object

__all__ = [
    "PRE_SCALED",
    "ROTATION_KEY",
    "Quantization",
    "quantization_config",
    "read_quantization",
    "read_rotation",
]

READ = "read are gptq (4 and 8 bits), awq (version gemm) and compressed-tensors (pack-quantized, int-quantized)"
INSTEAD = "export the unquantized checkpoint, or one in a format that is read"
SIDECAR = "quantize_config.json"  # of AutoGPTQ, beside a config.json that says nothing
FORMATS = {
    "gptq": ("gptq", "gptq_v2"),
    "awq": ("gemm",),
    "compressed-tensors": ("pack-quantized", "int-quantized", "mixed-precision"),
}
# int-quantized with a pre_quant_scale, a format of our own: readers that know nothing of that tensor would compute
# wrongly without a word, so they are given a name that they refuse.
PRE_SCALED = "int-quantized-pre-scaled"
# In config.json of a checkpoint whose numbers were turned (edgevl.calibration.rotation): kind and seed.
ROTATION_KEY = "edgevl_rotation"


@dataclass(frozen=True)
class Quantization:
    """What a config says of a checkpoint's quantization; `group_size` -1 is one group per output."""

    where: Path
    method: str
    format: str
    group_size: int
    needs_g_idx: bool
    activations: frozenset[str] = frozenset()  # of W8A8 layers: "token" (scales found at run time), "tensor" (static)


def quantization_config(folder: Path) -> tuple[dict[str, Any] | None, Path, str]:
    """The dictionary that says how a checkpoint is quantized (None where nothing does), its file, and its place.

    Raises:
        CheckpointError: it is not a dictionary.
    """
    path = folder / "config.json"
    config = read_object(path)
    key = next((k for k in ("quantization_config", "compression_config") if config.get(k)), None)
    if key is not None:
        said, where = config[key], f"{path}: {key}"
    elif (folder / SIDECAR).exists():
        path = folder / SIDECAR
        said, where = {"quant_method": "gptq", **read_object(path)}, str(path)
    else:
        return None, path, str(path)
    if not isinstance(said, dict):
        raise CheckpointError(f"{where}: expected an object, got {type(said).__name__}; {AGAIN}")
    return said, path, where


def read_rotation(folder: Path) -> dict[str, Any] | None:
    """{"kind": "r1", "r2" or "r1+r2", "seed": int} of a rotated checkpoint, None of any other.

    Raises:
        CheckpointError: something else under its key.
    """
    path = folder / "config.json"
    found = read_object(path).get(ROTATION_KEY)
    if found is None:
        return None
    known = isinstance(found, dict) and found.get("kind") in ("r1", "r2", "r1+r2")
    if not known or type(found.get("seed")) is not int or found["seed"] < 0:
        raise CheckpointError(
            f"{path}: {ROTATION_KEY} is {found!r}, expected a kind (r1, r2, r1+r2) and a seed; {AGAIN}"
        )
    return found


def read_quantization(folder: Path) -> Quantization | None:
    """The config's word on quantized layers; None for a checkpoint that says nothing of any.

    Raises:
        CheckpointError: a method or a variant of one that is not read.
    """
    said, path, where = quantization_config(folder)
    if said is None or cache_scheme_only(said):
        return None
    method = said.get("quant_method", "compressed-tensors" if "config_groups" in said else None)
    if method not in FORMATS:
        raise CheckpointError(f"{where}: quant_method {method!r} is not read; {READ}: {INSTEAD}")
    form = _format(said, method, where)
    if form not in FORMATS[method]:
        raise CheckpointError(f"{where}: {method} in the format {form!r} is not read; {READ}: {INSTEAD}")
    if method == "compressed-tensors":
        return Quantization(path, method, form, _compressed_group(said, where), False, _compressed_activations(said))
    group = said.get("group_size", said.get("q_group_size", -1))
    if not isinstance(group, int) or isinstance(group, bool) or not (group == -1 or group > 0):
        raise CheckpointError(f"{where}: group_size is {group!r}, expected a positive number or -1; {AGAIN}")
    return Quantization(path, method, form, group, bool(said.get("desc_act")) and method == "gptq")


def _format(said: dict[str, Any], method: str, where: str) -> str:
    if method == "compressed-tensors":
        return str(said.get("format"))
    pack = said.get("pack_dtype", "int32")
    if "int32" not in str(pack):
        raise CheckpointError(f"{where}: pack_dtype {pack!r} is not read, int32 is: {INSTEAD}")
    if said.get("is_marlin_format"):
        return "marlin"
    if method == "awq":
        return str(said.get("version") or said.get("checkpoint_format") or "gemm").lower()
    return str(said.get("checkpoint_format") or "gptq").lower()


def _compressed_group(said: dict[str, Any], where: str) -> int:
    """Checks the schemes of compressed-tensors' config; the group size of the first one."""
    for key in ("transform_config", "sparsity_config"):
        value = said.get(key)
        if value and (key == "transform_config" or value.get("format", "dense") != "dense"):
            raise CheckpointError(f"{where}: {key} is not read: {INSTEAD}")
    groups = said.get("config_groups")
    if not isinstance(groups, dict) or not all(
        isinstance(g, dict) and isinstance(g.get("weights"), dict) for g in groups.values()
    ):
        raise CheckpointError(f"{where}: config_groups must give the weights of every group; {AGAIN}")
    sizes = []
    for name, group in groups.items():
        weights, inputs, form = group["weights"], group.get("input_activations"), group.get("format") or said["format"]
        if weights.get("type", "int") != "int" or form not in (*FORMATS["compressed-tensors"], PRE_SCALED):
            raise CheckpointError(f"{where}: {name} holds {weights.get('type')} weights as {form!r}; {READ}: {INSTEAD}")
        if form in ("int-quantized", PRE_SCALED) and _activations(inputs) is None:
            raise CheckpointError(
                f"{where}: {name} is int-quantized, but its input_activations are neither 8-bit dynamic nor 8-bit "
                f"static per tensor and symmetric, not read: {INSTEAD}"
            )
        sizes.append(weights.get("group_size") or -1)
    return sizes[0] if sizes and isinstance(sizes[0], int) else -1


def _activations(inputs: Any) -> str | None:
    """ "token" or "tensor" of a scheme's input_activations; None for what is not read."""
    if not isinstance(inputs, dict) or inputs.get("num_bits") != 8 or inputs.get("type", "int") != "int":
        return None
    if inputs.get("dynamic") is True:
        return "token"
    static = inputs.get("dynamic") is False and inputs.get("strategy") == "tensor" and inputs.get("symmetric", True)
    return "tensor" if static else None


def _compressed_activations(said: dict[str, Any]) -> frozenset[str]:
    groups = [g for g in said["config_groups"].values() if (g.get("format") or said["format"]) != "pack-quantized"]
    found = {_activations(g.get("input_activations")) for g in groups}
    return frozenset(kind for kind in found if kind is not None)
