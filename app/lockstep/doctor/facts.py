"""The facts that the doctor's checks judge. Sizes are in bytes, times in seconds, rates in bit/s."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from lockstep.runtime.affinity import Core, Cpus
from lockstep.runtime.installation import Installation
from lockstep.runtime.launcher import Launcher


@dataclass(frozen=True)
class Unknown:
    """Stands in for a fact that could not be determined.

    Attributes:
        why: the reason, for people.
    """

    why: str


@dataclass(frozen=True)
class Gpu:
    """One GPU of a node, as nvidia-smi lists it.

    Attributes:
        used: memory in use.
    """

    uuid: str
    name: str
    used: int
    total: int


@dataclass(frozen=True)
class Libraries:
    """The libraries that a process loads which imports torch and then Horovod, as a rank does.

    Attributes:
        mpi: paths of the MPI libraries.
        nccl: paths of the NCCL libraries.
        nccl_built: version code of the NCCL that Horovod was compiled with, such as 23007 for 2.30.7; 0: without NCCL.
        nccl_loaded: version code of the NCCL that is loaded; 0: none.
        seconds: how long loading took.
    """

    mpi: tuple[str, ...]
    nccl: tuple[str, ...]
    nccl_built: int
    nccl_loaded: int
    seconds: float


@dataclass(frozen=True)
class Folder:
    """The folder for runs, as one node sees it.

    Attributes:
        path: the folder, or its nearest parent that exists.
        kind: the type of its file system, such as `nfs4`.
        wrong: what does not work there; empty if everything does.
        fsync_seconds: time to write and fsync 1 MiB.
        has_locks: whether flock works.
        free: space that this user can write.
        free_files: how many more files can be created; None if that is not limited.
        clock_ahead: how far the file server's clock is ahead of this node's.
    """

    path: str
    kind: str
    wrong: str
    fsync_seconds: float = 0.0
    has_locks: bool = True
    free: int = 0
    free_files: int | None = None
    clock_ahead: float = 0.0


@dataclass(frozen=True)
class NodeFacts:
    """Facts about a node, found by its first rank.

    Attributes:
        mpi_library: path of the MPI library that the dynamic linker finds for mpi4py.
        address: what the node's own name resolves to.
        shm: size and free space of /dev/shm.
        infiniband: the rate of each active port of InfiniBand, Omni-Path or RoCE.
    """

    mpi_library: str | Unknown
    gpus: Sequence[Gpu] | Unknown
    libraries: Libraries | Unknown
    folder: Folder | Unknown
    address: str | Unknown
    shm: tuple[int, int] | Unknown
    infiniband: Mapping[str, float]


@dataclass(frozen=True)
class Slurm:
    """What Slurm reports about this job, under Slurm's own names.

    Attributes:
        job, config, partition: fields of `scontrol show`.
        script: the batch script; empty if there is none.
        mpi_types: what `srun --mpi=list` offers; empty if unknown.
    """

    job: Mapping[str, str]
    config: Mapping[str, str]
    partition: Mapping[str, str]
    script: str
    mpi_types: Sequence[str]


@dataclass(frozen=True)
class LocalFacts:
    """Facts that one process finds by itself, before MPI starts.

    Attributes:
        node: host name.
        environment: the environment variables that the checks look at.
        foreign_packages: packages that PYTHONPATH puts in front of the environment's own: name -> file.
        cpus: the CPUs that this process may run on.
        cores: the core of each of these CPUs.
        num_cpus: how many CPUs of the node belong to this job.
        limits: `ulimit -n`, `-l` (bytes) and `-u`; -1: unlimited.
        memory: what is left for all ranks of the node together.
        node_facts: set on the first rank of each node only.
        slurm: set on the launcher's rank 0 in a Slurm job only.
    """

    node: str
    launcher: Launcher
    installation: Installation
    environment: Mapping[str, str]
    foreign_packages: Mapping[str, str]
    cpus: Cpus
    cores: Mapping[int, Core]
    num_cpus: int
    limits: Mapping[str, int]
    memory: int
    node_facts: NodeFacts | None
    slurm: Slurm | Unknown | None


@dataclass(frozen=True)
class MpiFacts:
    """A process's rank and size, and the MPI library that reported them.

    Attributes:
        version: of the library that is loaded, such as `Open MPI v5.0.11`.
        built_with: what mpi4py was compiled with, such as `Open MPI 5.0.11`.
        files: paths of the loaded MPI libraries.
    """

    rank: int
    size: int
    version: str
    built_with: str
    files: tuple[str, ...]


@dataclass(frozen=True)
class RankFacts:
    local: LocalFacts
    mpi: MpiFacts


@dataclass(frozen=True)
class Speed:
    """How fast one rank computes while all ranks compute.

    Attributes:
        flops: floating-point operations per second of CPU time.
        core_share: CPU time / wall time; 1.0 for a core of its own.
    """

    flops: float
    core_share: float


@dataclass(frozen=True)
class Clock:
    """How far a node's clock is ahead of that of rank 0's node, within `error`; in seconds."""

    ahead: float
    error: float


@dataclass(frozen=True)
class Link:
    """The connection between two ranks, by the names of their nodes.

    Attributes:
        latency: one way; None if no message came through.
        rate: one way; 0 if no message came through.
    """

    first: str
    second: str
    latency: float | None
    rate: float


@dataclass(frozen=True)
class View:
    """When one node saw files that another node wrote to the shared folder.

    Attributes:
        node: the node that read.
        writer: the node that wrote.
        new_after: seconds until a new file was visible; None: never.
        replaced_after: seconds until its replacement was visible; None: never.
    """

    node: str
    writer: str
    new_after: float | None
    replaced_after: float | None


@dataclass(frozen=True)
class Facts:
    """All facts about a job, as the reporting process has them.

    Attributes:
        local: of the reporting process.
        mpi: of the reporting process; None if MPI did not start there.
        ranks: facts of every rank that answered.
        missing: the ranks that did not answer in time.
        trouble: what went wrong between the ranks, and during which step; empty if nothing did.
        speeds: by rank.
        clocks: by node, without rank 0's.
        links: between pairs of nodes; on a single node, between two of its ranks.
        views: of the shared folder.
        can_finalize: whether no message is left under way, so that MPI can be finalized.
    """

    local: LocalFacts
    mpi: MpiFacts | None
    ranks: Mapping[int, RankFacts] = field(default_factory=dict)
    missing: Sequence[int] = ()
    trouble: str = ""
    speeds: Mapping[int, Speed] | None = None
    clocks: Mapping[str, Clock] | None = None
    links: Sequence[Link] | None = None
    views: Sequence[View] | None = None
    can_finalize: bool = True

    @property
    def launcher(self) -> Launcher:
        return self.local.launcher

    @property
    def local_facts(self) -> dict[int, LocalFacts]:
        """By rank; if no rank answered, those of the reporting process as rank 0."""
        return {rank: facts.local for rank, facts in self.ranks.items()} or {0: self.local}

    @property
    def nodes(self) -> dict[str, list[int]]:
        """The ranks of each node, in the order of each node's first rank."""
        found: dict[str, list[int]] = {}
        for rank, local in sorted(self.local_facts.items()):
            found.setdefault(local.node, []).append(rank)
        return found

    @property
    def facts_by_node(self) -> dict[str, NodeFacts]:
        """Facts of every node whose first rank answered."""
        return {local.node: local.node_facts for local in self.local_facts.values() if local.node_facts}
