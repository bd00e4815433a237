"""Data sharding: disjoint, complete, balanced, and a pure function of its arguments."""

from collections.abc import Callable
from typing import Any, get_args

import numpy as np
import pytest
import torch

from lockstep.data.sharding import Sharding, content_hash, data_shard, epoch_order, shard_bounds, shard_data

SHARDINGS: tuple[Sharding, ...] = get_args(Sharding)
SIZES = [(0, 1), (1, 1), (1, 4), (7, 3), (8, 4), (32, 5), (100, 7)]


@pytest.mark.parametrize("sharding", SHARDINGS)
@pytest.mark.parametrize(("num_ids", "num_shards"), SIZES)
def test_shards_are_disjoint_complete_and_balanced(sharding: Sharding, num_ids: int, num_shards: int) -> None:
    ids = np.random.default_rng(0).permutation(1000)[:num_ids]
    shards = [data_shard(ids, index, num_shards, sharding, seed=3, epoch=2) for index in range(num_shards)]
    assert sorted(np.concatenate(shards).tolist()) == sorted(ids.tolist())
    lengths = [len(shard) for shard in shards]
    assert max(lengths) - min(lengths) <= 1


@pytest.mark.parametrize("sharding", SHARDINGS)
def test_a_shard_is_a_pure_function(sharding: Sharding) -> None:
    ids = np.arange(50)
    first = data_shard(ids, 1, 3, sharding, seed=1, epoch=1)
    np.random.seed(9)  # noqa: NPY002  global state must not matter
    assert np.array_equal(data_shard(ids, 1, 3, sharding, seed=1, epoch=1), first)
    assert np.array_equal(ids, np.arange(50))
    if sharding != "contiguous":
        assert not np.array_equal(data_shard(ids, 1, 3, sharding, seed=2, epoch=1), first)
        assert not np.array_equal(data_shard(ids, 1, 3, sharding, seed=1, epoch=2), first)


def test_contiguous_shards_keep_the_order_of_the_ids() -> None:
    ids = np.array([5, 3, 9, 1, 7])
    assert [data_shard(ids, index, 2, "contiguous").tolist() for index in range(2)] == [[5, 3], [9, 1, 7]]


def test_hash_shards_do_not_depend_on_the_order_of_the_ids() -> None:
    ids = np.arange(40)
    backwards = ids[::-1].copy()
    for index in range(3):
        assert np.array_equal(data_shard(ids, index, 3, "hash"), data_shard(backwards, index, 3, "hash"))


def test_hash_sharding_is_the_same_on_every_machine_and_for_ever() -> None:
    """The explicit order by sha256: a change of it would break the resume of existing runs."""
    assert data_shard(np.arange(8), 0, 2, "hash", seed=0, epoch=0).tolist() == [7, 4, 1, 2]


@pytest.mark.parametrize(("shard_id", "num_shards"), [(3, 3), (-1, 3), (0, 0)])
def test_a_shard_that_does_not_exist_is_refused(shard_id: int, num_shards: int) -> None:
    with pytest.raises(ValueError, match=r"shard_id is|num_shards is"):
        data_shard(np.arange(5), shard_id, num_shards, "contiguous")


def test_bounds_are_the_seeds() -> None:
    assert shard_bounds(10, 4) == [0, 2, 5, 7, 10]


def test_the_order_of_an_epoch_depends_on_seed_and_epoch_alone() -> None:
    order = epoch_order(100, seed=4, epoch=7)
    assert sorted(order.tolist()) == list(range(100))
    assert np.array_equal(order, epoch_order(100, seed=4, epoch=7))
    others = [epoch_order(100, seed=4, epoch=8), epoch_order(100, seed=5, epoch=7), epoch_order(100, seed=7, epoch=4)]
    assert all(not np.array_equal(order, other) for other in others)


@pytest.mark.parametrize("build", [list, np.array, torch.tensor], ids=["list", "array", "tensor"])
def test_shard_data_keeps_order_and_everything(build: Callable[[list[int]], Any]) -> None:
    shards = shard_data(build(list(range(10))), 4)
    assert [list(map(int, shard)) for shard in shards.values()] == [[0, 1], [2, 3, 4], [5, 6], [7, 8, 9]]


@pytest.mark.parametrize("build", [list, np.array, torch.tensor], ids=["list", "array", "tensor"])
def test_equal_shards_do_not_swallow_each_other(build: Callable[[list[int]], Any]) -> None:
    """With the reference's code, 4 equal shards have one key, and three quarters of the data are lost."""
    shards = shard_data(build([1, 1, 1, 1, 1, 1, 1, 1]), 4)
    assert len(shards) == 4
    assert sum(len(shard) for shard in shards.values()) == 8


def test_more_shards_than_data_gives_empty_shards() -> None:
    assert sorted(len(shard) for shard in shard_data([1, 2], 5).values()) == [0, 0, 0, 1, 1]


def test_keys_carry_the_sha256_of_the_content() -> None:
    data = torch.arange(6)
    assert [key.split("-")[1] for key in shard_data(data, 2)] == [content_hash(data[:3]), content_hash(data[3:])]


def test_the_whole_content_counts_and_not_its_printed_form() -> None:
    """`str` abbreviates a long tensor, so the reference's code gives these two the same hash."""
    first, second = torch.zeros(5000), torch.zeros(5000)
    second[2500] = 1
    assert str(first) == str(second)
    assert content_hash(first) != content_hash(second)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (torch.zeros(2, dtype=torch.float32), torch.zeros(1, dtype=torch.float64)),
        (torch.zeros(2, 3), torch.zeros(3, 2)),
        (torch.tensor([0.0]), torch.tensor([-0.0])),
        (np.zeros(4, dtype=np.int32), np.zeros(2, dtype=np.int64)),
        ([1, 23], [12, 3]),
        ([[1], [2]], [[1, 2], []]),
        ((1, 2), [1, 2]),
        ("1", 1),
    ],
    ids=lambda value: str(value)[:20],
)
def test_different_content_has_different_hashes(first: object, second: object) -> None:
    assert content_hash(first) != content_hash(second)


def test_equal_content_has_equal_hashes_whatever_its_strides() -> None:
    tensor = torch.arange(12).view(3, 4)
    assert content_hash(tensor.T) == content_hash(tensor.T.contiguous())
    array = np.arange(12).reshape(3, 4)
    assert content_hash(array.T) == content_hash(array.T.copy())
    assert content_hash(torch.empty(0)) == content_hash(torch.empty(0))
