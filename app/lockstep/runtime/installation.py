"""What env/setup built this environment for, as it wrote it down in lockstep.sh there."""

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Installation:
    """An environment, and the MPI that its mpi4py and Horovod were compiled for.

    Attributes:
        venv: where the environment is.
        mpi: such as `Open MPI 5.0.11`; empty where nothing is written down.
        mpi_bin: the folder of that MPI's mpirun; that of the environment for the MPI which it brings.
        mpi_lib: the folders of that MPI's libraries; that of the environment likewise.
        stamp: what the environment was built from; the same on all nodes that share it.
    """

    venv: Path
    mpi: str
    mpi_bin: Path
    mpi_lib: tuple[Path, ...]
    stamp: str

    @property
    def mpirun(self) -> str:
        """The mpirun of this MPI; a bare name where it is not to be found."""
        path = self.mpi_bin / "mpirun"
        return str(path) if path.is_file() else "mpirun"


def read_installation(venv: Path | None = None) -> Installation:
    """That of `venv`, or of the running Python. An environment that env/setup did not make says nothing."""
    venv = venv or Path(sys.prefix)
    try:
        words = shlex.split((venv / "lockstep.sh").read_text(), comments=True)
    except (OSError, ValueError):
        words = []
    said = dict(word.split("=", 1) for word in words if "=" in word)
    return Installation(
        venv=venv,
        mpi=said.get("lockstep_mpi", ""),
        mpi_bin=Path(said.get("lockstep_mpi_bin") or venv / "bin"),
        mpi_lib=tuple(map(Path, filter(None, said.get("lockstep_mpi_lib", "").split(":")))) or (venv / "lib",),
        stamp=said.get("lockstep_stamp", ""),
    )
