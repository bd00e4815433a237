"""What the doctor gathers, before anything is made of it. Sizes are in bytes, times in seconds, rates in bit/s."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from lockstep.runtime.affinity import Core, Cpus
from lockstep.runtime.installation import Installation
from lockstep.runtime.launcher import Launcher


@dataclass(frozen=True)
class Unknown:
    """In place of a fact that could not be had.

    Attributes:
        why: for people.
    """

    why: str


@dataclass(frozen=True)
class Gpu:
    """One GPU of a node, as nvidia-smi lists it, in its order.

    Attributes:
        used: memory that is taken already.
    """

    uuid: str
    name: str
    used: int
    total: int


@dataclass(frozen=True)
class Libraries:
    """What Horovod has loaded, in a process that imported torch before it, as a rank does.

    Attributes:
        mpi: the files that are MPI libraries.
        nccl: the files that are NCCL.
        nccl_built: NCCL's version code when Horovod was compiled, such as 23007 for 2.30.7; 0: without NCCL.
        nccl_loaded: that of the one that was loaded; 0: none was.
        seconds: how long it took.
    """

    mpi: tuple[str, ...]
    nccl: tuple[str, ...]
    nccl_built: int
    nccl_loaded: int
    seconds: float


@dataclass(frozen=True)
class Folder:
    """How the folder for runs behaves, on one node.

    Attributes:
        path: the folder, or the nearest one above it that is there.
        kind: of file system, such as `nfs4`.
        wrong: what does not work there; empty if all does.
        fsync_seconds: what it takes until 1 MiB is safe.
        has_locks: flock works.
        free: for this user.
        free_files: how many more files there may be; None where that is not limited.
        clock_ahead: of the file server, against this node.
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
    """What the first rank of a node finds out for all of them.

    Attributes:
        mpi: the file that the system finds as mpi4py's MPI.
        address: what the node's name resolves to.
        shm: size and free space of /dev/shm.
        infiniband: the rate of each active port of InfiniBand, or of what looks like it.
    """

    mpi: str | Unknown
    gpus: Sequence[Gpu] | Unknown
    libraries: Libraries | Unknown
    folder: Folder | Unknown
    address: str | Unknown
    shm: tuple[int, int] | Unknown
    infiniband: Mapping[str, float]


@dataclass(frozen=True)
class Slurm:
    """What Slurm says of this job, by its own names.

    Attributes:
        job, config, partition: parts of `scontrol show`.
        script: the batch script; empty where there is none.
        mpi_types: what `srun --mpi=list` offers; empty if it did not say.
    """

    job: Mapping[str, str]
    config: Mapping[str, str]
    partition: Mapping[str, str]
    script: str
    mpi_types: Sequence[str]


@dataclass(frozen=True)
class LocalFacts:
    """What one process finds out by itself, before MPI.

    Attributes:
        node: the name of its machine.
        environment: those of its variables that matter here.
        strangers: packages that Python finds elsewhere than in the environment, and where.
        cpus: those that it may run on.
        cores: the core of each of them.
        num_cpus: those of the node that belong to this job.
        limits: `ulimit -n`, `-l` (bytes) and `-u`; -1: none.
        memory: what is left, for all ranks of the node.
        of_node: None but for the first rank of each node.
        slurm: None outside of a Slurm job, and but for the launcher's rank 0.
    """

    node: str
    launcher: Launcher
    installation: Installation
    environment: Mapping[str, str]
    strangers: Mapping[str, str]
    cpus: Cpus
    cores: Mapping[int, Core]
    num_cpus: int
    limits: Mapping[str, int]
    memory: int
    of_node: NodeFacts | None
    slurm: Slurm | Unknown | None


@dataclass(frozen=True)
class Joined:
    """What MPI told one process, and which MPI that is.

    Attributes:
        version: of the library that is loaded, such as `Open MPI v5.0.11`.
        built_with: the one that mpi4py was compiled with, such as `Open MPI 5.0.11`.
        files: the files that are MPI libraries.
    """

    rank: int
    size: int
    version: str
    built_with: str
    files: tuple[str, ...]


@dataclass(frozen=True)
class RankFacts:
    local: LocalFacts
    joined: Joined


@dataclass(frozen=True)
class Speed:
    """How fast one rank computes while all do.

    Attributes:
        flops: for each second that it had a core.
        core_share: of the time it had one; 1.0 for all of it.
    """

    flops: float
    core_share: float


@dataclass(frozen=True)
class Clock:
    """A node's clock, ahead of that of rank 0's node by so much, give or take `error`."""

    ahead: float
    error: float


@dataclass(frozen=True)
class Link:
    """Between two ranks, by name of their nodes.

    Attributes:
        latency: one way; None if nothing came through.
        rate: one way; 0 if nothing came through.
    """

    first: str
    second: str
    latency: float | None
    rate: float


@dataclass(frozen=True)
class View:
    """What one node saw of files that another one wrote.

    Attributes:
        node: who looked.
        writer: who wrote.
        new_after: until a new file was seen; None: never.
        replaced_after: until it was seen to be replaced; None: never.
    """

    node: str
    writer: str
    new_after: float | None
    replaced_after: float | None


@dataclass(frozen=True)
class Facts:
    """Everything.

    Attributes:
        local: of the process that speaks.
        joined: the same; None if MPI did not start there.
        ranks: what came together, by rank; the speaker alone if nothing did.
        missing: the ranks that did not come.
        trouble: what the ranks were at when they had to be given up, and what was said; empty if they were not.
        speeds: by rank.
        clocks: by node, without rank 0's.
        links: between pairs of nodes, or of two ranks where there is one node.
        views: of the shared folder.
        can_be_left: nothing is under way between the ranks any more.
    """

    local: LocalFacts
    joined: Joined | None
    ranks: Mapping[int, RankFacts] = field(default_factory=dict)
    missing: Sequence[int] = ()
    trouble: str = ""
    speeds: Mapping[int, Speed] | None = None
    clocks: Mapping[str, Clock] | None = None
    links: Sequence[Link] | None = None
    views: Sequence[View] | None = None
    can_be_left: bool = True

    @property
    def launcher(self) -> Launcher:
        return self.local.launcher

    @property
    def locals(self) -> dict[int, LocalFacts]:
        """By rank; the speaker as rank 0 where no other is known."""
        return {rank: facts.local for rank, facts in self.ranks.items()} or {0: self.local}

    @property
    def nodes(self) -> dict[str, list[int]]:
        """The ranks of each node, in the order of their first ones."""
        found: dict[str, list[int]] = {}
        for rank, local in sorted(self.locals.items()):
            found.setdefault(local.node, []).append(rank)
        return found

    @property
    def of_nodes(self) -> dict[str, NodeFacts]:
        """Of each node of which a rank has told."""
        return {local.node: local.of_node for local in self.locals.values() if local.of_node}
