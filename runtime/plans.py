"""TensorRT plans inside a bundle: `engines/<flavour>-<version>-<device>/plans.json` beside the plan files. Data only.

`edgevl build` writes them, the TensorRT engine reads them; neither TensorRT nor a GPU is needed here. A plan holds for
one version of one flavour of TensorRT and for the compute capabilities that it was built for, and it was made from
one graph with its weights: `matches` and `stale` say why a set cannot be used, in words for the user.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from edgevl.runtime.bundle import Bundle, file_sha256
from edgevl.runtime.errors import BundleError

__all__ = [
    "DECODE_PROFILE",
    "ENGINES_FOLDER",
    "FLAVOURS",
    "PLANS",
    "PREFILL_PROFILE",
    "VISION_PROFILE",
    "FoundPlans",
    "PlanFile",
    "PlanProfile",
    "PlanSet",
    "ShapeRange",
    "check_plan_hashes",
    "find_plans",
    "plan_folder_name",
]

ENGINES_FOLDER = "engines"
PLANS = "plans.json"
PLANS_SCHEMA = 1
_AGAIN = "; run `edgevl build` again"  # how the errors of one set end
FLAVOURS = ("tensorrt", "tensorrt_rtx")  # also the names of the Python packages that build and open them
DTYPES = ("float16", "bfloat16", "float32")
_STREAMS = "weight_streaming"
DECODE_PROFILE, PREFILL_PROFILE, VISION_PROFILE = "decode", "prefill", "vision"
_PROFILES: dict[str, tuple[str, ...]] = {"vision": (VISION_PROFILE,), "decoder": (DECODE_PROFILE, PREFILL_PROFILE)}


@dataclass(frozen=True)
class ShapeRange:
    """Shapes that one input may take in one profile."""

    min: tuple[int, ...]
    opt: tuple[int, ...]
    max: tuple[int, ...]

    def holds(self, shape: tuple[int, ...]) -> bool:
        return len(shape) == len(self.min) and all(a <= n <= b for a, n, b in zip(self.min, shape, self.max))


@dataclass(frozen=True)
class PlanProfile:
    """One optimization profile; its number in the plan is its place in `PlanFile.profiles`."""

    name: str
    shapes: Mapping[str, ShapeRange]  # every input with a dynamic axis, and those without too


@dataclass(frozen=True)
class PlanFile:
    """One plan. `sources`: the bundle's files it was built from (graph and weights) -> their sha256."""

    file: str
    size: int
    sha256: str
    dtype: str  # of activations, embeddings, rotary rows, mask and KV cache
    sources: Mapping[str, str]
    profiles: tuple[PlanProfile, ...]

    def profile(self, name: str) -> tuple[int, PlanProfile]:
        """Number and profile. Raises KeyError for a name that the plan does not have."""
        for number, profile in enumerate(self.profiles):
            if profile.name == name:
                return number, profile
        raise KeyError(f"no profile {name!r}, the plan has {[p.name for p in self.profiles]}")


@dataclass(frozen=True)
class PlanSet:
    """The plans of one bundle for one version of TensorRT and one device (or several compute capabilities)."""

    folder: Path
    flavour: str
    version: str  # of the library, as `tensorrt.__version__` gives it
    device: str  # name of the GPU as the driver gives it, or "sm86+sm89" for a build without one
    capabilities: tuple[tuple[int, int], ...]  # compute capabilities (major, minor)
    capacity: int  # tokens of the KV cache, fixed in the decoder's plan
    max_rows: int  # rows of a batch that the decode profile takes
    max_prefill: int  # tokens per row that the prefill profile takes at once
    min_patches: int  # of one frame
    max_patches: int
    plans: Mapping[str, PlanFile]  # "vision" and "decoder"
    weight_streaming: bool = False  # built so that weights may stay in host memory

    def path(self, role: str) -> Path:
        return self.folder / self.plans[role].file

    def matches(self, version: str, capability: tuple[int, int], flavour: str | None = None) -> str | None:
        """Why these plans cannot run with library `version` on a device of `capability`; None where they can.

        Args:
            version: `tensorrt.__version__` (or tensorrt_rtx's) of this machine.
            capability: (major, minor) of the device.
            flavour: of the library here; None where only one is considered.
        """
        if flavour is not None and flavour != self.flavour:
            return f"built with {self.flavour} {self.version}, this machine has {flavour} {version}"
        if version != self.version:
            return f"built with {self.flavour} {self.version}, this machine has {version}"
        if capability not in self.capabilities:
            built = ", ".join(f"{major}.{minor}" for major, minor in self.capabilities)
            here = "{}.{}".format(*capability)
            return f"built for compute capability {built} ({self.device}), this device has {here}"
        return None

    def stale(self, bundle: Bundle) -> str | None:
        """Why these plans are not of the bundle's present graphs; None where they are."""
        for role, plan in self.plans.items():
            for name, sha256 in plan.sources.items():
                entry = bundle.files.get(name)
                if entry is None:
                    return f"the {role} plan was built from {name}, which the bundle no longer has"
                if entry.sha256 != sha256:
                    return f"the {role} plan was built from another {name} than the bundle holds now"
        return None

    def check_files(self, verify_hashes: bool = False) -> None:
        """Raises BundleError for a plan file that is missing, of another size or (if asked) of another sha256."""
        for plan in self.plans.values():
            path = self.folder / plan.file
            if not path.is_file():
                raise BundleError(f"{path}: missing, though {PLANS} lists it; run `edgevl build` again")
            if path.stat().st_size != plan.size:
                raise BundleError(
                    f"{path}: {path.stat().st_size:,} bytes, {PLANS} says {plan.size:,}; run `edgevl build` again"
                )
            if verify_hashes and file_sha256(path) != plan.sha256:
                raise BundleError(f"{path}: its sha256 is not that of {PLANS}; run `edgevl build` again")

    def to_dict(self) -> dict[str, Any]:
        """What `plans.json` holds."""
        return {
            "schema_version": PLANS_SCHEMA,
            "flavour": self.flavour,
            "version": self.version,
            "device": self.device,
            "capabilities": [f"{major}.{minor}" for major, minor in self.capabilities],
            "capacity": self.capacity,
            "max_rows": self.max_rows,
            "max_prefill": self.max_prefill,
            "min_patches": self.min_patches,
            "max_patches": self.max_patches,
            "plans": {role: _plan_to_dict(plan) for role, plan in sorted(self.plans.items())},
            **({_STREAMS: True} if self.weight_streaming else {}),
        }

    def write(self) -> None:
        """Write `plans.json` into the folder, under another name first."""
        path = self.folder / PLANS
        partial = path.with_name(f".{PLANS}.partial")
        try:
            partial.write_text(json.dumps(self.to_dict(), indent=1) + "\n", encoding="utf-8")
            partial.replace(path)
        except OSError as e:
            raise BundleError(f"{path}: cannot be written ({e})") from None
        finally:
            partial.unlink(missing_ok=True)

    @classmethod
    def read(cls, folder: Path) -> PlanSet:
        """Read and check `plans.json` and the sizes of the files beside it.

        Raises:
            BundleError: not readable, another schema version, malformed, a file that is missing or of another size.
        """
        path = folder / PLANS
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as e:
            raise BundleError(f"{path}: not readable as JSON ({e}); run `edgevl build` again") from None
        version = data.get("schema_version") if isinstance(data, dict) else None
        if version != PLANS_SCHEMA:
            raise BundleError(
                f"{path}: schema version {version}, this edgevl reads {PLANS_SCHEMA}; run `edgevl build` again"
            )
        try:
            found = cls._parse(folder, data)
        except (KeyError, TypeError, ValueError, AttributeError) as e:
            raise BundleError(f"{path}: malformed ({type(e).__name__}: {e}); run `edgevl build` again") from None
        found.check_files()
        return found

    @classmethod
    def _parse(cls, folder: Path, data: dict[str, Any]) -> PlanSet:
        numbers = ("capacity", "max_rows", "max_prefill", "min_patches", "max_patches")
        texts = ("flavour", "version", "device")
        optional = {_STREAMS} & set(data)
        _exact_keys(data, {"schema_version", *texts, "capabilities", *numbers, "plans", *optional})
        if optional and data[_STREAMS] is not True:
            raise ValueError(f"{_STREAMS} is {data[_STREAMS]!r}, expected true, or nothing")
        if data["flavour"] not in FLAVOURS:
            raise ValueError(f"flavour {data['flavour']!r} is not one of {', '.join(FLAVOURS)}")
        for key in texts:
            if not isinstance(data[key], str) or not data[key]:
                raise ValueError(f"{key} is {data[key]!r}, expected text")
        for key in numbers:
            _count(key, data[key])
        if data["min_patches"] > data["max_patches"]:
            raise ValueError(f"min_patches {data['min_patches']} is above max_patches {data['max_patches']}")
        if set(data["plans"]) != set(_PROFILES):
            raise ValueError(f"plans {sorted(data['plans'])}, expected {sorted(_PROFILES)}")
        capabilities = tuple(_capability(c) for c in data["capabilities"])
        if not capabilities:
            raise ValueError("no compute capabilities")
        return cls(
            folder=folder,
            **{key: data[key] for key in (*texts, *numbers)},
            capabilities=capabilities,
            plans={role: _plan_from_dict(role, plan) for role, plan in data["plans"].items()},
            weight_streaming=bool(optional),
        )


@dataclass(frozen=True)
class FoundPlans:
    """The plan sets of a bundle, by folder name, and what is wrong with those that cannot be read."""

    sets: tuple[PlanSet, ...]
    problems: tuple[str, ...]


def find_plans(bundle: Bundle) -> FoundPlans:
    """What `edgevl build` left in a bundle; a damaged set does not stand in the way of the others. A folder without
    `plans.json` is a build that did not end: left out."""
    sets: list[PlanSet] = []
    problems: list[str] = []
    for folder in _plan_folders(bundle):
        try:
            sets.append(PlanSet.read(folder))
        except BundleError as e:
            problems.append(str(e).removesuffix(_AGAIN))
    return FoundPlans(tuple(sets), tuple(problems))


def check_plan_hashes(bundle: Bundle) -> None:
    """Raises BundleError for the first plan set of a bundle that cannot be read, or a plan of another sha256."""
    for folder in _plan_folders(bundle):
        PlanSet.read(folder).check_files(verify_hashes=True)


def _plan_folders(bundle: Bundle) -> list[Path]:
    folders = sorted(p.parent for p in bundle.path(ENGINES_FOLDER).glob(f"*/{PLANS}"))
    return [folder for folder in folders if not folder.name.startswith(".")]


def plan_folder_name(flavour: str, version: str, device: str) -> str:
    """`tensorrt_rtx-1.7.1.116-sm86`, `tensorrt-10.16.2-orin`: what a file system takes."""
    return f"{flavour}-{version}-{re.sub(r'[^a-z0-9+]+', '-', device.lower()).strip('-')}"


def _plan_to_dict(plan: PlanFile) -> dict[str, Any]:
    return {
        "file": plan.file,
        "size": plan.size,
        "sha256": plan.sha256,
        "dtype": plan.dtype,
        "sources": dict(sorted(plan.sources.items())),
        "profiles": [
            {
                "name": p.name,
                "shapes": {
                    n: {"min": list(s.min), "opt": list(s.opt), "max": list(s.max)} for n, s in p.shapes.items()
                },
            }
            for p in plan.profiles
        ],
    }


def _plan_from_dict(role: str, data: dict[str, Any]) -> PlanFile:
    _exact_keys(data, {"file", "size", "sha256", "dtype", "sources", "profiles"})
    name = data["file"]
    if not isinstance(name, str) or PurePosixPath(name).name != name or name.startswith("."):
        raise ValueError(f"file {name!r} of the {role} plan is not a name")
    if data["dtype"] not in DTYPES:
        raise ValueError(f"dtype {data['dtype']!r} is not one of {', '.join(DTYPES)}")
    _count("size", data["size"])
    for digest in (data["sha256"], *data["sources"].values()):
        if not isinstance(digest, str) or not re.fullmatch(r"[0-9a-f]{64}", digest):
            raise ValueError(f"{digest!r} is not a sha256")
    profiles = tuple(_profile_from_dict(p) for p in data["profiles"])
    if tuple(p.name for p in profiles) != _PROFILES[role]:
        raise ValueError(f"{role} profiles {[p.name for p in profiles]}, expected {list(_PROFILES[role])}")
    return PlanFile(name, data["size"], data["sha256"], data["dtype"], dict(data["sources"]), profiles)


def _profile_from_dict(data: dict[str, Any]) -> PlanProfile:
    _exact_keys(data, {"name", "shapes"})
    shapes = {}
    for name, given in data["shapes"].items():
        _exact_keys(given, {"min", "opt", "max"})
        found = ShapeRange(*(tuple(_count(name, n, least=0) for n in given[key]) for key in ("min", "opt", "max")))
        if not len(found.min) == len(found.opt) == len(found.max) or not (
            found.holds(found.opt) and found.holds(found.max)
        ):
            raise ValueError(
                f"input {name!r} of profile {data['name']!r} has min {found.min}, opt {found.opt}, "
                f"max {found.max}, expected equal ranks that grow"
            )
        shapes[name] = found
    return PlanProfile(data["name"], shapes)


def _capability(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)\.(\d+)", text)
    if match is None:
        raise ValueError(f"compute capability {text!r}, expected major.minor")
    return int(match[1]), int(match[2])


def _count(key: str, value: object, least: int = 1) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{key} is {value!r}, expected a whole number of at least {least}")
    return value


def _exact_keys(data: Mapping[str, Any], keys: set[str]) -> None:
    if set(data) != keys:
        raise ValueError(f"unknown keys {sorted(set(data) - keys)}, missing keys {sorted(keys - set(data))}")
