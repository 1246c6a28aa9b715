"""Writes tests/data/tensorrt_api.json: the names of TensorRT's Python bindings, by version.

    pip download --no-deps -d wheels tensorrt-cu12-bindings==10.3.0 ... tensorrt-rtx bindings
    python tests/dump_tensorrt_api.py wheels/*.whl

The bindings are real wheels, TensorRT's libraries are not needed: they are replaced by empty ones, made with `cc`, that
let the bindings be imported. Each version is imported in a process of its own.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

OUT = Path(__file__).parent / "data" / "tensorrt_api.json"
CLASSES = (
    *("Builder", "IBuilderConfig", "INetworkDefinition", "OnnxParser", "ParserError", "IOptimizationProfile"),
    *("ITimingCache", "IProgressMonitor", "IHostMemory", "ILogger", "Logger", "Runtime", "ICudaEngine", "ITensor"),
    *("IExecutionContext", "IRuntimeConfig", "IRuntimeCache", "IGpuAllocator", "IOutputAllocator", "IStreamReaderV2"),
    *("IStreamReader", "IStreamWriter", "Refitter", "OnnxParserRefitter", "ISerializationConfig", "IErrorRecorder"),
    *("BuilderFlag", "MemoryPoolType", "NetworkDefinitionCreationFlag", "ComputeCapability", "DataType"),
    *("TensorIOMode", "TensorLocation", "HardwareCompatibilityLevel", "ProfilingVerbosity", "CudaGraphStrategy"),
    *("EngineInvalidityDiagnostics", "EngineValidity", "EngineStat", "ExecutionContextAllocationStrategy"),
    *("DynamicShapesKernelSpecializationStrategy", "OnnxParserFlag", "PreviewFeature", "LayerInformationFormat"),
)
_DUMP = """
import importlib, json, sys
sys.path.insert(0, sys.argv[1])
trt = importlib.import_module(sys.argv[2])
names = lambda o: sorted(n for n in dir(o) if not n.startswith("_"))
out = {"": names(trt)}
for c in sys.argv[3].split(","):
    if hasattr(trt, c):
        out[c] = names(getattr(trt, c))
print(json.dumps(out))
"""


def stub_libraries(library: Path, folder: Path) -> None:
    """An empty library for each of NVIDIA's that `library` wants, with the functions that it calls by a C name."""
    needed = re.findall(
        r"NEEDED\s+(lib(?:nv|tensorrt)\S+)",
        subprocess.run(["objdump", "-p", library], capture_output=True, text=True, check=True).stdout,
    )
    symbols = subprocess.run(
        ["nm", "-D", "--undefined-only", library], capture_output=True, text=True, check=True
    ).stdout
    plain = re.findall(r" U ((?:create|get|init|set)\w*)$", symbols, re.M)
    source = folder / "stub.c"
    source.write_text("".join(f"void* {name}(void) {{ return 0; }}\n" for name in sorted(set(plain))))
    for name in needed:
        subprocess.run(["cc", "-shared", "-fPIC", f"-Wl,-soname,{name}", "-o", folder / name, source], check=True)


def dump(wheel: Path) -> tuple[str, dict[str, list[str]]]:
    """(version, class -> names) of one wheel; "" is the module."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder)
        package = next(p for p in folder.iterdir() if p.name.endswith("_bindings"))
        libraries = [p for p in package.glob("*.so*") if p.name.startswith("tensorrt")]
        stub_libraries(libraries[0], folder)
        done = subprocess.run(
            [sys.executable, "-c", _DUMP, folder, package.name, ",".join(CLASSES)],
            capture_output=True,
            text=True,
            check=True,
            env={"LD_LIBRARY_PATH": str(folder)},
        )
        version = wheel.name.split("-")[1]
        return ("rtx-" if "rtx" in package.name else "") + version, json.loads(done.stdout)


def main(wheels: list[str]) -> None:
    found = dict(sorted((dump(Path(w)) for w in wheels), key=lambda p: [int(n) for n in re.findall(r"\d+", p[0])]))
    versions = list(found)
    names: dict[str, dict[str, str]] = {}
    for i, classes in enumerate(found.values()):
        for name, members in classes.items():
            for member in members:
                flags = names.setdefault(name, {}).setdefault(member, "0" * len(versions))
                names[name][member] = flags[:i] + "1" + flags[i + 1 :]
    lines = [f'  "{c}": {json.dumps(dict(sorted(m.items())))}' for c, m in sorted(names.items())]
    OUT.write_text(f'{{"versions": {json.dumps(versions)},\n "names": {{\n' + ",\n".join(lines) + "\n}}\n")


if __name__ == "__main__":
    main(sys.argv[1:])
