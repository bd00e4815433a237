"""Lockstep beside its peers: the same network, batch, data and threads, trained by other means, started in turn.

Every peer is a command that prints one line of JSON with its `images_per_second`, all ranks together. It runs as its
users would write it, without the settings that env/activate makes, and again with each rank pinned to its cores.
Nothing here joins an MPI job, since a process of one could not start others.
"""

import contextlib
import json
import math
import os
import shlex
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from uuid import uuid4

import psutil

from app.benchmarking.arms import ALONE, ALONE_PINNED, BF16, HOW, LOCKSTEP, ONE_RANK, ZERO, Peer

ROOT = Path(__file__).parents[2]
TIMEOUT_SECONDS = 120
GRACE_SECONDS = 3  # between asking a peer to end and killing it
TAIL = 15  # lines of a failed peer's output that are shown
FAMILY = "PEER_FAMILY"  # in the environment of everything that a peer starts, so that nothing of it stays behind


class PeerError(Exception):
    """Why a peer has no result."""


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
                rate, peak = _run(peer, timeout_seconds)
            except PeerError as error:
                dropped.add(peer.name)
                say(f"{peer.name} drops out: {error}")
            else:
                rates[peer.name].append(rate)
                if peaks is not None and peak:
                    peaks[peer.name] = max(peak, peaks.get(peer.name, 0.0))
                say(f"round {number + 1} of {num_rounds}: {peer.name}: {rate:.0f} images/s")
    return rates


def _run(peer: Peer, timeout_seconds: float) -> tuple[float, float]:
    """Images per second of all copies of `peer` together, and the MiB of the largest; nothing of them is left behind.

    Raises:
        PeerError: it could not be started, failed, gave no result or did not end in time.
    """
    token = uuid4().hex
    deadline = time.monotonic() + timeout_seconds
    processes: list[subprocess.Popen[bytes]] = []
    with TemporaryDirectory(prefix="lockstep-peer-") as folder:
        outputs = [Path(folder) / str(copy) for copy in range(peer.num_copies)]
        try:
            for copy, output in enumerate(outputs):
                processes.append(_start(peer, copy, token, output))
            for process in processes:
                if process.wait(max(0.0, deadline - time.monotonic())) != 0:
                    raise PeerError(f"it ended with {_ending(process.returncode)}")
            results = [_result(output) for output in outputs]
            return sum(rate for rate, _ in results), max(peak for _, peak in results)
        except subprocess.TimeoutExpired:
            raise PeerError(_told(f"it did not end in {timeout_seconds:g} s", peer, outputs)) from None
        except PeerError as error:
            raise PeerError(_told(str(error), peer, outputs)) from None
        except OSError as error:
            raise PeerError(f"it cannot be started ({error}): run this in the environment, by env/run") from None
        finally:
            _end(processes, token)


def _start(peer: Peer, copy: int, token: str, output: Path) -> subprocess.Popen[bytes]:
    changes = {**peer.environment, FAMILY: token}
    if peer.num_copies > 1:
        changes |= {"LOCAL_RANK": str(copy), "LOCAL_WORLD_SIZE": str(peer.num_copies)}
    environment = {name: value for name, value in {**os.environ, **changes}.items() if value is not None}
    with output.open("wb") as stdout, output.with_suffix(".err").open("wb") as stderr:
        return subprocess.Popen(
            peer.command,
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            start_new_session=True,
        )


def _result(output: Path) -> tuple[float, float]:
    """Images per second, and the peak in MiB if it is told, in a peer's output. Launchers tag each line."""
    lines = [line for line in output.read_text(errors="replace").splitlines() if '"images_per_second"' in line]
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


def _ending(returncode: int) -> str:
    return f"signal {-returncode}" if returncode < 0 else f"exit code {returncode}"


def _told(why: str, peer: Peer, outputs: Sequence[Path]) -> str:
    """`why`, the command, and the last lines that its copies have printed."""
    lines: list[str] = []
    for output in outputs:
        for path in (output, output.with_suffix(".err")):
            with contextlib.suppress(OSError):  # a copy that was not started has none
                lines += [line for line in path.read_text(errors="replace").splitlines() if line.strip()][-TAIL:]
    return "\n".join([f"{why}: {shlex.join(peer.command)}", *(f"    | {line}" for line in lines)])


def _end(processes: Sequence[subprocess.Popen[bytes]], token: str) -> None:
    """Kill, by id, what still runs of a peer, with what its launchers have started and left behind."""
    for member in _family(token):
        with contextlib.suppress(psutil.NoSuchProcess):
            member.terminate()  # launchers tidy up
    psutil.wait_procs(_family(token), timeout=GRACE_SECONDS)
    while family := _family(token):  # again, for one that was being started meanwhile
        for member in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
        psutil.wait_procs(family, timeout=GRACE_SECONDS)
    for process in processes:
        process.wait()


def _family(token: str) -> list[psutil.Process]:
    """Every living process with `token` in its environment: children, theirs, and orphans."""
    family = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.status() != psutil.STATUS_ZOMBIE and process.environ().get(FAMILY) == token:
                family.append(process)
    return family


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
