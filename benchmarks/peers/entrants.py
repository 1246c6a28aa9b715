"""Who takes part: bundles of ours on their engines, and the peers' variants, with where each one's model lies."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import click

from edgevl.benchmarks.peers.worker import peer
from edgevl.runtime.bundle import MANIFEST, Bundle
from edgevl.runtime.engine import engine_status

__all__ = ["ENGINE", "PEERS", "Entrant", "entrants", "folder_name"]

PEERS = ("transformers", "openvino_genai", "llama_cpp", "mnn", "onnxruntime_genai")
ENGINE = "ort-cpu"
_OURS = "edgevl_bundle"
_HERE = ("transformers",)  # runs in our own environment


def folder_name(folder: Path) -> str:
    """Its name, where it is given as `.` too."""
    return Path(os.path.normpath(folder.absolute())).name


@dataclass(frozen=True)
class Entrant:
    """One contender: a peer's variant, or a bundle of ours, and where its model lies."""

    module: str
    variant: str
    folder: Path
    python: Path
    kind: str = ""  # what it is, for the legend

    @property
    def ours(self) -> bool:
        return self.module == _OURS

    @property
    def name(self) -> str:
        if not self.ours:
            return f"{self.module} {self.variant}"
        return f"edgevl {folder_name(self.folder)}" + ("" if self.variant == ENGINE else f" {self.variant}")

    def worker(self, *arguments: str) -> list[str]:
        """The command of a process of its own, see worker.py."""
        return [str(self.python), "-m", "edgevl.benchmarks.peers.worker", self.module, self.variant, *arguments]


def entrants(
    chosen: str, bundles: Sequence[Path], models: Path, environments: Path, engines: str = ENGINE
) -> list[Entrant]:
    """Bundles on each engine first, then the peers: `all`, `none`, or names as `llama_cpp` or `llama_cpp:Q4_0` joined
    by commas.

    Raises:
        click.UsageError: an unknown engine, peer or variant, an environment that is not there, or two of one name.
    """
    python = Path(sys.executable)
    usable = {s.name: s for s in engine_status()}
    for engine in engines.split(","):
        if engine not in peer(_OURS).VARIANTS:
            raise click.UsageError(f"engine {engine!r}: expected some of {', '.join(peer(_OURS).VARIANTS)}")
        if not usable[engine].usable:
            raise click.UsageError(f"engine {engine!r} cannot run here: {usable[engine].detail}")
    found = [Entrant(_OURS, e, b, python, _kind(b, e)) for b in bundles for e in engines.split(",")]
    wanted = {"all": list(PEERS), "none": []}.get(chosen, chosen.split(","))
    for name in wanted:
        module, _, variant = name.partition(":")
        if module not in PEERS:
            raise click.UsageError(f"peer {module!r} is unknown; expected some of {', '.join(PEERS)}, all, or none")
        offered = peer(module).VARIANTS
        if variant and variant not in offered:
            raise click.UsageError(f"{module} has no variant {variant!r}; expected one of {', '.join(offered)}")
        own = python if module in _HERE else environments / module / "bin" / "python"
        if not own.exists():
            raise click.UsageError(f"{own} is not there; make the peers' environments with `make peers`")
        chosen_ones = {variant: offered[variant]} if variant else offered
        found += [Entrant(module, v, models / f"{module}-{v}", own, kind) for v, kind in chosen_ones.items()]
    _refuse_twins(found)
    return found


def _refuse_twins(found: Sequence[Entrant]) -> None:
    """Results are told apart by the contenders' names."""
    seen: dict[str, Entrant] = {}
    for entrant in found:
        twin = seen.setdefault(entrant.name, entrant)
        if twin is entrant:
            continue
        if entrant.ours and twin.folder != entrant.folder:
            raise click.UsageError(
                f"{twin.folder} and {entrant.folder} would both be {entrant.name!r} in the results; expected bundles "
                "whose folders have names of their own: rename one, or give a link to it"
            )
        raise click.UsageError(f"{entrant.name!r} is asked for twice; leave one out")


def _kind(bundle: Path, engine: str) -> str:
    if not (bundle / MANIFEST).exists():
        return ""
    graphs = Bundle.open(bundle).graphs
    precisions = ", ".join(f"{role} {graph.precision}" for role, graph in graphs.items())
    return "; ".join(t for t in (precisions, peer(_OURS).VARIANTS[engine]) if t)
