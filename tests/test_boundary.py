"""The directions of the house: who may import whom, and what the device side must never need."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ALLOWED = {  # folder -> edgevl packages that it may import
    "runtime": {"runtime"},
    "calibration": {"runtime", "calibration", "tasks"},
    "export": {"runtime", "export"},
    "benchmarks": {"runtime", "benchmarks", "tasks"},
    "demo/tasks": {"runtime", "tasks"},
}
DOORS = {  # number formats (numpy only), which export needs to round plain weights and to read packed ones
    ("export", "edgevl.calibration.formats"),
    ("export", "edgevl.calibration.packing"),
    ("export", "edgevl.calibration.quantized"),
}
DEVICE = {
    "numpy",
    "PIL",
    "tokenizers",
    "jinja2",
    "onnxruntime",
    "click",
    "tqdm",
    "tabulate",
    "tensorrt",
    "av",
    "llguidance",
}
HUB = "huggingface_hub"  # only runtime/checkpoint.py, only when a hub id is asked for
HTTP = {"serve_app.py": {"starlette"}, "serve_command.py": {"uvicorn"}}  # imported by `edgevl serve` alone
FRAMEWORKS = {"torch", "transformers", "onnx", "onnx_ir", "safetensors"}


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.add(node.module or "")
    return found


def sources(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize("folder", ALLOWED)
def test_packages_import_along_the_arrows(folder: str) -> None:
    assert sources(folder)
    for path in sources(folder):
        for name in imports(path):
            if name.startswith("edgevl."):
                assert name.split(".")[1] in ALLOWED[folder] or (folder, name) in DOORS, f"{path} imports {name}"


def test_the_device_side_needs_only_its_libraries() -> None:
    standard = set(sys.stdlib_module_names) | {"edgevl"}
    for path in sources("runtime"):
        outside = {name.split(".")[0] for name in imports(path)} - standard
        allowed = DEVICE | {HUB} if path.name == "checkpoint.py" else DEVICE | HTTP.get(path.name, set())
        assert outside <= allowed, f"{path} imports {outside - allowed}"


def test_export_needs_no_framework_but_to_verify() -> None:
    for path in sources("export"):
        if path.name != "verify.py":
            assert not {n.split(".")[0] for n in imports(path)} & {"torch", "transformers", "onnx"}, path


def test_the_lint_has_the_same_rule() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    for package in ("torch", "transformers", "onnx"):
        assert f'"{package}".msg' in text


def test_importing_the_runtime_loads_nothing_heavy() -> None:
    heavy = sorted(FRAMEWORKS | {"onnxruntime", "numpy"})
    code = f"import sys, edgevl.runtime, edgevl.runtime.cli; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_only_the_server_imports_http() -> None:
    for path in sources("runtime"):
        if path.name not in HTTP:
            assert not imports(path) & {"edgevl.runtime.serve_app", "edgevl.runtime.serve_command"}, path


def test_running_needs_no_framework(tmp_path: Path) -> None:
    """A whole request with every framework unimportable."""
    blocked = "; ".join(f"sys.modules['{m}'] = None" for m in sorted(FRAMEWORKS))
    code = (
        f"import sys; {blocked}; from edgevl.runtime import VisionLanguageModel, Bundle; import edgevl.runtime.commands"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
