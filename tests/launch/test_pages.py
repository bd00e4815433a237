"""Every command of every page works: each shell block, line by line, in a folder like a fresh clone.

Lines are run with additional settings that make them short. Lines that another test runs, and those that depend on a
site, are listed below. A line that is on several pages is run once.
"""

import os
import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.launching import ROOT, across_nodes, launch
from tests.slurm_cluster import SlurmCluster

PAGES = [ROOT / "docs" / "tutorial.md", ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

RUN_ELSEWHERE = {  # a part of the command, and the test that runs it or its like
    "env/run pytest": "test_pages.py::test_every_command_has_its_test",
    "--config cartpole": "test_agents.py::test_a_pole_is_balanced_and_another_program_sees_it",
    "--record play.gif": "test_agents.py::test_a_pole_is_balanced_and_another_program_sees_it",
    "--config pong": "test_agents.py::test_every_preset_runs_and_can_be_seen",
    "--config racetrack": "test_agents.py::test_every_preset_runs_and_can_be_seen",
    "--config highway": "test_agents.py::test_every_preset_runs_and_can_be_seen",
    "my_world.Corridor": "test_agents.py::test_an_environment_and_a_policy_of_ones_own",
    "runs/weather": "test_problems.py::test_the_pages_example_is_killed_and_goes_on_bit_for_bit",
    "runs/forecast": "test_problems.py::test_the_forecast_is_learned_and_drawn",
    "my_shapes.Shapes": "test_vision.py::test_a_data_set_and_a_network_of_ones_own",
    "-discovery-script": "test_elastic.py::test_slots_of_one_host_are_taken_away_and_given_back",
    "lockstep drill": "test_drill.py::test_under_mpirun",
    "lockstep verify --resume": "test_resume.py::test_the_certificate_through_two_kills_and_other_numbers_of_ranks",
    "lockstep benchmark throughput": "test_benchmark.py::test_throughput_leaves_a_table_json_and_a_picture",
    "lockstep benchmark scaling": "test_benchmark.py::test_scaling_starts_jobs_of_each_size",
    "np 2 lockstep benchmark comm": "test_benchmark.py::test_comm_fits_forecasts_and_compares_with_the_link",
    "lockstep benchmark sharding": "test_sharding.py::test_the_sharding_benchmark_proves_and_counts",
    "lockstep benchmark pipeline": "test_sharding.py::test_the_pipeline_benchmark_tells_its_ideal",
    "--data my_package.my_inputs": "test_predict.py::test_the_rows_are_those_of_a_plain_loop_on_any_number_of_ranks",
    "--folder photos": "test_predict.py::test_a_folder_of_images_is_classified_as_the_same_images_are",
    "lockstep merge": "test_sharding.py::test_zero3_then_replicated_then_a_pipeline_is_one_run_and_merges_offline",
    "--parallel zero3": "test_sharding.py::test_zero3_then_replicated_then_a_pipeline_is_one_run_and_merges_offline",
    "--config reference": "test_programs.py::test_the_reference_run_prints_the_references_lines",
    "--data.name image_folder": "test_vision.py::test_a_folder_of_images_is_learned_by_ranks_with_workers",
    "-np 2 python app/train.py --resume": "test_resume.py::test_a_killed_run_ends_with_the_model_of_one_that_was_not",
    "runs/train-12": "test_slurm.py::test_a_job_on_two_nodes_trains_and_another_evaluates",  # of jobs that readers have
    "runs/sweep-17": "test_slurm.py::test_a_sweep_ends_with_one_table",
    "verify runs/elastic": "test_elastic.py::test_one_of_three_workers_is_killed_and_another_one_comes",
    "np 4 lockstep doctor": "test_doctor.py::test_a_healthy_machine_passes",
    "srun --mpi=pmix env/run lockstep doctor": "test_doctor_nodes.py::test_a_healthy_job_of_slurm_passes",
    "slurm/doctor.sbatch": "test_slurm.py::test_doctor_and_benchmark_start_as_training_does",
    "-H n1:2,n2:2": "test_across_nodes.py::test_two_nodes_over_ssh",
    "peers --": "test_peers.py::test_the_peers_take_turns_in_an_order_that_rotates",
}
THOROUGH = {  # a part of a command, and why its block is left to the thorough tests
    "report runs/latest": "test_readme.py has the same first command",
    "evaluate runs/latest": "needs the run of the block above",
    "predict runs/latest": "needs the run of the block above",
    "runs/three": "trains twice, on one rank and on three",
    "timeout --signal": "trains until it is stopped, and goes on",
    "runs/adamw": "trains once more; the report of two runs",
    "--profile 20-24": "trains once more",
    "env/run lockstep doctor": "the doctor's tests see more of it",
    "--gloo -np 4": "trains once more, without MPI",
    "benchmark checks": "measures",
    "benchmark comm": "measures; two simulated nodes",
    "--config vision": "trains three times, once with a large network or as a job on two nodes",
    "resnet18": "a large network on four ranks",
    "sbatch": "jobs, some on two nodes",
    "srun": "jobs on two nodes",
}
OF_A_SITE = re.compile(
    r"module load|export (LOCKSTEP_VENV|PIP_CACHE_DIR)=|LOCKSTEP_SITE_TORCH=1|env/setup|#SBATCH|env/run CMD"
)

SMALL = "--data.name synthetic --data.num_samples 64 --data.batch_size 16 --num_epochs 1"  # 4 updates
FEW_ROUNDS = "--rounds 1 --updates 3"
# A new shell's: that of pytest has the environment on its PATH, and would hide a command that lacks env/run.
FRESH = {"PATH": os.pathsep.join(p for p in os.environ["PATH"].split(os.pathsep) if Path(p) != Path(sys.prefix, "bin"))}
FEW_SAMPLES = "--data.name synthetic --data.num_samples 64 --data.batch_size_per_rank 4"


@dataclass(frozen=True)
class Block:
    """Lines of one page that are typed one after the other."""

    page: str
    number: int
    commands: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.page}-{self.number}"


def _blocks(page: Path) -> Iterator[list[str]]:
    text = page.read_text()
    for block in re.findall(r"^```bash\n(.*?)^```|`(env/run [^`]+)`", text, flags=re.DOTALL | re.MULTILINE):
        lines = "".join(block).replace("\\\n", " ")
        lines = lines.replace("\n", " ") if block[1] else lines  # within a paragraph
        yield [" ".join(line.split("  #")[0].split()) for line in lines.splitlines() if line.strip()]


def _all_blocks() -> list[Block]:
    """All blocks, without lines that are run elsewhere or a second time."""
    found, seen = [], set()
    for page in dict.fromkeys(PAGES):
        for number, lines in enumerate(_blocks(page)):
            left = [line for line in lines if not _is_elsewhere(line) and line not in seen]
            seen.update(lines)
            if left:
                found.append(Block(page.name, number, tuple(left)))
    return found


def _is_elsewhere(line: str) -> bool:
    return bool(OF_A_SITE.match(line)) or any(part in line for part in RUN_ELSEWHERE)


BLOCKS = _all_blocks()


def _param(tested: Block | str) -> Any:
    """Mark a block or a command that is left to the thorough tests."""
    commands = [tested] if isinstance(tested, str) else [line for line in tested.commands if not _is_for_slurm(line)]
    is_thorough = any(part in line for part in THOROUGH for line in commands)
    return pytest.param(tested, marks=pytest.mark.thorough if is_thorough else [], id=str(tested))


def _is_for_slurm(line: str) -> bool:
    return line.startswith(("sbatch", "srun"))


def _shortened(line: str) -> str:
    """The same command with less work; later settings override earlier ones."""
    if "timeout --signal=USR1 20" in line:  # which ends with 124 by itself
        return line.replace("USR1 20", "USR1 12") + " || [ $? = 124 ]"
    line = line.replace("/scratch/me", ".").replace("-np 4 ", "-np 2 ")  # two cores
    if "app/train.py" in line and "--help" not in line:
        return f"{line} {_less_to_learn(line)}"
    if re.search("benchmark (checks|optimizer)", line):
        return f"{line} {FEW_ROUNDS}"
    return f"{line} {FEW_ROUNDS} {FEW_SAMPLES} --out benchmark" if "lockstep benchmark" in line else line


def _less_to_learn(line: str) -> str:
    if "--resume" in line:
        return "--stop.after_minutes 0.5 || [ $? = 75 ]"  # less 20 s to save in
    return f"{SMALL} --data.num_samples 480" if "--profile" in line else SMALL


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the clone, for the files of the runs."""
    folder = tmp_path_factory.mktemp("clone")
    for name in ("app", "env", "slurm", ".venv"):
        (folder / name).symlink_to(ROOT / name)
    shutil.copytree(ROOT / "docs", folder / "docs")
    return folder


@pytest.mark.parametrize("block", [_param(b) for b in BLOCKS if not all(map(_is_for_slurm, b.commands))])
def test_what_is_typed_in_a_shell(block: Block, clone: Path) -> None:
    lines = [_shortened(line) for line in block.commands if not _is_for_slurm(line)]
    finished = launch("set -e\n" + "\n".join(lines), timeout_seconds=400, cwd=clone, environment=FRESH)
    assert finished.returncode == 0, f"{lines}:\n{finished.output}"
    if any("timeout" in line for line in lines):  # whose exit code says nothing of the run's
        (update,) = re.findall(r"stopped by SIGUSR1 after update (\d+) of \d+, which is saved", finished.output)
        assert f"Goes on after update {update} from" in finished.output


@pytest.mark.parametrize("command", [_param(line) for b in BLOCKS for line in b.commands if line.startswith("sbatch")])
def test_what_is_submitted(command: str, slurm: SlurmCluster, clone: Path) -> None:
    """With half as many ranks, and jobs of a sweep: two cores stand for both nodes."""
    fewer = command.removeprefix("sbatch ").replace("node=4", "node=2").replace("array=1-4", "array=1-2")
    job = slurm.submit(f"{fewer} {SMALL}", clone, LOCKSTEP_LAUNCHER="srun --mpi=pmix")  # which saves a trial
    assert job.wait() == 0, job.output


@across_nodes
@pytest.mark.parametrize("command", [_param(line) for b in BLOCKS for line in b.commands if line.startswith("srun")])
def test_what_is_typed_within_an_allocation(command: str, slurm: SlurmCluster, clone: Path) -> None:
    finished = slurm.run(f"salloc -N2 -n4 {command} {SMALL}", clone, 120)
    assert finished.returncode == 0, finished.output


def _commands_of(page: Path) -> Iterator[str]:
    """Everything on a page that looks like a command of ours: in blocks, within a paragraph, in a program's output."""
    for line in page.read_text().replace("\\\n", " ").splitlines():
        spans = re.findall(r"`([^`]+)`", line) if "`" in line.replace("```", "") else [line]
        yield from (
            span for span in spans if re.search(r"\bpython app/\w+\.py|(?:mpirun|horovodrun) .*\bpython\b", span)
        )


@pytest.mark.parametrize("page", [*PAGES[1:], ROOT / "CONTRIBUTING.md"], ids=lambda page: page.name)
def test_no_command_needs_a_shell_that_has_sourced_something(page: Path) -> None:
    """Each has env/run before the launcher; srun starts it on each rank, two_nodes.py on its nodes."""
    for command in _commands_of(page):
        assert re.search(r"env/run .*python|env/run (mpirun|horovodrun)", command), f"{page.name}: {command}"
        assert not re.search(r"^(mpirun|horovodrun) ", command.strip()), f"{page.name}: {command}"


def test_every_command_has_its_test() -> None:
    """The tests named in RUN_ELSEWHERE exist, and the README begins with its two commands."""
    for reference in RUN_ELSEWHERE.values():
        file, _, name = reference.partition("::")
        assert any(f"def {name}(" in found.read_text() for found in (ROOT / "tests").rglob(file)), reference
    for part in THOROUGH:
        assert any(part in line for block in BLOCKS for line in block.commands), part
    first = next(_blocks(ROOT / "README.md"))
    assert first == ["env/run horovodrun -np 2 python app/train.py", "env/run pytest"]
    for program, number in (("", 30), ("sbatch", 3), ("srun", 1)):
        assert len([line for block in BLOCKS for line in block.commands if line.startswith(program)]) >= number
    for line in (line for page in PAGES for lines in _blocks(page) for line in lines):
        assert shlex.split(line), line
