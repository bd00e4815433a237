"""What a run prints about the CPUs and GPUs of its ranks."""

from typing import Any

from lockstep.comm.inventory import describe_binding


def _inventory(*places: tuple[str, list[int]], gpus: bool = False) -> dict[str, Any]:
    ranks = [
        {
            "rank": rank,
            "node": node,
            "cpus": cpus,
            "num_cpus_of_node": 4,
            "gpu": "H200" if gpus else None,
            "device": "cuda:0",
        }
        for rank, (node, cpus) in enumerate(places)
    ]
    return {"ranks": ranks}


def test_nodes_that_are_alike_are_printed_once() -> None:
    inventory = _inventory(("n1", [0, 1]), ("n1", [2, 3]), ("n2", [0, 1]), ("n2", [2, 3]), ("n3", [0]))
    assert describe_binding(inventory) == [
        "CPUs by local rank: 0-1 | 2-3 of 4 (n1 and 1 more nodes)",
        "CPUs by local rank: 0 of 4 (n3)",
    ]


def test_gpus_are_named() -> None:
    assert describe_binding(_inventory(("n1", [0]), gpus=True)) == ["CPUs by local rank: 0 and cuda:0 of 4 (n1)"]


def test_ranks_that_the_launcher_binds_to_the_same_cpus_get_a_warning_with_the_fix() -> None:
    warning = describe_binding(_inventory(("n1", [0, 1]), ("n1", [3]), ("n1", [1, 2])))[1]
    assert warning.startswith("warning: ranks 0 and 2 share CPU 1 of n1")
    assert "--bind-to none" in warning


def test_more_ranks_than_cpus_get_a_warning() -> None:
    warning = describe_binding(_inventory(*[("n1", [0, 1])] * 3))[1]
    assert warning == (
        "warning: ranks 0 and 1 share CPU 0-1 of n1: there are more ranks than CPUs, and each waits for all"
    )
