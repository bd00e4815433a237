"""What the sharding peers have in common: a vision transformer of 49.7 million parameters on the digits, with Adam."""

import os
from collections import OrderedDict
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler

from lockstep.benchmark.peers.common import Digits, measure, parse_args, set_threads
from lockstep.models.vit import vit_blocks

BATCH_SIZE_PER_RANK = 8
LEARNING_RATE = 1e-6  # timed updates must not diverge to NaN


def train(
    description: str | None, build: Callable[[nn.Module, float], tuple[nn.Module, torch.optim.Optimizer]]
) -> None:
    """Collective: train and measure the model and the optimizer that `build` makes of a model and a learning rate."""
    arguments = parse_args(description)
    set_threads(arguments.pin, int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"]))
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    data_set = Digits()
    sampler: DistributedSampler[int] = DistributedSampler(data_set)
    loader = DataLoader(data_set, BATCH_SIZE_PER_RANK, sampler=sampler, drop_last=True)
    model, optimizer = build(
        nn.Sequential(OrderedDict(vit_blocks(width=768, depth=7, num_heads=12, patch_size=7, dropout=0.0))),
        LEARNING_RATE,
    )

    def update(images: Tensor, labels: Tensor) -> Tensor:
        optimizer.zero_grad()
        loss = F.nll_loss(model(images), labels)
        loss.backward()
        optimizer.step()
        return loss

    measure(update, loader, arguments, dist.barrier, dist.get_rank(), dist.get_world_size(), BATCH_SIZE_PER_RANK)
    dist.destroy_process_group()


if __name__ == "__main__":
    raise SystemExit("start zero_redundancy.py or fsdp2.py")
