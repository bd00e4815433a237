"""The record of what a run ran on: versions, hardware, ranks and launch line."""

import os
import platform
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from lockstep import __version__
from lockstep.comm.cluster import Cluster
from lockstep.comm.horovod_library import gpu_left_idle, horovod_operations
from lockstep.comm.mpi_library import mpi_version
from lockstep.runtime.affinity import allowed_cpus, format_cpus
from lockstep.runtime.command_line import this_program

PACKAGES = ("torch", "torchvision", "horovod", "mpi4py", "numpy", "safetensors")


def take_inventory(cluster: Cluster) -> dict[str, Any]:
    """Collective: command line, versions, and the hardware and binding of every rank."""
    ranks = cluster.all_gather_object(_describe_rank(cluster))
    return {
        "command": [*this_program(), *sys.argv[1:]],
        "versions": {
            "lockstep": __version__,
            "python": platform.python_version(),
            **{package: version(package) for package in PACKAGES},
            "mpi": mpi_version(),
            "horovod_operations": horovod_operations(),
            "cuda": torch.version.cuda,
            "nccl": ".".join(map(str, torch.cuda.nccl.version())) if cluster.device.type == "cuda" else None,
        },
        "ranks": [{"rank": rank, **description} for rank, description in enumerate(ranks)],
    }


def describe_briefly(cluster: Cluster, inventory: dict[str, Any]) -> str:
    """One line for the user: ranks, nodes, device and versions."""
    nodes = {rank["node"] for rank in inventory["ranks"]}
    device = inventory["ranks"][0]["gpu"] or f"CPU, threads a rank: {torch.get_num_threads()}"
    if gpu_left_idle():
        device += " (a GPU is here, but Horovod was built without NCCL: give env/setup a CUDA toolkit)"
    versions = inventory["versions"]
    return (
        f"Lockstep {versions['lockstep']}: {cluster.size} rank(s) on {len(nodes)} node(s), {device}; "
        f"Horovod {versions['horovod']}, torch {versions['torch']}, {versions['mpi']}"
    )


def describe_binding(inventory: dict[str, Any]) -> list[str]:
    """Lines for the user: the CPUs and GPU of each local rank, once for all nodes that are alike; then a warning
    if ranks share CPUs.
    """
    nodes: dict[str, list[dict[str, Any]]] = {}
    for rank in inventory["ranks"]:
        nodes.setdefault(rank["node"], []).append(rank)
    alike: dict[str, list[str]] = {}
    for node, ranks in nodes.items():
        places = [format_cpus(rank["cpus"]) + (f" and {rank['device']}" if rank["gpu"] else "") for rank in ranks]
        alike.setdefault(f"{' | '.join(places)} of {ranks[0]['num_cpus_of_node']}", []).append(node)
    lines = [f"CPUs by local rank: {places} ({_and_others(names)})" for places, names in alike.items()]
    overlaps = {node: overlap for node, ranks in nodes.items() if (overlap := _overlap(ranks))}
    if overlaps:
        node, (first, second, cpus) = next(iter(overlaps.items()))
        shared = f"ranks {first} and {second} share CPU {format_cpus(cpus)} of {_and_others(list(overlaps))}"
        if len(nodes[node]) > len({cpu for rank in nodes[node] for cpu in rank["cpus"]}):
            lines.append(f"warning: {shared}: there are more ranks than CPUs, and each waits for all")
        else:
            lines.append(f"warning: {shared}: so the launcher has bound them; --bind-to none leaves it to Lockstep")
    return lines


def _overlap(ranks: list[dict[str, Any]]) -> tuple[int, int, list[int]] | None:
    """The first two ranks of a node that share CPUs, and these CPUs."""
    owner: dict[int, int] = {}
    for rank in ranks:
        shared = [cpu for cpu in rank["cpus"] if cpu in owner]
        if shared:
            first = owner[shared[0]]
            return first, rank["rank"], [cpu for cpu in shared if owner[cpu] == first]
        owner.update(dict.fromkeys(rank["cpus"], rank["rank"]))
    return None


def _and_others(nodes: list[str]) -> str:
    return nodes[0] if len(nodes) == 1 else f"{nodes[0]} and {len(nodes) - 1} more nodes"


def _describe_rank(cluster: Cluster) -> dict[str, Any]:
    cuda = cluster.device.type == "cuda"
    return {
        "node": platform.node(),
        "pid": os.getpid(),
        "device": str(cluster.device),
        "gpu": torch.cuda.get_device_name(cluster.device) if cuda else None,
        "gpu_uuid": str(torch.cuda.get_device_properties(cluster.device).uuid) if cuda else None,
        "cpu": _cpu_name(),
        "cpus": sorted(allowed_cpus()),
        "num_cpus_of_node": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "kernel": platform.release(),
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
