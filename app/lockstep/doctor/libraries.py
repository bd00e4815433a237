"""Loads what a rank loads, without becoming one: torch, and Horovod's library with the MPI and NCCL that it finds."""

import ctypes
import importlib.util
import time
from pathlib import Path

from lockstep.doctor.commands import output_of
from lockstep.doctor.facts import Libraries, Unknown

MPI_LIBRARIES = ("libmpi.so", "libmpich.so", "libmpi_")


def look_at_libraries() -> Libraries | Unknown:
    """Which MPI and NCCL Horovod gets, in this process, which is good for nothing else afterwards."""
    started = time.monotonic()
    try:
        import torch

        library = ctypes.CDLL(str(_library_of_horovod()), mode=ctypes.RTLD_GLOBAL)
    except (ImportError, OSError) as error:
        return Unknown(str(error))
    assert torch
    nccl = loaded_files("libnccl.")
    version = ctypes.c_int(0)
    if nccl:
        ctypes.CDLL(nccl[0]).ncclGetVersion(ctypes.byref(version))
    return Libraries(
        mpi=loaded_files(*MPI_LIBRARIES),
        nccl=nccl,
        nccl_built=int(library.horovod_nccl_built()),
        nccl_loaded=version.value,
        seconds=time.monotonic() - started,
    )


def find_mpi() -> str | Unknown:
    """The MPI library that the system finds for mpi4py, which is not loaded here: it might not be the right one."""
    for library in _files_of("mpi4py", "MPI*.so"):
        lines = [line.split() for line in output_of(("ldd", str(library))).splitlines()]
        found = [words for words in lines if words and words[0].startswith(MPI_LIBRARIES)]
        if found and found[0][1:3] == ["=>", "not"]:
            return Unknown(f"{found[0][0]}, which mpi4py needs, is not found")
        if found:
            return found[0][2]
    return Unknown("mpi4py is not installed")


def loaded_files(*prefixes: str) -> tuple[str, ...]:
    """The shared libraries of this process whose file name begins with one of `prefixes`."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    files = {line.split(maxsplit=5)[5] for line in lines if line.count("/")}
    return tuple(sorted(file for file in files if Path(file).name.startswith(prefixes) and ".so" in file))


def _library_of_horovod() -> Path:
    """Raises ImportError if there is none."""
    for library in _files_of("horovod", "torch/mpi_lib_v2*.so"):
        return library
    raise ImportError("Horovod for torch is not installed")


def _files_of(package: str, pattern: str) -> list[Path]:
    """Of a package that is installed, which is not imported."""
    spec = importlib.util.find_spec(package)
    folders = (spec and spec.submodule_search_locations) or ()
    return [file for folder in folders for file in sorted(Path(folder).glob(pattern))]
