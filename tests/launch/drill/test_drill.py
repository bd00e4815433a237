"""Some of the faults under each launcher; lockstep drill without options injects all.

Not the cut link under Slurm, which takes a minute to start the next step. That a drill fails where it should is tested
in tests/unit/drill/test_drill.py.
"""

import json
import shlex
from pathlib import Path

import pytest

from tests.launching import ROOT, Finished, across_nodes, launch, slowness
from tests.slurm_cluster import SlurmCluster

DRILL = f"python {shlex.quote(str(ROOT / 'app' / 'drill.py'))}"
ACTIVATE = f"source {shlex.quote(str(ROOT / 'env' / 'activate'))}"
ACROSS_NODES = "OMPI_MCA_mpi_yield_when_idle=1"  # two nodes share the cores of this machine


def _passed(finished: Finished, folder: Path, faults: str) -> None:
    assert finished.returncode == 0, finished.output
    results = json.loads((folder / "results.json").read_text())
    assert [result["fault"] for result in results] == faults.split(",")
    for result in results:
        assert result["failures"] == []
        assert result["impossible"] is None
        assert result["seconds"] <= 15 * slowness()
        assert result["orphans"] == []


def test_under_mpirun(tmp_path: Path) -> None:
    faults = "torn_shard"
    finished = launch(f"{DRILL} --faults {faults} --folder {tmp_path}/drill", timeout_seconds=500)
    _passed(finished, tmp_path / "drill", faults)


@pytest.mark.thorough
def test_under_srun_on_two_nodes(slurm: SlurmCluster, tmp_path: Path) -> None:
    faults = "sigkill"
    launcher = "srun --mpi=pmix --kill-on-bad-exit=1 -n {ranks}"
    drill = f"{DRILL} --ranks 2 --launcher '{launcher}' --faults {faults} --folder {tmp_path}/drill"
    finished = slurm.run(f"{ACTIVATE} && {ACROSS_NODES} salloc -N2 -n2 {drill}", tmp_path, 500)
    _passed(finished, tmp_path / "drill", faults)


@pytest.mark.thorough
@across_nodes
def test_under_horovodrun_on_two_nodes(slurm: SlurmCluster, tmp_path: Path) -> None:
    faults = "cut_link"
    launcher = "horovodrun -np {ranks} -H n1:1,n2:1"
    drill = f"{DRILL} --ranks 2 --launcher '{launcher}' --faults {faults} --folder {tmp_path}/drill"
    finished = slurm.run(f"{ACTIVATE} && {ACROSS_NODES} {drill}", tmp_path, 500)
    _passed(finished, tmp_path / "drill", faults)


def test_an_unknown_fault_is_refused() -> None:
    finished = launch(f"{DRILL} --faults earthquake")
    assert finished.returncode == 2
    assert "no such fault: earthquake; there are sigkill, " in finished.stderr
