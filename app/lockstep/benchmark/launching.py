"""The benchmarks that start jobs in turn: `peers` and `scaling`. They never become an MPI process themselves."""

import json
import math
import os
import shlex
import statistics
from argparse import ArgumentParser
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lockstep.benchmark.peer_commands import (
    ALONE,
    ALONE_PINNED,
    BF16,
    HOW,
    LOCKSTEP,
    ONE_RANK,
    ZERO,
    Peer,
    PeerError,
    peers,
    run_peer,
    sharding_peers,
)
from lockstep.benchmark.report import new_folder, plot_peers, plot_scaling, print_table, save
from lockstep.runtime.affinity import allowed_cpus, num_cores, read_topology
from lockstep.runtime.command_line import command_parser
from lockstep.runtime.errors import SettingsError

TIMEOUT_SECONDS = 120  # of one run of a peer
SUITES = {"replicated": peers, "sharding": sharding_peers}


def main(kind: str, args: Sequence[str]) -> None:
    """Run the benchmark `kind`.

    Raises:
        SettingsError: an option is wrong, or nothing could be measured.
        StorageError: the results cannot be written.
    """
    {"peers": _peers, "scaling": _scaling}[kind](args)


def _peers(args: Sequence[str]) -> None:
    parser = _parser("peers", launcher="horovodrun -np {ranks}")
    parser.add_argument("--ranks", type=int, default=2, help="default: %(default)s")
    parser.add_argument("--suite", choices=SUITES, default="replicated", help="what to compare (default: %(default)s)")
    options = parser.parse_args(args)
    folder = new_folder(options.out)  # before measuring: it may fail
    competitors = SUITES[options.suite](options.ranks, _num_cores_here(), os.environ, options.launcher)
    peaks: dict[str, float] = {}
    rates = measure_peers(competitors, options.rounds, say=lambda line: print(line, flush=True), peaks=peaks)
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
        ("", "images/s: median (spread)", "peak MiB", "ratio within the rounds"),
        table,
    )
    result = {"num_ranks": options.ranks, "rounds": rates, "peak_mib": peaks}
    save(folder, "peers", result, plot_peers(rates))


def _scaling(args: Sequence[str]) -> None:
    parser = _parser("scaling", launcher="mpirun -np {ranks}")
    parser.add_argument("--ranks", type=_numbers, default=[1, 2, 4], help="numbers of ranks (default: 1,2,4)")
    batch_help = "for weak scaling; strong scaling: this times the largest number of ranks (default: %(default)s)"
    parser.add_argument("--batch_size_per_rank", type=int, default=32, help=batch_help)
    threads_help = "threads per rank on CPUs (default: this machine's cores / the largest number of ranks)"
    parser.add_argument("--threads", type=int, help=threads_help)
    options, others = parser.parse_known_args(args)
    folder = new_folder(options.out)
    # The same number of threads for any number of ranks: a single rank must not use all cores of the node.
    threads = options.threads or max(1, _num_cores_here() // max(options.ranks))
    strong_batch = options.batch_size_per_rank * max(options.ranks)
    batches = {
        "weak": f"--data.batch_size_per_rank {options.batch_size_per_rank}",
        "strong": f"--data.batch_size {strong_batch}",
    }
    command = f"{options.launcher} lockstep benchmark throughput --json true --rounds 1 --limit false"
    environment = {"OMP_NUM_THREADS": str(threads)}
    jobs = [
        Peer(f"{how}, {ranks} ranks", (*shlex.split(f"{command.format(ranks=ranks)} {batch}"), *others), environment)
        for how, batch in batches.items()
        for ranks in options.ranks
    ]
    rates = measure_peers(jobs, options.rounds, say=lambda line: print(line, flush=True))
    medians = {row.name: row.median for row in summarise(rates)}
    efficiency = {how: _efficiency(medians, how, options.ranks) for how in batches}
    if not any(efficiency.values()):
        raise SettingsError("nothing could be measured: see above")
    table = [
        (f"{how}, {ranks} ranks", f"{medians[f'{how}, {ranks} ranks']:.0f}", f"{value:.3f}")
        for how, of_ranks in efficiency.items()
        for ranks, value in of_ranks.items()
    ]
    print_table(
        f"{options.rounds} rounds", ("", "images/s", f"efficiency, relative to {min(options.ranks)} rank(s)"), table
    )
    result: dict[str, Any] = {"rounds": rates, "efficiency": efficiency, "threads_per_rank": threads}
    save(folder, "scaling", json.loads(json.dumps(result)), plot_scaling(efficiency))


def _efficiency(medians: Mapping[str, float], how: str, ranks: Sequence[int]) -> dict[int, float]:
    """Images/s per rank relative to the fewest ranks, by number of ranks; without those that were not measured."""
    per_rank = {n: medians[f"{how}, {n} ranks"] / n for n in ranks if f"{how}, {n} ranks" in medians}
    return {n: rate / per_rank[min(ranks)] for n, rate in per_rank.items()} if min(ranks) in per_rank else {}


def _parser(kind: str, launcher: str) -> ArgumentParser:
    parser = command_parser(f"benchmark {kind}", None, allow_abbrev=False)
    parser.add_argument("--rounds", type=int, default=5, help="in each, all are measured once (default: %(default)s)")
    parser.add_argument("--launcher", default=launcher, help="how jobs are started here (default: %(default)s)")
    parser.add_argument("--out", default="runs/benchmark", help="folder for the results (default: %(default)s)")
    return parser


def _num_cores_here() -> int:
    cpus = allowed_cpus()
    return num_cores(cpus, read_topology(cpus))


def _numbers(text: str) -> list[int]:
    return sorted({int(part) for part in text.split(",")})


# -- taking turns ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ratio:
    """The speed of `of` / the speed of `to`: median, lowest and highest of the ratios within each round."""

    of: str
    to: str
    median: float
    lowest: float
    highest: float


@dataclass(frozen=True)
class Row:
    """One peer's images/s over the rounds, and the ratio of Lockstep's speed to it on as many ranks."""

    name: str
    num_rounds: int
    median: float
    lowest: float
    highest: float
    ratio: Ratio | None


def measure_peers(
    peers: Sequence[Peer],
    num_rounds: int,
    say: Callable[[str], None],
    timeout_seconds: float = TIMEOUT_SECONDS,
    peaks: dict[str, float] | None = None,
) -> dict[str, list[float]]:
    """Run every peer once per round, and return the images per second of each, by round.

    The order rotates from round to round, so that a machine that is slow for a while slows down all of them. A peer
    that fails is left out from then on.

    Args:
        say: prints a line about each result.
        peaks: receives the peak memory in MiB of each peer that reports it.
    """
    rates: dict[str, list[float]] = {peer.name: [] for peer in peers}
    dropped: set[str] = set()
    for number in range(num_rounds):
        start = number % max(1, len(peers))
        for peer in [*peers[start:], *peers[:start]]:
            if peer.name in dropped:
                continue
            try:
                results = run_peer(peer, timeout_seconds, _result)
            except PeerError as error:
                dropped.add(peer.name)
                say(f"{peer.name} drops out: {error}")
            else:
                rate, peak = sum(rate for rate, _ in results), max(peak for _, peak in results)
                rates[peer.name].append(rate)
                if peaks is not None and peak:
                    peaks[peer.name] = max(peak, peaks.get(peer.name, 0.0))
                say(f"round {number + 1} of {num_rounds}: {peer.name}: {rate:.0f} images/s")
    return rates


def _result(output: str) -> tuple[float, float]:
    """Read images per second, and peak MiB or 0, from a peer's output, in which launchers may tag each line."""
    lines = [line for line in output.splitlines() if '"images_per_second"' in line]
    if len(lines) != 1:  # several results: its ranks ran as separate jobs
        raise PeerError(f"it printed {len(lines)} results where one is expected")
    try:
        result = json.loads(lines[0][lines[0].index("{") : lines[0].rindex("}") + 1])
        rate, peak = float(result["images_per_second"]), float(result.get("peak_mib", 0.0))
    except (ValueError, TypeError, KeyError) as error:
        raise PeerError(f"its result cannot be read ({error!r})") from None
    if not (math.isfinite(rate) and rate > 0):
        raise PeerError(f"its result is {rate} images/s")
    return rate, peak


def summarise(rates: Mapping[str, Sequence[float]]) -> list[Row]:
    """One row for each peer with a result. A peer that failed later is compared over the rounds before that."""
    rows = []
    for name, mine in rates.items():
        if mine:
            row = Row(name, len(mine), statistics.median(mine), min(mine), max(mine), _ratio(name, rates))
            rows.append(row)
    return rows


def _ratio(name: str, rates: Mapping[str, Sequence[float]]) -> Ratio | None:
    """Lockstep's speed relative to the peer `name` on as many ranks; for its bf16, to its fp32. None if unknown."""
    of, to = {
        BF16: (BF16, LOCKSTEP),
        ALONE: (ONE_RANK, name),
        ALONE_PINNED: (ONE_RANK, name),
        **{
            f"{peer}{how}": (f"Lockstep {parallel}", f"{peer}{how}")
            for peer, (parallel, _) in ZERO.items()
            for how in HOW
        },
    }.get(name, (LOCKSTEP, name))
    ratios = [one / other for one, other in zip(rates.get(of, ()), rates.get(to, ()), strict=False)]
    if not ratios or name in (LOCKSTEP, ONE_RANK):
        return None
    return Ratio(of, to, statistics.median(ratios), min(ratios), max(ratios))
