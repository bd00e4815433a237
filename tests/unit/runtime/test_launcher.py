"""Detecting the launcher by variables recorded under real launchers, and refusing mixed MPIs."""

from pathlib import Path

import pytest

from lockstep.runtime import launcher as launchers
from lockstep.runtime.errors import ExitCode, SettingsError
from lockstep.runtime.installation import read_installation
from lockstep.runtime.launcher import (
    Launcher,
    check_launcher,
    detect_launcher,
    missing_launcher_warning,
    mpi_misses_processes,
    reports_errors,
)

OPEN_MPI = "Open MPI v5.0.11"
MPIRUN = {
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "PMIX_RANK": "1",
}
HYDRA = {"PMI_RANK": "1", "PMI_SIZE": "2", "PMI_FD": "8", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
ALLOCATION = {"SLURM_JOB_ID": "4", "SLURM_NTASKS": "4", "SLURM_NPROCS": "4", "SLURM_JOB_NUM_NODES": "2"}
BATCH_SCRIPT = ALLOCATION | {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_TASK_PID": "5340"}
STEP = ALLOCATION | {
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
}
DAEMONS_STEP = STEP | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
INTERACTIVE_STEP = ALLOCATION | {"SLURM_STEP_ID": "4294967290", "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}
PMI2 = {"SLURM_MPI_TYPE": "pmi2", "PMI_FD": "13", "PMI_RANK": "3", "PMI_SIZE": "4", "PMI_JOBID": "2.0"}
GLOO = {
    "HOROVOD_CONTROLLER": "gloo",
    "HOROVOD_RANK": "1",
    "HOROVOD_SIZE": "2",
    "HOROVOD_LOCAL_RANK": "1",
    "HOROVOD_LOCAL_SIZE": "2",
}
FLUX = {"FLUX_TASK_RANK": "3", "FLUX_JOB_SIZE": "4", "FLUX_TASK_LOCAL_ID": "1", "PMI_RANK": "3", "PMI_SIZE": "4"}
TORCHRUN = {
    "RANK": "1",
    "WORLD_SIZE": "2",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "TORCHELASTIC_RUN_ID": "e21b8e5d",
}


@pytest.mark.parametrize(
    ("environment", "expected"),
    {
        "nothing": ({}, Launcher("none")),
        "mpirun": (MPIRUN, Launcher(launchers.MPIRUN, 1, 4, 1, 2)),
        "mpirun in an allocation": (DAEMONS_STEP | MPIRUN, Launcher(launchers.MPIRUN, 1, 4, 1, 2, tasks_asked=4)),
        "Hydra": (HYDRA, Launcher(launchers.HYDRA, 1, 2, 1, 2)),
        "Hydra in an allocation": (DAEMONS_STEP | HYDRA, Launcher(launchers.HYDRA, 1, 2, 1, 2, tasks_asked=4)),
        "srun": (STEP, Launcher("srun", 3, 4, 1, None, "none", 4)),
        "srun --mpi=pmi2": (STEP | PMI2, Launcher("srun", 3, 4, 1, None, "pmi2", 4)),
        "srun --mpi=pmix": (STEP | {"SLURM_MPI_TYPE": "pmix"}, Launcher("srun", 3, 4, 1, None, "pmix", 4)),
        "a batch script": (BATCH_SCRIPT, Launcher("none", tasks_asked=4)),
        "the shell of salloc": (ALLOCATION, Launcher("none", tasks_asked=4)),
        "an interactive step": (INTERACTIVE_STEP, Launcher("srun", 0, 1, None, None, "none", 4)),
        "horovodrun over Gloo": (GLOO, Launcher(launchers.GLOO, 1, 2, 1, 2)),
        "horovodrun over Gloo in a step": (STEP | GLOO, Launcher(launchers.GLOO, 1, 2, 1, 2, tasks_asked=4)),
        "torchrun": (TORCHRUN, Launcher(launchers.TORCHRUN, 1, 2, 1, 2)),
        "flux run, by its documentation": (FLUX, Launcher("flux run", 3, 4, 1, None)),
        "ranks of somebody else's": ({"RANK": "1", "WORLD_SIZE": "2"}, Launcher("none")),
        "nonsense": (MPIRUN | {"OMPI_COMM_WORLD_SIZE": "many"}, Launcher("none")),
    }.values(),
)
def test_a_launcher_is_detected_by_its_variables(environment: dict[str, str], expected: Launcher) -> None:
    assert detect_launcher(environment) == expected


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        (STEP, ["srun --mpi=none started 4", "rank 0 of 1", "srun --mpi=pmix --ntasks=4 python", "/mpi/mpirun -np 4"]),
        (STEP | PMI2, ["srun --mpi=pmi2 started 4", "srun --mpi=pmix --ntasks=4 python"]),
        (STEP | {"SLURM_MPI_TYPE": "pmix"}, ["in an allocation (salloc, sbatch): /mpi/mpirun -np 4 python"]),
        (HYDRA, ["Hydra", "mpirun of this MPI: /mpi/mpirun -np 2 python"]),
        (MPIRUN, ["belongs to another MPI", "/mpi/mpirun -np 4 python"]),
        (TORCHRUN, ["torchrun started 2", "/mpi/mpirun -np 2 python"]),
    ],
)
def test_lone_ranks_are_refused_with_cause_and_fix(environment: dict[str, str], words: list[str]) -> None:
    launcher = detect_launcher(environment)
    with pytest.raises(SettingsError, match="mixed MPIs: ") as caught:
        check_launcher(launcher, 1, OPEN_MPI, "/mpi/mpirun")
    assert caught.value.shared
    assert caught.value.exit_code == ExitCode.SETTINGS
    for part in [*words, OPEN_MPI, "Each would train alone"]:
        assert part in str(caught.value)


def test_the_fix_names_the_pmi_that_the_mpi_supports() -> None:
    with pytest.raises(SettingsError, match="srun --mpi=pmi2"):
        check_launcher(detect_launcher(STEP), 1, "MPICH Version: 4.0.2", "mpirun")


@pytest.mark.parametrize(
    ("environment", "mpi_size"),
    [
        ({}, 1),
        ({}, 4),  # started by one that is not known: MPI decides
        (MPIRUN, 4),
        (STEP, 4),
        (STEP, 8),  # a job of two parts, each of which counts its own
        (BATCH_SCRIPT, 1),
        (INTERACTIVE_STEP, 1),
        (GLOO, 1),  # MPI has no part in it
    ],
)
def test_matching_ranks_are_not_refused(environment: dict[str, str], mpi_size: int) -> None:
    launcher = detect_launcher(environment)
    check_launcher(launcher, mpi_size, OPEN_MPI, "mpirun")
    assert not mpi_misses_processes(launcher, mpi_size)


def test_one_process_alone_reports_errors() -> None:
    lost = [detect_launcher(STEP | {"SLURM_PROCID": str(rank)}) for rank in range(4)]
    assert [reports_errors(launcher, 0, 1) for launcher in lost] == [True, False, False, False]
    met_in_another_order = zip(lost, (1, 0, 3, 2), strict=True)
    assert [reports_errors(launcher, rank, 4) for launcher, rank in met_in_another_order] == [
        False,
        True,
        False,
        False,
    ]
    assert reports_errors(Launcher("none"), 0, 1)


def test_a_script_without_srun_gets_a_warning() -> None:
    assert "4 tasks" in (missing_launcher_warning(detect_launcher(BATCH_SCRIPT), 1) or "")
    assert missing_launcher_warning(detect_launcher({}), 1) is None
    assert missing_launcher_warning(detect_launcher(STEP), 4) is None
    assert missing_launcher_warning(detect_launcher(BATCH_SCRIPT | {"SLURM_NTASKS": "1"}), 1) is None


def test_an_installation_says_which_mpi_it_is_for(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "mpirun").touch()
    (tmp_path / "lockstep.sh").write_text("# by env/setup\nlockstep_mpi='Open MPI 5.0.11'\nlockstep_mpi_bin=''\n")
    brings_its_own = read_installation(tmp_path)
    assert (brings_its_own.mpi, brings_its_own.mpi_lib) == ("Open MPI 5.0.11", (tmp_path / "lib",))
    assert brings_its_own.mpirun == str(tmp_path / "bin" / "mpirun")
    (tmp_path / "lockstep.sh").write_text("lockstep_mpi_bin=/opt/mpi/bin\nlockstep_mpi_lib=/opt/mpi/lib:/opt/x\n")
    of_a_site = read_installation(tmp_path)
    assert (of_a_site.mpi_bin, of_a_site.mpi_lib) == (Path("/opt/mpi/bin"), (Path("/opt/mpi/lib"), Path("/opt/x")))
    assert of_a_site.mpirun == "mpirun"  # not to be found there
    assert read_installation(tmp_path / "none").mpi == ""
