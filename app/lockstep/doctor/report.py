"""What the doctor reports: all findings, as text or JSON, and the line that starts a training well here."""

import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from lockstep import __version__
from lockstep.doctor import job_checks, node_checks, software_checks
from lockstep.doctor.facts import Facts, Slurm, Unknown
from lockstep.doctor.findings import Finding, Status, count
from lockstep.doctor.node_checks import UNBOUND, visible_gpus
from lockstep.runtime.affinity import num_cores
from lockstep.runtime.command_line import in_environment, train_program
from lockstep.runtime.launcher import srun_mpi_option

CHECKS: tuple[Callable[[Facts], list[Finding]], ...] = (  # in the order in which they are reported
    software_checks.check_launcher,
    job_checks.check_ranks,
    software_checks.check_mpi,
    software_checks.check_horovod,
    software_checks.check_nccl,
    software_checks.check_environment,
    software_checks.check_variables,
    node_checks.check_binding,
    node_checks.check_threads,
    node_checks.check_gpus,
    job_checks.check_speeds,
    node_checks.check_memory,
    node_checks.check_shared_memory,
    node_checks.check_limits,
    node_checks.check_names,
    node_checks.check_folder,
    job_checks.check_views,
    job_checks.check_clocks,
    job_checks.check_links,
    job_checks.check_slurm,
)


def diagnose(facts: Facts) -> list[Finding]:
    """Run all checks. Pure: the same facts give the same findings."""
    return [finding for check in CHECKS for finding in check(facts)]


def is_healthy(findings: list[Finding]) -> bool:
    return all(finding.status is not Status.FAULT for finding in findings)


def as_text(facts: Facts, findings: Sequence[Finding], line: str, seconds: float) -> str:
    width = max(len(finding.check) for finding in findings)
    lines = [
        f"Lockstep {__version__}: {count(len(facts.local_facts), 'rank')} on {count(len(facts.nodes), 'node')}, "
        f"started by {facts.launcher}; checked in {seconds:.1f} s"
    ]
    for finding in findings:
        lines.append(f"  {finding.status:<8} {finding.check:<{width}}  {finding.what}")
        if finding.fix:
            lines.append(f"  {'':<8} {'':<{width}}  fix: {finding.fix}")
    lines.append(f"Launch line: {line}")
    lines.append(verdict(findings))
    return "\n".join(lines)


def as_json(facts: Facts, findings: Sequence[Finding], line: str, seconds: float, code: int) -> dict[str, Any]:
    return {
        "verdict": verdict(findings),
        "exit_code": code,
        "launch_line": line,
        "seconds": round(seconds, 2),
        "num_ranks": len(facts.local_facts),
        "nodes": facts.nodes,
        "launcher": asdict(facts.launcher),
        "mpi": asdict(facts.mpi) if facts.mpi else None,
        "findings": [
            {"check": each.check, "status": each.status.lower(), "what": each.what, "fix": each.fix}
            for each in findings
        ],
        "cpus_of_ranks": {rank: sorted(local.cpus) for rank, local in facts.local_facts.items()},
        "speeds_of_ranks": {rank: asdict(speed) for rank, speed in (facts.speeds or {}).items()},
        "clocks": {node: asdict(clock) for node, clock in (facts.clocks or {}).items()},
        "links": [asdict(link) for link in facts.links or ()],
        "views": [asdict(view) for view in facts.views or ()],
    }


def verdict(findings: Sequence[Finding]) -> str:
    """Whether the job is healthy, in one line."""
    faults = [finding for finding in findings if finding.status is Status.FAULT]
    warnings = [finding for finding in findings if finding.status is Status.WARNING]
    also = f", {count(len(warnings), 'warning')}" if warnings else ""
    if faults:
        return f"Unhealthy: {count(len(faults), 'fault')} ({', '.join(dict.fromkeys(f.check for f in faults))}){also}"
    return f"Healthy{also}"


# -- the launch line ---------------------------------------------------------------------------------------------------


def launch_line(facts: Facts, findings: Sequence[Finding]) -> str:
    """The command that starts a training well here: on this machine, or in this allocation.

    It starts one rank per GPU; without GPUs, as many ranks as there are now, or as the launcher was asked for; without
    a launcher, one per core. Variables that a finding asks to unset are unset in front of it.
    """
    unset = sorted({name for finding in findings for name in finding.unset if name in facts.local.environment})
    clean = f"env {' '.join(f'-u {name}' for name in unset)} " if unset else ""
    unbound = any(UNBOUND in finding.options for finding in findings)
    ranks_of_nodes = {node: _num_ranks(facts, node) for node in facts.nodes}
    if facts.missing and facts.mpi:  # the nodes of the missing ranks are unknown
        ranks_of_nodes = {facts.local.node: facts.mpi.size}
    if "SLURM_JOB_ID" in facts.local.environment:
        line = _in_slurm(facts, ranks_of_nodes, unbound)
    else:
        line = _by_mpirun(facts, ranks_of_nodes, unbound)
    train = train_program()
    if line.startswith("srun") or len(ranks_of_nodes) > 1:  # each rank needs the environment of its own node
        train = in_environment(train)
    return clean + (f"{line} {train}" if line.startswith("srun") else in_environment(f"{line} {train}"))


def _num_ranks(facts: Facts, node: str) -> int:
    ranks = facts.nodes[node]
    node_facts, local = facts.facts_by_node.get(node), facts.local_facts[ranks[0]]
    if node_facts and not isinstance(node_facts.gpus, Unknown) and (gpus := visible_gpus(list(node_facts.gpus), local)):
        return len(gpus)
    if len(facts.local_facts) > 1:
        return len(ranks)
    return facts.launcher.size if facts.launcher.size > 1 else num_cores(local.cpus, local.cores)


def _in_slurm(facts: Facts, ranks_of_nodes: dict[str, int], unbound: bool) -> str:
    environment, slurm = facts.local.environment, facts.local.slurm
    num_nodes = int(environment.get("SLURM_JOB_NUM_NODES", "1"))
    num_ranks = sum(ranks_of_nodes.values())
    if len(facts.local_facts) == 1:  # no ranks started yet: in a batch script or in an allocation's shell
        ranks_per_node = next(iter(ranks_of_nodes.values()))
        num_ranks = facts.launcher.tasks_asked or ranks_per_node * num_nodes
    version = facts.mpi.version if facts.mpi else facts.local.installation.mpi
    pmi = srun_mpi_option(version)
    offered = slurm.mpi_types if isinstance(slurm, Slurm) else ()
    if offered and not any(name.startswith(pmi) for name in offered):
        return f"{_mpirun(facts)} -np {num_ranks}{' --bind-to none' if unbound else ''}"
    command = ["srun", f"--mpi={pmi}", f"--nodes={num_nodes}", f"--ntasks={num_ranks}"]
    if cpus := environment.get("SLURM_CPUS_PER_TASK"):
        command.append(f"--cpus-per-task={cpus}")  # srun does not inherit it since 22.05
    return " ".join([*command, "--cpu-bind=none", "--kill-on-bad-exit=1"])


def _by_mpirun(facts: Facts, ranks_of_nodes: dict[str, int], unbound: bool) -> str:
    command = [_mpirun(facts), "-np", str(sum(ranks_of_nodes.values()))]
    in_a_batch_system = any(name in facts.local.environment for name in ("PBS_JOBID", "LSB_JOBID"))
    if len(ranks_of_nodes) > 1 and not in_a_batch_system:
        command += ["--host", ",".join(f"{node}:{ranks}" for node, ranks in ranks_of_nodes.items())]
    return " ".join([*command, *(["--bind-to none"] if unbound else [])])


def _mpirun(facts: Facts) -> str:
    """`mpirun` if that name finds the environment's own, else its full path."""
    mpirun = facts.local.installation.mpirun
    found = shutil.which("mpirun")
    return "mpirun" if found and os.path.realpath(found) == os.path.realpath(mpirun) else mpirun
