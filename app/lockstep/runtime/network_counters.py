"""How many bytes the ranks of a node have sent each other, as counted by the kernel."""

import os
from collections.abc import Callable
from pathlib import Path

# Open MPI reads these when it is loaded: messages go over TCP and the loopback device, where the kernel counts them.
OVER_LOOPBACK = {"OMPI_MCA_btl": "tcp,self", "OMPI_MCA_btl_tcp_if_include": "lo", "OMPI_MCA_pml": "ob1"}
_COUNTER = Path("/sys/class/net/lo/statistics/tx_bytes")


def bytes_sent_counter() -> Callable[[], int] | None:
    """A function that gives the bytes that have crossed the loopback device so far, TCP's headers (0.1 %) and whatever
    else is sent there included; None unless messages go that way.
    """
    is_so = all(os.environ.get(name) == value for name, value in OVER_LOOPBACK.items())
    return (lambda: int(_COUNTER.read_text())) if is_so and _COUNTER.is_file() else None
