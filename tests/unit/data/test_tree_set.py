"""Data sets of any problem: trees in memory or item by item, seeded randomness, a held-out part by hash."""

import random
from collections import namedtuple
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import IterableDataset, TensorDataset

from lockstep.data.batch import DataBatch, map_tensors, rows, tensors_of
from lockstep.data.loader import BatchLoader
from lockstep.data.tree_set import MapStyleSet, TensorSet, as_data_set, seeded, split_by_hash
from lockstep.runtime.errors import DataError

F64 = torch.float64
Pair = namedtuple("Pair", ["left", "right"])


class Noisy:
    """Items that draw from every global generator, as a user's augmentation does."""

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> dict[str, Any]:
        drawn = torch.rand(2).tolist(), np.random.rand(), random.random()  # noqa: NPY002
        return {"index": index, "drawn": torch.tensor([*drawn[0], *drawn[1:]]), "name": f"item {index}"}


def _drawn(num_shards: int, num_workers: int, epoch: int) -> dict[int, Tensor]:
    found = {}
    for shard in range(num_shards):
        data = as_data_set(Noisy(), "noisy", num_workers=num_workers)
        loader = BatchLoader(
            data, 4, "hash", shard, num_shards, seed=3, dtype=F64, inputs_of=lambda batch: batch["drawn"]
        )
        loader.epoch = epoch
        for batch in loader.rest_of_epoch():
            for row, number in enumerate(batch.ids.tolist()):
                assert batch.data["index"][row] == number
                assert batch.data["name"][row] == f"item {number}"
                found[number] = batch.inputs[row]
    assert len(found) == 10
    return found


def test_what_a_data_set_draws_depends_on_seed_epoch_and_sample_alone() -> None:
    expected = _drawn(1, 0, epoch=0)
    for num_shards, num_workers in ((3, 0), (1, 2)):
        found = _drawn(num_shards, num_workers, epoch=0)
        assert all(torch.equal(found[number], expected[number]) for number in range(10))
    other = _drawn(1, 0, epoch=1)
    assert not any(torch.equal(other[number], expected[number]) for number in range(10))
    assert len({tuple(values.tolist()) for values in expected.values()}) == 10


def test_the_generators_are_restored_after_an_error() -> None:
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    with suppress(ZeroDivisionError), seeded((1, 2)):
        _ = torch.rand(5) / (1 // 0)
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize(
    "value",
    [
        (torch.arange(6.0).view(3, 2), torch.arange(3)),
        {"inputs": torch.arange(6.0).view(3, 2), "label": torch.arange(3)},
        TensorDataset(torch.arange(6.0).view(3, 2), torch.arange(3)),
        (np.arange(6.0).reshape(3, 2), np.arange(3)),
        {"inputs": torch.arange(6.0).view(3, 2), "label": np.arange(3)},
        [(torch.arange(2.0) + 2 * index, index) for index in range(3)],
    ],
    ids=["tuple", "dictionary", "TensorDataset", "arrays", "both", "list of items"],
)
def test_a_data_set_is_a_tree_or_items(value: Any) -> None:
    data = as_data_set(value, "mine")
    assert isinstance(data, MapStyleSet if isinstance(value, list) else TensorSet)
    floats, integers = tensors_of(next(data.batches([np.array([2, 0])], F64)))
    assert (floats.dtype, integers.dtype) == (F64, torch.int64)
    assert floats.tolist() == [[4, 5], [0, 1]]
    assert integers.tolist() == [2, 0]


class Endless(IterableDataset[int]):
    """No map-style data set."""

    def __iter__(self) -> Iterator[int]:
        return iter(())


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ({"inputs": torch.zeros(3), "names": ["a", "b", "c"]}, "tensors and str"),
        ((torch.zeros(3), torch.zeros(4)), r"tensors of \[3, 4\] rows"),
        (torch.zeros(0, 2), "without samples"),
        ([], "without samples"),
        (Endless(), "a map-style data set is needed"),
        (None, "a map-style data set is needed"),
    ],
)
def test_what_is_no_data_set_is_told(value: Any, told: str) -> None:
    with pytest.raises(DataError, match=f"^mine gave .*{told}"):
        as_data_set(value, "mine")


def test_an_item_that_fails_is_told_with_its_line() -> None:
    class Broken(Noisy):
        def __getitem__(self, index: int) -> dict[str, Any]:
            return {"index": index / (index - 4)}

    with pytest.raises(
        DataError, match=r"(?s)sample 4 of mine cannot be used: ZeroDivisionError.*test_tree_set\.py, line"
    ):
        list(as_data_set(Broken(), "mine").batches([np.arange(6)], F64))


def test_items_of_other_shapes_are_told() -> None:
    with pytest.raises(DataError, match="cannot be collated"):
        list(as_data_set([torch.zeros(2), torch.zeros(3)], "mine").batches([np.arange(2)], F64))


def test_a_held_out_part_by_hash_is_disjoint_complete_and_nearly_stable() -> None:
    train, held_out = split_by_hash(1000, 0.2, seed=0)
    assert sorted([*train, *held_out]) == list(range(1000))
    assert 150 < len(held_out) < 250
    assert set(held_out) <= set(split_by_hash(1100, 0.2, seed=0)[1])
    assert set(held_out) != set(split_by_hash(1000, 0.2, seed=1)[1])
    assert [len(part) for part in split_by_hash(3, 0.001, seed=0)] == [2, 1]
    assert [len(part) for part in split_by_hash(3, 0.999, seed=0)] == [2, 1]


def test_trees_keep_their_form() -> None:
    assert rows({"size": (32, 32), "scale": torch.tensor(3.0)}, 0, 1) == {"size": (32, 32), "scale": torch.tensor(3.0)}
    tree = {"pair": Pair(torch.arange(4), [torch.arange(4.0)]), "names": ["a", "b", "c", "d"], "scale": 2.0}
    cut = rows(tree, 1, 3)
    assert (cut["pair"].left.tolist(), cut["pair"].right[0].tolist()) == ([1, 2], [1, 2])
    assert (cut["names"], cut["scale"]) == (["b", "c"], 2.0)
    assert map_tensors(lambda tensor: tensor * 2, tree)["pair"].left.tolist() == [0, 2, 4, 6]


def test_an_empty_micro_batch_has_a_stand_in() -> None:
    data = {"x": torch.arange(3.0), "names": ["a", "b", "c"]}
    batch = DataBatch(data["x"], 9, data, np.arange(3), 0)
    parts = batch.split(4, allow_empty=True)
    assert [len(part) for part in parts] == [1, 1, 1, 0]
    assert [part.inputs.tolist() for part in parts] == [[0], [1], [2], [0]]
    assert [part.data["names"] for part in parts] == [["a"], ["b"], ["c"], ["a"]]
