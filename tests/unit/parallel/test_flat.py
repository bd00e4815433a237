"""Parameters in flat buffers, cut into parts."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from lockstep.comm.cluster import Cluster
from lockstep.parallel.sharded_model import BufferPool, FlatParameters, flat_slices_of

SHAPES = {"a": torch.Size((2, 3)), "b": torch.Size(()), "c": torch.Size((4,)), "d": torch.Size((0,))}


@pytest.mark.parametrize("num_parts", [1, 2, 3, 4, 11, 30])
def test_parts_hold_every_element_once_and_in_order(num_parts: int) -> None:
    whole = torch.arange(11)
    part_size = -(-11 // num_parts)
    padded = torch.cat([whole, torch.full((part_size * num_parts - 11,), -1)])
    found: dict[str, list[int]] = {name: [] for name in SHAPES}
    for shard_id in range(num_parts):
        part = padded[shard_id * part_size : (shard_id + 1) * part_size]
        for flat_slice in flat_slices_of(SHAPES, part_size, shard_id):
            assert flat_slice.tensor_slice.start == len(found[flat_slice.tensor_slice.name])
            found[flat_slice.tensor_slice.name] += flat_slice.of(part).tolist()
            assert flat_slice.tensor_slice.stop == len(found[flat_slice.tensor_slice.name])
    assert found == {"a": [0, 1, 2, 3, 4, 5], "b": [6], "c": [7, 8, 9, 10], "d": []}


def test_two_slots_take_turns_and_grow_under_their_views() -> None:
    buffers = BufferPool()
    first, second, third = (
        buffers.tensor("x", turn, 3 + turn, torch.float32, torch.device("cpu")) for turn in range(3)
    )
    third.fill_(7)
    assert first.tolist() == [7, 7, 7]
    assert second.data_ptr() != third.data_ptr()
    assert buffers.tensor("y", 0, 3, torch.float32, torch.device("cpu")).data_ptr() != first.data_ptr()


@dataclass(frozen=True)
class _GivesOneRow(Cluster):
    """As NCCL does: this rank's part of the sum, already added up."""

    @property
    def size(self) -> int:
        return 2

    def begin_reduce_scatter(self, tensor: Tensor, scratch: Tensor, name: str) -> Callable[[], Tensor]:
        assert tensor.shape == scratch.shape
        return lambda: torch.full((1, len(tensor) // self.size), 5.0) if name else tensor


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_what_a_reduction_gives_as_one_row_becomes_the_gradient(stage: int) -> None:
    cluster = _GivesOneRow(**vars(Cluster.alone()))
    parameter = nn.Parameter(torch.ones(4))
    flat = FlatParameters("test", {"w": parameter}, cluster, stage, BufferPool(), turn=0)
    flat.zero_gradients()
    assert parameter.grad is not None
    parameter.grad += 1
    flat.begin_reduce()()
    assert flat.gradient_shard is not None
    assert flat.gradient_shard.tolist() == [5.0, 5.0]
