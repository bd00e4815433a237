"""ZeRO 1-3: whatever a model and an optimizer may have, what goes wrong, and state."""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from lockstep.benchmark.sharding import held_bytes
from lockstep.comm.cluster import Cluster
from lockstep.data.batch import DataBatch
from lockstep.parallel.merge import state_digest
from lockstep.parallel.replicated import Replicated
from lockstep.parallel.step import train_step
from lockstep.parallel.strategy import Strategy
from lockstep.parallel.tensor_slices import TensorState
from lockstep.parallel.zero import Zero
from lockstep.runtime.errors import NonFiniteError, ReplicasDifferError
from lockstep.settings import GradientSettings
from tests.parallel.building import CrossEntropy, assert_close, make_batch, merged_model, tied_blocks, whole_values

TOLERANCE = 1e-10


@pytest.mark.world_size(2)
def test_clipping_is_by_the_norm_of_the_whole_gradient(cluster: Cluster) -> None:
    """And it is on in the test above: without it, the first step would be another."""
    norms = {}
    for stage in (0, 1, 2, 3):
        strategy = _strategy(cluster, _blocks, stage, GradientSettings(clip_norm=1e-3))
        train_step(strategy, make_batch(cluster.rank, cluster.size, 11), CrossEntropy(), seed=0)
        parts = [part[: len(part) - (not stage)].norm() ** 2 for part in strategy.reduced_gradients()]  # no loss
        total = torch.stack(parts).sum().view(1)
        norms[stage] = math.sqrt(float(cluster.sum_(total, name="test") if stage else total))
    assert norms == pytest.approx(dict.fromkeys(range(4), 1e-3), rel=1e-9)


# -- what models may have ----------------------------------------------------------------------------------------------


def _blocks() -> Iterator[tuple[str, nn.Module]]:
    torch.manual_seed(1)
    yield "first", nn.Conv2d(2, 5, 2, bias=False).double()  # of which the norm would leave rounding alone
    yield "norm", nn.BatchNorm2d(5).double()
    yield "flat", nn.Sequential(nn.Tanh(), nn.Flatten())
    yield "last", nn.Linear(20, 3).double()


def _frozen() -> Iterator[tuple[str, nn.Module]]:
    torch.manual_seed(1)
    for index, (name, block) in enumerate(
        [("a", nn.Linear(18, 9)), ("b", nn.Linear(9, 9)), ("c", nn.Linear(9, 9)), ("d", nn.Linear(9, 3))]
    ):
        block.double().requires_grad_(index in (1, 3))  # the first not at all, the third between two that learn
        yield name, nn.Sequential(nn.Flatten(), block) if index == 0 else block


def _mixed() -> Iterator[tuple[str, nn.Module]]:
    class Mixed(nn.Module):
        """Two data types in one block, a parameter of no dimension, one that is never used."""

        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(18, 7).double()
            self.scale = nn.Parameter(torch.tensor(1.5))
            self.unused = nn.Parameter(torch.ones(3, dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            output: Tensor = self.inner(x.flatten(1)) * self.scale
            return output

    torch.manual_seed(1)
    yield "mixed", Mixed()
    yield "last", nn.Linear(7, 3).double()


OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "sgd": lambda model: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True),
    "adamw": lambda model: torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1, amsgrad=True),
    "rmsprop": lambda model: torch.optim.RMSprop(model.parameters(), lr=0.01, centered=True),
    "nadam": lambda model: torch.optim.NAdam(model.parameters(), lr=0.01),
}


def _strategy(
    cluster: Cluster,
    blocks: Callable[[], Iterator[tuple[str, nn.Module]]],
    stage: int,
    settings: GradientSettings,
    optimizer: str = "adamw",
) -> Strategy:
    """Stage 0: replicated."""
    build = OPTIMIZERS[optimizer]
    if stage:
        return Zero(blocks(), build, cluster, settings, stage)
    model = nn.Sequential()
    for name, block in blocks():
        model.add_module(name, block)
    strategy = Replicated(model, build(model), cluster, settings)
    strategy.synchronise()
    return strategy


def _train(cluster: Cluster, strategy: Strategy, num_updates: int = 4) -> dict[str, Tensor] | None:
    for seed in range(num_updates):
        train_step(strategy, make_batch(cluster.rank, cluster.size, 13 + seed), CrossEntropy(), seed)
    strategy.compare("after training")
    return merged_model(cluster, strategy)


@pytest.mark.world_size(3)
@pytest.mark.parametrize("blocks", [_blocks, tied_blocks, _frozen])
@pytest.mark.parametrize(
    ("stage", "optimizer"),
    [
        pytest.param(stage, name, marks=[] if stage == 3 or name == "adamw" else pytest.mark.thorough)
        for stage in (1, 2, 3)
        for name in OPTIMIZERS
    ],
)
def test_any_model_and_elementwise_optimizer(
    cluster: Cluster, blocks: Callable[[], Iterator[tuple[str, nn.Module]]], stage: int, optimizer: str
) -> None:
    """Running statistics, tied weights, frozen parameters."""
    settings = GradientSettings(num_micro_batches=2, clip_norm=1.0)
    expected = _train(cluster, _strategy(cluster, blocks, 0, settings, optimizer))
    found = _train(cluster, _strategy(cluster, blocks, stage, settings, optimizer))
    assert_close(found, expected)


@pytest.mark.world_size(3)
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("blocks", [_blocks, tied_blocks, _frozen])
def test_each_parameter_counts_once_and_buffers_do_not(
    cluster: Cluster, blocks: Callable[[], Iterator[tuple[str, nn.Module]]], stage: int
) -> None:
    strategy = _strategy(cluster, blocks, stage, GradientSettings())
    whole = nn.Sequential(*(block for _, block in blocks()))
    assert strategy.num_parameters == sum(parameter.numel() for parameter in whole.parameters())
    tied = {"second.weight": "first.1.weight"} if blocks is tied_blocks else {}
    assert strategy.tied_weights == tied


@pytest.mark.world_size(3)
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_two_data_types_and_an_unused_parameter(cluster: Cluster, stage: int) -> None:
    strategy = _strategy(cluster, _mixed, stage, GradientSettings(), "sgd")
    trained = _train(cluster, strategy)
    if trained is not None:
        assert trained["mixed.scale"].shape == ()
        assert trained["mixed.scale"].dtype == torch.float32
        assert trained["mixed.unused"].tolist() == [1.0, 1.0, 1.0]
        assert float(trained["mixed.scale"]) != 1.5


@pytest.mark.world_size(2)
def test_an_optimizer_that_cannot_be_cut_is_refused(cluster: Cluster) -> None:
    with pytest.raises(ValueError, match="Adagrad makes its state before the first step"):
        Zero(_blocks(), lambda model: torch.optim.Adagrad(model.parameters()), cluster, GradientSettings(), 1)


@pytest.mark.world_size(2)
def test_running_statistics_are_the_mean_over_all_samples(cluster: Cluster) -> None:
    """Rank 0 has 5 samples, rank 1 has 6; and they are the same on both ranks afterwards."""
    strategy = _strategy(cluster, _blocks, 0, GradientSettings())
    conv = strategy.model[0]  # type: ignore[index]
    with torch.no_grad():
        means = [conv(make_batch(rank, 2, 11).inputs).mean((0, 2, 3)) for rank in range(2)]
    train_step(strategy, make_batch(cluster.rank, 2, 11), CrossEntropy(), seed=0)
    expected = 0.1 * (5 * means[0] + 6 * means[1]) / 11
    torch.testing.assert_close(strategy.model.get_buffer("norm.running_mean"), expected, rtol=1e-12, atol=1e-14)
    assert strategy.model.get_buffer("norm.num_batches_tracked").item() == 1


# -- what goes wrong ---------------------------------------------------------------------------------------------------


@pytest.mark.world_size(3)
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_what_is_not_finite_is_named_and_nothing_has_changed(cluster: Cluster, stage: int) -> None:
    strategy = _strategy(cluster, _frozen, stage, GradientSettings(num_micro_batches=2))
    train_step(strategy, make_batch(cluster.rank, 3, 11), CrossEntropy(), seed=0)
    before = state_digest(whole_values(strategy))
    batch = make_batch(cluster.rank, 3, 11)
    bad = replace(batch, inputs=batch.inputs * (float("nan") if cluster.rank == 1 else 1.0))
    with pytest.raises(NonFiniteError, match="the loss on rank 1") as caught:
        train_step(strategy, bad, CrossEntropy(), seed=0)
    assert caught.value.shared
    assert state_digest(whole_values(strategy)) == before
    with pytest.raises(NonFiniteError, match=r"the gradient of (b|d)\.\w+ on rank 2"):
        train_step(strategy, batch, _Infinite(cluster.rank == 2), seed=0)
    train_step(strategy, batch, CrossEntropy(), seed=0)
    assert state_digest(whole_values(strategy)) != before


class _Infinite(CrossEntropy):
    """A finite loss with infinite gradients."""

    def __init__(self, here: bool) -> None:
        self._here = here

    def loss_sum(self, outputs: Tensor, batch: DataBatch) -> tuple[Tensor, Tensor]:
        if self._here:
            outputs = outputs + (outputs * float("inf")).nan_to_num(0, 0, 0) * 0
            outputs.register_hook(lambda gradient: gradient * float("inf"))
        return super().loss_sum(outputs, batch)


@pytest.mark.world_size(2)
@pytest.mark.parametrize("num_micro_batches", [1, 3])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("together", [True, False], ids=["two ranks", "one rank"])
def test_a_skipped_update_leaves_running_statistics_as_they_were(
    cluster: Cluster, together: bool, stage: int, num_micro_batches: int
) -> None:
    ranks = cluster if together else Cluster.alone()
    strategy = _strategy(ranks, _blocks, stage, GradientSettings(num_micro_batches=num_micro_batches))
    batch = make_batch(ranks.rank, ranks.size, 11)
    train_step(strategy, batch, CrossEntropy(), seed=0)
    before = state_digest(dict(strategy.model.named_buffers()))
    assert strategy.model.get_buffer("norm.num_batches_tracked").item() == num_micro_batches
    is_last = ranks.rank == ranks.size - 1
    bad = replace(batch, inputs=batch.inputs * (float("nan") if is_last else 1.0))
    for worse, objective in ((bad, CrossEntropy()), (batch, _Infinite(is_last))):
        with pytest.raises(NonFiniteError):
            train_step(strategy, worse, objective, seed=0)
        assert state_digest(dict(strategy.model.named_buffers())) == before
    train_step(strategy, batch, CrossEntropy(), seed=0)
    assert strategy.model.get_buffer("norm.num_batches_tracked").item() == 2 * num_micro_batches
    assert all(buffer.isfinite().all() for buffer in strategy.model.buffers())


class _Caching(nn.Module):
    """Buffers that are not saved: one changes in place, one is replaced, one is a constant that is one element."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("total", torch.zeros(2, dtype=torch.float64), persistent=False)
        self.register_buffer("last", None, persistent=False)
        self.register_buffer("constant", torch.ones(1).expand(3), persistent=False)

    def forward(self, inputs: Tensor) -> Tensor:
        assert isinstance(self.total, Tensor)
        self.total += inputs.detach().mean()
        self.last = inputs.detach()
        return inputs


def _with_cache() -> Iterator[tuple[str, nn.Module]]:
    yield from _blocks()
    yield "cache", _Caching()


@pytest.mark.world_size(2)
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_skipped_update_leaves_buffers_that_are_not_saved_as_they_were(cluster: Cluster, stage: int) -> None:
    strategy = _strategy(cluster, _with_cache, stage, GradientSettings())
    batch = make_batch(cluster.rank, 2, 11)
    bad = replace(batch, inputs=batch.inputs * float("nan"))
    with pytest.raises(NonFiniteError):
        train_step(strategy, bad, CrossEntropy(), seed=0)
    names = {name.rpartition(".")[2] for name, _ in strategy.model.named_buffers()}
    assert "total" in names
    assert "last" not in names
    train_step(strategy, batch, CrossEntropy(), seed=0)
    before = state_digest(dict(strategy.model.named_buffers()))
    with pytest.raises(NonFiniteError):
        train_step(strategy, bad, CrossEntropy(), seed=0)
    assert state_digest(dict(strategy.model.named_buffers())) == before
    total = next(buffer for name, buffer in strategy.model.named_buffers() if name.endswith("total"))
    assert total.abs().sum() > 0  # or nothing is kept of an update that was taken


@pytest.mark.world_size(3)
@pytest.mark.parametrize("stage", [1, 2])
def test_a_whole_parameter_that_drifts_is_named(cluster: Cluster, stage: int) -> None:
    strategy = _strategy(cluster, _blocks, stage, GradientSettings())
    if cluster.rank == 2:
        strategy.model.get_parameter("first.weight").data.view(torch.int64)[0, 0, 0, 0] ^= 1
    with pytest.raises(ReplicasDifferError, match=r"model/first\.weight of rank 2 is not"):
        strategy.compare("in the test")


@pytest.mark.world_size(3)
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_rank_without_samples_takes_part(cluster: Cluster, stage: int) -> None:
    strategy = _strategy(cluster, _frozen, stage, GradientSettings(num_micro_batches=4))
    train_step(strategy, make_batch(cluster.rank, 3, 2), CrossEntropy(), seed=0)
    assert all(tensor.isfinite().all() for tensor in whole_values(strategy).values())


@pytest.mark.world_size(2)
def test_stage_3_holds_a_part_and_two_blocks_at_a_time(cluster: Cluster) -> None:
    def blocks() -> Iterator[tuple[str, nn.Module]]:
        yield "flat", nn.Sequential(nn.Flatten(), nn.Linear(18, 50).double())
        for index in range(20):
            yield f"layer{index}", nn.Linear(50, 50).double()
        yield "last", nn.Linear(50, 3).double()

    whole = 8 * (20 * 2550 + 19 * 50 + 51 * 3)
    held = {}
    for stage in (1, 3):
        strategy = _strategy(cluster, blocks, stage, GradientSettings(), "adamw")
        _train(cluster, strategy)
        held[stage] = held_bytes(strategy)
    assert held[3] == pytest.approx(whole * 5 / 2 + 5 * 8 * 2550, rel=0.02)  # AdamW with amsgrad keeps three
    assert held[3] < 0.8 * held[1]


# -- state -------------------------------------------------------------------------------------------------------------


@pytest.mark.world_size(3)
@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("blocks", [_blocks, tied_blocks])
def test_replicated_goes_on_from_parts_and_parts_from_replicated(
    cluster: Cluster, blocks: Callable[[], Iterator[tuple[str, nn.Module]]], stage: int
) -> None:
    whole = _strategy(cluster, blocks, 0, GradientSettings())
    _train(cluster, whole)
    parts = _strategy(cluster, blocks, stage, GradientSettings())
    parts.load_state(TensorState(whole_values(whole)))
    expected, found = _train(cluster, whole), _train(cluster, parts)
    assert_close(found, expected)
    saved = [part for of_rank in cluster.all_gather_object(parts.saved_state()) for part in of_rank.items()]
    for name, part in whole.state().items():
        mine = [found for other, found in saved if other == name]
        assert sum(piece.values.numel() for piece in mine) == part.values.numel(), name
        for piece in mine:
            expected_piece = part.values.reshape(-1)[piece.start : piece.start + piece.values.numel()]
            torch.testing.assert_close(piece.values.reshape(-1), expected_piece, rtol=TOLERANCE, atol=TOLERANCE)
