"""Ends a stall with a verdict: which rank was at what, who waited for it, and everybody's Python stacks.

Each rank has a thread that looks for signs of life of its own main thread. In a stall all ranks fall silent, one at
whatever keeps it and the others in a collective, so every rank that still can notices by itself, and no message is
needed, which might not come through. The first of them to claim the verdict speaks and aborts the job.
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
from lockstep.runtime.errors import ExitCode
from lockstep.runtime.flight_recorder import FlightRecorder, Heartbeat, read_heartbeats, record_path
from lockstep.runtime.hints import suggest

VERDICT = "verdict.txt"
GONE = "gone"
BAD_STATES = {psutil.STATUS_STOPPED: "stopped", psutil.STATUS_DISK_SLEEP: "waiting-for-a-disk"}
SECONDS_TO_START = 120.0  # the least that is allowed until the first update: libraries may come from a slow disk
SECONDS_A_LOOK = 0.5
SECONDS_FOR_THE_OTHERS = (
    1.0  # between noticing a stall and the verdict: the others notice, too, and their stacks appear
)
SECONDS_TO_ABORT = 2.0  # after which a rank that the launcher does not reach ends itself
SECONDS_AT_MOST = 10.0  # from noticing a stall to this rank's end


class Watchdog:
    """Watches this rank's main thread from another one, until it is closed.

    A thread that looks every second counts what it has seen itself: a process that was stopped as a whole, by Ctrl-Z or
    a sleeping laptop, is not taken for one that hangs.
    """

    def __init__(
        self,
        recorder: FlightRecorder,
        folder: Path,
        rank: int,
        size: int,
        limit_seconds: float,
        abort: Callable[[int], None],
    ) -> None:
        """
        Args:
            folder: for the records of all ranks; it is there, and empty.
            limit_seconds: without a sign of life; 0: do not watch, but record.
            abort: ends every rank of the job with an exit code.

        Raises:
            OSError: the record cannot be made.
        """
        self._recorder, self._folder = recorder, folder
        self._rank = rank
        self._limit = limit_seconds
        self._abort = abort
        self._closed = threading.Event()
        recorder.keep_in(record_path(folder, rank), rank, size)
        self._stacks = record_path(folder, rank).with_suffix(".stacks").open("w")
        # Without Python's help, so that a thread which hangs in a library is shown, too.
        faulthandler.register(signal.SIGUSR2, file=self._stacks, all_threads=True)
        if limit_seconds:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def close(self) -> None:
        """The run is over: nothing is a stall any more."""
        self._closed.set()
        self._recorder.enter("leaving")

    def _watch(self) -> None:
        look = min(SECONDS_A_LOOK, self._limit / 10)
        num_events, seconds_silent = -1, 0.0
        while not self._closed.wait(look):
            if self._recorder.num_events != num_events:
                num_events, seconds_silent = self._recorder.num_events, 0.0
            else:
                seconds_silent += look
            limit = max(self._limit, SECONDS_TO_START) if self._recorder.is_starting else self._limit
            if seconds_silent >= limit:
                self._end_stall()
                return

    def _end_stall(self) -> None:
        last_resort = threading.Timer(SECONDS_AT_MOST, os._exit, (ExitCode.STALLED,))  # if the folder hangs, too
        last_resort.daemon = True
        last_resort.start()
        faulthandler.dump_traceback(self._stacks, all_threads=True)
        here = platform.node()
        node_mates = [beat for beat in read_heartbeats(self._folder) if beat.host == here]
        states = {beat.rank: bad_state(beat.pid, record_path(self._folder, beat.rank)) for beat in node_mates}
        self._recorder.notice(" ".join(f"{rank}:{state}" for rank, state in states.items() if state))
        time.sleep(SECONDS_FOR_THE_OTHERS + 0.1 * math.log2(1 + self._rank))
        heartbeats = read_heartbeats(self._folder)
        is_first_here = self._rank <= min((b.rank for b in heartbeats if b.noticed and b.host == here), default=0)
        if is_first_here:
            for beat in heartbeats:
                if beat.host == here and not beat.noticed and states.get(beat.rank) is None:
                    with suppress(OSError):
                        os.kill(beat.pid, signal.SIGUSR2)  # its Python cannot do it
        text = verdict(heartbeats, time.time())
        if claims := self._claim():
            with suppress(OSError):
                (self._folder / VERDICT).write_text(text + "\n")
            self._tell(text)
            # Not in this thread: an abort that finds the network cut does not come back.
            threading.Thread(target=self._abort, args=(ExitCode.STALLED,), daemon=True).start()
        time.sleep(SECONDS_TO_ABORT)
        if is_first_here and not claims:  # that rank's abort did not come through, and neither may its words
            self._tell(text)
        os._exit(ExitCode.STALLED)

    def _tell(self, text: str) -> None:
        postmortem = suggest("postmortem", self._folder.parent)
        where = f"Python stacks: {self._folder}/rank*.stacks; what each rank was at: {postmortem}"
        print(f"lockstep: {text}\n{where}", file=sys.stderr, flush=True)

    def _claim(self) -> bool:
        """This rank is the one that speaks."""
        try:
            (self._folder / VERDICT).open("x").close()
        except FileExistsError:
            return False
        except OSError:  # a folder that is out of reach: better twice than never
            return True
        return True


def bad_state(pid: int, record: Path) -> str | None:
    """Why process `pid` cannot be getting on; None if it may. One that has not mapped `record` is another process."""
    try:
        if str(record.resolve()) not in Path(f"/proc/{pid}/maps").read_text():
            return GONE
        return BAD_STATES.get(psutil.Process(pid).status())
    except (OSError, psutil.Error):
        return GONE


def verdict(heartbeats: Sequence[Heartbeat], now: float) -> str:
    """For people: the ranks that keep the others waiting, at what and for how long; then who waits for them.

    Args:
        heartbeats: of the ranks that have left one, after a stall was noticed.
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
    """What a rank is at."""
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
