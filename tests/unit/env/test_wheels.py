"""Horovod's patches, and the cache of the wheels that env/wheels.py builds."""

import io
import tarfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from env.environment import Environment
from env.horovod_listeners import listeners
from env.horovod_patches import Patch, PatchError, patch_horovod, patches_for
from env.horovod_secrets import secrets
from env.lockfile import Pin
from env.steps import SetupError
from env.toolchain import MPI, Compiler, Cuda, Nccl
from env.wheels import Gpu, Recipe, Toolchain, Torch, horovod_recipe, mpi4py_recipe, unpack

PIN = Pin("horovod", "0.28.1", "horovod==0.28.1\n", frozenset())
TORCH = Torch("2.15.0+cu132", "13.2", "d0f2af8")


# Lines of Horovod 0.28.1, enough of each file for its patches.
HOROVOD = {
    "CMakeLists.txt": "set(CMAKE_CXX_STANDARD 14)\nset(CMAKE_CXX_STANDARD_REQUIRED ON)\n"
    'string(PREPEND GLOO_CMAKE "set(CMAKE_CXX_STANDARD 17)\\n")\n',
    "horovod/torch/CMakeLists.txt": 'COMMAND ${PY_EXE} -c "from distutils.sysconfig import get_python_inc; '
    'print(get_python_inc())"\n    set(CMAKE_CXX_STANDARD 14)\n',
    "third_party/gloo/CMakeLists.txt": "cmake_minimum_required(VERSION 2.8.12 FATAL_ERROR)\n",
    "cmake/Modules/FindPytorch.cmake": 'string(TOUPPER "${Pytorch_CUDA}" Pytorch_CUDA)\n',
    "setup.py": "config = 'Debug' if self.debug else 'RelWithDebInfo'\n",
    "horovod/common/ops/cuda/CMakeLists.txt": "add_library(horovod_cuda_kernels cuda_kernels.cu)\n"
    "add_library(compatible_horovod_cuda_kernels cuda_kernels.cu)\n",
    "horovod/common/parameter_manager.cc": "  } else {\n    Eigen::VectorXd v = TunableParameter::BestValue();\n"
    "    v[index_[variable]] = value;\n",
    "horovod/runner/js_run.py": "from distutils.spawn import find_executable\n",
    "horovod/runner/mpi_run.py": "_OMPI_FLAGS = ['-mca pml ob1', '-mca btl ^openib']\n"
    "def flags():\n    return list(_OMPI_FLAGS), list(_NO_BINDING_ARGS), _OMPI_IMPL\n"
    "basic = '--allow-run-as-root --tag-output'\nssh = f'-mca plm_rsh_args'\nnics = '-mca btl_tcp_if_include'\n"
    "tree = '-mca plm_rsh_no_tree_spawn true'\nmany = '-mca plm_rsh_num_concurrent {}'\n"
    "os.execve('/bin/sh', ['/bin/sh', '-c', mpirun_command], env)\n",
    "horovod/runner/gloo_run.py": "def launch_gloo(res, settings):\n"
    "    for name, value in sorted(res.items(), key=lambda item: item[1][1]):\n"
    "        exit_code, timestamp = value\n"
    "        if exit_code != 0:\n"
    "            raise RuntimeError('Horovod detected')\n"
    "def launch_gloo_elastic(driver, res, settings):\n"
    "        for name, value in sorted(res.worker_results.items(), key=lambda item: item[1][1]):\n"
    "            exit_code, timestamp = value\n"
    "def get_common_interfaces(driver):\n"
    "        min_hosts = _get_min_start_hosts(settings)\n"
    "        current_hosts = driver.wait_for_available_slots(settings.num_proc, min_hosts=min_hosts)\n",
    "horovod/runner/elastic/registration.py": "def _on_workers_recorded(self):\n"
    "        self._reset_count = 0\n"
    "        for host, slot in failures:\n"
    "            self._host_manager.blacklist(host)\n",
    "horovod/runner/elastic/driver.py": "from horovod.runner.elastic.registration import WorkerStateRegistry\n"
    "def _update_host_assignments(self):\n"
    "        active_slots = set([(host, slot_info.local_rank)\n"
    "                            for host, slots in self._host_assignments.items()\n"
    "                            for slot_info in slots])\n"
    "class ElasticDriver:\n"
    "    def _handle_worker_exit(self, slot_info, exit_code, timestamp):\n"
    "        if exit_code == 0:\n"
    "            pass\n"
    "        else:\n"
    "            rendezvous_id = self._worker_registry.record_failure(slot_info.hostname, slot_info.local_rank)\n",
}
for _file, _old, *_ in (*secrets(), *listeners()):  # many lines of no function: as texts
    HOROVOD[_file] = HOROVOD.get(_file, "") + (f"_ = r'''{_old} '''\n" if _file.endswith(".py") else _old)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    for name, text in HOROVOD.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def test_patches_change_what_they_should(source: Path) -> None:
    patch_horovod(source, cxx_standard=20)
    cmake = (source / "CMakeLists.txt").read_text()
    assert "set(CMAKE_CXX_STANDARD 20)" in cmake
    assert "set(CMAKE_CXX_STANDARD 17)" in cmake, "TensorFlow's line is not ours"
    mpi_run = (source / "horovod/runner/mpi_run.py").read_text()
    assert "'-mca" not in mpi_run
    assert "['--bind-to none', '--map-by slot']" in mpi_run
    assert "'exec ' + mpirun_command" in mpi_run
    assert "basic = '--allow-run-as-root'" in mpi_run
    assert "distutils" not in (source / "horovod/runner/js_run.py").read_text()
    for name in filter(lambda name: name.endswith(".py"), HOROVOD):
        compile((source / name).read_text(), name, "exec")


def test_patched_gloo_launcher_ends_with_the_first_failures_exit_code(source: Path) -> None:
    patch_horovod(source, cxx_standard=20)
    module: dict[str, object] = {}
    exec("import sys\n" + (source / "horovod/runner/gloo_run.py").read_text(), module)  # a snippet of three lines
    launch_gloo = module["launch_gloo"]
    assert callable(launch_gloo)

    class Settings:
        run_func_mode = False

    with pytest.raises(SystemExit) as ended:
        launch_gloo({"0": (143, 2.0), "1": (5, 1.0)}, Settings())
    assert ended.value.code == 5
    Settings.run_func_mode = True
    with pytest.raises(RuntimeError):
        launch_gloo({"0": (5, 1.0)}, Settings())


@pytest.mark.parametrize(
    ("counted", "codes", "code"),
    [({"0": (75, 2.0), "1": (5, 1.0)}, [5, 75], 5), ({}, [137, 75, 0], 75), ({}, [0], 1)],
)
def test_an_elastic_job_whose_workers_are_counted_no_longer_does_not_end_well(
    source: Path, counted: dict[str, tuple[int, float]], codes: list[int], code: int
) -> None:
    patch_horovod(source, cxx_standard=20)
    module: dict[str, object] = {}
    exec("import sys\n" + (source / "horovod/runner/gloo_run.py").read_text(), module)
    launch_gloo_elastic = module["launch_gloo_elastic"]
    assert callable(launch_gloo_elastic)
    with pytest.raises(SystemExit) as ended:
        launch_gloo_elastic(
            SimpleNamespace(_exit_codes=codes),
            SimpleNamespace(worker_results=counted),
            SimpleNamespace(run_func_mode=False),
        )
    assert ended.value.code == code


@pytest.mark.parametrize("file", sorted(HOROVOD))
def test_unknown_source_fails_loudly(source: Path, file: str) -> None:
    (source / file).write_text("something else\n")
    with pytest.raises(PatchError, match="expected once"):
        patch_horovod(source, cxx_standard=20)


def test_patching_twice_or_a_missing_file_fails(source: Path) -> None:
    patch_horovod(source, cxx_standard=20)
    with pytest.raises(PatchError):
        patch_horovod(source, cxx_standard=20)
    (source / "CMakeLists.txt").unlink()
    with pytest.raises(PatchError, match="no such file"):
        patch_horovod(source, cxx_standard=20)


def test_ambiguous_text_is_refused() -> None:
    with pytest.raises(PatchError, match="found 2 times"):
        Patch("x", "a", "b", "why").apply("a a")


def test_every_patch_says_why() -> None:
    assert all(patch.why for patch in patches_for(20))


@pytest.mark.parametrize(
    ("version", "standard"), [("2.13.0", 17), ("2.14.1+cu130", 17), ("2.15.0+cu132", 20), ("3.0", 20)]
)
def test_cxx_standard_follows_torch(version: str, standard: int) -> None:
    assert Torch(version, None, "").cxx_standard == standard


def tools(
    mpi: str = "Open MPI 5.0.11", place: str = "/site/bin/mpicxx", wheel: bool = True, gcc: int = 12
) -> Toolchain:
    return Toolchain(Compiler("g++", "gcc", (gcc, 2)), "cmake", MPI(Path(place), mpi, ("/site/lib",)), wheel)


def gpu(cuda: int = 13, nccl: str = "2.30.7", architectures: tuple[str, ...] = ("80", "90")) -> Gpu:
    toolkit = Cuda(Path("/usr/local/cuda"), (cuda, 0), architectures)
    return Gpu(toolkit, Nccl(Path("/nccl/include"), Path("/nccl/lib/libnccl.so.2"), nccl))


def test_every_ingredient_changes_the_label(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HOROVOD_BUILD_CUDA_CC_LIST", raising=False)
    home = Environment(tmp_path, tmp_path / "venv")

    def label(pin: Pin = PIN, made: Toolchain | None = None, torch: Torch = TORCH, with_gpu: Gpu | None = None) -> str:
        return horovod_recipe(home, pin, made or tools(), torch, with_gpu).label

    labels = [
        label(),
        label(pin=Pin("horovod", "0.29", "", frozenset())),
        label(made=tools(mpi="Open MPI 4.1.4")),
        label(made=tools(wheel=False)),
        label(made=tools(wheel=False, place="/other/bin/mpicxx")),
        label(made=tools(gcc=13)),
        label(torch=Torch("2.15.1", "13.2", "d0f2af8")),
        label(torch=Torch("2.15.0+cu132", "13.2", "another build")),
        label(torch=Torch("2.13.0", None, "d0f2af8")),
        label(with_gpu=gpu()),
        label(with_gpu=gpu(cuda=12)),
        label(with_gpu=gpu(nccl="2.31.0")),
        label(with_gpu=gpu(architectures=("90",))),
    ]
    monkeypatch.setattr("env.wheels.patches_for", lambda _: [Patch("a", "b", "c", "d")])
    labels.append(label())
    monkeypatch.undo()
    monkeypatch.setenv("CXXFLAGS", "-march=native")
    labels.append(label())
    assert len(set(labels)) == len(labels)


def test_the_wheels_mpi_is_found_relative_to_the_environment(tmp_path: Path) -> None:
    assert tools().rpath(1) == "$ORIGIN/../../.."
    assert tools(wheel=False).rpath(1) == "/site/lib"
    labels = {
        mpi4py_recipe(Environment(tmp_path, tmp_path / venv), PIN, tools(place=f"/{venv}/bin/mpicxx"), PIN).label
        for venv in ("one", "two")
    }
    assert len(labels) == 1, "two clones share one wheel"


def test_a_wheel_is_built_once_and_a_failed_build_leaves_nothing(tmp_path: Path) -> None:
    calls: list[Path] = []

    def build(folder: Path) -> None:
        calls.append(folder)
        (folder / "horovod-0.28.1-any.whl").write_text("half")
        if len(calls) == 1:
            raise OSError("disk full")

    recipe = Recipe(PIN, {"torch": "2.15.0"}, build)
    with pytest.raises(OSError, match="disk full"):
        recipe.wheel(tmp_path)
    assert not list((tmp_path / "wheels").iterdir())
    wheel = recipe.wheel(tmp_path)
    assert recipe.wheel(tmp_path) == wheel
    assert len(calls) == 2
    assert sorted(file.name for file in wheel.parent.iterdir()) == ["horovod-0.28.1-any.whl", "ingredients.json"]


def test_another_clone_that_was_quicker_wins(tmp_path: Path) -> None:
    def build(folder: Path) -> None:
        theirs = tmp_path / "wheels" / recipe.label
        theirs.mkdir()
        (theirs / "theirs.whl").write_text("whole")
        (folder / "ours.whl").write_text("whole")

    recipe = Recipe(PIN, {}, build)
    assert recipe.wheel(tmp_path).name == "theirs.whl"


def archive_of(path: Path, *members: tuple[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for name, kind in members:
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "/etc/passwd"
            member.mode = 0o755 if kind == tarfile.DIRTYPE else 0o644
            member.size = 4 if kind == tarfile.REGTYPE else 0
            tar.addfile(member, io.BytesIO(b"text") if member.size else None)
    return path


@pytest.fixture(params=["this Python's", "3.11.0's"])
def _tarfile(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the check that Python itself has since 3.11.4, and without."""
    if request.param == "3.11.0's":
        monkeypatch.delattr(tarfile, "data_filter", raising=False)


@pytest.mark.usefixtures("_tarfile")
def test_a_source_is_unpacked(tmp_path: Path) -> None:
    unpack(archive_of(tmp_path / "a.tar.gz", ("a", tarfile.DIRTYPE), ("a/setup.py", tarfile.REGTYPE)), tmp_path / "to")
    assert (tmp_path / "to" / "a" / "setup.py").read_text() == "text"


@pytest.mark.usefixtures("_tarfile")
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("../out", tarfile.REGTYPE),
        ("a/../../out", tarfile.REGTYPE),
        ("{tmp_path}/out", tarfile.REGTYPE),
        ("a/out", tarfile.SYMTYPE),
        ("a/out", tarfile.LNKTYPE),
        ("a/out", tarfile.FIFOTYPE),
    ],
)
def test_what_leads_out_of_the_folder_is_not_unpacked(tmp_path: Path, name: str, kind: bytes) -> None:
    archive = archive_of(tmp_path / "a.tar.gz", ("a", tarfile.DIRTYPE), (name.format(tmp_path=tmp_path), kind))
    with pytest.raises(SetupError, match="out, which is no file or folder below its own"):
        unpack(archive, tmp_path / "to")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a.tar.gz"]
