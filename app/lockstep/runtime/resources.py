"""What this process takes of its node: memory (keep freed blocks for the next update, release them, the peak), and the
bytes that the ranks of a node have sent each other, by the kernel's count.
"""

import ctypes
import os
import resource
from collections.abc import Callable
from pathlib import Path

# Constants of glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
_LARGEST_TRIM = 2**31 - 1
_MMAP_THRESHOLDS = (2**30, 2**25)  # bytes; older versions of glibc refuse the first


def keep_freed_memory() -> None:
    """Let malloc keep the memory of one update's activations for the next one.

    By default glibc returns large freed blocks to the kernel, which must clear every page of the next ones: 5,000 page
    faults an update of the reference network, a third of its time on one core, and a time that varies. Does nothing
    with another C library.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_TRIM_THRESHOLD, _LARGEST_TRIM)
        any(mallopt(_M_MMAP_THRESHOLD, threshold) for threshold in _MMAP_THRESHOLDS)
        mallopt(_M_ARENA_MAX, 1)  # so that this thread can reuse what Horovod's thread has freed


def release_freed_memory() -> None:
    """Return free memory to the kernel: after a model was built or cut, which needs more than the updates."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def peak_mib() -> float:
    """The peak resident memory of this process, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


# Open MPI reads these when it is loaded: they send messages over TCP and the loopback device, which counts bytes.
OVER_LOOPBACK = {"OMPI_MCA_btl": "tcp,self", "OMPI_MCA_btl_tcp_if_include": "lo", "OMPI_MCA_pml": "ob1"}
_COUNTER = Path("/sys/class/net/lo/statistics/tx_bytes")


def bytes_sent_counter() -> Callable[[], int] | None:
    """A function that returns the bytes sent over the loopback device so far, with TCP's headers (0.1 %) and all other
    traffic there; None unless MPI's messages use that device.
    """
    uses_loopback = all(os.environ.get(name) == value for name, value in OVER_LOOPBACK.items())
    return (lambda: int(_COUNTER.read_text())) if uses_loopback and _COUNTER.is_file() else None
