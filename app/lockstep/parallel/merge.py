"""Model sharding, parameter sync and merging (reference, sections 4.2, 4.3 and step 5 of 3): pure functions of tensors.

A sharded model maps each tensor's name to its shards in order. Tensors are cut by elements, in row-major order, into a
*number* of shards that differ by one element at most; the reference's `split(num_shards)` cut by *size*.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lockstep.data.sharding import content_hash, shard_bounds
from lockstep.runtime.errors import ReplicasDifferError

if TYPE_CHECKING:  # importing it makes this process an MPI rank
    from lockstep.comm.cluster import Cluster

ShardedTensors = dict[str, list[Tensor]]


def shard_model(model: nn.Module | Mapping[str, Tensor], num_shards: int) -> ShardedTensors:
    """Cut every parameter and buffer of `model` into `num_shards` flat shards (reference, section 4.2).

    Returns:
        name -> `num_shards` tensors (n,), in order; the last shards of a small tensor may be empty. They are views
        of the model's tensors; copies only where a tensor is not contiguous, such as a channels-last one.
    """
    return {name: _parts(tensor, num_shards) for name, tensor in state_tensors(model).items()}


def sync_params(sharded: Mapping[str, Sequence[Tensor]], params: Mapping[str, Sequence[Tensor]]) -> None:
    """Overwrite the shards in `sharded` with those of `params`, in place (reference, section 4.3).

    Raises:
        ValueError: `params` lacks a tensor, or has other numbers or lengths of shards; nothing is changed then.
    """
    for name, parts in sharded.items():
        have, want = [len(part) for part in params.get(name, ())], [len(part) for part in parts]
        if have != want:
            raise ValueError(f"{name}: parts of {want} elements cannot be synchronised from parts of {have}")
    for name, parts in sharded.items():
        for part, source in zip(parts, params[name], strict=True):
            part.copy_(source)


def merge_shards(
    sharded: Mapping[str, Sequence[Tensor]], meta_state: nn.Module | Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Join the shards of every tensor (reference, step 5 of section 3): the inverse of `shard_model`.

    Args:
        sharded: the shards, for every name in `meta_state`.
        meta_state: gives names and shapes; its values are not used.

    Raises:
        ValueError: the shards of a tensor are missing, or do not add up to its shape.
    """
    merged = {}
    for name, tensor in state_tensors(meta_state).items():
        num_elements = sum(part.numel() for part in sharded.get(name, ()))
        if name not in sharded or num_elements != tensor.numel():
            raise ValueError(f"{name}: its parts hold {num_elements} of {tensor.numel()} elements")
        merged[name] = torch.cat(list(sharded[name])).view(tensor.shape)
    return merged


def merge_on_root(
    cluster: "Cluster",
    meta_state: Mapping[str, Tensor],
    shard_of: Callable[[str], Tensor],
    write: Callable[[str, Tensor], None] | None,
) -> None:
    """Collective: merge a model that is sharded over all ranks, tensor by tensor, so that rank 0 needs memory for the
    largest tensor only (reference, step 5 of section 3).

    Args:
        meta_state: gives names, shapes and data types.
        shard_of: this rank's flat shard (n,) of a tensor, or an empty one; in rank order they are the tensor.
        write: what rank 0 does with each merged tensor.

    Raises:
        ReplicasDifferError: on rank 0: a shard is not what its rank has sent, or shards are missing.
    """
    for name, tensor in meta_state.items():
        mine = shard_of(name).to(tensor.dtype)
        sent_hashes = cluster.all_gather_object(content_hash(mine))
        shards = cluster.gather_parts(mine)
        for rank, (shard, sent_hash) in enumerate(zip(shards, sent_hashes, strict=False)):
            if content_hash(shard) != sent_hash:
                raise ReplicasDifferError(f"the merge of {name}: what came from rank {rank} is not what it sent")
        if cluster.is_root and write:
            write(name, merge_shards({name: shards}, meta_state={name: tensor})[name])


def meta_state_of(model: nn.Module) -> dict[str, Tensor]:
    """Describe all parameters and persistent buffers by tensors on the meta device: names, shapes, data types."""
    return {name: torch.empty_like(tensor, device="meta") for name, tensor in state_tensors(model).items()}


def first_names(model: nn.Module) -> dict[str, str]:
    """Map each name of each parameter to the first of that parameter's names: tied weights have several."""
    known: dict[Tensor, str] = {}
    parameters = model.named_parameters(remove_duplicate=False)
    return {name: known.setdefault(parameter, name) for name, parameter in parameters}


def state_tensors(model: nn.Module | Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Collect parameters and persistent buffers by name, detached, in the order of the model."""
    return model.state_dict() if isinstance(model, nn.Module) else model


def state_digest(model: nn.Module | Mapping[str, Tensor]) -> str:
    """The sha256 over the names and the whole content of all parameters and buffers, hexadecimal."""
    return digest_of_hashes({name: content_hash(tensor) for name, tensor in state_tensors(model).items()})


def digest_of_hashes(hashes: Mapping[str, str]) -> str:
    """The `state_digest` of a model, from the `content_hash` of each of its tensors."""
    digest = hashlib.sha256()
    for name, of_tensor in sorted(hashes.items()):
        digest.update(f"{name}:{of_tensor}\n".encode())
    return digest.hexdigest()


def _parts(tensor: Tensor, num_shards: int) -> list[Tensor]:
    bounds = shard_bounds(tensor.numel(), num_shards)
    flat = tensor.detach().reshape(-1)
    return [flat[start:stop] for start, stop in pairwise(bounds)]
