"""A peer: Horovod's DistributedOptimizer, in the style of Horovod's own MNIST example.

horovodrun -np 2 python -m lockstep.benchmark.peers.horovod_example [--pin]
"""

import os

import horovod.torch as hvd
import torch
import torch.nn.functional as F
from torch import Tensor
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
    set_threads(arguments.pin, _from_launcher("LOCAL_RANK"), _from_launcher("LOCAL_SIZE"))
    hvd.init()
    torch.manual_seed(0)
    data_set = Digits()
    sampler: DistributedSampler[int] = DistributedSampler(data_set, num_replicas=hvd.size(), rank=hvd.rank())
    loader = DataLoader(data_set, BATCH_SIZE_PER_RANK, sampler=sampler, drop_last=True)
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), LEARNING_RATE, MOMENTUM, weight_decay=WEIGHT_DECAY)
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    hvd.broadcast_optimizer_state(optimizer, root_rank=0)
    optimizer = hvd.DistributedOptimizer(optimizer, named_parameters=model.named_parameters(), op=hvd.Average)

    def update(images: Tensor, labels: Tensor) -> Tensor:
        optimizer.zero_grad()
        loss = F.nll_loss(model(images), labels)
        loss.backward()
        optimizer.step()
        return loss

    measure(update, loader, arguments, hvd.barrier, hvd.rank(), hvd.size())


def _from_launcher(name: str) -> int:
    """Read a rank or size from the launcher's variables: cores must be pinned before `hvd.init()` starts threads."""
    return int(os.environ.get(f"OMPI_COMM_WORLD_{name}") or os.environ[f"HOROVOD_{name}"])


if __name__ == "__main__":
    main()
