"""Whose word a settings file is: who could have written what it says, and what in it names code.

A name such as `data.name: my_package.my_data` runs that package with the rights of whoever starts the program. A name
that is typed, or stands in the user's own environment, is the user's. One that is read from a file is the word of
everybody who could have written it.
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
MAX_LINKS = 40  # as many as Linux follows
NAMES = ("data.name", "model.name", "env.id")
OPTIONS = ("model.options", "env.options")
DOTTED = re.compile(r"[^\W\d]\w*([.:][^\W\d][\w-]*)+")
HELP = "believe settings of another user's that name code: it runs as you"


@dataclass(frozen=True)
class Source:
    """A settings file as it was read.

    Attributes:
        strangers: the users, beside this one and root, whose word it is.
        open_folder: a folder on the way to it in which everybody may put another file in its place.
        group_writes: its group may write it.
    """

    path: Path
    text: str
    strangers: frozenset[int] = frozenset()
    open_folder: Path | None = None
    group_writes: bool = False


def read_source(path: Path) -> Source:
    """Read the file at `path`; what is told of it is true of the very file that was read, whatever happens to the name.

    Raises:
        SettingsError: it is nobody's word: everybody may write it, or a link on the way to it was planted.
        OSError: it cannot be read.
    """
    known = _known_users()
    strangers, open_folder = set(), None
    for step, found, folder in _way(path):
        if stat.S_ISLNK(found.st_mode):
            if found.st_uid not in known | {folder.st_uid}:
                raise SettingsError(
                    f"{step} is a link that {_who(found.st_uid)} has put into a folder of {_who(folder.st_uid)}: it is "
                    f"not followed. Remove it, or name the folder itself: {step.resolve()}"
                )
            strangers |= {found.st_uid} - known
        elif stat.S_ISDIR(found.st_mode) and found.st_mode & stat.S_IWOTH and not found.st_mode & stat.S_ISVTX:
            open_folder = step
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # a pipe in its place keeps nobody waiting
    with os.fdopen(descriptor, encoding="utf-8") as file:
        opened = os.fstat(descriptor)
        if not stat.S_ISREG(opened.st_mode):
            raise SettingsError(f"{path} is no file")
        if opened.st_mode & stat.S_IWOTH:
            raise SettingsError(f"{path} is nobody's word, for everybody may write it. Read it, then: chmod o-w {path}")
        strangers |= {opened.st_uid} - known
        return Source(path, file.read(), frozenset(strangers), open_folder, bool(opened.st_mode & stat.S_IWGRP))


def names_of_code(settings: Mapping[str, Any]) -> dict[str, list[str]]:
    """What in `settings`, by their full names, can make something be imported, by the setting.

    Options count with whatever reads as a name in a package: highway-env, for one, imports those.
    """
    names = {name: [value] for name in NAMES if set(".:") & set(value := str(settings.get(name) or ""))}
    options = {name: [text for text in _texts(settings.get(name)) if DOTTED.fullmatch(text)] for name in OPTIONS}
    return names | {name: texts for name, texts in options.items() if texts}


def check_trust(source: Source, names: Mapping[str, list[str]], trust: bool) -> str | None:
    """A warning, if there is something to warn of. Nothing of `names` has been imported yet.

    Args:
        names: of code, that `source` gives.
        trust: the user has typed `--trust true`.

    Raises:
        SettingsError: `names` are not the user's word.
    """
    if not names:
        return None
    what = "; ".join(f"{setting}: {', '.join(each)}" for setting, each in names.items())
    if source.open_folder:
        raise SettingsError(
            f"{source.path} names code ({what}), and everybody may put another file in its place: nothing was imported."
            f" Take that right away: chmod o-w {source.open_folder}"
        )
    if source.strangers and not trust:
        raise SettingsError(
            f"{source.path} is the word of {', '.join(_who(uid) for uid in sorted(source.strangers))}, and names code "
            f"({what}), which would run as {_who(os.geteuid())}: nothing was imported. If you trust them with all that "
            "is yours: --trust true"
        )
    return f"{source.path} names code ({what}), and its group may write it: chmod g-w" if source.group_writes else None


def add_trust(parser: argparse.ArgumentParser) -> None:
    """`--trust true` for a program that reads the settings of a run."""
    parser.add_argument("--trust", choices=("true", "false"), default="false", help=HELP)


def _known_users() -> frozenset[int]:
    """This user and root; but not who owns what has no known owner: that may be anybody's."""
    try:
        unknown = int(OVERFLOW.read_text())
    except (OSError, ValueError):
        unknown = 65534
    return frozenset({os.geteuid(), ROOT}) - {unknown}


def _way(path: Path) -> Iterator[tuple[Path, os.stat_result, os.stat_result]]:
    """Each step of the way to `path`, links and where they lead included: it, what it is, and the folder it is in."""
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
    """Every text within `value`."""
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
