"""Replicas never drift unseen: ranks compare what they hold, and name the first difference."""

from collections import Counter
from collections.abc import Mapping

from app.cluster.comm import Cluster
from app.cluster.failure import ReplicasDifferError
from app.data.sharding import content_hash


def compare_replicas(cluster: Cluster, state: Mapping[str, object], when: str) -> None:
    """Collective: make sure that every rank holds the same `state`, bit for bit.

    Args:
        state: tensors and numbers by name; the same names in the same order on every rank.
        when: for the message, such as "after update 100".

    Raises:
        ReplicasDifferError: on every rank, with the first name that differs and the ranks that are in the minority.
    """
    digests = cluster.all_gather_object([content_hash(value) for value in state.values()])
    for name, of_ranks in zip(state, zip(*digests, strict=True), strict=True):
        # On a tie, as between two ranks, the lowest rank's stands for the majority.
        majority, count = Counter(of_ranks).most_common(1)[0]
        minority = [rank for rank, digest in enumerate(of_ranks) if digest != majority]
        if minority:
            ranks = ", ".join(map(str, minority))
            tie = " (no majority: rank 0 is taken for right)" if 2 * count <= cluster.size else ""
            message = f"the replicas differ {when}: {name} of rank {ranks} is not the others'{tie}"
            raise ReplicasDifferError(message).on_all_ranks()
