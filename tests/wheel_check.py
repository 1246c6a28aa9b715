"""Run by `make wheel` in an environment that holds the wheel and its device-side dependencies alone."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import time
from pathlib import Path

INSTALLERS = ("pip", "setuptools", "pkg_resources", "_distutils_hack", "wheel")  # there before the wheel was


def main() -> None:
    for package in ("torch", "transformers", "onnx", "onnx_ir", "safetensors"):
        if importlib.util.find_spec(package) is not None:
            raise SystemExit(f"{package} is installed: this environment proves nothing")
    started = time.perf_counter()
    import edgevl.runtime

    seconds = time.perf_counter() - started
    place = Path(edgevl.runtime.__file__).resolve()
    if "site-packages" not in place.parts:
        raise SystemExit(f"edgevl came from {place}, not from the wheel")
    if not (place.parent / "py.typed").exists():
        raise SystemExit("py.typed is missing from the wheel")
    from edgevl.runtime import VisionLanguageModel

    for module in ("commands", "golden", "grounding", "chat"):
        importlib.import_module(f"edgevl.runtime.{module}")
    command = [str(Path(sys.executable).parent / "edgevl"), "doctor"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    if "ort-cpu" not in done.stdout:
        raise SystemExit(f"doctor says: {done.stdout}")
    for name, arguments in (("export", ["x", "-o", "y"]), ("serve", ["x"])):
        missing = subprocess.run([command[0], name, *arguments], capture_output=True, text=True, check=False)
        if missing.returncode != 2 or f"edgevl[{name}]" not in missing.stderr:
            raise SystemExit(f"{name} without its extra says: {missing.returncode} {missing.stderr}")
    site = place.parents[2]
    files = [f for f in site.rglob("*") if f.is_file() and f.relative_to(site).parts[0] not in INSTALLERS]
    whole = sum(f.stat().st_size for f in files) / 1e6
    size = sum(f.stat().st_size for f in files if f.suffix != ".pyc") / 1e6
    if size > 200:
        raise SystemExit(f"the wheel and its dependencies take {size:.0f} MB, at most 200 are promised")
    name = VisionLanguageModel.__name__
    print(
        f"the wheel imports without torch ({name}, {seconds * 1e3:.0f} ms); with its dependencies {size:.0f} MB, "
        f"{whole:.0f} MB with compiled bytecode"
    )


if __name__ == "__main__":
    main()
