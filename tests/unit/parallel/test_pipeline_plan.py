"""A pipeline's schedule and its cut into stages: pure functions."""

import itertools

import pytest
import torch
from torch import nn

from lockstep.parallel.pipeline_plan import BlockCost, Schedule, bubble, cut_blocks, measure_blocks, schedule_of
from lockstep.parallel.rank_grid import RankGrid
from lockstep.runtime.errors import SettingsError
from lockstep.settings import PipelineSettings, Settings


@pytest.mark.parametrize("schedule", ["1f1b", "gpipe"])
@pytest.mark.parametrize(("num_stages", "num_micro_batches"), list(itertools.product([1, 2, 3, 5], [1, 2, 4, 9])))
def test_a_schedule_runs_without_deadlock_in_the_time_of_the_bubble(
    schedule: Schedule, num_stages: int, num_micro_batches: int
) -> None:
    """Each pass takes 1, forward or backward; a stage waits until its neighbour has done the pass before."""
    plans = [schedule_of(schedule, stage, num_stages, num_micro_batches) for stage in range(num_stages)]
    done: dict[tuple[int, str, int], int] = {}
    clocks, positions = [0] * num_stages, [0] * num_stages
    most_kept = [0] * num_stages
    while any(position < len(plan) for position, plan in zip(positions, plans, strict=True)):
        moved = False
        for stage, plan in enumerate(plans):
            while positions[stage] < len(plan):
                action = plan[positions[stage]]
                neighbour = stage - 1 if action.kind == "forward" else stage + 1
                is_first = neighbour < 0 or neighbour == num_stages
                needed = (neighbour, action.kind, action.micro_batch)
                if not is_first and needed not in done:
                    break
                start = max(clocks[stage], 0 if is_first else done[needed])
                clocks[stage] = done[stage, action.kind, action.micro_batch] = start + 1
                positions[stage] += 1
                moved = True
                so_far = plan[: positions[stage]]
                kept = sum(1 if one.kind == "forward" else -1 for one in so_far)
                most_kept[stage] = max(most_kept[stage], kept)
        assert moved, "deadlock"
    assert max(clocks) == 2 * (num_micro_batches + num_stages - 1)
    assert 1 - 2 * num_micro_batches / max(clocks) == pytest.approx(bubble(num_stages, num_micro_batches))
    assert len(done) == 2 * num_stages * num_micro_batches
    if schedule == "1f1b":
        assert most_kept == [min(num_micro_batches, num_stages - stage) for stage in range(num_stages)]
    else:
        assert most_kept == [num_micro_batches] * num_stages


def _costs(*seconds: float, idle: tuple[int, ...] = ()) -> list[BlockCost]:
    return [
        BlockCost(f"b{index}", value, (3,), torch.float32, learns=index not in idle)
        for index, value in enumerate(seconds)
    ]


def test_the_cut_is_the_best_of_all() -> None:
    costs = _costs(3, 1, 4, 1, 5, 9, 2, 6, 5, 3)
    for num_stages in (1, 2, 3, 4, 10):

        def costliest(firsts: tuple[int, ...]) -> float:
            bounds = [0, *firsts, len(costs)]
            return max(sum(cost.seconds for cost in costs[a:b]) for a, b in itertools.pairwise(bounds))

        best = min(costliest(firsts) for firsts in itertools.combinations(range(1, 10), num_stages - 1))
        assert costliest(tuple(cut_blocks(costs, num_stages)[1:])) == best


def test_each_stage_has_something_to_learn() -> None:
    assert cut_blocks(_costs(1, 100, 100, 1, idle=(1, 2)), 2) in ([0, 1], [0, 2], [0, 3])
    with pytest.raises(SettingsError, match="the model has 2 blocks with parameters"):
        cut_blocks(_costs(1, 1, 1, idle=(1,)), 3)


def test_blocks_are_measured_by_what_they_take() -> None:
    blocks = [("small", nn.Linear(4, 4)), ("relu", nn.ReLU()), ("large", nn.Linear(4, 200_000))]
    costs = measure_blocks(blocks, lambda block, inputs: block(inputs), torch.randn(8, 4))
    assert [cost.output_shape for cost in costs] == [(4,), (4,), (200_000,)]
    assert [cost.learns for cost in costs] == [True, False, True]
    assert costs[2].seconds > costs[0].seconds


def test_neighbouring_ranks_are_one_replica() -> None:
    settings = Settings(parallel="pipeline", pipeline=PipelineSettings(num_stages=3))
    layouts = [RankGrid.of(settings, rank, 6) for rank in range(6)]
    assert [(grid.replica, grid.stage) for grid in layouts] == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]
    assert layouts[4].same_stage() == [[0, 3], [1, 4], [2, 5]]
    assert layouts[4].rank_of(2) == 5
    assert [grid.counts_samples for grid in layouts] == [True, False, False, True, False, False]
    assert RankGrid.of(Settings(), 2, 3) == RankGrid(3, 1, 2)
