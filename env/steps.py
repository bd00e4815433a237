"""Progress lines with times, a log for each step, and error messages with a fix."""

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

# Known causes of failures: (pattern in the log, why, what to do). The first match counts.
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
     "empty pip's cache (pip cache purge) and call env/setup again; if it happens again, do not trust the mirror"),
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

# Lines of pip and CMake that show progress, among the commands and warnings of compilers.
GETTING_ON = re.compile(
    r"\[ *\d+%\]|(Collecting|Downloading|Using cached|Processing|Building|Installing|Successfully) "
)

SECONDS_OF_SILENCE = 10.0


class SetupError(Exception):
    """The failure of a step: why, and what the user can do.

    Attributes:
        quotes: whether the message quotes lines of the log.
    """

    def __init__(self, why: str, fix: str, log: Path | None = None, quotes: bool = True) -> None:
        super().__init__(why)
        self.why, self.fix, self.log, self.quotes = why, fix, log, quotes


@dataclass
class _Said:
    """The state of the output on stderr."""

    line_is_open: bool = False
    last: float = 0.0  # time of the last line
    last_news: float = 0.0  # time of the last line that was not just a sign of progress


_said = _Said()
_saying = threading.RLock()


def say(text: str, end: str = "\n") -> None:
    # To stderr: env/run may build the environment before a command whose stdout belongs to the user.
    with _saying:
        print(text, end=end, file=sys.stderr, flush=True)
        _said.line_is_open = not end
        _said.last = _said.last_news = time.monotonic()


@contextmanager
def never_silent(seconds: float = SECONDS_OF_SILENCE) -> Iterator[None]:
    """Print a line at least every `seconds` while the body runs: the elapsed time and the last line of the running
    command."""
    over = threading.Event()
    _said.last = _said.last_news = time.monotonic()

    def speak() -> None:
        while not over.wait(min(seconds, 1.0) / 4):
            with _saying:
                news, now = _said.last_news, time.monotonic()
                if now - _said.last >= seconds:
                    opened = "\n" if _said.line_is_open else ""
                    say(f"{opened}      {now - news:4.0f} s  {last_progress()}".rstrip())
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
    """Prints `[2/6] title ... 12 s`, or `... ready` for a step that an earlier call has completed."""

    total: int
    number: int = 0
    title: str = ""

    @contextmanager
    def step(self, title: str, ready: bool = False) -> Iterator[None]:
        """Run the body as one numbered step. With `ready` it should have nothing to do."""
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
        """Print the end of a step after its title, or on a new line if other lines were printed since."""
        say(how if _said.line_is_open else f"[{self.number}/{self.total}] {how}")

    def report(self, error: SetupError) -> None:
        """Print which step failed, why, and what to do."""
        step = f"in step {self.number}/{self.total} ({self.title})" if self.number else "before its first step"
        say(f"\nenv/setup stopped {step}.\n  why:  {error.why}")
        if error.log:
            for line in last_useful_lines(error.log) if error.quotes else []:
                say(f"        | {line}")
            say(f"  log:  {error.log}")
        say(f"  do:   {error.fix}\n        Then call env/setup again: it continues from here.")


def last_output(log: Path) -> str:
    """Return the output of the last command in a log, which also has earlier commands and attempts."""
    return log.read_text(errors="replace").rpartition("\n$ ")[2]


def last_useful_lines(log: Path, count: int = 8) -> list[str]:
    """Return the lines that probably show the cause: from the first compiler or CMake error, or else the last ones."""
    lines = [line.rstrip()[:200] for line in last_output(log).splitlines()]
    lines = [line for line in lines if not NOTHING_TO_SAY.search(line)]
    errors = [i for i, line in enumerate(lines) if re.search(r"\berror:|CMake Error|fatal error|^ERROR", line)]
    return lines[errors[0] : errors[0] + count] if errors else lines[-count:]


def diagnose(log: Path) -> tuple[str, str] | None:
    """Return why a step failed and what to do, if the log shows a known cause."""
    return find_cause(last_output(log))


def find_cause(text: str) -> tuple[str, str] | None:
    return next(((why, fix) for pattern, why, fix in KNOWN_CAUSES if re.search(pattern, text)), None)


def unexpected(error: Exception, folder: Path) -> SetupError:
    """Turn an unexpected exception into a SetupError. Its traceback goes to a log in `folder`, or in the folder for
    temporary files if `folder` cannot be written."""
    text = f"\n$ env/setup, {time.strftime('%Y-%m-%d %H:%M:%S')}\n{''.join(traceback.format_exception(error))}"
    ours = [f for f in traceback.extract_tb(error.__traceback__) if Path(f.filename).parent == Path(__file__).parent]
    where = f" (env/{Path(ours[-1].filename).name}, line {ours[-1].lineno})" if ours else ""
    cause = f"{type(error).__name__}: {error}{where}"
    why, fix = find_cause(text) or ("an error that env/setup did not expect", "see the log for details")
    other = Path(os.environ.get("TMPDIR") or "/tmp") / f"lockstep-setup-{os.getpid()}.log"
    for log in (folder / "setup.log", other):
        with suppress(OSError):
            log.parent.mkdir(parents=True, exist_ok=True)
            with log.open("a") as file:
                file.write(text)
            return SetupError(f"{why}: {cause}", fix, log, quotes=False)
    return SetupError(f"{why}: {cause}", fix)


_running: dict[subprocess.Popen[bytes], Path] = {}


def last_progress() -> str:
    """Return the last line of output of the running commands, cut to the width of a terminal."""
    with suppress(OSError, ValueError):
        log = max(list(_running.values()), key=lambda log: log.stat().st_mtime)
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - 65536))
            lines = file.read().decode(errors="replace").splitlines()
        said = [line.strip()[:100] for line in lines if not NOTHING_TO_SAY.search(line)]
        return ([line for line in said if GETTING_ON.match(line)] or said or [""])[-1]
    return ""


def run_logged(command: Sequence[str | Path], log: Path, env: Mapping[str, str], cwd: Path | None = None) -> None:
    """Run a command with its output appended to `log`. Raises `SetupError` if it fails."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output:
        output.write(f"\n$ {' '.join(map(str, command))}\n".encode())
        output.flush()
        # In its own session, so that `stop_all` ends a compiler with all of its child processes.
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
    """End all running commands: after Ctrl-C, or if a parallel step has failed."""
    for process in list(_running):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
