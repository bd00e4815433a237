"""Progress a person can follow: numbered lines with seconds, a log a step, and a failure that says what to do."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

# What a log says when a well-known cause is behind a failure: (pattern, why, what to do). The first match counts.
KNOWN_CAUSES = (
    (r"No space left on device|Disk quota exceeded", "the disk or a quota is full",
     "free some space, or point LOCKSTEP_VENV, LOCKSTEP_CACHE and TMPDIR to a larger file system"),
    (r"NewConnectionError|NameResolutionError|Name or service not known|Temporary failure in name resolution"
     r"|Network is unreachable|ConnectTimeoutError|ConnectTimeout|ProxyError|Connection refused"
     r"|Could not find a version|No matching distribution",
     "the Python package index cannot be reached, or does not hold this version",
     "run env/setup on a machine with network (a login node); name a mirror in pip.conf or PIP_INDEX_URL"),
    (r"CERTIFICATE_VERIFY_FAILED|SSLError", "the package index's certificate is not trusted",
     "name the site's certificates: PIP_CERT=/path/to/ca.crt env/setup"),
    (r"DO NOT MATCH THE HASHES", "a downloaded file is not the one in env/requirements.lock",
     "empty pip's cache (pip cache purge) and call env/setup again; if it stays, the mirror is not to be trusted"),
    (r"Killed signal terminated program|fatal error: Killed", "the compiler ran out of memory",
     "compile one file at a time: MAKEFLAGS=-j1 env/setup"),
    (r"unsupported GNU version|unsupported host compiler", "this nvcc does not take this g++",
     "load an older g++ (CXX=g++-12 CC=gcc-12 env/setup), a newer CUDA, or build without: CUDA_HOME=none env/setup"),
    (r"Cannot compile MPI programs|Could NOT find MPI", "the compiler wrapper of this MPI does not work",
     "try it: mpicxx --version; load the MPI's module again, or another MPI"),
    (r"Python\.h: No such file", "Python's headers are missing",
     "install them (Debian: python3-dev), or name another Python: LOCKSTEP_PYTHON=/path/to/python3 env/setup"),
    (r"PermissionError|NotADirectoryError|FileExistsError|Read-only file system", "env/setup cannot write there",
     "name folders of your own: LOCKSTEP_VENV (the environment), LOCKSTEP_CACHE (compiled wheels), TMPDIR"),
)  # fmt: skip

NOTHING_TO_SAY = re.compile(r"^\s*$|^WARNING: Location|^\s+(\[end of output\]|note: )|^hint:")

# Lines of pip and CMake that name what is at work; between them stand compilers' commands and warnings.
GETTING_ON = re.compile(
    r"\[ *\d+%\]|(Collecting|Downloading|Using cached|Processing|Building|Installing|Successfully) "
)

SECONDS_OF_SILENCE = 10.0


class SetupError(Exception):
    """A step cannot go on: why, and what the person can do about it.

    Attributes:
        quotes: lines of the log tell a person more.
    """

    def __init__(self, why: str, fix: str, log: Path | None = None, quotes: bool = True) -> None:
        super().__init__(why)
        self.why, self.fix, self.log, self.quotes = why, fix, log, quotes


@dataclass
class _Said:
    """What stands on stderr by now."""

    line_is_open: bool = False
    last: float = 0.0  # when anything was said ...
    last_news: float = 0.0  # ... and when it was more than that something goes on


_said = _Said()
_saying = threading.RLock()


def say(text: str, end: str = "\n") -> None:
    # stderr, because env/run builds a missing environment in front of a command whose stdout belongs to the user.
    with _saying:
        print(text, end=end, file=sys.stderr, flush=True)
        _said.line_is_open = not end
        _said.last = _said.last_news = time.monotonic()


@contextmanager
def never_silent(seconds: float = SECONDS_OF_SILENCE) -> Iterator[None]:
    """While the body runs, no more than `seconds` pass without a plain line: how long it takes by now, and what the
    command at work has said last."""
    over = threading.Event()
    _said.last = _said.last_news = time.monotonic()

    def speak() -> None:
        while not over.wait(min(seconds, 1.0) / 4):
            with _saying:
                news, now = _said.last_news, time.monotonic()
                if now - _said.last >= seconds:
                    opened = "\n" if _said.line_is_open else ""
                    say(f"{opened}      {now - news:4.0f} s  {what_goes_on()}".rstrip())
                    _said.last_news = news

    thread = threading.Thread(target=speak, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


@dataclass
class Steps:
    """Prints `[2/6] title ... 12 s`, or `... ready` for what an earlier call has left complete."""

    total: int
    number: int = 0
    title: str = ""

    @contextmanager
    def step(self, title: str, ready: bool = False) -> Iterator[None]:
        """One numbered step. A body that runs under `ready` should have nothing left to do."""
        self.number, self.title = self.number + 1, title
        say(f"[{self.number}/{self.total}] {title} ... ", end="")
        start = time.monotonic()
        try:
            yield
        except BaseException:
            self._end(f"failed after {time.monotonic() - start:.0f} s")
            raise
        self._end("ready" if ready else f"{time.monotonic() - start:.0f} s")

    def _end(self, how: str) -> None:
        """Behind the title, or on a line of its own if others have come between."""
        say(how if _said.line_is_open else f"[{self.number}/{self.total}] {how}")

    def report(self, error: SetupError) -> None:
        """Which step failed, why, and what to do."""
        step = f"in step {self.number}/{self.total} ({self.title})" if self.number else "before its first step"
        say(f"\nenv/setup stopped {step}.\n  why:  {error.why}")
        if error.log:
            for line in last_useful_lines(error.log) if error.quotes else []:
                say(f"        | {line}")
            say(f"  log:  {error.log}")
        say(f"  do:   {error.fix}\n        Then call env/setup again: it goes on from here.")


def last_output(log: Path) -> str:
    """What the last command in a log has said; the log also holds earlier commands, and earlier attempts."""
    return log.read_text(errors="replace").rpartition("\n$ ")[2]


def last_useful_lines(log: Path, count: int = 8) -> list[str]:
    """The lines that most likely tell the cause: the first compiler or CMake error, else the last lines."""
    lines = [line.rstrip()[:200] for line in last_output(log).splitlines()]
    lines = [line for line in lines if not NOTHING_TO_SAY.search(line)]
    errors = [i for i, line in enumerate(lines) if re.search(r"\berror:|CMake Error|fatal error|^ERROR", line)]
    return lines[errors[0] : errors[0] + count] if errors else lines[-count:]


def diagnose(log: Path) -> tuple[str, str] | None:
    """Why, and what to do, if the log shows one of the well-known causes."""
    return find_cause(last_output(log))


def find_cause(text: str) -> tuple[str, str] | None:
    return next(((why, fix) for pattern, why, fix in KNOWN_CAUSES if re.search(pattern, text)), None)


def unexpected(error: Exception, folder: Path) -> SetupError:
    """What to tell of an error that nobody thought of. Its traceback goes into a log in `folder`, or, where nothing can
    be written, in the folder for temporary files."""
    text = f"\n$ env/setup, {time.strftime('%Y-%m-%d %H:%M:%S')}\n{''.join(traceback.format_exception(error))}"
    ours = [f for f in traceback.extract_tb(error.__traceback__) if Path(f.filename).parent == Path(__file__).parent]
    where = f" (env/{Path(ours[-1].filename).name}, line {ours[-1].lineno})" if ours else ""
    cause = f"{type(error).__name__}: {error}{where}"
    why, fix = find_cause(text) or ("an error that env/setup did not expect", "see the log, which tells more")
    other = Path(os.environ.get("TMPDIR") or "/tmp") / f"lockstep-setup-{os.getpid()}.log"
    for log in (folder / "setup.log", other):
        with suppress(OSError):
            log.parent.mkdir(parents=True, exist_ok=True)
            with log.open("a") as file:
                file.write(text)
            return SetupError(f"{why}: {cause}", fix, log, quotes=False)
    return SetupError(f"{why}: {cause}", fix)


_running: dict[subprocess.Popen[bytes], Path] = {}


def what_goes_on() -> str:
    """The last line of the command at work that has said something last, cut to the width of a terminal."""
    with suppress(OSError, ValueError):
        log = max(list(_running.values()), key=lambda log: log.stat().st_mtime)
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - 65536))
            lines = file.read().decode(errors="replace").splitlines()
        said = [line.strip()[:100] for line in lines if not NOTHING_TO_SAY.search(line)]
        return ([line for line in said if GETTING_ON.match(line)] or said or [""])[-1]
    return ""


def run_logged(command: Sequence[str | Path], log: Path, env: Mapping[str, str], cwd: Path | None = None) -> None:
    """Run a command with its output in `log`. Raises `SetupError` if it fails."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output:
        output.write(f"\n$ {' '.join(map(str, command))}\n".encode())
        output.flush()
        # A session of its own, so that `stop_all` ends a compiler with everything it has started.
        process = subprocess.Popen(
            [str(part) for part in command], stdin=subprocess.DEVNULL, stdout=output, stderr=output,
            env=dict(env), cwd=cwd, start_new_session=True,
        )  # fmt: skip
        _running[process] = log
        try:
            code = process.wait()
        finally:
            _running.pop(process, None)
    if code != 0:
        why, fix = diagnose(log) or (f"a command ended with exit code {code}", "see the log")
        raise SetupError(why, fix, log)


def stop_all() -> None:
    """End what still runs: the other half of a parallel step, or everything after Ctrl-C."""
    for process in list(_running):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
