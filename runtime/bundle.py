"""A bundle: the folder that an export writes and a device opens. Knows files, not engines.

`manifest.json` lists every other file with its size and sha256, the model's configuration, the graphs with their
tensor names, the precisions and the rules (M-RoPE) that the host must follow. It is validated as strictly as a
safetensors header: unknown schema, unknown or missing keys, sizes that differ are errors, not warnings.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from edgevl.runtime.config import ModelConfig
from edgevl.runtime.errors import BundleError
from edgevl.runtime.graph_spec import GraphSpec
from edgevl.runtime.image_processing import ImageProcessorConfig
from edgevl.runtime.mrope import MROPE_RULES

__all__ = [
    "MANIFEST",
    "NATIVE_DECODER",
    "NATIVE_ROLES",
    "OPENVINO_PREFILL",
    "SCHEMA_VERSION",
    "Bundle",
    "FileEntry",
    "GraphEntry",
    "file_sha256",
]

MANIFEST = "manifest.json"
SCHEMA_VERSION = 1
OPENVINO_PREFILL = "prefill_openvino"
NATIVE_DECODER = "decoder_native"
# By the role that they take the place of where the machine has our kernels.
NATIVE_ROLES = {"vision": "vision_native", "prefill": "prefill_native", "decoder": NATIVE_DECODER}
GRAPH_ROLES = ("vision", "decoder", "prefill", OPENVINO_PREFILL, *NATIVE_ROLES.values())


@dataclass(frozen=True)
class FileEntry:
    size: int
    sha256: str


@dataclass(frozen=True)
class GraphEntry:
    """One graph: the model file, the precision it was written in, and its inputs and outputs."""

    file: str
    precision: str
    spec: GraphSpec


@dataclass(frozen=True)
class Bundle:
    """An opened manifest. `graphs` has `vision` and `decoder`, `prefill` where prefill has a graph of its own,
    `prefill_openvino` where the engine `openvino` has one, and NATIVE_ROLES, the same with our own kernels."""

    folder: Path
    model: ModelConfig
    image_processor: ImageProcessorConfig
    mrope_rule: str
    target: str
    precision: str
    max_tokens: int
    requires: dict[str, str]  # engine package -> least version
    graphs: dict[str, GraphEntry]
    files: dict[str, FileEntry]
    edgevl_version: str = "unknown"
    options: dict[str, Any] = field(default_factory=dict)  # how it was exported; for the reader only

    @classmethod
    def open(cls, folder: str | Path, verify_hashes: bool = False) -> Bundle:
        """Read and check a bundle folder.

        Raises:
            BundleError: no manifest, another schema version, a malformed manifest, a file that is missing, of another
                size or, with `verify_hashes`, of another sha256.
        """
        folder = Path(folder)
        data = _read_manifest(folder)
        try:
            bundle = cls._parse(folder, data)
        except (KeyError, TypeError, ValueError, AttributeError) as e:
            raise BundleError(
                f"{folder / MANIFEST}: malformed ({type(e).__name__}: {e}); export the checkpoint again"
            ) from None
        bundle._check_files(verify_hashes)
        return bundle

    def path(self, name: str) -> Path:
        return self.folder / name

    def manifest(self) -> dict[str, Any]:
        """The dictionary that `manifest.json` holds."""
        return {
            "schema_version": SCHEMA_VERSION,
            "edgevl_version": self.edgevl_version,
            "target": self.target,
            "precision": self.precision,
            "mrope_rule": self.mrope_rule,
            "max_tokens": self.max_tokens,
            "requires": self.requires,
            "options": self.options,
            "model": self.model.to_dict(),
            "image_processor": self.image_processor.to_dict(),
            "graphs": {
                role: {"file": g.file, "precision": g.precision, "spec": g.spec.to_dict()}
                for role, g in self.graphs.items()
            },
            "files": {name: {"size": f.size, "sha256": f.sha256} for name, f in sorted(self.files.items())},
        }

    def write_manifest(self) -> None:
        """Write `manifest.json` under a temporary name and rename it."""
        path = self.path(MANIFEST)
        partial = path.with_name(f".{MANIFEST}.partial")
        try:
            partial.write_text(json.dumps(self.manifest(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)

    @classmethod
    def _parse(cls, folder: Path, data: dict[str, Any]) -> Bundle:
        keys = {
            *("schema_version", "edgevl_version", "target", "precision", "mrope_rule", "max_tokens", "requires"),
            *("options", "model", "image_processor", "graphs", "files"),
        }
        if set(data) != keys:
            raise ValueError(f"unknown keys {sorted(set(data) - keys)}, missing keys {sorted(keys - set(data))}")
        if data["mrope_rule"] not in MROPE_RULES:
            raise ValueError(f"mrope_rule {data['mrope_rule']!r} is not one of {sorted(MROPE_RULES)}")
        graphs = {}
        for role, g in data["graphs"].items():
            if role not in GRAPH_ROLES or set(g) != {"file", "precision", "spec"}:
                raise ValueError(f"graph {role!r} with keys {sorted(g)}")
            graphs[role] = GraphEntry(str(g["file"]), str(g["precision"]), GraphSpec.from_dict(g["spec"]))
        if not {"vision", "decoder"} <= set(graphs):
            raise ValueError(f"graphs {sorted(graphs)}, expected vision and decoder")
        files = {}
        for name, f in data["files"].items():
            # A name that leaves the folder would let a manifest read any file of the device.
            if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts or set(f) != {"size", "sha256"}:
                raise ValueError(f"file entry {name!r}")
            files[name] = FileEntry(int(f["size"]), str(f["sha256"]))
        absent = [g.file for g in graphs.values() if g.file not in files]
        if absent:
            raise ValueError(f"graph files {absent} are not listed under files")
        return cls(
            folder=folder,
            model=ModelConfig.from_dict(data["model"]),
            image_processor=ImageProcessorConfig.from_dict(data["image_processor"]),
            mrope_rule=data["mrope_rule"],
            target=str(data["target"]),
            precision=str(data["precision"]),
            max_tokens=int(data["max_tokens"]),
            requires=dict(data["requires"]),
            graphs=graphs,
            files=files,
            edgevl_version=str(data["edgevl_version"]),
            options=dict(data["options"]),
        )

    def _check_files(self, verify_hashes: bool) -> None:
        for name, entry in self.files.items():
            path = self.folder / name
            if not path.is_file():
                raise BundleError(f"{path}: missing, though the manifest lists it; copy the bundle again or re-export")
            size = path.stat().st_size
            if size != entry.size:
                raise BundleError(
                    f"{path}: {size:,} bytes, the manifest says {entry.size:,}; copy the bundle again or re-export"
                )
        if verify_hashes:
            self.check_hashes()

    def check_hashes(self) -> None:
        """Raises BundleError for the first file whose sha256 differs from the manifest's, TensorRT plans included."""
        for name, entry in self.files.items():
            found = file_sha256(self.folder / name)
            if found != entry.sha256:
                raise BundleError(
                    f"{self.folder / name}: sha256 is {found[:16]}…, the manifest says {entry.sha256[:16]}…; "
                    "the file was changed or damaged: copy the bundle again or re-export"
                )
        from edgevl.runtime.plans import check_plan_hashes  # which are read with their bundle

        check_plan_hashes(self)


def file_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as f:
        while chunk := f.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    if not folder.exists():
        raise BundleError(f"{folder}: no such folder; expected a bundle written by `edgevl export`")
    if not path.is_file():
        hint = (
            "it looks like a checkpoint: run `edgevl export` on it first"
            if (folder / "config.json").exists()
            else ("expected a bundle written by `edgevl export`")
        )
        raise BundleError(f"{folder}: no {MANIFEST} inside; {hint}")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as e:
        raise BundleError(f"{path}: not readable as JSON ({e}); export the checkpoint again") from None
    version = data.get("schema_version") if isinstance(data, dict) else None
    if not isinstance(version, int):
        raise BundleError(f"{path}: no schema_version; this is not a manifest of edgevl")
    if version != SCHEMA_VERSION:
        remedy = "upgrade edgevl" if version > SCHEMA_VERSION else "export the checkpoint again with this edgevl"
        raise BundleError(f"{path}: schema version {version}, this edgevl reads {SCHEMA_VERSION}; {remedy}")
    return data
