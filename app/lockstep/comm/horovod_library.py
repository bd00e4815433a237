"""What Horovod was built with, and how Lockstep starts it."""

import os
from collections.abc import Sequence

from lockstep.comm.mpi_library import MPI as MPI  # isort: skip  before Horovod
import horovod.torch as hvd
import torch

from lockstep.runtime.affinity import threads_at_lowest_priority


def horovod_operations() -> list[str]:
    """The libraries that Horovod was built with: some of MPI, Gloo and NCCL."""
    built = {"MPI": hvd.mpi_built(), "Gloo": hvd.gloo_built(), "NCCL": hvd.nccl_built()}
    return [name for name, is_built in built.items() if is_built]


def gpu_left_idle() -> bool:
    """Whether there is a GPU, but ranks compute on the CPU because Horovod was built without NCCL."""
    return torch.cuda.is_available() and not hvd.nccl_built()


def horovod_runs() -> bool:
    """Whether Horovod has been started in this process, and not stopped."""
    return bool(hvd.is_initialized())


def stop_horovod() -> None:
    """Stop Horovod, if it runs; not a collective."""
    hvd.shutdown()


def start_horovod(device: torch.device, sets: Sequence[hvd.ProcessSet] = ()) -> None:
    # Fusion would sum tensors that happen to be ready together in an order that changes from run to run, and copy them
    # into a buffer of 128 MiB.
    os.environ.setdefault("HOROVOD_FUSION_THRESHOLD", "0")
    if device.type == "cuda":
        hvd.init(process_sets=sets)  # not at low priority, which NCCL's threads would inherit
    else:
        # Milliseconds between two polls of Horovod's thread for work: at its default of 1 an all-reduce starts half a
        # millisecond late on average. At the lowest priority, polling takes no time from the rank.
        os.environ.setdefault("HOROVOD_CYCLE_TIME", "0.1")
        with threads_at_lowest_priority():
            hvd.init(process_sets=sets)
