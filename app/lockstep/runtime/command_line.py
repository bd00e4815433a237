"""What the command lines of all programs have in common: how arguments are parsed, tables are printed, and commands are
suggested, such that the user can paste them into the same shell.
"""

import os
import shlex
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

ROOT = Path(__file__).resolve().parents[3]
PREFIX = "LOCKSTEP_PREFIX"  # how the user has typed env/run; env/activate unsets it


def command_parser(command: str, description: str | None, allow_abbrev: bool = True) -> ArgumentParser:
    """A parser for `lockstep COMMAND`, whose help shows `description`, usually the module's docstring, as written."""
    return ArgumentParser(
        prog=f"lockstep {command}",
        description=description,
        formatter_class=RawDescriptionHelpFormatter,
        allow_abbrev=allow_abbrev,
    )


def plain_console(width: int | None = None) -> "Console":
    """A console without colours: a launcher's pipe may look like a terminal even if it ends in a file.

    Args:
        width: in columns; None: that of the terminal, or 80.
    """
    from rich.console import Console  # takes a moment to import, and the doctor prints no tables

    return Console(color_system=None, width=width)


def in_environment(command: str) -> str:
    """`command` after the `env/run` that the user has typed, if this environment is not activated."""
    prefix = os.environ.get(PREFIX, "")
    return f"{shlex.quote(prefix)} {command}" if prefix else command


def suggest(command: str, *arguments: object) -> str:
    """`lockstep COMMAND ARGUMENT...`, quoted for the shell."""
    return in_environment(shlex.join(["lockstep", command, *map(str, arguments)]))


def train_program() -> str:
    """`python app/train.py`, by its path from the working folder; `lockstep train` without a clone."""
    path = ROOT / "app" / "train.py"
    if not path.is_file():
        return "lockstep train"
    with suppress(OSError):  # the working folder was deleted
        return shlex.join(["python", min(os.path.relpath(path), str(path), key=len)])
    return shlex.join(["python", str(path)])


def this_program() -> list[str]:
    """How this program was started, without its arguments: `python app/train.py`, or `lockstep train`."""
    program = sys.argv[0]
    return program.split() if program.startswith("lockstep ") else ["python", program]
