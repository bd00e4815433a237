"""How far a run is, and its metrics since the last log line: exact sums, added up on the device update by update, and
reduced over the ranks once a log line.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lockstep.comm.cluster import Cluster


@dataclass
class Progress:
    """How far a run is, beside the loader's position.

    Attributes:
        step: updates, skipped ones included.
        num_samples: of those updates, over all ranks and epochs: images, or steps of environments.
        num_skipped: updates that were skipped because they were not finite.
        seconds: of the updates alone, without evaluation.
    """

    step: int = 0
    num_samples: int = 0
    num_skipped: int = 0
    seconds: float = 0.0

    @property
    def samples_per_second(self) -> float:
        return self.num_samples / max(self.seconds, 1e-9)


class MetricAccumulator:
    """The metric sums of a task over the updates since the last log line."""

    def __init__(self, device: torch.device, size: int) -> None:
        self._total = torch.zeros(size, dtype=torch.float64, device=device)
        self._last = self._total.clone()

    def add(self, metric_sums: Tensor) -> None:
        """Add the `metric_sums` (size,) float64 of one update on this rank. No collective, no wait for the device."""
        self._total += metric_sums
        self._last = metric_sums

    def metric_sums(self) -> list[float]:
        """This rank's sums since the last reduction, for a checkpoint."""
        return [float(value) for value in self._total.tolist()]

    def restore(self, metric_sums: Sequence[Sequence[float] | None], cluster: Cluster) -> None:
        """Continue with the metric sums of all ranks of a checkpoint: each rank takes its own or, on another number of
        ranks, rank 0 takes their sum. None stands for a rank that has none.
        """
        nothing = [0.0] * len(self._total)
        known = [sums if sums and len(sums) == len(nothing) else nothing for sums in metric_sums]
        if len(known) == cluster.size:
            mine = known[cluster.rank]
        else:
            mine = [sum(column) for column in zip(*known, strict=True)] if cluster.is_root else nothing
        self._total.copy_(torch.tensor(mine, dtype=torch.float64))

    def reduce(self, cluster: Cluster) -> tuple[list[float], list[float]]:
        """Collective: sum over all ranks, of all updates since the last call, and of the last of them alone."""
        total, last = cluster.sum_(torch.stack([self._total, self._last]), name="window").cpu()
        self._total.zero_()
        return total.tolist(), last.tolist()
