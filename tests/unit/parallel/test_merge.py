"""Model sharding, parameter sync and merging, as the reference means them."""

import pytest
import torch
from torch import nn

from lockstep.models.networks import Net
from lockstep.parallel.merge import merge_shards, shard_model, state_digest, sync_params


def _model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(12, 5))


@pytest.mark.parametrize("num_shards", [1, 2, 3, 4, 7, 100])
def test_a_model_is_cut_into_that_number_of_parts_and_merges_again(num_shards: int) -> None:
    """The reference's sketch cuts into parts *of size* num_shards: another number of parts for every tensor."""
    model = _model()
    sharded = shard_model(model, num_shards)
    for parts in sharded.values():
        assert len(parts) == num_shards
        lengths = [len(part) for part in parts]
        assert max(lengths) - min(lengths) <= 1
    merged = merge_shards(sharded, meta_state=model)
    assert list(merged) == list(model.state_dict())
    for name, tensor in model.state_dict().items():
        assert torch.equal(merged[name], tensor)
        assert merged[name].dtype == tensor.dtype
    assert state_digest(merged) == state_digest(model)


def test_parts_are_views() -> None:
    """What is written to a shard is written to the model: so a strategy keeps a part, or loads one, without a copy."""
    model, zeros = _model(), _model()
    for tensor in zeros.state_dict().values():
        tensor.zero_()
    sync_params(shard_model(model, 2), shard_model(zeros, 2))
    assert state_digest(model) == state_digest(zeros)


def test_non_contiguous_weights_merge_in_their_own_order() -> None:
    model = _model().to(memory_format=torch.channels_last)
    merged = merge_shards(shard_model(model, 3), meta_state=model)
    assert all(torch.equal(merged[name], tensor) for name, tensor in model.state_dict().items())


def test_a_cut_is_by_number_not_by_size() -> None:
    tensor = torch.arange(10.0).view(2, 5)
    assert [part.tolist() for part in shard_model({"": tensor}, 3)[""]] == [[0, 1, 2], [3, 4, 5], [6, 7, 8, 9]]


def test_sync_params_overwrites_every_part_in_place() -> None:
    mine, theirs = shard_model(_model(), 3), shard_model(Net(), 3)
    with pytest.raises(ValueError, match=r"0\.weight"):
        sync_params(mine, theirs)
    torch.manual_seed(1)
    other = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(12, 5))
    storage = mine["3.weight"][1].data_ptr()
    sync_params(mine, shard_model(other, 3))
    assert mine["3.weight"][1].data_ptr() == storage
    assert state_digest(merge_shards(mine, meta_state=other)) == state_digest(other)


def test_sync_params_changes_nothing_where_the_parts_do_not_fit() -> None:
    mine = shard_model(_model(), 3)
    before = state_digest(merge_shards(mine, meta_state=_model()))
    with pytest.raises(ValueError, match="parts of"):
        sync_params(mine, {**shard_model(_model().double(), 3), "3.bias": []})
    assert state_digest(merge_shards(mine, meta_state=_model())) == before


@pytest.mark.parametrize("damage", ["missing", "short"])
def test_a_merge_without_all_parts_is_refused(damage: str) -> None:
    model = _model()
    sharded = shard_model(model, 3)
    if damage == "missing":
        del sharded["0.bias"]
    else:
        sharded["0.bias"].pop()
    with pytest.raises(ValueError, match=r"0\.bias: its parts hold"):
        merge_shards(sharded, meta_state=model)


def test_the_digest_sees_one_bit_and_every_name() -> None:
    model, other = _model(), _model()
    assert state_digest(model) == state_digest(other)
    other.get_buffer("1.running_mean").view(torch.int32)[2] ^= 1
    assert state_digest(model) != state_digest(other)
    renamed = {f"{name}!": tensor for name, tensor in model.state_dict().items()}
    assert state_digest(renamed) != state_digest(model)
