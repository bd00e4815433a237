"""What others add to a run: drills, benchmarks, tests and users' own programs."""

from functools import partial
from typing import TYPE_CHECKING, Any

from typing_extensions import override

from lockstep.runtime.importing import construct
from lockstep.runtime.user_code import call

if TYPE_CHECKING:
    from lockstep.tasks.task import Evaluation
    from lockstep.training.trainer import Trainer


class TrainerHook:
    """Called by the trainer on every rank, at the same points of the run. Override what you need.

    A hook that raises ends the run like an error of the trainer's own. One that calls a collective must do so on every
    rank.
    """

    def before_update(self, trainer: "Trainer", item: Any) -> None:
        """Before anything of an update is done: `trainer.progress.step` updates lie behind.

        Args:
            item: what the update learns from, on this rank.
        """

    def after_update(self, trainer: "Trainer") -> None:
        """After an update, skipped or not, which `trainer.progress` counts by now; before the replica check."""

    def at_checkpoint(self, trainer: "Trainer") -> None:
        """After a checkpoint was taken; a thread may still be writing it."""

    def at_end(self, trainer: "Trainer", evaluation: "Evaluation") -> None:
        """After the last update and its evaluation, before the model is merged."""


class NamedHook(TrainerHook):
    """A user's own hook, imported by its name; its errors are told as theirs."""

    def __init__(self, name: str) -> None:
        """
        Raises:
            SettingsError: it cannot be imported, or is no `TrainerHook`.
            UserCodeError: it cannot be made.
        """
        self._name = name
        self._hook = call(name, lambda: construct(name, "hooks", TrainerHook))

    @override
    def before_update(self, trainer: "Trainer", item: Any) -> None:
        call(f"{self._name}.before_update", partial(self._hook.before_update, trainer, item))

    @override
    def after_update(self, trainer: "Trainer") -> None:
        call(f"{self._name}.after_update", partial(self._hook.after_update, trainer))

    @override
    def at_checkpoint(self, trainer: "Trainer") -> None:
        call(f"{self._name}.at_checkpoint", partial(self._hook.at_checkpoint, trainer))

    @override
    def at_end(self, trainer: "Trainer", evaluation: "Evaluation") -> None:
        call(f"{self._name}.at_end", partial(self._hook.at_end, trainer, evaluation))
