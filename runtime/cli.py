"""The `edgevl` command: what a user types. Subcommands import what they need only when they run.

Status: 0 done; 1 a check did not hold; 2 the input was wrong (one line on stderr); 130 interrupted. stdout carries
results only, progress and notes go to stderr. `EDGEVL_DEBUG=1` shows tracebacks.
"""

from __future__ import annotations

import errno
import importlib
import os
import sys
from contextlib import suppress
from typing import Any

import click

from edgevl.runtime.errors import EdgeVLError

__all__ = ["forgive_encodings", "main"]

# What the machine refuses whatever program asks; other errors of the system are questions that we should not have put.
_MACHINE = frozenset(
    getattr(errno, name)
    for name in ("ENOSPC", "EDQUOT", "EFBIG", "EIO", "EROFS", "EMFILE", "ENFILE", "ENOMEM", "EACCES", "EPERM")
    if hasattr(errno, name)
)

# command -> (module, help line, extra that brings what it needs); the module is imported when the command is asked for
_COMMANDS = {
    "export": ("edgevl.export.commands", "A checkpoint folder (or hub id) becomes a bundle.", "export"),
    "build": ("edgevl.export.build_command", "TensorRT plans of a bundle, for this machine or named GPUs.", "export"),
    "quantize": ("edgevl.calibration.commands", "A checkpoint becomes a quantized checkpoint.", "host"),
    "fidelity": ("edgevl.calibration.fidelity_command", "What quantization did to a model, with plots.", "host"),
    "run": ("edgevl.runtime.commands", "Answer one prompt about pictures.", "ort"),
    "chat": ("edgevl.runtime.chat_command", "A conversation at the terminal.", "ort"),
    "watch": ("edgevl.runtime.watch_command", "Answer about a camera, stream or folder again and again.", "ort"),
    "serve": ("edgevl.runtime.serve_command", "Serve a bundle over HTTP as OpenAI's API does.", "serve"),
    "verify": ("edgevl.runtime.commands", "Replay a bundle's golden vectors, stage by stage.", "ort"),
    "inspect": ("edgevl.runtime.inspect_command", "What a bundle or a checkpoint holds.", "ort"),
    "bench": ("edgevl.benchmarks.commands", "Measure bundles: stages, percentiles, memory, energy.", "bench"),
    "doctor": ("edgevl.runtime.commands", "Which engines are usable here, and why the others are not.", "ort"),
}


class _LazyGroup(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        try:
            module = importlib.import_module(_COMMANDS[cmd_name][0])
        except ModuleNotFoundError as e:
            if e.name is not None and e.name.startswith("edgevl"):
                raise
            raise EdgeVLError(
                f"`edgevl {cmd_name}` needs the package {e.name!r}, not installed here; "
                f"pip install 'edgevl[{_COMMANDS[cmd_name][2]}]'"
            ) from None
        return getattr(module, cmd_name)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text, _) in _COMMANDS.items()])


@click.group(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="edgevl", prog_name="edgevl")
def edgevl() -> None:
    """Export, verify and run Qwen2-VL on edge devices, without torch on the device.

    \b
    Example:
      edgevl export Qwen2-VL-2B-Instruct -o bundle
      edgevl run bundle "What is the total?" --image receipt.jpg
    """


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and leave the process with its status."""
    forgive_encodings()
    sys.exit(run(sys.argv[1:] if arguments is None else arguments))


def run(arguments: list[str]) -> int:
    """Run one command; returns the exit status, and prints errors as one line on stderr."""
    try:
        outcome: Any = edgevl.main(arguments, prog_name="edgevl", standalone_mode=False)
        return outcome if isinstance(outcome, int) else 0
    except EdgeVLError as e:
        _debug()
        _error(str(e))
        return e.exit_status
    except click.exceptions.NoArgsIsHelpError as e:
        click.echo(e.format_message(), err=True)
        return 2
    except click.ClickException as e:
        _debug()
        _error(
            f"{e.format_message()} See `{e.ctx.command_path if e.ctx else 'edgevl'} --help`."
            if isinstance(e, click.UsageError)
            else e.format_message()
        )
        return 2
    except (KeyboardInterrupt, click.Abort):
        _debug()
        click.echo(err=True)
        return 130
    except BrokenPipeError:  # the reader of our stdout went away: `edgevl run … | head`
        _leave_stdout()
        return 0
    except MemoryError as e:
        _debug()
        _error(f"out of memory ({e or 'nothing left'}); free some, or ask for less: smaller pictures, --capacity")
        return 2
    except Exception as e:
        _debug()
        if isinstance(e, OSError) and e.errno in _MACHINE:
            _error(_refused(e))
            return 2
        _error(f"unexpected {type(e).__name__}: {e} (a bug in edgevl; EDGEVL_DEBUG=1 shows where)")
        return 1


def forgive_encodings() -> None:
    """Let a stdout whose encoding lacks a character (× in a table) show it escaped, where Python would raise. Tables
    and answers are for people; JSON in UTF-8 has no such characters."""
    with suppress(AttributeError, ValueError):  # not a text stream of Python's, or closed
        if sys.stdout.errors == "strict":
            sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]


def _refused(error: OSError) -> str:
    """What the machine refused, in words."""
    try:
        sys.stdout.flush()
    except OSError:
        _leave_stdout()
    # A write that fails names no file: standard output (`> /dev/full`), or a file that is open already.
    where = "standard output or an open file" if error.filename is None else error.filename
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    advice = "free some space, or write elsewhere" if full else "the machine refused it: mend that, and run again"
    return f"{where}: {error.strerror}; {advice}"


def _leave_stdout() -> None:
    """Nothing more goes there: what is still in its buffer would fail again when the process ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _error(message: str) -> None:
    with suppress(OSError):  # a stderr that takes nothing either
        click.echo(f"edgevl: error: {' '.join(message.split())}", err=True)


def _debug() -> None:
    if os.environ.get("EDGEVL_DEBUG") == "1":
        raise  # noqa: PLE0704 -- called from an except clause only
