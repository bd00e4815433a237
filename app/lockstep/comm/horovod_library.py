"""What Horovod was built with, and how it is started. Its collectives are in collectives.py."""

import os
from collections.abc import Sequence

from lockstep.comm.mpi_library import MPI as MPI  # isort: skip  before Horovod
import horovod.torch as hvd
import torch

from lockstep.runtime.affinity import threads_at_lowest_priority


def horovod_operations() -> list[str]:
    """What Horovod was built with."""
    built = {"MPI": hvd.mpi_built(), "Gloo": hvd.gloo_built(), "NCCL": hvd.nccl_built()}
    return [name for name, is_built in built.items() if is_built]


def gpu_left_idle() -> bool:
    """There is a GPU, but Horovod was built without NCCL, so that ranks compute on the CPU."""
    return torch.cuda.is_available() and not hvd.nccl_built()


def start_horovod(device: torch.device, sets: Sequence[hvd.ProcessSet] = ()) -> None:
    # Tensors that happen to be ready together would be fused: added up in another order from run to run, and copied
    # into a buffer of 128 MiB.
    os.environ.setdefault("HOROVOD_FUSION_THRESHOLD", "0")
    if device.type == "cuda":
        hvd.init(process_sets=sets)  # NCCL's own threads are children of Horovod's: they keep their priority
    else:
        # How often its thread looks for work, in milliseconds: at Horovod's own 1 an all-reduce begins half of that
        # late. That looking takes no time from the rank is seen to by `threads_at_lowest_priority`.
        os.environ.setdefault("HOROVOD_CYCLE_TIME", "0.1")
        with threads_at_lowest_priority():
            hvd.init(process_sets=sets)
