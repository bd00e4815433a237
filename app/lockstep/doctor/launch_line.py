"""The line that starts a training well here: on this machine, or in this allocation."""

import os
import shutil
from collections.abc import Sequence

from lockstep.doctor.facts import Facts, Slurm, Unknown
from lockstep.doctor.findings import Finding
from lockstep.doctor.node_checks import UNBOUND, visible_gpus
from lockstep.runtime.affinity import num_cores
from lockstep.runtime.hints import in_environment, train_program
from lockstep.runtime.launcher import srun_mpi_option


def launch_line(facts: Facts, findings: Sequence[Finding]) -> str:
    """One rank for each GPU; without GPUs as many ranks as there are now, or were asked for; alone, one for each core.

    What a finding says must not be set is unset, in front.
    """
    unset = sorted({name for finding in findings for name in finding.unset if name in facts.local.environment})
    clean = f"env {' '.join(f'-u {name}' for name in unset)} " if unset else ""
    unbound = any(UNBOUND in finding.options for finding in findings)
    ranks_of_nodes = {node: _num_ranks(facts, node) for node in facts.nodes}
    if facts.missing and facts.joined:  # where they are is not known
        ranks_of_nodes = {facts.local.node: facts.joined.size}
    if "SLURM_JOB_ID" in facts.local.environment:
        line = _in_slurm(facts, ranks_of_nodes, unbound)
    else:
        line = _by_mpirun(facts, ranks_of_nodes, unbound)
    train = train_program()
    if line.startswith("srun") or len(ranks_of_nodes) > 1:  # each rank finds the environment of its own node
        train = in_environment(train)
    return clean + (f"{line} {train}" if line.startswith("srun") else in_environment(f"{line} {train}"))


def _num_ranks(facts: Facts, node: str) -> int:
    ranks = facts.nodes[node]
    of_node, local = facts.of_nodes.get(node), facts.locals[ranks[0]]
    if of_node and not isinstance(of_node.gpus, Unknown) and (gpus := visible_gpus(list(of_node.gpus), local)):
        return len(gpus)
    if len(facts.locals) > 1:
        return len(ranks)
    return facts.launcher.size if facts.launcher.size > 1 else num_cores(local.cpus, local.cores)


def _in_slurm(facts: Facts, ranks_of_nodes: dict[str, int], unbound: bool) -> str:
    environment, slurm = facts.local.environment, facts.local.slurm
    num_nodes = int(environment.get("SLURM_JOB_NUM_NODES", "1"))
    num_ranks = sum(ranks_of_nodes.values())
    if len(facts.locals) == 1:  # the only one so far, in a batch script or the shell of an allocation
        a_node = next(iter(ranks_of_nodes.values()))
        num_ranks = facts.launcher.tasks_asked or a_node * num_nodes
    version = facts.joined.version if facts.joined else facts.local.installation.mpi
    pmi = srun_mpi_option(version)
    offered = slurm.mpi_types if isinstance(slurm, Slurm) else ()
    if offered and not any(name.startswith(pmi) for name in offered):
        return f"{_mpirun(facts)} -np {num_ranks}{' --bind-to none' if unbound else ''}"
    words = ["srun", f"--mpi={pmi}", f"--nodes={num_nodes}", f"--ntasks={num_ranks}"]
    if cpus := environment.get("SLURM_CPUS_PER_TASK"):
        words.append(f"--cpus-per-task={cpus}")  # which srun does not inherit since 22.05
    return " ".join([*words, "--cpu-bind=none", "--kill-on-bad-exit=1"])


def _by_mpirun(facts: Facts, ranks_of_nodes: dict[str, int], unbound: bool) -> str:
    words = [_mpirun(facts), "-np", str(sum(ranks_of_nodes.values()))]
    in_a_batch_system = any(name in facts.local.environment for name in ("PBS_JOBID", "LSB_JOBID"))
    if len(ranks_of_nodes) > 1 and not in_a_batch_system:
        words += ["--host", ",".join(f"{node}:{ranks}" for node, ranks in ranks_of_nodes.items())]
    return " ".join([*words, *(["--bind-to none"] if unbound else [])])


def _mpirun(facts: Facts) -> str:
    """By its name, if that is the one which a shell finds."""
    mpirun = facts.local.installation.mpirun
    found = shutil.which("mpirun")
    return "mpirun" if found and os.path.realpath(found) == os.path.realpath(mpirun) else mpirun
