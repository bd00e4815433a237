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
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from uuid import uuid4

import psutil

ROOT = Path(__file__).parents[2]
TIMEOUT_SECONDS = 120
GRACE_SECONDS = 3  # between asking a peer to end and killing it
TAIL = 15  # lines of a failed peer's output that are shown
FAMILY = "PEER_FAMILY"  # in the environment of everything that a peer starts, so that nothing of it stays behind

LOCKSTEP, BF16, ONE_RANK = "Lockstep", "Lockstep, bf16", "Lockstep, one rank"
ALONE, ALONE_PINNED = "plain PyTorch, one process", "plain PyTorch, one process, pinned"
THROUGHPUT = "python app/benchmark.py throughput --json true --rounds 1 --limit false --data.batch_size_per_rank 32"
LOCKSTEP_COMMANDS = {
    LOCKSTEP: f"{{launcher}} {THROUGHPUT}",
    BF16: f"{{launcher}} {THROUGHPUT} --precision bf16",
    ONE_RANK: THROUGHPUT,
}


class PeerError(Exception):
    """Why a peer has no result."""


@dataclass(frozen=True)
class Peer:
    """A command to be timed.

    Attributes:
        environment: what it has other than this process; None: unset.
        num_copies: processes to start at once, whose rates are added; each is told its LOCAL_RANK.
    """

    name: str
    command: tuple[str, ...]
    environment: Mapping[str, str | None] = field(default_factory=dict)
    num_copies: int = 1


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


def peers(
    num_ranks: int, num_cores: int, environment: Mapping[str, str], launcher: str = "horovodrun -np {ranks}"
) -> list[Peer]:
    """Lockstep and its peers, all on the CPU.

    Args:
        num_cores: cores of this machine that we may use.
        environment: of this process; its LOCKSTEP_DEFAULTS names what env/activate has set.
        launcher: starts `ranks` processes of Lockstep or Horovod.
    """
    launcher = launcher.format(ranks=num_ranks)
    cpu: dict[str, str | None] = {"CUDA_VISIBLE_DEVICES": ""}
    written = cpu | dict.fromkeys(_lockstep_only(environment, oversubscribed=num_ranks > num_cores))
    pinned = written | {"OMPI_MCA_mpi_yield_when_idle": "1"}
    first = pinned | {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": str(num_ranks)}  # alone, on the cores of rank 0
    ddp = f"torchrun --standalone --nproc-per-node {num_ranks} benchmarks/peers/ddp.py"
    horovod = f"{launcher} python benchmarks/peers/horovod_example.py"
    plain = "python benchmarks/peers/plain.py"
    one_thread = cpu | {"OMP_NUM_THREADS": "1"}  # as the peers; a rank of Lockstep alone would take all cores
    arms = [
        *(_peer(name, command.format(launcher=launcher), one_thread) for name, command in LOCKSTEP_COMMANDS.items()),
        _peer("PyTorch DDP (gloo)", ddp, written),
        _peer("PyTorch DDP (gloo), pinned", f"{ddp} --pin", pinned),
        _peer("Horovod example", horovod, written),
        _peer("Horovod example, pinned", f"{horovod} --pin", pinned),
        _peer(ALONE, plain, written),
        _peer(ALONE_PINNED, f"{plain} --pin", first),
    ]
    never_talk = f"plain PyTorch, {num_ranks} pinned processes that never talk"
    return [*arms, _peer(never_talk, f"{plain} --pin", pinned, num_ranks)]


def _peer(name: str, command: str, environment: Mapping[str, str | None], num_copies: int = 1) -> Peer:
    return Peer(name, tuple(shlex.split(command)), environment, num_copies)


def _lockstep_only(environment: Mapping[str, str], oversubscribed: bool) -> list[str]:
    """The variables that env/activate has set and without which the peers start all the same."""
    names = environment.get("LOCKSTEP_DEFAULTS", "").split()
    needed = ("ALLOW_RUN_AS_ROOT", "rmaps") if oversubscribed else ("ALLOW_RUN_AS_ROOT",)
    return [name for name in names if not any(part in name for part in needed)]


def measure_peers(
    peers: Sequence[Peer], num_rounds: int, say: Callable[[str], None], timeout_seconds: float = TIMEOUT_SECONDS
) -> dict[str, list[float]]:
    """Images per second of each peer, one for each round; fewer, or none, for a peer that fails and so drops out.

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
                rate = _run(peer, timeout_seconds)
            except PeerError as error:
                dropped.add(peer.name)
                say(f"{peer.name} drops out: {error}")
            else:
                rates[peer.name].append(rate)
                say(f"round {number + 1} of {num_rounds}: {peer.name}: {rate:.0f} images/s")
    return rates


def _run(peer: Peer, timeout_seconds: float) -> float:
    """Images per second of all copies of `peer` together; nothing of them is left behind.

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
            return sum(_images_per_second(output) for output in outputs)
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


def _images_per_second(output: Path) -> float:
    """The result in a peer's output. Launchers put a tag in front of each line."""
    lines = [line for line in output.read_text(errors="replace").splitlines() if '"images_per_second"' in line]
    if len(lines) != 1:  # several: its ranks have not found each other
        raise PeerError(f"it printed {len(lines)} results where one is expected")
    try:
        rate = float(json.loads(lines[0][lines[0].index("{") : lines[0].rindex("}") + 1])["images_per_second"])
    except (ValueError, TypeError, KeyError) as error:
        raise PeerError(f"its result cannot be read ({error!r})") from None
    if not (math.isfinite(rate) and rate > 0):
        raise PeerError(f"its result is {rate} images/s")
    return rate


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
    }.get(name, (LOCKSTEP, name))
    ratios = [one / other for one, other in zip(rates.get(of, ()), rates.get(to, ()), strict=False)]
    if not ratios or name in (LOCKSTEP, ONE_RANK):
        return None
    return Ratio(of, to, statistics.median(ratios), min(ratios), max(ratios))
