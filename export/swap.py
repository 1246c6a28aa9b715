"""A complete folder takes the place of another, so that no moment has half of one at that name."""

from __future__ import annotations

import shutil
from pathlib import Path

__all__ = ["swap"]


def swap(partial: Path, target: Path) -> None:
    """Rename the folder `partial` to `target`. What is at `target` is moved aside before and removed afterwards; it is
    put back where the renaming fails or is interrupted.

    Args:
        target: no symbolic link, which would be moved in place of the folder.

    Raises:
        OSError: a rename that failed; nothing has changed. What of the old folder cannot be removed stays beside it.
    """
    old = target.with_name(f".{target.name}.old")
    _remove(old)
    if not target.exists():
        partial.rename(target)
        return
    try:
        target.rename(old)
        partial.rename(target)
    except BaseException:  # Ctrl-C too
        if not target.exists():
            old.rename(target)
        raise
    finally:
        if target.exists():
            _remove(old)


def _remove(folder: Path) -> None:
    if folder.is_symlink():
        folder.unlink(missing_ok=True)
    else:
        shutil.rmtree(folder, ignore_errors=True)
