"""Import a user's own functions, classes and modules by their dotted names."""

import importlib
import reprlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from lockstep.runtime.errors import SettingsError

Object = TypeVar("Object")


def import_object(name: str, setting: str) -> Any:
    """Import the object `name`, such as my_package.my_module.MyNet.

    Args:
        setting: the name of the setting that asks for it, for the message.

    Raises:
        SettingsError: there is no such module or attribute, or importing it fails.
    """
    module, _, attribute = name.rpartition(".")
    found = import_module(module, setting)
    try:
        return getattr(found, attribute)
    except AttributeError:
        hidden = _hidden_by(found)
        raise SettingsError(f"{setting} is {name}: {found} has no {attribute}{hidden}") from None


def _hidden_by(found: ModuleType) -> str:
    """A hint for the message if the installed package `found` hides a module of the working folder; else empty."""
    top = found.__name__.partition(".")[0]
    here = Path.cwd()
    mine = next((path for path in (here / f"{top}.py", here / top) if path.exists()), None)
    if mine is None or here in Path(found.__file__ or here / top).parents:
        return ""
    return f". What is installed comes before the working folder, which has {mine.name} too: rename that"


def _look_in_working_folder() -> str:
    """Put the working folder on `sys.path`, behind installed packages, before the programs of a clone; returns it."""
    here, programs = str(Path.cwd()), str(Path(__file__).parents[2])
    if here not in sys.path:
        in_clone = programs in sys.path and (Path(programs) / "train.py").is_file()
        sys.path.insert(sys.path.index(programs) if in_clone else len(sys.path), here)
    return here


def construct(name: str, setting: str, kind: type[Object], *args: Any, **options: Any) -> Object:
    """Import `name` and call it with the other arguments; the result, which must be a `kind`.

    Raises:
        SettingsError: it cannot be imported, or the result is no `kind`.
    """
    found = import_object(name, setting)(*args, **options)
    if not isinstance(found, kind):
        what = f"{kind.__module__.partition('.')[0]}'s {kind.__name__}"
        raise SettingsError(
            f"{setting} is {name}: it must give {what}, and gave {type(found).__name__} {reprlib.repr(found)}"
        )
    return found


def import_module(name: str, setting: str) -> ModuleType:
    """Import the module `name`, which is installed, on PYTHONPATH or in the working folder.

    Raises:
        SettingsError: there is no such module, or importing it fails.
    """
    here = _look_in_working_folder()
    try:
        return importlib.import_module(name)
    except Exception as error:  # importing a user's module may raise anything
        raise SettingsError(
            f"{setting} needs the module {name}, which cannot be imported ({type(error).__name__}: {error}): it must "
            f"be installed, on PYTHONPATH or in {here}"
        ) from error
