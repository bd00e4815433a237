"""The facts of a healthy job, and ways to plant something in them."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from lockstep.doctor.facts import (
    Clock,
    Facts,
    Folder,
    Gpu,
    Libraries,
    Link,
    LocalFacts,
    MpiFacts,
    NodeFacts,
    RankFacts,
    Slurm,
    Speed,
    View,
)
from lockstep.doctor.findings import Finding, Status
from lockstep.doctor.report import diagnose
from lockstep.runtime.installation import Installation
from lockstep.runtime.launcher import MPIRUN, Launcher

GIB, MIB = 1 << 30, 1 << 20
VENV = Path("/home/me/lockstep/.venv")
LIBMPI = str(VENV / "lib" / "libmpi.so.40")
LIBNCCL = str(VENV / "lib" / "libnccl.so.2")
NODES = ("n1", "n1", "n2", "n2")  # of the ranks
LIBRARIES = Libraries((LIBMPI,), (LIBNCCL,), 23007, 23007, 1.0)
FOLDER = Folder("/scratch/runs", "nfs4", "", 0.02, True, 900 * GIB, 10**6, 0.001)
SLURM = Slurm(
    job={"TimeLimit": "01:00:00", "EndTime": "2026-11-25T02:56:08", "BatchFlag": "1", "Requeue": "1"},
    config={"KillWait": "30 sec", "KillOnBadExit": "1"},
    partition={"PartitionName": "main", "PreemptMode": "OFF", "GraceTime": "0"},
    script="#!/bin/bash\n#SBATCH --signal=B:USR1@120\nsrun python app/train.py\n",
    mpi_types=("pmix", "none", "pmi2"),
)


def healthy() -> Facts:
    """Two nodes with 4 CPUs each, 2 ranks on each of them."""
    node_facts = NodeFacts(
        mpi_library=LIBMPI,
        gpus=(),
        libraries=LIBRARIES,
        folder=FOLDER,
        address="10.0.0.1",
        shm=(16 * GIB, 15 * GIB),
        infiniband={},
    )
    installation = Installation(VENV, "Open MPI 5.0.11", VENV / "bin", (VENV / "lib",), "abc /home/me/lockstep")
    ranks = {}
    for rank, node in enumerate(NODES):
        local = LocalFacts(
            node=node,
            launcher=Launcher(MPIRUN, rank, 4, rank % 2, 2),
            installation=installation,
            environment={"OMPI_MCA_mpi_yield_when_idle": "1"},
            foreign_packages={},
            cpus=frozenset(range(4)),
            cores={cpu: (0, 0, cpu) for cpu in range(4)},
            num_cpus=4,
            limits={"n": 1 << 16, "l": -1, "u": -1},
            memory=30 * GIB,
            node_facts=node_facts if rank % 2 == 0 else None,
            slurm=None,
        )
        ranks[rank] = RankFacts(local, MpiFacts(rank, 4, "Open MPI v5.0.11", "Open MPI 5.0.11", (LIBMPI,)))
    return Facts(
        local=ranks[0].local,
        mpi=ranks[0].mpi,
        ranks=ranks,
        speeds={rank: Speed(1e11, 0.98) for rank in ranks},
        clocks={"n2": Clock(0.001, 1e-5)},
        links=[Link("n1", "n2", 2e-5, 9.4e9)],
        views=[View("n1", "n2", 1e-3, 1e-3), View("n2", "n1", 1e-3, 1e-3)],
    )


def with_local(facts: Facts, where: Callable[[int], bool] = lambda _: True, **changes: Any) -> Facts:
    """`facts`, of which the local ones of the ranks at `where` are changed."""
    ranks = {
        rank: replace(of_rank, local=replace(of_rank.local, **changes)) if where(rank) else of_rank
        for rank, of_rank in facts.ranks.items()
    }
    return replace(facts, ranks=ranks, local=ranks[0].local)


def with_node(node: str, **changes: Any) -> Facts:
    facts = healthy()
    first = NODES.index(node)
    node_facts = facts.ranks[first].local.node_facts
    assert node_facts
    return with_local(facts, lambda rank: rank == first, node_facts=replace(node_facts, **changes))


def with_mpi(rank: int, **changes: Any) -> Facts:
    facts = healthy()
    ranks = {**facts.ranks, rank: replace(facts.ranks[rank], mpi=replace(facts.ranks[rank].mpi, **changes))}
    return replace(facts, ranks=ranks, mpi=ranks[0].mpi)


def with_other_copy(libmpi: str) -> Facts:
    facts = with_node("n1", libraries=replace(LIBRARIES, mpi=(libmpi,)))
    of_rank = facts.ranks[0]
    of_rank = replace(of_rank, mpi=replace(of_rank.mpi, files=(libmpi,)))
    return replace(facts, ranks={**facts.ranks, 0: of_rank}, mpi=of_rank.mpi)


def with_libraries(**changes: Any) -> Facts:
    return with_node("n2", libraries=replace(LIBRARIES, **changes))


def with_folder(**changes: Any) -> Facts:
    return with_node("n2", folder=replace(FOLDER, **changes))


def with_gpus(visible: tuple[str | None, str | None], used: int = 0) -> Facts:
    """Two GPUs on n1; `visible`: CUDA_VISIBLE_DEVICES of each of its ranks."""
    facts = with_node("n1", gpus=[Gpu(f"GPU-{index}", "H100", used, 80 * GIB) for index in range(2)])
    for rank, value in enumerate(visible):
        shown = {} if value is None else {"CUDA_VISIBLE_DEVICES": value}
        facts = with_local(facts, rank.__eq__, environment=shown)
    return facts


def lost(launcher: Launcher) -> Facts:
    facts = healthy()
    local = replace(facts.local, launcher=launcher)
    mpi = MpiFacts(0, 1, "Open MPI v5.0.11", "Open MPI 5.0.11", (LIBMPI,))
    return Facts(local=local, mpi=mpi, ranks={0: RankFacts(local, mpi)}, speeds={0: Speed(1e11, 1.0)})


def in_slurm(launcher: Launcher | None = None, **changes: Any) -> Facts:
    facts = healthy()
    environment = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2", "SLURM_NTASKS": "4"}
    facts = with_local(facts, environment=environment)
    local = replace(facts.local, slurm=replace(SLURM, **changes), launcher=launcher or facts.launcher)
    return replace(facts, local=local)


def three_nodes(rates: list[float]) -> Facts:
    """Of the links n1-n2, n1-n3 and n2-n3."""
    facts = healthy()
    ranks = {rank: replace(facts.ranks[0], local=replace(facts.local, node=f"n{rank + 1}")) for rank in range(3)}
    pairs = [("n1", "n2"), ("n1", "n3"), ("n2", "n3")]
    links = [Link(first, second, 2e-5, rate) for (first, second), rate in zip(pairs, rates, strict=True)]
    return replace(facts, ranks=ranks, links=links, speeds=None, clocks=None)


def bad(facts: Facts, status: Status) -> list[Finding]:
    return [finding for finding in diagnose(facts) if finding.status is status]
