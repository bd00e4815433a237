"""Parameter sync, replicas and the merge over real ranks."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lockstep.comm.cluster import Cluster
from lockstep.data.batch import DataBatch
from lockstep.parallel.merge import state_digest
from lockstep.parallel.replicated import Replicated
from lockstep.parallel.step import train_step
from lockstep.runtime.errors import ReplicasDifferError
from lockstep.runtime.seeding import update_seed
from lockstep.training.progress import MetricAccumulator
from tests.parallel.building import CrossEntropy, make_batch, merged_model


def _model(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(4, 7), nn.BatchNorm1d(7), nn.Linear(7, 3)).double()


def _strategy(model: nn.Module, cluster: Cluster) -> Replicated:
    return Replicated(model, torch.optim.SGD(model.parameters(), lr=0.1), cluster)


def _batch(cluster: Cluster, num_samples: int) -> DataBatch:
    return make_batch(cluster.rank, cluster.size, num_samples, shape=(1, 2, 2))


@pytest.mark.world_size(3)
def test_all_ranks_take_the_model_of_rank_0(cluster: Cluster) -> None:
    model = _model(seed=cluster.rank)
    before = cluster.all_gather_object(state_digest(model))
    assert len(set(before)) == 3
    _strategy(model, cluster).synchronise()
    assert cluster.all_gather_object(state_digest(model)) == [before[0]] * 3


@pytest.mark.world_size(3)
def test_the_gradient_is_the_exact_mean_over_a_ragged_global_batch(cluster: Cluster) -> None:
    """11 samples over 3 ranks: the mean of the ranks' means would weigh samples unequally."""
    model = _model(seed=1).eval()
    train_step(_strategy(model, cluster), _batch(cluster, 11), CrossEntropy(), seed=0)
    reference = _model(seed=1).eval()
    whole = _batch(Cluster.alone(), 11)
    F.cross_entropy(reference(whole.inputs), whole.data[1]).backward()
    for (name, parameter), expected in zip(model.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, expected.grad, rtol=1e-12, atol=1e-14, msg=name)


@pytest.mark.world_size(3)
def test_the_merged_model_is_every_ranks_model(cluster: Cluster) -> None:
    model = _model(seed=2)
    strategy = _strategy(model, cluster)
    strategy.synchronise()
    merged = merged_model(cluster, strategy)
    assert (merged is not None) == cluster.is_root
    if merged is not None:
        assert list(merged) == list(model.state_dict())
        assert all(torch.equal(merged[name], tensor) for name, tensor in model.state_dict().items())
        assert merged["2.num_batches_tracked"].shape == ()


@pytest.mark.world_size(3)
@pytest.mark.parametrize("drifted_rank", [1, 2])
def test_a_replica_that_drifted_by_one_bit_is_named_at_the_merge(cluster: Cluster, drifted_rank: int) -> None:
    model = _model(seed=2)
    strategy = _strategy(model, cluster)
    strategy.synchronise()
    if cluster.rank == drifted_rank:
        model.get_parameter("1.weight").data.view(torch.int64)[3, 1] ^= 1
    with pytest.raises(ReplicasDifferError, match=rf"model/1.weight of rank {drifted_rank} is not") as caught:
        merged_model(cluster, strategy)
    assert caught.value.shared


@pytest.mark.world_size(3)
def test_scores_count_each_sample_once(cluster: Cluster) -> None:
    window = MetricAccumulator(cluster.device, size=3)
    window.add(torch.tensor([8.0, 1.0, 2.0], dtype=torch.float64))
    window.add(torch.tensor([2.0 * cluster.rank, 1.0, cluster.rank], dtype=torch.float64))
    mean, last = window.reduce(cluster)
    assert mean == [30.0, 6.0, 9.0]
    assert last == [6.0, 3.0, 3.0]
    assert window.reduce(cluster)[0] == [0.0, 0.0, 0.0]


@pytest.mark.world_size(3)
def test_every_rank_and_update_draws_its_own_random_numbers(cluster: Cluster) -> None:
    seeds = [update_seed(seed, step, cluster.rank) for seed in range(3) for step in range(20)]
    everyone = [seed for of_rank in cluster.all_gather_object(seeds) for seed in of_rank]
    assert len(set(everyone)) == len(everyone) == 180


@pytest.mark.world_size(2)
def test_replicas_stay_equal_over_updates_with_dropout(cluster: Cluster) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(4, 3)).double()
    strategy = _strategy(model, cluster)
    strategy.synchronise()
    for step in range(5):
        train_step(strategy, _batch(cluster, 9), CrossEntropy(), update_seed(0, step, cluster.rank))
    strategy.compare("after 5 updates")
