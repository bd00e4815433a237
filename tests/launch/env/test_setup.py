"""The whole build, as an ordinary user with the system's Python: several minutes, 3 GB of downloads."""

import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

from env.build import cache_folder
from tests.launch.env.test_readme import TRAIN
from tests.launching import ROOT, launch

SYSTEM = Path("/usr/bin/python3")
NOBODY = 65534
KEPT = ("PIP_", "http_proxy", "https_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "SSL_CERT")


@pytest.mark.thorough
@pytest.mark.timeout(3300)
@pytest.mark.skipif(not SYSTEM.exists(), reason=f"there is no {SYSTEM}")
def test_the_first_command_from_a_fresh_clone_as_an_ordinary_user() -> None:
    """Start without a home or a module, with Debian's Python, which compiles mpi4py.

    And Horovod, unless whoever runs this has it for the same torch: it takes minutes, and their own build compiled it.
    """
    with tempfile.TemporaryDirectory(prefix="lockstep-first-") as name:  # which, unlike pytest's, others may enter
        folder = Path(name)
        clone = folder / "a clone"
        subprocess.run(["git", "clone", "--quiet", "--no-hardlinks", ROOT, clone], check=True)
        (folder / "home").mkdir()
        wheels = folder / "cache" / "wheels"
        wheels.mkdir(parents=True)
        for built in (cache_folder() / "wheels").glob("horovod-*"):
            shutil.copytree(built, wheels / built.name)
        folder.chmod(0o755)
        as_nobody: list[str] = []
        if os.geteuid() == 0:
            as_nobody = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]
            for path in (folder, *folder.rglob("*")):
                os.chown(path, NOBODY, NOBODY, follow_symlinks=False)
        kept = [f"{key}={value}" for key, value in os.environ.items() if key.startswith(KEPT)]
        variables = [f"HOME={folder}/home", "PATH=/usr/local/bin:/usr/bin:/bin", f"LOCKSTEP_PYTHON={SYSTEM}"]
        command = ["env", "-i", *kept, *variables, f"LOCKSTEP_CACHE={folder}/cache", *as_nobody]
        command += [*TRAIN.split(), "--num_epochs", "1"]  # how much it learns in all is test_readme.py's
        done = launch(command, timeout_seconds=3000, cwd=clone)
        assert done.returncode == 0, done.output
        assert "env/setup stopped" not in done.stderr
        assert "[6/6]" in done.stderr
        assert float(re.findall(r"^Accuracy: (\S+) on 1000", done.stdout, re.MULTILINE)[0]) > 0.5
        built_on = (clone / ".venv" / "lockstep.sh").read_text()
        assert f"lockstep_python={SYSTEM}" in built_on
        for name in ("mpi4py", "horovod"):
            assert list(wheels.glob(f"{name}-*/*.whl"))
        shutil.rmtree(clone / ".venv")
