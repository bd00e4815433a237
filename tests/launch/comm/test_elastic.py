"""Workers that come and go, under the literal command, and Horovod's ranks without MPI."""

import json
import os
import re
import shlex
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from safetensors.torch import load_file

from tests.launching import ENVIRONMENT, ROOT, Finished, launch, slowness

TRAIN = shlex.quote(str(ROOT / "app" / "train.py"))
# Each is a host of its own for Horovod, and this machine: one whose workers all fail is left alone for a while.
HOSTS = ("localhost:1", "127.0.0.1:1", "127.1:1")
SMALL = (
    "--precision float64 --checks.ledger true --log_interval 10 --optimizer.schedule constant --model.name vit "
    "--model.vit.width 16 --model.vit.depth 1 --model.vit.num_heads 2 --model.vit.patch_size 14"
)
UPDATES_PER_EPOCH = 63
SECONDS_TO_START = 90

Worker = tuple[str, int]  # host and process id


@dataclass
class ElasticJob:
    """A running `horovodrun`, whose discovery script prints what stands in the file `hosts`."""

    process: psutil.Popen
    folder: Path

    def find_hosts(self, hosts: Sequence[str]) -> None:
        new = self.folder / "hosts.new"
        new.write_text("".join(f"{host}\n" for host in hosts))
        new.replace(self.folder / "hosts")

    @property
    def said(self) -> str:
        return (self.folder / "said").read_text()

    @property
    def generations(self) -> list[int]:
        """How many ranks each generation had."""
        return [int(size) for size in re.findall(r"Lockstep \S+: (\d+) rank\(s\)", self.said)]

    @property
    def num_updates(self) -> int:
        """As far as they are logged."""
        return max((record["step"] for record in _records(self.folder / "run")), default=0)

    def workers(self) -> set[Worker]:
        """Those that are alive."""
        found = set()
        for child in self.process.children(recursive=True):
            try:
                if child.cmdline()[1:2] == [str(ROOT / "app" / "train.py")] and child.status() != psutil.STATUS_ZOMBIE:
                    found.add((child.environ()["HOROVOD_HOSTNAME"], child.pid))
            except (psutil.Error, KeyError):
                continue
        return found

    def wait_until(self, condition: Callable[[], bool], seconds: float = SECONDS_TO_START) -> None:
        deadline = time.monotonic() + seconds * slowness()
        while not condition():
            assert self.process.poll() is None, self.said
            assert time.monotonic() < deadline, self.said
            time.sleep(0.05)

    def wait_for_updates(self, number: int = 20) -> None:
        target = self.num_updates + number
        self.wait_until(lambda: self.num_updates >= target)

    def end(self, seconds: float = 120) -> None:
        """To its good end."""
        try:
            assert self.process.wait(seconds * slowness()) == 0, self.said
        except psutil.TimeoutExpired:
            raise AssertionError(f"the job did not end:\n{self.said}") from None

    def stop(self) -> int:
        """Ask it to stop; after which update it has.

        5 s after the signal Horovod's launcher kills workers that have not ended: 137. On a busy machine these may
        have saved by then, and not yet left.
        """
        self.process.terminate()
        assert self.process.wait(60 * slowness()) in (75, 137), self.said
        (update,) = re.findall(r"stopped by SIGTERM after update (\d+) of 63000, which is saved", self.said)
        return int(update)


@contextmanager
def elastic_job(folder: Path, hosts: Sequence[str], settings: str, options: str = "") -> Iterator[ElasticJob]:
    """Three workers, two at least; whatever is left of it in the end is killed."""
    script = folder / "hosts.sh"
    script.write_text('#!/bin/sh\ncat "$(dirname "$0")/hosts"\n')
    script.chmod(0o755)
    command = f"horovodrun -np 3 --min-np 2 --max-np 3 --host-discovery-script ./hosts.sh {options} python {TRAIN}"
    (folder / "hosts").write_text("".join(f"{host}\n" for host in hosts))
    with (folder / "said").open("w") as said:
        process = psutil.Popen(
            shlex.split(f"{command} --run_dir run {settings}"),
            cwd=folder,
            env=ENVIRONMENT,
            stdin=-3,
            stdout=said,
            stderr=said,
        )
    job = ElasticJob(process, folder)
    try:
        yield job
    finally:
        for member in [*process.children(recursive=True), process] if process.is_running() else []:
            with suppress(psutil.Error):
                member.kill()
        process.wait(10)


def _records(run: Path) -> list[dict[str, Any]]:
    try:
        return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    except (OSError, ValueError):  # not there yet, or just being written
        return []


def _assert_exact(folder: Path, num_updates: int) -> None:
    """Every sample exactly once in every epoch, and every line of the metrics once, in order."""
    verified = launch("lockstep verify run", cwd=folder)
    assert verified.returncode == 0, verified.output
    accounts = re.findall(r"ledger, epoch (\d+): 4000 of 4000 samples, each exactly once\n", verified.stdout)
    assert accounts == [str(epoch) for epoch in range(num_updates // UPDATES_PER_EPOCH)]
    rest = 64 * (num_updates % UPDATES_PER_EPOCH)
    assert re.findall(r": (\d+) of 4000 samples so far, none twice", verified.stdout) == ([str(rest)] if rest else [])
    lines = [(record["step"], record["kind"]) for record in _records(folder / "run")]
    assert len(set(lines)) == len(lines)
    assert [step for step, _ in lines] == sorted(step for step, _ in lines)
    finished = (folder / "run" / "summary.json").exists()  # else the evaluation after the last update is still to come
    num_evaluations = (num_updates if finished else num_updates - 1) // UPDATES_PER_EPOCH
    assert sum(kind == "held_out" for _, kind in lines) == num_evaluations


def _assert_same_model(folder: Path, other: Path) -> None:
    model, undisturbed = load_file(folder / "model.safetensors"), load_file(other / "model.safetensors")
    for name, tensor in undisturbed.items():
        assert (model[name] - tensor).abs().max() <= 1e-9, name


def _train_alone(folder: Path, settings: str) -> Path:
    """The same run on one rank that nothing happens to."""
    finished = launch(f"python {TRAIN} {settings} --run_dir alone", cwd=folder, timeout_seconds=200)
    assert finished.returncode == 0, finished.output
    return folder / "alone"


@pytest.mark.thorough
def test_one_of_three_workers_is_killed_and_another_one_comes(tmp_path: Path) -> None:
    """It changes nothing of what is learned, whoever it is: here rank 0, which keeps the run_logger."""
    with elastic_job(tmp_path, HOSTS, f"{SMALL} --num_epochs 1000", "--blacklist-cooldown-range 1 2") as job:
        job.wait_for_updates()
        first = job.workers()
        host, pid = next(worker for worker in first if worker[1] == _root_of(tmp_path / "run"))
        os.kill(pid, signal.SIGKILL)
        job.wait_until(lambda: job.generations[1:] == [2, 3])
        job.wait_for_updates()
        survivors = first - {(host, pid)}
        assert survivors < job.workers()
        ((new_host, _),) = job.workers() - survivors
        assert new_host == host
        num_updates = job.stop()
    num_epochs = num_updates // UPDATES_PER_EPOCH + 1
    with elastic_job(tmp_path, HOSTS, f"--resume --num_epochs {num_epochs}") as job:
        job.end()
    assert f"Goes on after update {num_updates} from" in job.said
    _assert_exact(tmp_path, num_epochs * UPDATES_PER_EPOCH)
    _assert_same_model(tmp_path / "run", _train_alone(tmp_path, f"{SMALL} --num_epochs {num_epochs}"))


@pytest.mark.thorough
def test_slots_of_one_host_are_taken_away_and_given_back(tmp_path: Path) -> None:
    """The literal command, without further options."""
    with elastic_job(tmp_path, ["localhost:3"], f"{SMALL} --num_epochs 1000") as job:
        job.wait_for_updates()
        first = job.workers()
        job.find_hosts(["localhost:2"])
        job.wait_until(lambda: len(job.workers()) == 2 and job.generations == [3, 2])
        survivors = job.workers()
        assert survivors < first
        job.wait_for_updates()
        job.find_hosts(["localhost:3"])
        job.wait_until(lambda: job.generations == [3, 2, 3])
        job.wait_for_updates()
        assert survivors < job.workers()
        num_updates = job.stop()
    assert job.said.count("the job goes on without this worker: localhost[2]") == 1
    _assert_exact(tmp_path, num_updates)


def test_a_killed_worker_is_started_again_and_every_sample_counts_once(tmp_path: Path) -> None:
    """Rank 0, which writes the metrics and the checkpoints."""
    with elastic_job(tmp_path, ["localhost:3"], f"{SMALL} --num_epochs 1000") as job:
        job.wait_for_updates()
        os.kill(_root_of(tmp_path / "run"), signal.SIGKILL)
        job.wait_until(lambda: job.generations == [3, 3])
        job.wait_for_updates()
        num_updates = job.stop()
    _assert_exact(tmp_path, num_updates)


@pytest.mark.thorough
def test_what_would_change_with_the_workers_is_refused(tmp_path: Path) -> None:
    with elastic_job(tmp_path, HOSTS, "--parallel zero1") as job:
        assert job.process.wait(60 * slowness()) == 2
    assert job.said.count("lockstep: ") == 1
    assert "parallel is zero1: a lost worker would take its part of the model with it" in job.said
    assert not (tmp_path / "run").exists()


def _over_gloo(settings: str, folder: Path) -> Finished:
    return launch(f"horovodrun --gloo -np 2 python {TRAIN} {settings}", cwd=folder)


@pytest.fixture(scope="module")
def one_epoch_alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on one rank."""
    return _train_alone(tmp_path_factory.mktemp("alone"), f"{SMALL} --num_epochs 1")


@pytest.mark.thorough
@pytest.mark.parametrize("strategy", ["replicated", "zero3"])
def test_ranks_train_over_gloo_without_mpi(strategy: str, one_epoch_alone: Path, tmp_path: Path) -> None:
    finished = _over_gloo(f"{SMALL} --num_epochs 1 --parallel {strategy} --run_dir run", tmp_path)
    assert finished.returncode == 0, finished.output
    assert "2 rank(s) on 1 node(s)" in finished.stdout
    _assert_exact(tmp_path, UPDATES_PER_EPOCH)
    _assert_same_model(tmp_path / "run", one_epoch_alone)


@pytest.mark.thorough
def test_a_mistake_over_gloo_is_told_once_with_its_exit_code(tmp_path: Path) -> None:
    finished = _over_gloo("--parallel pipeline", tmp_path)
    assert finished.returncode == 2, finished.output
    assert finished.stderr.count("lockstep:") == 1
    assert "needs MPI: start this with mpirun, or with horovodrun without --gloo" in finished.stderr


def _root_of(run: Path) -> int:
    """The process of rank 0."""
    ranks: list[dict[str, Any]] = json.loads((run / "environment.json").read_text())["ranks"]
    return int(ranks[0]["pid"])
