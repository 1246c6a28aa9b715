"""Instructions that a program executes between marks, counted by valgrind.

Seconds of a small model on a shared machine move by more than the changes that one looks for; instructions hardly move
at all. Callgrind writes what it counted since the last time whenever the program enters the C function `MARK`, so that
one run gives the counts of all its stages. Valgrind knows no AVX-512 and no AMX: libraries take their AVX2 kernels in
it, on every x86-64 processor the same ones. Counts tell whether the same work became more, not which kernel is faster.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

__all__ = ["MARK", "count_instructions", "mark"]

# A function of the C library that Python calls directly, and that nobody calls by accident.
MARK = "getloadavg"
_TOTALS = re.compile(r"^totals: (\d+)$", re.MULTILINE)


def mark() -> None:
    """End one count and begin the next, in the program that is counted."""
    os.getloadavg()


def count_instructions(command: Sequence[str]) -> tuple[list[int], str]:
    """Run a program in valgrind: the instructions up to every `mark()` of its own, and what it printed.

    Hashes are not randomised, so that dictionaries take the same steps every time. Children are not counted.

    Raises:
        FileNotFoundError: no valgrind here.
        RuntimeError: the program failed; its last lines.
    """
    if shutil.which("valgrind") is None:
        raise FileNotFoundError("valgrind is not here; install it (apt install valgrind)")
    with tempfile.TemporaryDirectory() as folder:
        counts = Path(folder) / "counts"
        valgrind = [
            "valgrind",
            "--quiet",
            "--tool=callgrind",
            f"--callgrind-out-file={counts}",
            f"--dump-before={MARK}",
        ]
        environment = {**os.environ, "PYTHONHASHSEED": "0"}
        done = subprocess.run([*valgrind, *command], env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            last = " | ".join(done.stderr.strip().splitlines()[-3:])
            raise RuntimeError(f"{' '.join(command[:4])} … ended with status {done.returncode} in valgrind: {last}")
        dumps = sorted(Path(folder).glob("counts.*"), key=lambda p: int(p.suffix[1:]))
        return [_total(p) for p in dumps], done.stdout


def _total(dump: Path) -> int:
    found = _TOTALS.search(dump.read_text(encoding="utf-8", errors="replace"))
    if found is None:
        raise RuntimeError(f"{dump.name} of callgrind has no totals")
    return int(found[1])
