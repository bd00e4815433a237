"""What a user's own package brings in by its name."""

import importlib
import reprlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from lockstep.runtime.errors import SettingsError

Made = TypeVar("Made")


def find(name: str, setting: str) -> Any:
    """What `name` (such as my_package.my_module.MyNet) stands for.

    Args:
        setting: that asks for it, for the message.

    Raises:
        SettingsError: there is no such module, or nothing of that name in it; or it fails as it is imported.
    """
    module, _, attribute = name.rpartition(".")
    found = import_module(module, setting)
    try:
        return getattr(found, attribute)
    except AttributeError:
        raise SettingsError(f"{setting} is {name}: {found} has no {attribute}") from None


def made(name: str, setting: str, kind: type[Made], *args: Any, **options: Any) -> Made:
    """What `name`, called with the rest, gives: a `kind`.

    Raises:
        SettingsError: there is no such thing, or it gives something else.
    """
    found = find(name, setting)(*args, **options)
    if not isinstance(found, kind):
        what = f"{kind.__module__.partition('.')[0]}'s {kind.__name__}"
        raise SettingsError(
            f"{setting} is {name}: it must give {what}, and gave {type(found).__name__} {reprlib.repr(found)}"
        )
    return found


def import_module(name: str, setting: str) -> ModuleType:
    """The module `name`, which is installed, on PYTHONPATH or in the working folder.

    Raises:
        SettingsError: there is none, or it fails as it is imported.
    """
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)  # behind all else, so that nothing of ours is hidden
    try:
        return importlib.import_module(name)
    except Exception as error:  # whatever a user's module raises as it is imported
        raise SettingsError(
            f"{setting} needs the module {name}, which cannot be imported ({type(error).__name__}: {error}): it must "
            f"be installed, on PYTHONPATH or in {here}"
        ) from error
