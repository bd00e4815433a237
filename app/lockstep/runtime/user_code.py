"""Errors in a user's own code, told as theirs: what it was, and the last of their own lines."""

import sys
import sysconfig
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from lockstep.runtime.errors import LockstepError, UserCodeError

T = TypeVar("T")

OURS = Path(__file__).parents[1]
NUM_LINES = 3


def call(what: str, function: Callable[[], T]) -> T:
    """Call a user's `function`; an exception becomes a `UserCodeError` that says where in their code it came from.

    Args:
        what: names it in the message, such as my_package.MyTask.loss.
    """
    try:
        return function()
    except LockstepError:
        raise
    except Exception as error:
        raise UserCodeError(f"{what} failed: {where(error)}") from error


def is_theirs(error: Exception) -> bool:
    """Whether an exception comes from a user's own code, or from a library that their code has called."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        path = Path(frame.filename)
        if OURS in path.parents or path.parent == OURS.parent:
            return False
        if _is_a_users(path):
            return True
    return False


def where(error: Exception) -> str:
    """Describe an exception, with the last lines of the user's own files that it has passed."""
    frames = [
        f"\n  {frame.filename}, line {frame.lineno}: {frame.line}"
        for frame in traceback.extract_tb(error.__traceback__)
        if _is_a_users(Path(frame.filename))
    ]
    return f"{type(error).__name__}: {error}{''.join(frames[-NUM_LINES:])}"


def _is_a_users(path: Path) -> bool:
    installed = (OURS, Path(sys.prefix), *(Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib")))
    inside = any(folder in path.parents for folder in installed) or path.parent == OURS.parent
    return not inside and path.exists()
