"""Batch loader: each sample once an epoch, in an order independent of the number of shards, from any position."""

import numpy as np
import pytest
import torch

from lockstep.data.batch import DataBatch
from lockstep.data.built_in import load_synthetic
from lockstep.data.loader import BatchLoader
from lockstep.data.sharding import Sharding

DATA = load_synthetic(num_samples=50, train=True)


def _loader(
    shard_id: int = 0, num_shards: int = 1, sharding: Sharding = "contiguous", batch_size: int = 8
) -> BatchLoader:
    return BatchLoader(DATA, batch_size, sharding, shard_id, num_shards, seed=11, dtype=torch.float32)


def _global_batches(num_shards: int, sharding: Sharding) -> list[list[int]]:
    shards = [list(_loader(index, num_shards, sharding).rest_of_epoch()) for index in range(num_shards)]
    for parts in zip(*shards, strict=True):
        assert sum(len(part.ids) for part in parts) == parts[0].global_size
    return [sorted(sample for part in parts for sample in part.ids.tolist()) for parts in zip(*shards, strict=True)]


@pytest.mark.parametrize("sharding", ["contiguous", "random", "hash"])
@pytest.mark.parametrize("num_shards", [2, 3, 9])
def test_the_global_batches_do_not_depend_on_the_number_of_shards(num_shards: int, sharding: Sharding) -> None:
    batches = _global_batches(num_shards, sharding)
    assert batches == _global_batches(1, "contiguous")
    assert [len(batch) for batch in batches] == [8, 8, 8, 8, 8, 8, 2]
    assert sorted(sample for batch in batches for sample in batch) == list(range(50))


def test_epochs_differ_and_the_position_moves_on() -> None:
    loader = _loader()
    first, second = ([batch.ids.tolist() for batch in loader.rest_of_epoch()] for _ in range(2))
    assert first != second
    assert (loader.epoch, loader.consumed) == (2, 0)


@pytest.mark.parametrize("batches_before_the_stop", [0, 1, 6, 7])
def test_a_new_loader_goes_on_from_any_position(batches_before_the_stop: int) -> None:
    def ids(batches: list[DataBatch]) -> list[list[int]]:
        return [batch.ids.tolist() for batch in batches]

    reference = _loader()
    expected = ids(list(reference.rest_of_epoch()) + list(reference.rest_of_epoch()))
    stopped = _loader()
    running = stopped.rest_of_epoch()
    done = ids([next(running) for _ in range(batches_before_the_stop)])
    resumed = _loader()
    resumed.epoch, resumed.consumed = stopped.epoch, stopped.consumed
    rest = ids(list(resumed.rest_of_epoch()) + list(resumed.rest_of_epoch()))
    assert done + rest == expected


def test_batches_carry_their_number_in_the_epoch() -> None:
    loader = _loader()
    assert [batch.index for batch in loader.rest_of_epoch()] == list(range(loader.updates_per_epoch))


def test_pixels_are_normalised_as_in_the_seed() -> None:
    batch = next(_loader().rest_of_epoch())
    pixels = DATA.images[torch.from_numpy(batch.ids)].numpy()
    expected = (pixels.astype(np.float32) / 255 - 0.5) / 0.5  # ToTensor, then Normalize((0.5,), (0.5,))
    assert np.array_equal(batch.inputs.numpy(), expected)
    assert batch.inputs.dtype == torch.float32
    assert torch.equal(batch.data[1], DATA.labels[torch.from_numpy(batch.ids)])


def test_the_position_after_a_number_of_batches_is_where_the_loader_is_then() -> None:
    loader = _loader()
    assert loader.position_after(0) == (0, 0)
    num_batches = 0
    for _ in range(3):
        for _ in loader.rest_of_epoch():
            num_batches += 1
            assert loader.position_after(num_batches) == (loader.epoch, loader.consumed)
    assert num_batches == 3 * 7
