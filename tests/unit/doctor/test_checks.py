"""The doctor's checks, on facts: a healthy job passes, and each fault that is planted in it is found and named."""

from dataclasses import replace

import pytest

from lockstep.doctor.facts import Clock, Facts, Link, Speed, Unknown, View
from lockstep.doctor.findings import Status
from lockstep.doctor.local_facts import NO_ANSWER
from lockstep.doctor.report import diagnose, is_healthy, verdict
from lockstep.runtime.installation import Installation
from lockstep.runtime.launcher import HYDRA, SRUN, Launcher
from tests.unit.doctor.facts import (
    GIB,
    LIBMPI,
    MIB,
    VENV,
    bad,
    healthy,
    in_slurm,
    lost,
    three_nodes,
    with_folder,
    with_gpus,
    with_libraries,
    with_local,
    with_mpi,
    with_node,
)

FAULTS: dict[str, tuple[Facts, str, str]] = {
    "srun of another PMI": (lost(Launcher(SRUN, 0, 4, 0, None, "none")), "launcher", "--mpi=pmix"),
    "mpiexec of another MPI": (lost(Launcher(HYDRA, 0, 4, 0, 4)), "launcher", "mixed MPIs"),
    "MPI does not start": (
        replace(lost(Launcher("none")), mpi=None, ranks={}, trouble="its process died: PMIx error"),
        "ranks",
        "PMIx error",
    ),
    "a rank is missing": (
        replace(healthy(), missing=(3,), trouble="they were given up while waiting for all ranks"),
        "ranks",
        "n2: no answer in time from 1 rank of 4, the first is 3",
    ),
    "MPI is another version": (with_mpi(2, version="Open MPI v4.1.4"), "MPI", "n2: mpi4py was built with"),
    "the environment is for another MPI": (
        with_local(healthy(), installation=Installation(VENV, "MPICH 4.0.2", VENV / "bin", (VENV / "lib",), "abc")),
        "MPI",
        "built for MPICH 4.0.2",
    ),
    "two MPIs in one process": (
        with_mpi(0, files=(LIBMPI, "/usr/lib/libmpich.so.12")),
        "MPI",
        "two MPIs are loaded",
    ),
    "no MPI is found": (
        replace(
            with_node("n1", mpi_library=Unknown("libmpi.so.40 is not found")), mpi=None, ranks={}, trouble="it died"
        ),
        "ranks",
        "it died",
    ),
    "Horovod does not load": (
        with_node("n2", libraries=Unknown("undefined symbol: ncclCommInit")),
        "Horovod",
        "n2: torch and Horovod do not load: undefined symbol",
    ),
    "Horovod has an MPI of its own": (
        with_libraries(mpi=("/usr/lib/libmpi.so.40",)),
        "Horovod",
        "n2: Horovod and mpi4py load different MPIs",
    ),
    "NCCL is older than built with": (with_libraries(nccl_loaded=21805), "NCCL", "2.30.7, and 2.18.5 is loaded"),
    "NCCL is not found": (with_libraries(nccl=(), nccl_loaded=0), "NCCL", "loads none"),
    "NCCL differs": (with_libraries(nccl_built=23100, nccl_loaded=23100), "NCCL", "2.31.0 on n2"),
    "the environments differ": (
        with_local(healthy(), lambda rank: rank > 1, installation=Installation(VENV, "", VENV, (VENV,), "def")),
        "environment",
        "n1 and n2",
    ),
    "PYTHONPATH hides a package": (
        with_local(healthy(), environment={"PYTHONPATH": "/x"}, foreign_packages={"torch": "/x/torch/__init__.py"}),
        "variables",
        "/x/torch/__init__.py",
    ),
    "Horovod is told to use Gloo": (
        with_local(healthy(), environment={"HOROVOD_CONTROLLER": "gloo"}),
        "variables",
        "HOROVOD_CONTROLLER=gloo",
    ),
    "MPI is told to use the loopback": (
        with_local(healthy(), environment={"OMPI_MCA_btl_tcp_if_include": "lo"}),
        "variables",
        "OMPI_MCA_btl_tcp_if_include=lo",
    ),
    "ranks stacked on one CPU": (
        with_local(healthy(), lambda rank: rank < 2, cpus=frozenset({0}), cores={0: (0, 0, 0)}),
        "binding",
        "n1: 2 ranks on CPU 0 of 4: ranks share CPU 0, and 3 CPUs idle",
    ),
    "ranks share a GPU": (with_gpus(("0", "0")), "GPUs", "ranks 0-1 share GPU GPU-0"),
    "a rank sees no GPU": (with_gpus(("0", "")), "GPUs", "ranks 1 see no GPU"),
    "a slow node": (
        replace(healthy(), speeds={rank: Speed(1e11 if rank < 2 else 4e10, 0.98) for rank in range(4)}),
        "speed",
        "n2 is slow: its cores do 40%",
    ),
    "a busy node": (
        replace(healthy(), speeds={rank: Speed(1e11, 0.98 if rank < 2 else 0.2) for rank in range(4)}),
        "speed",
        "n2 is slow: its ranks get 20% of the time",
    ),
    "little memory": (with_local(healthy(), lambda rank: rank == 3, memory=600 * MIB), "memory", "n2: 600 MiB"),
    "a small /dev/shm": (with_node("n2", shm=(64 * MIB, 64 * MIB)), "/dev/shm", "n2: 64 MiB of 64 MiB are free"),
    "a full /dev/shm": (with_node("n2", shm=(16 * GIB, 32 * MIB)), "/dev/shm", "n2: 32 MiB of 16 GiB are free"),
    "few open files": (with_local(healthy(), limits={"n": 64, "l": -1, "u": -1}), "limits", "64 open files"),
    "little locked memory": (
        with_local(with_node("n1", infiniband={"mlx5_0:1": 1e11}), limits={"n": 9999, "l": 64 << 10, "u": -1}),
        "limits",
        "too little for InfiniBand",
    ),
    "a folder that cannot be written": (
        with_folder(wrong="cannot write: Read-only file system"),
        "folder",
        "n2: /scratch/runs (nfs4): cannot write",
    ),
    "a folder that hangs": (with_node("n2", folder=Unknown(NO_ANSWER)), "folder", "n2: the folder for runs is stuck"),
    "a full folder": (with_folder(free=100 * MIB), "folder", "only 100 MiB free"),
    "no more files": (with_folder(free_files=12), "folder", "only 12 more files"),
    "a folder that is not shared": (
        replace(healthy(), views=[View("n2", "n1", None, None)]),
        "same view",
        "n2 does not see what n1 writes",
    ),
    "a folder that lags": (replace(healthy(), views=[View("n2", "n1", 0.1, None)]), "same view", "sees an old file"),
    "a clock that is off": (
        replace(healthy(), clocks={"n2": Clock(-31.0, 0.001)}),
        "clocks",
        "n2 is 31 s behind n1",
    ),
    "a dead link": (replace(healthy(), links=[Link("n1", "n2", None, 0.0)]), "links", "between n1 and n2: nothing"),
    "a slow link": (replace(healthy(), links=[Link("n1", "n2", 2e-4, 9e7)]), "links", "0.09 Gbit/s"),
    "InfiniBand that is not used": (
        with_local(
            with_node("n1", infiniband={"mlx5_0:1": 2e11}),
            lambda rank: rank == 2,
            node_facts=with_node("n1", infiniband={"mlx5_0:1": 2e11}).ranks[0].local.node_facts,
        ),
        "links",
        "InfiniBand there has 200 Gbit/s",
    ),
    "a node with a slow link": (three_nodes([1e10, 1e9, 2e9]), "links", "n3 has a slow link: 2 Gbit/s at best"),
    "one link slower than the others": (three_nodes([1e10, 1e10, 1e9]), "links", "between n2 and n3: 1 Gbit/s"),
    "a signal that kills": (
        in_slurm(script="#!/bin/bash\n#SBATCH --ntasks=4 --signal=USR2@120\n"),
        "Slurm",
        "--signal asks for USR2",
    ),
}


@pytest.mark.parametrize(
    "facts",
    [
        healthy(),
        in_slurm(),
        with_gpus(("0,1", "0,1")),
        with_gpus(("0", "1")),
        with_gpus(("", "")),
        three_nodes([1e10, 9e9, 1e10]),
    ],
    ids=["two nodes", "Slurm", "all GPUs for all", "a GPU for each", "GPUs that are hidden", "three nodes"],
)
def test_a_healthy_job_passes(facts: Facts) -> None:
    findings = diagnose(facts)
    assert [finding for finding in findings if finding.status is not Status.OK] == []
    assert is_healthy(findings)
    assert verdict(findings) == "Healthy"
    assert len({finding.check for finding in findings}) >= 16


@pytest.mark.parametrize(("facts", "check", "words"), FAULTS.values(), ids=FAULTS.keys())
def test_a_planted_fault_is_found_and_named(facts: Facts, check: str, words: str) -> None:
    faults = bad(facts, Status.FAULT)
    assert check in {fault.check for fault in faults}
    assert any(words in f"{fault.what} {fault.fix}" for fault in faults), faults
    assert all(fault.fix for fault in faults)
    assert {fault.check for fault in faults} <= {check, "MPI"}  # nothing else is blamed
    assert not is_healthy(diagnose(facts))
    assert "Unhealthy" in verdict(diagnose(facts))
