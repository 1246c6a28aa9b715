"""Our bundles beside the other programs, on one checkpoint, in one run.

Method: a round starts every contender once for every workload, each in a process of its own on the same cores, and the
order rotates, so that what else the machine does hits all alike. A process opens its model, answers once to warm up
and then `--repeats` times about new pictures (JPEG bytes in, tokens out; greedy; end tokens are not heeded). Ratios
are taken round by round. Results are appended to `OUT/results.jsonl` as they come: a run that was killed goes on where
it stopped, and only figures of one machine and one day are put together.
"""

from __future__ import annotations

import datetime
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
from tqdm import tqdm

from edgevl.benchmarks.peers.contract import Measured
from edgevl.benchmarks.peers.table import Row, plot, tables
from edgevl.benchmarks.peers.worker import peer
from edgevl.benchmarks.turns import environment, in_turn
from edgevl.benchmarks.workloads import WORKLOADS, Workload, question, workload
from edgevl.runtime import VisionLanguageModel
from edgevl.runtime.bundle import MANIFEST, Bundle
from edgevl.runtime.doctor import cpu_flags, cpu_model
from edgevl.runtime.engine import engine_status
from edgevl.runtime.errors import EdgeVLError

__all__ = ["PEERS", "Entrant", "main"]

PEERS = ("transformers", "openvino_genai", "llama_cpp", "mnn", "onnxruntime_genai")
_OURS = "edgevl_bundle"
_ENGINE = "ort-cpu"
_HERE = ("transformers",)  # runs in our own environment


@dataclass(frozen=True)
class Entrant:
    """One contender: a peer's variant, or a bundle of ours, and where its model lies."""

    module: str
    variant: str
    folder: Path
    python: Path
    kind: str = ""  # what it is, for the legend

    @property
    def name(self) -> str:
        if self.module != _OURS:
            return f"{self.module} {self.variant}"
        return f"edgevl {self.folder.name}" + ("" if self.variant == _ENGINE else f" {self.variant}")


def _worker(entrant: Entrant, *arguments: str) -> list[str]:
    return [str(entrant.python), "-m", "edgevl.benchmarks.peers.worker", entrant.module, entrant.variant, *arguments]


def _run(command: list[str], threads: int, task: str = "") -> str:
    """What the process printed.

    Raises:
        click.ClickException: it failed; the last lines that it wrote.
    """
    done = subprocess.run(command, input=task, capture_output=True, text=True, env=environment(threads), check=False)
    if done.returncode:
        last = " | ".join(done.stderr.strip().splitlines()[-3:])
        raise click.ClickException(f"{' '.join(command[3:6])} ended with status {done.returncode}: {last[-600:]}")
    return done.stdout


def entrants(
    chosen: str, bundles: Sequence[Path], out: Path, environments: Path, engines: str = _ENGINE
) -> list[Entrant]:
    """Bundles on each engine first, then the peers: `all`, `none`, or names as `llama_cpp` or `llama_cpp:Q4_0` joined
    by commas.

    Raises:
        click.UsageError: an unknown engine, peer or variant, or an environment that is not there.
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
        found += [Entrant(module, v, out / f"{module}-{v}", own, kind) for v, kind in chosen_ones.items()]
    return found


def _kind(bundle: Path, engine: str) -> str:
    if not (bundle / MANIFEST).exists():
        return ""
    graphs = Bundle.open(bundle).graphs
    precisions = ", ".join(f"{role} {graph.precision}" for role, graph in graphs.items())
    return "; ".join(t for t in (precisions, peer(_OURS).VARIANTS[engine]) if t)


def _prepare(all_entrants: list[Entrant], checkpoint: Path, threads: int) -> Iterator[Entrant]:
    """Convert what is not there yet; who cannot is told of and left out."""
    for entrant in all_entrants:
        if not entrant.folder.exists():
            click.echo(f"{entrant.name}: converting {checkpoint.name}", err=True)
            try:
                _run(_worker(entrant, "prepare", str(checkpoint), str(entrant.folder)), threads)
            except click.ClickException as e:
                click.echo(f"{entrant.name} is left out: {e.message}", err=True)
                continue
        yield entrant


def _measure(entrant: Entrant, task: dict[str, Any]) -> Measured:
    try:
        printed = _run(_worker(entrant, "measure", str(entrant.folder)), task["threads"], json.dumps(task))
    except click.ClickException as e:
        return Measured(entrant.name, unsupported=e.message)
    return Measured(**{**json.loads(printed.splitlines()[-1]), "contender": entrant.name})


def _known(results: Path) -> list[Row]:
    if not results.exists():
        return []
    rows = []
    for number, line in enumerate(results.read_text(encoding="utf-8").splitlines(), 1):
        try:
            d = json.loads(line)
            rows.append(Row(d["workload"], d["round"], Measured(**d["measured"])))
        except (ValueError, KeyError, TypeError):
            raise click.UsageError(f"{results}: line {number} is no result (cut off?); remove it to go on") from None
    return rows


def _head(path: Path, now: dict[str, Any]) -> dict[str, Any]:
    """What the results in this folder were measured on; workloads may be added.

    Raises:
        click.UsageError: they are of another machine, day or setting, which are not mixed.
    """
    before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else now
    other = [f"{k} was {before.get(k)!r}, is {v!r}" for k, v in now.items() if k != "workloads" and before.get(k) != v]
    works = {**before["workloads"], **now["workloads"]}
    other += [f"workload {k} was {v!r}" for k, v in before["workloads"].items() if works[k] != v]
    if other:
        raise click.UsageError(
            f"{path.parent} holds results of another run: {'; '.join(other)}; choose another --results"
        )
    path.write_text(json.dumps({**now, "workloads": works}, indent=1) + "\n", encoding="utf-8")
    return {**now, "workloads": works}


@click.command()
@click.argument("checkpoint", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("bundles", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--peers", "chosen", default="all", show_default=True, help="all, none, or NAME[:VARIANT],...")
@click.option(
    "--models",
    type=click.Path(path_type=Path),
    default=Path("out/peers"),
    show_default=True,
    help="Where the peers' converted models are kept.",
)
@click.option(
    "--environments",
    type=click.Path(path_type=Path),
    default=Path(".venv-peers"),
    show_default=True,
    help="Where `make peers` put them.",
)
@click.option(
    "--results",
    type=click.Path(path_type=Path),
    default=Path("out/peers/results"),
    show_default=True,
    help="Folder of results.jsonl, table.md and peers.png.",
)
@click.option(
    "--workload",
    "names",
    multiple=True,
    default=("picture", "document", "batch-4"),
    show_default=True,
    type=click.Choice(list(WORKLOADS)),
    help="May be given several times.",
)
@click.option("--new-tokens", type=click.IntRange(2), help="Of every answer [default: the workload's].")
@click.option("--engines", default=_ENGINE, show_default=True, help="Of the bundles: ort-cpu, openvino.")
@click.option("--rounds", default=3, show_default=True, type=click.IntRange(1))
@click.option("--repeats", default=2, show_default=True, type=click.IntRange(1), help="Measured answers per process.")
@click.option("--threads", default=2, show_default=True, type=click.IntRange(1))
def main(checkpoint: Path, bundles: tuple[Path, ...], **options: Any) -> None:
    """Measure BUNDLES beside the other programs on CHECKPOINT; ratios are to the first bundle."""
    try:
        opened = [Bundle.open(b) for b in bundles]
        works = [workload(name, new_tokens=options["new_tokens"]) for name in options["names"]]
        with VisionLanguageModel.open(opened[0], "ort-cpu") as model:
            texts = {w.name: question(model, w.prompt_tokens) for w in works}
    except EdgeVLError as e:
        raise click.UsageError(str(e)) from None
    results, threads = options["results"], options["threads"]
    models = options["models"]
    models.mkdir(parents=True, exist_ok=True)
    results.mkdir(parents=True, exist_ok=True)
    cores = sorted(os.sched_getaffinity(0))[:threads]
    listed = entrants(options["chosen"], bundles, models, options["environments"], options["engines"])
    head = {
        "processor": cpu_model(), "flags": cpu_flags(), "threads": threads, "checkpoint": checkpoint.name,
        "date": datetime.date.today().isoformat(), "repeats": options["repeats"],
        "workloads": {w.name: w.describe for w in works},
    }  # fmt: skip
    head = _head(results / "run.json", head)
    racing = list(_prepare(listed, checkpoint, threads))
    said = {e.name: e.kind for e in racing if e.kind}
    head = {**head, "contenders": said}
    rows = _known(results / "results.jsonl")
    done = {(r.workload, r.round, r.measured.contender) for r in rows}
    total = len(works) * options["rounds"] * len(racing)
    with tqdm(total=total, unit="process", file=sys.stderr, disable=None) as bar:
        for number, work, entrant in _order(works, racing, options["rounds"]):
            bar.set_postfix_str(f"{work.name}, {entrant.name}")
            if (work.name, number, entrant.name) not in done:
                task = {"work": asdict(work), "text": texts[work.name], "threads": threads, "cores": cores}
                row = Row(work.name, number, _measure(entrant, {**task, "repeats": options["repeats"]}))
                rows.append(row)
                with (results / "results.jsonl").open("a", encoding="utf-8") as out:
                    out.write(json.dumps(asdict(row)) + "\n")
            bar.update()
    names = list(dict.fromkeys([*(e.name for e in racing), *(r.measured.contender for r in rows)]))
    text = tables(rows, head, names)
    (results / "table.md").write_text(text + "\n", encoding="utf-8")
    plot(rows, head, names, results / "peers.png")
    click.echo(text)


def _order(works: list[Workload], racing: list[Entrant], rounds: int) -> Iterator[tuple[int, Workload, Entrant]]:
    for number in range(rounds):
        for work in works:
            for entrant in in_turn(racing, number):
                yield number, work, entrant
