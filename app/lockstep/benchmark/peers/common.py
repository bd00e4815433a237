"""What all peers have in common: data, batch size, hyperparameters, threads, and how they are timed.

A peer is the same training written with another framework, for comparing Lockstep's speed. `lockstep benchmark peers`
starts them in turn.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, DistributedSampler
from torchvision import transforms

from lockstep.data.built_in import load_digits
from lockstep.runtime.affinity import allowed_cpus, read_topology, share_cores
from lockstep.runtime.affinity import pin as pin_to
from lockstep.runtime.resources import peak_mib

BATCH_SIZE_PER_RANK = 32
LEARNING_RATE = 0.05
MOMENTUM = 0.9
WEIGHT_DECAY = 5e-4
WINDOW = 10  # updates over which losses are averaged
# The lowest loss must fall below this part of the first one, or the peer does not learn. The last loss need not, since
# a single rank, with a batch of 32, diverges at this learning rate after some 100 to 200 updates.
LEARNED = 0.75

Batch = tuple[Tensor, Tensor]


class Digits(Dataset[tuple[Tensor, int]]):
    """The digits that Lockstep trains on. As in torchvision's MNIST, each item is a PIL image that is transformed."""

    def __init__(self) -> None:
        digits = load_digits(train=True)
        self.images = digits.images.squeeze(1)
        self.labels = digits.labels
        self.transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize((0.5,), (0.5,))])

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = Image.fromarray(self.images[index].numpy())
        return self.transform(image), int(self.labels[index])


def peer_parser(description: str | None) -> argparse.ArgumentParser:
    """A parser with the options of all peers: updates, warm-up updates, and whether to pin ranks to cores."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=100, help="timed updates (default: %(default)s)")
    parser.add_argument("--warmup", type=int, default=20, help="updates before those, not timed (default: %(default)s)")
    parser.add_argument("--pin", action="store_true", help="keep each rank on its own share of the cores")
    return parser


def set_threads(pin: bool, local_rank: int, local_size: int) -> None:
    """Use one compute thread; with `pin`, on the cores that Lockstep would give to this local rank.

    Call it before communication threads are started: they inherit the cores of the thread that starts them.
    """
    torch.set_num_threads(1)
    if pin:
        cpus = allowed_cpus()
        pin_to(share_cores([cpus] * local_size, read_topology(cpus))[local_rank])


def update_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> Callable[[Tensor, Tensor], Tensor]:
    """The function that trains `model` on one batch of images and labels, and returns its loss."""

    def update(images: Tensor, labels: Tensor) -> Tensor:
        optimizer.zero_grad()
        loss = F.nll_loss(model(images), labels)
        loss.backward()
        optimizer.step()
        return loss

    return update


def measure(
    update: Callable[[Tensor, Tensor], Tensor],
    loader: DataLoader[Any],
    arguments: argparse.Namespace,
    synchronise: Callable[[], object],
    rank: int = 0,
    num_ranks: int = 1,
    batch_size_per_rank: int = BATCH_SIZE_PER_RANK,
) -> None:
    """Collective: train, and print the speed on rank 0 as one line of JSON.

    Args:
        update: see `update_of`.
        synchronise: a barrier, so that the time is that of the slowest rank.
    """
    batches = _endless(loader)
    losses: list[Tensor] = []
    for _ in range(arguments.warmup):
        losses.append(update(*next(batches)).detach())
    synchronise()
    started = time.perf_counter()
    for _ in range(arguments.updates):
        losses.append(update(*next(batches)).detach())
    synchronise()
    seconds = time.perf_counter() - started
    means = [statistics.fmean(map(float, losses[start : start + WINDOW])) for start in range(0, len(losses), WINDOW)]
    if len(losses) >= 4 * WINDOW and min(means) > LEARNED * means[0]:
        sys.exit(f"rank {rank} does not learn: its losses are {', '.join(f'{mean:.3f}' for mean in means)}")
    if rank == 0:
        report = {
            "images_per_second": num_ranks * batch_size_per_rank * arguments.updates / seconds,
            "ms_per_update": seconds / arguments.updates * 1e3,
            "num_ranks": num_ranks,
            "peak_mib": peak_mib(),
            "first_loss": means[0],
            "lowest_loss": min(means),
            "last_loss": means[-1],
        }
        print(json.dumps(report), flush=True)


def _endless(loader: DataLoader[Any]) -> Iterator[Batch]:
    epoch = 0
    while True:
        if isinstance(loader.sampler, DistributedSampler):
            loader.sampler.set_epoch(epoch)
        yield from loader
        epoch += 1
