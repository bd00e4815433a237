"""A peer: PyTorch in one process, without communication.

python -m lockstep.benchmark.peers.plain [--pin]

Several copies at once show the limit for ranks that communicate. Each copy gets its LOCAL_RANK and LOCAL_WORLD_SIZE, by
which it chooses its cores.
"""

import os

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader

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
    set_threads(arguments.pin, int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    torch.manual_seed(0)
    loader = DataLoader(Digits(), BATCH_SIZE_PER_RANK, shuffle=True, drop_last=True)
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), LEARNING_RATE, MOMENTUM, weight_decay=WEIGHT_DECAY)

    def update(images: Tensor, labels: Tensor) -> Tensor:
        optimizer.zero_grad()
        loss = F.nll_loss(model(images), labels)
        loss.backward()
        optimizer.step()
        return loss

    measure(update, loader, arguments, synchronise=lambda: None)


if __name__ == "__main__":
    main()
