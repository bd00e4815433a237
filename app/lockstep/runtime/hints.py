"""Commands that programs suggest, such that whoever reads them can paste them where they are."""

import os
import shlex
import sys
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
PREFIX = "LOCKSTEP_PREFIX"  # how env/run was typed; env/activate takes it back


def in_environment(command: str) -> str:
    """`command` with `env/run` in front, as the user has typed it; bare for those who have sourced env/activate."""
    prefix = os.environ.get(PREFIX, "")
    return f"{shlex.quote(prefix)} {command}" if prefix else command


def suggest(command: str, *arguments: object) -> str:
    """`lockstep COMMAND ARGUMENT...`, to be pasted."""
    return in_environment(shlex.join(["lockstep", command, *map(str, arguments)]))


def train_program() -> str:
    """`python app/train.py`, by its path from here; `lockstep train` where there is no clone."""
    path = ROOT / "app" / "train.py"
    if not path.is_file():
        return "lockstep train"
    with suppress(OSError):  # the folder that we are in is gone
        return shlex.join(["python", min(os.path.relpath(path), str(path), key=len)])
    return shlex.join(["python", str(path)])


def this_program() -> list[str]:
    """How this program was started, without its arguments: `python app/train.py`, or `lockstep train`."""
    program = sys.argv[0]
    return program.split() if program.startswith("lockstep ") else ["python", program]
