"""The doctor's probes: their deadlines, and how they parse the output of other programs."""

import os
import signal
import time
from itertools import combinations
from multiprocessing.connection import Connection
from pathlib import Path
from threading import Barrier, Thread

import psutil
import pytest

from lockstep.doctor.facts import Gpu, Unknown, View
from lockstep.doctor.findings import duration, nccl_version, numbers_in, size, some_of
from lockstep.doctor.folder import compare_views, probe_folder
from lockstep.doctor.forked_probe import ForkedProbe
from lockstep.doctor.local_facts import (
    find_mpi,
    memory_left_in_cgroup,
    parse_config,
    parse_gpus,
    parse_mpi_types,
    parse_oneliner,
)
from lockstep.doctor.node_checks import visible_gpus
from lockstep.doctor.rank_probe import round_robin
from lockstep.runtime.installation import read_installation
from tests.unit.doctor.facts import healthy, with_local

GPUS = [Gpu(f"GPU-{letter}", "NVIDIA H100 80GB HBM3", 4 << 20, 81559 << 20) for letter in "abc"]


def test_a_probe_that_hangs_is_given_up_and_killed() -> None:
    before = psutil.Process().children()
    started = time.monotonic()
    probe = ForkedProbe(lambda _: time.sleep(60))
    with pytest.raises(TimeoutError):
        probe.receive(0.2)
    probe.end()
    assert time.monotonic() - started < 5
    _, alive = psutil.wait_procs(set(psutil.Process().children()) - set(before), timeout=5)
    assert alive == []


def test_a_probe_that_dies_leaves_its_last_output() -> None:
    def task(connection: Connection) -> None:
        connection.send(connection.recv() + 1)
        os.write(1, b"not to be seen")
        os.write(2, b"out of luck\n")
        os.kill(os.getpid(), signal.SIGKILL)

    probe = ForkedProbe(task)
    probe.send(41)
    assert probe.receive(10) == 42
    with pytest.raises(EOFError):
        probe.receive(10)
    assert probe.last_output() == "out of luck\n"
    probe.end()


def test_an_error_in_a_probe_is_in_its_last_output() -> None:
    probe = ForkedProbe(lambda _: 1 / 0)
    with pytest.raises(EOFError):
        probe.receive(10)
    assert "ZeroDivisionError" in probe.last_output()
    probe.end()


def test_a_good_folder_is_probed_and_left_as_it_was(tmp_path: Path) -> None:
    folder = probe_folder(tmp_path / "not" / "yet")
    assert (folder.path, folder.wrong) == (str(tmp_path), "")
    assert folder.has_locks
    assert folder.free > 0
    assert abs(folder.clock_ahead) < 1
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_exist_is_reported() -> None:
    assert probe_folder(Path("/dev/null/runs")).wrong == "cannot make a folder: Not a directory"


@pytest.mark.parametrize("is_shared", [True, False])
def test_nodes_see_the_same_in_a_folder_that_they_share_alone(is_shared: bool, tmp_path: Path) -> None:
    barrier = Barrier(3)
    views: list[View] = []

    def look(node: int) -> None:
        trial = tmp_path / ("shared" if is_shared else f"of-{node}") / "trial"
        views.extend(compare_views(trial, node, ["n1", "n2", "n3"], barrier.wait))

    threads = [Thread(target=look, args=(node,)) for node in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    pairs = {(view.node, view.writer) for view in views}
    assert pairs == {("n1", "n2"), ("n1", "n3"), ("n2", "n1"), ("n3", "n1")}
    for view in views:
        for seconds in (view.new_after, view.replaced_after):
            assert (seconds is not None and seconds < 1) if is_shared else seconds is None
    assert not list(tmp_path.rglob("trial"))


@pytest.mark.parametrize("num_nodes", range(1, 10))
def test_in_rounds_each_pair_of_nodes_measures_once_and_no_node_twice(num_nodes: int) -> None:
    rounds = round_robin(num_nodes)
    assert sorted(pair for pairs in rounds for pair in pairs) == list(combinations(range(num_nodes), 2))
    for pairs in rounds:
        members = [node for pair in pairs for node in pair]
        assert len(members) == len(set(members))


def test_mpi_is_found_where_the_environment_has_it() -> None:
    found = find_mpi()
    assert not isinstance(found, Unknown)
    assert Path(found).is_file()
    assert Path(found).name.startswith("libmpi")
    installation = read_installation()
    if installation.mpi_bin == installation.venv / "bin":
        assert Path(found).resolve().is_relative_to(installation.venv.resolve())


def test_nvidia_smi_is_read() -> None:
    line = "GPU-{}, NVIDIA H100 80GB HBM3, 4, 81559\n"
    assert parse_gpus("".join(line.format(letter) for letter in "abc")) == GPUS
    assert parse_gpus("No devices were found\n") == []


@pytest.mark.parametrize(
    ("value", "expected"),
    [(None, "abc"), ("", ""), ("1", "b"), ("2,0", "ca"), ("GPU-b", "b"), ("0,7,1", "a"), ("-1", "")],
)
def test_a_rank_sees_the_gpus_that_cuda_shows_it(value: str | None, expected: str) -> None:
    environment = {} if value is None else {"CUDA_VISIBLE_DEVICES": value}
    seen = visible_gpus(GPUS, with_local(healthy(), environment=environment).local)
    assert [gpu.uuid for gpu in seen] == [f"GPU-{letter}" for letter in expected]


def test_scontrol_is_read() -> None:
    job = parse_oneliner(
        "JobId=5 JobName=j.sh UserId=root(0) Requeue=1 BatchFlag=1 ExitCode=0:0 TimeLimit=00:10:00 "
        "EndTime=2026-11-25T02:56:08 Partition=main CPUs/Task=1 ReqB:S:C:T=0:0:*:* TRES=cpu=2,node=1,billing=2 "
        "Command=/home/me/a job.sh WorkDir=/home/me Power= "
    )
    assert (job["Requeue"], job["Partition"], job["EndTime"]) == ("1", "main", "2026-11-25T02:56:08")
    assert (job["TRES"], job["Command"], job["Power"]) == ("cpu=2,node=1,billing=2", "/home/me/a job.sh", "")
    config = parse_config("KillOnBadExit           = 0\nKillWait                = 5 sec\nSlurmctldHost[0] = vm(1)\n")
    assert (config["KillOnBadExit"], config["KillWait"]) == ("0", "5 sec")


def test_what_srun_offers_is_read() -> None:
    slurm_22 = "MPI plugin types are...\n\tpmix\n\tnone\n\tcray_shasta\n\tpmi2\n"
    assert parse_mpi_types(f"{slurm_22}specific pmix plugin versions available: pmix_v4\n") == [
        *("pmix", "none", "cray_shasta", "pmi2"),
    ]
    assert parse_mpi_types("") == []


def test_the_limit_of_a_cgroup_counts_what_can_be_given_back(tmp_path: Path) -> None:
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("900\n")
    (tmp_path / "memory.stat").write_text("anon 300\ninactive_file 500\n")
    assert memory_left_in_cgroup(tmp_path) == 600
    (tmp_path / "memory.max").write_text("max\n")
    assert memory_left_in_cgroup(tmp_path) > 1 << 60


def test_wording() -> None:
    assert [nccl_version(code) for code in (23007, 21805, 2804)] == ["2.30.7", "2.18.5", "2.8.4"]
    assert numbers_in("Open MPI v5.0.11, package") == (5, 0, 11)
    assert numbers_in("MPI") == ()
    assert [size(64 << 20), size(3 << 29)] == ["64 MiB", "1.5 GiB"]
    assert [duration(2), duration(-0.003), duration(2.5e-5)] == ["2 s", "-3 ms", "25 µs"]
    assert [some_of("a"), some_of("ab"), some_of("abca")] == ["a", "a and b", "a and 2 more"]
