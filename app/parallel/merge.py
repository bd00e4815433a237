"""Model sharding, parameter sync and merging (seed, sections 4.2, 4.3 and step 5 of 3): pure functions of tensors.

A model in parts maps each tensor's name to its parts in order. Tensors are cut by elements, in row-major order, into a
*number* of parts that differ by one element at most; the seed's `split(num_shards)` cut by *size*.
"""

import hashlib
from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from app.data.sharding import content_hash, shard_bounds

ShardedTensors = dict[str, list[Tensor]]


def shard_model(model: nn.Module | Mapping[str, Tensor], num_shards: int) -> ShardedTensors:
    """Cut every parameter and buffer of `model` into `num_shards` flat parts (seed, section 4.2).

    Returns:
        name -> `num_shards` copies of shape (n,), in order; the last parts of a small tensor may be empty.
    """
    return {
        name: [part.clone() for part in _parts(tensor, num_shards)] for name, tensor in state_tensors(model).items()
    }


def sync_params(sharded: ShardedTensors, params: Mapping[str, Sequence[Tensor]]) -> None:
    """Overwrite the parts in `sharded` with those of `params`, in place (seed, section 4.3).

    Raises:
        ValueError: `params` lacks a tensor, or has it in parts of other numbers or lengths; nothing is changed then.
    """
    for name, parts in sharded.items():
        have, want = [len(part) for part in params.get(name, ())], [len(part) for part in parts]
        if have != want:
            raise ValueError(f"{name}: parts of {want} elements cannot be synchronised from parts of {have}")
    for name, parts in sharded.items():
        for part, source in zip(parts, params[name], strict=True):
            part.copy_(source)


def merge_shards(sharded: Mapping[str, Sequence[Tensor]], like: nn.Module | Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Put the parts of every tensor together again (seed, step 5 of section 3): the inverse of `shard_model`.

    Args:
        sharded: the parts, for every name in `like`.
        like: gives names and shapes; its values are not used.

    Raises:
        ValueError: the parts of a tensor are missing, or do not add up to its shape.
    """
    merged = {}
    for name, tensor in state_tensors(like).items():
        num_elements = sum(part.numel() for part in sharded.get(name, ()))
        if name not in sharded or num_elements != tensor.numel():
            raise ValueError(f"{name}: its parts hold {num_elements} of {tensor.numel()} elements")
        merged[name] = torch.cat(list(sharded[name])).view(tensor.shape)
    return merged


def shard_of(tensor: Tensor, shard_id: int, num_shards: int) -> Tensor:
    """One flat part (n,) of `tensor`; a view where the tensor is contiguous."""
    return _parts(tensor, num_shards)[shard_id]


def state_tensors(model: nn.Module | Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Parameters and persistent buffers by name, detached, in the order of the model."""
    return model.state_dict() if isinstance(model, nn.Module) else model


def state_digest(model: nn.Module | Mapping[str, Tensor]) -> str:
    """The sha256 over the names and the whole content of all parameters and buffers, hexadecimal."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state_tensors(model).items()):
        digest.update(f"{name}:{content_hash(tensor)}\n".encode())
    return digest.hexdigest()


def _parts(tensor: Tensor, num_shards: int) -> list[Tensor]:
    bounds = shard_bounds(tensor.numel(), num_shards)
    flat = tensor.detach().reshape(-1)
    return [flat[start:stop] for start, stop in pairwise(bounds)]
