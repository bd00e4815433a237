"""Peers: plain PyTorch in one process, its DistributedDataParallel over gloo, and Horovod's DistributedOptimizer in the
style of Horovod's own MNIST example.

python -m lockstep.benchmark.peers.data_parallel plain [--pin]
torchrun --standalone --nproc-per-node 2 -m lockstep.benchmark.peers.data_parallel ddp [--pin]
horovodrun -np 2 python -m lockstep.benchmark.peers.data_parallel horovod [--pin]

Several plain copies at once show the limit for ranks that communicate. Each copy gets its LOCAL_RANK and
LOCAL_WORLD_SIZE, by which it chooses its cores.
"""

import argparse
import os

import torch
import torch.distributed as dist
from torch import nn
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
from lockstep.models.networks import Net


def main() -> None:
    parser = peer_parser(__doc__)
    parser.add_argument("kind", choices=["plain", "ddp", "horovod"])
    arguments = parser.parse_args()
    {"plain": _plain, "ddp": _ddp, "horovod": _horovod}[arguments.kind](arguments)


def _plain(arguments: argparse.Namespace) -> None:
    set_threads(arguments.pin, int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    torch.manual_seed(0)
    loader = DataLoader(Digits(), BATCH_SIZE_PER_RANK, shuffle=True, drop_last=True)
    model = Net()
    measure(update_of(model, _optimizer(model)), loader, arguments, synchronise=lambda: None)


def _ddp(arguments: argparse.Namespace) -> None:
    set_threads(arguments.pin, int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"]))
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    data_set = Digits()
    sampler: DistributedSampler[int] = DistributedSampler(data_set)
    loader = DataLoader(data_set, BATCH_SIZE_PER_RANK, sampler=sampler, drop_last=True)
    model = DistributedDataParallel(Net())
    update = update_of(model, _optimizer(model))
    measure(update, loader, arguments, dist.barrier, dist.get_rank(), dist.get_world_size())
    dist.destroy_process_group()


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
