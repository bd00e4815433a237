"""Which micro-batch a stage of a pipeline works on, and when. Pure functions; nothing is sent here.

    GPipe (Huang et al. 2019, section 2.3)      all forward, then all backward: every activation is kept
    1F1B (Narayanan et al. 2019, section 3.2)   one forward, one backward in turn: a stage keeps those of as many
                                                micro-batches as there are stages from it on

Both take as long: of m micro-batches and p stages, a part (p - 1) / (m + p - 1) of the time is the bubble.
"""

from dataclasses import dataclass
from typing import Literal

Schedule = Literal["1f1b", "gpipe"]


@dataclass(frozen=True)
class Action:
    """One pass of one micro-batch through a stage."""

    kind: Literal["forward", "backward"]
    micro_batch: int


def schedule_of(schedule: Schedule, stage: int, num_stages: int, num_micro_batches: int) -> list[Action]:
    """What `stage` does in one update, in order: each micro-batch forward once, and backward once, in order."""
    forward = [Action("forward", index) for index in range(num_micro_batches)]
    backward = [Action("backward", index) for index in range(num_micro_batches)]
    num_ahead = num_micro_batches if schedule == "gpipe" else min(num_micro_batches, num_stages - stage - 1)
    steady = [action for pair in zip(forward[num_ahead:], backward, strict=False) for action in pair]
    return [*forward[:num_ahead], *steady, *backward[num_micro_batches - num_ahead :]]


def bubble(num_stages: int, num_micro_batches: int) -> float:
    """The part of an update's time in which a stage has nothing to do, if all stages take equally long."""
    return (num_stages - 1) / (num_micro_batches + num_stages - 1)
