"""Files that commands write where a user says: looked at before the work begins, there whole or not at all after it."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from edgevl.runtime.errors import InputError

__all__ = ["check_output_file", "match_umask", "replacing", "whole", "write_output"]


def check_output_file(path: str | Path, what: str = "the file") -> None:
    """Whether a file can be written at `path`: asked before a measurement, an answer or hours of work. A file that is
    there will be replaced.

    Args:
        what: it will be, for the message: "an HTML file".

    Raises:
        InputError: no name, a folder, a device, no such parent folder, or nothing may be written in it.
    """
    if not str(path):
        raise InputError(f"the name of an output is empty; expected the name of {what}")
    path = Path(path)
    if path.is_dir():
        raise InputError(f"{path}: a folder, expected the name of {what}; choose a name inside it")
    if path.exists() and not path.is_file():  # renaming over it would put a file in the place of /dev/null
        raise InputError(f"{path}: a device or pipe, expected the name of {what}; choose another name")
    folder = path.absolute().parent
    if not folder.is_dir():
        raise InputError(f"{path.parent}: no such folder; create it, or choose another output")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise InputError(f"{path}: nothing may be written in this folder; change its mode, or choose another output")
    try:
        with suppress(FileNotFoundError):
            _partial(path).lstat()
    except OSError as e:  # a name that is too long
        raise InputError(f"{path}: cannot be written ({e.strerror}); choose another name") from None


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A temporary name beside `path`, renamed to it when the block completes; on any failure nothing is left of it."""
    partial = _partial(path)
    try:
        yield partial
        partial.replace(path)
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """The same for a file that a user has named.

    Raises:
        InputError: the file cannot be written.
    """
    try:
        with whole(Path(path)) as partial:
            yield partial
    except OSError as e:
        advice = "free some space" if e.errno in (errno.ENOSPC, errno.EDQUOT) else "choose another output"
        raise InputError(f"{path}: cannot be written ({e.strerror or e}); {advice}") from None


def write_output(path: str | Path, text: str) -> None:
    """Write `text` in UTF-8 as `replacing` does.

    Raises:
        InputError: the file cannot be written.
    """
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def match_umask(path: Path) -> None:
    """Give a file the mode that every new file gets: libraries which rename a temporary one of their own leave 0600."""
    probe = path.with_name(f".{path.name}.mode")
    try:
        probe.touch()
        path.chmod(stat.S_IMODE(probe.stat().st_mode))
    finally:
        probe.unlink(missing_ok=True)


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial")
