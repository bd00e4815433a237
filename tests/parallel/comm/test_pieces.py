"""Tensors with more bytes or elements than one call can count are sent in pieces: here, those with more than 7."""

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import horovod.torch as hvd
import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

from lockstep.comm import backend
from lockstep.comm.backend import pieces_of
from lockstep.comm.cluster import Cluster
from lockstep.parallel.merge import merge_on_root
from lockstep.parallel.replicated import Replicated, sum_over_wire_
from lockstep.parallel.step import train_step
from lockstep.parallel.strategy import Strategy
from lockstep.parallel.zero import Zero
from lockstep.settings import GradientSettings
from lockstep.training.model_file import TensorFileWriter
from tests.parallel.building import CrossEntropy, assert_close, make_batch, merged_model, tied_blocks

MOST = 7


@pytest.fixture
def most(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How many elements each of Horovod's collectives held, over all ranks, with a limit of MOST."""
    monkeypatch.setattr(backend, "MAX_PER_CALL", MOST)
    held: list[int] = []

    def watch(owner: Any, name: str, ranks: int) -> None:
        call = getattr(owner, name)

        def watched(tensor: Tensor, *arguments: Any, **named: Any) -> Any:
            held.append(tensor.numel() * ranks)
            return call(tensor, *arguments, **named)

        monkeypatch.setattr(owner, name, watched)

    watch(hvd, "allreduce_", ranks=1)
    watch(hvd, "allreduce_async_", ranks=1)
    watch(hvd.mpi_ops, "_alltoall_async", ranks=1)
    watch(hvd.mpi_ops, "_allgather_async", ranks=hvd.size())
    yield held
    assert all(num_elements <= max(MOST, hvd.size()) for num_elements in held)


@pytest.mark.world_size(2)
def test_messages_arrive_whole_and_in_order(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "MAX_PER_CALL", MOST)
    assert [len(piece) for piece in pieces_of(torch.zeros(2, dtype=torch.float64))] == [7, 7, 2]
    messages = cluster.require_mpi("sending")
    tensors = [torch.arange(12.0).view(3, 4) * sign for sign in (1, -1)]
    if cluster.rank == 0:
        pending = [messages.begin_send(tensor, to=1, tag=9) for tensor in tensors]
    else:
        pending = [messages.begin_receive(torch.empty(3, 4), source=0, tag=9) for _ in tensors]
    for message, tensor in zip(pending, tensors, strict=True):
        assert torch.equal(message.wait(), tensor)
        assert message.is_done


@pytest.mark.world_size(3)
@pytest.mark.parametrize("num_elements", [7, 8, 14, 20])
def test_sums_and_broadcasts(cluster: Cluster, num_elements: int, most: list[int]) -> None:
    expected = torch.arange(num_elements, dtype=torch.float64)
    for sum_ in (lambda tensor: cluster.sum_(tensor, "sum"), lambda tensor: cluster.begin_sum_(tensor, "sum")()):
        tensor = expected * (cluster.rank + 1)
        sum_(tensor)
        assert torch.equal(tensor, 6 * expected)
    assert len(most) == 2 * -(-num_elements // MOST)
    tensor = (expected if cluster.rank == 1 else torch.zeros_like(expected)).view(1, -1).clone()
    cluster.broadcast_parameters({"tensor": tensor}, root=1)
    assert torch.equal(tensor.view(-1), expected)
    tensor = expected.float() * (cluster.rank + 1)
    sum_over_wire_(cluster, tensor, torch.bfloat16, "wire")
    assert torch.equal(tensor, 6 * expected.float())


@pytest.mark.world_size(3)
@pytest.mark.parametrize("length", [1, 2, 3, 5, 8])
def test_parts_of_a_flat_tensor(cluster: Cluster, length: int, most: list[int]) -> None:
    whole = torch.zeros(3 * length, dtype=torch.float64)
    part = torch.arange(length, dtype=torch.float64) + 10 * cluster.rank
    cluster.begin_all_gather_(whole, part, "gather")()
    expected = torch.cat([torch.arange(length) + 10.0 * rank for rank in range(3)]).double()
    assert torch.equal(whole, expected)
    addends = cluster.begin_reduce_scatter(whole * (cluster.rank + 1), torch.empty_like(whole), "reduce")()
    assert torch.equal(addends.sum(0), 6 * expected[cluster.rank * length : (cluster.rank + 1) * length])
    assert len(most) == 2 * -(-length // 2)


@pytest.mark.world_size(2)
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_every_strategy_learns_the_same_in_pieces(
    cluster: Cluster, stage: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def train() -> dict[str, Tensor] | None:
        settings, build = GradientSettings(num_micro_batches=2, clip_norm=1.0), _sgd
        strategy: Strategy
        if stage:
            strategy = Zero(tied_blocks(), build, cluster, settings, stage)
        else:
            model = nn.Sequential()
            for name, block in tied_blocks():
                model.add_module(name, block)
            strategy = Replicated(model, build(model), cluster, settings)
            strategy.synchronise()
        for seed in range(3):
            train_step(strategy, make_batch(cluster.rank, cluster.size, 13), CrossEntropy(), seed)
        return merged_model(cluster, strategy)

    expected = train()
    monkeypatch.setattr(backend, "MAX_PER_CALL", 50)
    assert_close(train(), expected)


def _sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


@pytest.mark.thorough
@pytest.mark.world_size(2)
@pytest.mark.parametrize("share", [0.0, 0.5], ids=["one rank has all", "each has half"])
def test_a_tensor_of_more_than_2_gib_is_merged(cluster: Cluster, share: float, tmp_path: Path) -> None:
    """Needs 8 GiB of memory, and 2 of disk."""
    num_elements = 2**28 + 2**20 + 3  # of 8 bytes: 2 GiB, 8 MiB and 24 bytes
    border = int(share * num_elements)
    start, stop = ((0, border), (border, num_elements))[cluster.rank]
    part = torch.arange(start, stop, dtype=torch.int64)
    meta_state = {"large": torch.empty(num_elements, dtype=torch.int64, device="meta"), "small": torch.empty(2)}
    parts: dict[str, Callable[[], Tensor]] = {"large": lambda: part, "small": lambda: torch.full((1,), cluster.rank)}
    file = cluster.on_root(lambda: tmp_path) / "model.safetensors"
    if not cluster.is_root:
        merge_on_root(cluster, meta_state, lambda name: parts[name](), None)
        return
    with TensorFileWriter(file, meta_state) as writer:
        merge_on_root(cluster, meta_state, lambda name: parts[name](), writer.write)
    with safe_open(file, framework="pt") as opened:
        found = opened.get_slice("large")
        for begin, end in itertools.pairwise([*range(0, num_elements, 2**24), num_elements]):
            assert torch.equal(found[begin:end], torch.arange(begin, end))
