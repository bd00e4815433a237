"""The watchdog ends a stalled job with a verdict: what each rank was doing, which ranks waited, and all Python stacks.

On each rank a thread watches the flight recorder of the main thread. When one rank stalls, the others stop in their
next collective. So every rank notices the stall by itself, without messages, which a broken network might not deliver.
The first rank to create the verdict's file prints the verdict and aborts the job.
"""

import faulthandler
import math
import os
import platform
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import psutil

from lockstep.runtime.affinity import format_cpus as format_ranks
from lockstep.runtime.command_line import suggest
from lockstep.runtime.errors import ExitCode
from lockstep.runtime.flight_recorder import FlightRecorder, Heartbeat, read_heartbeats, record_path

VERDICT = "verdict.txt"
GONE = "gone"
BAD_STATES = {psutil.STATUS_STOPPED: "stopped", psutil.STATUS_DISK_SLEEP: "waiting-for-a-disk"}
MIN_START_SECONDS = 120.0  # the limit until the first phase is at least this: libraries may come from a slow disk
POLL_SECONDS = 0.5
NOTICE_SECONDS = 1.0  # between noticing a stall and the verdict, for the other ranks to notice, too, and write stacks
ABORT_SECONDS = 2.0  # until a rank that the abort has not reached ends itself
MAX_SECONDS = 10.0  # from noticing a stall to this rank's end


class Watchdog:
    """Watches this rank's main thread from another thread, until it is closed.

    It adds up the time between its own polls rather than reading the clock: a process that was suspended as a whole, by
    Ctrl-Z or a sleeping laptop, does not count as stalled.
    """

    def __init__(
        self,
        recorder: FlightRecorder,
        folder: Path,
        rank: int,
        size: int,
        limit_seconds: float,
        abort: Callable[[int], None],
        raise_stall: Callable[[str], None] | None = None,
    ) -> None:
        """
        Args:
            folder: for the records of all ranks; exists and is empty.
            limit_seconds: how long the main thread may record nothing; 0: only record, do not watch.
            abort: called with an exit code, ends every rank of the job.
            raise_stall: called with the verdict instead of ending the job, where that is possible.

        Raises:
            OSError: the record's file cannot be made.
        """
        self._recorder, self._folder = recorder, folder
        self._rank = rank
        self._limit = limit_seconds
        self._abort = abort
        self._raise_stall = raise_stall
        self._closed = threading.Event()
        self._raising = threading.Lock()
        recorder.write_to(record_path(folder, rank), rank, size)
        self._stacks = record_path(folder, rank).with_suffix(".stacks").open("w")
        # A handler in C: it also shows a thread that hangs in a library and holds the interpreter's lock.
        faulthandler.register(signal.SIGUSR2, file=self._stacks, all_threads=True)
        if limit_seconds:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def close(self) -> None:
        """Stop watching: the run is over."""
        self._closed.set()
        with self._raising:  # no stall is raised from here on
            pass
        self._recorder.enter("leaving")
        if self._raise_stall is not None:  # the process goes on
            faulthandler.unregister(signal.SIGUSR2)
            self._stacks.close()
            self._recorder.close()

    def _watch(self) -> None:
        look = min(POLL_SECONDS, self._limit / 10)
        num_events, seconds_silent = -1, 0.0
        while not self._closed.wait(look):
            if self._recorder.num_events != num_events:
                num_events, seconds_silent = self._recorder.num_events, 0.0
            else:
                seconds_silent += look
            limit = max(self._limit, MIN_START_SECONDS) if self._recorder.is_starting else self._limit
            if seconds_silent >= limit:
                if self._raise_stall is None:
                    self._end_stall()
                    return
                self._tell_stall(self._raise_stall)
                seconds_silent = 0.0  # once more, if the main thread hangs in a library or swallows the error

    def _tell_stall(self, raise_stall: Callable[[str], None]) -> None:
        """Print the verdict and raise it in the main thread, which a hang in a library delays until it returns."""
        with self._raising:
            if self._closed.is_set():
                return
            faulthandler.dump_traceback(self._stacks, all_threads=True)
            self._recorder.record_stall("")
            text = verdict(read_heartbeats(self._folder), time.time())
            with suppress(OSError):
                (self._folder / VERDICT).write_text(text + "\n")
            self._tell(text)
            raise_stall(text)

    def _end_stall(self) -> None:
        last_resort = threading.Timer(MAX_SECONDS, os._exit, (ExitCode.STALLED,))  # if the file system hangs, too
        last_resort.daemon = True
        last_resort.start()
        faulthandler.dump_traceback(self._stacks, all_threads=True)
        here = platform.node()
        beats_here = [beat for beat in read_heartbeats(self._folder) if beat.host == here]
        states = {beat.rank: bad_state(beat.pid, record_path(self._folder, beat.rank)) for beat in beats_here}
        self._recorder.record_stall(" ".join(f"{rank}:{state}" for rank, state in states.items() if state))
        time.sleep(NOTICE_SECONDS + 0.1 * math.log2(1 + self._rank))
        heartbeats = read_heartbeats(self._folder)
        is_first_here = self._rank <= min((b.rank for b in heartbeats if b.noticed and b.host == here), default=0)
        if is_first_here:
            for beat in heartbeats:
                if beat.host == here and not beat.noticed and states.get(beat.rank) is None:
                    with suppress(OSError):
                        os.kill(beat.pid, signal.SIGUSR2)  # its own watchdog cannot run
        text = verdict(heartbeats, time.time())
        if claims := self._claim():
            with suppress(OSError):
                (self._folder / VERDICT).write_text(text + "\n")
            self._tell(text)
            # In a thread of its own: an abort does not return if the network is cut.
            threading.Thread(target=self._abort, args=(ExitCode.STALLED,), daemon=True).start()
        time.sleep(ABORT_SECONDS)
        if is_first_here and not claims:  # its abort did not reach this node, and perhaps neither did its message
            self._tell(text)
        os._exit(ExitCode.STALLED)

    def _tell(self, text: str) -> None:
        postmortem = suggest("postmortem", self._folder.parent)
        where = f"Python stacks: {self._folder}/rank*.stacks; what each rank was at: {postmortem}"
        print(f"lockstep: {text}\n{where}", file=sys.stderr, flush=True)

    def _claim(self) -> bool:
        """Whether this rank is to print the verdict: it has created the file before all others."""
        try:
            (self._folder / VERDICT).open("x").close()
        except FileExistsError:
            return False
        except OSError:  # the folder is out of reach: better printed twice than never
            return True
        return True


def bad_state(pid: int, record: Path) -> str | None:
    """Why process `pid` cannot run: gone, stopped or waiting for a disk; None if it can.

    A process that has not mapped the file `record` is another one that has been given the same number.
    """
    try:
        if str(record.resolve()) not in Path(f"/proc/{pid}/maps").read_text():
            return GONE
        return BAD_STATES.get(psutil.Process(pid).status())
    except (OSError, psutil.Error):
        return GONE


def verdict(heartbeats: Sequence[Heartbeat], now: float) -> str:
    """Describe a stall: which ranks the others wait for, what they do and for how long; then the ranks that wait.

    Args:
        heartbeats: of all ranks that have a record, read after the stall was noticed.
        now: seconds since the epoch.
    """
    if not heartbeats:
        return "the job stalls, and no rank has left a record"
    states = dict(word.split(":", 1) for beat in heartbeats for word in beat.seen.split())
    noticed_on = {beat.host for beat in heartbeats if beat.noticed}
    told: dict[str, list[Heartbeat]] = {}
    waiting: dict[str, list[Heartbeat]] = {}
    for beat in heartbeats:
        place = position(beat)
        if state := states.get(str(beat.rank)):
            told.setdefault(f"process {beat.pid} on {beat.host} is {state.replace('-', ' ')}, in {place}", []).append(
                beat
            )
        elif beat.host not in noticed_on:
            told.setdefault(f"no sign of {beat.host}, which is stopped, gone or cut off; it was in {place}", []).append(
                beat
            )
        else:
            (waiting if beat.is_waiting else told).setdefault(place, []).append(beat)
    silent = sorted(set(range(heartbeats[0].size)) - {beat.rank for beat in heartbeats})
    lines = [f"{_ranks(beats)}: {what} for {_longest(beats, now)}" for what, beats in told.items()]
    lines += [f"{_name(silent)}: no record at all"] if silent else []
    lines += [f"{_ranks(beats)} {_verb(beats)} in {what} for {_longest(beats, now)}" for what, beats in waiting.items()]
    if not told and not silent:
        stuck = (
            "all are there, and nothing comes through: the network between the nodes, or the library's thread, is stuck"
        )
        lines.append("they are in different collectives" if len(waiting) > 1 else stuck)
    return "the job stalled. " + "; ".join(lines)


def position(beat: Heartbeat) -> str:
    """The collective in which a rank waits, or else its phase; with the update."""
    return f"{beat.collective if beat.is_waiting else beat.phase}" + (
        f" of update {beat.update}" if beat.update else ""
    )


def _ranks(beats: Sequence[Heartbeat]) -> str:
    return _name([beat.rank for beat in beats])


def _name(ranks: Sequence[int]) -> str:
    return f"{'rank' if len(ranks) == 1 else 'ranks'} {format_ranks(ranks)}"


def _verb(beats: Sequence[Heartbeat]) -> str:
    return "waits" if len(beats) == 1 else "wait"


def _longest(beats: Sequence[Heartbeat], now: float) -> str:
    return f"{max(now - beat.since for beat in beats):.0f} s"
