"""The memory of this process: freed blocks are kept for the next update, and the most that it ever had is told."""

import ctypes
import resource

# Of glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
_LARGEST_TRIM = 2**31 - 1
_MMAP_THRESHOLDS = (2**30, 2**25)  # bytes; a glibc that refuses the first takes the second


def keep_freed_memory() -> None:
    """Let malloc keep the memory of one update's activations for the next one.

    glibc gives large blocks back to the kernel when they are freed, and the kernel clears every page of the next ones:
    5,000 page faults an update of the reference network, a third of its time on one core, and a time that varies. Where
    the C library has no such setting, nothing happens.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_TRIM_THRESHOLD, _LARGEST_TRIM)
        any(mallopt(_M_MMAP_THRESHOLD, threshold) for threshold in _MMAP_THRESHOLDS)
        mallopt(_M_ARENA_MAX, 1)  # what Horovod's thread has freed is used by this one, too


def give_freed_memory_back() -> None:
    """Give to the kernel what is free now: after a model was built or cut, which takes more than what follows."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def peak_mib() -> float:
    """The most memory that this process has had at once, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
