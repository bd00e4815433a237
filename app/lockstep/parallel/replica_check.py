"""The replica check: ranks compare digests of what they should hold alike, and name the first difference."""

from collections import Counter
from collections.abc import Mapping

from lockstep.comm.cluster import Cluster
from lockstep.data.sharding import content_hash
from lockstep.runtime.errors import ReplicasDifferError


def compare_replicas(cluster: Cluster, state: Mapping[str, object], when: str) -> None:
    """Collective: check that what several ranks hold under one name is the same, bit for bit.

    Args:
        state: this rank's tensors and numbers by name.
        when: for the message, such as "after update 100".

    Raises:
        ReplicasDifferError: on every rank, with the first name that differs and the ranks that are in the minority.
    """
    of_ranks = cluster.all_gather_object({name: content_hash(value) for name, value in state.items()})
    for name in dict.fromkeys(name for digests in of_ranks for name in digests):
        held = {rank: digests[name] for rank, digests in enumerate(of_ranks) if name in digests}
        # On a tie, as between two ranks, the lowest rank counts as the majority.
        majority, count = Counter(held.values()).most_common(1)[0]
        minority = [rank for rank, digest in held.items() if digest != majority]
        if minority:
            ranks = ", ".join(map(str, minority))
            tie = f" (no majority: rank {min(held)} is taken for right)" if 2 * count <= len(held) else ""
            message = f"the replicas differ {when}: {name} of rank {ranks} is not the others'{tie}"
            raise ReplicasDifferError(message).as_shared()
