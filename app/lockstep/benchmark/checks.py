"""What the checks cost: ledger, replica check, checkpoints, deterministic mode, beside the same updates without them.

    env/run mpirun -np 2 lockstep benchmark checks

All variants train in turn in one run, block by block, in an order that rotates; each ratio is the median over the
rounds of (this variant's block) / (the plain block of the same round). Where blocks differ by more than what is to be
measured, the last column tells: the check's own time over that of an update.
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
from lockstep.data.loader import LabelledBatch
from lockstep.parallel.tensor_slices import State
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
    """By name; each interval falls due once in a `block` of updates."""
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
    """One variant, ready for its next block."""

    trainer: Trainer
    batches: Iterator[LabelledBatch]
    deterministic: bool

    def block(self, num_updates: int) -> float:
        """Collective: seconds for `num_updates`."""
        torch.use_deterministic_algorithms(self.deterministic)
        started = time.perf_counter()
        for _ in range(num_updates):
            self.trainer.update(next(self.batches))
        return time.perf_counter() - started


def main(cluster: Cluster, arguments: Sequence[str]) -> None:
    """Collective."""
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
    own_cost = _own_cost(cluster, runners["plain"].trainer, folder, block)
    saving = runners[f"checkpoint, every {block}"]
    stall, whole = _checkpoint_stall(saving, folder)
    if cluster.is_root:
        _print(cluster.size, block, seconds, own_cost, stall, whole)
    cluster.on_root(lambda: shutil.rmtree(folder))


def _build(cluster: Cluster, settings: Settings, folder: Path) -> Runner:
    cluster.on_root(lambda: folder.mkdir())
    trainer = build_trainer(cluster, settings, Classify(settings, cluster), RunFolder(folder))
    return Runner(trainer, forever(trainer), settings.checks.deterministic)


def _checkpoint_stall(runner: Runner, folder: Path) -> tuple[float, float]:
    """Collective: seconds for which a save holds up rank 0, over the save and the update after it, and those of the
    same save without a thread: medians; zero on other ranks."""
    trainer = runner.trainer
    stalls: list[float] = []
    whole: list[float] = []
    for step in range(10**6, 10**6 + NUM_SAVES):
        before = trainer.writer.seconds_waited
        saving = _time(trainer.checkpoint)
        trainer.update(next(runner.batches))
        stalls.append(saving + trainer.writer.seconds_waited - before)
        trainer.writer.wait()
        if trainer.strategy.is_saved_here:
            whole.append(_time(_write, folder, step, trainer.strategy.saved_state()))
    return (statistics.median(stalls), statistics.median(whole)) if whole else (0.0, 0.0)


def _write(folder: Path, step: int, state: State) -> None:
    commit(folder, step, [write_parts(folder, step, state)], {}, keep=3)


def _own_cost(cluster: Cluster, trainer: Trainer, folder: Path, block: int) -> dict[str, float]:
    """Collective: seconds an update that ledger and replica check take by themselves, at the default interval."""
    ledger = SampleLedger(SampleLedger.path(folder, 0, 0, cluster.rank, cluster.size), num_samples=block)
    ids = np.arange(32)
    recording = statistics.median(_time(ledger.record, step, 0, ids) for step in range(1000))
    comparing = statistics.median(_time(trainer.strategy.compare, "in the benchmark") for _ in range(NUM_SAVES))
    return {"ledger": recording, f"replica check, every {block}": comparing / block}


def _time(function: Callable[..., object], *arguments: object) -> float:
    started = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - started


def _print(
    num_ranks: int, block: int, seconds: dict[str, list[float]], own_cost: dict[str, float], stall: float, whole: float
) -> None:
    print(
        f"{num_ranks} ranks, {len(seconds['plain'])} rounds of {block} updates, 32 images a rank, the reference network"
    )
    print(f"{'':22} {'ms/update':>10} {'to plain':>9} {'(min ... max)':>18} {'own cost':>10}")
    plain = statistics.median(seconds["plain"]) / block
    for name, times in seconds.items():
        ratios = [mine / of_plain for mine, of_plain in zip(times, seconds["plain"], strict=True)]
        own = f"{own_cost[name] / plain:10.2%}" if name in own_cost else ""
        spread = f"{min(ratios):.3f} ... {max(ratios):.3f}"
        milliseconds = statistics.median(times) / block * 1e3
        print(f"{name:22} {milliseconds:10.2f} {statistics.median(ratios):9.3f} {spread:>18} {own}")
    print(f"a save holds up training for {stall * 1e3:.2f} ms, without a thread for {whole * 1e3:.2f} ms", end=" ")
    print(f"({stall / whole:.1%})")


def _parse_args(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="lockstep benchmark checks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--rounds", type=int, default=5, help="(default: %(default)s)")
    parser.add_argument("--updates", type=int, default=100, help="in a block (default: %(default)s, as intervals are)")
    return parser.parse_args(arguments)
