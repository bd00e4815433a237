"""All changes of Lockstep to the source of Horovod 0.28.1 (2023), the last release, with their reasons.

A patch fails unless the text that it replaces occurs exactly once: otherwise the failure would only show later, as a
compiler error or a launcher that hangs.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from env.horovod_listeners import listeners
from env.horovod_secrets import secrets

HOROVOD_VERSION = "0.28.1"


class PatchError(Exception):
    """Raised if the source differs from the one that the patch was written for."""


@dataclass(frozen=True)
class Patch:
    """Replaces `old`, which must occur exactly once in `file`, by `new`."""

    file: str
    old: str
    new: str
    why: str

    def apply(self, text: str) -> str:
        found = text.count(self.old)
        if found != 1:
            raise PatchError(f"{self.file}: found {found} times, expected once: {self.old!r} (patch: {self.why})")
        return text.replace(self.old, self.new)


def patches_for(cxx_standard: int) -> list[Patch]:
    """Return all patches, with the C++ standard that torch's headers need."""
    standard = "the headers of current PyTorch need C++17 or C++20, Horovod asks for C++14"
    two_dashes = "Open MPI 5 rejects long options with one dash; versions 4 and 5 both take two"
    distutils = "Python 3.12 has no distutils"
    mpi_run, gloo_run = "horovod/runner/mpi_run.py", "horovod/runner/gloo_run.py"
    elastic_driver, registration = "horovod/runner/elastic/driver.py", "horovod/runner/elastic/registration.py"
    respawn = "elastic: a failed worker is restarted if others of its host are alive; they are not ended with it"
    return [
        # -- compiling
        Patch("CMakeLists.txt", "set(CMAKE_CXX_STANDARD 14)", f"set(CMAKE_CXX_STANDARD {cxx_standard})", standard),
        Patch(
            "horovod/torch/CMakeLists.txt",
            "set(CMAKE_CXX_STANDARD 14)",
            f"set(CMAKE_CXX_STANDARD {cxx_standard})",
            standard,
        ),
        Patch(
            "third_party/gloo/CMakeLists.txt",
            "cmake_minimum_required(VERSION 2.8.12 FATAL_ERROR)",
            "cmake_minimum_required(VERSION 3.13 FATAL_ERROR)",
            "CMake 4 refuses projects that ask for a CMake older than 3.5",
        ),
        Patch(
            "CMakeLists.txt",
            "set(CMAKE_CXX_STANDARD_REQUIRED ON)",
            "set(CMAKE_CXX_STANDARD_REQUIRED ON)\n"
            "set(CMAKE_BUILD_WITH_INSTALL_RPATH ON)\n"
            'set(CMAKE_INSTALL_RPATH "$ENV{LOCKSTEP_RPATH}")',
            "the cached wheel must find MPI in whichever environment it is installed, not in the one it was built in",
        ),
        Patch(
            "cmake/Modules/FindPytorch.cmake",
            'string(TOUPPER "${Pytorch_CUDA}" Pytorch_CUDA)',
            'string(TOUPPER "${Pytorch_CUDA}" Pytorch_CUDA)\n'
            'if(NOT DEFINED ENV{HOROVOD_GPU_OPERATIONS})\n    set(Pytorch_CUDA "FALSE")\nendif()',
            "a CPU build must stay one if there is a CUDA toolkit that does not fit torch's",
        ),
        Patch(
            "setup.py",
            "else 'RelWithDebInfo'",
            "else 'Release'",
            "the same -O3 code without debug information: faster to compile, a tenth of the size",
        ),
        Patch(
            "horovod/common/ops/cuda/CMakeLists.txt",
            "add_library(compatible_horovod_cuda_kernels cuda_kernels.cu)",
            "add_library(compatible_horovod_cuda_kernels EXCLUDE_FROM_ALL cuda_kernels.cu)",
            "compile the kernels for the pre-2015 C++ ABI only if a target asks for them",
        ),
        Patch(
            "horovod/torch/CMakeLists.txt",
            "from distutils.sysconfig import get_python_inc; print(get_python_inc())",
            "import sysconfig; print(sysconfig.get_path('include'))",
            distutils,
        ),
        # -- running
        Patch(
            "horovod/common/parameter_manager.cc",
            "  } else {\n    Eigen::VectorXd v = TunableParameter::BestValue();\n    v[index_[variable]] = value;",
            "  } else if (fixed_values_.find(variable) == fixed_values_.end()) {\n"
            "    Eigen::VectorXd v = TunableParameter::BestValue();\n    v[index_[variable]] = value;",
            "with HOROVOD_CYCLE_TIME and HOROVOD_FUSION_THRESHOLD set, a second hvd.init() in one process writes past "
            "the end of an empty vector",
        ),
        # -- launching
        Patch(
            "horovod/runner/js_run.py",
            "from distutils.spawn import find_executable",
            "from shutil import which as find_executable",
            distutils,
        ),
        Patch(
            mpi_run,
            "_OMPI_FLAGS = ['-mca pml ob1', '-mca btl ^openib']",
            "_OMPI_FLAGS = ['--mca pml ob1', '--mca btl ^openib']",
            two_dashes,
        ),
        Patch(
            mpi_run,
            "return list(_OMPI_FLAGS), list(_NO_BINDING_ARGS), _OMPI_IMPL",
            "return list(_OMPI_FLAGS), ['--bind-to none', '--map-by slot'], _OMPI_IMPL",
            two_dashes + " (MPICH shares _NO_BINDING_ARGS, and keeps it)",
        ),
        Patch(
            mpi_run,
            "'--allow-run-as-root --tag-output'",
            "'--allow-run-as-root'",
            "output without a tag on each line, as under mpirun, since only one rank prints",
        ),
        Patch(mpi_run, "f'-mca plm_rsh_args", "f'--mca plm_rsh_args", two_dashes),
        Patch(mpi_run, "'-mca btl_tcp_if_include", "'--mca btl_tcp_if_include", two_dashes),
        Patch(mpi_run, "'-mca plm_rsh_no_tree_spawn", "'--mca plm_rsh_no_tree_spawn", two_dashes),
        Patch(mpi_run, "'-mca plm_rsh_num_concurrent", "'--mca plm_rsh_num_concurrent", two_dashes),
        Patch(
            mpi_run,
            "['/bin/sh', '-c', mpirun_command]",
            "['/bin/sh', '-c', 'exec ' + mpirun_command]",
            "a signal to horovodrun reaches mpirun; before, it killed a shell and left the ranks running",
        ),
        Patch(
            gloo_run,
            "    for name, value in sorted(res.items(), key=lambda item: item[1][1]):\n"
            "        exit_code, timestamp = value\n"
            "        if exit_code != 0:\n",
            "    for name, value in sorted(res.items(), key=lambda item: item[1][1]):\n"
            "        exit_code, timestamp = value\n"
            "        if exit_code != 0 and not settings.run_func_mode:\n"
            "            sys.exit(exit_code)\n"
            "        if exit_code != 0:\n",
            "horovodrun --gloo ends with the exit code of the first rank that failed, as over MPI, and no traceback",
        ),
        # -- elastic jobs
        Patch(
            gloo_run,
            "        for name, value in sorted(res.worker_results.items(), key=lambda item: item[1][1]):\n"
            "            exit_code, timestamp = value\n",
            "        if not res.worker_results and not settings.run_func_mode:  # none was counted, so none succeeded\n"
            "            sys.exit(next((code for code in reversed(driver._exit_codes) if code), 1))\n"
            "        for name, value in sorted(res.worker_results.items(), key=lambda item: item[1][1]):\n"
            "            exit_code, timestamp = value\n"
            "            if exit_code != 0 and not settings.run_func_mode:\n"
            "                sys.exit(exit_code)\n",
            "elastic: the same exit code, even of workers that are no longer counted, and no traceback",
        ),
        Patch(
            elastic_driver,
            "    def _handle_worker_exit(self, slot_info, exit_code, timestamp):\n",
            "    _exit_codes = []\n\n"
            "    def _handle_worker_exit(self, slot_info, exit_code, timestamp):\n"
            "        self._exit_codes.append(exit_code)\n",
            "the same",
        ),
        Patch(
            gloo_run,
            "        min_hosts = _get_min_start_hosts(settings)\n"
            "        current_hosts = driver.wait_for_available_slots(settings.num_proc, min_hosts=min_hosts)\n",
            "        current_hosts = driver.wait_for_available_slots(settings.num_proc)\n"
            "        if network.filter_local_addresses(current_hosts.host_assignment_order):\n"
            "            min_hosts = _get_min_start_hosts(settings)\n"
            "            current_hosts = driver.wait_for_available_slots(settings.num_proc, min_hosts=min_hosts)\n",
            "elastic: this machine alone is enough, without --network-interface",
        ),
        Patch(
            registration,
            "        self._reset_count = 0\n",
            "        self._reset_count = 0\n        self._restarts = defaultdict(int)\n",
            respawn,
        ),
        Patch(
            registration,
            "        for host, slot in failures:\n            self._host_manager.blacklist(host)\n",
            "        alive = {host for host, slot in self.get(READY)}\n"
            "        for host, slot in failures:\n"
            "            self._restarts[host] += 1\n"
            "            if host not in alive or self._restarts[host] > 10:\n"
            "                self._host_manager.blacklist(host)\n",
            respawn,
        ),
        Patch(
            elastic_driver,
            "import WorkerStateRegistry\n",
            "import FAILURE, WorkerStateRegistry\n",
            respawn,
        ),
        Patch(
            elastic_driver,
            "                            for slot_info in slots])\n",
            "                            for slot_info in slots]) - self._worker_registry.get(FAILURE)\n",
            respawn,
        ),
        Patch(
            elastic_driver,
            "        else:\n            rendezvous_id = self._worker_registry.record_failure(",
            "        else:\n"
            "            with self._rendezvous._httpd.cache_lock:\n"
            "                self._rendezvous._httpd.cache.setdefault('lockstep', {})['again'] = b'yes'\n"
            "            rendezvous_id = self._worker_registry.record_failure(",
            "elastic: workers that wait for a new one are told at once if it dies (app/lockstep/comm/rendezvous.py)",
        ),
        # -- protection from other users
        *(Patch(*change) for change in (*secrets(), *listeners())),
    ]


def patch_horovod(source: Path, cxx_standard: int) -> None:
    """Patch an unpacked Horovod source tree in place. Raises `PatchError` if it differs from the expected one."""
    for patch in patches_for(cxx_standard):
        path = source / patch.file
        if not path.is_file():
            raise PatchError(f"{patch.file}: no such file in {source} (patch: {patch.why})")
        path.write_text(patch.apply(path.read_text()))
