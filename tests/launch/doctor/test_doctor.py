"""The doctor passes a healthy machine, and finds what is really wrong with one, in time."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launch.doctor.running import (
    DOCTOR,
    SECONDS,
    UNKNOWN_TO_MPI,
    all_faults_of,
    as_root,
    faults_of,
    in_a_machine_with,
    launch_line_of,
    run_doctor,
    without_folder,
)
from tests.launching import launch, slowness

# -- what is well ------------------------------------------------------------------------------------------------------


def test_a_healthy_machine_passes(tmp_path: Path) -> None:
    finished = run_doctor(f"mpirun -np 2 {DOCTOR} --json report.json", tmp_path, tries=10)
    assert all_faults_of(finished) == {}
    assert finished.returncode == 0, finished.output
    assert finished.stdout.splitlines()[-1].startswith("Healthy")
    assert launch_line_of(finished) == "mpirun -np 2 python app/train.py"
    report = json.loads((tmp_path / "report.json").read_text())
    assert (report["exit_code"], report["num_ranks"]) == (0, 2)
    assert report["launcher"]["name"] == "mpirun of Open MPI"
    assert {finding["status"] for finding in report["findings"]} <= {"ok", "warning"}
    assert set(report["speeds_of_ranks"]) == {"0", "1"}
    assert report["links"][0]["rate"] > 0
    assert report["seconds"] < SECONDS
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]


@pytest.mark.thorough
def test_it_needs_no_launcher_and_speaks_json_alone_if_asked(tmp_path: Path) -> None:
    finished = launch(f"{DOCTOR} --json true", timeout_seconds=60, cwd=tmp_path)
    assert finished.returncode == 0, finished.output
    report = json.loads(finished.stdout)
    assert report["launcher"]["name"] == "none"
    assert re.fullmatch(r"mpirun -np \d+ python app/train.py", without_folder(report["launch_line"]))


@pytest.mark.thorough
def test_help_is_said_once(tmp_path: Path) -> None:
    finished = launch(f"mpirun -np 2 {DOCTOR} --help", timeout_seconds=60, cwd=tmp_path)
    assert finished.returncode == 0
    assert finished.stdout.count("usage: ") == 1


# -- what is wrong on one machine --------------------------------------------------------------------------------------


@pytest.mark.thorough
def test_ranks_that_mpi_does_not_know_are_told_by_one_of_them(tmp_path: Path) -> None:
    finished = run_doctor(f"mpirun -np 3 {UNKNOWN_TO_MPI} {DOCTOR}", tmp_path, tries=1)
    assert finished.returncode == 8
    faults = faults_of(finished)
    assert list(faults) == ["launcher"]
    assert "mixed MPIs: mpirun of Open MPI started 3 processes" in faults["launcher"]


@pytest.mark.thorough
def test_another_mpi_that_is_found_first(tmp_path: Path) -> None:
    libmpi = tmp_path / "libmpi.so.40"
    subprocess.run(["g++", "-shared", "-xc++", "-", "-Wl,-soname,libmpi.so.40", "-o", libmpi], input=b"", check=True)
    library_path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("LD_LIBRARY_PATH")])])
    finished = run_doctor(DOCTOR, tmp_path, {"LD_LIBRARY_PATH": library_path})
    assert finished.returncode == 8
    faults = faults_of(finished)
    assert {"ranks", "MPI"} <= set(faults)
    assert "MPI does not start" in faults["ranks"]
    assert f"another MPI is found first: {libmpi}" in faults["MPI"]
    assert launch_line_of(finished).startswith("env -u LD_LIBRARY_PATH ")


@pytest.mark.thorough
def test_an_environment_that_was_built_for_another_mpi(tmp_path: Path) -> None:
    venv = tmp_path / "venv"
    venv.mkdir()
    for path in Path(sys.prefix).iterdir():
        (venv / path.name).symlink_to(path)
    (venv / "lockstep.sh").unlink()
    (venv / "lockstep.sh").write_text("lockstep_mpi='Open MPI 4.1.4'\n")
    finished = run_doctor(f"{venv}/bin/{DOCTOR}", tmp_path)
    assert finished.returncode == 8
    assert "the environment was built for Open MPI 4.1.4, and Open MPI v5" in faults_of(finished)["MPI"]


@pytest.mark.thorough
@as_root
def test_an_nccl_that_is_older_than_the_one_built_with(tmp_path: Path) -> None:
    """NCCL with another number in it, in the place of torch's own."""
    (library,) = Path(sys.prefix).glob("lib/python3*/site-packages/nvidia/nccl/lib/libnccl.so.2")
    content = bytearray(library.read_bytes())
    get_version = re.search(rb"\x48\x85\xff\x74\x09\xc7\x07(....)\x31\xc0\xc3", content, re.DOTALL)
    assert get_version, "ncclGetVersion is compiled in another way"
    content[get_version.start(1) : get_version.end(1)] = (21805).to_bytes(4, "little")
    (tmp_path / "libnccl.so.2").write_bytes(content)
    finished = run_doctor(in_a_machine_with(f"mount --bind libnccl.so.2 {shlex.quote(str(library))}"), tmp_path)
    if "took too long to load" in finished.stdout and slowness() > 1.2:
        pytest.skip("other processes compute here: NCCL cannot be loaded within the doctor's time")
    assert finished.returncode == 8
    faults = faults_of(finished)
    assert list(faults) == ["NCCL"]
    assert "and 2.18.5 is loaded" in faults["NCCL"]


@pytest.mark.thorough
def test_a_package_that_hides_the_environments_own(tmp_path: Path) -> None:
    (tmp_path / "mine" / "numpy").mkdir(parents=True)
    (tmp_path / "mine" / "numpy" / "__init__.py").touch()
    finished = run_doctor(DOCTOR, tmp_path, {"PYTHONPATH": str(tmp_path / "mine")})
    assert finished.returncode == 8
    assert str(tmp_path / "mine" / "numpy" / "__init__.py") in faults_of(finished)["variables"]
    assert launch_line_of(finished).startswith("env -u PYTHONPATH ")


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two CPUs")
def test_ranks_that_are_stacked_on_one_core(tmp_path: Path) -> None:
    cpu = min(os.sched_getaffinity(0))
    finished = run_doctor(f"taskset --cpu-list {cpu} mpirun -np 2 {DOCTOR}", tmp_path)
    assert finished.returncode == 8
    faults = faults_of(finished)
    assert list(faults) == ["binding"]
    assert f"2 ranks on CPU {cpu} of" in faults["binding"]
    assert "mpirun -np 2 --bind-to none python" in launch_line_of(finished)


@pytest.mark.thorough
def test_ranks_that_share_a_gpu(tmp_path: Path) -> None:
    """Of a machine whose nvidia-smi lists two."""
    smi = tmp_path / "bin" / "nvidia-smi"
    smi.parent.mkdir()
    smi.write_text('#!/bin/sh\necho "GPU-a, NVIDIA H100, 4, 81559"; echo "GPU-b, NVIDIA H100, 4, 81559"\n')
    smi.chmod(0o755)
    variables = {"PATH": f"{smi.parent}:{os.environ['PATH']}", "CUDA_VISIBLE_DEVICES": "1"}
    finished = run_doctor(f"mpirun -np 2 {DOCTOR}", tmp_path, variables)
    assert finished.returncode == 8
    assert list(faults_of(finished)) == ["GPUs"]
    assert "ranks 0-1 share GPU GPU-b" in faults_of(finished)["GPUs"]


@pytest.mark.thorough
def test_few_open_files(tmp_path: Path) -> None:
    finished = run_doctor(f"ulimit -n 64; {DOCTOR}", tmp_path)
    assert finished.returncode == 8
    assert list(faults_of(finished)) == ["limits"]


@pytest.mark.thorough
@as_root
@pytest.mark.parametrize(
    ("planted", "check", "what"),
    [
        (
            "mount -t tmpfs -o size=1m tmpfs /dev/shm",
            "/dev/shm",
            "1 MiB of 1 MiB are free, and 1 rank must have 64 MiB",
        ),
        ("mount --bind meminfo /proc/meminfo", "memory", "293 MiB are left for 1 rank"),
        ("mount -t tmpfs -o ro tmpfs runs", "folder", "runs (tmpfs): cannot make a folder: Read-only file system"),
        ("mount -t tmpfs -o size=512k tmpfs runs", "folder", "runs (tmpfs): cannot write: No space left on device"),
    ],
    ids=["little shared memory", "little memory", "a read-only folder", "a full folder"],
)
def test_a_machine_that_lacks_something(planted: str, check: str, what: str, tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    meminfo = re.sub(r"(?m)^MemAvailable:.*$", "MemAvailable: 300000 kB", Path("/proc/meminfo").read_text())
    (tmp_path / "meminfo").write_text(meminfo)
    finished = run_doctor(in_a_machine_with(planted), tmp_path)
    assert finished.returncode == 8, finished.output
    assert list(faults_of(finished)) == [check]
    assert what in faults_of(finished)[check]


@pytest.mark.thorough
@as_root
@pytest.mark.skipif(not shutil.which("mkfs.ext4") or not Path("/dev/loop-control").exists(), reason="no loop devices")
def test_a_folder_that_hangs(tmp_path: Path) -> None:
    """A file system that was frozen: whoever writes there waits, and cannot be killed."""
    (tmp_path / "runs").mkdir()
    make = "truncate --size=8M image; mkfs.ext4 -q image; mount -o loop image runs; fsfreeze --freeze runs"
    inside = f"set -e; {make}; trap 'fsfreeze --unfreeze runs' EXIT; {DOCTOR}"
    finished = run_doctor(f"unshare --mount sh -c {shlex.quote(inside)}", tmp_path)
    assert finished.returncode == 8, finished.output
    assert list(faults_of(finished)) == ["folder"]
    assert "the folder for runs is stuck" in faults_of(finished)["folder"]


def test_a_rank_that_does_not_answer_is_named(tmp_path: Path) -> None:
    stuck = "from mpi4py import MPI; import time; time.sleep(60)"
    finished = run_doctor(f"mpirun -np 2 {DOCTOR} : -np 1 python -c {shlex.quote(stuck)}", tmp_path, tries=1)
    assert finished.returncode == 8
    assert "no answer in time from 1 rank of 3, the first is 2" in faults_of(finished)["ranks"]
    assert launch_line_of(finished) == "mpirun -np 3 python app/train.py"
