"""Model sharding, parameter sync and merging (reference, sections 4.2, 4.3 and step 5 of 3): pure functions of tensors.

A model in parts maps each tensor's name to its parts in order. Tensors are cut by elements, in row-major order, into a
*number* of parts that differ by one element at most; the reference's `split(num_shards)` cut by *size*.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lockstep.data.sharding import content_hash, shard_bounds
from lockstep.runtime.errors import ReplicasDifferError

if TYPE_CHECKING:  # to import it for good is to become an MPI process
    from lockstep.comm.cluster import Cluster

ShardedTensors = dict[str, list[Tensor]]


def shard_model(model: nn.Module | Mapping[str, Tensor], num_shards: int) -> ShardedTensors:
    """Cut every parameter and buffer of `model` into `num_shards` flat parts (reference, section 4.2).

    Returns:
        name -> `num_shards` tensors (n,), in order; the last parts of a small tensor may be empty. They are views of
        the model's tensors, not copies; only of a tensor that is not contiguous, such as a channels-last one, copies.
    """
    return {name: _parts(tensor, num_shards) for name, tensor in state_tensors(model).items()}


def sync_params(sharded: Mapping[str, Sequence[Tensor]], params: Mapping[str, Sequence[Tensor]]) -> None:
    """Overwrite the parts in `sharded` with those of `params`, in place (reference, section 4.3).

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


def merge_shards(
    sharded: Mapping[str, Sequence[Tensor]], meta_state: nn.Module | Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Put the parts of every tensor together again (reference, step 5 of section 3): the inverse of `shard_model`.

    Args:
        sharded: the parts, for every name in `meta_state`.
        meta_state: gives names and shapes; its values are not used.

    Raises:
        ValueError: the parts of a tensor are missing, or do not add up to its shape.
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
    part_of: Callable[[str], Tensor],
    write: Callable[[str, Tensor], None] | None,
) -> None:
    """Collective: merge a model that lives in parts on all ranks, tensor by tensor, so that rank 0 needs memory for the
    largest tensor only (reference, step 5 of section 3).

    Args:
        meta_state: gives names, shapes and data types.
        part_of: this rank's flat part (n,) of a tensor, or an empty one; in the order of the ranks they make it up.
        write: what rank 0 does with each merged tensor.

    Raises:
        ReplicasDifferError: on rank 0: a part is not what its rank has sent, or parts are missing.
    """
    for name, tensor in meta_state.items():
        mine = part_of(name).to(tensor.dtype)
        vouched = cluster.all_gather_object(content_hash(mine))
        parts = cluster.gather_parts(mine)
        for rank, (part, of_rank) in enumerate(zip(parts, vouched, strict=False)):
            if content_hash(part) != of_rank:
                raise ReplicasDifferError(f"the merge of {name}: the part that came from rank {rank} is another")
        if cluster.is_root and write:
            write(name, merge_shards({name: parts}, meta_state={name: tensor})[name])


def meta_state_of(model: nn.Module) -> dict[str, Tensor]:
    """Names, shapes and data types of all parameters and persistent buffers, as tensors without content."""
    return {name: torch.empty_like(tensor, device="meta") for name, tensor in state_tensors(model).items()}


def first_names(model: nn.Module) -> dict[str, str]:
    """Each name of each parameter -> the first of that parameter's names: tied weights have several."""
    known: dict[Tensor, str] = {}
    parameters = model.named_parameters(remove_duplicate=False)
    return {name: known.setdefault(parameter, name) for name, parameter in parameters}


def state_tensors(model: nn.Module | Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Parameters and persistent buffers by name, detached, in the order of the model."""
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
