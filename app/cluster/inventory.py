"""What a run ran on: versions, hardware, ranks and launch line, for the record."""

import os
import platform
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from app import __version__
from app.cluster.comm import Cluster, gpu_left_idle, horovod_operations, mpi_version

PACKAGES = ("torch", "torchvision", "horovod", "mpi4py", "numpy", "safetensors")


def take_inventory(cluster: Cluster) -> dict[str, Any]:
    """Collective: everything that another person needs to know about where this run ran."""
    ranks = cluster.all_gather_object(_describe_rank(cluster))
    return {
        "command": [sys.executable, *sys.argv],
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
    """One line for people."""
    nodes = {rank["node"] for rank in inventory["ranks"]}
    device = inventory["ranks"][0]["gpu"] or f"CPU, threads a rank: {torch.get_num_threads()}"
    if gpu_left_idle():
        device += " (a GPU is here, but Horovod was built without NCCL: give env/setup a CUDA toolkit)"
    versions = inventory["versions"]
    return (
        f"Lockstep {versions['lockstep']}: {cluster.size} rank(s) on {len(nodes)} node(s), {device}; "
        f"Horovod {versions['horovod']}, torch {versions['torch']}, {versions['mpi']}"
    )


def _describe_rank(cluster: Cluster) -> dict[str, Any]:
    cuda = cluster.device.type == "cuda"
    return {
        "node": platform.node(),
        "pid": os.getpid(),
        "device": str(cluster.device),
        "gpu": torch.cuda.get_device_name(cluster.device) if cuda else None,
        "gpu_uuid": str(torch.cuda.get_device_properties(cluster.device).uuid) if cuda else None,
        "cpu": _cpu_name(),
        "cores": sorted(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "kernel": platform.release(),
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
