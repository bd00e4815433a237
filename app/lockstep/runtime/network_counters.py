"""The kernel's count of the bytes that the ranks of a node have sent each other."""

import os
from collections.abc import Callable
from pathlib import Path

# Open MPI reads these when it is loaded: they send messages over TCP and the loopback device, which counts bytes.
OVER_LOOPBACK = {"OMPI_MCA_btl": "tcp,self", "OMPI_MCA_btl_tcp_if_include": "lo", "OMPI_MCA_pml": "ob1"}
_COUNTER = Path("/sys/class/net/lo/statistics/tx_bytes")


def bytes_sent_counter() -> Callable[[], int] | None:
    """A function that returns the bytes sent over the loopback device so far, with TCP's headers (0.1 %) and all other
    traffic there; None unless MPI's messages use that device.
    """
    uses_loopback = all(os.environ.get(name) == value for name, value in OVER_LOOPBACK.items())
    return (lambda: int(_COUNTER.read_text())) if uses_loopback and _COUNTER.is_file() else None
