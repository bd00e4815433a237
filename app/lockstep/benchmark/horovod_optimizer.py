"""Compares Lockstep's flat gradient buffer with Horovod's own `DistributedOptimizer`, all else equal.

    env/run mpirun -np 2 lockstep benchmark optimizer

Both use the same model, batches in memory, loss, optimizer and cores, and take turns in one job, round by round. The
memory format is channels first: DistributedOptimizer rejects channels-last gradients ("required to be contiguous").
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence

import horovod.torch as hvd
import torch.nn.functional as F

from lockstep.comm.cluster import Cluster
from lockstep.data.batch import DataBatch
from lockstep.parallel.replicated import Replicated
from lockstep.parallel.step import train_step
from lockstep.runtime.command_line import command_parser
from lockstep.settings import DataSettings, ModelSettings, Settings
from lockstep.tasks.classify import Classify
from lockstep.training.optim import build_optimizer

SETTINGS = Settings(data=DataSettings(batch_size_per_rank=32), model=ModelSettings(channels_last=False))


def main(cluster: Cluster, arguments: Sequence[str]) -> None:
    """Collective: run the benchmark."""
    options = cluster.on_root(lambda: _parse_args(arguments))
    task = Classify(SETTINGS, cluster)
    batches = list(task.build_loader(cluster.rank, cluster.size).rest_of_epoch())
    updates = {"flat buffer": _lockstep_update(cluster, task), "DistributedOptimizer": _horovod_update(task)}
    seconds: dict[str, list[float]] = {name: [] for name in updates}
    for number in range(options.rounds + 1):
        for name in sorted(updates, reverse=bool(number % 2)):
            cluster.barrier()
            started = time.perf_counter()
            for index in range(options.updates):
                updates[name](batches[index % len(batches)])
            cluster.barrier()
            if number:  # the first round is a warm-up
                seconds[name].append(time.perf_counter() - started)
    if cluster.is_root:
        ours, theirs = seconds["flat buffer"], seconds["DistributedOptimizer"]
        for name, times in seconds.items():
            print(f"{name:22} {statistics.median(times) / options.updates * 1e3:.2f} ms per update")
        ratios = [other / mine for mine, other in zip(ours, theirs, strict=True)]
        print(f"flat buffer is {statistics.median(ratios):.3f} times as fast ({min(ratios):.3f} ... {max(ratios):.3f})")


def _lockstep_update(cluster: Cluster, task: Classify) -> Callable[[DataBatch], object]:
    model = task.build_model()
    strategy = Replicated(model, build_optimizer(model, SETTINGS.optimizer), cluster)

    return lambda batch: train_step(strategy, batch, task, seed=0)


def _horovod_update(task: Classify) -> Callable[[DataBatch], object]:
    model = task.build_model()
    optimizer = hvd.DistributedOptimizer(
        build_optimizer(model, SETTINGS.optimizer), named_parameters=model.named_parameters()
    )

    def update(batch: DataBatch) -> None:
        optimizer.zero_grad()
        F.nll_loss(task.outputs(model, batch.inputs), batch.data[1]).backward()
        optimizer.step()

    return update


def _parse_args(arguments: Sequence[str]) -> argparse.Namespace:
    parser = command_parser("benchmark optimizer", __doc__)
    parser.add_argument("--rounds", type=int, default=9, help="after a warm-up round (default: %(default)s)")
    parser.add_argument("--updates", type=int, default=60, help="of each per round (default: %(default)s)")
    return parser.parse_args(arguments)
