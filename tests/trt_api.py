"""Holds source files against the names of TensorRT's Python bindings, version by version (see dump_tensorrt_api.py).

What a variable is goes by its name, as the code calls things everywhere the same (`builder`, `config`, `engine`, …,
also with an underscore in front, as an attribute or with a suffix after one: `self._context`, `decoder_context`).
A name that the same file asks for first (`hasattr(x, "name")`, `getattr(x, "name", …)`) may be missing in some version,
and methods that the file defines itself are its own.
"""

from __future__ import annotations

import ast
import importlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from dump_tensorrt_api import CLASSES

__all__ = ["VARIABLES", "Api", "missing_names", "used_names"]

MODULE = ""
VARIABLES = {
    "trt": MODULE,
    "builder": "Builder",
    "network": "INetworkDefinition",
    "config": "IBuilderConfig",
    "parser": "OnnxParser",
    "profile": "IOptimizationProfile",
    "timing": "ITimingCache",
    "runtime": "Runtime",
    "engine": "ICudaEngine",
    "context": "IExecutionContext",
    "runtime_config": "IRuntimeConfig",
    "runtime_cache": "IRuntimeCache",
    "refitter": "Refitter",
}


@dataclass(frozen=True)
class Api:
    """`names[class][member]`: the versions that have it; class "" is the module."""

    versions: tuple[str, ...]
    names: Mapping[str, Mapping[str, frozenset[str]]]

    @classmethod
    def load(cls) -> Api:
        """The dumped versions, and TensorRT-RTX as it is installed, where it is."""
        data = json.loads((Path(__file__).parent / "data" / "tensorrt_api.json").read_text())
        versions = list(data["versions"])
        names = {
            c: {m: {v for v, flag in zip(versions, flags) if flag == "1"} for m, flags in members.items()}
            for c, members in data["names"].items()
        }
        try:
            rtx = importlib.import_module("tensorrt_rtx")
        except ImportError:
            rtx = None
        if rtx is not None:
            version = f"rtx-{rtx.__version__}"
            versions.append(version)
            for name in {*names, *CLASSES}:
                owner = rtx if name == MODULE else getattr(rtx, name, None)
                for member in () if owner is None else dir(owner):
                    names.setdefault(name, {}).setdefault(member, set()).add(version)
        return cls(tuple(versions), {c: {m: frozenset(v) for m, v in ms.items()} for c, ms in names.items()})


def used_names(source: str, variables: Mapping[str, str] = VARIABLES) -> set[tuple[str, str]]:
    """(class, member) for everything that `source` reads or writes on a variable that is one of TensorRT's objects."""
    tree = ast.parse(source)
    own = {n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)} | _asked(tree)
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr not in own:
            owner = _class_of(node.value, variables)
            if owner is not None and not node.attr.startswith("__"):
                found.add((owner, node.attr))
    return found


def _asked(tree: ast.AST) -> set[str]:
    """Names that are asked for before they are used."""
    return {
        str(node.args[1].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and (node.func.id == "hasattr" or (node.func.id == "getattr" and len(node.args) > 2))
        and isinstance(node.args[1], ast.Constant)
    }


def missing_names(
    source: str, api: Api, variables: Mapping[str, str] = VARIABLES, versions: tuple[str, ...] | None = None
) -> dict[str, list[str]]:
    """`Class.member` -> the versions (of `versions`, or all) that do not have it; {} where all have all."""
    wanted = api.versions if versions is None else versions
    missing, asked = {}, _asked(ast.parse(source))
    for owner, member in sorted(used_names(source, variables)):
        members = api.names.get(owner, {})
        have = members.get(member, frozenset())
        lacking = [v for v in wanted if v not in have]
        if owner in asked:  # only versions that have the class at all come to its members
            known = frozenset().union(*members.values())
            lacking = [v for v in lacking if v in known]
        if lacking:
            missing[f"{owner or 'trt'}.{member}"] = lacking
    return missing


def _class_of(node: ast.expr, variables: Mapping[str, str]) -> str | None:
    if isinstance(node, ast.Attribute):
        if _class_of(node.value, variables) == MODULE:  # trt.BuilderFlag.REFIT
            return node.attr
        name = node.attr
    elif isinstance(node, ast.Name):
        name = node.id
    else:
        return None
    name = name.lstrip("_")
    if name in variables:
        return variables[name]
    return variables.get(name.rsplit("_", 1)[-1]) if "_" in name and name.rsplit("_", 1)[-1] != "trt" else None
