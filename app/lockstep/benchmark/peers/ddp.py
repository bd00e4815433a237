"""A peer: PyTorch's DistributedDataParallel over gloo.

torchrun --standalone --nproc-per-node 2 -m lockstep.benchmark.peers.ddp [--pin]
"""

import os

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
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
)
from lockstep.models.networks import Net


def main() -> None:
    arguments = peer_parser(__doc__).parse_args()
    set_threads(arguments.pin, int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"]))
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    data_set = Digits()
    sampler: DistributedSampler[int] = DistributedSampler(data_set)
    loader = DataLoader(data_set, BATCH_SIZE_PER_RANK, sampler=sampler, drop_last=True)
    model = DistributedDataParallel(Net())
    optimizer = torch.optim.SGD(model.parameters(), LEARNING_RATE, MOMENTUM, weight_decay=WEIGHT_DECAY)

    def update(images: Tensor, labels: Tensor) -> Tensor:
        optimizer.zero_grad()
        loss = F.nll_loss(model(images), labels)
        loss.backward()
        optimizer.step()
        return loss

    measure(update, loader, arguments, dist.barrier, dist.get_rank(), dist.get_world_size())
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
