"""Two nodes without a scheduler, over ssh: the commands of docs/slurm.md, to the letter."""

import json
import re
from pathlib import Path

import pytest

from tests.launching import ROOT, across_nodes, launch
from tests.slurm_cluster import SlurmCluster

QUICK = "--data.name synthetic --data.num_samples 64 --data.batch_size 16 --num_epochs 1"
COMMANDS = re.findall(r"^env/run \w+ .*-H .*train\.py$", (ROOT / "docs" / "slurm.md").read_text(), re.MULTILINE)


@pytest.mark.thorough
@across_nodes
@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.split()[1])
def test_two_nodes_over_ssh(command: str, slurm: SlurmCluster, tmp_path: Path) -> None:
    ready = launch("env/run true", timeout_seconds=800)  # if anything is to be built, then not where no network is
    assert ready.returncode == 0, ready.output
    finished = slurm.run(f"{command} {QUICK} --run_dir {tmp_path}/run", ROOT, 120)
    assert finished.returncode == 0, finished.output
    environment = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert [rank["node"] for rank in environment["ranks"]] == ["n1", "n1", "n2", "n2"]


def test_the_docs_have_both() -> None:
    assert [command.split()[1] for command in COMMANDS] == ["mpirun", "horovodrun"]
