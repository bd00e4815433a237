"""The public API in a user's own script: several runs in one process, raised errors, and state that is restored."""

import json
import re
import shlex
import sys
import textwrap
from pathlib import Path

import pytest

from tests.launching import ROOT, Finished, launch

BEGINNING = """
import os, signal, sys, threading
import lockstep
assert not {"torch", "mpi4py", "horovod"} & sys.modules.keys(), "import lockstep is light"

def settings(folder, *more):
    return lockstep.read_settings(
        "--data.name", "synthetic", "--data.num_samples", "256", "--num_epochs", "2", "--quiet", "true",
        "--loggers", "none", "--run_dir", folder, *more,
    )

def state():
    import torch
    return (
        [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGALRM)],
        os.sched_getaffinity(0), torch.get_num_threads(), torch.are_deterministic_algorithms_enabled(),
        torch.get_rng_state().sum().item(), dict(os.environ),
    )
"""


def _script(tmp_path: Path, text: str, num_ranks: int | None = None) -> Finished:
    (tmp_path / "script.py").write_text(BEGINNING + textwrap.dedent(text))
    launcher = f"mpirun -np {num_ranks} " if num_ranks else ""
    return launch(f"{launcher}{shlex.quote(sys.executable)} script.py", cwd=tmp_path)


def _told(finished: Finished) -> list[str]:
    """The words after "told" on each line of the script's output."""
    return [word for line in finished.stdout.splitlines() if line.startswith("told") for word in line.split()[1:]]


@pytest.mark.parametrize("num_ranks", [pytest.param(None, marks=pytest.mark.thorough), 2])
def test_several_runs_in_one_process_are_those_of_the_command_line(tmp_path: Path, num_ranks: int | None) -> None:
    finished = _script(
        tmp_path,
        """
        import torch
        torch.manual_seed(5)
        lockstep.train  # imports MPI, which sets variables of its own
        before = state()
        first = lockstep.train(settings("first", "--checks.deterministic", "true"))
        assert state() == before, [(was, now) for was, now in zip(before, state()) if was != now]
        second = lockstep.train(settings("second", "--seed", "1", "--parallel", "zero3"))
        again = lockstep.train(settings("again"))
        assert state() == before
        from mpi4py import MPI
        assert MPI.Is_initialized() and not MPI.Is_finalized()
        assert MPI.COMM_WORLD.allreduce(1) == MPI.COMM_WORLD.size, "the user's own messages"
        evaluation = lockstep.evaluate(first.path)
        assert evaluation.scores["accuracy"] == first.summary["accuracy"]
        if MPI.COMM_WORLD.rank == 0:
            model = lockstep.load_model(first.path)
            assert sum(p.numel() for p in model.parameters()) == first.summary["num_parameters"]
            assert not model.training
            assert {point["kind"] for point in first.metrics} == {"train", "held_out"}
            assert second.settings.seed == 1
            print("told", first.summary["model_digest"], again.summary["model_digest"])
        """,
        num_ranks,
    )
    assert finished.returncode == 0, finished.output
    first, again = _told(finished)
    assert first == again
    launcher = f"mpirun -np {num_ranks} " if num_ranks else ""
    typed = "--data.name synthetic --data.num_samples 256 --num_epochs 2 --loggers none --run_dir typed"
    command = launch(f"{launcher}python {shlex.quote(str(ROOT / 'app' / 'train.py'))} {typed}", cwd=tmp_path)
    assert command.returncode == 0, command.output
    assert json.loads((tmp_path / "typed" / "summary.json").read_text())["model_digest"] == first


def test_an_error_of_all_ranks_is_raised_and_the_next_run_goes_well(tmp_path: Path) -> None:
    finished = _script(
        tmp_path,
        """
        try:
            lockstep.train(settings("first", "--data.root", "nowhere", "--data.name", "image_folder"))
        except lockstep.LockstepError as error:
            print("told", type(error).__name__)
        lockstep.train(settings("second"))
        """,
        num_ranks=2,
    )
    assert finished.returncode == 0, finished.output
    assert _told(finished) == ["DataError"] * 2


def test_an_error_of_one_rank_ends_the_job(tmp_path: Path) -> None:
    finished = _script(
        tmp_path,
        """
        class Fails(lockstep.TrainerHook):
            def before_update(self, trainer, item):
                if trainer.progress.step == 2 and os.environ["OMPI_COMM_WORLD_RANK"] == "1":
                    raise ZeroDivisionError("a mistake of the user's")

        lockstep.train(settings("first"), hooks=[Fails()])
        """,
        num_ranks=2,
    )
    assert finished.returncode == 9, finished.output
    assert "rank 1: an error in your own code" in finished.stderr
    assert "a mistake of the user's" in finished.stderr
    assert finished.seconds < 60


@pytest.mark.thorough
def test_a_users_own_error_is_raised_on_one_rank(tmp_path: Path) -> None:
    finished = _script(
        tmp_path,
        """
        class Fails(lockstep.TrainerHook):
            def after_update(self, trainer):
                raise ZeroDivisionError

        try:
            lockstep.train(settings("first"), hooks=[Fails()])
        except ZeroDivisionError:
            print("told caught")
        print("told", lockstep.train(settings("first"), resume=True).summary["num_updates"])
        """,
    )
    assert finished.returncode == 0, finished.output
    assert _told(finished) == ["caught", "8"]


def test_a_stall_is_raised(tmp_path: Path) -> None:
    finished = _script(
        tmp_path,
        """
        import time

        class Sleeps(lockstep.TrainerHook):
            def before_update(self, trainer, item):
                time.sleep(600)

        try:
            lockstep.train(settings("first", "--stall.limit_seconds", "2"), hooks=[Sleeps()])
        except lockstep.LockstepError as error:
            print("told", type(error).__name__, error)
        lockstep.train(settings("second"))
        """,
    )
    assert finished.returncode == 0, finished.output
    assert "told StalledError the job stalled. rank 0: data loading of update 1 for" in finished.stdout
    assert (tmp_path / "first" / "recorder" / "verdict.txt").exists()


def test_a_stop_signal_saves_and_is_raised(tmp_path: Path) -> None:
    finished = _script(
        tmp_path,
        """
        class Stops(lockstep.TrainerHook):
            def after_update(self, trainer):
                if trainer.progress.step == 3:
                    os.kill(os.getpid(), signal.SIGUSR1)

        try:
            lockstep.train(settings("first"), hooks=[Stops()])
        except lockstep.LockstepError as error:
            print("told", type(error).__name__)
        print("told", lockstep.train(settings("first"), resume=True).summary["num_updates"])
        """,
    )
    assert finished.returncode == 0, finished.output
    assert _told(finished) == ["StoppedError", "8"]


@pytest.mark.thorough
def test_a_job_of_gloo_has_one_run_and_says_so(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(
        BEGINNING
        + textwrap.dedent(
            """
            lockstep.train(settings("first"))
            try:
                lockstep.train(settings("second"))
            except lockstep.LockstepError as error:
                print(error)
            """
        )
    )
    finished = launch("horovodrun --gloo -np 2 python script.py", cwd=tmp_path)
    assert finished.returncode == 0, finished.output
    assert finished.output.count("whose ranks can meet once only") == 2


def test_the_page_of_the_api_is_a_program_that_runs(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "api.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", page, flags=re.DOTALL | re.MULTILINE)
    (tmp_path / "script.py").write_text("\n".join(blocks))
    finished = launch([sys.executable, "script.py"], cwd=tmp_path)
    assert finished.returncode == 0, finished.output
    assert "rank 0 of 1: [0]" in finished.stdout
    assert "run_dir is first-run: it is not empty" in finished.stdout
