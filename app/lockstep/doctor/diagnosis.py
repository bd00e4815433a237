"""Turn facts into findings: all checks, in the order in which they are reported."""

from collections.abc import Callable

from lockstep.doctor import job_checks, node_checks, slurm_checks, software_checks
from lockstep.doctor.facts import Facts
from lockstep.doctor.findings import Finding, Status

CHECKS: tuple[Callable[[Facts], list[Finding]], ...] = (
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
    slurm_checks.check_slurm,
)


def diagnose(facts: Facts) -> list[Finding]:
    """Run all checks. Pure: the same facts give the same findings."""
    return [finding for check in CHECKS for finding in check(facts)]


def is_healthy(findings: list[Finding]) -> bool:
    return all(finding.status is not Status.FAULT for finding in findings)
