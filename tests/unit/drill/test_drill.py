"""A drill passes only what is as it should be."""

from dataclasses import replace
from pathlib import Path

import pytest

from lockstep.drill.drill import FAULTS, Drill, Job
from lockstep.drill.processes import running_processes
from tests.launching import ROOT, launch

STALLED = Job(7, [(1009.0, "lockstep: the job stalled. rank 3: process 17 on n2 is stopped, in vote")], 1011.0)


@pytest.fixture
def injected(tmp_path: Path) -> Path:
    file = tmp_path / "sigstop.injected"
    file.write_text("1000.0")
    return file


def _failures(job: Job, injected: Path, fault: str = "sigstop") -> list[str]:
    failures: list[str] = []
    Drill("mpirun", 4, 10.0, injected.parent)._judge(FAULTS[fault], 3, job, injected, failures)
    return failures


def test_what_is_as_it_should_be_passes(injected: Path) -> None:
    assert _failures(STALLED, injected) == []


@pytest.mark.parametrize(
    ("job", "failure"),
    [
        (replace(STALLED, code=1), "it ended with 1, not with "),
        (replace(STALLED, code=None), "it ended with None"),
        (replace(STALLED, lines=[(1009.0, "rank 2: process 17 on n2 is stopped")]), "no verdict"),
        (replace(STALLED, lines=[(1015.5, STALLED.lines[0][1])]), "the verdict took 15.5 s"),
    ],
)
def test_what_is_not_fails(job: Job, failure: str, injected: Path) -> None:
    assert any(failure in found for found in _failures(job, injected))


def test_a_job_that_ends_before_its_fault_fails(injected: Path) -> None:
    injected.unlink()
    assert "the job ended with 7 before the fault" in _failures(STALLED, injected)[0]


def test_a_killed_rank_must_not_end_well(injected: Path) -> None:
    assert _failures(Job(0, [(1001.0, "Killed")], 1001.0), injected, "sigkill") == ["it ended with 0"]
    assert _failures(Job(137, [(1001.0, "Killed")], 1001.0), injected, "sigkill") == []


def test_what_is_left_of_a_job_is_found() -> None:
    word = "a-word-of-this-test-alone"
    found = launch(
        f"(exec -a '--run_dir {word}' sleep 20) & python -m lockstep.drill.processes '--run_dir {word}'; kill $!"
    )
    assert f"--run_dir {word} 20" in found.stdout
    assert running_processes(word) == []


@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_has_its_injection(fault: str) -> None:
    """Read as text: the module is a rank's, and starts MPI."""
    assert f'    "{fault}": ' in (ROOT / "app" / "lockstep" / "drill" / "faulty_train.py").read_text()
