"""Runs tests on real MPI ranks: `@pytest.mark.world_size(n)` means that n ranks enter the test together.

Outside a launcher, all chosen tests of one world size go into one `mpirun -np n pytest ...`, and what its ranks report
is reported here, test by test: a test passes if it passes on every rank. A rank whose test fails ends its world at once
(the others may wait for it in a collective); the tests that were left over get a new world.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import pytest

from tests.launching import DidNotEndError, launch

if TYPE_CHECKING:
    from lockstep.comm.cluster import Cluster

REPORTS = "TEST_WORLD_REPORTS"  # set inside a world: the folder for its ranks' reports
SECONDS_TO_START, SECONDS_A_TEST = 120, 6  # at most, on cores that others use, too
SECONDS_TO_FAIL_TOGETHER = 1.0

Reports = dict[str, list[pytest.TestReport]]  # by test


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """This rank among all ranks of the world."""
    from lockstep.comm.cluster import Cluster

    cluster = Cluster.start()
    yield cluster
    cluster.stop()


@pytest.fixture
def _no_key_biases(monkeypatch: pytest.MonkeyPatch) -> None:
    """The vision transformer is one whose gradients are more than rounding."""
    from tests.parallel.building import vit_blocks_without_key_biases

    monkeypatch.setattr("lockstep.models.classifier.vit_blocks", vit_blocks_without_key_biases)


# -- outside: start worlds, report what they say -----------------------------------------------------------------------


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> bool | None:
    size = _world_size(item)
    if size is None or REPORTS in os.environ:  # this is asked of every test, of other folders, too
        return None
    terminal = item.config.pluginmanager.get_plugin("terminalreporter")
    known: Reports = item.session.__dict__.setdefault("world_reports", {})
    if item.nodeid not in known:
        nodeids = [other.nodeid for other in item.session.items if _world_size(other) == size]
        waiting = [nodeid for nodeid in nodeids if nodeid not in known]
        if terminal:
            terminal.write(f" [{size} ranks, {len(waiting)} tests] ", flush=True)
        known.update(_run_world(item.config, size, waiting))
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    for report in known[item.nodeid]:
        item.ihook.pytest_runtest_logreport(report=report)
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    return True


def pytest_itemcollected(item: pytest.Item) -> None:
    if item.get_closest_marker("world_size") is None:
        raise pytest.UsageError(f"{item.nodeid} has no world_size: a test without ranks belongs in tests/unit")


def _world_size(item: pytest.Item) -> int | None:
    marker = item.get_closest_marker("world_size")
    return int(marker.args[0]) if marker else None


def _run_world(config: pytest.Config, size: int, nodeids: Sequence[str]) -> Reports:
    """The reports of the tests that this world got through: all of `nodeids`, or up to the first that failed."""
    with TemporaryDirectory(prefix="lockstep-world-") as folder:
        pytest_command = [
            sys.executable,
            "-m",
            "pytest",
            "-m",
            "",
            "--quiet",
            "--no-header",
            "-p",
            "no:cacheprovider",
            *nodeids,
        ]
        try:
            output = launch(
                ["mpirun", "-np", str(size), *pytest_command],
                timeout_seconds=SECONDS_TO_START + SECONDS_A_TEST * len(nodeids),
                cwd=config.rootpath,
                # There may be more threads than cores: a thread that waits for another must not keep its core busy.
                environment={REPORTS: folder, "OMP_WAIT_POLICY": "passive"},
            ).output
        except DidNotEndError as error:
            output = str(error)
        by_rank = [_read_reports(config, Path(folder) / f"{rank}.jsonl") for rank in range(size)]
    reports: Reports = {}
    for nodeid in nodeids:
        of_test = [reports_of_rank.get(nodeid, []) for reports_of_rank in by_rank]
        failures = [report for rank_reports in of_test for report in rank_reports if report.failed]
        complete = all(any(report.when == "teardown" for report in rank_reports) for rank_reports in of_test)
        if failures or not complete:
            reports[nodeid] = failures[:1] or [_died(nodeid, size, output)]
            break
        reports[nodeid] = of_test[0]
    return reports


def _read_reports(config: pytest.Config, file: Path) -> Reports:
    reports: Reports = {}
    for line in file.read_text().splitlines() if file.exists() else ():
        report = config.hook.pytest_report_from_serializable(config=config, data=json.loads(line))
        reports.setdefault(report.nodeid, []).append(report)
    return reports


def _died(nodeid: str, size: int, output: str) -> pytest.TestReport:
    text = f"the world of {size} ranks ended in this test without a report:\n{output[-4000:]}"
    return pytest.TestReport(nodeid, (nodeid, None, nodeid), {}, "failed", text, "call")


# -- inside: write down what this rank says ----------------------------------------------------------------------------


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if REPORTS not in os.environ:
        return
    rank, size = _place_in_world()
    report.sections.append(("world", f"rank {rank} of {size}"))
    with (Path(os.environ[REPORTS]) / f"{rank}.jsonl").open("a") as file:
        file.write(json.dumps(_serializable(report)) + "\n")
    if report.failed:
        time.sleep(SECONDS_TO_FAIL_TOGETHER)
        _end_world()


def _end_world() -> None:
    from mpi4py import MPI

    MPI.COMM_WORLD.Abort(1)


@cache  # the last report comes after MPI has been finalized
def _place_in_world() -> tuple[int, int]:
    from mpi4py import MPI

    return MPI.COMM_WORLD.rank, MPI.COMM_WORLD.size


def _serializable(report: pytest.TestReport) -> dict[str, object]:
    data: dict[str, object] = report._to_json()
    return {**data, "$report_type": "TestReport"}
