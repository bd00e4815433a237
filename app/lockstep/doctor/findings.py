"""What one check concludes, and how checks word numbers and names."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum


class Status(StrEnum):
    """How serious a finding is. A fault breaks a run or its result; a warning costs time, or may do harm later."""

    OK = "ok"
    WARNING = "warning"
    FAULT = "FAULT"


@dataclass(frozen=True)
class Finding:
    """The result of one check.

    Attributes:
        check: the name of what was checked.
        what: what was found, and on which node.
        fix: what to do about it; empty if nothing is wrong.
        unset: environment variables that the launch line must unset.
        options: options that the launch line needs.
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


# -- wording -----------------------------------------------------------------------------------------------------------

GIB = 1 << 30
MIB = 1 << 20


def some_of(names: Iterable[str]) -> str:
    """`node1`, `node1 and node2`, or `node1 and 30 more`."""
    listed = list(dict.fromkeys(names))
    if len(listed) > 2:
        return f"{listed[0]} and {len(listed) - 1} more"
    return " and ".join(listed)


def count(number: int, thing: str) -> str:
    """`1 rank`, `2 ranks`."""
    return f"{number} {thing}" + ("" if number == 1 else "s")


def size(num_bytes: float) -> str:
    """`1.5 GiB`, `64 MiB`."""
    return f"{num_bytes / GIB:.3g} GiB" if num_bytes >= GIB else f"{num_bytes / MIB:.3g} MiB"


def rate(bits_per_second: float) -> str:
    """`0.93 Gbit/s`."""
    return f"{bits_per_second / 1e9:.3g} Gbit/s"


def duration(seconds: float) -> str:
    """`25 µs`, `3 ms`, `1.2 s`."""
    for unit, factor in (("s", 1.0), ("ms", 1e3)):
        if abs(seconds) * factor >= 1:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds * 1e6:.3g} µs"


def numbers_in(version: str) -> tuple[int, ...]:
    """(5, 0, 11) for `Open MPI v5.0.11`; () if there is no version."""
    found = re.search(r"\d+(?:\.\d+)+", version)
    return tuple(map(int, found[0].split("."))) if found else ()


def nccl_version(code: int) -> str:
    """`2.30.7` for 23007."""
    major, rest = divmod(code, 10_000) if code >= 10_000 else divmod(code, 1_000)
    return f"{major}.{rest // 100}.{rest % 100}"


def median_of_others(values: Sequence[float], index: int) -> float:
    """The median of all `values` but the one at `index`; at least two values."""
    others = sorted([*values[:index], *values[index + 1 :]])
    return others[len(others) // 2]
