"""How far a run is, and its whole state in memory, for those who take it over from the ranks before them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from app.parallel.parts import TensorState


@dataclass
class Progress:
    """How far a run is: what its checkpoints count, beside the loader's position.

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


class Handover(TensorState):
    """What a checkpoint holds, in rank 0's memory; the other ranks know names and shapes, and hold no values.

    Attributes:
        step, counters: as a checkpoint's.
        path: for people, where it comes from.
    """

    def __init__(self, tensors: Mapping[str, Tensor], step: int, counters: dict[str, Any]) -> None:
        super().__init__(tensors)
        self.step = step
        self.counters = counters
        self.path = "the memory of the ranks before"
