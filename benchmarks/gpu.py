"""One command for a machine with a GPU: export, build, verify and measure, beside transformers; a table at the end.

    python -m edgevl.benchmarks.gpu OUT                       # random weights of the 2B shape
    python -m edgevl.benchmarks.gpu OUT --checkpoint DIR --engines ort-cuda,tensorrt --json figures.jsonl

For every engine that is usable: a bundle is exported (and TensorRT plans built), `verify` replays its golden vectors
on that engine, and rounds of fresh processes, whose order rotates, measure pictures of two sizes: vision, prefill,
time to first token, decode speed, and the GPU memory that the device has less of when a process has answered. The
peers are transformers in bfloat16 with sdpa, and the same with a static cache and torch.compile'd decode steps. What
fails is told and left out; the status is 1 then. Random weights: a verify of int4 on them may drift where it would not
on a trained model, so a drift is reported and the measuring goes on.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import click
from tabulate import tabulate
from tqdm import tqdm

from edgevl.benchmarks.device_memory import gpu_used
from edgevl.benchmarks.output_option import OutputFile
from edgevl.benchmarks.peers.table import spread
from edgevl.benchmarks.peers.worker import measure
from edgevl.benchmarks.random_checkpoint import SHAPES, write_random_checkpoint
from edgevl.benchmarks.turns import in_turn
from edgevl.benchmarks.workloads import Workload, question
from edgevl.runtime.bundle import MANIFEST
from edgevl.runtime.doctor import machine
from edgevl.runtime.engine import engine_status
from edgevl.runtime.errors import InputError
from edgevl.runtime.output_file import write_output
from edgevl.runtime.tensorrt_library import find_tensorrt

__all__ = ["Contender", "main"]

METRICS = ("open_s", "vision_s", "prefill_s", "ttft_s", "decode_tokens_per_s", "gpu_mb")
PEERS = {"transformers": "transformers bf16 sdpa", "transformers-compiled": "transformers bf16, compiled decode"}


@dataclass(frozen=True)
class Contender:
    """Something that is measured: an engine on a bundle, or a peer on the checkpoint."""

    name: str
    kind: str  # an engine's name, or a key of PEERS
    path: str
    cuda_graph: bool | None = None


@dataclass
class Figures:
    """One process: a number per request, but for opening and memory."""

    contender: str
    size: str
    measured: dict[str, list[float]] = field(default_factory=dict)


# ---------------------------------------------------------------------- inside a measuring process


def _open(contender: Contender) -> Any:
    """A Contender of the peers' benchmark."""
    from edgevl.benchmarks.peers.edgevl_bundle import BundleModel
    from edgevl.benchmarks.peers.transformers import TransformersModel

    if contender.kind not in PEERS:
        return BundleModel(Path(contender.path), contender.kind, cuda_graph=contender.cuda_graph)
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    return TransformersModel(Path(contender.path), device, contender.kind == "transformers-compiled")


def worker(contender_json: str, work_json: str, text: str, requests: str) -> None:
    """Entry of one measuring process: prints its figures as one JSON line."""
    contender, work = Contender(**json.loads(contender_json)), Workload(**json.loads(work_json))
    started = time.perf_counter()
    model = _open(contender)
    opened = time.perf_counter() - started
    # Two to warm up: shapes, then captures.
    measured = measure(contender.name, model, opened, work, text, int(requests), warm_up=2)
    found: dict[str, list[float]] = {"open_s": [opened]}
    found |= {name: getattr(measured, name) for name in ("vision_s", "prefill_s", "ttft_s", "decode_tokens_per_s")}
    used = gpu_used()
    found["gpu_mb"] = [] if used is None else [used / 1e6]
    sys.stdout.write(json.dumps(found) + "\n")


def question_text(bundle: str, tokens: str) -> None:
    """Entry of a process: prints a question of so many tokens, which needs the bundle's tokenizer only."""
    from edgevl.runtime import VisionLanguageModel

    with VisionLanguageModel.open(bundle) as model:
        sys.stdout.write(question(model, int(tokens)) + "\n")


def _process(entry: str, *arguments: str) -> str:
    """Run `entry` of this module in a process of its own; its last line of output."""
    code = f"import sys; from edgevl.benchmarks import gpu; gpu.{entry}(*sys.argv[1:])"
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise click.ClickException(done.stderr.strip().splitlines()[-1] if done.stderr.strip() else "it died")
    return done.stdout.splitlines()[-1]


# ---------------------------------------------------------------------- preparing


def _edgevl(*arguments: str) -> int:
    """One command of edgevl in a process of its own, its output on stderr."""
    click.echo(f"$ edgevl {' '.join(arguments)}", err=True)
    return subprocess.run(
        [sys.executable, "-m", "edgevl.runtime", *arguments], stdout=sys.stderr, check=False
    ).returncode


def target_for(engine: str) -> str:
    """The --target whose bundles `engine` runs here; for TensorRT it depends on the version."""
    if engine != "tensorrt":
        return {"ort-cpu": "cpu", "ort-cuda": "cuda"}[engine]
    library = find_tensorrt()
    return "tensorrt" if library.flavour == "tensorrt_rtx" or library.at_least("10.15") else "jetpack6"


def prepare(out: Path, checkpoint: Path, engines: Sequence[str], precisions: Sequence[str]) -> Iterator[Any]:
    """Export and build what is not there yet; yields a Contender, or the text of what failed."""
    for engine in engines:
        for precision in precisions:
            bundle = out / f"{engine}-{precision}"
            if not (bundle / MANIFEST).exists():
                options = ["--target", target_for(engine), "--precision", precision]
                if _edgevl("export", str(checkpoint), "-o", str(bundle), *options) == 2:
                    yield f"{bundle.name}: export failed"
                    continue
            if engine == "tensorrt" and not list(bundle.glob("engines/*/plans.json")) and _edgevl("build", str(bundle)):
                yield f"{bundle.name}: build failed"
                continue
            if not list(bundle.glob("golden/*.safetensors")):
                yield f"{bundle.name}: not verified, it has no golden vectors (they need torch and transformers)"
            elif status := _edgevl("verify", str(bundle), "--engine", engine):
                yield f"{bundle.name}: verify on {engine} " + ("drifts" if status == 1 else "could not run")
            graphs = (False, True) if engine == "ort-cuda" else (None,)
            for graph in graphs:
                name = f"{engine} {precision}" + (" CUDA graph" if graph else "")
                yield Contender(name, engine, str(bundle), graph)


def summary(figures: Sequence[Figures], sizes: Sequence[str]) -> str:
    """A table per picture size: medians over rounds and requests, with their spread."""
    headers = ["", "open s", "vision s", "prefill s", "TTFT s", "decode tok/s", "GPU MB"]
    tables = []
    for size in sizes:
        rows = []
        for name in dict.fromkeys(f.contender for f in figures):
            pooled = [f.measured for f in figures if (f.contender, f.size) == (name, size)]
            rows.append([name, *(spread([v for m in pooled for v in m.get(metric, [])]) for metric in METRICS)])
        tables.append(f"{size}\n\n{tabulate(rows, headers=headers, tablefmt='github', disable_numparse=True)}")
    return "\n\n".join(tables)


@click.command()
@click.argument("out", type=click.Path(file_okay=False, path_type=Path))
@click.option("--checkpoint", type=click.Path(path_type=Path), help="Measure this [default: random weights].")
@click.option("--shape", type=click.Choice(list(SHAPES)), default="2b", show_default=True, help="Of random weights.")
@click.option("--engines", default="ort-cuda,tensorrt", show_default=True, help="Which; unusable ones are told of.")
@click.option("--precisions", default="int4,fp16", show_default=True)
@click.option("--sizes", default="448x448,1288x966", show_default=True, help="Pictures, width x height.")
@click.option("--prompt-tokens", default=16, show_default=True, type=click.IntRange(1), help="Of the question.")
@click.option("--new-tokens", default=64, show_default=True, type=click.IntRange(1))
@click.option("--requests", default=3, show_default=True, type=click.IntRange(1), help="Measured requests per process.")
@click.option("--rounds", default=3, show_default=True, type=click.IntRange(1))
@click.option("--no-peers", is_flag=True, help="Without transformers.")
@click.option("--json", "json_path", type=OutputFile(), help="Write all figures as JSON lines.")
def main(out: Path, checkpoint: Path | None, json_path: Path | None, **options: Any) -> None:
    """Export, build, verify and measure on the GPU of this machine, with everything kept in OUT."""
    try:
        works = [_workload(size, options["prompt_tokens"], options["new_tokens"]) for size in _listed(options["sizes"])]
    except InputError as e:
        raise click.UsageError(f"--sizes: {e}") from None
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise click.UsageError(f"{out}: cannot be made ({e.strerror}); name another folder") from None
    failures: list[str] = []
    status = {s.name: s for s in engine_status()}
    engines = []
    for name in _listed(options["engines"]):
        if name not in status:
            raise click.UsageError(f"engine {name!r} is unknown; expected some of {', '.join(status)}")
        if status[name].usable:
            engines.append(name)
        else:
            failures.append(f"{name}: {status[name].detail}")
    if not engines:
        raise click.ClickException("; ".join(failures))
    if checkpoint is None:
        checkpoint = out / f"checkpoint-{options['shape']}"
        if not (checkpoint / "config.json").exists():
            write_random_checkpoint(checkpoint, options["shape"])
    contenders: list[Contender] = []
    for made in prepare(out, checkpoint, engines, _listed(options["precisions"])):
        if isinstance(made, Contender):
            contenders.append(made)
        else:
            failures.append(made)
    if not contenders:
        raise click.ClickException("; ".join(failures))
    bundle = contenders[0].path
    if not options["no_peers"]:
        contenders = [*(Contender(name, kind, str(checkpoint)) for kind, name in PEERS.items()), *contenders]
    figures = _measure(contenders, bundle, works, options, failures)
    facts = machine()
    click.echo("\n".join(f"{k}: {v}" for k, v in facts.items()) + f"\ncheckpoint: {checkpoint.name}\n")
    click.echo(summary(figures, [work.name for work in works]))
    if json_path is not None:
        lines = [json.dumps({"machine": facts, **asdict(f)}) for f in figures]
        write_output(json_path, "\n".join(lines) + "\n")
    for failure in failures:
        click.echo(f"left out or not as it should be: {failure}", err=True)
    sys.exit(1 if failures else 0)


def _listed(text: str) -> list[str]:
    return list(dict.fromkeys(part.strip() for part in text.split(",")))


def _workload(size: str, prompt_tokens: int, new_tokens: int) -> Workload:
    try:
        width, height = (int(n) for n in size.lower().split("x"))
    except ValueError:
        raise InputError(f"size {size!r}: expected WIDTHxHEIGHT, such as 448x448") from None
    return Workload(size, width, height, prompt_tokens=prompt_tokens, new_tokens=new_tokens)


def _measure(
    contenders: list[Contender], bundle: str, works: Sequence[Workload], options: dict[str, Any], failures: list[str]
) -> list[Figures]:
    figures: list[Figures] = []
    dead: set[tuple[str, str]] = set()
    with tqdm(total=len(contenders) * len(works) * options["rounds"], file=sys.stderr, disable=None) as bar:
        for work in works:
            size = work.name
            text = _process("question_text", bundle, str(work.prompt_tokens))
            given = (json.dumps(asdict(work)), text, str(options["requests"]))
            for number in range(options["rounds"]):
                for contender in in_turn(contenders, number):
                    bar.set_postfix_str(contender.name)
                    if (contender.name, size) not in dead:
                        try:
                            measured = json.loads(_process("worker", json.dumps(asdict(contender)), *given))
                            figures.append(Figures(contender.name, size, measured))
                        except click.ClickException as e:
                            dead.add((contender.name, size))
                            failures.append(f"{contender.name} at {size}: {e.message}")
                    bar.update()
    return figures


if __name__ == "__main__":
    main()
