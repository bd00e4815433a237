"""Which launcher started this process, what it says of the job, and whether MPI says the same.

A launcher and an MPI that do not know each other give N processes that are each "rank 0 of 1": N trainings that write
over each other. What a launcher says stands in variables of the environment; what MPI says decides.
"""

import os
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass

from lockstep.runtime.errors import SettingsError
from lockstep.runtime.hints import in_environment, this_program

GLOO = "horovodrun over Gloo"
MPIRUN = "mpirun of Open MPI"
HYDRA = "mpiexec of MPICH or Intel MPI (Hydra)"
SRUN = "srun"
TORCHRUN = "torchrun"
NONE = "none"


@dataclass(frozen=True)
class Launcher:
    """What started this process, and what it says.

    Attributes:
        name: one of those above, or another that is as well known.
        rank, size: this process among all that it started.
        local_rank, local_size: the same on this node; None where it does not say.
        pmi: how srun offers to tell a process its rank (`--mpi`): `none`, `pmi2`, `pmix`, ...; empty for the others.
        tasks_asked: how many tasks this Slurm job is for; 0 outside of one, and where it does not say.
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
        """Horovod's ranks are told by its own launcher, and MPI, which has no part in it, says 1 to each."""
        return self.name == GLOO

    def __str__(self) -> str:
        return f"{self.name} --mpi={self.pmi}" if self.pmi else self.name


@dataclass(frozen=True)
class _Variables:
    """What one launcher's variables are called. It is that launcher if rank, size and `sign` are all there."""

    name: str
    rank: str
    size: str
    local_rank: str
    local_size: str = ""
    sign: str = ""


# Whoever starts its processes through another one comes before it: those of mpirun and Hydra are children of srun in a
# Slurm job, and have its variables, too, which then count the daemons of mpirun.
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
    # Of a step only: the script of a batch job has SLURM_PROCID=0 and SLURM_NTASKS, and is no rank.
    _Variables(SRUN, "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", sign="SLURM_STEP_ID"),
    _Variables(TORCHRUN, "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "TORCHELASTIC_RUN_ID"),
)


def detect_launcher(environment: Mapping[str, str]) -> Launcher:
    """What started a process with these variables."""
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


def ranks_are_lost(launcher: Launcher, mpi_size: int) -> bool:
    """MPI has fewer ranks than processes were started, so that several of them believe that they are the same rank."""
    return launcher.size > mpi_size and not launcher.is_gloo


def is_speaker(launcher: Launcher, mpi_rank: int, mpi_size: int) -> bool:
    """This process is the one that tells what all of them find: rank 0, and among several such, the launcher's."""
    return launcher.rank == 0 if launcher.size > mpi_size else mpi_rank == 0


def this_process_speaks() -> bool:
    """This process tells what concerns all, before MPI has started: rank 0 by the launcher's word."""
    return detect_launcher(os.environ).rank == 0


def check_launcher(launcher: Launcher, mpi_size: int, mpi_version: str, mpirun: str) -> None:
    """Refuse the processes of a launcher that MPI knows nothing of.

    Args:
        mpi_size: how many ranks MPI says there are.
        mpi_version: of the MPI that is loaded, such as `Open MPI v5.0.11`.
        mpirun: the one that belongs to it.

    Raises:
        SettingsError: on each of the processes, as a shared one.
    """
    if ranks_are_lost(launcher, mpi_size):
        command = shlex.join([*this_program(), *sys.argv[1:]])
        fix = how_to_start(launcher, mpi_version, mpirun, command)
        raise SettingsError(f"{describe_loss(launcher, mpi_size, mpi_version)}. {fix}").as_shared()


def describe_loss(launcher: Launcher, mpi_size: int, mpi_version: str) -> str:
    """What is wrong where `ranks_are_lost`, and why."""
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
    """The way to start as many ranks of `command` that MPI understands."""
    ours = in_environment(f"{mpirun} -np {launcher.size} {command}")
    pmi = pmi_of(mpi_version)
    if launcher.name != SRUN:
        return f"Start it with the mpirun of this MPI: {ours}"
    if launcher.pmi == pmi:
        return f"Start it with mpirun, in an allocation (salloc, sbatch): {ours}"
    srun = f"srun --mpi={pmi} --ntasks={launcher.size} {in_environment(command)}"
    return f"Start it with: {srun}   or, if this Slurm has no {pmi}, in an allocation (salloc, sbatch): {ours}"


def remark_on(launcher: Launcher, mpi_size: int) -> str | None:
    """A line for people, if ranks were asked for which nothing started: a script that forgot its srun."""
    if launcher.name == NONE and mpi_size == 1 and launcher.tasks_asked > 1:
        return (
            f"warning: this Slurm job is for {launcher.tasks_asked} tasks, and this is the only rank: nothing started "
            "the others; put srun (or mpirun) in front of python"
        )
    return None


def pmi_of(mpi_version: str) -> str:
    """The `--mpi` of srun that an MPI library understands."""
    return "pmix" if "Open MPI" in mpi_version else "pmi2"


def _number(environment: Mapping[str, str], name: str) -> int | None:
    value = environment.get(name, "") if name else ""
    return int(value) if value.isdigit() else None
