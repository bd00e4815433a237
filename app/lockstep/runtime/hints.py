"""Commands that programs suggest, such that whoever reads them can paste them where they are."""

import os
import shlex
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PREFIX = "LOCKSTEP_PREFIX"  # how env/run was typed; env/activate takes it back


def in_environment(command: str) -> str:
    """`command` with `env/run` in front, as the user has typed it; bare for those who have sourced env/activate."""
    prefix = os.environ.get(PREFIX, "")
    return f"{shlex.quote(prefix)} {command}" if prefix else command


def program(name: str, *arguments: object) -> str:
    """`lockstep report ARGUMENT...`, by the program's path from here."""
    path = str(ROOT / name)
    with suppress(OSError):  # the folder that we are in is gone
        path = min(os.path.relpath(path), path, key=len)
    return shlex.join(["python", path, *map(str, arguments)])


def suggest(name: str, *arguments: object) -> str:
    """One of our programs, to be pasted."""
    return in_environment(program(name, *arguments))
