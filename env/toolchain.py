"""Find the tools of this machine: C++ compiler, CMake, MPI, CUDA toolkit, NCCL. Changes nothing."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from env.steps import SetupError

Version = tuple[int, ...]

MIN_CMAKE = (3, 18)  # Horovod asks for 3.13; `FindCUDAToolkit` and CUDA's C++17 need 3.18
# Kernels are compiled for one GPU of each generation that this nvcc supports, with PTX of the last one, from which the
# driver compiles code for newer GPUs. Further entries would only cost time.
CUDA_GENERATIONS = (("70", "75"), ("80",), ("90",))


@dataclass(frozen=True)
class Compiler:
    cxx: str
    cc: str
    version: Version


@dataclass(frozen=True)
class MPI:
    """An MPI found through its compiler wrapper."""

    mpicxx: Path
    name: str  # as `mpirun --version` or the wrapper says, such as "Open MPI 5.0.11"
    lib_dirs: tuple[str, ...]

    @property
    def bin_dir(self) -> Path:
        return self.mpicxx.parent


@dataclass(frozen=True)
class Cuda:
    home: Path
    version: Version
    architectures: tuple[str, ...]


@dataclass(frozen=True)
class Nccl:
    include: Path
    library: Path
    version: str


def output_of(command: Sequence[str | Path], env: Mapping[str, str] | None = None) -> str:
    """Return stdout and stderr of a command, or an empty string if it fails."""
    try:
        done = subprocess.run(
            [str(part) for part in command], capture_output=True, text=True, timeout=60, env=env, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout + done.stderr


def parse_version(text: str) -> Version:
    """Parse the first dotted number in a text: `(13, 0)` from "Cuda compilation tools, release 13.0, V13.0.48"."""
    match = re.search(r"\d+(?:\.\d+)+", text) or re.search(r"\d+", text)
    return tuple(int(part) for part in match[0].split(".")) if match else ()


def dotted(version: Version) -> str:
    return ".".join(map(str, version))


def find_compiler() -> Compiler:
    """Find the C++ compiler: $CXX if set, else g++. Raises `SetupError` if it or make is missing."""
    cxx, cc = os.environ.get("CXX", "g++"), os.environ.get("CC", "gcc")
    missing = [tool for tool in (cxx, cc, "make") if shutil.which(tool.split()[0]) is None]
    if missing:
        raise SetupError(
            f"{' and '.join(missing)} not found on PATH",
            "install them (Debian: apt install g++ make), or load the site's compiler module",
        )
    return Compiler(cxx, cc, parse_version(output_of([*cxx.split(), "-dumpfullversion", "-dumpversion"])))


def check_cxx_standard(compiler: Compiler, cxx_standard: int) -> None:
    """Refuse a g++ that is too old for the standard, before minutes of compiling show it."""
    oldest = 10 if cxx_standard >= 20 else 8
    if compiler.version and compiler.version[0] < oldest:
        raise SetupError(
            f"{compiler.cxx} {dotted(compiler.version)} is too old: C++{cxx_standard} needs g++ {oldest} or newer",
            "load a newer compiler module, or name one: CXX=g++-12 CC=gcc-12 env/setup",
        )


def find_cmake(path: str) -> tuple[str, Version] | None:
    """Find the system's CMake, if it is new enough."""
    cmake = shutil.which("cmake", path=path)
    version = parse_version(output_of([cmake, "--version"])) if cmake else ()
    return (cmake, version) if cmake and version >= MIN_CMAKE else None


def find_mpicxx(path: str, venv: Path) -> Path | None:
    """Find the first mpicxx on a search path outside of the environment itself."""
    for folder in filter(None, path.split(os.pathsep)):
        mpicxx = Path(folder) / "mpicxx"
        inside = Path(folder).resolve().is_relative_to(venv.resolve())
        if os.access(mpicxx, os.X_OK) and mpicxx.is_file() and not inside:
            return mpicxx.absolute()
    return None


def describe_mpi(mpicxx: Path, env: Mapping[str, str] | None = None) -> MPI:
    """Identify the MPI of a compiler wrapper and the mpirun beside it: Open MPI, MPICH or Intel MPI."""
    libs = output_of([mpicxx, "--showme:libdirs"], env).split()  # Open MPI
    if not libs:
        libs = re.findall(r"-L(\S+)", output_of([mpicxx, "-show"], env))  # MPICH and its family
    mpirun = output_of([mpicxx.parent / "mpirun", "--version"], env)
    said = mpirun or output_of([mpicxx, "--showme:version"], env) or output_of([mpicxx, "-v"], env)
    family = next((name for name in ("Open MPI", "Intel(R) MPI", "MPICH", "HYDRA") if name in said), "MPI")
    version = parse_version(said.partition(family)[2])
    name = {"HYDRA": "MPICH", "Intel(R) MPI": "Intel MPI"}.get(family, family)
    return MPI(mpicxx, f"{name} {dotted(version)}".strip(), tuple(dict.fromkeys(libs)))


def find_cuda() -> Cuda | str:
    """Find the CUDA toolkit by $CUDA_HOME or $CUDA_PATH if set, else by nvcc on PATH; or return why there is none."""
    named = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = str(Path(named) / "bin" / "nvcc") if named else shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    if not os.access(nvcc, os.X_OK):
        return f"no nvcc in CUDA_HOME={named}" if named else "no CUDA toolkit (no nvcc on PATH)"
    # nvcc may be a wrapper script in another folder, so ask it for the folder of its toolkit.
    match = re.search(r"^#\$ TOP=(.+)$", output_of([nvcc, "--dryrun", "x.cu"]), flags=re.MULTILINE)
    home = Path(match[1].strip()).resolve() if match else Path(nvcc).resolve().parents[1]
    version = parse_version(output_of([nvcc, "--version"]).partition("release")[2])
    if not (home / "bin" / "nvcc").exists() or not version:
        return f"{nvcc} does not report the folder of its toolkit"
    known = set(re.findall(r"sm_(\d+)\b", output_of([nvcc, "--list-gpu-code"])))
    found = [next((arch for arch in generation if arch in known), "") for generation in CUDA_GENERATIONS]
    return Cuda(home, version, tuple(filter(None, found)) or ("80",))


def find_nccl(site_packages: Sequence[Path]) -> Nccl | None:
    """Find NCCL: in $HOROVOD_NCCL_HOME or $NCCL_HOME, else the wheel of torch, else the system's."""
    homes = [Path(os.environ[name]) for name in ("HOROVOD_NCCL_HOME", "NCCL_HOME") if os.environ.get(name)]
    homes += [folder / "nvidia" / "nccl" for folder in site_packages]
    homes += [Path("/usr"), Path("/usr/local")]
    for home in homes:
        header = home / "include" / "nccl.h"
        libraries = [
            lib for folder in ("lib", "lib64", "lib/x86_64-linux-gnu") for lib in (home / folder).glob("libnccl.so*")
        ]
        if header.is_file() and libraries:
            numbers = dict(re.findall(r"#define NCCL_(MAJOR|MINOR|PATCH) +(\d+)", header.read_text()))
            version = ".".join(numbers[part] for part in ("MAJOR", "MINOR", "PATCH") if part in numbers)
            return Nccl(header.parent, min(libraries), version)
    return None
