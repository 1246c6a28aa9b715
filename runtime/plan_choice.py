"""Which TensorRT plans of a bundle this machine can open, and why not the others. Data only."""

from __future__ import annotations

from collections.abc import Mapping

from edgevl.runtime.bundle import Bundle
from edgevl.runtime.plans import FLAVOURS, FoundPlans, PlanSet

__all__ = ["choose_plans"]


def choose_plans(
    bundle: Bundle, plans: FoundPlans, versions: Mapping[str, str], capability: tuple[int, int]
) -> tuple[PlanSet | None, list[str]]:
    """The plan set to open, and what is wrong with each of the others that were looked at before it; with all of them
    where there is none to open.

    Standard TensorRT comes before TensorRT-RTX, then the order of `plans`.

    Args:
        versions: {flavour: version} of the libraries here.
        capability: (major, minor) of the GPU here.
    """
    reasons = []
    for found in sorted(plans.sets, key=lambda p: FLAVOURS.index(p.flavour)):
        reason = _reason(bundle, found, versions, capability)
        if reason is None:
            return found, reasons
        reasons.append(f"{found.folder.name}: {reason}")
    return None, [*reasons, *plans.problems]


def _reason(bundle: Bundle, plans: PlanSet, versions: Mapping[str, str], capability: tuple[int, int]) -> str | None:
    version = versions.get(plans.flavour)
    if version is None:
        here = ", ".join(f"{flavour} {v}" for flavour, v in versions.items()) or "neither TensorRT nor TensorRT-RTX"
        return f"built with {plans.flavour} {plans.version}, this machine has {here}"
    return plans.matches(version, capability) or plans.stale(bundle)
