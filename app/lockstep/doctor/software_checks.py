"""Checks of MPI, Horovod, NCCL, the launcher and the variables: does what is loaded fit together?"""

from collections.abc import Sequence
from pathlib import Path

from lockstep.doctor.facts import Facts, Joined, Libraries, LocalFacts, Unknown
from lockstep.doctor.findings import Finding, fault, ok, warning
from lockstep.doctor.formatting import count, nccl_version, numbers_in, some_of
from lockstep.doctor.gathering import NO_ANSWER
from lockstep.runtime.hints import train_program
from lockstep.runtime.installation import Installation
from lockstep.runtime.launcher import (
    NONE,
    describe_mismatch,
    how_to_start,
    missing_launcher_warning,
    mpi_misses_processes,
)

# What makes a run slow or its sums vary, if it has this value (None: any).
SPOILERS = {
    "LD_PRELOAD": (None, "a library is loaded in front of all others"),
    "HOROVOD_AUTOTUNE": ("1", "Horovod fuses tensors by chance: runs differ in their last bits"),
    "CUDA_LAUNCH_BLOCKING": ("1", "every GPU kernel is waited for"),
    "NCCL_P2P_DISABLE": ("1", "GPUs of one node send through the CPU"),
    "NCCL_IB_DISABLE": ("1", "NCCL does not use InfiniBand"),
}
LOOPBACK = ("OMPI_MCA_btl_tcp_if_include", "NCCL_SOCKET_IFNAME", "HOROVOD_GLOO_IFACE")
SHOULD_BE_ALIKE = ("OMP_", "HOROVOD_", "NCCL_", "PYTHONPATH", "LD_PRELOAD", "UCX_", "LOCKSTEP_VENV")
OF_ONE_RANK = ("HOROVOD_RANK", "HOROVOD_LOCAL_RANK", "HOROVOD_CROSS_RANK", "HOROVOD_HOSTNAME")


def check_launcher_says_what_mpi_says(facts: Facts) -> list[Finding]:
    launcher, joined = facts.launcher, facts.joined
    if joined is None:
        return []
    if launcher.is_gloo:
        what = f"{launcher}: MPI has no part in it, so that ranks are not compared with each other"
        return [warning("launcher", what, f"start the doctor with {facts.local.installation.mpirun}")]
    if mpi_misses_processes(launcher, joined.size):
        fix = how_to_start(launcher, joined.version, facts.local.installation.mpirun, train_program())
        return [fault("launcher", describe_mismatch(launcher, joined.size, joined.version), fix)]
    if remark := missing_launcher_warning(launcher, joined.size):
        return [warning("launcher", remark.removeprefix("warning: "), "as below")]
    if launcher.name == NONE:
        return [ok("launcher", f"none known, and MPI says {count(joined.size, 'rank')}")]
    return [ok("launcher", f"{launcher}: {count(launcher.size, 'rank')}, and MPI says {joined.size}")]


def check_mpi(facts: Facts) -> list[Finding]:
    """The MPI that is loaded is the one that mpi4py and Horovod were compiled for."""
    joined = {rank: of_rank.joined for rank, of_rank in facts.ranks.items()} or (
        {0: facts.joined} if facts.joined else {}
    )
    if not joined:
        return _mpi_that_does_not_start(facts)
    found = []
    for rank, told in joined.items():
        local = facts.locals[rank]
        if wrong := _wrong_mpi(told, local.installation):
            found.append((wrong, local))
    if found:
        what, local = found[0]
        blame = _who_finds_another_mpi(local)
        told_why = f" ({blame[0]} is set)" if blame else ""
        return [fault("MPI", f"{some_of(bad.node for _, bad in found)}: {what}{told_why}", _fix_of_mpi(blame), blame)]
    versions = {told.version: facts.locals[rank].node for rank, told in joined.items()}
    if len(versions) > 1:
        told_by = ", ".join(f"{version} on {node}" for version, node in versions.items())
        return [fault("MPI", f"not the same on all nodes: {told_by}", _fix_of_mpi(()))]
    first = joined[min(joined)]
    what = f"{first.version} is loaded, as built for, from {some_of(first.files) or 'somewhere'}"
    if strange := _other_copy(first.files, facts.locals[min(joined)].installation):
        blame = _who_finds_another_mpi(facts.local)
        what = f"another copy of the same MPI is loaded: {strange}"
        return [warning("MPI", what, _fix_of_mpi(blame), blame)]
    return [ok("MPI", what)]


def check_horovod(facts: Facts) -> list[Finding]:
    """Horovod can be loaded, and shares its MPI with mpi4py."""
    for node, of_node in facts.of_nodes.items():
        libraries = of_node.libraries
        if isinstance(libraries, Unknown):
            if libraries.why == NO_ANSWER:
                what = f"{node}: torch and Horovod took too long to load, so that they could not be looked at"
                fix = "try again when the node does nothing else; put the environment on a faster disk (LOCKSTEP_VENV)"
                return [warning("Horovod", what, fix)]
            fix = "env/setup repairs the environment; source env/activate after the modules"
            return [fault("Horovod", f"{node}: torch and Horovod do not load: {libraries.why}", fix)]
        of_mpi4py = [of_rank.joined.files for of_rank in facts.ranks.values() if of_rank.local.node == node]
        if of_mpi4py and (others := set(libraries.mpi).difference(of_mpi4py[0])):
            what = f"{node}: Horovod and mpi4py load different MPIs: {some_of(sorted(others))}, {some_of(of_mpi4py[0])}"
            return [fault("Horovod", what, _fix_of_mpi(()))]
    seconds = [
        of_node.libraries.seconds for of_node in facts.of_nodes.values() if isinstance(of_node.libraries, Libraries)
    ]
    return [ok("Horovod", f"loads in {max(seconds):.1f} s, with the same MPI as mpi4py")] if seconds else []


def check_nccl(facts: Facts) -> list[Finding]:
    """The NCCL that is loaded is not older than the one that Horovod was compiled with, and the same everywhere."""
    loaded: dict[int, str] = {}
    for node, of_node in facts.of_nodes.items():
        libraries, has_gpus = of_node.libraries, bool(of_node.gpus) and not isinstance(of_node.gpus, Unknown)
        if isinstance(libraries, Unknown):
            continue
        built, now = libraries.nccl_built, libraries.nccl_loaded
        if not built and has_gpus:
            what = f"{node} has GPUs, and Horovod was built without NCCL: ranks compute on the CPU"
            return [warning("NCCL", what, "give env/setup a CUDA toolkit: CUDA_HOME=/path env/setup")]
        if not built:
            return [ok("NCCL", "Horovod was built without it, for CPUs")]
        was = nccl_version(built)
        fix = "load no NCCL beside the one that torch brings (LD_PRELOAD, LD_LIBRARY_PATH, a module), or run env/setup"
        blame = tuple(name for name in ("LD_PRELOAD",) if name in facts.local.environment)
        if len(libraries.nccl) != 1 or not now:
            what = f"{node}: Horovod was built with NCCL {was}, and loads {some_of(libraries.nccl) or 'none'}"
            return [fault("NCCL", what, fix, unset=blame)]
        if now < built or now // 10_000 != built // 10_000:
            what = f"{node}: Horovod was built with NCCL {was}, and {nccl_version(now)} is loaded: {libraries.nccl[0]}"
            return [fault("NCCL", what, fix, unset=blame)]
        loaded[now] = node
    if len(loaded) > 1:
        told = ", ".join(f"{nccl_version(code)} on {node}" for code, node in loaded.items())
        return [fault("NCCL", f"not the same on all nodes: {told}", "let all nodes use one environment")]
    return [ok("NCCL", f"{nccl_version(code)}, not older than built with") for code in loaded]


def check_environment_is_shared(facts: Facts) -> list[Finding]:
    """All ranks run the same Lockstep environment."""
    places = {str(local.installation.venv): local.node for local in facts.locals.values()}
    stamps = {local.installation.stamp: local.node for local in facts.locals.values()}
    fix = "let all nodes use one environment, on a disk that all see, or build each with the same env/setup"
    if len(stamps) > 1:
        return [fault("environment", f"built from different sources on {some_of(stamps.values())}", fix)]
    if len(places) > 1:
        told = ", ".join(f"{place} on {node}" for place, node in places.items())
        return [warning("environment", f"not the same on all nodes: {told}", fix)]
    return [ok("environment", next(iter(places)))]


def check_variables(facts: Facts) -> list[Finding]:
    """No variable bends a run into something else."""
    found = []
    environment, num_nodes = facts.local.environment, len(facts.nodes)
    if strangers := {name: local.strangers[name] for local in facts.locals.values() for name in local.strangers}:
        what = f"PYTHONPATH puts {some_of(strangers.values())} before the environment's own"
        found.append(fault("variables", what, "unset PYTHONPATH", unset=("PYTHONPATH",)))
    elif environment.get("PYTHONPATH"):
        what = f"PYTHONPATH={environment['PYTHONPATH']} comes before the environment's own packages"
        found.append(warning("variables", what, "unset PYTHONPATH, unless it is meant", unset=("PYTHONPATH",)))
    for name in ("HOROVOD_CONTROLLER", "HOROVOD_CPU_OPERATIONS"):
        if environment.get(name, "mpi").lower() != "mpi" and not facts.launcher.is_gloo:
            what = f"{name}={environment[name]}: Horovod's ranks would not meet over MPI"
            found.append(fault("variables", what, f"unset {name}", unset=(name,)))
    for name in LOOPBACK:
        if environment.get(name, "") in ("lo", "127.0.0.1/8") and num_nodes > 1:
            what = f"{name}={environment[name]}: the nodes cannot reach each other that way"
            found.append(fault("variables", what, f"unset {name}", unset=(name,)))
    for name, (value, what) in SPOILERS.items():
        if environment.get(name) and value in (None, environment[name]):
            found.append(warning("variables", f"{name}={environment[name]}: {what}", f"unset {name}", unset=(name,)))
    if environment.get("HOROVOD_FUSION_THRESHOLD", "0") != "0":
        what = "HOROVOD_FUSION_THRESHOLD is set: tensors are fused by chance, so that runs differ in their last bits"
        found.append(warning("variables", what, "unset it", unset=("HOROVOD_FUSION_THRESHOLD",)))
    return found + _not_alike(facts) or [ok("variables", "none that spoils a run")]


def _mpi_that_does_not_start(facts: Facts) -> list[Finding]:
    """Whose fault it may be: another MPI that is found first, or none that is."""
    for node, of_node in facts.of_nodes.items():
        blame = _who_finds_another_mpi(facts.local)
        if isinstance(of_node.mpi, Unknown):
            return [fault("MPI", f"{node}: {of_node.mpi.why}", _fix_of_mpi(()))]
        if strange := _other_copy([of_node.mpi], facts.local.installation):
            what = f"{node}: built for {facts.local.installation.mpi}, and another MPI is found first: {strange}"
            return [fault("MPI", what + (f" ({blame[0]} is set)" if blame else ""), _fix_of_mpi(blame), blame)]
    return []


def _not_alike(facts: Facts) -> list[Finding]:
    """Variables that only some nodes have, such as from a shell's start-up file."""
    values: dict[str, dict[str, str]] = {}
    for rank in (ranks[0] for ranks in facts.nodes.values()):
        local = facts.locals[rank]
        for name in {name for other in facts.locals.values() for name in other.environment}:
            if name.startswith(SHOULD_BE_ALIKE) and name not in OF_ONE_RANK:
                values.setdefault(name, {}).setdefault(local.environment.get(name, ""), local.node)
    return [
        warning("variables", f"{name} is not the same on {some_of(nodes.values())}", f"set {name} alike, or nowhere")
        for name, nodes in sorted(values.items())
        if len(nodes) > 1
    ]


def _wrong_mpi(joined: Joined, installation: Installation) -> str:
    """What is wrong with the MPI that one rank has loaded; empty if nothing is."""
    if not _are_one_mpi(joined.version, joined.built_with):
        return f"mpi4py was built with {joined.built_with}, and {joined.version} is loaded: {some_of(joined.files)}"
    if installation.mpi and not _are_one_mpi(joined.version, installation.mpi):
        return (
            f"the environment was built for {installation.mpi}, and {joined.version} is loaded: {some_of(joined.files)}"
        )
    if len(joined.files) > 1:
        return f"two MPIs are loaded: {', '.join(joined.files)}"
    return ""


def _other_copy(loaded: Sequence[str], installation: Installation) -> str:
    """The file of an MPI that is not where the environment's own is; empty if it is there."""
    homes = [folder.resolve() for folder in (*installation.mpi_lib, installation.mpi_bin.parent)]
    files = [Path(file).resolve() for file in loaded] if installation.mpi else []
    return next((str(file) for file in files if not any(file.is_relative_to(home) for home in homes)), "")


def _are_one_mpi(one: str, other: str) -> bool:
    """The same MPI, by family, major and minor version; what says nothing contradicts nothing."""
    if not numbers_in(one) or not numbers_in(other):
        return True
    return ("Open MPI" in one) == ("Open MPI" in other) and numbers_in(one)[:2] == numbers_in(other)[:2]


def _who_finds_another_mpi(local: LocalFacts) -> tuple[str, ...]:
    return tuple(name for name in ("LD_PRELOAD", "LD_LIBRARY_PATH") if local.environment.get(name))[:1]


def _fix_of_mpi(blame: tuple[str, ...]) -> str:
    undo = f"unset {blame[0]}, or " if blame else ""
    return f"{undo}load the module of the MPI that it was built for and source env/activate; or build anew: env/setup"
