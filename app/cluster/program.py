"""How every Lockstep program begins and ends: join the job, run, and leave it with one message and one exit code."""

import math
import sys
import time
import traceback
from collections.abc import Callable

from app.cluster.comm import Cluster
from app.cluster.failure import ExitCode, LockstepError
from app.cluster.mpi import abort_job, rank_in_job


def run_program(main: Callable[[Cluster], None]) -> None:
    """Collective: run `main` on every rank and exit; an error on any rank is told once and ends all ranks."""
    cluster: Cluster | None = None
    rank = rank_in_job()
    try:
        cluster = Cluster.start()
        main(cluster)
    except SystemExit as request:  # --help and --print_config, agreed by all ranks
        _leave(cluster, request.code)
    except LockstepError as error:
        if not error.shared:
            _abort(rank, f"rank {rank}: {error}", error.exit_code)
        if rank == 0:
            _tell(str(error))
        _leave(cluster, error.exit_code)
    except KeyboardInterrupt:
        _abort(rank, "interrupted", ExitCode.INTERRUPTED)
    except BaseException as error:
        delay = 2.0 if type(error).__name__ == "HorovodInternalError" else 0.0  # the echo of another rank's failure
        _abort(rank, f"rank {rank}:\n{traceback.format_exc()}", ExitCode.BUG, delay)
    else:
        _leave(cluster, ExitCode.DONE)


def _leave(cluster: Cluster | None, code: object) -> None:
    if cluster is not None:
        cluster.stop()
    sys.exit(code)  # type: ignore[arg-type]


def _abort(rank: int, message: str, code: ExitCode, delay_seconds: float = 0.0) -> None:
    """Tell `message` and end the whole job.

    When several ranks fail at once, the lowest of them speaks and its abort silences the others: each waits a little
    longer than the one before it (1.0 s for rank 15, 3.0 s for rank 4095).
    """
    time.sleep(delay_seconds + 0.25 * math.log2(1 + rank))
    _tell(message)
    abort_job(code)
    sys.exit(code)


def _tell(message: str) -> None:
    print(f"lockstep: {message.rstrip()}", file=sys.stderr, flush=True)
