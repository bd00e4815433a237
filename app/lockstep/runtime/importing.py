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
        hidden = _hidden_by(found)
        raise SettingsError(f"{setting} is {name}: {found} has no {attribute}{hidden}") from None


def _hidden_by(found: ModuleType) -> str:
    """What to say if the installed package `found` hides a module of the working folder; nothing if it does not."""
    top = found.__name__.partition(".")[0]
    here = Path.cwd()
    mine = next((path for path in (here / f"{top}.py", here / top) if path.exists()), None)
    if mine is None or here in Path(found.__file__ or here / top).parents:
        return ""
    return f". What is installed comes before the working folder, which has {mine.name} too: rename that"


def _look_in_working_folder() -> str:
    """Let modules of the working folder be found: after all that is installed, and before the programs of a clone."""
    here, programs = str(Path.cwd()), str(Path(__file__).parents[2])
    if here not in sys.path:
        in_clone = programs in sys.path and (Path(programs) / "train.py").is_file()
        sys.path.insert(sys.path.index(programs) if in_clone else len(sys.path), here)
    return here


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
    here = _look_in_working_folder()
    try:
        return importlib.import_module(name)
    except Exception as error:  # whatever a user's module raises as it is imported
        raise SettingsError(
            f"{setting} needs the module {name}, which cannot be imported ({type(error).__name__}: {error}): it must "
            f"be installed, on PYTHONPATH or in {here}"
        ) from error
