"""A click type for options that name a file to write."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from edgevl.runtime.errors import InputError
from edgevl.runtime.output_file import check_output_file

__all__ = ["OutputFile"]


class OutputFile(click.ParamType):
    """A Path at which a file can be written; refused before anything is measured where it cannot."""

    name = "FILE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        try:
            check_output_file(value)
        except InputError as e:
            self.fail(str(e), param, ctx)
        return Path(value)
