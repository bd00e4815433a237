"""Collectives over real ranks."""

import os

import pytest
import torch

from lockstep.comm.cluster import Cluster
from lockstep.runtime.errors import DataError, LockstepError


def _fail_on(rank: int, cluster: Cluster) -> int:
    if cluster.rank == rank:
        raise DataError("the file is missing")
    return cluster.rank


@pytest.mark.world_size(3)
def test_ranks_and_local_ranks(cluster: Cluster) -> None:
    assert cluster.size == 3
    assert cluster.all_gather_object(cluster.rank) == [0, 1, 2]
    assert (cluster.local_rank, cluster.local_size) == (cluster.rank, 3)


@pytest.mark.world_size(3)
def test_on_root_gives_every_rank_rank_0s_result(cluster: Cluster) -> None:
    assert cluster.on_root(lambda: f"from {cluster.rank}") == "from 0"


@pytest.mark.world_size(3)
def test_an_error_on_root_is_shared_by_all(cluster: Cluster) -> None:
    with pytest.raises(DataError, match="missing") as caught:
        cluster.on_root(lambda: _fail_on(0, cluster))
    assert caught.value.shared


@pytest.mark.world_size(3)
def test_an_error_on_one_rank_is_raised_on_all_and_names_it(cluster: Cluster) -> None:
    assert cluster.on_every_rank(lambda: _fail_on(-1, cluster)) == cluster.rank
    with pytest.raises(LockstepError, match=r"rank 1 on .*: the file is missing") as caught:
        cluster.on_every_rank(lambda: _fail_on(1, cluster))
    assert caught.value.shared


@pytest.mark.world_size(3)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64])
def test_sum_adds_over_ranks_in_place(cluster: Cluster, dtype: torch.dtype) -> None:
    tensor = torch.arange(5, dtype=dtype) * (cluster.rank + 1)
    assert cluster.sum_(tensor, name="test") is tensor
    assert tensor.tolist() == [0, 6, 12, 18, 24]


@pytest.mark.world_size(2)
def test_compute_threads_share_the_cores(cluster: Cluster) -> None:
    mine = (torch.get_num_threads(), frozenset(os.sched_getaffinity(0)))
    everyone = cluster.all_gather_object(mine)
    cores = frozenset().union(*(cores for _, cores in everyone))
    if asked := os.environ.get("OMP_NUM_THREADS"):  # the user's own number counts
        assert [threads for threads, _ in everyone] == [int(asked)] * cluster.size
    else:
        assert sum(threads for threads, _ in everyone) <= max(len(cores), cluster.size)
