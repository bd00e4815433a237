"""A peer: PyTorch's ZeroRedundancyOptimizer (ZeRO stage 1) beside DistributedDataParallel, over gloo.

torchrun --standalone --nproc-per-node 2 -m lockstep.benchmark.peers.zero_redundancy [--pin]
"""

import torch
from torch import nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

from lockstep.benchmark.peers.sharding import train


def build(model: nn.Module, learning_rate: float) -> tuple[nn.Module, torch.optim.Optimizer]:
    optimizer = ZeroRedundancyOptimizer(model.parameters(), optimizer_class=torch.optim.Adam, lr=learning_rate)
    return DistributedDataParallel(model), optimizer


if __name__ == "__main__":
    train(__doc__, build)
