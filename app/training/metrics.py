"""Loss and accuracy as exact sums: kept on the device batch by batch, reduced over the ranks once a log line."""

from dataclasses import dataclass

import torch
from torch import Tensor

from app.cluster.comm import Cluster


@dataclass(frozen=True)
class Scores:
    """Means over samples, each of which counts once, on whichever rank it was."""

    loss: float
    accuracy: float
    num_samples: int

    @staticmethod
    def of(tally: Tensor) -> "Scores":
        loss_sum, num_correct, num_samples = tally.tolist()
        return Scores(loss_sum / max(1, num_samples), num_correct / max(1, num_samples), int(num_samples))


class Window:
    """Tallies (loss sum, number correct, number of samples) of the updates since the last log line."""

    def __init__(self, device: torch.device) -> None:
        self._total = torch.zeros(3, dtype=torch.float64, device=device)
        self._last = self._total.clone()

    def add(self, tally: Tensor) -> None:
        """`tally` (3,) float64 of one update on this rank. No collective, no wait for the device."""
        self._total += tally
        self._last = tally

    def tally(self) -> list[float]:
        """This rank's part since the last reduction, to go on from."""
        return [float(value) for value in self._total.tolist()]

    def restore(self, tallies: list[list[float]], cluster: Cluster) -> None:
        """Go on from the tallies of all ranks of the run before: each takes its own, or rank 0 takes the sum."""
        if len(tallies) == cluster.size:
            mine = tallies[cluster.rank]
        else:
            mine = [sum(column) for column in zip(*tallies, strict=True)] if cluster.is_root else [0.0, 0.0, 0.0]
        self._total.copy_(torch.tensor(mine, dtype=torch.float64))

    def reduce(self, cluster: Cluster) -> tuple[Scores, Scores]:
        """Collective: the scores of all updates since the last call, and of the last of them alone."""
        total, last = cluster.sum_(torch.stack([self._total, self._last]), name="window").cpu()
        self._total.zero_()
        return Scores.of(total), Scores.of(last)
