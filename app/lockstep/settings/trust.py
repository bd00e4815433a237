"""Trust in settings files: which users could have written a file, and which of its settings name code.

A setting such as `data.name: my_package.my_data` imports that package, which then runs with the rights of the user who
starts the program. Names on the command line and in the environment come from that user. Names in a file come from any
user who could have written it.
"""

import argparse
import os
import re
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lockstep.runtime.errors import SettingsError

ROOT = 0
OVERFLOW = Path("/proc/sys/kernel/overflowuid")
MAX_LINKS = 40  # Linux follows as many
NAMES = ("task", "data.name", "model.name", "env.id", "hooks")
OPTIONS = ("options", "model.options", "env.options")
DOTTED = re.compile(r"[^\W\d]\w*([.:][^\W\d][\w-]*)+")
HELP = "Accept settings files of other users that name code, which then runs with your rights"


@dataclass(frozen=True)
class Source:
    """The content of a settings file, and who could have written it.

    Attributes:
        other_owners: ids of users other than this one and root who own the file or a link on its path.
        writable_folder: a folder on its path where every user may replace what lies in it; None if there is none.
        group_writes: whether its group may write it.
    """

    path: Path
    text: str
    other_owners: frozenset[int] = frozenset()
    writable_folder: Path | None = None
    group_writes: bool = False


def read_source(path: Path) -> Source:
    """Read the file at `path` and determine who could have written it, from the same descriptor: a swap has no effect.

    Raises:
        SettingsError: every user may write the file, or a link on its path belongs to neither a known user nor the
            folder's owner.
        OSError: it cannot be read.
    """
    known = _known_users()
    other_owners, writable_folder = set(), None
    for step, found, folder in _way(path):
        if stat.S_ISLNK(found.st_mode):
            if found.st_uid not in known | {folder.st_uid}:
                raise SettingsError(
                    f"{step} is a link that {_who(found.st_uid)} has put into a folder of {_who(folder.st_uid)}: it is "
                    f"not followed. Remove it, or name the folder itself: {step.resolve()}"
                )
            other_owners |= {found.st_uid} - known
        elif stat.S_ISDIR(found.st_mode) and found.st_mode & stat.S_IWOTH and not found.st_mode & stat.S_ISVTX:
            writable_folder = step
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # does not block on a pipe
    with os.fdopen(descriptor, encoding="utf-8") as file:
        opened = os.fstat(descriptor)
        if not stat.S_ISREG(opened.st_mode):
            raise SettingsError(f"{path} is not a file")
        if opened.st_mode & stat.S_IWOTH:
            raise SettingsError(f"{path} may be written by every user. Read it, then: chmod o-w {path}")
        other_owners |= {opened.st_uid} - known
        return Source(path, file.read(), frozenset(other_owners), writable_folder, bool(opened.st_mode & stat.S_IWGRP))


def names_of_code(settings: Mapping[str, Any]) -> dict[str, list[str]]:
    """Collect, for each setting that has some, the names that can cause an import.

    Of options, every text that looks like a name in a package counts: highway-env, for example, imports such names.

    Args:
        settings: values by their full names, such as `data.name`.
    """
    names = {name: [value] for name in NAMES if set(".:") & set(value := str(settings.get(name) or ""))}
    options = {name: [text for text in _texts(settings.get(name)) if DOTTED.fullmatch(text)] for name in OPTIONS}
    return names | {name: texts for name, texts in options.items() if texts}


def check_trust(source: Source, names: Mapping[str, list[str]], trust: bool) -> str | None:
    """Refuse names of code from a file that other users could have written; call it before anything is imported.

    Args:
        names: the names of code that `source` gives.
        trust: whether the user has typed `--trust true`.

    Returns:
        A warning for the user, or None.

    Raises:
        SettingsError: other users could have written `names`.
    """
    if not names:
        return None
    what = "; ".join(f"{setting}: {', '.join(each)}" for setting, each in names.items())
    if source.writable_folder:
        raise SettingsError(
            f"{source.path} names code ({what}), and every user may replace that file: nothing was imported. "
            f"Forbid it: chmod o-w {source.writable_folder}"
        )
    if source.other_owners and not trust:
        raise SettingsError(
            f"{source.path} comes from {', '.join(_who(uid) for uid in sorted(source.other_owners))}, and names code "
            f"({what}), which would run as {_who(os.geteuid())}: nothing was imported. If you trust them with "
            "everything you own: --trust true"
        )
    return f"{source.path} names code ({what}), and its group may write it: chmod g-w" if source.group_writes else None


def add_trust(parser: argparse.ArgumentParser) -> None:
    """Add `--trust true` to the arguments of a program that reads the settings of a run."""
    parser.add_argument("--trust", choices=("true", "false"), default="false", help=HELP)


def _known_users() -> frozenset[int]:
    """Return this user and root, without the overflow id: files of unknown owners show it, and may be anyone's."""
    try:
        unknown = int(OVERFLOW.read_text())
    except (OSError, ValueError):
        unknown = 65534
    return frozenset({os.geteuid(), ROOT}) - {unknown}


def _way(path: Path) -> Iterator[tuple[Path, os.stat_result, os.stat_result]]:
    """Yield every component of `path`, through all links: the component, its status, and that of its folder."""
    rest = [*reversed(path.absolute().parts[1:])]
    here, folder, links = Path("/"), os.lstat("/"), 0
    yield here, folder, folder
    while rest:
        name = rest.pop()
        if name == "..":
            here, folder = here.parent, os.lstat(here.parent)
            continue
        step = here / name
        found = os.lstat(step)
        yield step, found, folder
        if not stat.S_ISLNK(found.st_mode):
            here, folder = step, found
            continue
        links += 1
        if links > MAX_LINKS:
            raise OSError(f"{path}: too many links")
        target = step.readlink()
        rest += reversed(target.parts[1:] if target.is_absolute() else target.parts)
        if target.is_absolute():
            here, folder = Path("/"), os.lstat("/")


def _texts(value: Any) -> Iterator[str]:
    """Yield every string in `value`, at any depth."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | argparse.Namespace):
        for key, each in (value if isinstance(value, Mapping) else vars(value)).items():
            yield from _texts(key)
            yield from _texts(each)
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _texts(each)


def _who(uid: int) -> str:
    import pwd

    try:
        return f"{pwd.getpwuid(uid).pw_name} (uid {uid})"
    except KeyError:
        return f"uid {uid}"
