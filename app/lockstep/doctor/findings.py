"""What one check concludes, for people."""

from dataclasses import dataclass
from enum import StrEnum


class Status(StrEnum):
    """How bad it is. A fault spoils a run, or its result; a warning costs time, or may do harm later."""

    OK = "ok"
    WARNING = "warning"
    FAULT = "FAULT"


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        check: what was looked at, in a word or two.
        what: what was seen, and where.
        fix: what to do; empty if all is well.
        unset: variables that must not be set in the launch line.
        options: what the launch line needs beside.
    """

    check: str
    status: Status
    what: str
    fix: str = ""
    unset: tuple[str, ...] = ()
    options: tuple[str, ...] = ()


def ok(check: str, what: str) -> Finding:
    return Finding(check, Status.OK, what)


def warning(check: str, what: str, fix: str, unset: tuple[str, ...] = (), options: tuple[str, ...] = ()) -> Finding:
    return Finding(check, Status.WARNING, what, fix, unset, options)


def fault(check: str, what: str, fix: str, unset: tuple[str, ...] = (), options: tuple[str, ...] = ()) -> Finding:
    return Finding(check, Status.FAULT, what, fix, unset, options)
