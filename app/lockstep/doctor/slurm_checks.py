"""Check Slurm's settings for this job: is a run told in time that it must stop, and is it started again?"""

import re

from lockstep.comm.stop import END_TIME_VARIABLES, SIGNALS
from lockstep.doctor.facts import Facts, Slurm, Unknown
from lockstep.doctor.findings import Finding, fault, ok, warning
from lockstep.runtime.launcher import SRUN, srun_mpi_option

HANDLED_SIGNALS = {
    text for signal in SIGNALS for text in (signal.name.removeprefix("SIG"), signal.name, str(signal.value))
}
KILL_WAIT, SIGNAL_AHEAD = 30, 60  # seconds; Slurm checks time limits every 30
USE_SBATCH = "start it by slurm/train.sbatch, or copy these lines from it"
# #SBATCH --signal=[R][B]:NAME[@SECONDS]; R and B in any order
_SIGNAL = re.compile(
    r"^#SBATCH\s.*--signal[= ]\s*(?:(?P<where>[RB]+):)?(?P<name>\w+)(?:@(?P<ahead>\d+))?", re.MULTILINE
)


def check_slurm(facts: Facts) -> list[Finding]:
    """Slurm warns a run before it ends it, starts it again, and ends all ranks when one dies."""
    slurm = facts.local.slurm
    if slurm is None:
        return []
    if isinstance(slurm, Unknown):
        return [warning("Slurm", slurm.why, "look at the job's settings yourself: --signal, --requeue")]
    found = [*_judge_signal(facts, slurm), *_judge_requeue(slurm), *_judge_srun(facts, slurm)]
    return found or [ok("Slurm", "tells a run in time that it must stop, and starts it again")]


def _judge_signal(facts: Facts, slurm: Slurm) -> list[Finding]:
    asked = _SIGNAL.search(slurm.script)
    knows_the_end = any(facts.local.environment.get(name) for name in END_TIME_VARIABLES)
    kill_wait = int((re.match(r"\d+", slurm.config.get("KillWait", "")) or ["30"])[0])
    if asked and asked["name"] not in HANDLED_SIGNALS:
        what = f"--signal asks for {asked['name']}, which ends ranks at once: a run saves and stops at USR1 or TERM"
        return [fault("Slurm", what, "#SBATCH --signal=B:USR1@120")]
    if asked and int(asked["ahead"] or 60) < SIGNAL_AHEAD:
        what = f"--signal asks for {asked['name']} {asked['ahead']} s before the end, and Slurm may be a minute late"
        return [warning("Slurm", what, "#SBATCH --signal=B:USR1@120")]
    if not asked and not knows_the_end and slurm.job.get("TimeLimit") != "UNLIMITED":
        what = (
            f"nothing tells a run that the job ends at {slurm.job.get('EndTime', 'some time')}: {kill_wait} s after "
            "SIGTERM (KillWait) all is killed"
        )
        fix = f"{USE_SBATCH}: #SBATCH --signal=B:USR1@120, LOCKSTEP_JOB_END_TIME"
        return [warning("Slurm", what, fix)]
    return []


def _judge_requeue(slurm: Slurm) -> list[Finding]:
    found = []
    if slurm.job.get("BatchFlag") == "1" and slurm.job.get("Requeue") == "0":
        what = "the job is not started again after a node fails or another job takes its place (Requeue=0)"
        found.append(warning("Slurm", what, "#SBATCH --requeue, with a script that resumes, as slurm/train.sbatch"))
    preempts = slurm.partition.get("PreemptMode", "OFF") not in ("OFF", "GANG", "SUSPEND", "GANG,SUSPEND")
    if preempts and int(slurm.partition.get("GraceTime", "0")) < SIGNAL_AHEAD:
        what = f"partition {slurm.partition.get('PartitionName')} takes nodes away without notice (GraceTime)"
        found.append(warning("Slurm", what, "save often: --checkpoint.interval; or use another partition"))
    return found


def _judge_srun(facts: Facts, slurm: Slurm) -> list[Finding]:
    found = []
    stays = slurm.config.get("KillOnBadExit") == "0" and "SLURM_KILL_BAD_EXIT" not in facts.local.environment
    if facts.launcher.name == SRUN and stays:
        what = "a rank that dies leaves the others waiting (KillOnBadExit=0)"
        found.append(warning("Slurm", what, "srun --kill-on-bad-exit=1, as below"))
    pmi = srun_mpi_option(facts.mpi.version if facts.mpi else facts.local.installation.mpi)
    if slurm.mpi_types and not any(offered.startswith(pmi) for offered in slurm.mpi_types):
        what = f"srun does not offer --mpi={pmi}, which this MPI understands: {', '.join(slurm.mpi_types)}"
        found.append(warning("Slurm", what, "use mpirun in the allocation, as below"))
    return found
