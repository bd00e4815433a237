"""What must come of each fault."""

from dataclasses import dataclass

from lockstep.runtime.errors import ExitCode

# The launcher's words, or, if a rank on another node is the first to notice, those of its MPI, which name the node.
KILLED = r"[Kk]illed|signal 9|Exited with|peer process has unexpectedly disconnected"


@dataclass(frozen=True)
class Fault:
    """One fault, as a person sees it from outside.

    Attributes:
        what: what is done, in words.
        verdict: what the job must say, as a regular expression; {rank} is the rank that it was done to.
        codes: what the job may end with; None: anything but 0, since the launcher has its own.
        tears: the last checkpoint's first file is cut short before the run goes on.
    """

    what: str
    verdict: str
    codes: frozenset[int] | None
    tears: bool = False


FAULTS = {
    "sigkill": Fault("a rank is killed (SIGKILL)", KILLED, None),
    "sigstop": Fault(
        "a rank is stopped (SIGSTOP)",
        r"rank {rank}: (process \d+ on \S+ is stopped|no sign of \S+, which is stopped)",
        frozenset({ExitCode.STALLED}),
    ),
    "slow": Fault("a rank is slow", r"Rank {rank} was the slowest: \d+%", frozenset({ExitCode.DONE})),
    "exception": Fault("a rank raises an exception", r"lockstep: rank {rank}:", frozenset({ExitCode.BUG})),
    "nan": Fault(
        "a rank's images become NaN",
        r"update \d+: the (loss|gradient of \S+) on rank {rank} is infinite or not a number",
        frozenset({ExitCode.NON_FINITE}),
    ),
    "full_disk": Fault(
        "the disk is full", r"rank 0 could not write its part of a checkpoint", frozenset({ExitCode.STORAGE})
    ),
    "torn_shard": Fault("a rank is killed, a checkpoint's file torn", KILLED, None, tears=True),
    "sigterm": Fault("a rank gets SIGTERM", r"stopped by SIGTERM after update \d+", frozenset({ExitCode.STOPPED})),
    "sigusr1": Fault("a rank gets SIGUSR1", r"stopped by SIGUSR1 after update \d+", frozenset({ExitCode.STOPPED})),
    "cut_link": Fault("a node's link is cut", r"the job stalled.*nothing comes through", frozenset({ExitCode.STALLED})),
}
