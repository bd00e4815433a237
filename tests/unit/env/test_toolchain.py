"""What env/toolchain.py finds on machines made of scripts."""

import os
from pathlib import Path

import pytest

from env import toolchain
from env.steps import SetupError


def script(path: Path, body: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path


def cuda_home(home: Path, release: str = "13.0", codes: str = "sm_75 sm_80 sm_90 sm_100") -> Path:
    script(
        home / "bin" / "nvcc",
        f'case "$1" in\n'
        f'--dryrun) echo "#$ _SPACE_=" >&2; echo "#$ TOP={home}/bin/.." >&2 ;;\n'
        f'--version) echo "Cuda compilation tools, release {release}, V{release}.48" ;;\n'
        f'--list-gpu-code) printf "%s\\n" {codes} ;;\nesac',
    )
    return home


@pytest.fixture(autouse=True)
def _no_cuda_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CUDA_HOME", "CUDA_PATH", "CXX", "CC", "HOROVOD_NCCL_HOME", "NCCL_HOME"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("cmake version 3.25.1", (3, 25, 1)),
        ("mpirun (Open MPI) 5.0.11", (5, 0, 11)),
        ("release 13.0, V13.0.48", (13, 0)),
        ("12", (12,)),
        ("nothing", ()),
    ],
)
def test_parse_version(text: str, version: tuple[int, ...]) -> None:
    assert toolchain.parse_version(text) == version


def test_cuda_home_is_found_behind_a_wrapper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = cuda_home(tmp_path / "cuda-13.0")
    script(tmp_path / "bin" / "nvcc", f'exec {home}/bin/nvcc "$@"')
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    cuda = toolchain.find_cuda()
    assert cuda == toolchain.Cuda(home, (13, 0), ("75", "80", "90"))


def test_older_cuda_still_compiles_for_v100(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_HOME", str(cuda_home(tmp_path, "11.4", "sm_60 sm_70 sm_75 sm_80 sm_86")))
    cuda = toolchain.find_cuda()
    assert isinstance(cuda, toolchain.Cuda)
    assert cuda.architectures == ("70", "80")


def test_cuda_home_that_names_nothing_means_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_HOME", "none")
    assert toolchain.find_cuda() == "no nvcc in CUDA_HOME=none"


def test_mpicxx_of_our_own_environment_is_not_the_sites(tmp_path: Path) -> None:
    venv, site = tmp_path / "venv", tmp_path / "site"
    script(venv / "bin" / "mpicxx", "")
    path = f"{venv / 'bin'}:{tmp_path / 'empty'}:{site / 'bin'}"
    assert toolchain.find_mpicxx(path, venv) is None
    ours_by_another_name = tmp_path / "link"
    ours_by_another_name.symlink_to(venv)
    assert toolchain.find_mpicxx(f"{ours_by_another_name / 'bin'}", venv) is None
    theirs = script(site / "bin" / "mpicxx", "")
    assert toolchain.find_mpicxx(path, venv) == theirs


def test_describe_open_mpi(tmp_path: Path) -> None:
    mpicxx = script(tmp_path / "bin" / "mpicxx", '[ "$1" = --showme:libdirs ] && echo /opt/ompi/lib /opt/hwloc/lib')
    script(tmp_path / "bin" / "mpirun", 'printf "mpirun (Open MPI) 4.1.4\\n\\nReport bugs to 1.2.3"')
    mpi = toolchain.describe_mpi(mpicxx)
    assert (mpi.name, mpi.lib_dirs, mpi.bin_dir) == (
        "Open MPI 4.1.4",
        ("/opt/ompi/lib", "/opt/hwloc/lib"),
        tmp_path / "bin",
    )


def test_describe_mpich(tmp_path: Path) -> None:
    mpicxx = script(
        tmp_path / "bin" / "mpicxx",
        '[ "$1" = -show ] && echo g++ -I/opt/mpich/include -L/opt/mpich/lib -L/opt/mpich/lib -lmpi',
    )
    script(tmp_path / "bin" / "mpirun", 'printf "HYDRA build details:\\n    Version:    4.2.1\\n"')
    mpi = toolchain.describe_mpi(mpicxx)
    assert (mpi.name, mpi.lib_dirs) == ("MPICH 4.2.1", ("/opt/mpich/lib",))


def test_missing_compiler_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SetupError, match=r"g\+\+ and gcc and make not found") as failure:
        toolchain.find_compiler()
    assert "apt install g++ make" in failure.value.fix


def test_old_compiler_is_refused_only_where_cxx20_is_needed() -> None:
    old = toolchain.Compiler("g++", "gcc", (9, 4, 0))
    toolchain.check_cxx_standard(old, 17)
    with pytest.raises(SetupError, match=r"g\+\+ 9\.4\.0 is too old: C\+\+20 needs g\+\+ 10"):
        toolchain.check_cxx_standard(old, 20)


def test_cmake_must_be_new_enough(tmp_path: Path) -> None:
    cmake = script(tmp_path / "cmake", "echo cmake version 3.17.5")
    assert toolchain.find_cmake(str(tmp_path)) is None
    script(cmake, "echo cmake version 3.18.0")
    assert toolchain.find_cmake(str(tmp_path)) == (str(cmake), (3, 18, 0))


def test_nccl_of_the_wheel_and_of_a_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for home, library in (("packages/nvidia/nccl", "libnccl.so.2"), ("module", "libnccl.so")):
        for file in ("include/nccl.h", f"lib/{library}"):
            (tmp_path / home / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / home / file).write_text("#define NCCL_MAJOR 2\n#define NCCL_MINOR 30\n#define NCCL_PATCH 7\n")
    wheel = toolchain.find_nccl([tmp_path / "packages"])
    assert wheel is not None
    assert (wheel.library.name, wheel.version) == ("libnccl.so.2", "2.30.7")
    monkeypatch.setenv("NCCL_HOME", str(tmp_path / "module"))
    module = toolchain.find_nccl([tmp_path / "packages"])
    assert module is not None
    assert module.library == tmp_path / "module" / "lib" / "libnccl.so"
