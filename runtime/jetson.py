"""What a Jetson says of itself: release, model, power mode. Nothing elsewhere."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

__all__ = ["jetson_facts", "parse_power_mode", "parse_release"]

RELEASE = Path("/etc/nv_tegra_release")
MODEL = Path("/proc/device-tree/model")
_JETPACK = {32: 4, 34: 5, 35: 5, 36: 6, 38: 7}  # major release of Jetson Linux -> JetPack


def jetson_facts() -> dict[str, str]:
    """{"jetson": …, "power mode": …} on a Jetson, {} elsewhere."""
    try:
        release = parse_release(RELEASE.read_text(errors="replace"))
    except OSError:
        return {}
    model = MODEL.read_text(errors="replace").strip("\0 \n") if MODEL.exists() else ""
    facts = {"jetson": ", ".join(p for p in (model, release) if p)}
    mode = _power_mode()
    if mode is not None:
        facts["power mode"] = mode
    return facts


def parse_release(text: str) -> str:
    """`# R36 (release), REVISION: 4.3, GCID: …` -> `Jetson Linux 36.4.3 (JetPack 6)`."""
    found = re.search(r"R(\d+).*?REVISION:\s*([\d.]+)", text)
    if found is None:
        return "Jetson Linux of unknown release"
    jetpack = _JETPACK.get(int(found[1]))
    return f"Jetson Linux {found[1]}.{found[2]}" + (f" (JetPack {jetpack})" if jetpack else "")


def parse_power_mode(text: str) -> str | None:
    """What `nvpmodel -q` prints -> the mode's name, such as `15W` or `MAXN_SUPER`; None where there is none."""
    found = re.search(r"Power Mode:\s*(\S+)", text)
    return found[1] if found else None


def _power_mode() -> str | None:
    try:
        done = subprocess.run(["nvpmodel", "-q"], capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return parse_power_mode(done.stdout)
