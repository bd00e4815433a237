"""Choose the GPU and the cores of this rank, together with the other ranks of its node."""

import os
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch

from lockstep.runtime.affinity import (
    Cpus,
    allowed_cpus,
    choose_gpus,
    cpus_near,
    num_cores,
    pin,
    read_topology,
    share_cores,
)
from lockstep.runtime.errors import SettingsError

AllGather = Callable[[Any], list[Any]]
"""Collective over one node: every rank's value, in the order of the local ranks."""


def choose_device(all_gather: AllGather, local_rank: int, with_gpus: bool) -> torch.device:
    """Collective over one node: choose the GPU of this rank; the CPU without GPUs, or if not `with_gpus`."""
    num_gpus = torch.cuda.device_count() if with_gpus and torch.cuda.is_available() else 0
    visible = [str(torch.cuda.get_device_properties(index).uuid) for index in range(num_gpus)]
    index = choose_gpus(all_gather(visible))[local_rank]
    if index is None:
        return torch.device("cpu")
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def bind_to_cores(all_gather: AllGather, local_rank: int, device: torch.device) -> None:
    """Collective over one node: bind this rank to its share of the cores near its GPU, one compute thread each."""
    allowed = allowed_cpus()
    pools = all_gather((allowed & _cpus_near(device)) or allowed)
    topology = read_topology(frozenset().union(*pools))
    shares = share_cores(pools, topology)
    share = shares[local_rank]
    pin(share)
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, num_cores(share, topology) // shares.count(share)))


def gpu_name(device: torch.device, node: str) -> str | None:
    """A unique name of the GPU within the job; None for the CPU."""
    if device.type != "cuda":
        return None
    properties = torch.cuda.get_device_properties(device)
    return f"GPU {properties.uuid} ({properties.name}) on {node}"


def _cpus_near(device: torch.device) -> Cpus:
    if device.type != "cuda":
        return frozenset()
    gpu: Any = torch.cuda.get_device_properties(device)  # torch's type lacks the PCI address
    return cpus_near(f"{gpu.pci_domain_id:04x}:{gpu.pci_bus_id:02x}:{gpu.pci_device_id:02x}.0")


def check_gpus(names: Sequence[str | None]) -> None:
    """Raise a SettingsError, on every rank, if several ranks share a GPU.

    Args:
        names: every rank's `gpu_name`.
    """
    gpus = [name for name in names if name]
    if shared_gpus := [gpu for gpu, num_ranks in Counter(gpus).items() if num_ranks > 1]:
        raise SettingsError(
            f"several ranks share {shared_gpus[0]}, which NCCL refuses: start one rank for each GPU, or hide the "
            "GPUs to compute on the CPU: CUDA_VISIBLE_DEVICES= mpirun ..."
        ).as_shared()
