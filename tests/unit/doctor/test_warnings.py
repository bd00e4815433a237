"""What the doctor warns of, on facts, and the launch line that it prints."""

from dataclasses import replace

import pytest

from lockstep.doctor.facts import Facts, Gpu, Libraries, Link, Speed, Unknown
from lockstep.doctor.findings import Status
from lockstep.doctor.local_facts import NO_ANSWER
from lockstep.doctor.report import diagnose, is_healthy, launch_line
from lockstep.runtime.launcher import GLOO, HYDRA, SRUN, Launcher
from tests.unit.doctor.facts import (
    GIB,
    LIBMPI,
    VENV,
    bad,
    healthy,
    in_slurm,
    lost,
    with_folder,
    with_gpus,
    with_local,
    with_node,
    with_other_copy,
)

WARNINGS: dict[str, tuple[Facts, str, str]] = {
    "over Gloo": (lost(Launcher(GLOO, 0, 4, 0, 4)), "launcher", "MPI has no part in it"),
    "no srun in the script": (lost(Launcher("none", tasks_asked=4)), "launcher", "4 tasks"),
    "another copy of the same MPI": (
        with_other_copy("/opt/other/lib/libmpi.so.40"),
        "MPI",
        "/opt/other/lib/libmpi.so.40",
    ),
    "a slow disk": (with_node("n1", libraries=Unknown(NO_ANSWER)), "Horovod", "too long to load"),
    "GPUs without NCCL": (
        with_node(
            "n1",
            gpus=[Gpu(f"GPU-{index}", "H100", 0, GIB) for index in range(2)],
            libraries=Libraries((LIBMPI,), (), 0, 0, 1.0),
        ),
        "NCCL",
        "without NCCL",
    ),
    "a preloaded library": (with_local(healthy(), environment={"LD_PRELOAD": "libx.so"}), "variables", "LD_PRELOAD"),
    "a variable on one node": (
        with_local(healthy(), lambda rank: rank > 1, environment={"NCCL_DEBUG": "INFO"}),
        "variables",
        "NCCL_DEBUG is not the same",
    ),
    "more threads than CPUs": (
        with_local(healthy(), environment={"OMP_NUM_THREADS": "8"}),
        "threads",
        "16 threads in all, on 4 CPUs",
    ),
    "more ranks than CPUs": (
        with_local(healthy(), cpus=frozenset({0}), cores={0: (0, 0, 0)}, num_cpus=1),
        "binding",
        "more ranks than CPUs",
    ),
    "most of a node idle": (with_local(healthy(), num_cpus=64), "binding", "most of the node idles"),
    "an idle GPU": (
        with_node("n1", gpus=[Gpu(f"GPU-{index}", "H100", 0, GIB) for index in range(3)]),
        "GPUs",
        "1 of 3 GPUs idle",
    ),
    "a GPU in use": (with_gpus(("0", "1"), used=40 * GIB), "GPUs", "40 GiB of GPU GPU-0"),
    "a busy machine": (
        replace(healthy(), speeds={rank: Speed(1e11, 0.3) for rank in range(4)}),
        "speed",
        "get 30% of a core, and would get 100%",
    ),
    "a name that does not resolve": (with_node("n2", address=Unknown("not known")), "names", "n2 does not know"),
    "a slow fsync": (with_folder(fsync_seconds=3.0), "folder", "3 s until 1 MiB is safe"),
    "no locks": (with_folder(has_locks=False), "folder", "no locks"),
    "a file server's clock": (with_folder(clock_ahead=90.0), "folder", "90 s apart"),
    "a late message": (replace(healthy(), links=[Link("n1", "n2", 4e-3, 9e9)]), "links", "4 ms"),
    "nobody tells the end": (in_slurm(script="#!/bin/bash\nsrun python app/train.py"), "Slurm", "nothing tells a run"),
    "a signal that comes late": (in_slurm(script="#SBATCH --signal=B:USR1@20\n"), "Slurm", "20 s before the end"),
    "no requeue": (in_slurm(job={"BatchFlag": "1", "Requeue": "0"}), "Slurm", "Requeue=0"),
    "preemption": (
        in_slurm(partition={"PartitionName": "cheap", "PreemptMode": "REQUEUE", "GraceTime": "0"}),
        "Slurm",
        "partition cheap takes nodes away",
    ),
    "srun that waits for the dead": (
        in_slurm(Launcher(SRUN, 0, 4, 0, None, "pmix"), config={"KillOnBadExit": "0"}),
        "Slurm",
        "KillOnBadExit=0",
    ),
    "no PMIx": (in_slurm(mpi_types=("none", "pmi2")), "Slurm", "does not offer --mpi=pmix"),
}


@pytest.mark.parametrize(("facts", "check", "words"), WARNINGS.values(), ids=WARNINGS.keys())
def test_what_costs_time_is_a_warning(facts: Facts, check: str, words: str) -> None:
    warnings = bad(facts, Status.WARNING)
    assert {warning.check for warning in warnings} == {check}
    assert any(words in warning.what for warning in warnings), warnings
    assert all(warning.fix for warning in warnings)
    assert is_healthy(diagnose(facts))


@pytest.mark.parametrize(
    ("facts", "line"),
    [
        (healthy(), "mpirun -np 4 --host n1:2,n2:2 python app/train.py"),
        (with_local(healthy(), environment={"PBS_JOBID": "1"}), "mpirun -np 4 python app/train.py"),
        (
            with_local(healthy(), environment={"PYTHONPATH": "/x", "LD_PRELOAD": "x.so"}),
            "env -u LD_PRELOAD -u PYTHONPATH mpirun -np 4 --host n1:2,n2:2 python app/train.py",
        ),
        (
            with_local(healthy(), cpus=frozenset({0}), cores={0: (0, 0, 0)}),
            "mpirun -np 4 --host n1:2,n2:2 --bind-to none python app/train.py",
        ),
        (with_gpus(("0", "0")), "mpirun -np 3 --host n1:1,n2:2 python app/train.py"),
        (replace(healthy(), missing=(3,)), "mpirun -np 4 python app/train.py"),
        (lost(Launcher(HYDRA, 0, 6, 0, 6)), "mpirun -np 6 python app/train.py"),
        (lost(Launcher("none")), "mpirun -np 4 python app/train.py"),
        (
            in_slurm(),
            "srun --mpi=pmix --nodes=2 --ntasks=4 --cpu-bind=none --kill-on-bad-exit=1 python app/train.py",
        ),
        (in_slurm(mpi_types=("none", "pmi2")), "mpirun -np 4 python app/train.py"),
    ],
)
def test_the_launch_line_is_for_this_job(facts: Facts, line: str) -> None:
    said = launch_line(facts, diagnose(facts))
    assert said.replace(f"{VENV}/bin/", "") == line
