"""Collect what one process can find out before MPI starts: about itself, and, on the first rank of a node, the node."""

import ctypes
import importlib.util
import os
import platform
import re
import resource
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from lockstep.doctor.facts import Gpu, Libraries, LocalFacts, NodeFacts, Slurm, Unknown
from lockstep.doctor.folder import probe_folder
from lockstep.doctor.forked_probe import ForkedProbe
from lockstep.runtime.affinity import allowed_cpus, read_topology
from lockstep.runtime.installation import Installation, read_installation
from lockstep.runtime.launcher import Launcher

VARIABLES = (
    *("PYTHON", "LD_", "OMP_", "MKL_", "OPENBLAS_", "KMP_", "CUDA_", "NCCL_", "HOROVOD_", "OMPI_MCA_", "PRTE_MCA_"),
    *("PMIX_MCA_", "UCX_", "FI_", "I_MPI_", "MPICH_", "SLURM_", "SBATCH_", "SRUN_", "LOCKSTEP_", "PBS_", "LSB_JOBID"),
)
NO_ANSWER = "there was no answer in time"
PACKAGES = ("torch", "numpy", "mpi4py", "horovod")


class LocalProbes:
    """The queries that may take long or hang, each started in a process of its own."""

    def __init__(self, launcher: Launcher, folder: Path) -> None:
        self._launcher = launcher
        self._probes: dict[str, ForkedProbe] = {}
        if launcher.local_rank in (0, None):
            self._start("mpi", find_mpi)
            self._start("libraries", load_libraries)
            self._start("folder", partial(probe_folder, folder))
            self._start("gpus", list_gpus)
            self._start("address", partial(socket.gethostbyname, platform.node()))
        if launcher.rank == 0 and "SLURM_JOB_ID" in os.environ:
            self._start("slurm", partial(query_slurm, os.environ["SLURM_JOB_ID"]))

    def finish(self, seconds_left: Callable[[], float]) -> LocalFacts:
        """Wait until every probe has answered or no second is left, and return all facts."""
        environment, cpus, installation = dict(os.environ), allowed_cpus(), read_installation()
        answers = {name: _receive(probe, seconds_left()) for name, probe in self._probes.items()}
        limits = {"n": resource.RLIMIT_NOFILE, "l": resource.RLIMIT_MEMLOCK, "u": resource.RLIMIT_NPROC}
        node_facts = None
        if "folder" in answers:
            node_facts = NodeFacts(
                mpi_library=answers["mpi"],
                gpus=answers["gpus"],
                libraries=answers["libraries"],
                folder=answers["folder"],
                address=answers["address"],
                shm=shared_memory(),
                infiniband=infiniband_rates(),
            )
        return LocalFacts(
            node=platform.node(),
            launcher=self._launcher,
            installation=installation,
            environment={name: value for name, value in environment.items() if name.startswith(VARIABLES)},
            foreign_packages=_foreign_packages(installation, environment),
            cpus=cpus,
            cores=read_topology(cpus),
            num_cpus=num_cpus_of_job(environment),
            limits={name: resource.getrlimit(limit)[0] for name, limit in limits.items()},
            memory=memory_left(),
            node_facts=node_facts,
            slurm=answers.get("slurm"),
        )

    def end(self) -> None:
        for probe in self._probes.values():
            probe.end()

    def _start(self, name: str, query: Callable[[], object]) -> None:
        self._probes[name] = ForkedProbe(partial(_answer, query))


def list_gpus() -> Sequence[Gpu] | Unknown:
    """List this node's GPUs by nvidia-smi; none where there is no such command."""
    if shutil.which("nvidia-smi") is None:
        return []
    query = "--query-gpu=uuid,name,memory.used,memory.total"
    try:
        return parse_gpus(output_of(("nvidia-smi", query, "--format=csv,noheader,nounits")))
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        return Unknown(f"nvidia-smi fails: {error}")


def parse_gpus(text: str) -> list[Gpu]:
    """Parse lines such as `GPU-8a6c..., NVIDIA H100 80GB HBM3, 4, 81559`, in MiB."""
    cells = [[cell.strip() for cell in line.split(",")] for line in text.splitlines() if line.count(",") == 3]
    return [Gpu(uuid, name, int(used) << 20, int(total) << 20) for uuid, name, used, total in cells]


def _foreign_packages(installation: Installation, environment: Mapping[str, str]) -> dict[str, str]:
    """Of `PACKAGES`, those that PYTHONPATH puts in front of the environment's own: name -> file."""
    folders = [str(Path(folder).absolute()) for folder in environment.get("PYTHONPATH", "").split(os.pathsep) if folder]
    found = {}
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)
        origin = spec and spec.origin
        if origin and origin.startswith(tuple(folders)) and not origin.startswith(str(installation.venv)):
            found[package] = origin
    return found


def _answer(query: Callable[[], object], connection: Connection) -> None:
    try:
        connection.send(query())
    except OSError as error:  # such as a name that does not resolve
        connection.send(Unknown(str(error)))


def _receive(probe: ForkedProbe, seconds: float) -> Any:
    try:
        return probe.receive(seconds)
    except TimeoutError:
        return Unknown(NO_ANSWER)
    except EOFError:
        lines = probe.last_output().strip().splitlines()
        return Unknown(lines[-1] if lines else "it ended without an answer")


# -- libraries ---------------------------------------------------------------------------------------------------------

MPI_LIBRARIES = ("libmpi.so", "libmpich.so", "libmpi_")


def load_libraries() -> Libraries | Unknown:
    """Load torch and Horovod's library, without starting MPI, and report which MPI and NCCL came with them.

    To be called in a process that does nothing else afterwards.
    """
    started = time.monotonic()
    try:
        import torch

        library = ctypes.CDLL(str(_horovod_library()), mode=ctypes.RTLD_GLOBAL)
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
    """The path of the MPI library that the dynamic linker would load for mpi4py. Nothing is loaded."""
    for library in _files_of("mpi4py", "MPI*.so"):
        lines = re.findall(r"^\s*(\S+) => (.*?)(?: \(0x\w+\))?$", output_of(("ldd", str(library))), flags=re.MULTILINE)
        found = [(name, path) for name, path in lines if name.startswith(MPI_LIBRARIES)]
        if found and found[0][1] == "not found":
            return Unknown(f"{found[0][0]}, which mpi4py needs, is not found")
        if found:
            return str(found[0][1])
    return Unknown("mpi4py is not installed")


def loaded_files(*prefixes: str) -> tuple[str, ...]:
    """Paths of the shared libraries in this process whose file name begins with one of `prefixes`."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    files = {line.split(maxsplit=5)[5] for line in lines if line.count("/")}
    return tuple(sorted(file for file in files if Path(file).name.startswith(prefixes) and ".so" in file))


def _horovod_library() -> Path:
    """The shared library of Horovod for torch. Raises ImportError if it is not installed."""
    for library in _files_of("horovod", "torch/mpi_lib_v2*.so"):
        return library
    raise ImportError("Horovod for torch is not installed")


def _files_of(package: str, pattern: str) -> list[Path]:
    """Files of an installed package, without importing it."""
    spec = importlib.util.find_spec(package)
    folders = (spec and spec.submodule_search_locations) or ()
    return [file for folder in folders for file in sorted(Path(folder).glob(pattern))]


# -- CPUs, memory and network of this node -----------------------------------------------------------------------------

_CGROUPS = Path("/sys/fs/cgroup")


def num_cpus_of_job(environment: Mapping[str, str]) -> int:
    """The number of CPUs of this node that the job may use, whatever its processes are bound to."""
    if environment.get("SLURM_CPUS_ON_NODE", "").isdigit():
        return int(environment["SLURM_CPUS_ON_NODE"])
    for file in _files_of_cgroups("cpuset", "cpuset.cpus.effective", "cpuset.effective_cpus"):
        ranges = [part.partition("-") for part in file.read_text().strip().split(",") if part]
        if ranges:
            return sum(int(last or first) - int(first) + 1 for first, _, last in ranges)
    return os.cpu_count() or 1


def memory_left() -> int:
    """Memory in bytes that is left on this node, by the kernel and by the limits of this process's cgroups."""
    lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    available = int(lines["MemAvailable"].split()[0]) << 10
    folders = {file.parent for file in _files_of_cgroups("memory", "memory.max", "memory.limit_in_bytes")}
    return min([available, *map(memory_left_in_cgroup, folders)])


def shared_memory() -> tuple[int, int] | Unknown:
    """Size and free space of /dev/shm, in bytes."""
    try:
        shm = os.statvfs("/dev/shm")
    except OSError as error:
        return Unknown(f"/dev/shm: {error.strerror}")
    return shm.f_blocks * shm.f_frsize, shm.f_bavail * shm.f_frsize


def infiniband_rates() -> dict[str, float]:
    """Bit/s of each active port of InfiniBand, Omni-Path or RoCE."""
    found = {}
    for port in Path("/sys/class/infiniband").glob("*/ports/*"):
        try:
            if "ACTIVE" in (port / "state").read_text():
                found[f"{port.parents[1].name}:{port.name}"] = float((port / "rate").read_text().split()[0]) * 1e9
        except (OSError, ValueError, IndexError):
            continue
    return found


def memory_left_in_cgroup(folder: Path) -> int:
    """Bytes that a cgroup's limit leaves; `sys.maxsize` without a limit."""
    try:
        limit = next(folder / name for name in ("memory.max", "memory.limit_in_bytes") if (folder / name).exists())
        used = next(folder / name for name in ("memory.current", "memory.usage_in_bytes") if (folder / name).exists())
        stat = dict(line.split(maxsplit=1) for line in (folder / "memory.stat").read_text().splitlines())
        cache = int(stat.get("inactive_file", "0"))  # the kernel reclaims it when memory is short
        return max(0, int(limit.read_text()) - int(used.read_text()) + cache)
    except (OSError, ValueError, StopIteration):
        return sys.maxsize


def _files_of_cgroups(controller: str, *names: str) -> list[Path]:
    """The files called one of `names` in the cgroups (version 1 or 2) of this process, innermost first."""
    found: list[Path] = []
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return found
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        root = _CGROUPS / controllers
        inner = root / path.lstrip("/")
        folders = [folder for folder in (inner, *inner.parents) if folder.is_relative_to(root)]
        found += [folder / name for folder in folders for name in names if (folder / name).is_file()]
    return found


# -- Slurm -------------------------------------------------------------------------------------------------------------


def query_slurm(job_id: str) -> Slurm | Unknown:
    try:
        job = parse_oneliner(output_of(("scontrol", "--oneliner", "show", "job", job_id)))
        partition = parse_oneliner(output_of(("scontrol", "--oneliner", "show", "partition", job["Partition"])))
        config = parse_config(output_of(("scontrol", "show", "config")))
    except (OSError, subprocess.SubprocessError, KeyError) as error:
        return Unknown(f"scontrol fails: {error}")
    script = output_or_nothing(("scontrol", "write", "batch_script", job_id, "-"))
    return Slurm(job, config, partition, script, parse_mpi_types(output_or_nothing(("srun", "--mpi=list"))))


def parse_oneliner(line: str) -> dict[str, str]:
    """Parse the output of `scontrol --oneliner show`: `A=1 B=2`, where a value may contain blanks."""
    pairs: dict[str, str] = {}
    last = ""
    for word in line.split():
        name, equals, value = word.partition("=")
        if equals and name[:1].isupper():
            last = name
            pairs[name] = value
        elif last:
            pairs[last] += f" {word}"
    return pairs


def parse_config(text: str) -> dict[str, str]:
    """Parse the output of `scontrol show config`: `A   = 1` on each line."""
    pairs = (line.partition("=") for line in text.splitlines() if "=" in line)
    return {name.strip(): value.strip() for name, _, value in pairs}


def parse_mpi_types(text: str) -> list[str]:
    """Parse the output of `srun --mpi=list`: a heading, then one name per line; newer versions add a second heading."""
    lines = [line.split() for line in text.splitlines()]
    return [fields[0] for fields in lines if len(fields) == 1]


# -- other programs ----------------------------------------------------------------------------------------------------

SECONDS_PER_COMMAND = 3.0


def output_of(command: Sequence[str]) -> str:
    """Run `command`, and return its standard output and error.

    Raises:
        OSError: it cannot be started.
        SubprocessError: it fails, or takes longer than `SECONDS_PER_COMMAND`.
    """
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS_PER_COMMAND, check=True)
    return done.stdout + done.stderr


def output_or_nothing(command: Sequence[str]) -> str:
    try:
        return output_of(command)
    except (OSError, subprocess.SubprocessError):
        return ""
