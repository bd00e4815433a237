"""Data sharding (reference, section 4.1) in pure functions of the shard's number.

All kinds of sharding give disjoint, complete and balanced shards: their sizes differ by one at most.
"""

import hashlib
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, Literal, TypeVar

import numpy as np
import numpy.typing as npt
import torch

Ids = npt.NDArray[np.int64]
Sharding = Literal["contiguous", "random", "hash"]
S = TypeVar("S", bound=Sequence[Any] | torch.Tensor | np.ndarray[Any, Any])


def shard_data(data: S, num_shards: int) -> dict[str, S]:
    """Cut `data` into `num_shards` contiguous shards, keyed by the sha256 of their content (reference, section 4.1).

    The key covers every element, type and shape of the shard, and its index, so that equal shards have different keys.

    Args:
        data: anything that has a length and can be sliced: a list, a tensor (N, ...), an array (N, ...).
        num_shards: at least 1; shards beyond the length of `data` are empty.

    Returns:
        The shards in the order of `data`.
    """
    bounds = shard_bounds(len(data), num_shards)
    shards = [data[start:stop] for start, stop in pairwise(bounds)]
    return {f"{index}-{content_hash(shard)}": shard for index, shard in enumerate(shards)}  # type: ignore[misc]


def content_hash(value: Any) -> str:
    """Compute the sha256 of the whole content of `value`, as hexadecimal text.

    It covers data type, shape and bytes of tensors and arrays; type, length and elements of sequences; the `repr` of
    anything else.
    """
    digest = hashlib.sha256()
    for part in _content(value):
        digest.update(part)
    return digest.hexdigest()


def _content(value: Any) -> Iterator[bytes | memoryview]:
    if isinstance(value, torch.Tensor):
        yield f"{value.dtype}{tuple(value.shape)};".encode()
        yield value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
    elif isinstance(value, np.ndarray) and value.dtype != object:
        yield f"{value.dtype.str}{value.shape};".encode()
        yield np.ascontiguousarray(value).data
    elif isinstance(value, list | tuple | np.ndarray):
        yield f"{type(value).__name__}({len(value)});".encode()
        for item in value:
            yield content_hash(item).encode()
    else:
        yield f"{type(value).__name__}:{value!r};".encode()


def shard_bounds(num_items: int, num_shards: int) -> list[int]:
    """Compute the bounds of `num_shards` shards of `num_items`: shard i is [i * n // k, (i + 1) * n // k)."""
    if num_shards < 1:
        raise ValueError(f"num_shards is {num_shards}: at least 1 is needed")
    return [index * num_items // num_shards for index in range(num_shards + 1)]


def data_shard(ids: Ids, shard_id: int, num_shards: int, sharding: Sharding, seed: int = 0, epoch: int = 0) -> Ids:
    """Select the ids of one data shard; all `num_shards` shards together hold each of `ids` once.

    Args:
        ids: (N,) numbers of samples.
        shard_id: 0 ... num_shards - 1.
        sharding: `contiguous` cuts `ids` in their given order; `random` after a permutation drawn from (seed, epoch);
            `hash` after sorting by sha256 of (seed, epoch, id), which does not depend on the given order.

    Returns:
        (n,) integers, n = N // num_shards or one more.
    """
    if not 0 <= shard_id < num_shards:
        raise ValueError(f"shard_id is {shard_id}: it must lie in 0 ... {num_shards - 1}")
    bounds = shard_bounds(len(ids), num_shards)
    if sharding == "random":
        # The stream 1 keeps this apart from `epoch_order`, which draws from (seed, epoch) itself.
        ids = np.random.default_rng((seed, epoch, 1)).permutation(ids)
    elif sharding == "hash":
        ids = np.array(sorted(ids.tolist(), key=lambda sample_id: _hash_key(sample_id, seed, epoch)), dtype=np.int64)
    return ids[bounds[shard_id] : bounds[shard_id + 1]]


def epoch_order(num_samples: int, seed: int, epoch: int) -> Ids:
    """Draw the order of all samples in an epoch: a permutation that depends on (seed, epoch) alone."""
    order: Ids = np.random.default_rng((seed, epoch)).permutation(num_samples)
    return order


def _hash_key(sample_id: int, seed: int, epoch: int) -> bytes:
    return hashlib.sha256(f"{seed}:{epoch}:{sample_id}".encode()).digest()
