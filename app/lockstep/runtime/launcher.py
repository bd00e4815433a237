"""Detect the launcher that started this process, and compare its rank and size with MPI's.

A launcher and an MPI that do not work together start N processes that are each "rank 0 of 1": N trainings that
overwrite each other. The launcher's rank and size are read from the environment; those of MPI are the ones used.
"""

import os
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass

from lockstep.runtime.command_line import in_environment, this_program
from lockstep.runtime.errors import SettingsError

GLOO = "horovodrun over Gloo"
MPIRUN = "mpirun of Open MPI"
HYDRA = "mpiexec of MPICH or Intel MPI (Hydra)"
SRUN = "srun"
TORCHRUN = "torchrun"
NONE = "none"


@dataclass(frozen=True)
class Launcher:
    """The launcher that started this process, and the ranks it has assigned.

    Attributes:
        name: one of the constants above, or the name of another launcher in `_LAUNCHERS`.
        rank, size: of this process among all that it started.
        local_rank, local_size: the same on this node; None if the launcher does not set them.
        pmi: how srun passes the rank to MPI (`--mpi`): `none`, `pmi2`, `pmix`, ...; empty for other launchers.
        tasks_asked: the number of tasks of this Slurm job; 0 outside of one, or if Slurm does not set it.
    """

    name: str
    rank: int = 0
    size: int = 1
    local_rank: int | None = None
    local_size: int | None = None
    pmi: str = ""
    tasks_asked: int = 0

    @property
    def is_gloo(self) -> bool:
        """Whether Horovod takes its ranks from its own launcher: MPI counts 1 rank in each process."""
        return self.name == GLOO

    def __str__(self) -> str:
        return f"{self.name} --mpi={self.pmi}" if self.pmi else self.name


@dataclass(frozen=True)
class _Variables:
    """The names of a launcher's variables. It is that launcher if those of rank and size, and `sign`, are all set."""

    name: str
    rank: str
    size: str
    local_rank: str
    local_size: str = ""
    sign: str = ""


# The order matters: in a Slurm job, mpirun and Hydra start their daemons through srun, so that their processes have
# srun's variables, too, which count daemons.
_LAUNCHERS = (
    _Variables(GLOO, "HOROVOD_RANK", "HOROVOD_SIZE", "HOROVOD_LOCAL_RANK", "HOROVOD_LOCAL_SIZE", "HOROVOD_CONTROLLER"),
    _Variables(
        "jsrun", "JSM_NAMESPACE_RANK", "JSM_NAMESPACE_SIZE", "JSM_NAMESPACE_LOCAL_RANK", "JSM_NAMESPACE_LOCAL_SIZE"
    ),
    _Variables(
        MPIRUN,
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
    ),
    _Variables(
        "mpirun_rsh of MVAPICH2",
        "MV2_COMM_WORLD_RANK",
        "MV2_COMM_WORLD_SIZE",
        "MV2_COMM_WORLD_LOCAL_RANK",
        "MV2_COMM_WORLD_LOCAL_SIZE",
    ),
    _Variables("flux run", "FLUX_TASK_RANK", "FLUX_JOB_SIZE", "FLUX_TASK_LOCAL_ID"),
    _Variables(HYDRA, "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS", "MPI_LOCALRANKID"),
    # Job steps only: the script of a batch job, which is no rank, has SLURM_PROCID=0 and SLURM_NTASKS.
    _Variables(SRUN, "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", sign="SLURM_STEP_ID"),
    _Variables(TORCHRUN, "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "TORCHELASTIC_RUN_ID"),
)


def detect_launcher(environment: Mapping[str, str]) -> Launcher:
    """The launcher that has set these variables."""
    tasks_asked = _number(environment, "SLURM_NTASKS") or 0
    for known in _LAUNCHERS:
        rank, size = _number(environment, known.rank), _number(environment, known.size)
        if rank is not None and size is not None and (not known.sign or known.sign in environment):
            return Launcher(
                name=known.name,
                rank=rank,
                size=size,
                local_rank=_number(environment, known.local_rank),
                local_size=_number(environment, known.local_size),
                pmi=environment.get("SLURM_MPI_TYPE", "none") if known.name == SRUN else "",
                tasks_asked=tasks_asked,
            )
    return Launcher(NONE, tasks_asked=tasks_asked)


def mpi_misses_processes(launcher: Launcher, mpi_size: int) -> bool:
    """Whether MPI counts fewer ranks than processes were started, so that several processes are the same rank."""
    return launcher.size > mpi_size and not launcher.is_gloo


def reports_errors(launcher: Launcher, mpi_rank: int, mpi_size: int) -> bool:
    """Whether this process prints errors that all have found: MPI's rank 0, or the launcher's if there are several."""
    return launcher.rank == 0 if launcher.size > mpi_size else mpi_rank == 0


def this_process_reports() -> bool:
    """Whether this process prints errors that all have found, before MPI is loaded: the launcher's rank 0."""
    return detect_launcher(os.environ).rank == 0


def check_launcher(launcher: Launcher, mpi_size: int, mpi_version: str, mpirun: str) -> None:
    """Refuse to run if MPI counts fewer ranks than the launcher has started.

    Args:
        mpi_size: the number of ranks that MPI counts.
        mpi_version: of the loaded MPI, such as `Open MPI v5.0.11`.
        mpirun: the path of its mpirun.

    Raises:
        SettingsError: in each of the processes, as a shared one.
    """
    if mpi_misses_processes(launcher, mpi_size):
        command = shlex.join([*this_program(), *sys.argv[1:]])
        fix = how_to_start(launcher, mpi_version, mpirun, command)
        raise SettingsError(f"{describe_mismatch(launcher, mpi_size, mpi_version)}. {fix}").as_shared()


def describe_mismatch(launcher: Launcher, mpi_size: int, mpi_version: str) -> str:
    """What is wrong if `mpi_misses_processes`, and why."""
    if launcher.name == SRUN:
        cause = f"it does not understand what srun offers (--mpi={launcher.pmi})"
    elif launcher.name == TORCHRUN:
        cause = "torchrun starts ranks for torch.distributed, of which MPI learns nothing"
    else:
        cause = "that launcher belongs to another MPI"
    told = "rank 0 of 1" if mpi_size == 1 else f"one of {mpi_size} ranks"
    return (
        f"mixed MPIs: {launcher} started {launcher.size} processes, and {mpi_version} tells each that it is {told}: "
        f"{cause}. Each would train alone"
    )


def how_to_start(launcher: Launcher, mpi_version: str, mpirun: str, command: str) -> str:
    """How to start `command` with as many ranks such that MPI knows them."""
    ours = in_environment(f"{mpirun} -np {launcher.size} {command}")
    pmi = srun_mpi_option(mpi_version)
    if launcher.name != SRUN:
        return f"Start it with the mpirun of this MPI: {ours}"
    if launcher.pmi == pmi:
        return f"Start it with mpirun, in an allocation (salloc, sbatch): {ours}"
    srun = f"srun --mpi={pmi} --ntasks={launcher.size} {in_environment(command)}"
    return f"Start it with: {srun}   or, if this Slurm has no {pmi}, in an allocation (salloc, sbatch): {ours}"


def missing_launcher_warning(launcher: Launcher, mpi_size: int) -> str | None:
    """A warning if the Slurm job has several tasks, but this rank was started alone: a script without srun."""
    if launcher.name == NONE and mpi_size == 1 and launcher.tasks_asked > 1:
        return (
            f"warning: this Slurm job is for {launcher.tasks_asked} tasks, and this is the only rank: nothing started "
            "the others; put srun (or mpirun) in front of python"
        )
    return None


def srun_mpi_option(mpi_version: str) -> str:
    """The value of srun's `--mpi` that an MPI library supports."""
    return "pmix" if "Open MPI" in mpi_version else "pmi2"


def _number(environment: Mapping[str, str], name: str) -> int | None:
    value = environment.get(name, "") if name else ""
    return int(value) if value.isdigit() else None
