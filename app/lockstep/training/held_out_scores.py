"""The held-out scores that a run is judged by: for early stopping, and for the choice of its best checkpoints.

They are equal on all ranks and part of every checkpoint, so that all ranks, and a resumed run, decide alike.
"""

import math
from collections.abc import Mapping
from typing import Any

from lockstep.settings.run import Criterion


class HeldOutScores:
    """One score after each evaluation of a run so far.

    Attributes:
        criterion: which score, and which are better.
    """

    def __init__(self, criterion: Criterion) -> None:
        self.criterion = criterion
        self._scores: dict[int, float] = {}

    @staticmethod
    def of(criterion: Criterion | None) -> "HeldOutScores | None":
        return HeldOutScores(criterion) if criterion else None

    def add(self, step: int, scores: Mapping[str, float]) -> None:
        """Add what was measured after `step` updates; a resumed run repeats the evaluation after its checkpoint.

        Raises:
            SettingsError: on every rank: the score is not among `scores`.
        """
        self.criterion.check_known(scores)
        self._scores[step] = scores[self.criterion.metric]

    def ranking(self) -> list[int]:
        """List the updates after which the score was a number, the best first; of equal ones, the earliest."""
        sign = 1 if self.criterion.mode == "min" else -1
        return sorted(
            (step for step, score in self._scores.items() if not math.isnan(score)),
            key=lambda step: (sign * self._scores[step], step),
        )

    @property
    def best(self) -> list[int]:
        """The first ones of the ranking, as many as the criterion says."""
        return self.ranking()[: self.criterion.number]

    def score(self, step: int) -> float:
        return self._scores[step]

    def why_to_stop(self) -> str | None:
        """Say so if as many evaluations as the criterion says have brought nothing better; otherwise None."""
        ranking, metric, patience = self.ranking(), self.criterion.metric, self.criterion.number
        best = ranking[0] if ranking else 0
        if sum(step > best for step in self._scores) < patience:
            return None
        after = f"than {self._scores[best]:.4g} after update {best}" if ranking else "than NaN"
        return f"no better {metric} in {patience} evaluations {after}"

    def as_saved(self) -> dict[str, Any]:
        """Give the scores for a checkpoint."""
        return {"metric": self.criterion.metric, "mode": self.criterion.mode, "scores": [*self._scores.items()]}

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Continue with the `saved` scores, if they are of the same metric and mode."""
        if (saved["metric"], saved["mode"]) == (self.criterion.metric, self.criterion.mode):
            self._scores = {int(step): float(score) for step, score in saved["scores"]}
