"""Loads MPI, without torch: the only file that imports mpi4py. To import it is to become a rank of the job.

The others reach MPI through ranks.py; the doctor's ranks, which must meet within seconds, have no use for tensors.
"""

import os
import sys
from contextlib import suppress
from types import TracebackType

from lockstep.comm.rendezvous import call_off, is_elastic
from lockstep.runtime.errors import ExitCode
from lockstep.runtime.launcher import NONE, detect_launcher

# Open MPI reads these when it is loaded; a value that the site has set wins.
# Ranks often outnumber cores, or share them with Horovod's thread: a waiting rank must give its core away, or an
# all-reduce of 2 ms takes 50 ms.
os.environ.setdefault("OMPI_MCA_mpi_yield_when_idle", "1")
# Over TCP, on one connection, each message's announcement waits behind the rank's own data: 60 ms in place of 40 for
# the reference network's gradient at 1 Gbit/s. Other networks take no notice.
os.environ.setdefault("OMPI_MCA_btl_tcp_links", "2")

# Where MPI has one rank alone, it needs no network, and must not listen to one. What this process starts may need it.
_TRANSPORTS = "OMPI_MCA_btl"
_launcher = detect_launcher(os.environ)
_needs_no_network = _TRANSPORTS not in os.environ and (
    _launcher.is_gloo or (_launcher.name == NONE and not {"PMIX_RANK", "PMI_RANK"} & os.environ.keys())
)
if _needs_no_network:
    os.environ[_TRANSPORTS] = "self"

_umask = os.umask(0o077)  # what Open MPI leaves in the temporary folder is for nobody else
from mpi4py import MPI as MPI  # noqa: E402  for cluster.py, which must import it before Horovod

os.umask(_umask)

if _needs_no_network:
    del os.environ[_TRANSPORTS]


def _end_job(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    sys.__excepthook__(kind, error, trace)
    abort_job(ExitCode.BUG)


# From here on this process is an MPI rank: an error while it imports the rest must not leave the others waiting.
sys.excepthook = _end_job


def rank_in_job() -> int:
    """This rank, known before the ranks have met."""
    launcher = detect_launcher(os.environ)
    return launcher.rank if launcher.is_gloo else MPI.COMM_WORLD.rank


def size_of_job() -> int:
    """How many ranks MPI says there are."""
    return MPI.COMM_WORLD.size


def abort_job(exit_code: int) -> None:
    """End every rank of the job at once, from this rank alone. A lone rank just goes on to its own end."""
    launcher = detect_launcher(os.environ)
    if launcher.is_gloo and launcher.size > 1:  # horovodrun ends the others, or lets them go on
        if is_elastic() and exit_code != ExitCode.BUG:
            with suppress(OSError):
                call_off(exit_code)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(exit_code)
    if MPI.Is_initialized() and not MPI.Is_finalized() and MPI.COMM_WORLD.size > 1:
        MPI.COMM_WORLD.Abort(exit_code)


def mpi_version() -> str:
    """The MPI library that this process has loaded, such as `Open MPI v5.0.11`."""
    return MPI.Get_library_version().splitlines()[0].split(",")[0].strip()


def mpi_built_with() -> str:
    """The MPI whose header mpi4py was compiled with, such as `Open MPI 5.0.11`."""
    name, version = MPI.get_vendor()
    return f"{name} {'.'.join(map(str, version))}"
