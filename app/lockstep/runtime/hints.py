"""Commands that programs suggest in their messages, such that the user can paste them into the same shell."""

import os
import shlex
import sys
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
PREFIX = "LOCKSTEP_PREFIX"  # how the user has typed env/run; env/activate unsets it


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
