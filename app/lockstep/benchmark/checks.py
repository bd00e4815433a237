"""Measures what the checks cost: ledger, replica check, checkpoints and deterministic mode, against plain updates.

    env/run mpirun -np 2 lockstep benchmark checks

All variants train in one job, block by block, in an order that rotates from round to round. Each ratio is the median
over the rounds of (time of this variant's block) / (time of the plain block of the same round). If the noise between
blocks exceeds the cost, see the last column: the time of the check alone / the time of an update.
"""

import argparse
import shutil
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import mkdtemp

import numpy as np
import torch

from lockstep.benchmark.throughput import forever
from lockstep.comm.cluster import Cluster
from lockstep.data.batch import DataBatch
from lockstep.parallel.tensor_slices import State
from lockstep.runtime.command_line import command_parser
from lockstep.settings import CheckpointSettings, CheckSettings, DataSettings, Settings
from lockstep.tasks.classify import Classify
from lockstep.training.build import build_trainer
from lockstep.training.checkpoint import commit, write_parts
from lockstep.training.run_folder import RunFolder
from lockstep.training.sample_ledger import SampleLedger
from lockstep.training.trainer import Trainer

NUM_SAVES = 21
PLAIN = Settings(
    num_epochs=1000,
    log_interval=10**9,
    data=DataSettings(batch_size_per_rank=32),
    checkpoint=CheckpointSettings(interval=0),
    checks=CheckSettings(replica_interval=0),
)


def _variants(block: int) -> dict[str, Settings]:
    """Settings by name. Intervals equal `block`, so each check runs once per block of updates."""
    return {
        "plain": PLAIN,
        "ledger": replace(PLAIN, checks=replace(PLAIN.checks, ledger=True)),
        f"replica check, every {block}": replace(PLAIN, checks=replace(PLAIN.checks, replica_interval=block)),
        f"checkpoint, every {block}": replace(PLAIN, checkpoint=CheckpointSettings(interval=block)),
        "checkpoint, no thread": replace(PLAIN, checkpoint=CheckpointSettings(interval=block, asynchronous=False)),
        "deterministic": replace(PLAIN, checks=replace(PLAIN.checks, deterministic=True)),
    }


@dataclass
class Runner:
    """A trainer for one variant, and its batches."""

    trainer: Trainer
    batches: Iterator[DataBatch]
    deterministic: bool

    def block(self, num_updates: int) -> float:
        """Collective: train for `num_updates`; return the seconds."""
        torch.use_deterministic_algorithms(self.deterministic)
        started = time.perf_counter()
        for _ in range(num_updates):
            self.trainer.update(next(self.batches))
        return time.perf_counter() - started


def main(cluster: Cluster, arguments: Sequence[str]) -> None:
    """Collective: run the benchmark."""
    options = cluster.on_root(lambda: _parse_args(arguments))
    block, variants = options.updates, _variants(options.updates)
    folder = Path(cluster.on_root(lambda: mkdtemp(prefix="lockstep-benchmark-")))
    runners = {name: _build(cluster, settings, folder / name) for name, settings in variants.items()}
    for runner in runners.values():
        runner.block(max(1, block // 10))
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(options.rounds):
        names = list(variants)
        for name in names[number % len(names) :] + names[: number % len(names)]:
            cluster.all_gather_object(None)
            seconds[name].append(runners[name].block(block))
    separate_cost = _separate_cost(cluster, runners["plain"].trainer, folder, block)
    stall, blocking = _checkpoint_stall(runners[f"checkpoint, every {block}"], folder)
    if cluster.is_root:
        _print(cluster.size, block, seconds, separate_cost, stall, blocking)
    cluster.on_root(lambda: shutil.rmtree(folder))


def _build(cluster: Cluster, settings: Settings, folder: Path) -> Runner:
    cluster.on_root(lambda: folder.mkdir())
    trainer = build_trainer(cluster, settings, Classify(settings, cluster), RunFolder(folder))
    return Runner(trainer, forever(trainer), settings.checks.deterministic)


def _checkpoint_stall(runner: Runner, folder: Path) -> tuple[float, float]:
    """Collective: median seconds by which a save delays rank 0, with and without the writer thread.

    With the thread, the delay includes waiting in the update after the save. Both are 0 on other ranks.
    """
    trainer = runner.trainer
    stalls: list[float] = []
    blocking: list[float] = []
    for step in range(10**6, 10**6 + NUM_SAVES):
        before = trainer.writer.seconds_waited
        save_seconds = _time(trainer.checkpoint)
        trainer.update(next(runner.batches))
        stalls.append(save_seconds + trainer.writer.seconds_waited - before)
        trainer.writer.wait()
        if trainer.strategy.is_saved_here:
            blocking.append(_time(_write, folder, step, trainer.strategy.saved_state()))
    return (statistics.median(stalls), statistics.median(blocking)) if blocking else (0.0, 0.0)


def _write(folder: Path, step: int, state: State) -> None:
    commit(folder, step, [write_parts(folder, step, state)], {}, keep=3)


def _separate_cost(cluster: Cluster, trainer: Trainer, folder: Path, block: int) -> dict[str, float]:
    """Collective: seconds per update of the ledger and of the replica check, each timed on its own."""
    ledger = SampleLedger(SampleLedger.path(folder, 0, 0, cluster.rank, cluster.size), num_samples=block)
    ids = np.arange(32)
    ledger_seconds = statistics.median(_time(ledger.record, step, 0, ids) for step in range(1000))
    replica_seconds = statistics.median(_time(trainer.strategy.compare, "in the benchmark") for _ in range(NUM_SAVES))
    return {"ledger": ledger_seconds, f"replica check, every {block}": replica_seconds / block}


def _time(function: Callable[..., object], *arguments: object) -> float:
    started = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - started


def _print(
    num_ranks: int,
    block: int,
    seconds: dict[str, list[float]],
    separate_cost: dict[str, float],
    stall: float,
    blocking: float,
) -> None:
    print(
        f"{num_ranks} ranks, {len(seconds['plain'])} rounds of {block} updates, 32 images a rank, the reference network"
    )
    print(f"{'':22} {'ms/update':>10} {'to plain':>9} {'(min ... max)':>18} {'own cost':>10}")
    plain = statistics.median(seconds["plain"]) / block
    for name, times in seconds.items():
        ratios = [mine / of_plain for mine, of_plain in zip(times, seconds["plain"], strict=True)]
        separate = f"{separate_cost[name] / plain:10.2%}" if name in separate_cost else ""
        spread = f"{min(ratios):.3f} ... {max(ratios):.3f}"
        milliseconds = statistics.median(times) / block * 1e3
        print(f"{name:22} {milliseconds:10.2f} {statistics.median(ratios):9.3f} {spread:>18} {separate}")
    print(f"a save delays training by {stall * 1e3:.2f} ms, without a thread by {blocking * 1e3:.2f} ms", end=" ")
    print(f"({stall / blocking:.1%})")


def _parse_args(arguments: Sequence[str]) -> argparse.Namespace:
    parser = command_parser("benchmark checks", __doc__)
    parser.add_argument("--rounds", type=int, default=5, help="(default: %(default)s)")
    parser.add_argument("--updates", type=int, default=100, help="per block (default: %(default)s, that of intervals)")
    return parser.parse_args(arguments)
