"""env/run, env/setup and env/activate, in a clone whose environment is a stand-in: nothing is built here."""

import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from env.environment import Environment

ROOT = Path(__file__).resolve().parents[3]
SHELLS = [path for shell in ("bash", "zsh") if (path := shutil.which(shell))]
BATCH = ("SLURM_JOB_ID", "PBS_JOBID", "LSB_JOBID", "PE_HOSTFILE", "FLUX_JOB_ID", "COBALT_JOBID")
SYSTEM_PATH = "/usr/local/bin:/usr/bin:/bin"


@pytest.fixture
def clone(tmp_path: Path) -> Environment:
    """A clone in a folder with a space, with an environment that looks complete; its setup only says that it ran."""
    root = tmp_path / "a clone"
    (root / "env").mkdir(parents=True)
    for name in ("run", "activate", "requirements.lock"):
        shutil.copy(ROOT / "env" / name, root / "env" / name)
    for file in (ROOT / "env").glob("*.py"):
        shutil.copy(file, root / "env" / file.name)
    (root / "env" / "setup").write_text("#!/bin/sh\necho SETUP RAN\n")
    (root / "env" / "setup").chmod(0o755)
    environment = Environment(root, root / ".venv")
    (environment.site_packages / "torch").mkdir(parents=True)
    environment.python.parent.mkdir()
    environment.python.symlink_to("/bin/true")
    environment.write_settings(
        {"lockstep_mpi": "Open MPI 5.0.11", "lockstep_mpi_bin": "", "lockstep_mpi_lib": ""}, True
    )
    return environment


def run(*command: str | Path, cwd: Path | None = None, **variables: str) -> subprocess.CompletedProcess[str]:
    clean = {"PATH": SYSTEM_PATH, "HOME": "/nonexistent"} | variables
    return subprocess.run(
        [str(part) for part in command], cwd=cwd, env=clean, capture_output=True, text=True, timeout=30
    )


def env_run(clone: Environment, *command: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return run(clone.root / "env" / "run", *command, cwd=None, **variables)


def test_no_command_is_wrong_usage(clone: Environment) -> None:
    done = env_run(clone)
    assert done.returncode == 2
    assert "usage: env/run COMMAND" in done.stderr
    assert done.stdout == ""
    assert env_run(clone, "--help").returncode == 0


@pytest.mark.parametrize("code", [0, 1, 7, 143])
def test_exit_code_and_output_are_the_commands_own(clone: Environment, code: int) -> None:
    done = env_run(clone, "sh", "-c", f"echo out; echo err >&2; exit {code}")
    assert (done.returncode, done.stdout, done.stderr) == (code, "out\n", "err\n")


def test_the_environment_of_another_clone_is_not_taken_over(clone: Environment, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(clone.root / "env", other / "env")
    venv = str(clone.venv)
    done = run(other / "env" / "run", "true", LOCKSTEP_VENV=venv)
    assert done.returncode == 2
    assert f"{clone.venv} is the environment of another clone, {clone.root}" in done.stderr
    assert env_run(clone, "true", LOCKSTEP_VENV=venv).returncode == 0
    (clone.root / "env" / "run").unlink()  # that clone is gone
    assert "SETUP RAN" in run(other / "env" / "run", "true", LOCKSTEP_VENV=venv).stderr


def test_a_ready_environment_is_not_set_up_again_from_anywhere(clone: Environment, tmp_path: Path) -> None:
    done = run(os.path.relpath(clone.root / "env" / "run", tmp_path), "pwd", cwd=tmp_path)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, str(tmp_path), "")
    nested = env_run(clone, str(clone.root / "env" / "run"), "printenv", "VIRTUAL_ENV")
    assert (nested.returncode, nested.stdout.strip(), nested.stderr) == (0, str(clone.venv), "")


def test_the_prefix_is_told_as_it_was_typed_and_taken_back_by_activate(clone: Environment, tmp_path: Path) -> None:
    for cwd in (clone.root, tmp_path):
        typed = os.path.relpath(clone.root / "env" / "run", cwd)
        assert run(typed, "printenv", "LOCKSTEP_PREFIX", cwd=cwd).stdout == f"{typed}\n"
    activated = run(clone.root / "env" / "run", "bash", "-c", "source env/activate; env", cwd=clone.root)
    assert "VIRTUAL_ENV" in activated.stdout
    assert "LOCKSTEP_PREFIX" not in activated.stdout


@pytest.mark.parametrize("damage", ["no python", "no package", "incomplete", "new recipe", "new lock"])
def test_what_is_missing_or_out_of_date_calls_setup(clone: Environment, damage: str) -> None:
    if damage == "no python":
        clone.python.unlink()
    elif damage == "no package":
        shutil.rmtree(clone.site_packages / "torch")
    elif damage == "incomplete":
        clone.write_settings(clone.settings(), complete=False)
    else:
        with (clone.root / "env" / ("build.py" if damage == "new recipe" else "requirements.lock")).open("a") as file:
            file.write("# changed\n")
    done = env_run(clone, "echo", "mine")
    assert "SETUP RAN" in done.stderr, "its output must not mix with the command's"
    assert done.stdout == "mine\n"


def test_a_failed_setup_ends_env_run(clone: Environment) -> None:
    clone.python.unlink()
    (clone.root / "env" / "setup").write_text("#!/bin/sh\nexit 1\n")
    done = env_run(clone, "echo", "mine")
    assert (done.returncode, done.stdout) == (1, "")


def test_another_mpi_on_path_is_one_line_of_warning(clone: Environment, tmp_path: Path) -> None:
    for folder in (clone.venv / "bin", tmp_path / "site"):
        folder.mkdir(exist_ok=True)
        (folder / "mpicxx").write_text("#!/bin/sh\n")
        (folder / "mpicxx").chmod(0o755)
    ours = env_run(clone, "true", PATH=f"{clone.venv}/bin:{SYSTEM_PATH}")
    assert ours.stderr == "", "the environment's own mpicxx is not a site's"
    theirs = env_run(clone, "true", PATH=f"{tmp_path}/site:{SYSTEM_PATH}")
    assert theirs.returncode == 0
    assert theirs.stderr.count("\n") == 1
    for part in (f"{tmp_path}/site/mpicxx", "Open MPI 5.0.11", "env/setup"):
        assert part in theirs.stderr
    clone.write_settings(clone.settings() | {"lockstep_mpi_bin": f"{tmp_path}/site"}, complete=True)
    assert env_run(clone, "true", PATH=f"{tmp_path}/site:{SYSTEM_PATH}").stderr == ""


def source(clone: Environment, shell: str, script: str, **variables: str) -> dict[str, str]:
    """Source activate, run a script, and give back the shell's environment variables."""
    activate = shlex.quote(str(clone.root / "env" / "activate"))
    script = f"set -eu\nsource {activate}\n{script.format(activate=activate)}\nenv"
    done = run(shell, "-c", script, cwd=None, **variables)
    assert done.returncode == 0, done.stderr
    return dict(line.split("=", 1) for line in done.stdout.splitlines() if "=" in line)


@pytest.mark.parametrize("shell", SHELLS)
def test_activate_under_set_eu(clone: Environment, shell: str) -> None:
    after = source(clone, shell, "")
    assert after["PATH"] == f"{clone.venv}/bin:{SYSTEM_PATH}"
    assert after["VIRTUAL_ENV"] == str(clone.venv)
    assert "LD_LIBRARY_PATH" not in after
    assert "LOCKSTEP_VENV" not in after, "it would send another clone's env/run here"


@pytest.mark.parametrize("shell", SHELLS)
def test_activate_twice_is_activate_once(clone: Environment, shell: str) -> None:
    clone.write_settings(clone.settings() | {"lockstep_mpi_bin": "/site/bin", "lockstep_mpi_lib": "/site/lib"}, True)
    once, twice = source(clone, shell, ""), source(clone, shell, "source {activate}")
    once.pop("_", None), twice.pop("_", None)
    assert once == twice
    assert once["PATH"].startswith(f"{clone.venv}/bin:/site/bin:")
    assert once["LD_LIBRARY_PATH"] == "/site/lib"


@pytest.mark.parametrize("shell", SHELLS)
def test_a_modules_libmpi_does_not_hide_the_wheels(clone: Environment, shell: str) -> None:
    assert source(clone, shell, "", LD_LIBRARY_PATH="/module/lib")["LD_LIBRARY_PATH"] == f"{clone.venv}/lib:/module/lib"


@pytest.mark.parametrize("shell", SHELLS)
def test_ranks_may_outnumber_cores_only_where_no_scheduler_counts_them(clone: Environment, shell: str) -> None:
    laptop = source(clone, shell, "")
    assert laptop["PRTE_MCA_rmaps_default_mapping_policy"] == "slot:oversubscribe"
    assert laptop["OMPI_MCA_rmaps_base_oversubscribe"] == "1"
    for name in BATCH:
        assert "PRTE_MCA_rmaps_default_mapping_policy" not in source(clone, shell, "", **{name: "1"})
    submitted = source(clone, shell, "export SLURM_JOB_ID=1; source {activate}")
    assert "PRTE_MCA_rmaps_default_mapping_policy" not in submitted, "a login shell's defaults travelled into the job"


@pytest.mark.parametrize("shell", SHELLS)
def test_activate_never_overrides_the_user(clone: Environment, shell: str) -> None:
    mine = {"PRTE_MCA_rmaps_default_mapping_policy": "core", "OMPI_MCA_rmaps_base_oversubscribe": ""}
    for script in ("", "source {activate}"):
        after = source(clone, shell, script, **mine)
        assert {name: after[name] for name in mine} == mine


@pytest.mark.parametrize("shell", SHELLS)
def test_activate_without_an_environment_says_what_to_do(clone: Environment, shell: str) -> None:
    clone.settings_file.unlink()
    done = run(shell, "-c", f"source {shlex.quote(str(clone.root))}/env/activate || exit 9")
    assert done.returncode == 9
    assert "env/setup" in done.stderr


def test_setup_refuses_an_old_python_and_says_why(tmp_path: Path) -> None:
    old = tmp_path / "python3"
    old.write_text('#!/bin/sh\necho "it is Python 3.9" >&2\nexit 1\n')
    old.chmod(0o755)
    done = run(ROOT / "env" / "setup", LOCKSTEP_PYTHON=str(old), LOCKSTEP_VENV=str(tmp_path / "venv"))
    assert done.returncode == 1
    assert f"{old}: it is Python 3.9" in done.stderr
    assert "LOCKSTEP_PYTHON=" in done.stderr
    assert not (tmp_path / "venv").exists()
