"""The commands that Lockstep is compared with, and how one is run without leaving processes behind.

A command prints one line of JSON with its `images_per_second`, all ranks together. It runs as its users would write it,
without the variables that env/activate sets, and again with each rank pinned to its cores. Nothing here imports MPI,
since an MPI process could not start other jobs.
"""

import contextlib
import os
import shlex
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeVar
from uuid import uuid4

import psutil

LOCKSTEP, BF16, ONE_RANK = "Lockstep", "Lockstep, bf16", "Lockstep, one rank"
ALONE, ALONE_PINNED = "plain PyTorch, one process", "plain PyTorch, one process, pinned"
THROUGHPUT = "lockstep benchmark throughput --json true --rounds 1 --limit false --data.batch_size_per_rank 32"
VIT = (  # 49.7 million parameters, as in peers/data_parallel.py
    "--model.name vit --model.vit.width 768 --model.vit.depth 7 --model.vit.num_heads 12 --optimizer.name adam "
    "--optimizer.weight_decay 0 --data.batch_size_per_rank 8 --updates 10"
)
HOW = ("", ", pinned")
ZERO = {
    "PyTorch ZeroRedundancyOptimizer": ("zero1", "zero_redundancy"),
    "PyTorch FSDP2, parameters kept": ("zero2", "fsdp2 --keep"),
    "PyTorch FSDP2": ("zero3", "fsdp2"),
}
LOCKSTEP_COMMANDS = {
    LOCKSTEP: f"{{launcher}} {THROUGHPUT}",
    BF16: f"{{launcher}} {THROUGHPUT} --precision bf16",
    ONE_RANK: THROUGHPUT,
}


@dataclass(frozen=True)
class Peer:
    """A command to be timed.

    Attributes:
        environment: variables that differ from this process's; None: unset.
        num_copies: processes to start at once, whose rates are added; each gets its LOCAL_RANK.
    """

    name: str
    command: tuple[str, ...]
    environment: Mapping[str, str | None] = field(default_factory=dict)
    num_copies: int = 1


def peers(
    num_ranks: int, num_cores: int, environment: Mapping[str, str], launcher: str = "horovodrun -np {ranks}"
) -> list[Peer]:
    """Lockstep and other ways of data-parallel training, all on the CPU.

    Args:
        num_cores: cores of this machine that may be used.
        environment: of this process; its LOCKSTEP_DEFAULTS lists the variables that env/activate has set.
        launcher: the command that starts `ranks` processes of Lockstep or Horovod.
    """
    launcher = launcher.format(ranks=num_ranks)
    cpu: dict[str, str | None] = {"CUDA_VISIBLE_DEVICES": ""}
    as_written = cpu | dict.fromkeys(_lockstep_only(environment, oversubscribed=num_ranks > num_cores))
    pinned = as_written | {"OMPI_MCA_mpi_yield_when_idle": "1"}
    first = pinned | {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": str(num_ranks)}  # one process on the cores of rank 0
    ddp = f"torchrun --standalone --nproc-per-node {num_ranks} -m lockstep.benchmark.peers.data_parallel ddp"
    horovod = f"{launcher} python -m lockstep.benchmark.peers.data_parallel horovod"
    plain = "python -m lockstep.benchmark.peers.data_parallel plain"
    one_thread = cpu | {"OMP_NUM_THREADS": "1"}  # like the peers; a single rank of Lockstep would use all cores
    commands = [
        *(_peer(name, command.format(launcher=launcher), one_thread) for name, command in LOCKSTEP_COMMANDS.items()),
        _peer("PyTorch DDP (gloo)", ddp, as_written),
        _peer("PyTorch DDP (gloo), pinned", f"{ddp} --pin", pinned),
        _peer("Horovod example", horovod, as_written),
        _peer("Horovod example, pinned", f"{horovod} --pin", pinned),
        _peer(ALONE, plain, as_written),
        _peer(ALONE_PINNED, f"{plain} --pin", first),
    ]
    independent = f"plain PyTorch, {num_ranks} pinned processes that never talk"
    return [*commands, _peer(independent, f"{plain} --pin", pinned, num_ranks)]


def sharding_peers(
    num_ranks: int, num_cores: int, environment: Mapping[str, str], launcher: str = "mpirun -np {ranks}"
) -> list[Peer]:
    """ZeRO 1 to 3 of Lockstep, and of PyTorch over gloo, as usually started and with each rank pinned."""
    launcher = launcher.format(ranks=num_ranks)
    cpu: dict[str, str | None] = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    as_written = cpu | dict.fromkeys(_lockstep_only(environment, oversubscribed=num_ranks > num_cores))
    commands = []
    for name, (parallel, kind) in ZERO.items():
        torchrun = f"torchrun --standalone --nproc-per-node {num_ranks}"
        command = f"{torchrun} -m lockstep.benchmark.peers.data_parallel {kind} --updates 10 --warmup 3"
        lockstep = f"{launcher} {THROUGHPUT.replace('--data.batch_size_per_rank 32', VIT)} --parallel {parallel}"
        commands += [
            _peer(f"Lockstep {parallel}", lockstep, cpu),
            _peer(name, command, as_written),
            _peer(f"{name}, pinned", f"{command} --pin", as_written),
        ]
    return commands


def _peer(name: str, command: str, environment: Mapping[str, str | None], num_copies: int = 1) -> Peer:
    return Peer(name, tuple(shlex.split(command)), environment, num_copies)


def _lockstep_only(environment: Mapping[str, str], oversubscribed: bool) -> list[str]:
    """The variables that env/activate has set and that the peers do not need to start."""
    names = environment.get("LOCKSTEP_DEFAULTS", "").split()
    needed = ("ALLOW_RUN_AS_ROOT", "rmaps") if oversubscribed else ("ALLOW_RUN_AS_ROOT",)
    return [name for name in names if not any(part in name for part in needed)]


# -- running one -------------------------------------------------------------------------------------------------------

T = TypeVar("T")

GRACE_SECONDS = 3  # between asking a peer to end and killing it
TAIL = 15  # lines of a failed peer's output that are shown
FAMILY = "PEER_FAMILY"  # environment variable that all processes of a peer inherit, so that all can be found


class PeerError(Exception):
    """A peer has no result; the message says why."""


def run_peer(peer: Peer, timeout_seconds: float, read: Callable[[str], T]) -> list[T]:
    """Run all copies of `peer` to their end, and return what `read` makes of each one's output.

    Everything that the peer has started is ended, too.

    Raises:
        PeerError: the peer could not be started, failed, or did not end in time; or `read` raised it.
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
            return [read(output.read_text(errors="replace")) for output in outputs]
        except subprocess.TimeoutExpired:
            raise PeerError(_explain(f"it did not end in {timeout_seconds:g} s", peer, outputs)) from None
        except PeerError as error:
            raise PeerError(_explain(str(error), peer, outputs)) from None
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
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            start_new_session=True,
        )


def _ending(returncode: int) -> str:
    return f"signal {-returncode}" if returncode < 0 else f"exit code {returncode}"


def _explain(why: str, peer: Peer, outputs: Sequence[Path]) -> str:
    """`why`, with the command and the last lines that its copies printed."""
    lines: list[str] = []
    for output in outputs:
        for path in (output, output.with_suffix(".err")):
            with contextlib.suppress(OSError):  # a copy that was not started has no output
                lines += [line for line in path.read_text(errors="replace").splitlines() if line.strip()][-TAIL:]
    return "\n".join([f"{why}: {shlex.join(peer.command)}", *(f"    | {line}" for line in lines)])


def _end(processes: Sequence[subprocess.Popen[bytes]], token: str) -> None:
    """Terminate, then kill all processes of a peer, including what its launchers have left behind."""
    for member in _family(token):
        with contextlib.suppress(psutil.NoSuchProcess):
            member.terminate()  # lets launchers clean up
    psutil.wait_procs(_family(token), timeout=GRACE_SECONDS)
    while family := _family(token):  # repeated: one may have been starting meanwhile
        for member in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
        psutil.wait_procs(family, timeout=GRACE_SECONDS)
    for process in processes:
        process.wait()


def _family(token: str) -> list[psutil.Process]:
    """Every running process with `token` in its environment: children, their children, and orphans."""
    family = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.status() != psutil.STATUS_ZOMBIE and process.environ().get(FAMILY) == token:
                family.append(process)
    return family
