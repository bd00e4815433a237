"""Compares Lockstep's PPO with others, in turn, on the same environments, settings and cores.

    pip install --no-deps --target sb3 stable-baselines3 opencv-python-headless
    env/run lockstep benchmark ppo --stable-baselines3 sb3              # CartPole: speed, and steps until 475
    env/run lockstep benchmark ppo --stable-baselines3 sb3 --env pong   # speed

A peer is one process that may use all cores, as its users start it; it also runs with one thread, which is faster for
small networks, and in games with its fastest vector of environments. Compare with the fastest. Lockstep runs two ranks.
Each round has another seed. The rate of a peer excludes its first updates; that of Lockstep includes them.
Speed is environment steps per second, collecting and learning, without evaluations. `Steps until 475` is the number of
steps until the mean return of 100 seeded greedy episodes reaches 475, evaluated every 4,096 steps.
"""

import argparse
import json
import shlex
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from lockstep.benchmark.peer_commands import Peer, PeerError, run_peer
from lockstep.benchmark.report import new_folder, plot_peers, print_table, save, spread
from lockstep.runtime.command_line import command_parser
from lockstep.runtime.errors import LockstepError

LOCKSTEP, CLEANRL, SB3 = "Lockstep, 2 ranks", "CleanRL's style", "Stable-Baselines3"
SOLVED = 475.0
TIMEOUT_SECONDS = 900
PONG = (
    "--env-id ALE/Pong-v5 --num-envs 8 --num-steps 128 --total-steps 8192 --num-minibatches 4 --num-epochs 4 "
    "--learning-rate 0.0005 --gamma 0.99 --gae-lambda 0.95 --clip 0.1 --entropy 0.01 --warmup-updates 2"
)
PEER_SETTINGS = {  # Lockstep uses its presets
    "cartpole": f"--until-return {SOLVED}",
    "pong": PONG,
}
LOCKSTEP_SETTINGS = {
    "cartpole": "--evaluate_every 4",
    "pong": "--ppo.total_steps 16384 --env.num_evaluation_episodes 2",
}


@dataclass(frozen=True)
class Result:
    """The result of one training."""

    steps_per_second: float
    steps_to_return: int | None


def main(arguments: Sequence[str]) -> None:
    """Run the benchmark.

    Raises:
        LockstepError: a training failed.
        StorageError: the results cannot be written.
    """
    options = _parse_args(arguments)
    folder = new_folder(options.out)
    variants = {LOCKSTEP: ("", ""), **_peer_variants(options.env, options.stable_baselines3)}
    names = list(variants)
    results: dict[str, list[Result]] = {name: [] for name in names}
    for number in range(options.rounds):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            results[name].append(_run(name, options.env, number, *variants[name], options.stable_baselines3))
            print(f"round {number + 1} of {options.rounds}: {name}: {results[name][-1]}", flush=True)
    print_table(
        f"{options.env}, {options.rounds} rounds", ("", "steps/s", "Lockstep / this", "steps to 475"), rows(results)
    )
    rates = {name: [result.steps_per_second for result in of_name] for name, of_name in results.items()}
    found = {name: [vars(result) for result in of_name] for name, of_name in results.items()}
    save(folder, f"ppo-{options.env}", {"rounds": found}, plot_peers(rates, "steps/s"))


def rows(results: Mapping[str, Sequence[Result]]) -> list[tuple[str, ...]]:
    """A table row for each variant: speed, Lockstep's speed relative to it, median of the steps to the return."""
    ours = [result.steps_per_second for result in results[LOCKSTEP]]
    table: list[tuple[str, ...]] = []
    for name, of_name in results.items():
        rates = [result.steps_per_second for result in of_name]
        ratio = "" if name == LOCKSTEP else spread([mine / rate for mine, rate in zip(ours, rates, strict=True)], 2)
        table.append((name, spread(rates, 0), ratio, _steps([result.steps_to_return for result in of_name])))
    return table


def _steps(steps: Sequence[int | None]) -> str:
    reached = sorted(number for number in steps if number is not None)
    if not reached:
        return ""
    median = statistics.median_high([number if number is not None else sys.maxsize for number in steps])
    return f"{f'{median:,}' if median < sys.maxsize else 'never'} ({len(reached)} of {len(steps)})"


def read_run(run: Path) -> Result:
    """Read the result of a run of Lockstep from its folder."""
    summary = json.loads((run / "summary.json").read_text())
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    solved = [record["samples"] for record in records if record["kind"] == "held_out" and record["return"] >= SOLVED]
    return Result(summary["samples_per_second"], min(solved, default=None))


def _peer_variants(env: str, stable_baselines3: Path | None) -> dict[str, tuple[str, str]]:
    """By name: the script of a peer, and further options."""
    scripts = {CLEANRL: "cleanrl_ppo", **({SB3: "sb3_ppo"} if stable_baselines3 else {})}
    options = {"": "", ", 1 thread": "--threads 1", **({", fast vector": "--vector fast"} if env == "pong" else {})}
    return {f"{name}{suffix}": (script, more) for name, script in scripts.items() for suffix, more in options.items()}


def _run(name: str, env: str, seed: int, script: str, options: str, stable_baselines3: Path | None) -> Result:
    """Train once. Raises LockstepError if that fails or does not end in time."""
    with TemporaryDirectory(prefix="lockstep-ppo-") as folder:
        if name == LOCKSTEP:
            command = f"mpirun -np 2 lockstep train --config {env} --run_dir {folder}/run {LOCKSTEP_SETTINGS[env]}"
        else:
            command = f"{sys.executable} -m lockstep.benchmark.peers.{script} {PEER_SETTINGS[env]} {options}"
        path = {"PYTHONPATH": str(stable_baselines3.absolute())} if stable_baselines3 else {}
        peer = Peer(name, tuple(shlex.split(f"{command} --seed {seed}")), {} if name == LOCKSTEP else path)
        try:
            (result,) = run_peer(peer, TIMEOUT_SECONDS, _ignore if name == LOCKSTEP else _read_peer)
        except PeerError as error:
            raise LockstepError(f"{name}: {error}") from None
        return result or read_run(Path(folder) / "run")


def _read_peer(output: str) -> Result:
    try:
        result = json.loads(output.strip().splitlines()[-1])
        return Result(result["steps_per_second"], result["steps_to_return"])
    except (ValueError, KeyError, IndexError) as error:
        raise PeerError(f"its result cannot be read ({error!r})") from None


def _ignore(output: str) -> None:
    """Ignore the output of Lockstep: its results are in the run's folder."""


def _parse_args(arguments: Sequence[str]) -> argparse.Namespace:
    parser = command_parser("benchmark ppo", __doc__)
    parser.add_argument("--env", choices=sorted(PEER_SETTINGS), default="cartpole", help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=5, help="each with another seed (default: %(default)s)")
    parser.add_argument("--stable-baselines3", type=Path, metavar="FOLDER", help="where that package is installed")
    parser.add_argument("--out", default="runs/benchmark", help="folder for the results (default: %(default)s)")
    return parser.parse_args(arguments)
