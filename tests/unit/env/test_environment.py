"""The lock file, the virtual environment's state, and the messages of a failed step."""

import os
import re
import subprocess
import sys
import threading
import tomllib
from pathlib import Path

import pytest

from env import build
from env import steps as steps_module
from env.build import run_time_folders
from env.environment import Environment
from env.lockfile import BUILT_HERE, ONLY_IF_MISSING, Pin, needed_by_torch_alone, normalise, read_lock
from env.steps import SetupError, Steps, diagnose, last_useful_lines, never_silent, run_logged, say
from env.toolchain import MPI

ROOT = Path(__file__).resolve().parents[3]
LOCK = ROOT / "env" / "requirements.lock"


# -- requirements.lock


def test_lock_names_no_index_and_pins_every_package_with_hashes() -> None:
    assert "://" not in LOCK.read_text()
    pins = read_lock(LOCK)
    assert len(pins) > 60
    assert all(re.search(r"--hash=sha256:[0-9a-f]{64}", pin.block) for pin in pins.values())


def test_lock_fits_pyproject() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    pins = read_lock(LOCK)
    wanted = [
        *project["project"]["dependencies"],
        *(one for group in project["dependency-groups"].values() for one in group),
    ]
    for requirement in wanted:
        name, version = re.match(r"([A-Za-z0-9_.-]+)(?:\[.*\])?(?:==(\S+))?", requirement).groups()  # type: ignore[union-attr]
        assert normalise(name) in pins, f"{name} is not in the lock file: remake it"
        if version:
            assert pins[normalise(name)].version == version
    assert set(pins) >= BUILT_HERE | ONLY_IF_MISSING


def test_a_site_torch_replaces_torchs_own_packages_only() -> None:
    alone = needed_by_torch_alone(read_lock(LOCK))
    assert {"torch", "torchvision", "triton", "nvidia-nccl-cu13", "networkx"} <= alone
    assert not alone & {"numpy", "pillow", "setuptools", "typing-extensions", "horovod", "mpi4py"}


# -- the virtual environment


def install_by_hand(environment: Environment, name: str, version: str) -> Path:
    info = environment.site_packages / f"{name}-{version}.dist-info"
    info.mkdir(parents=True)
    (environment.site_packages / f"{name}.py").write_text("x = 1\n")
    (info / "METADATA").write_text(f"Name: {name}\nVersion: {version}\n")
    (info / "RECORD").write_text(f"{name}.py,sha256=abc,6\n{info.name}/RECORD,,\n")
    return environment.site_packages / f"{name}.py"


def pin(name: str, version: str = "1.0") -> Pin:
    return Pin(name, version, f"{name}=={version}\n", frozenset())


@pytest.fixture
def environment(tmp_path: Path) -> Environment:
    return Environment(ROOT, tmp_path / "with space" / "venv")


def test_only_what_is_damaged_counts_as_broken(environment: Environment) -> None:
    files = {name: install_by_hand(environment, name, "1.0") for name in ("whole", "deleted", "cut", "bare")}
    files["deleted"].unlink()
    files["cut"].write_text("x")
    (environment.site_packages / "bare-1.0.dist-info" / "RECORD").unlink()
    pins = [pin("whole"), pin("whole", "2.0"), pin("deleted"), pin("cut"), pin("bare"), pin("absent")]
    assert environment.broken(pins) == pins[1:]
    environment.forget(environment.installed()["bare"])
    assert "bare" not in environment.installed()


def test_a_wheel_is_known_by_the_cache_folder_it_came_from(environment: Environment) -> None:
    install_by_hand(environment, "horovod", "0.28.1")
    info = environment.site_packages / "horovod-0.28.1.dist-info"
    assert not environment.has_wheel("horovod", "horovod-0.28.1-abc")
    (info / "direct_url.json").write_text('{"url": "file:///cache/wheels/horovod-0.28.1-abc/horovod.whl"}')
    assert environment.has_wheel("horovod", "horovod-0.28.1-abc")
    assert not environment.has_wheel("horovod", "horovod-0.28.1-ab")


def test_an_incomplete_environment_never_bears_the_stamp(environment: Environment) -> None:
    environment.site_packages.mkdir(parents=True)
    environment.write_settings({"lockstep_mpi": "Open MPI 5.0.11"}, complete=True)
    recorded = environment.settings()
    assert recorded["lockstep_stamp"] == environment.stamp
    environment.write_settings(recorded, complete=False)
    assert environment.settings()["lockstep_stamp"] == "incomplete"
    assert environment.settings()["lockstep_mpi"] == "Open MPI 5.0.11"


def test_a_moved_environment_is_not_intact(environment: Environment) -> None:
    environment.site_packages.mkdir(parents=True)
    environment.python.parent.mkdir()
    environment.python.symlink_to(sys.executable)
    assert environment.is_intact()
    environment.write_settings({}, complete=True)
    assert environment.is_intact()
    moved = Environment(ROOT, environment.venv.with_name("moved"))
    environment.venv.rename(moved.venv)
    assert not moved.is_intact()


def test_a_second_setup_waits_for_the_first(environment: Environment) -> None:
    waited: list[bool] = []

    def second() -> None:
        with environment.lock() as had_to_wait:
            waited.append(had_to_wait)

    with environment.lock() as first:
        assert not first
        thread = threading.Thread(target=second)
        thread.start()
        thread.join(0.3)
        assert thread.is_alive()
    thread.join(10)
    assert waited == [True]


def test_users_settings_do_not_bend_the_build(environment: Environment, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PYTHONPATH", "PIP_TARGET", "HOROVOD_WITHOUT_GLOO"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("PIP_USER", "1")
    monkeypatch.setenv("PIP_CERT", "/etc/ca.crt")
    variables = environment.variables()
    assert not {"PYTHONPATH", "PIP_TARGET", "HOROVOD_WITHOUT_GLOO"} & set(variables)
    assert (variables["PIP_USER"], variables["PIP_CERT"]) == ("0", "/etc/ca.crt")


def test_run_time_folders_are_the_sites_only(environment: Environment, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LD_LIBRARY_PATH", f"/opt/gcc/lib64:{environment.venv}/lib:/opt/ompi/lib::/usr/lib64")
    mpi = MPI(Path("/opt/ompi/bin/mpicxx"), "Open MPI 5.0.11", ("/opt/ompi/lib", "/usr/lib/x86_64-linux-gnu"))
    assert run_time_folders(mpi, environment.venv) == ["/opt/ompi/lib", "/opt/gcc/lib64"]


# -- failures


def test_a_failed_step_says_which_why_and_what_to_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    steps, log = Steps(total=6), tmp_path / "step.log"
    with pytest.raises(SetupError) as failure, steps.step("Horovod"):
        run_logged(["sh", "-c", "echo fatal error: Killed signal terminated program cc1plus; exit 1"], log, os.environ)
    steps.report(failure.value)
    said = capsys.readouterr().err
    assert "stopped in step 1/6 (Horovod)" in said
    assert "why:  the compiler ran out of memory" in said
    assert "MAKEFLAGS=-j1 env/setup" in said
    assert str(log) in said


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("OSError: [Errno 28] No space left on device", "the disk or a quota is full"),
        ("NewConnectionError(...): Temporary failure in name resolution", "index cannot be reached"),
        ("ERROR: THESE PACKAGES DO NOT MATCH THE HASHES FROM THE REQUIREMENTS FILE", "not the one in env/requirements"),
        ("fatal error: Python.h: No such file or directory", "headers are missing"),
        ("#error -- unsupported GNU version! gcc versions later than 12", "does not take this g++"),
    ],
)
def test_well_known_causes_are_named(tmp_path: Path, line: str, why: str) -> None:
    log = tmp_path / "log"
    log.write_text(f"before\n{line}\nafter\n")
    found = diagnose(log)
    assert found is not None
    assert why in found[0]


def test_the_first_compiler_error_is_shown_not_the_end_of_the_log(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("ok\nfile.cc:1: error: no member\nsecond line\n" + "noise\n" * 50)
    assert last_useful_lines(log)[:2] == ["file.cc:1: error: no member", "second line"]
    log.write_text("\n".join(map(str, range(20))))
    assert last_useful_lines(log, 3) == ["17", "18", "19"]


def test_an_error_that_nobody_expected_is_one_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With its step, its log, which has the traceback, and what to do."""
    monkeypatch.setenv("LOCKSTEP_VENV", str(tmp_path / "venv"))

    def fail(_environment: Environment, _cache: Path, steps: Steps) -> None:
        with steps.step("mpi4py"):
            raise TypeError("got an unexpected keyword argument")

    monkeypatch.setattr(build, "build", fail)
    assert build.main([]) == 1
    said = capsys.readouterr().err
    log = tmp_path / "venv" / "logs" / "setup.log"
    for part in (
        "step 1/6 (mpi4py)",
        "did not expect: TypeError: got an unexpected keyword",
        f"log:  {log}\n",
        "do:   ",
    ):
        assert part in said
    assert "Traceback" not in said
    assert "Traceback (most recent call last)" in log.read_text()


@pytest.mark.parametrize("place", ["a file", "a file/below it", "~nobody-of-this-name/venv"])
def test_a_folder_that_cannot_be_written_is_one_message(tmp_path: Path, place: str) -> None:
    """The program itself, on errors that the system has for it; the log then goes elsewhere."""
    (tmp_path / "a file").write_text("")
    variables = {"LOCKSTEP_VENV": place if place.startswith("~") else f"{tmp_path}/{place}", "TMPDIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-B", "-m", "env.build"], cwd=ROOT, env=os.environ | variables, capture_output=True, text=True,
        timeout=60,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.startswith("\nenv/setup stopped before its first step.\n  why:  ")
    assert "Traceback" not in done.stderr
    (log,) = re.findall(r"^  log:  (.+)$", done.stderr, flags=re.MULTILINE)
    assert log.startswith(str(tmp_path)) or place.startswith("~")
    assert "Traceback" in Path(log).read_text()
    assert re.search(r"^  do:   \w+", done.stderr, flags=re.MULTILINE)
    Path(log).unlink()


# -- progress


def test_a_long_step_says_how_long_and_what_is_at_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    steps = Steps(total=6)
    with never_silent(0.4):
        with steps.step("packages"):
            run_logged(
                ["sh", "-c", "echo Downloading torch; echo '  ^~~~ '; sleep 1.5; exit 0"], tmp_path / "log", os.environ
            )
        with steps.step("short"):
            pass
    first, *between, last, short, end = capsys.readouterr().err.split("\n")
    assert first == "[1/6] packages ... "
    assert 2 <= len(between) <= 3
    assert all(re.fullmatch(r" {6} +[01] s  Downloading torch", line) for line in between)
    assert re.fullmatch(r"\[1/6\] [12] s", last)
    assert (short, end) == ("[2/6] short ... 0 s", "")


def test_whoever_waits_for_another_setup_is_not_left_in_silence(
    environment: Environment, capsys: pytest.CaptureFixture[str]
) -> None:
    with environment.lock(), never_silent(0.3):
        say("waiting for it")
        threading.Event().wait(1.0)
    assert re.fullmatch(r"waiting for it\n( {6} +[01] s\n){2,3}", capsys.readouterr().err)


def test_fifteen_seconds_is_the_longest_silence() -> None:
    assert steps_module.SECONDS_OF_SILENCE <= 15


def test_env_is_written_in_the_standard_library_alone() -> None:
    """Nothing is installed yet when these files run (`prove` runs last, inside the environment)."""
    code = (
        "import sys, env.build; print([m for m in sys.modules if m.split('.')[0] in ('torch', 'numpy', 'packaging')])"
    )
    done = subprocess.run([sys.executable, "-S", "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
