"""Test the environment: import all modules that the programs use, then compute a sum over all ranks.

    python -m env.prove NUM_RANKS

The imports also write bytecode, which pip was told not to compile: so only the modules in use are compiled.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys

MODULES = ("numpy", "torch", "safetensors.torch", "jsonargparse", "docstring_parser", "rich.progress",
           "matplotlib.pyplot", "tensorboardX", "mlxtend.data", "psutil", "yaml", "pytest")  # fmt: skip


def main(num_ranks: int) -> None:
    """Raise an error if an import fails, if there are not `num_ranks` ranks, or if their sum is wrong."""
    for name in MODULES:
        importlib.import_module(name)
    if importlib.util.find_spec("torchvision"):  # a site may have torch alone
        importlib.import_module("torchvision")

    from mpi4py import MPI  # before Horovod, since mpi4py requests full thread support  # noqa: I001
    import horovod.torch as hvd
    import torch

    hvd.init()
    assert hvd.size() == MPI.COMM_WORLD.size == num_ranks, (hvd.size(), MPI.COMM_WORLD.size, num_ranks)
    total = hvd.allreduce(torch.ones(1000), op=hvd.Sum)
    assert torch.equal(total, torch.full((1000,), float(num_ranks))), total
    print(f"rank {hvd.rank()} of {hvd.size()}: {MPI.Get_library_version().splitlines()[0]}, torch {torch.__version__}")


if __name__ == "__main__":
    main(int(sys.argv[1]))
