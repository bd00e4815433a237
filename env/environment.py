"""Create, inspect and repair the virtual environment. Its state is always read from the files themselves."""

from __future__ import annotations

import csv
import fcntl
import hashlib
import json
import os
import shlex
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import Distribution, distributions
from pathlib import Path

from env.lockfile import Pin, normalise
from env.steps import run_logged, say

# The user's variables that would redirect or change a build or an installation.
UNWANTED = (
    "PYTHONHOME",
    "PYTHONPATH",
    "PIP_TARGET",
    "PIP_PREFIX",
    "PIP_REQUIREMENT",
    "PIP_CONSTRAINT",
    "__PYVENV_LAUNCHER__",
)


def fingerprint(root: Path) -> str:
    """Compute the digest of all files that determine an environment. `env/run` computes the same in bash."""
    files = [root / "env" / "requirements.lock", *sorted((root / "env").glob("*.py"))]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


@dataclass(frozen=True)
class Environment:
    """The virtual environment of one clone."""

    root: Path
    venv: Path

    @property
    def python(self) -> Path:
        return self.venv / "bin" / "python"

    @property
    def site_packages(self) -> Path:
        return self.venv / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}" / "site-packages"

    @property
    def settings_file(self) -> Path:
        """The file of shell assignments for `activate`, with the stamp that `env/run` compares."""
        return self.venv / "lockstep.sh"

    def log(self, step: str) -> Path:
        return self.venv / "logs" / f"{step}.log"

    def variables(self) -> dict[str, str]:
        """Return the environment variables for commands that build or install."""
        kept = {
            name: value
            for name, value in os.environ.items()
            if name not in UNWANTED and not name.startswith("HOROVOD_")
        }
        path = [str(self.venv / "bin"), os.environ["PATH"]]
        # Some sites set user = true in pip.conf, which no virtual environment allows.
        return kept | {"PATH": os.pathsep.join(path), "VIRTUAL_ENV": str(self.venv), "PIP_USER": "0"}

    @contextmanager
    def lock(self) -> Iterator[bool]:
        """Lock the environment against other calls. Yields whether this call had to wait for another."""
        self.venv.mkdir(parents=True, exist_ok=True)
        waited = False
        with (self.venv / "setup.lock").open("a") as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                waited = True
                say(f"waiting for another env/setup that works on {self.venv}")
                fcntl.flock(handle, fcntl.LOCK_EX)
            except OSError:  # some parallel file systems have no locks
                say(f"warning: {self.venv} is on a file system without locks: do not call env/setup twice at once")
            yield waited

    def settings(self) -> dict[str, str]:
        """What the last `write_settings` recorded."""
        if not self.settings_file.is_file():
            return {}
        words = shlex.split(self.settings_file.read_text(), comments=True)
        return dict(word.split("=", 1) for word in words if "=" in word)

    @property
    def stamp(self) -> str:
        """What a complete environment of this clone bears; `env/run` compares it."""
        return f"{fingerprint(self.root)} {self.root}"

    def write_settings(self, settings: Mapping[str, str], complete: bool) -> None:
        """Replace the settings file in one move. Only a complete environment bears a stamp that `env/run` accepts."""
        lines = ["# Written by env/setup, read by env/run and env/activate."]
        # Fewer entries in site-packages than now means that something was deleted.
        entries = sum(1 for _ in self.site_packages.glob("[!.]*")) if complete else 0
        everything = {
            "lockstep_stamp": self.stamp if complete else "incomplete",
            "lockstep_venv": str(self.venv),
            "lockstep_packages": str(self.site_packages),
            "lockstep_python": sys.executable,
            "lockstep_entries": f"{entries}",
        }
        lines += [f"{name}={shlex.quote(value)}" for name, value in (dict(settings) | everything).items()]
        new = self.settings_file.with_suffix(".new")
        new.write_text("\n".join(lines) + "\n")
        new.replace(self.settings_file)

    def was_moved(self) -> bool:
        """Whether it was built for another Python version or in another folder, which its scripts name."""
        recorded = Path(self.settings().get("lockstep_packages", self.site_packages))
        same = recorded == self.site_packages or (
            recorded.is_dir() and self.site_packages.is_dir() and recorded.samefile(self.site_packages)
        )
        return not same

    def is_intact(self) -> bool:
        return os.access(self.python, os.X_OK) and self.site_packages.is_dir() and not self.was_moved()

    def create(self, log: Path) -> None:
        """Create the virtual environment, or repair one that lost its Python."""
        if self.was_moved():
            for folder in ("bin", "lib", "include", "share", "etc"):
                shutil.rmtree(self.venv / folder, ignore_errors=True)
        # Use the base Python: one in a virtual environment would make this one depend on it.
        run_logged([sys._base_executable, "-m", "venv", self.venv], log, self.variables())  # type: ignore[attr-defined]

    def installed(self) -> dict[str, Distribution]:
        found = distributions(path=[str(self.site_packages)])
        return {normalise(dist.metadata["Name"] or ""): dist for dist in found}

    def broken(self, pins: Iterable[Pin]) -> list[Pin]:
        """Return the pins that are not installed in the pinned version with all files."""
        installed = self.installed()

        def is_right(pin: Pin) -> bool:
            dist = installed.get(pin.name)
            return dist is not None and dist.version == pin.version and is_whole(dist)

        return [pin for pin in pins if not is_right(pin)]

    def pip(self, *arguments: str | Path, log: Path, env: Mapping[str, str] | None = None) -> None:
        command = [self.python, "-m", "pip", "--no-input", "--disable-pip-version-check", *arguments]
        run_logged(command, log, env or self.variables())

    def install(self, pins: Iterable[Pin], log: Path) -> None:
        """Install pins, checked by hash. Bytecode is not compiled: the last step writes it for the imported modules."""
        pins = list(pins)
        if not pins:
            return
        installed = self.installed()
        for pin in pins:
            if pin.name in installed and installed[pin.name].read_text("RECORD") is None:
                self.forget(installed[pin.name])
        requirements = log.with_suffix(".txt")
        requirements.parent.mkdir(parents=True, exist_ok=True)
        requirements.write_text("".join(pin.block for pin in pins))
        self.pip("install", "--no-deps", "--require-hashes", "--force-reinstall", "--no-compile",
                 "--progress-bar", "off", "-r", requirements, log=log)  # fmt: skip

    def forget(self, dist: Distribution) -> None:
        """Delete a package's metadata; without its RECORD pip refuses to uninstall it."""
        for folder in self.site_packages.glob(f"{dist.metadata['Name'] or '?'}-*.dist-info".replace("-", "[-_]", 1)):
            shutil.rmtree(folder, ignore_errors=True)

    def has_wheel(self, name: str, label: str) -> bool:
        """Whether the wheel from the cache folder `label` is installed with all files; pip records its origin."""
        dist = self.installed().get(name)
        if dist is None or not is_whole(dist):
            return False
        came_from = json.loads(dist.read_text("direct_url.json") or "{}").get("url", "")
        return label in str(came_from).split("/")

    def install_wheel(self, name: str, wheel: Path, log: Path) -> None:
        """Install a wheel that was built here, over any installed version."""
        dist = self.installed().get(name)
        if dist is not None and dist.read_text("RECORD") is None:
            self.forget(dist)
        self.pip("install", "--no-deps", "--force-reinstall", "--no-compile", wheel, log=log)


def is_whole(dist: Distribution) -> bool:
    """Whether all files of a package exist with their recorded sizes."""
    record = dist.read_text("RECORD")
    if not record:
        return False
    base = Path(str(dist.locate_file("")))
    for name, _, size in csv.reader(record.splitlines()):
        if name.endswith(".pyc"):
            continue
        try:
            if size and (base / name).stat().st_size != int(size):
                return False
        except OSError:
            return False
    return True
