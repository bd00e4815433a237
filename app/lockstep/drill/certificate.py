"""Certifies that a run which is killed and goes on is the run that never stopped. Starts its own ranks.

    env/run lockstep verify --resume                                two ranks, one kill
    env/run lockstep verify --resume --ranks 2,3,1                  another number of ranks after each kill
    env/run lockstep verify --resume --ranks 3,3 -- --optimizer.name adam

Everything after -- is a setting of app/train.py. The reference runs without a stop on the first number of ranks. The
other run has every rank killed with SIGKILL in mid-epoch once for each further number, and goes on from its last
checkpoint. On the same number of ranks throughout, all must be identical; else float64 without dropout (masks are drawn
rank by rank) must agree within rounding.
"""

import argparse
import contextlib
import json
import random
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil
import torch
from torch import Tensor

from lockstep.data.sharding import content_hash
from lockstep.runtime.errors import LockstepError, NonFiniteError, ReplicasDifferError
from lockstep.runtime.flight_recorder import FOLDER as RECORDER
from lockstep.runtime.flight_recorder import Heartbeat, read_heartbeats
from lockstep.settings.reading import SETTINGS_FILE, load_settings
from lockstep.training.checkpoint import Checkpoint, latest_checkpoint, list_checkpoints
from lockstep.training.position import Progress
from lockstep.training.run_folder import HISTORY
from lockstep.training.sample_ledger import find_gaps, ledger_digest, read_ledger

TRAIN = ["-m", "lockstep", "train"]
INTERVAL = 20
SETTINGS = f"--num_epochs 2 --checkpoint.interval {INTERVAL} --checks.ledger true --optimizer.weight_decay 0.01"
SETTINGS_ACROSS = "--precision float64 --model.dropout1 0 --model.dropout2 0"
ROUNDING = 1e-9  # of the largest element; float64 sums in another order, over all updates, momentum included
ATTEMPT_TIMEOUT_SECONDS = 600


def certify_resuming() -> None:
    """Raises ReplicasDifferError if the two runs differ."""
    arguments = _parse_args()
    ranks: list[int] = arguments.ranks
    same = len(set(ranks)) == 1
    moments = random.Random(arguments.seed)
    settings = shlex.split(SETTINGS if same else f"{SETTINGS} {SETTINGS_ACROSS}") + arguments.settings
    with TemporaryDirectory(prefix="lockstep-certificate-") as folder:
        never, stopped = Path(folder) / "never", Path(folder) / "stopped"
        print(f"the run that never stops: {ranks[0]} rank(s)", flush=True)
        _train(arguments.launcher, ranks[0], never, settings)
        num_updates = _last(never).step
        updates_per_epoch = num_updates // load_settings(never / SETTINGS_FILE).num_epochs
        for index, num_ranks in enumerate(ranks):
            again = ["--resume"] if index else []
            kill = None
            if index + 1 < len(ranks):
                earliest = (index + 1) * num_updates // len(ranks)
                kill = Kill(
                    earliest + moments.randrange(num_updates // (2 * len(ranks)) + 1), num_updates, updates_per_epoch
                )
            _train(arguments.launcher, num_ranks, stopped, [*settings, *again], kill)
        _certify(never, stopped, same, len(ranks))


@dataclass(frozen=True)
class Kill:
    """A kill in mid-epoch, once `after` updates are done or, where that moment is none, as soon as one is."""

    after: int
    num_updates: int
    updates_per_epoch: int

    def is_now(self, beat: Heartbeat) -> bool:
        """Whether this rank has done `after` updates, has some left to do, and is in the midst of an epoch."""
        done = beat.update - 1
        between = self.updates_per_epoch > 1 and done % self.updates_per_epoch == 0
        is_late_enough = max(self.after, 1) <= done < self.num_updates
        return is_late_enough and not between and beat.phase not in ("evaluation", "merging")


def _parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="lockstep verify --resume", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--resume", action="store_true", required=True, help="what is certified")
    parser.add_argument(
        "--ranks",
        type=_numbers_of_ranks,
        default=[2, 2],
        help="the number of ranks before the first kill, after it, ... (default: 2,2)",
    )
    parser.add_argument("--launcher", default="mpirun -np {ranks}", help="how ranks are started (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the kills (default: 0)")
    parser.add_argument("settings", nargs="*", help="settings of app/train.py, after --")
    return parser.parse_args()


def _numbers_of_ranks(text: str) -> list[int]:
    ranks = [int(number) if number.strip().isdecimal() else 0 for number in text.split(",")]
    if len(ranks) < 2 or 0 in ranks:
        message = f"{text} is not two or more numbers of ranks, such as 2,2: a kill lies between each and the next"
        raise argparse.ArgumentTypeError(message)
    return ranks


def _train(launcher: str, num_ranks: int, run: Path, settings: list[str], kill: Kill | None = None) -> None:
    """Train to the end, or to `kill`."""
    command = [
        *shlex.split(launcher.format(ranks=num_ranks)),
        sys.executable,
        *TRAIN,
        "--run_dir",
        str(run),
        *settings,
    ]
    with (run.parent / "output.txt").open("w+") as output:
        began = time.time()
        process = psutil.Popen(command, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
        try:
            if kill is None:
                if process.wait(timeout=ATTEMPT_TIMEOUT_SECONDS) == 0:
                    return
            elif _wait_for_moment(process, run, num_ranks, began, kill):
                killed = _kill_ranks(process)
                beats = read_heartbeats(run / RECORDER)
                print(f"killed: {killed} rank(s) in update {max(beat.update for beat in beats)}", flush=True)
                if any(beat.update > kill.num_updates for beat in beats):
                    raise LockstepError("the kill came when all updates were done: try another --seed")
                if killed == num_ranks:
                    process.wait(timeout=60)
                    return
        except psutil.TimeoutExpired:
            pass
        finally:
            _kill_ranks(process)
        output.seek(0)
        raise LockstepError(f"{shlex.join(command)} ended with {process.poll()}:\n{output.read()[-3000:]}")


def _wait_for_moment(process: psutil.Popen, run: Path, num_ranks: int, began: float, kill: Kill) -> bool:
    """Until every rank that `process` has started since `began` is where it is to be killed, and there is a checkpoint
    to go on from; False if `process` ends before that.
    """
    deadline = time.monotonic() + ATTEMPT_TIMEOUT_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        # the attempt before has left heartbeats too, which the ranks replace as they start
        beats = [beat for beat in read_heartbeats(run / RECORDER) if beat.since >= began]
        if len(beats) == num_ranks and all(map(kill.is_now, beats)) and list_checkpoints(run):
            return True
        time.sleep(0.005)
    return False


def _kill_ranks(process: psutil.Popen) -> int:
    """SIGKILL to every rank that `process` has started; how many there were."""
    num_killed = 0
    with contextlib.suppress(psutil.NoSuchProcess):
        for child in [*process.children(recursive=True), process]:
            with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
                if child.cmdline()[1:4] == TRAIN:
                    child.kill()
                    num_killed += 1
    return num_killed


def _last(run: Path) -> Checkpoint:
    checkpoint = latest_checkpoint(run, tell=print)
    if checkpoint is None:
        raise LockstepError(f"{run} has no checkpoint")
    return checkpoint


def _certify(never: Path, stopped: Path, same: bool, num_attempts: int) -> None:
    """Tell every comparison; raise if one fails."""
    checkpoints = [_last(run) for run in (never, stopped)]
    states = [checkpoint.load() for checkpoint in checkpoints]
    held = [_tell_kills(stopped, num_attempts, checkpoints[0].step)]
    for state in states:
        _check_finite(state)
    for what, prefix in {"model": "model/", "optimizer": "optimizer/"}.items():
        parts = [{name: tensor for name, tensor in state.items() if name.startswith(prefix)} for state in states]
        held.append(_compare_tensors(what, parts[0], parts[1], same))
    if same:
        random_states = [str(checkpoint.counters["random_state_of_ranks"]) for checkpoint in checkpoints]
        held.append(_tell("random states", content_hash(random_states[0]), content_hash(random_states[1])))
        metrics = [(run / "metrics.jsonl").read_text() for run in (never, stopped)]
        held.append(_tell("metrics.jsonl", content_hash(metrics[0]), content_hash(metrics[1])))
        held.append(_tell("data ledger", ledger_digest(never), ledger_digest(stopped)))
    accounts = read_ledger(stopped)
    progress = Progress(**checkpoints[1].counters["progress"])
    is_whole = not find_gaps(stopped, progress.step, progress.num_samples)
    is_exact = bool(accounts) and all(account.is_exact for account in accounts)
    held.append(is_whole and is_exact and len(accounts) == len(read_ledger(never)))
    epochs = ", ".join(f"epoch {account.epoch}: {account.num_used}/{account.num_samples}" for account in accounts)
    print(f"{'ledger':14} {epochs}: {'each sample exactly once' if held[-1] else 'NOT each sample exactly once'}")
    if not all(held):
        raise ReplicasDifferError("the run that was killed is NOT the run that never stopped")
    print(f"CERTIFIED: {'identical' if same else f'equal within {ROUNDING:g}'} after {checkpoints[0].step} updates")


def _check_finite(state: dict[str, Tensor]) -> None:
    """Raises NonFiniteError: numbers that are none are equal to nothing, and to everything."""
    if not any(name.startswith("model/") for name in state):
        raise LockstepError("the checkpoint holds no model: nothing can be certified")
    for name, tensor in state.items():
        if not bool(tensor.isfinite().all()):
            raise NonFiniteError(f"{name} is infinite or not a number: nothing can be certified of such a run")


def _tell_kills(stopped: Path, num_attempts: int, num_updates: int) -> bool:
    """Each attempt but the first went on from a checkpoint, and had updates left to do."""
    history = [json.loads(line) for line in (stopped / HISTORY).read_text().splitlines()]
    starts = [attempt["update"] for attempt in history]
    print(f"{'attempts':14} begun after updates {', '.join(map(str, starts))} of {num_updates}")
    return len(starts) == num_attempts and all(0 < start < num_updates for start in starts[1:])


def _compare_tensors(what: str, never: dict[str, Tensor], stopped: dict[str, Tensor], same: bool) -> bool:
    if same:
        return _tell(
            what, *(content_hash(sorted((k, content_hash(v)) for k, v in s.items())) for s in (never, stopped))
        )
    if never.keys() != stopped.keys():
        print(f"{what:14} the two have not the same tensors")
        return False
    worst = 0.0
    for name, tensor in never.items():
        if tensor.numel() == 0:
            continue
        difference = (stopped[name].double() - tensor.double()).abs().max()
        worst = max(worst, float(difference / tensor.double().abs().max().clamp_min(torch.finfo(torch.float64).tiny)))
    print(f"{what:14} largest difference {worst:.1e} of the largest element, in {len(never)} tensors")
    return worst <= ROUNDING


def _tell(what: str, never: str, stopped: str) -> bool:
    print(f"{what:14} {never[:16]} {stopped[:16]} {'identical' if never == stopped else 'DIFFERENT'}")
    return never == stopped
