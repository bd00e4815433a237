"""Lockstep beside its peers: the same network, batch, data and threads, trained by other means, started in turn.

Every peer is a command that prints one line of JSON with its `images_per_second`, all ranks together. It runs as its
users would write it, without the settings that env/activate makes, and again with each rank pinned to its cores.
Nothing here joins an MPI job, since a process of one could not start others.
"""

import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from lockstep.benchmark.peer_commands import ALONE, ALONE_PINNED, BF16, HOW, LOCKSTEP, ONE_RANK, ZERO, Peer
from lockstep.benchmark.running import PeerError, run_peer

TIMEOUT_SECONDS = 120


@dataclass(frozen=True)
class Ratio:
    """How many times as fast `of` is as `to`: median, lowest and highest of the ratios within each round."""

    of: str
    to: str
    median: float
    lowest: float
    highest: float


@dataclass(frozen=True)
class Row:
    """One peer's images/s over the rounds, beside the Lockstep that does the same on as many ranks."""

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
    """Images per second of each peer, one for each round; fewer, or none, for a peer that fails and so drops out.

    `peaks` is given the most MiB that a process of each peer has had, of those that tell.

    The peers take turns, in an order that rotates from round to round, so that a machine which is slower for a while
    is so for all of them.
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
    """Images per second, and the peak in MiB if it is told, in a peer's output. Launchers tag each line."""
    lines = [line for line in output.splitlines() if '"images_per_second"' in line]
    if len(lines) != 1:  # several: its ranks have not found each other
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
    """One row for each peer that has a result. A peer that dropped out is compared over the rounds that it was in."""
    rows = []
    for name, mine in rates.items():
        if mine:
            row = Row(name, len(mine), statistics.median(mine), min(mine), max(mine), _ratio(name, rates))
            rows.append(row)
    return rows


def _ratio(name: str, rates: Mapping[str, Sequence[float]]) -> Ratio | None:
    """Lockstep to `name` on as many ranks; of its own bf16, to its fp32; None for what there is nothing to compare."""
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
