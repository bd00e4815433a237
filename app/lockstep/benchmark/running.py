"""Runs a peer to its end, reads what it prints, and leaves nothing of it behind."""

import contextlib
import os
import shlex
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeVar
from uuid import uuid4

import psutil

from lockstep.benchmark.peer_commands import Peer

T = TypeVar("T")

GRACE_SECONDS = 3  # between asking a peer to end and killing it
TAIL = 15  # lines of a failed peer's output that are shown
FAMILY = "PEER_FAMILY"  # in the environment of everything that a peer starts, so that nothing of it stays behind


class PeerError(Exception):
    """Why a peer has no result."""


def run_peer(peer: Peer, timeout_seconds: float, read: Callable[[str], T]) -> list[T]:
    """What `read` finds in the output of each copy of `peer`; nothing of them is left behind.

    Raises:
        PeerError: it could not be started, failed, or did not end in time; or `read` has raised it.
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
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            start_new_session=True,
        )


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
