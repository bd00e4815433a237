"""How far a run is, which settings it cannot change when it is resumed, and a checkpoint in memory."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from lockstep.parallel.tensor_slices import TensorState
from lockstep.settings import Settings
from lockstep.training.optim import learning_rate_scale

HOW_ALONE = ("channels_last", "compile")  # settings of a model that change how it computes, not what


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


class InMemoryCheckpoint(TensorState):
    """What a checkpoint holds, in rank 0's memory; the other ranks have names and shapes without values.

    Attributes:
        step, counters: as a checkpoint's.
        path: where it comes from, for messages.
    """

    def __init__(self, tensors: Mapping[str, Tensor], step: int, counters: dict[str, Any]) -> None:
        super().__init__(tensors)
        self.step = step
        self.counters = counters
        self.path = "the memory of the ranks before"


def immutable_settings(settings: Settings, of_task: Mapping[str, Any], num_shards: int) -> dict[str, Any]:
    """Collect what a run cannot change when it is resumed, because its position and state would mean something else.

    Args:
        of_task: what its task adds.
        num_shards: of the data.
    """
    return {
        "task": settings.task,
        "seed": settings.seed,
        "precision": settings.precision,
        "model": {name: value for name, value in asdict(settings.model).items() if name not in HOW_ALONE},
        "gradient.reduction": settings.gradient.reduction,
        "gradient.wire": settings.gradient.wire,
        "checks.ledger": settings.checks.ledger,  # a ledger of a part of the run would prove nothing
        **of_task,
        "optimizer.name": settings.optimizer.name,
        "optimizer.decay_vectors": settings.optimizer.decay_vectors,
        "optimizer.average_decay": settings.optimizer.average_decay,
        "the scale of optimizer.learning_rate": learning_rate_scale(settings.optimizer, num_shards),
    }
