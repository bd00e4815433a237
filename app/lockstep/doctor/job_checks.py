"""Check the job: what only its ranks together can show (that all answer, their speed, clocks, links, and the shared
folder), and Slurm's settings for it.
"""

import re
import statistics
from collections.abc import Sequence

from lockstep.comm.stop import END_TIME_VARIABLES, SIGNALS
from lockstep.doctor.facts import Facts, Link, Slurm, Unknown
from lockstep.doctor.findings import Finding, count, duration, fault, median_of_others, ok, rate, some_of, warning
from lockstep.doctor.folder import SECONDS_TO_SEE
from lockstep.runtime.launcher import SRUN, srun_mpi_option

SLOW_CORES, VERY_SLOW_CORES = 0.85, 0.6  # of the other nodes' speed
BUSY, VERY_BUSY = 0.6, 0.3  # of the other nodes' share of their cores
# In seconds: logs of ranks are compared by time, and files may seem to come from the future.
CLOCK_AHEAD, CLOCK_FAR_AHEAD = 0.2, 2.0
SLOW_RATE = 0.4e9  # bit/s: less than half of Gigabit Ethernet
SLOW_LATENCY = 1e-3
SLOWER_THAN_OTHERS = 0.5
SHARE_OF_INFINIBAND = 0.1
SLOW_VIEW = 0.5


def check_ranks(facts: Facts) -> list[Finding]:
    """MPI starts, all ranks answer, and the measurements between them end."""
    seen = f"{count(len(facts.ranks), 'rank')} on {count(len(facts.nodes), 'node')}"
    if facts.mpi is None:
        what = f"{facts.local.node}: MPI does not start: {facts.trouble}"
        fix = "start it as below; on a login node, in an allocation; see the messages of MPI and of the launcher"
        return [fault("ranks", what, fix)]
    if facts.missing:
        named = {facts.ranks[rank].local.node for rank in facts.missing if rank in facts.ranks}
        where = f"{some_of(sorted(named))}: " if named else ""
        which = f"{count(len(facts.missing), 'rank')} of {facts.mpi.size}, the first is {facts.missing[0]}"
        hosts = facts.local.environment.get("SLURM_JOB_NODELIST")
        others = f"the nodes other than {some_of(facts.nodes)}" + (f", of {hosts}" if hosts else "")
        fix = f"look at {some_of(sorted(named)) or others}: processes, network, file system"
        return [fault("ranks", f"{where}no answer in time from {which}; {facts.trouble}", fix)]
    if facts.trouble:
        return [fault("ranks", f"all ranks answered, but {facts.trouble}", "look at the network between the nodes")]
    return [ok("ranks", f"{seen} found each other" if len(facts.ranks) > 1 else "MPI starts")]


def check_speeds(facts: Facts) -> list[Finding]:
    """No node computes more slowly than the others: in training, all ranks would wait for it."""
    speeds, found = facts.speeds or {}, []
    nodes = {name: [speeds[rank] for rank in ranks if rank in speeds] for name, ranks in facts.nodes.items()}
    nodes = {name: of_ranks for name, of_ranks in nodes.items() if of_ranks}
    if not nodes:
        return []
    flops = [statistics.median(speed.flops for speed in of_ranks) for of_ranks in nodes.values()]
    shares = [statistics.median(speed.core_share for speed in of_ranks) for of_ranks in nodes.values()]
    for index, name in enumerate(nodes):
        if len(nodes) == 1:
            break
        slower = flops[index] / median_of_others(flops, index)
        if slower < SLOW_CORES:
            make_finding = fault if slower < VERY_SLOW_CORES else warning
            what = f"{name} is slow: its cores do {slower:.0%} of what those of the other nodes do"
            fix = f"leave it out (--exclude={name}); look at its clock rate, temperature and power limit"
            found.append(make_finding("speed", what, fix))
        busier = shares[index] / median_of_others(shares, index)
        if busier < BUSY:
            make_finding = fault if busier < VERY_BUSY else warning
            what = f"{name} is slow: its ranks get {busier:.0%} of the time on a core that others get"
            fix = f"see what else computes on {name} (top), or leave it out (--exclude={name})"
            found.append(make_finding("speed", what, fix))
    if not found:
        found += _judge_load(facts, list(nodes), shares)
    typical = statistics.median(flops) / 1e9
    return found or [ok("speed", f"{typical:.0f} Gflop/s a core, {min(shares):.0%} of a core or more for each rank")]


def check_clocks(facts: Facts) -> list[Finding]:
    """All nodes' clocks agree with that of rank 0's node."""
    clocks = facts.clocks or {}
    found = []
    for name, clock in clocks.items():
        ahead = max(0.0, abs(clock.ahead) - clock.error)
        if ahead > CLOCK_AHEAD:
            make_finding = fault if ahead > CLOCK_FAR_AHEAD else warning
            first = next(iter(facts.nodes))
            what = f"{name} is {duration(abs(clock.ahead))} {'ahead of' if clock.ahead > 0 else 'behind'} {first}"
            found.append(
                make_finding("clocks", what, f"synchronise the nodes' clocks: systemctl restart chronyd on {name}")
            )
    if clocks and not found:
        worst = max(abs(clock.ahead) for clock in clocks.values())
        return [ok("clocks", f"of {count(len(clocks) + 1, 'node')}, at most {duration(worst)} apart")]
    return found


def check_links(facts: Facts) -> list[Finding]:
    """Messages pass between all measured pairs of nodes, by InfiniBand where there is any, and no link is slow."""
    links = facts.links or []
    if not links:
        return []
    if len(facts.nodes) == 1:
        within = links[0]
        return [ok("links", f"within {within.first}: {_describe(within)}")]
    found = []
    if dead := [link for link in links if link.latency is None]:
        what = f"{_between(dead)}: nothing comes through"
        found.append(fault("links", what, "look at the network there, and at OMPI_MCA_btl_tcp_if_include"))
    alive = [link for link in links if link.latency is not None]
    for link in alive:
        hardware = _infiniband_between(facts, link)
        if link.rate < SHARE_OF_INFINIBAND * hardware:
            what = f"{_between([link])}: {_describe(link)}, and InfiniBand there has {rate(hardware)}"
            fix = "MPI does not use it: build for the site's MPI (docs/modules.md), unset OMPI_MCA_pml and OMPI_MCA_btl"
            return [*found, fault("links", what, fix, unset=("OMPI_MCA_pml", "OMPI_MCA_btl"))]
    found += _slower_than_others(facts, alive) or _slow(alive)
    typical = sorted(alive, key=lambda link: link.rate)[len(alive) // 2] if alive else None
    return found or [ok("links", f"between nodes: {_describe(typical)}" if typical else "none")]


def check_views(facts: Facts) -> list[Finding]:
    """All nodes see at once what one node writes to the shared folder."""
    for view in facts.views or []:
        fix = "name a folder on a disk that all nodes share: --folder DIR here, --run_dir for a run"
        if view.new_after is None:
            what = f"{view.node} does not see what {view.writer} writes to the folder for runs"
            return [fault("same view", what, fix)]
        if view.replaced_after is None:
            what = f"{view.node} sees an old file {SECONDS_TO_SEE:.0f} s after {view.writer} replaced it"
            return [fault("same view", what, f"{fix}; or mount it with a shorter cache (actimeo)")]
        if max(view.new_after, view.replaced_after) > SLOW_VIEW:
            seconds = max(view.new_after, view.replaced_after)
            what = f"{view.node} sees {duration(seconds)} late what {view.writer} writes"
            return [warning("same view", what, fix)]
    if not facts.views:
        return []
    slowest = max(max(view.new_after or 0, view.replaced_after or 0) for view in facts.views)
    return [ok("same view", f"of the folder on all nodes, within {duration(slowest)}")]


def _judge_load(facts: Facts, nodes: Sequence[str], shares: Sequence[float]) -> list[Finding]:
    """Warn if other programs compute on a node: ranks get less of a core than they would without them."""
    for name, share in zip(nodes, shares, strict=True):
        ranks = facts.nodes[name]
        num_cpus = len(frozenset().union(*(facts.local_facts[rank].cpus for rank in ranks)))
        expected = min(1.0, num_cpus / len(ranks))
        if share < BUSY * expected:
            what = (
                f"{name}: ranks get {share:.0%} of a core, and would get {expected:.0%} if nothing else computed there"
            )
            return [warning("speed", what, f"see what else computes on {name} (top)")]
    return []


def _slower_than_others(facts: Facts, links: Sequence[Link]) -> list[Finding]:
    """Name the node most of whose links are slow; otherwise, each slow link."""
    if len(links) < 3:
        return []
    rates = sorted(link.rate for link in links)
    # The upper quartile: with 3 or 4 nodes, half of the links or more may lead to one slow node.
    typical = rates[3 * len(rates) // 4]
    slow = [link for link in links if link.rate < SLOWER_THAN_OTHERS * typical]
    fix = "leave it out (--exclude), and look at its network card, cable and switch port (ethtool, ibstat)"
    best = {name: max((link.rate for link in _links_of(name, links)), default=0.0) for name in facts.nodes}
    worst = max(
        facts.nodes, key=lambda name: (len(_links_of(name, slow)) / max(1, len(_links_of(name, links))), -best[name])
    )
    if len(_links_of(worst, slow)) > 1 and 2 * len(_links_of(worst, slow)) > len(_links_of(worst, links)):
        what = f"{worst} has a slow link: {rate(best[worst])} at best, and {rate(typical)} is typical here"
        return [fault("links", what, fix)]
    if slow:
        what = f"{_between(slow)}: {_describe(slow[0])}, and {rate(typical)} is typical here"
        return [fault("links", what, "look at the switches between these nodes")]
    return []


def _slow(links: Sequence[Link]) -> list[Finding]:
    """Judge each link on its own, without comparing it with the others."""
    fix = "look whether MPI uses the network that you mean (OMPI_MCA_btl_tcp_if_include, UCX_NET_DEVICES)"
    if slow := [link for link in links if link.rate < SLOW_RATE]:
        return [fault("links", f"{_between(slow)}: {_describe(slow[0])}, less than half of Gigabit Ethernet", fix)]
    if late := [link for link in links if (link.latency or 0.0) > SLOW_LATENCY]:
        return [warning("links", f"{_between(late)}: {_describe(late[0])}: each message takes long", fix)]
    return []


def _links_of(node: str, links: Sequence[Link]) -> list[Link]:
    return [link for link in links if node in (link.first, link.second)]


def _infiniband_between(facts: Facts, link: Link) -> float:
    """The rate of the InfiniBand that both nodes have; 0 if they do not."""
    nodes = [facts.facts_by_node[name] for name in (link.first, link.second) if name in facts.facts_by_node]
    return min((max(node.infiniband.values(), default=0.0) for node in nodes), default=0.0)


def _between(links: Sequence[Link]) -> str:
    others = f" and {len(links) - 1} more" if len(links) > 1 else ""
    return f"between {links[0].first} and {links[0].second}{others}"


def _describe(link: Link) -> str:
    return f"{rate(link.rate)}, {duration(link.latency or 0.0)}"


HANDLED_SIGNALS = {
    text for signal in SIGNALS for text in (signal.name.removeprefix("SIG"), signal.name, str(signal.value))
}
KILL_WAIT, SIGNAL_AHEAD = 30, 60  # seconds: Slurm's default; it checks time limits every 30
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
    configured = re.match(r"\d+", slurm.config.get("KillWait", ""))
    kill_wait = int(configured[0]) if configured else KILL_WAIT
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
