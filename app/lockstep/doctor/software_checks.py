"""Check that MPI, Horovod, NCCL, the launcher and the environment variables fit together."""

from collections.abc import Sequence
from pathlib import Path

from lockstep.doctor.facts import Facts, Libraries, LocalFacts, MpiFacts, Unknown
from lockstep.doctor.findings import Finding, count, fault, nccl_version, numbers_in, ok, some_of, warning
from lockstep.doctor.local_facts import NO_ANSWER
from lockstep.runtime.command_line import train_program
from lockstep.runtime.installation import Installation
from lockstep.runtime.launcher import (
    NONE,
    describe_mismatch,
    how_to_start,
    missing_launcher_warning,
    mpi_misses_processes,
)

# Variables that make a run slow or not reproducible if they have this value (None: any value).
HARMFUL_VARIABLES = {
    "LD_PRELOAD": (None, "a library is loaded in front of all others"),
    "HOROVOD_AUTOTUNE": ("1", "Horovod fuses tensors depending on timing: runs differ in their last bits"),
    "CUDA_LAUNCH_BLOCKING": ("1", "the CPU waits for every GPU kernel"),
    "NCCL_P2P_DISABLE": ("1", "GPUs of one node send through the CPU"),
    "NCCL_IB_DISABLE": ("1", "NCCL does not use InfiniBand"),
}
NETWORK_VARIABLES = ("OMPI_MCA_btl_tcp_if_include", "NCCL_SOCKET_IFNAME", "HOROVOD_GLOO_IFACE")
SAME_ON_ALL_NODES = ("OMP_", "HOROVOD_", "NCCL_", "PYTHONPATH", "LD_PRELOAD", "UCX_", "LOCKSTEP_VENV")
PER_RANK = ("HOROVOD_RANK", "HOROVOD_LOCAL_RANK", "HOROVOD_CROSS_RANK", "HOROVOD_HOSTNAME")


def check_launcher(facts: Facts) -> list[Finding]:
    """The launcher and MPI agree on the number of ranks."""
    launcher, mpi = facts.launcher, facts.mpi
    if mpi is None:
        return []
    if launcher.is_gloo:
        what = f"{launcher}: MPI has no part in it, so ranks are not compared with each other"
        return [warning("launcher", what, f"start the doctor with {facts.local.installation.mpirun}")]
    if mpi_misses_processes(launcher, mpi.size):
        fix = how_to_start(launcher, mpi.version, facts.local.installation.mpirun, train_program())
        return [fault("launcher", describe_mismatch(launcher, mpi.size, mpi.version), fix)]
    if remark := missing_launcher_warning(launcher, mpi.size):
        return [warning("launcher", remark.removeprefix("warning: "), "as below")]
    if launcher.name == NONE:
        return [ok("launcher", f"none known, and MPI says {count(mpi.size, 'rank')}")]
    return [ok("launcher", f"{launcher}: {count(launcher.size, 'rank')}, and MPI says {mpi.size}")]


def check_mpi(facts: Facts) -> list[Finding]:
    """The MPI that is loaded is the one that mpi4py and Horovod were compiled for."""
    mpi_of_ranks = {rank: of_rank.mpi for rank, of_rank in facts.ranks.items()} or ({0: facts.mpi} if facts.mpi else {})
    if not mpi_of_ranks:
        return _explain_failed_start(facts)
    found = []
    for rank, mpi in mpi_of_ranks.items():
        local = facts.local_facts[rank]
        if wrong := _wrong_mpi(mpi, local.installation):
            found.append((wrong, local))
    if found:
        what, local = found[0]
        variable = _library_variable(local)
        because = f" ({variable[0]} is set)" if variable else ""
        nodes = some_of(local.node for _, local in found)
        return [fault("MPI", f"{nodes}: {what}{because}", _mpi_fix(variable), variable)]
    versions = {mpi.version: facts.local_facts[rank].node for rank, mpi in mpi_of_ranks.items()}
    if len(versions) > 1:
        versions_of_nodes = ", ".join(f"{version} on {node}" for version, node in versions.items())
        return [fault("MPI", f"not the same on all nodes: {versions_of_nodes}", _mpi_fix(()))]
    first = mpi_of_ranks[min(mpi_of_ranks)]
    what = f"{first.version} is loaded, as built for, from {some_of(first.files) or 'somewhere'}"
    if other := _other_copy(first.files, facts.local_facts[min(mpi_of_ranks)].installation):
        variable = _library_variable(facts.local)
        what = f"another copy of the same MPI is loaded: {other}"
        return [warning("MPI", what, _mpi_fix(variable), variable)]
    return [ok("MPI", what)]


def check_horovod(facts: Facts) -> list[Finding]:
    """Horovod can be loaded, and shares its MPI with mpi4py."""
    for node, node_facts in facts.facts_by_node.items():
        libraries = node_facts.libraries
        if isinstance(libraries, Unknown):
            if libraries.why == NO_ANSWER:
                what = f"{node}: torch and Horovod took too long to load, and were not checked"
                fix = "try again when the node is idle; put the environment on a faster disk (LOCKSTEP_VENV)"
                return [warning("Horovod", what, fix)]
            fix = "env/setup repairs the environment; source env/activate after the modules"
            return [fault("Horovod", f"{node}: torch and Horovod do not load: {libraries.why}", fix)]
        of_mpi4py = [of_rank.mpi.files for of_rank in facts.ranks.values() if of_rank.local.node == node]
        if of_mpi4py and (others := set(libraries.mpi).difference(of_mpi4py[0])):
            what = f"{node}: Horovod and mpi4py load different MPIs: {some_of(sorted(others))}, {some_of(of_mpi4py[0])}"
            return [fault("Horovod", what, _mpi_fix(()))]
    seconds = [
        node_facts.libraries.seconds
        for node_facts in facts.facts_by_node.values()
        if isinstance(node_facts.libraries, Libraries)
    ]
    return [ok("Horovod", f"loads in {max(seconds):.1f} s, with the same MPI as mpi4py")] if seconds else []


def check_nccl(facts: Facts) -> list[Finding]:
    """The NCCL that is loaded is not older than the one that Horovod was compiled with, and the same everywhere."""
    loaded: dict[int, str] = {}
    for node, node_facts in facts.facts_by_node.items():
        libraries, has_gpus = node_facts.libraries, bool(node_facts.gpus) and not isinstance(node_facts.gpus, Unknown)
        if isinstance(libraries, Unknown):
            continue
        built_version, loaded_version = libraries.nccl_built, libraries.nccl_loaded
        if not built_version and has_gpus:
            what = f"{node} has GPUs, and Horovod was built without NCCL: ranks compute on the CPU"
            return [warning("NCCL", what, "give env/setup a CUDA toolkit: CUDA_HOME=/path env/setup")]
        if not built_version:
            return [ok("NCCL", "Horovod was built without it, for CPUs")]
        built = f"{node}: Horovod was built with NCCL {nccl_version(built_version)}"
        fix = "load no other NCCL than the one of torch (LD_PRELOAD, LD_LIBRARY_PATH, a module), or run env/setup"
        variable = tuple(name for name in ("LD_PRELOAD",) if name in facts.local.environment)
        if len(libraries.nccl) != 1 or not loaded_version:
            what = f"{built}, and loads {some_of(libraries.nccl) or 'none'}"
            return [fault("NCCL", what, fix, unset=variable)]
        if loaded_version < built_version or loaded_version // 10_000 != built_version // 10_000:
            what = f"{built}, and {nccl_version(loaded_version)} is loaded: {libraries.nccl[0]}"
            return [fault("NCCL", what, fix, unset=variable)]
        loaded[loaded_version] = node
    if len(loaded) > 1:
        versions = ", ".join(f"{nccl_version(code)} on {node}" for code, node in loaded.items())
        return [fault("NCCL", f"not the same on all nodes: {versions}", "let all nodes use one environment")]
    return [ok("NCCL", f"{nccl_version(code)} is loaded, at least the version built with") for code in loaded]


def check_environment(facts: Facts) -> list[Finding]:
    """All ranks run the same build of the environment."""
    folders = {str(local.installation.venv): local.node for local in facts.local_facts.values()}
    stamps = {local.installation.stamp: local.node for local in facts.local_facts.values()}
    fix = "let all nodes use one environment, on a disk that all see, or build each with the same env/setup"
    if len(stamps) > 1:
        return [fault("environment", f"built from different sources on {some_of(stamps.values())}", fix)]
    if len(folders) > 1:
        folders_of_nodes = ", ".join(f"{folder} on {node}" for folder, node in folders.items())
        return [warning("environment", f"not the same on all nodes: {folders_of_nodes}", fix)]
    return [ok("environment", next(iter(folders)))]


def check_variables(facts: Facts) -> list[Finding]:
    """No environment variable changes what a run computes, or makes it slow."""
    found = []
    environment, num_nodes = facts.local.environment, len(facts.nodes)
    if foreign := {
        name: local.foreign_packages[name] for local in facts.local_facts.values() for name in local.foreign_packages
    }:
        what = f"PYTHONPATH puts {some_of(foreign.values())} before the environment's own"
        found.append(fault("variables", what, "unset PYTHONPATH", unset=("PYTHONPATH",)))
    elif environment.get("PYTHONPATH"):
        what = f"PYTHONPATH={environment['PYTHONPATH']} comes before the environment's own packages"
        found.append(warning("variables", what, "unset PYTHONPATH, unless you need it", unset=("PYTHONPATH",)))
    for name in ("HOROVOD_CONTROLLER", "HOROVOD_CPU_OPERATIONS"):
        if environment.get(name, "mpi").lower() != "mpi" and not facts.launcher.is_gloo:
            what = f"{name}={environment[name]}: Horovod would not use MPI"
            found.append(fault("variables", what, f"unset {name}", unset=(name,)))
    for name in NETWORK_VARIABLES:
        if environment.get(name, "") in ("lo", "127.0.0.1/8") and num_nodes > 1:
            what = f"{name}={environment[name]}: the nodes cannot reach each other that way"
            found.append(fault("variables", what, f"unset {name}", unset=(name,)))
    for name, (value, what) in HARMFUL_VARIABLES.items():
        if environment.get(name) and value in (None, environment[name]):
            found.append(warning("variables", f"{name}={environment[name]}: {what}", f"unset {name}", unset=(name,)))
    if environment.get("HOROVOD_FUSION_THRESHOLD", "0") != "0":
        what = (
            "HOROVOD_FUSION_THRESHOLD is set: tensors are fused depending on timing, so runs differ in their last bits"
        )
        found.append(warning("variables", what, "unset it", unset=("HOROVOD_FUSION_THRESHOLD",)))
    return found + _different_variables(facts) or [ok("variables", "none that harms a run")]


def _explain_failed_start(facts: Facts) -> list[Finding]:
    """Why MPI may not have started: no MPI library is found, or another one is found first."""
    for node, node_facts in facts.facts_by_node.items():
        if isinstance(node_facts.mpi_library, Unknown):
            return [fault("MPI", f"{node}: {node_facts.mpi_library.why}", _mpi_fix(()))]
        if other := _other_copy([node_facts.mpi_library], facts.local.installation):
            variable = _library_variable(facts.local)
            because = f" ({variable[0]} is set)" if variable else ""
            what = f"{node}: built for {facts.local.installation.mpi}, and another MPI is found first: {other}{because}"
            return [fault("MPI", what, _mpi_fix(variable), variable)]
    return []


def _different_variables(facts: Facts) -> list[Finding]:
    """Variables that differ between nodes, such as those set in a shell's start-up file."""
    values: dict[str, dict[str, str]] = {}
    for rank in (ranks[0] for ranks in facts.nodes.values()):
        local = facts.local_facts[rank]
        for name in {name for other in facts.local_facts.values() for name in other.environment}:
            if name.startswith(SAME_ON_ALL_NODES) and name not in PER_RANK:
                values.setdefault(name, {}).setdefault(local.environment.get(name, ""), local.node)
    return [
        warning(
            "variables",
            f"{name} is not the same on {some_of(nodes.values())}",
            f"set {name} to one value on all nodes, or unset it",
        )
        for name, nodes in sorted(values.items())
        if len(nodes) > 1
    ]


def _wrong_mpi(mpi: MpiFacts, installation: Installation) -> str:
    """What is wrong with the MPI that one rank has loaded; an empty string if nothing is."""
    if not _is_same_mpi(mpi.version, mpi.built_with):
        return f"mpi4py was built with {mpi.built_with}, and {mpi.version} is loaded: {some_of(mpi.files)}"
    if installation.mpi and not _is_same_mpi(mpi.version, installation.mpi):
        return f"the environment was built for {installation.mpi}, and {mpi.version} is loaded: {some_of(mpi.files)}"
    if len(mpi.files) > 1:
        return f"two MPIs are loaded: {', '.join(mpi.files)}"
    return ""


def _other_copy(loaded: Sequence[str], installation: Installation) -> str:
    """The first loaded MPI library outside the environment's own MPI; an empty string if there is none."""
    homes = [folder.resolve() for folder in (*installation.mpi_lib, installation.mpi_bin.parent)]
    files = [Path(file).resolve() for file in loaded] if installation.mpi else []
    return next((str(file) for file in files if not any(file.is_relative_to(home) for home in homes)), "")


def _is_same_mpi(one: str, other: str) -> bool:
    """Whether family, major and minor version agree; also true if either text has no version."""
    if not numbers_in(one) or not numbers_in(other):
        return True
    return ("Open MPI" in one) == ("Open MPI" in other) and numbers_in(one)[:2] == numbers_in(other)[:2]


def _library_variable(local: LocalFacts) -> tuple[str, ...]:
    """The variable that may make the linker find another MPI: at most one name."""
    return tuple(name for name in ("LD_PRELOAD", "LD_LIBRARY_PATH") if local.environment.get(name))[:1]


def _mpi_fix(variable: tuple[str, ...]) -> str:
    unset = f"unset {variable[0]}, or " if variable else ""
    return f"{unset}load the module of the MPI that it was built for and source env/activate; or rebuild: env/setup"
