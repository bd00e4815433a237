"""Lockstep: trains deep-learning agents synchronously over every rank of an MPI job, and proves that it did so.

The public names are imported when they are first used: `import lockstep` alone loads neither torch nor MPI, whose
import makes a process a rank of the job.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lockstep.api import FinishedRun as FinishedRun
    from lockstep.api import evaluate as evaluate
    from lockstep.api import load_model as load_model
    from lockstep.api import read_settings as read_settings
    from lockstep.api import train as train
    from lockstep.comm.cluster import Cluster as Cluster
    from lockstep.runtime.errors import LockstepError as LockstepError
    from lockstep.settings import Settings as Settings
    from lockstep.tasks.supervised import SupervisedTask as SupervisedTask
    from lockstep.tasks.task import Task as Task
    from lockstep.training.hooks import TrainerHook as TrainerHook

__version__ = "0.1.0"

_MODULES = {
    "Cluster": "comm.cluster",
    "FinishedRun": "api",
    "LockstepError": "runtime.errors",
    "Settings": "settings",
    "SupervisedTask": "tasks.supervised",
    "Task": "tasks.task",
    "TrainerHook": "training.hooks",
    "evaluate": "api",
    "load_model": "api",
    "read_settings": "api",
    "train": "api",
}
__all__ = [*sorted(_MODULES)]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'lockstep' has no attribute {name!r}")
    return getattr(import_module(f"lockstep.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
