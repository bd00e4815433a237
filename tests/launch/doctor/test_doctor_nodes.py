"""The doctor on two nodes: simulated ones with a link of known speed, and those of a real Slurm."""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from lockstep.runtime.installation import read_installation
from tests.launch.doctor.running import DOCTOR, all_faults_of, as_root, faults_of, launch_line_of, run_doctor
from tests.launching import ROOT, Finished, across_nodes, slowness
from tests.slurm_cluster import SlurmCluster


def _on_two_nodes(command: str, cwd: Path, rate: str = "1gbit", tries: int = 3) -> Finished:
    return run_doctor(f"lockstep benchmark two_nodes --rate {rate} -- {command}", cwd, tries=tries)


@contextmanager
def _computing_on(cpus: list[int], num_processes: int) -> Iterator[None]:
    """So many processes on each of `cpus`, each in a session of its own: Linux divides a CPU by sessions first."""
    commands = [["taskset", "--cpu-list", str(cpu), sys.executable, "-c", "while True: pass"] for cpu in cpus]
    processes = [subprocess.Popen(command, start_new_session=True) for command in commands * num_processes]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


@pytest.mark.thorough
@across_nodes
@as_root
def test_two_healthy_nodes_pass(tmp_path: Path) -> None:
    finished = _on_two_nodes(DOCTOR, tmp_path)
    assert faults_of(finished) == {}, finished.output
    assert finished.returncode == (8 if all_faults_of(finished) else 0), finished.output
    assert "2 ranks on 2 nodes" in finished.stdout
    (rate,) = re.findall(r"between nodes: (\S+) Gbit/s", finished.stdout)
    assert 0.7 < float(rate) < 1.3
    assert launch_line_of(finished) == "mpirun -np 2 --host node0:1,node1:1 python app/train.py"


@pytest.mark.thorough
@across_nodes
@as_root
def test_nodes_with_a_slow_link_different_folders_and_different_clocks(tmp_path: Path) -> None:
    """/dev/shm is each node's own; Python's clock on node1 is half a minute ahead."""
    (tmp_path / "sitecustomize.py").write_text(
        "import time\n"
        "real, real_ns = time.time, time.time_ns\n"
        "time.time, time.time_ns = lambda: real() + 30, lambda: real_ns() + 30 * 10**9\n"
    )
    start = f'[ "$(hostname)" = node0 ] || export PYTHONPATH={tmp_path}; exec {DOCTOR} --folder /dev/shm/runs'
    finished = _on_two_nodes(f"sh -c {shlex.quote(start)}", tmp_path, rate="20mbit")
    assert finished.returncode == 8, finished.output
    faults = faults_of(finished)
    assert list(faults) == ["same view", "clocks", "links"]
    assert re.fullmatch(r"node[01] does not see what node[01] writes to the folder for runs", faults["same view"])
    assert "node1 is 30 s ahead of node0" in faults["clocks"]
    assert "between node0 and node1: 0.0" in faults["links"]


@pytest.mark.thorough
@across_nodes
@as_root
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two CPUs")
def test_a_slow_node_is_named(tmp_path: Path) -> None:
    """Something else computes on all of its cores; look again if on node0, too, something did in that moment."""
    cpus = sorted(os.sched_getaffinity(0))
    with _computing_on(cpus[len(cpus) // 2 :], num_processes=6):
        for _ in range(3):
            finished = _on_two_nodes(DOCTOR, tmp_path, tries=1)
            if "speed" in all_faults_of(finished):
                break
    assert finished.returncode == 8, finished.output
    assert "node1 is slow: its ranks get" in all_faults_of(finished)["speed"]


# -- in a real Slurm ---------------------------------------------------------------------------------------------------


def _in_slurm(slurm: SlurmCluster, options: str, cwd: Path) -> Finished:
    command = f"source {shlex.quote(str(ROOT / 'env' / 'activate'))} && srun --nodes=2 --ntasks=2 {options} {DOCTOR}"
    finished = slurm.run(command, cwd)
    assert finished.stdout.count("Launch line: ") == 1, finished.output
    return finished


@pytest.mark.thorough
def test_a_healthy_job_of_slurm_passes(slurm: SlurmCluster, tmp_path: Path) -> None:
    finished = _in_slurm(slurm, f"--mpi={_pmi()} --kill-on-bad-exit=1", tmp_path)
    assert faults_of(finished).keys() <= ({"links"} if slowness() > 1.2 else set()), finished.output
    assert finished.returncode == (8 if all_faults_of(finished) else 0), finished.output
    assert "2 ranks on 2 nodes" in finished.stdout
    assert launch_line_of(finished).startswith(f"srun --mpi={_pmi()} --nodes=2 --ntasks=2 ")


@pytest.mark.thorough
def test_srun_that_does_not_tell_mpi_is_refused_with_the_right_line(slurm: SlurmCluster, tmp_path: Path) -> None:
    finished = _in_slurm(slurm, "--mpi=none", tmp_path)
    assert finished.returncode == 8
    assert "mixed MPIs: srun --mpi=none started 2 processes" in faults_of(finished)["launcher"]
    assert launch_line_of(finished).startswith(f"srun --mpi={_pmi()} --nodes=2 --ntasks=2 ")
    train = f"srun --ntasks=2 --mpi=none python {shlex.quote(str(ROOT / 'app' / 'train.py'))}"
    refused = slurm.run(f"source {shlex.quote(str(ROOT / 'env' / 'activate'))} && {train} --run_dir run", tmp_path)
    assert refused.returncode == 2, refused.output
    assert refused.stderr.count("lockstep: mixed MPIs: ") == 1
    assert f"srun --mpi={_pmi()} --ntasks=2 python " in refused.stderr
    assert not (tmp_path / "run").exists()


def _pmi() -> str:
    return "pmix" if read_installation().mpi.startswith("Open MPI") else "pmi2"
