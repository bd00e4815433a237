"""What others add to a run: drills, benchmarks, tests and users' own programs."""

from typing import TYPE_CHECKING, Any

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
