"""What a user's own package brings in by its name."""

import importlib
import sys
from pathlib import Path
from typing import Any

from app.cluster.failure import SettingsError


def find(name: str, setting: str) -> Any:
    """What `name` (such as my_package.my_module.MyNet) stands for; packages in the working folder are found, too.

    Args:
        setting: that asks for it, for the message.

    Raises:
        SettingsError: there is no such module, or nothing of that name in it; or it fails as it is imported.
    """
    module, _, attribute = name.rpartition(".")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)  # behind all else, so that nothing of ours is hidden
    try:
        return getattr(importlib.import_module(module), attribute)
    except Exception as error:  # whatever a user's module raises as it is imported
        raise SettingsError(
            f"{setting} is {name}, and cannot be imported ({type(error).__name__}: {error}): it must be a name in a "
            f"module, such as my_package.MyNet, that lies in {here}, on PYTHONPATH or is installed"
        ) from error
