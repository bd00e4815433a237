"""What a person sees: in a narrow terminal, without colours, in a file."""

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from tests.launching import ROOT

SCRIPT = """
import sys, time
from pathlib import Path
from lockstep.settings import Settings
from lockstep.training.run_logger import RootRunLogger
from lockstep.training.progress import Progress
from lockstep.training.run_folder import RunFolder

with RootRunLogger(RunFolder(Path(sys.argv[1])), Settings(), num_updates=5000) as run_logger:
    for step in (100, 2500):
        time.sleep(0.5)
        run_logger.advance(step)
        run_logger.record("train", step, epoch=0, samples=64 * step, loss=2.5)
        run_logger.say_progress(f"Batch: {step}", Progress(step, 64 * step, seconds=step / 10), "images")
        run_logger._progress.refresh()
"""


def _in_a_terminal(folder: Path, columns: int, environment: dict[str, str]) -> str:
    controller, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")} | environment
    command = [sys.executable, "-c", SCRIPT, str(folder)]
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=terminal, stderr=terminal) as process:
        os.close(terminal)
        pieces = []
        while piece := _read(controller):
            pieces.append(piece)
    os.close(controller)
    assert process.returncode == 0, b"".join(pieces)
    return b"".join(pieces).decode()


def _read(controller: int) -> bytes:
    try:
        return os.read(controller, 4096)
    except OSError:  # nobody has the terminal any more
        return b""


@pytest.mark.parametrize("columns", [40, pytest.param(80, marks=pytest.mark.thorough)])
def test_the_bar_fits_a_narrow_terminal_with_loss_rate_and_time_left(columns: int, tmp_path: Path) -> None:
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", _in_a_terminal(tmp_path, columns, {"TERM": "xterm-256color"}))
    lines = [line for line in re.split(r"[\r\n]+", shown) if line]
    assert max(map(len, lines)) <= columns
    bars = [line for line in lines if "2500/5000" in line]
    assert any(re.fullmatch(r"loss 2\.500 [━╸╺]+ +2500/5000 [\d.]+/s (-:--:--|\d+:\d\d:\d\d)", bar) for bar in bars), (
        bars
    )
    assert "Batch: 2500, 640 images/s, 0:04:10 left"[:columns] in lines


@pytest.mark.thorough
def test_no_colours_where_none_are_wanted(tmp_path: Path) -> None:
    shown = _in_a_terminal(tmp_path, 80, {"TERM": "xterm-256color", "NO_COLOR": "1"})
    assert "2500/5000" in shown
    assert not re.search(r"\x1b\[[0-9;]+m", shown)


def test_a_file_gets_plain_lines(tmp_path: Path) -> None:
    finished = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60
    )
    assert finished.stdout == "Batch: 100\nBatch: 2500, 640 images/s, 0:04:10 left\n"
    assert finished.stderr == ""
