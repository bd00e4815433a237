"""The same calls over both backends. The one of Gloo jobs calls Horovod's collectives, which here run over MPI."""

import threading
from dataclasses import replace

import pytest
import torch

from lockstep.comm import backend as backends
from lockstep.comm.backend import Backend, GlooBackend
from lockstep.comm.cluster import Cluster
from lockstep.runtime.errors import SettingsError


@pytest.fixture(params=["mpi", "gloo"])
def backend(request: pytest.FixtureRequest, cluster: Cluster) -> Backend:
    return cluster.backend if request.param == "mpi" else GlooBackend(lambda: None)  # Horovod runs already


@pytest.mark.world_size(3)
def test_objects_reach_every_rank(backend: Backend) -> None:
    assert backend.size == 3
    assert backend.broadcast_object(f"from {backend.rank}") == "from 0"
    assert backend.all_gather_object({"rank": backend.rank}) == [{"rank": 0}, {"rank": 1}, {"rank": 2}]
    backend.barrier()


@pytest.mark.world_size(3)
@pytest.mark.parametrize("max_per_call", [7, 2**30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64, torch.bfloat16, torch.bool])
def test_parts_are_gathered_on_rank_0(
    backend: Backend, dtype: torch.dtype, max_per_call: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 0, 4 and 8 elements: in pieces of 7 bytes, the last piece in float64 has one byte."""
    monkeypatch.setattr(backends, "MAX_PER_CALL", max_per_call)
    parts = backend.gather_parts((torch.arange(4 * backend.rank) + backend.rank).to(dtype))
    expected = [(torch.arange(4 * rank) + rank).to(dtype) for rank in range(3)]
    assert len(parts) == (3 if backend.rank == 0 else 0)
    assert all(torch.equal(part, other) for part, other in zip(parts, expected, strict=False))
    assert all(part.dtype == dtype for part in parts)


@pytest.mark.world_size(3)
def test_the_maximum_of_votes_that_are_pending_together(backend: Backend) -> None:
    votes = [backend.begin_max(10 * vote + (backend.rank + vote) % 3) for vote in range(3)]
    assert [vote() for vote in votes] == [2, 12, 22]


@pytest.mark.world_size(3)
def test_background_threads_gather_while_the_main_threads_do(backend: Backend) -> None:
    gathered: list[list[int]] = []
    thread = threading.Thread(target=lambda: gathered.append(backend.gather_from_thread(backend.rank)))
    thread.start()
    assert [backend.all_gather_object(round_) for round_ in range(20)] == [[round_] * 3 for round_ in range(20)]
    thread.join()
    assert gathered == [[0, 1, 2] if backend.rank == 0 else []]


@pytest.mark.world_size(2)
def test_only_mpi_has_messages_between_two_ranks(cluster: Cluster) -> None:
    cluster.require_mpi("sending")
    over_gloo = replace(cluster, backend=GlooBackend(lambda: None))
    with pytest.raises(SettingsError, match="sending, which needs MPI: start this with mpirun") as caught:
        over_gloo.require_mpi("sending")
    assert caught.value.shared
