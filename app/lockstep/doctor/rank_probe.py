"""The ranks meet, and measure together; in a process of its own, which tells what it finds. To import this is to become
a rank of the job.
"""

import secrets
import signal
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

from lockstep.comm.mpi_library import MPI, mpi_built_with, mpi_version
from lockstep.doctor.deadline_comm import MissingError, Quiet
from lockstep.doctor.facts import Folder, Joined, LocalFacts, RankFacts
from lockstep.doctor.folder import see_the_same
from lockstep.doctor.libraries import MPI_LIBRARIES, loaded_files
from lockstep.doctor.measuring import compare_clocks, measure_links, measure_speed, prepare_to_compute
from lockstep.runtime.affinity import Core, Cpus, pin, share_cores

ROLL_CALL_TAG, ALL_TAG, HEADS_TAG = 2, 3, 4


@dataclass(frozen=True)
class Plan:
    """What rank 0 makes of the roll call.

    Attributes:
        nodes: the ranks of each node, by its name; the first of them is its head.
        shares: the CPUs of each rank, as Lockstep deals them out.
        trial: a folder to make where all nodes should see it; None if it would not work.
    """

    nodes: dict[str, list[int]]
    shares: dict[int, Cpus]
    trial: Path | None


def meet(line: Connection, roll_call_until: float, until: float) -> None:
    """Meet the others. What is found goes through `line` as parts of `Facts`, rank 0's for all ranks;
    between them stands what is being done, as `doing`.

    Args:
        line: to a process that sends this one's `LocalFacts` as soon as it has them.
        roll_call_until: when the ranks that are there begin without the others, as `time.monotonic` counts.
        until: when all must be done.
    """
    rank, size = MPI.COMM_WORLD.rank, MPI.COMM_WORLD.size
    joined = Joined(rank, size, mpi_version(), mpi_built_with(), loaded_files(*MPI_LIBRARIES))
    line.send({"joined": joined})
    prepare_to_compute()
    local: LocalFacts = line.recv()
    line.send({"doing": "waiting for all ranks to say that they are there"})
    roll_call = Quiet(range(size), ROLL_CALL_TAG, roll_call_until)
    everyone = Quiet(range(size), ALL_TAG, until)
    try:
        facts = _call_roll(line, roll_call, RankFacts(local, joined))
        plan: Plan = everyone.tell(make_plan(facts) if facts else None)
        names, heads = list(plan.nodes), [ranks[0] for ranks in plan.nodes.values()]

        line.send({"doing": "computing, all at once"})
        pin(plan.shares[rank])
        everyone.meet()
        speeds = everyone.gather(measure_speed())
        line.send({"speeds": {rank: speed for rank, speed in speeds.items() if speed}})

        line.send({"doing": "comparing clocks"})
        if rank in heads:
            line.send({"clocks": compare_clocks(heads, names, until)})

        line.send({"doing": "measuring links"})
        pair = heads if len(heads) > 1 else heads + plan.nodes[names[0]][1:2]
        links = everyone.gather(
            measure_links(pair, names if len(heads) > 1 else names * len(pair), until) if rank in pair else ([], True)
        )
        line.send({"links": [link for found, _ in links.values() for link in found]})

        line.send({"doing": "looking whether all nodes see the same in the shared folder"})
        mine_seen = []
        if plan.trial and len(heads) > 1 and rank in heads:
            among_heads = Quiet(heads, HEADS_TAG, until)
            mine_seen = see_the_same(plan.trial, heads.index(rank), names, among_heads.meet)
            among_heads.finish()
        views = everyone.gather(mine_seen)
        line.send({"views": [view for found in views.values() for view in found]})
        can_be_left = everyone.tell(all(has_ended for _, has_ended in links.values()))
        for quiet in (roll_call, everyone):
            quiet.finish()
        line.send({"doing": "", "can_be_left": can_be_left})
    except MissingError as error:
        line.send({"missing": error.ranks if rank == 0 else (), "can_be_left": False})
        can_be_left = False
    if can_be_left:
        MPI.Finalize()
    else:
        signal.pause()  # to leave now would have MPI, or the launcher, end those who still have something to say


def _call_roll(line: Connection, roll_call: Quiet, mine: RankFacts) -> dict[int, RankFacts]:
    """Collective: everybody's facts, on rank 0; its supervisor has those of the ranks that came, in any case."""
    try:
        facts: dict[int, RankFacts] = roll_call.gather(mine)
    except MissingError as error:
        line.send({"ranks": error.found})
        raise
    line.send({"ranks": facts})
    return facts


def make_plan(facts: dict[int, RankFacts]) -> Plan:
    nodes: dict[str, list[int]] = {}
    for rank, rank_facts in sorted(facts.items()):
        nodes.setdefault(rank_facts.local.node, []).append(rank)
    shares: dict[int, Cpus] = {}
    for ranks in nodes.values():
        cores: dict[int, Core] = {}
        for rank in ranks:
            cores.update(facts[rank].local.cores)
        shares.update(zip(ranks, share_cores([facts[rank].local.cpus for rank in ranks], cores), strict=True))
    folders = [facts[ranks[0]].local.of_node for ranks in nodes.values()]
    tried = [found.folder for found in folders if found]
    works = len(tried) == len(nodes) and all(isinstance(folder, Folder) and not folder.wrong for folder in tried)
    first = tried[0] if tried else None
    trial = (
        Path(first.path) / f".lockstep-doctor-{secrets.token_hex(4)}" if works and isinstance(first, Folder) else None
    )
    return Plan(nodes, shares, trial)
