"""How many bytes this rank has sent, as counted by MPI itself."""

import ctypes
import os
from collections.abc import Callable
from typing import Any

from app.cluster.mpi import MPI

MONITORING = "OMPI_MCA_pml_monitoring_enable"  # Open MPI reads it when it is loaded; 1: count every message
_COUNTER = b"pml_monitoring_messages_size"
_CLASS_SIZE = 2  # MPI_T_PVAR_CLASS_SIZE of Open MPI's mpi.h


def bytes_sent_counter() -> Callable[[], int] | None:
    """A function that gives the bytes that this rank has sent to all others; None where MPI does not count them.

    Collectives count, too: they are made of messages. (MPI Forum 2021, section 15.3, performance variables.)
    """
    if os.environ.get(MONITORING) != "1" or "Open MPI" not in MPI.Get_library_version():
        return None
    mpi: Any = ctypes.CDLL(MPI.__file__)
    provided, index, count = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    session, handle = ctypes.c_void_p(), ctypes.c_void_p()
    address: Any = MPI._addressof
    world = ctypes.c_void_p.from_address(address(MPI.COMM_WORLD))
    steps = (
        lambda: mpi.MPI_T_init_thread(0, ctypes.byref(provided)),
        lambda: mpi.MPI_T_pvar_get_index(_COUNTER, _CLASS_SIZE, ctypes.byref(index)),
        lambda: mpi.MPI_T_pvar_session_create(ctypes.byref(session)),
        lambda: mpi.MPI_T_pvar_handle_alloc(
            session, index, ctypes.byref(world), ctypes.byref(handle), ctypes.byref(count)
        ),
        lambda: mpi.MPI_T_pvar_start(session, handle),
    )
    if any(step() != 0 for step in steps):
        return None
    by_peer: Any = (ctypes.c_size_t * count.value)()

    def bytes_sent() -> int:
        if mpi.MPI_T_pvar_read(session, handle, ctypes.byref(by_peer)) != 0:
            raise RuntimeError("MPI no longer tells how many bytes were sent")
        return sum(by_peer) - by_peer[MPI.COMM_WORLD.rank]

    return bytes_sent
