"""Load MPI: the only file that imports mpi4py. Importing it makes this process a rank of the job.

It must come before Horovod, which shares this MPI: mpi4py asks MPI for `THREAD_MULTIPLE`, which Horovod's background
thread needs. It does not import torch: the doctor's ranks, which must start within seconds, need no tensors.
"""

import os
import sys
from contextlib import suppress
from types import TracebackType

from lockstep.comm.rendezvous import cancel_run, is_elastic
from lockstep.runtime.errors import ExitCode
from lockstep.runtime.launcher import NONE, detect_launcher

# Open MPI reads these when it is loaded. A value that the site has set takes precedence.
# Ranks often outnumber cores, or share them with Horovod's thread: unless a waiting rank yields its core, an all-reduce
# of 2 ms takes 50 ms.
os.environ.setdefault("OMPI_MCA_mpi_yield_when_idle", "1")
# Over a single TCP connection each message's header waits behind the rank's own data: 60 ms instead of 40 ms for the
# reference network's gradient at 1 Gbit/s. Other networks ignore this.
os.environ.setdefault("OMPI_MCA_btl_tcp_links", "2")

# A single MPI rank needs no network, and must not listen on one. Restored below for the processes that this one starts.
_TRANSPORTS = "OMPI_MCA_btl"
_launcher = detect_launcher(os.environ)
_needs_no_network = _TRANSPORTS not in os.environ and (
    _launcher.is_gloo or (_launcher.name == NONE and not {"PMIX_RANK", "PMI_RANK"} & os.environ.keys())
)
if _needs_no_network:
    os.environ[_TRANSPORTS] = "self"

_umask = os.umask(0o077)  # no other user may read what Open MPI leaves in the temporary folder
from mpi4py import MPI as MPI  # noqa: E402  after the environment is set

os.umask(_umask)

if _needs_no_network:
    del os.environ[_TRANSPORTS]


def _abort_on_error(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    sys.__excepthook__(kind, error, trace)
    abort_job(ExitCode.BUG)


# This process is an MPI rank now: an error in a later import must not leave the other ranks waiting.
sys.excepthook = _abort_on_error


def rank_in_job() -> int:
    """This process's rank, known before Horovod has started."""
    launcher = detect_launcher(os.environ)
    return launcher.rank if launcher.is_gloo else MPI.COMM_WORLD.rank


def size_of_job() -> int:
    """The number of ranks that MPI knows."""
    return MPI.COMM_WORLD.size


def abort_job(exit_code: int) -> None:
    """End every rank of the job at once; not a collective. Returns if there is no other rank."""
    launcher = detect_launcher(os.environ)
    if launcher.is_gloo and launcher.size > 1:  # horovodrun ends the others, or in an elastic job lets them go on
        if is_elastic() and exit_code != ExitCode.BUG:
            with suppress(OSError):
                cancel_run(exit_code)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(exit_code)
    if MPI.Is_initialized() and not MPI.Is_finalized() and MPI.COMM_WORLD.size > 1:
        MPI.COMM_WORLD.Abort(exit_code)


def mpi_version() -> str:
    """Name and version of the loaded MPI library, such as `Open MPI v5.0.11`."""
    return MPI.Get_library_version().splitlines()[0].split(",")[0].strip()


def mpi_built_with() -> str:
    """Name and version of the MPI that mpi4py was compiled with, such as `Open MPI 5.0.11`."""
    name, version = MPI.get_vendor()
    return f"{name} {'.'.join(map(str, version))}"
