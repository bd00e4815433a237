"""Train with one fault, for `lockstep drill`.

`python -m lockstep.drill.faulty_train FAULT RANK UPDATE FILE [SETTING...]` injects FAULT into RANK before UPDATE, and
writes the time of the fault to FILE. SETTINGs are those of `lockstep train`.
"""

import os
import platform
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from lockstep.comm.cluster import Cluster
from lockstep.comm.program import run_program
from lockstep.data.batch import Batch
from lockstep.runtime.errors import SettingsError
from lockstep.training.checkpoint import list_checkpoints
from lockstep.training.hooks import TrainerHook
from lockstep.training.run import run
from lockstep.training.trainer import Trainer

SECONDS_SLOWER = 0.2
SECONDS_CUT = 25
SECONDS_FOR_CHECKPOINTS = 20

Inject = Callable[[Batch], None]


def _signal(number: int, _: Batch) -> None:
    os.kill(os.getpid(), number)


def _slow(_: Batch) -> None:
    time.sleep(SECONDS_SLOWER)


def _exception(_: Batch) -> None:
    raise RuntimeError("an exception of the drill")


def _nan(batch: Batch) -> None:
    batch.inputs.fill_(float("nan"))


def _full_disk(_: Batch) -> None:
    """Limit files to 100 kB: logs can still be written, checkpoints cannot, as on a nearly full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def _cut_link(_: Batch) -> None:
    """Take the network card down. Another process takes it up again, in time for the launcher to end the job."""
    device = _default_device()
    mend = f"sleep {SECONDS_CUT}; ip link set {device} up"
    subprocess.Popen(["sh", "-c", mend], start_new_session=True, stdin=-3, stdout=-3, stderr=-3)
    subprocess.run(["ip", "link", "set", device, "down"], check=True)


INJECT: dict[str, Inject] = {
    "sigkill": partial(_signal, signal.SIGKILL),
    "sigstop": partial(_signal, signal.SIGSTOP),
    "slow": _slow,
    "exception": _exception,
    "nan": _nan,
    "full_disk": _full_disk,
    "torn_shard": partial(_signal, signal.SIGKILL),
    "sigterm": partial(_signal, signal.SIGTERM),
    "sigusr1": partial(_signal, signal.SIGUSR1),
    "cut_link": _cut_link,
}


def _default_device() -> str:
    """The network card to the other nodes: the first one that is up, other than the loopback."""
    for device in sorted(Path("/sys/class/net").iterdir()):
        if device.name != "lo" and (device / "operstate").read_text().strip() == "up":
            return device.name
    raise SettingsError("this node has no network card that is up")


def _check_possible(cluster: Cluster, fault: str, rank: int) -> None:
    """Collective. Raises SettingsError on every rank where `fault` cannot be injected here."""
    nodes = cluster.all_gather_object(platform.node())
    if fault == "cut_link":
        if nodes[rank] == nodes[0]:
            raise SettingsError(f"not possible here: ranks 0 and {rank} are on one node").as_shared()
        if not all(cluster.all_gather_object(os.geteuid() == 0)):
            raise SettingsError("not possible here: only root can cut a link").as_shared()


class Fault(TrainerHook):
    """Inject a fault before one update; a slow rank stays slow from then on."""

    def __init__(self, inject: Inject, update: int, file: Path) -> None:
        """
        Args:
            update: counted from 1.
            file: receives the time of the fault.
        """
        self._inject = inject
        self._update = update
        self._file = file

    def before_update(self, trainer: Trainer, item: Batch) -> None:
        update = trainer.progress.step + 1
        if update == self._update:
            _wait_for_checkpoints(trainer.folder.path)
            self._file.write_text(str(time.time()))
        if update == self._update or (update > self._update and self._inject is _slow):
            self._inject(item)


def _wait_for_checkpoints(run: Path) -> None:
    """Wait until both checkpoints that are due by now are written: one may be torn, the run resumes from the other."""
    deadline = time.monotonic() + SECONDS_FOR_CHECKPOINTS
    while len(list_checkpoints(run)) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)


def main(cluster: Cluster) -> None:
    fault, rank, update, file = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])
    sys.argv[1:] = sys.argv[5:]
    _check_possible(cluster, fault, rank)

    run(cluster, [Fault(INJECT[fault], update, file)] if cluster.rank == rank else [])


if __name__ == "__main__":
    run_program(main)
