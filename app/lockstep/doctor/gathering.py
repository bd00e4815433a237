"""What one process finds out by itself, before MPI: about itself, and about its node if it is the first one there."""

import importlib.util
import os
import platform
import resource
import shutil
import socket
import subprocess
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from lockstep.doctor.commands import output_of
from lockstep.doctor.facts import Gpu, LocalFacts, NodeFacts, Unknown
from lockstep.doctor.folder import try_folder
from lockstep.doctor.forked_probe import Aside
from lockstep.doctor.libraries import find_mpi, look_at_libraries
from lockstep.doctor.resources import infiniband_rates, memory_left, num_cpus_of_job, shared_memory
from lockstep.doctor.slurm import ask_slurm
from lockstep.runtime.affinity import allowed_cpus, read_topology
from lockstep.runtime.installation import Installation, read_installation
from lockstep.runtime.launcher import Launcher

VARIABLES = (
    *("PYTHON", "LD_", "OMP_", "MKL_", "OPENBLAS_", "KMP_", "CUDA_", "NCCL_", "HOROVOD_", "OMPI_MCA_", "PRTE_MCA_"),
    *("PMIX_MCA_", "UCX_", "FI_", "I_MPI_", "MPICH_", "SLURM_", "SBATCH_", "SRUN_", "LOCKSTEP_", "PBS_", "LSB_JOBID"),
)
NO_ANSWER = "there was no answer in time"
PACKAGES = ("torch", "numpy", "mpi4py", "horovod")


class Looking:
    """What takes a while, begun: each in a process of its own, as MPI is in one."""

    def __init__(self, launcher: Launcher, folder: Path) -> None:
        self._launcher = launcher
        self._asides: dict[str, Aside] = {}
        if launcher.local_rank in (0, None):
            self._begin("mpi", find_mpi)
            self._begin("libraries", look_at_libraries)
            self._begin("folder", partial(try_folder, folder))
            self._begin("gpus", list_gpus)
            self._begin("address", partial(socket.gethostbyname, platform.node()))
        if launcher.rank == 0 and "SLURM_JOB_ID" in os.environ:
            self._begin("slurm", partial(ask_slurm, os.environ["SLURM_JOB_ID"]))

    def finish(self, seconds_left: Callable[[], float]) -> LocalFacts:
        """The facts, once all are there, or no second is left."""
        environment, cpus, installation = dict(os.environ), allowed_cpus(), read_installation()
        answers = {name: _receive(aside, seconds_left()) for name, aside in self._asides.items()}
        limits = {"n": resource.RLIMIT_NOFILE, "l": resource.RLIMIT_MEMLOCK, "u": resource.RLIMIT_NPROC}
        of_node = None
        if "folder" in answers:
            of_node = NodeFacts(
                mpi=answers["mpi"],
                gpus=answers["gpus"],
                libraries=answers["libraries"],
                folder=answers["folder"],
                address=answers["address"],
                shm=shared_memory(),
                infiniband=infiniband_rates(),
            )
        return LocalFacts(
            node=platform.node(),
            launcher=self._launcher,
            installation=installation,
            environment={name: value for name, value in environment.items() if name.startswith(VARIABLES)},
            strangers=_strangers(installation, environment),
            cpus=cpus,
            cores=read_topology(cpus),
            num_cpus=num_cpus_of_job(environment),
            limits={name: resource.getrlimit(limit)[0] for name, limit in limits.items()},
            memory=memory_left(),
            of_node=of_node,
            slurm=answers.get("slurm"),
        )

    def end(self) -> None:
        for aside in self._asides.values():
            aside.end()

    def _begin(self, name: str, look: Callable[[], object]) -> None:
        self._asides[name] = Aside(partial(_answer, look))


def list_gpus() -> Sequence[Gpu] | Unknown:
    """What nvidia-smi says; nothing where there is no such command, as on a machine without GPUs."""
    if shutil.which("nvidia-smi") is None:
        return []
    query = "--query-gpu=uuid,name,memory.used,memory.total"
    try:
        return parse_gpus(output_of(("nvidia-smi", query, "--format=csv,noheader,nounits")))
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        return Unknown(f"nvidia-smi fails: {error}")


def parse_gpus(text: str) -> list[Gpu]:
    """Lines such as `GPU-8a6c..., NVIDIA H100 80GB HBM3, 4, 81559`, in MiB."""
    cells = [[cell.strip() for cell in line.split(",")] for line in text.splitlines() if line.count(",") == 3]
    return [Gpu(uuid, name, int(used) << 20, int(total) << 20) for uuid, name, used, total in cells]


def _strangers(installation: Installation, environment: Mapping[str, str]) -> dict[str, str]:
    folders = [str(Path(folder).absolute()) for folder in environment.get("PYTHONPATH", "").split(os.pathsep) if folder]
    found = {}
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)
        origin = spec and spec.origin
        if origin and origin.startswith(tuple(folders)) and not origin.startswith(str(installation.venv)):
            found[package] = origin
    return found


def _answer(look: Callable[[], object], line: Connection) -> None:
    try:
        line.send(look())
    except OSError as error:  # such as a name that does not resolve
        line.send(Unknown(str(error)))


def _receive(aside: Aside, seconds: float) -> Any:
    try:
        return aside.receive(seconds)
    except TimeoutError:
        return Unknown(NO_ANSWER)
    except EOFError:
        lines = aside.last_words().strip().splitlines()
        return Unknown(lines[-1] if lines else "it ended without an answer")
