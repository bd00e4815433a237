"""Certifies that a run which is killed and resumed equals one that never stopped. Starts its own ranks.

    env/run lockstep verify --resume                                two ranks, one kill
    env/run lockstep verify --resume --ranks 2,3,1                  another number of ranks after each kill
    env/run lockstep verify --resume --ranks 3,3 -- --optimizer.name adam

Everything after -- is a setting of app/train.py. The reference run trains without a stop on the first number of ranks.
In the other run, all ranks are killed with SIGKILL in mid-epoch, once for each further number, and the run is resumed
from its last checkpoint. If the number of ranks stays the same, everything must be identical; otherwise, in float64 and
without dropout (whose masks differ by rank), the runs must agree within rounding.
"""

import argparse
import contextlib
import json
import os
import random
import shlex
import signal
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
from lockstep.runtime.command_line import command_parser
from lockstep.runtime.errors import LockstepError, NonFiniteError, ReplicasDifferError
from lockstep.runtime.flight_recorder import FOLDER as RECORDER
from lockstep.runtime.flight_recorder import Heartbeat, read_heartbeats
from lockstep.settings.reading import SETTINGS_FILE, load_settings
from lockstep.training.checkpoint import Checkpoint, latest_checkpoint, list_checkpoints
from lockstep.training.progress import Progress
from lockstep.training.run_folder import HISTORY
from lockstep.training.sample_ledger import find_gaps, ledger_digest, read_ledger

TRAIN = ["-m", "lockstep", "train"]
INTERVAL = 20
SETTINGS = f"--num_epochs 2 --checkpoint.interval {INTERVAL} --checks.ledger true --optimizer.weight_decay 0.01"
SETTINGS_ACROSS = "--precision float64 --model.dropout1 0 --model.dropout2 0"
ROUNDING = 1e-9  # relative to the largest element: float64 sums in another order, accumulated over all updates
ATTEMPT_TIMEOUT_SECONDS = 600


def certify_resuming() -> None:
    """Raises ReplicasDifferError if the two runs differ."""
    arguments = _parse_args()
    ranks: list[int] = arguments.ranks
    same = len(set(ranks)) == 1
    random_number = random.Random(arguments.seed)
    settings = shlex.split(SETTINGS if same else f"{SETTINGS} {SETTINGS_ACROSS}") + arguments.settings
    with TemporaryDirectory(prefix="lockstep-certificate-") as folder:
        reference, resumed = Path(folder) / "reference", Path(folder) / "resumed"
        print(f"the run without a stop: {ranks[0]} rank(s)", flush=True)
        _train(arguments.launcher, ranks[0], reference, settings)
        num_updates = _last_checkpoint(reference).step
        updates_per_epoch = num_updates // load_settings(reference / SETTINGS_FILE).num_epochs
        for index, num_ranks in enumerate(ranks):
            resume = ["--resume"] if index else []
            kill = None
            if index + 1 < len(ranks):
                earliest = (index + 1) * num_updates // len(ranks)
                kill = Kill(
                    earliest + random_number.randrange(num_updates // (2 * len(ranks)) + 1),
                    num_updates,
                    updates_per_epoch,
                )
            _train(arguments.launcher, num_ranks, resumed, [*settings, *resume], kill)
        _certify(reference, resumed, same, len(ranks))


@dataclass(frozen=True)
class Kill:
    """When to kill a run: after `after` updates or more, and in mid-epoch."""

    after: int
    num_updates: int
    updates_per_epoch: int

    def is_now(self, beat: Heartbeat) -> bool:
        """Whether a rank with this heartbeat has done `after` updates, has some left, and is in mid-epoch.

        Not in the last update of an epoch, which might be over when the signal arrives.
        """
        done = beat.update - 1
        of_epoch, num_of_epoch = done % self.updates_per_epoch, self.updates_per_epoch
        is_between_epochs = num_of_epoch > 1 and (of_epoch == 0 or (num_of_epoch > 2 and of_epoch == num_of_epoch - 1))
        is_late_enough = max(self.after, 1) <= done < self.num_updates
        return is_late_enough and not is_between_epochs and beat.phase not in ("evaluation", "merging")


def _parse_args() -> argparse.Namespace:
    parser = command_parser("verify --resume", __doc__)
    parser.add_argument("--resume", action="store_true", required=True, help="certify resuming")
    parser.add_argument(
        "--ranks",
        type=_numbers_of_ranks,
        default=[2, 2],
        help="the number of ranks before the first kill, after it, ... (default: 2,2)",
    )
    parser.add_argument("--launcher", default="mpirun -np {ranks}", help="how ranks are started (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the times of the kills (default: 0)")
    parser.add_argument("settings", nargs="*", help="settings of app/train.py, after --")
    return parser.parse_args()


def _numbers_of_ranks(text: str) -> list[int]:
    ranks = [int(number) if number.strip().isdecimal() else 0 for number in text.split(",")]
    if len(ranks) < 2 or 0 in ranks:
        message = f"{text} is not two or more numbers of ranks, such as 2,2: a kill lies between each and the next"
        raise argparse.ArgumentTypeError(message)
    return ranks


def _train(launcher: str, num_ranks: int, run: Path, settings: list[str], kill: Kill | None = None) -> None:
    """Train to the end, or until all ranks are killed at `kill`."""
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
            elif _wait_for_kill(process, run, num_ranks, began, kill):
                killed = sum(_kill_rank(beat.pid, run) for beat in read_heartbeats(run / RECORDER))
                beats = read_heartbeats(run / RECORDER)
                print(f"killed: {killed} rank(s) in update {max(beat.update for beat in beats)}", flush=True)
                if not all(map(kill.is_now, beats)):
                    raise LockstepError("the kill came when an epoch was over: try another --seed")
                if killed == num_ranks:
                    process.wait(timeout=60)
                    return
        except psutil.TimeoutExpired:
            pass
        finally:
            _kill_ranks(process)
        output.seek(0)
        raise LockstepError(f"{shlex.join(command)} ended with {process.poll()}:\n{output.read()[-3000:]}")


def _wait_for_kill(process: psutil.Popen, run: Path, num_ranks: int, began: float, kill: Kill) -> bool:
    """Wait until `kill` is due on every rank and there is a checkpoint to resume from; False if `process` ends first.

    Args:
        began: when `process` was started, in seconds since 1970.
    """
    deadline = time.monotonic() + ATTEMPT_TIMEOUT_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        # Older heartbeats are those of the previous attempt; the ranks replace them as they start.
        beats = [beat for beat in read_heartbeats(run / RECORDER) if beat.since >= began]
        if len(beats) == num_ranks and all(map(kill.is_now, beats)) and list_checkpoints(run):
            return True
        time.sleep(0.005)
    return False


def _kill_rank(pid: int, run: Path) -> bool:
    """Send SIGKILL to process `pid`, if it trains `run` on this machine; return whether it does."""
    with contextlib.suppress(OSError):
        if os.fsencode(run) in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0"):
            os.kill(pid, signal.SIGKILL)
            return True
    return False


def _kill_ranks(process: psutil.Popen) -> None:
    """Send SIGKILL to every rank that `process` has started."""
    with contextlib.suppress(psutil.NoSuchProcess):
        for child in [*process.children(recursive=True), process]:
            with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
                if child.cmdline()[1:4] == TRAIN:
                    child.kill()


def _last_checkpoint(run: Path) -> Checkpoint:
    checkpoint = latest_checkpoint(run, tell=print)
    if checkpoint is None:
        raise LockstepError(f"{run} has no checkpoint")
    return checkpoint


def _certify(reference: Path, resumed: Path, same: bool, num_attempts: int) -> None:
    """Print every comparison. Raises ReplicasDifferError if one fails."""
    checkpoints = [_last_checkpoint(run) for run in (reference, resumed)]
    states = [checkpoint.load() for checkpoint in checkpoints]
    passed = [_print_attempts(resumed, num_attempts, checkpoints[0].step)]
    for state in states:
        _check_finite(state)
    for what, prefix in {"model": "model/", "optimizer": "optimizer/"}.items():
        parts = [{name: tensor for name, tensor in state.items() if name.startswith(prefix)} for state in states]
        passed.append(_compare_tensors(what, parts[0], parts[1], same))
    if same:
        random_states = [str(checkpoint.counters["random_state_of_ranks"]) for checkpoint in checkpoints]
        passed.append(_print_hashes("random states", content_hash(random_states[0]), content_hash(random_states[1])))
        metrics = [(run / "metrics.jsonl").read_text() for run in (reference, resumed)]
        passed.append(_print_hashes("metrics.jsonl", content_hash(metrics[0]), content_hash(metrics[1])))
        passed.append(_print_hashes("data ledger", ledger_digest(reference), ledger_digest(resumed)))
    accounts = read_ledger(resumed)
    progress = Progress(**checkpoints[1].counters["progress"])
    is_complete = not find_gaps(resumed, progress.step, progress.num_samples)
    is_exact = bool(accounts) and all(account.is_exact for account in accounts)
    passed.append(is_complete and is_exact and len(accounts) == len(read_ledger(reference)))
    epochs = ", ".join(f"epoch {account.epoch}: {account.num_used}/{account.num_samples}" for account in accounts)
    print(f"{'ledger':14} {epochs}: {'each sample exactly once' if passed[-1] else 'NOT each sample exactly once'}")
    if not all(passed):
        raise ReplicasDifferError("the resumed run does NOT equal the run without a stop")
    print(f"CERTIFIED: {'identical' if same else f'equal within {ROUNDING:g}'} after {checkpoints[0].step} updates")


def _check_finite(state: dict[str, Tensor]) -> None:
    """Raises NonFiniteError if `state` has a NaN or infinity, which no comparison could certify."""
    if not any(name.startswith("model/") for name in state):
        raise LockstepError("the checkpoint holds no model: nothing can be certified")
    for name, tensor in state.items():
        if not bool(tensor.isfinite().all()):
            raise NonFiniteError(f"{name} is infinite or not a number: nothing can be certified of such a run")


def _print_attempts(resumed: Path, num_attempts: int, num_updates: int) -> bool:
    """Print where each attempt began; return whether all but the first resumed from a checkpoint, with updates left."""
    history = [json.loads(line) for line in (resumed / HISTORY).read_text().splitlines()]
    starts = [attempt["update"] for attempt in history]
    print(f"{'attempts':14} begun after updates {', '.join(map(str, starts))} of {num_updates}")
    return len(starts) == num_attempts and all(0 < start < num_updates for start in starts[1:])


def _compare_tensors(what: str, reference: dict[str, Tensor], resumed: dict[str, Tensor], same: bool) -> bool:
    """Print and return whether two states are identical if `same`, else equal within `ROUNDING`."""
    if same:
        return _print_hashes(
            what, *(content_hash(sorted((k, content_hash(v)) for k, v in s.items())) for s in (reference, resumed))
        )
    if reference.keys() != resumed.keys():
        print(f"{what:14} the two have different tensors")
        return False
    worst = 0.0
    for name, tensor in reference.items():
        if tensor.numel() == 0:
            continue
        difference = (resumed[name].double() - tensor.double()).abs().max()
        worst = max(worst, float(difference / tensor.double().abs().max().clamp_min(torch.finfo(torch.float64).tiny)))
    print(f"{what:14} largest difference {worst:.1e} of the largest element, in {len(reference)} tensors")
    return worst <= ROUNDING


def _print_hashes(what: str, reference: str, resumed: str) -> bool:
    print(f"{what:14} {reference[:16]} {resumed[:16]} {'identical' if reference == resumed else 'DIFFERENT'}")
    return reference == resumed
