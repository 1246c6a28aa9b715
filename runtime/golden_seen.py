"""What the exporting host measured when it verified a bundle, kept inside it: `golden/seen.json`.

Floors that hold for any model (`golden.COSINE_FLOORS`) are wide: a random model 64 wide loses ten times more to int4
than a trained one. The error of *this* bundle is known once the exporting host has replayed it, and another machine's
rounding differs from it by little. So a stage may err a few times as much as was seen, and no more.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from edgevl.runtime.bundle import Bundle, FileEntry, file_sha256
from edgevl.runtime.errors import BundleError

if TYPE_CHECKING:
    from edgevl.runtime.golden import VerifyReport

__all__ = ["SEEN_FILE", "SeenErrors", "record_seen"]

SEEN_FILE = "golden/seen.json"
_FORMAT = 1
# Times the error seen on the exporting host. Integer kernels agree but for ties; float sums in another order move the
# error of a stage by some tens of percent.
FACTOR = 3
# Another engine's kernels may round other things (activations, sums in half precision).
OTHER_ENGINE = 10
# Of the room below 1 that the general floor leaves, always granted: where nothing was seen there is no multiple of it.
SLACK = 0.01


@dataclass(frozen=True)
class SeenErrors:
    """`cosines`: case -> stage -> cosine against the reference, as measured on `engine`."""

    engine: str
    edgevl_version: str
    cosines: dict[str, dict[str, float]]

    @classmethod
    def of(cls, bundle: Bundle) -> SeenErrors | None:
        """What the bundle holds, or None where the exporting host did not verify it.

        Raises:
            BundleError: a malformed file.
        """
        if SEEN_FILE not in bundle.files:
            return None
        path = bundle.path(SEEN_FILE)
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            if data.pop("format") != _FORMAT:
                raise ValueError("unknown format")
            cosines = {str(c): {str(s): float(v) for s, v in stages.items()} for c, stages in data["cosines"].items()}
            if not all(-1.001 <= v <= 1.001 for stages in cosines.values() for v in stages.values()):
                raise ValueError("cosines out of range")
            return cls(str(data["engine"]), str(data["edgevl_version"]), cosines)
        except (OSError, KeyError, TypeError, ValueError, AttributeError) as e:
            raise BundleError(f"{path}: malformed ({e}); export the bundle again") from None

    def floor(self, case: str, stage: str, general: float, engine: str) -> float:
        """Least cosine of a stage: three times the error seen (ten times on another engine than saw it), but never
        below the `general` floor."""
        seen = self.cosines.get(case, {}).get(stage)
        if seen is None:
            return general
        factor = FACTOR if engine == self.engine else OTHER_ENGINE
        return max(general, 1 - factor * max(0.0, 1 - seen) - SLACK * (1 - general))


def record_seen(folder: Path, report: VerifyReport) -> None:
    """Keep a report that passed in the bundle `folder`. Killed at any moment it leaves a bundle that opens.

    Raises:
        ValueError: the report did not pass: its errors are no measure.
        BundleError: the bundle cannot be written.
    """
    if not report.passed:
        raise ValueError("only a report that passed is a measure for others")
    bundle = Bundle.open(folder)
    cosines: dict[str, dict[str, float]] = {}
    for r in report.results:
        if r.stage in ("vision", "prefill", "decode"):
            cosines.setdefault(r.case, {})[r.stage] = r.value
    seen = SeenErrors(report.engine, bundle.edgevl_version, cosines)
    path = folder / SEEN_FILE
    try:
        if SEEN_FILE in bundle.files:
            bundle = replace(bundle, files={n: f for n, f in bundle.files.items() if n != SEEN_FILE})
            bundle.write_manifest()
        path.write_text(json.dumps({"format": _FORMAT, **asdict(seen)}, indent=1) + "\n", encoding="utf-8")
        entry = FileEntry(path.stat().st_size, file_sha256(path))
        replace(bundle, files={**bundle.files, SEEN_FILE: entry}).write_manifest()
    except OSError as e:
        raise BundleError(f"{folder}: what was measured cannot be written ({e})") from None
