"""All checks, in the order in which people want to read them."""

from collections.abc import Callable

from lockstep.doctor import job_checks, node_checks, slurm_checks, software_checks
from lockstep.doctor.facts import Facts
from lockstep.doctor.findings import Finding, Status

CHECKS: tuple[Callable[[Facts], list[Finding]], ...] = (
    software_checks.check_launcher_says_what_mpi_says,
    job_checks.check_that_ranks_meet,
    software_checks.check_mpi,
    software_checks.check_horovod,
    software_checks.check_nccl,
    software_checks.check_environment_is_shared,
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
    """What all checks find. Pure: the same facts give the same findings."""
    return [finding for check in CHECKS for finding in check(facts)]


def is_healthy(findings: list[Finding]) -> bool:
    return all(finding.status is not Status.FAULT for finding in findings)
