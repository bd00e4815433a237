"""How workers find each other, through Horovod's real rendezvous server."""

import os
import threading
import time
from collections.abc import Iterator

import pytest
from horovod.runner.common.util import secret
from horovod.runner.http.http_server import RendezvousHandler, RendezvousHTTPServer

from lockstep.comm import rendezvous
from lockstep.comm.rendezvous import cancel_run, is_elastic, join_seconds, rank_from_environment, wait_for_workers

SIZE = 3


class _Driver(RendezvousHandler):  # type: ignore[misc]
    """Assigns ranks as the elastic driver does: each time the next of `answers`."""

    answers: tuple[str, ...] = ()
    num_asked = 0

    def _get_value(self, scope: str, key: str) -> bytes | None:
        if scope != "rank_and_size":
            value: bytes | None = super()._get_value(scope, key)
            return value
        assert key == "node7:1"
        answer = _Driver.answers[_Driver.num_asked]
        _Driver.num_asked += 1
        with self.server.cache_lock:
            self.server.cache.clear()  # as with each new assignment
        return answer.encode()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[RendezvousHTTPServer]:
    """This process is rank 1 of three."""
    _Driver.answers, _Driver.num_asked = (), 0
    server = RendezvousHTTPServer(("127.0.0.1", 0), _Driver, 0)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    variables = {
        "HOROVOD_GLOO_RENDEZVOUS_ADDR": "127.0.0.1",
        "HOROVOD_GLOO_RENDEZVOUS_PORT": str(server.server_port),
        "HOROVOD_JOB_SECRET": "0123456789abcdef",
        "HOROVOD_HOSTNAME": "node7",
        "HOROVOD_ELASTIC": "1",
        "HOROVOD_RANK": "1",
        "HOROVOD_SIZE": str(SIZE),
        "HOROVOD_LOCAL_RANK": "1",
        "HOROVOD_LOCAL_SIZE": "2",
        "HOROVOD_CROSS_RANK": "0",
        "HOROVOD_CROSS_SIZE": "2",
        "HOROVOD_GLOO_TIMEOUT_SECONDS": "1",
        "http_proxy": "http://127.0.0.1:9",
    }
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(rendezvous, "READY_SECONDS", 1.0)
    yield server
    server.shutdown()
    server.server_close()


def _others_report(server: RendezvousHTTPServer, *states: str) -> None:
    reported = {f"{state}{rank}": b"yes" for state in states for rank in range(SIZE) if rank != 1}
    server.cache.setdefault("lockstep", {}).update(reported)


def test_it_goes_on_when_all_workers_are_here_and_ready(server: RendezvousHTTPServer) -> None:
    _others_report(server, "here", "ready")
    wait_for_workers()
    assert {"here1", "ready1"} <= set(server.cache["lockstep"])
    assert _Driver.num_asked == 0


@pytest.mark.parametrize("states", [(), ("here",)], ids=["one does not come", "one dies while it waits"])
def test_all_start_over_without_a_worker_that_does_not_come(
    states: tuple[str, ...], server: RendezvousHTTPServer, capsys: pytest.CaptureFixture[str]
) -> None:
    _others_report(server, *states)
    _Driver.answers = ("0,1,1,1,0,1",)
    wait_for_workers()
    assert "rank 0 did not come" in capsys.readouterr().err
    assert (os.environ["HOROVOD_RANK"], os.environ["HOROVOD_SIZE"]) == ("0", "1")


def test_it_does_not_wait_when_another_worker_starts_over(
    server: RendezvousHTTPServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOROVOD_GLOO_TIMEOUT_SECONDS", "60")
    server.cache["lockstep"] = {"again": b"yes"}
    _Driver.answers = ("0,1,1,1,0,1",)
    started = time.monotonic()
    wait_for_workers()
    assert time.monotonic() - started < 30
    assert _Driver.num_asked == 1


@pytest.mark.usefixtures("server")
def test_a_worker_that_gets_no_rank_exits(capsys: pytest.CaptureFixture[str]) -> None:
    _Driver.answers = ("-1,-1,-1,-1,-1,-1",)
    with pytest.raises(SystemExit) as left:
        wait_for_workers(needs_rank=True)
    assert left.value.code == 75
    assert "goes on without this worker: node7[1]" in capsys.readouterr().err


def test_every_worker_of_a_cancelled_run_exits(server: RendezvousHTTPServer) -> None:
    _others_report(server, "here")
    cancel_run(5)
    with pytest.raises(SystemExit) as left:
        wait_for_workers()
    assert left.value.code == 5
    assert _Driver.num_asked == 0


@pytest.mark.usefixtures("server")
def test_an_answer_without_a_rank_is_an_error() -> None:
    _Driver.answers = ("nonsense",)
    with pytest.raises(ConnectionError, match="nonsense"):
        wait_for_workers(needs_rank=True)


@pytest.mark.usefixtures("server")
def test_requests_without_the_secret_of_the_job_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The server reads its secret at each request: here it changes while a request is on its way."""
    compare = secret.is_job_secret
    monkeypatch.setattr(secret, "is_job_secret", lambda given: compare(f"{given}x"))
    with pytest.raises(ConnectionError, match="does not take this process for one of its job"):
        wait_for_workers(needs_rank=True)
    assert _Driver.num_asked == 0


@pytest.mark.usefixtures("server")
def test_horovod_reads_the_rank_from_the_environment() -> None:
    assert is_elastic()
    with rank_from_environment():
        assert not is_elastic()
    assert is_elastic()


def test_the_time_to_wait_is_horovods_own_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HOROVOD_GLOO_TIMEOUT_SECONDS", raising=False)
    assert join_seconds() == 60
    monkeypatch.setenv("HOROVOD_GLOO_TIMEOUT_SECONDS", "200")
    assert join_seconds() == 200
