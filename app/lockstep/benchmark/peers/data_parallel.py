"""Peers: the same training in plain PyTorch, in one process; over gloo in its DistributedDataParallel, its
ZeroRedundancyOptimizer (ZeRO stage 1) and its FSDP2 (stage 3; with --keep 2); and as in Horovod's own MNIST example.

python -m lockstep.benchmark.peers.data_parallel plain [--pin]
torchrun --standalone --nproc-per-node 2 -m lockstep.benchmark.peers.data_parallel ddp [--pin]
torchrun --standalone --nproc-per-node 2 -m lockstep.benchmark.peers.data_parallel zero_redundancy [--pin]
torchrun --standalone --nproc-per-node 2 -m lockstep.benchmark.peers.data_parallel fsdp2 [--keep] [--pin]
horovodrun -np 2 python -m lockstep.benchmark.peers.data_parallel horovod [--pin]

Several plain copies at once show the limit for ranks that communicate. Each copy gets its LOCAL_RANK and
LOCAL_WORLD_SIZE, by which it chooses its cores. Those that shard train a vision transformer of 49.7 million parameters
by Adam, the others the reference network.
"""

import argparse
import os
from collections import OrderedDict

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler

from lockstep.benchmark.peers.common import (
    BATCH_SIZE_PER_RANK,
    LEARNING_RATE,
    MOMENTUM,
    WEIGHT_DECAY,
    Digits,
    measure,
    peer_parser,
    set_threads,
    update_of,
)
from lockstep.models.networks import Net, vit_blocks

LARGE_BATCH_SIZE_PER_RANK = 8
LARGE_LEARNING_RATE = 1e-6  # timed updates must not diverge to NaN


def main() -> None:
    parser = peer_parser(__doc__)
    parser.add_argument("kind", choices=["plain", "ddp", "zero_redundancy", "fsdp2", "horovod"])
    parser.add_argument("--keep", action="store_true", help="of fsdp2: keep parameters after the forward pass")
    arguments = parser.parse_args()
    {"plain": _plain, "horovod": _horovod}.get(arguments.kind, _over_gloo)(arguments)


def _plain(arguments: argparse.Namespace) -> None:
    set_threads(arguments.pin, int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    torch.manual_seed(0)
    loader = DataLoader(Digits(), BATCH_SIZE_PER_RANK, shuffle=True, drop_last=True)
    model = Net()
    measure(update_of(model, _optimizer(model)), loader, arguments, synchronise=lambda: None)


def _over_gloo(arguments: argparse.Namespace) -> None:
    set_threads(arguments.pin, int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"]))
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    data_set = Digits()
    sampler: DistributedSampler[int] = DistributedSampler(data_set)
    batch_size = BATCH_SIZE_PER_RANK if arguments.kind == "ddp" else LARGE_BATCH_SIZE_PER_RANK
    loader = DataLoader(data_set, batch_size, sampler=sampler, drop_last=True)
    model, optimizer = _ddp() if arguments.kind == "ddp" else _sharded(arguments)
    update = update_of(model, optimizer)
    measure(update, loader, arguments, dist.barrier, dist.get_rank(), dist.get_world_size(), batch_size)
    dist.destroy_process_group()


def _ddp() -> tuple[nn.Module, torch.optim.Optimizer]:
    model = DistributedDataParallel(Net())
    return model, _optimizer(model)


def _sharded(arguments: argparse.Namespace) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = nn.Sequential(OrderedDict(vit_blocks(width=768, depth=7, num_heads=12, patch_size=7, dropout=0.0)))
    if arguments.kind == "fsdp2":
        _shard_fully(model, keep=arguments.keep)
        return model, torch.optim.Adam(model.parameters(), lr=LARGE_LEARNING_RATE)
    optimizer = ZeroRedundancyOptimizer(model.parameters(), optimizer_class=torch.optim.Adam, lr=LARGE_LEARNING_RATE)
    return DistributedDataParallel(model), optimizer


def _shard_fully(model: nn.Module, keep: bool) -> None:
    """Shard `model` in place, each block by itself; with `keep`, parameters stay gathered until the backward pass."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in model.children():
        if any(True for _ in block.parameters()):
            fully_shard(block, mesh=mesh, reshard_after_forward=not keep)
    fully_shard(model, mesh=mesh, reshard_after_forward=not keep)


def _horovod(arguments: argparse.Namespace) -> None:
    import horovod.torch as hvd  # an MPI process could not be one of torchrun's

    set_threads(arguments.pin, _from_launcher("LOCAL_RANK"), _from_launcher("LOCAL_SIZE"))
    hvd.init()
    torch.manual_seed(0)
    data_set = Digits()
    sampler: DistributedSampler[int] = DistributedSampler(data_set, num_replicas=hvd.size(), rank=hvd.rank())
    loader = DataLoader(data_set, BATCH_SIZE_PER_RANK, sampler=sampler, drop_last=True)
    model = Net()
    optimizer = _optimizer(model)
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    hvd.broadcast_optimizer_state(optimizer, root_rank=0)
    optimizer = hvd.DistributedOptimizer(optimizer, named_parameters=model.named_parameters(), op=hvd.Average)
    measure(update_of(model, optimizer), loader, arguments, hvd.barrier, hvd.rank(), hvd.size())


def _optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), LEARNING_RATE, MOMENTUM, weight_decay=WEIGHT_DECAY)


def _from_launcher(name: str) -> int:
    """Read a rank or size from the launcher's variables: cores must be pinned before `hvd.init()` starts threads."""
    return int(os.environ.get(f"OMPI_COMM_WORLD_{name}") or os.environ[f"HOROVOD_{name}"])


if __name__ == "__main__":
    main()
