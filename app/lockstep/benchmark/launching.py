"""The benchmarks that start jobs in turn: `peers` and `scaling`. They are no MPI process themselves."""

import argparse
import json
import os
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from lockstep.benchmark.comparison import measure_peers, summarise
from lockstep.benchmark.figures import plot_peers, plot_scaling
from lockstep.benchmark.peer_commands import Peer, peers, sharding_peers
from lockstep.benchmark.report import new_folder, print_table, save
from lockstep.runtime.affinity import allowed_cpus, num_cores, read_topology
from lockstep.runtime.errors import SettingsError


def main(kind: str, args: Sequence[str]) -> None:
    """
    Raises:
        SettingsError: an option is wrong, or nothing could be measured.
        StorageError: the results cannot be written.
    """
    {"peers": _peers, "scaling": _scaling}[kind](args)


def _peers(args: Sequence[str]) -> None:
    parser = _parser("peers", launcher="horovodrun -np {ranks}")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--suite", choices=["replicated", "sharding"], default="replicated", help="what is compared")
    options = parser.parse_args(args)
    folder = new_folder(options.out)  # before the work of which it is to hold the result
    build = sharding_peers if options.suite == "sharding" else peers
    arms = build(options.ranks, _num_cores_here(), os.environ, options.launcher)
    peaks: dict[str, float] = {}
    rates = measure_peers(arms, options.rounds, say=lambda line: print(line, flush=True), peaks=peaks)
    rows = summarise(rates)
    if not rows:
        raise SettingsError("no peer could be measured: see above")
    table = [
        (
            row.name,
            f"{row.median:.0f} ({row.lowest:.0f} ... {row.highest:.0f})",
            f"{peaks[row.name]:.0f}" if row.name in peaks else "",
            f"{row.ratio.of} is {row.ratio.median:.2f} ({row.ratio.lowest:.2f} ... {row.ratio.highest:.2f}) times this"
            if row.ratio
            else "",
        )
        for row in rows
    ]
    print_table(
        f"{options.ranks} ranks, {options.rounds} rounds",
        ("", "images/s: median (spread)", "peak MiB", "in turn"),
        table,
    )
    result = {"num_ranks": options.ranks, "rounds": rates, "peak_mib": peaks}
    save(folder, "peers", result, plot_peers(rates))


def _scaling(args: Sequence[str]) -> None:
    parser = _parser("scaling", launcher="mpirun -np {ranks}")
    parser.add_argument("--ranks", type=_numbers, default=[1, 2, 4], help="numbers of ranks, such as 1,2,4")
    parser.add_argument("--batch_size_per_rank", type=int, default=32, help="weak; strong: this times the most ranks")
    parser.add_argument("--threads", type=int, help="a rank, on CPUs; by default this machine's cores / most ranks")
    options, others = parser.parse_known_args(args)
    folder = new_folder(options.out)
    # With all cores for the one rank that two are compared with, no job would scale within a node.
    threads = options.threads or max(1, _num_cores_here() // max(options.ranks))
    strong_batch = options.batch_size_per_rank * max(options.ranks)
    batches = {
        "weak": f"--data.batch_size_per_rank {options.batch_size_per_rank}",
        "strong": f"--data.batch_size {strong_batch}",
    }
    command = f"{options.launcher} lockstep benchmark throughput --json true --rounds 1 --limit false"
    environment = {"OMP_NUM_THREADS": str(threads)}
    arms = [
        Peer(f"{how}, {ranks} ranks", (*shlex.split(f"{command.format(ranks=ranks)} {batch}"), *others), environment)
        for how, batch in batches.items()
        for ranks in options.ranks
    ]
    rates = measure_peers(arms, options.rounds, say=lambda line: print(line, flush=True))
    medians = {row.name: row.median for row in summarise(rates)}
    efficiency = {how: _efficiency(medians, how, options.ranks) for how in batches}
    if not any(efficiency.values()):
        raise SettingsError("nothing could be measured: see above")
    table = [
        (f"{how}, {ranks} ranks", f"{medians[f'{how}, {ranks} ranks']:.0f}", f"{value:.3f}")
        for how, of_ranks in efficiency.items()
        for ranks, value in of_ranks.items()
    ]
    print_table(f"{options.rounds} rounds", ("", "images/s", f"efficiency, to {min(options.ranks)} rank(s)"), table)
    result: dict[str, Any] = {"rounds": rates, "efficiency": efficiency, "threads_per_rank": threads}
    save(folder, "scaling", json.loads(json.dumps(result)), plot_scaling(efficiency))


def _efficiency(medians: Mapping[str, float], how: str, ranks: Sequence[int]) -> dict[int, float]:
    """Images/s of each rank as a part of those with the fewest ranks; without what could not be measured."""
    each = {n: medians[f"{how}, {n} ranks"] / n for n in ranks if f"{how}, {n} ranks" in medians}
    return {n: rate / each[min(ranks)] for n, rate in each.items()} if min(ranks) in each else {}


def _parser(kind: str, launcher: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"lockstep benchmark {kind}",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--rounds", type=int, default=5, help="in each of which all have their turn")
    parser.add_argument("--launcher", default=launcher, help="how a job is started here, such as 'srun -n {ranks}'")
    parser.add_argument("--out", default="runs/benchmark", help="folder for the results")
    return parser


def _num_cores_here() -> int:
    cpus = allowed_cpus()
    return num_cores(cpus, read_topology(cpus))


def _numbers(text: str) -> list[int]:
    return sorted({int(part) for part in text.split(",")})
