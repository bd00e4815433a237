"""Check what each node gives its ranks: cores, GPUs, memory, limits, its name, the folder for runs."""

from lockstep.doctor.facts import Facts, Folder, Gpu, LocalFacts, Unknown
from lockstep.doctor.findings import GIB, MIB, Finding, count, duration, fault, ok, size, warning
from lockstep.runtime.affinity import Cpus, choose_gpus, format_cpus, share_cores

MEMORY_PER_RANK = 1 * GIB  # importing torch and Horovod takes 350 MiB, training the reference network 700 MiB
SHM_PER_RANK = 64 * MIB  # used by MPI and NCCL between the ranks of a node, and by data loader workers
MEMLOCK = 64 * MIB  # below it, InfiniBand cannot register its buffers
OPEN_FILES, FEW_OPEN_FILES = 256, 1024
PROCESSES = 1024
FREE, LITTLE_FREE = 256 * MIB, 4 * GIB
FREE_FILES = 1000
SLOW_FSYNC, CLOCK_OF_SERVER = 1.0, 2.0
GPU_IN_USE = 0.1
UNBOUND = "unbound"  # an option of the launch line: the launcher must not bind ranks to cores


def check_binding(facts: Facts) -> list[Finding]:
    """Each rank has cores of its own, after Lockstep has divided the CPUs that the launcher gives to a node's ranks."""
    found: dict[str, Finding] = {}
    for node, ranks in facts.nodes.items():
        local_facts = [facts.local_facts[rank] for rank in ranks]
        shares = share_cores(
            [local.cpus for local in local_facts],
            {cpu: core for local in local_facts for cpu, core in local.cores.items()},
        )
        used: Cpus = frozenset().union(*shares)
        num_cpus = max(len(used), local_facts[0].num_cpus)
        idle = num_cpus - len(used)
        placement = f"{count(len(ranks), 'rank')} on CPU {format_cpus(sorted(used))} of {num_cpus}"
        shared = [share for index, share in enumerate(shares) if share & frozenset().union(*shares[:index])]
        if shared and idle:
            what = f"{placement}: ranks share CPU {format_cpus(sorted(shared[0]))}, and {count(idle, 'CPU')} idle"
            fix = "let the launcher bind nothing, since Lockstep does, and start it without taskset or numactl"
            found.setdefault(what, fault("binding", f"{node}: {what}", fix, options=(UNBOUND,)))
        elif idle > len(used):
            what = f"{placement}: most of the node idles"
            fix = "let the launcher bind nothing, or give each rank more: --cpus-per-task"
            found.setdefault(what, warning("binding", f"{node}: {what}", fix, options=(UNBOUND,)))
        elif len(ranks) > len(used):
            what = f"{placement}: more ranks than CPUs"
            found.setdefault(what, warning("binding", f"{node}: {what}", "start no more ranks than there are CPUs"))
        else:
            found.setdefault(placement, ok("binding", f"{node}: {placement}"))
    return list(found.values())


def check_threads(facts: Facts) -> list[Finding]:
    """OMP_NUM_THREADS, if set, asks for no more threads than there are CPUs."""
    for node, ranks in facts.nodes.items():
        local_facts = [facts.local_facts[rank] for rank in ranks]
        threads = [local.environment.get("OMP_NUM_THREADS", "").split(",")[0] for local in local_facts]
        num_threads = sum(int(number) for number in threads if number.isdigit())
        num_cpus = len(frozenset().union(*(local.cpus for local in local_facts)))
        if num_threads > max(num_cpus, len(ranks)):
            what = f"{node}: OMP_NUM_THREADS asks for {num_threads} threads in all, on {count(num_cpus, 'CPU')}"
            fix = "unset it: Lockstep gives each rank a thread for each of its cores"
            return [warning("threads", what, fix, unset=("OMP_NUM_THREADS",))]
    return [ok("threads", "no more threads than CPUs")]


def check_gpus(facts: Facts) -> list[Finding]:
    """Where there are GPUs, each rank has one of its own, and no GPU idles."""
    found = []
    num_gpus = 0
    for node, ranks in facts.nodes.items():
        node_facts = facts.facts_by_node.get(node)
        if node_facts is None or isinstance(node_facts.gpus, Unknown):
            what = (
                f"{node}: {node_facts.gpus.why}"
                if node_facts and isinstance(node_facts.gpus, Unknown)
                else f"{node}: not seen"
            )
            found.append(warning("GPUs", what, "look at nvidia-smi there"))
            continue
        gpus = list(node_facts.gpus)
        visible = [[gpu.uuid for gpu in visible_gpus(gpus, facts.local_facts[rank])] for rank in ranks]
        chosen = [
            seen[index] if index is not None else None
            for seen, index in zip(visible, choose_gpus(visible), strict=True)
        ]
        num_gpus += len(gpus)
        if gpus and any(visible):
            found += _judge_gpus(node, ranks, gpus, chosen)
    if found:
        return found
    return [ok("GPUs", f"{num_gpus}, one for each rank" if num_gpus else "none: ranks compute on CPUs")]


def visible_gpus(gpus: list[Gpu], local: LocalFacts) -> list[Gpu]:
    """Those of a node's GPUs that a process sees, by its CUDA_VISIBLE_DEVICES."""
    wanted = local.environment.get("CUDA_VISIBLE_DEVICES")
    if wanted is None:
        return gpus
    seen = []
    for name in filter(None, wanted.split(",")):
        by_name = [gpu for index, gpu in enumerate(gpus) if name == str(index) or gpu.uuid.startswith(name)]
        if not by_name:
            break  # CUDA ignores everything after the first unknown entry
        seen.append(by_name[0])
    return seen


def check_memory(facts: Facts) -> list[Finding]:
    """Each node has enough memory for its ranks."""
    left_of_nodes = {}
    for node, ranks in facts.nodes.items():
        left = min(facts.local_facts[rank].memory for rank in ranks)
        left_of_nodes[node] = left
        if left < MEMORY_PER_RANK * len(ranks):
            what = f"{node}: {size(left)} are left for {count(len(ranks), 'rank')}"
            fix = "ask for more memory (--mem), start fewer ranks there, or end other programs"
            make_finding = fault if left < MEMORY_PER_RANK * len(ranks) / 2 else warning
            return [make_finding("memory", what, fix)]
    return [ok("memory", f"{size(min(left_of_nodes.values()))} or more are left on each node")]


def check_shared_memory(facts: Facts) -> list[Finding]:
    """/dev/shm has enough free space for each node's ranks."""
    for node, node_facts in facts.facts_by_node.items():
        if isinstance(node_facts.shm, Unknown):
            return [fault("/dev/shm", f"{node}: {node_facts.shm.why}", "mount a tmpfs there")]
        total, free = node_facts.shm
        ranks = len(facts.nodes[node])
        need = SHM_PER_RANK * ranks
        if free < need:
            what = f"{node}: {size(free)} of {size(total)} are free, and {count(ranks, 'rank')} must have {size(need)}"
            larger = f"docker run --shm-size={max(1, 2 * need // GIB)}g, or mount -o remount,size=50% /dev/shm"
            return [fault("/dev/shm", what, "remove what earlier runs left there" if total > 2 * need else larger)]
    frees = [
        node_facts.shm[1] for node_facts in facts.facts_by_node.values() if not isinstance(node_facts.shm, Unknown)
    ]
    return [ok("/dev/shm", f"{size(min(frees))} or more are free on each node")] if frees else []


def check_limits(facts: Facts) -> list[Finding]:
    """The limits of `ulimit` are high enough: open files, locked memory (for InfiniBand) and processes."""
    found = []
    for local in _one_of_each_node(facts):
        files, locked, processes = (local.limits[name] if local.limits[name] >= 0 else 1 << 62 for name in "nlu")
        if files < FEW_OPEN_FILES:
            make_finding = fault if files < OPEN_FILES else warning
            found.append(
                make_finding("limits", f"{local.node}: {files} open files at most (ulimit -n)", "ulimit -n 4096")
            )
        if local.node_facts and local.node_facts.infiniband and locked < MEMLOCK:
            what = f"{local.node}: {size(locked)} of locked memory at most (ulimit -l), too little for InfiniBand"
            found.append(
                fault("limits", what, "ulimit -l unlimited, by the administrator; in Slurm, LimitMEMLOCK of slurmd")
            )
        if processes < PROCESSES:
            what = f"{local.node}: {processes} processes and threads of this user at most (ulimit -u)"
            found.append(warning("limits", what, "ulimit -u 4096"))
        if found:
            return found
    return [ok("limits", "enough open files, locked memory and processes")]


def check_names(facts: Facts) -> list[Finding]:
    """Each node can resolve its own name, which libraries do to choose a network interface."""
    for node, node_facts in facts.facts_by_node.items():
        if isinstance(node_facts.address, Unknown):
            what = f"{node} does not know its own name: {node_facts.address.why}"
            return [warning("names", what, f"add it to /etc/hosts there: ADDRESS {node}")]
    return [ok("names", "each node resolves its own")]


def check_folder(facts: Facts) -> list[Finding]:
    """The folder for runs supports what checkpoints need, and has space left."""
    found = []
    for node, node_facts in facts.facts_by_node.items():
        folder = node_facts.folder
        if isinstance(folder, Unknown):
            fix = "look whether its file server answers; name another folder: --folder DIR here, --run_dir for a run"
            found.append(fault("folder", f"{node}: the folder for runs is stuck: {folder.why}", fix))
        else:
            found += _judge_folder(node, folder)
        if found:
            return found
    folders = [
        node_facts.folder for node_facts in facts.facts_by_node.values() if isinstance(node_facts.folder, Folder)
    ]
    slowest = max(folders, key=lambda folder: folder.fsync_seconds)
    what = f"{slowest.path} ({slowest.kind}): {size(slowest.free)} free, rename and lock work, 1 MiB is safe in"
    return [ok("folder", f"{what} {duration(slowest.fsync_seconds)}")]


def _judge_gpus(node: str, ranks: list[int], gpus: list[Gpu], chosen: list[str | None]) -> list[Finding]:
    """
    Args:
        chosen: the UUID of the GPU that each of `ranks` will use; None: no GPU.
    """
    found = []
    taken = [uuid for uuid in chosen if uuid]
    fix = f"start one rank for each GPU, {len(gpus)} on {node}; or none at all on GPUs: CUDA_VISIBLE_DEVICES="
    if shared := [uuid for uuid in taken if taken.count(uuid) > 1]:
        sharing = [rank for rank, uuid in zip(ranks, chosen, strict=True) if uuid == shared[0]]
        what = f"{node}: ranks {format_cpus(sharing)} share GPU {shared[0]}, which NCCL refuses"
        found.append(fault("GPUs", what, fix))
    if without := [rank for rank, uuid in zip(ranks, chosen, strict=True) if not uuid]:
        what = f"{node}: ranks {format_cpus(without)} see no GPU, and others do (CUDA_VISIBLE_DEVICES)"
        found.append(fault("GPUs", what, fix))
    if idle := [gpu for gpu in gpus if gpu.uuid not in taken]:
        found.append(warning("GPUs", f"{node}: {len(idle)} of {count(len(gpus), 'GPU')} idle", fix))
    if busy := [gpu for gpu in gpus if gpu.uuid in taken and gpu.used > GPU_IN_USE * gpu.total]:
        what = f"{node}: {size(busy[0].used)} of GPU {busy[0].uuid} are taken already"
        found.append(warning("GPUs", what, "see who uses it: nvidia-smi"))
    return found


def _judge_folder(node: str, folder: Folder) -> list[Finding]:
    found = []
    name = f"{node}: {folder.path} ({folder.kind})"
    elsewhere = "name another folder: --folder DIR here, --run_dir for a run"
    if folder.wrong:
        return [fault("folder", f"{name}: {folder.wrong}", elsewhere)]
    if folder.free < LITTLE_FREE:
        make_finding = fault if folder.free < FREE else warning
        found.append(
            make_finding("folder", f"{name}: only {size(folder.free)} free", f"remove old runs, or {elsewhere}")
        )
    if folder.free_files is not None and folder.free_files < FREE_FILES:
        what = f"{name}: only {folder.free_files} more files may be made"
        found.append(fault("folder", what, f"remove old runs, or {elsewhere}"))
    if folder.fsync_seconds > SLOW_FSYNC:
        what = f"{name}: it takes {duration(folder.fsync_seconds)} until 1 MiB is safe (fsync)"
        found.append(warning("folder", what, elsewhere))
    if not folder.has_locks:
        what = f"{name}: no locks (flock): two jobs could write to one run"
        found.append(warning("folder", what, elsewhere))
    if abs(folder.clock_ahead) > CLOCK_OF_SERVER:
        what = f"{name}: its server's clock and the node's are {duration(abs(folder.clock_ahead))} apart"
        found.append(warning("folder", what, "synchronise both clocks (chrony)"))
    return found


def _one_of_each_node(facts: Facts) -> list[LocalFacts]:
    return [facts.local_facts[ranks[0]] for ranks in facts.nodes.values()]
