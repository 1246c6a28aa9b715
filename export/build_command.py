"""The subcommand build."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click
from tabulate import tabulate
from tqdm import tqdm

from edgevl.export.plan_lint import lint_bundle_graphs, lint_plans
from edgevl.export.tensorrt_build import BuildOptions, BuildReport, build_plans
from edgevl.runtime.bundle import Bundle
from edgevl.runtime.commands import note
from edgevl.runtime.errors import InputError
from edgevl.runtime.plans import FLAVOURS

__all__ = ["build"]

_PROFILE = {
    "rows": "rows",
    "prefill": "prefill",
    "frames": "frames",
    "min-pixels": "min_pixels",
    "max-pixels": "max_pixels",
}


@click.command()
@click.argument("bundle")
@click.option(
    "--for",
    "targets",
    metavar="SM,…",
    help="Compute capabilities, without such a GPU: sm86,sm89 [default: the GPU here].",
)
@click.option(
    "--gpu", type=click.IntRange(min=0), metavar="N", help="Which GPU of this machine to build on [default: 0]."
)
@click.option("--device-name", metavar="NAME", help="Name of the plans' folder [default: the GPU's name, or --for].")
@click.option(
    "--profile",
    "profiles",
    multiple=True,
    metavar="KEY=N,…",
    help="Largest requests: rows (of a batch) [1], prefill (tokens at once) [1024], frames (at once) [1], min-pixels, "
    "max-pixels (of a frame) [the bundle's, as far as the KV cache can hold their tokens].",
)
@click.option("--flavour", type=click.Choice(FLAVOURS), help="[default: what is installed; tensorrt_rtx with --for].")
@click.option(
    "--workspace",
    type=click.IntRange(min=1),
    metavar="MB",
    help="Memory that kernels may use beside weights and activations.",
)
@click.option(
    "--timing-cache",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Keeps what was timed, for the next build on this device.",
)
@click.option(
    "--optimization-level", type=click.IntRange(0, 5), metavar="N", help="0 builds fastest, 5 searches longest."
)
@click.option(
    "--weight-streaming", is_flag=True, help="Weights for which the GPU has no room stay in host memory (slower)."
)
@click.option("--refit", is_flag=True, help="Weights may be replaced in the plans later.")
@click.option(
    "--lint",
    is_flag=True,
    help="Check the graphs, and what the plans fused; status 1 if something is not as it should be.",
)
@click.option("--overwrite", is_flag=True, help="Build again where plans of the same graphs exist.")
def build(
    bundle: str,
    targets: str | None,
    profiles: tuple[str, ...],
    workspace: int | None,
    lint: bool,
    overwrite: bool,
    **options: Any,
) -> int:
    """Build TensorRT plans into BUNDLE/engines, for the GPU here or, with TensorRT-RTX, for GPUs named by --for.

    \b
    Example:
      edgevl export Qwen2-VL-2B-Instruct -o bundle --target tensorrt
      edgevl build bundle --for sm86,sm89 --profile rows=4,max-pixels=1003520
    """
    opened = Bundle.open(bundle)
    names = tuple(t.strip().lower() for t in (targets or "").split(",") if t.strip())
    chosen = BuildOptions(
        targets=names,
        workspace=None if workspace is None else workspace << 20,
        **_ranges(profiles),
        **options,
    )
    if lint:
        problems = lint_bundle_graphs(opened)
        if problems:
            return _tell(problems)
    with tqdm(unit="step", desc="build", file=sys.stderr, disable=None, leave=False) as bar:

        def progress(plan: str, phase: str, step: int, steps: int) -> None:
            bar.set_description_str(f"{plan}: {phase[:40]}", refresh=False)
            bar.total, bar.n = max(steps, 1), step
            bar.refresh()

        report = build_plans(opened, chosen, overwrite=overwrite, progress=None if bar.disable else progress)
    for text in (*report.notes, *(f"{p.role}: {w}" for p in report.parts for w in p.warnings)):
        note(text)
    click.echo(_table(report))
    return _tell(lint_plans(opened, report.plans)) if lint else 0


def _ranges(profiles: tuple[str, ...]) -> dict[str, int]:
    found = {}
    for pair in ",".join(profiles).split(","):
        if not pair.strip():
            continue
        key, _, value = (part.strip() for part in pair.partition("="))
        if key not in _PROFILE or not value.isdigit():
            raise InputError(f"profile {pair!r} is not understood; expected {', '.join(f'{k}=N' for k in _PROFILE)}")
        found[_PROFILE[key]] = int(value)
    return found


def _tell(problems: list[str]) -> int:
    for problem in problems:
        note(f"edgevl: lint: {problem}")
    if not problems:
        note("lint: the plans are fused as they should be")
    return 1 if problems else 0


def _table(report: BuildReport) -> str:
    plans = report.plans
    rows = [
        (p.role, f"{p.nbytes / 1e6:,.1f}", ", ".join(q.name for q in plans.plans[p.role].profiles), f"{p.seconds:.1f}")
        for p in report.parts
    ]
    align = ("left", "right", "left", "right")
    table = tabulate(
        rows, headers=("plan", "MB", "profiles", "s"), tablefmt="simple", colalign=align, disable_numparse=True
    )
    capabilities = ", ".join(f"{major}.{minor}" for major, minor in plans.capabilities)
    limits = (
        f"KV cache of {plans.capacity:,} tokens, rows up to {plans.max_rows}, prefill up to {plans.max_prefill:,}, "
        f"frames of {plans.min_patches:,} to {plans.max_patches:,} patches"
    )
    peak = f"peak memory {report.peak_rss_bytes / 1e6:,.0f} MB"
    return f"{table}\n{plans.folder}, for compute capability {capabilities}\n{limits}; {peak}"
