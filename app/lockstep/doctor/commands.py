"""What other commands say."""

import subprocess
from collections.abc import Sequence

SECONDS_A_COMMAND = 3.0


def output_of(command: Sequence[str]) -> str:
    """Raises OSError or SubprocessError if it cannot be run, fails, or takes too long."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS_A_COMMAND, check=True)
    return done.stdout + done.stderr


def output_or_nothing(command: Sequence[str]) -> str:
    try:
        return output_of(command)
    except (OSError, subprocess.SubprocessError):
        return ""
