"""Measures the gain of DD-PPO's preemption of slow ranks (Wijmans et al. 2020, section 3) with one slow environment.

    env/run mpirun -np 2 lockstep benchmark preemption

Every environment takes 1 ms per step, as a simulator does; one of the last rank's takes ten times as long. The same
training runs in turn with and without `--ppo.preemption_threshold`; speed is the steps per second of all environments.
"""

import shutil
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from gymnasium.envs.classic_control import CartPoleEnv

from lockstep.comm.cluster import Cluster
from lockstep.settings import CheckpointSettings, EnvSettings, ModelSettings, OptimizerSettings, PpoSettings, Settings
from lockstep.tasks.ppo import Ppo
from lockstep.training.build import build_trainer
from lockstep.training.run_folder import RunFolder

SECONDS_A_STEP = 1e-3
TIMES_SLOWER = 10
THRESHOLD = 0.5  # of two ranks, one is waited for
NUM_ROUNDS, NUM_UPDATES = 5, 4
SETTINGS = Settings(
    task="ppo",
    env=EnvSettings(id="lockstep.benchmark.preemption.Simulator", num_envs=8),
    model=ModelSettings(name="mlp"),
    ppo=PpoSettings(total_steps=10**9, num_steps=64),
    optimizer=OptimizerSettings(name="adam", learning_rate=1e-3, weight_decay=0.0),
    checkpoint=CheckpointSettings(interval=0),
    log_interval=10**6,
)


class Simulator(CartPoleEnv):
    """CartPole with steps that take `seconds` of CPU time."""

    seconds = SECONDS_A_STEP

    def step(self, action: Any) -> Any:
        until = time.perf_counter() + self.seconds
        while time.perf_counter() < until:
            pass
        return super().step(action)  # type: ignore[no-untyped-call]


def main(cluster: Cluster, arguments: Sequence[str]) -> None:
    """Collective: run the benchmark."""
    assert not arguments, "this benchmark has no options"
    folder = Path(cluster.on_root(mkdtemp))
    runs = {}
    for name, threshold in (("all wait", None), ("preempted", THRESHOLD)):
        settings = replace(SETTINGS, ppo=replace(SETTINGS.ppo, preemption_threshold=threshold))
        task = Ppo(settings, cluster)
        if cluster.rank == cluster.size - 1:
            task.environments._vector.envs[0].unwrapped.seconds = TIMES_SLOWER * SECONDS_A_STEP  # type: ignore[attr-defined]
        runs[name] = build_trainer(cluster, settings, task, _subfolder(cluster, folder / name.replace(" ", "-")))
    rates: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(NUM_ROUNDS):
        for name, trainer in runs.items():
            cluster.barrier()
            before, started = trainer.progress.num_samples, time.perf_counter()
            for _ in range(NUM_UPDATES):
                for item in trainer.loader.rest_of_epoch():
                    trainer.update(item)
            cluster.barrier()
            rates[name].append((trainer.progress.num_samples - before) / (time.perf_counter() - started))
    if cluster.is_root:
        for name, of_rounds in rates.items():
            spread = f"{min(of_rounds):.0f} ... {max(of_rounds):.0f}"
            print(f"{name:10} {statistics.median(of_rounds):6.0f} steps/s ({spread})")
        ratios = [on / off for off, on in zip(*rates.values(), strict=True)]
        print(f"preempted / all wait: {statistics.median(ratios):.2f} ({min(ratios):.2f} ... {max(ratios):.2f})")
    cluster.on_root(lambda: shutil.rmtree(folder))


def _subfolder(cluster: Cluster, path: Path) -> RunFolder:
    cluster.on_root(lambda: path.mkdir())
    return RunFolder(path)
