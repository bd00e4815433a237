"""What the command lines of all programs have in common: how arguments are parsed and tables are printed."""

from argparse import ArgumentParser, RawDescriptionHelpFormatter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console


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
