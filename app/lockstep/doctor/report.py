"""What the doctor says: for people, and for programs."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from lockstep import __version__
from lockstep.doctor.facts import Facts
from lockstep.doctor.findings import Finding, Status
from lockstep.doctor.formatting import count


def as_text(facts: Facts, findings: Sequence[Finding], launch_line: str, seconds: float) -> str:
    width = max(len(finding.check) for finding in findings)
    lines = [
        f"Lockstep {__version__}: {count(len(facts.locals), 'rank')} on {count(len(facts.nodes), 'node')}, "
        f"started by {facts.launcher}; looked at in {seconds:.1f} s"
    ]
    for finding in findings:
        lines.append(f"  {finding.status:<8} {finding.check:<{width}}  {finding.what}")
        if finding.fix:
            lines.append(f"  {'':<8} {'':<{width}}  fix: {finding.fix}")
    lines.append(f"Launch line: {launch_line}")
    lines.append(verdict(findings))
    return "\n".join(lines)


def as_json(facts: Facts, findings: Sequence[Finding], launch_line: str, seconds: float, code: int) -> dict[str, Any]:
    return {
        "verdict": verdict(findings),
        "exit_code": code,
        "launch_line": launch_line,
        "seconds": round(seconds, 2),
        "num_ranks": len(facts.locals),
        "nodes": facts.nodes,
        "launcher": asdict(facts.launcher),
        "mpi": asdict(facts.joined) if facts.joined else None,
        "findings": [
            {"check": each.check, "status": each.status.lower(), "what": each.what, "fix": each.fix}
            for each in findings
        ],
        "cpus_of_ranks": {rank: sorted(local.cpus) for rank, local in facts.locals.items()},
        "speeds_of_ranks": {rank: asdict(speed) for rank, speed in (facts.speeds or {}).items()},
        "clocks": {node: asdict(clock) for node, clock in (facts.clocks or {}).items()},
        "links": [asdict(link) for link in facts.links or ()],
        "views": [asdict(view) for view in facts.views or ()],
    }


def verdict(findings: Sequence[Finding]) -> str:
    """One line."""
    faults = [finding for finding in findings if finding.status is Status.FAULT]
    warnings = [finding for finding in findings if finding.status is Status.WARNING]
    also = f", {count(len(warnings), 'warning')}" if warnings else ""
    if faults:
        return f"Unhealthy: {count(len(faults), 'fault')} ({', '.join(dict.fromkeys(f.check for f in faults))}){also}"
    return f"Healthy{also}"
