"""What env/setup has built this environment for, read from the lockstep.sh that it wrote there."""

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Installation:
    """An environment, and the MPI that its mpi4py and Horovod were compiled for.

    Attributes:
        venv: the environment's folder.
        mpi: such as `Open MPI 5.0.11`; empty if unknown.
        mpi_bin: the folder of that MPI's mpirun; the environment's own if the MPI was installed into it.
        mpi_lib: the folders of that MPI's libraries; likewise.
        stamp: identifies what the environment was built from; the same on all nodes that share it.
    """

    venv: Path
    mpi: str
    mpi_bin: Path
    mpi_lib: tuple[Path, ...]
    stamp: str

    @property
    def mpirun(self) -> str:
        """The path of this MPI's mpirun; `mpirun` if it is not there."""
        path = self.mpi_bin / "mpirun"
        return str(path) if path.is_file() else "mpirun"


def read_installation(venv: Path | None = None) -> Installation:
    """Read the installation of `venv`, by default of the running Python; mostly empty if env/setup did not make it."""
    venv = venv or Path(sys.prefix)
    try:
        words = shlex.split((venv / "lockstep.sh").read_text(), comments=True)
    except (OSError, ValueError):
        words = []
    values = dict(word.split("=", 1) for word in words if "=" in word)
    return Installation(
        venv=venv,
        mpi=values.get("lockstep_mpi", ""),
        mpi_bin=Path(values.get("lockstep_mpi_bin") or venv / "bin"),
        mpi_lib=tuple(map(Path, filter(None, values.get("lockstep_mpi_lib", "").split(":")))) or (venv / "lib",),
        stamp=values.get("lockstep_stamp", ""),
    )
