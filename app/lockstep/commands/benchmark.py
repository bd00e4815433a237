"""How fast a run is, beside what limits it and beside its peers.

    env/run horovodrun -np 2 lockstep benchmark throughput    the run as launched, beside its ranks each for itself
    env/run horovodrun -np 2 lockstep benchmark comm          all-reduce by size, a fit, a forecast to 4,096 ranks
    env/run mpirun -np 4 lockstep benchmark sharding          is each strategy `replicated`? what it holds, sends
    env/run mpirun -np 2 lockstep benchmark pipeline          updates/s beside a pipeline's ideal, with its bubble
    env/run lockstep benchmark peers --ranks 2                DDP, Horovod's example, plain PyTorch, in turn
    env/run lockstep benchmark peers --suite sharding         ZeRO 1-3 beside PyTorch's ZeRO and FSDP2
    env/run lockstep benchmark scaling --ranks 1,2,4          weak and strong; starts the ranks itself

Each prints a table, and writes JSON and a picture to --out. `throughput`, `comm` and `pipeline` take every setting of
app/train.py beside their own (--help shows them), `sharding` those of the model's size; `scaling` hands on what it does
not know to the runs that it starts.
"""

import os
import sys

from lockstep.runtime.errors import SettingsError, run_alone
from lockstep.runtime.network_counters import OVER_LOOPBACK

IN_A_JOB = ("throughput", "comm", "sharding", "pipeline")
STARTING_JOBS = ("peers", "scaling")


def main() -> None:
    kind = sys.argv[1] if len(sys.argv) > 1 else "--help"
    args = sys.argv[2:]
    if kind in IN_A_JOB:
        if kind == "sharding":
            os.environ.update(OVER_LOOPBACK)  # so that the kernel counts what is sent
        # To import these is to become an MPI process, which could not start others.
        from lockstep.benchmark import inside_job as in_a_job
        from lockstep.comm.program import run_program

        run_program(lambda cluster: in_a_job.main(cluster, kind, args))
    elif kind in STARTING_JOBS:
        from lockstep.benchmark import launching as starting_jobs

        run_alone(lambda: starting_jobs.main(kind, args))
    elif kind in ("-h", "--help"):
        print(__doc__)
    else:
        kinds = ", ".join(IN_A_JOB + STARTING_JOBS)
        error = SettingsError(f"there is no benchmark {kind!r}: choose one of {kinds}")
        run_alone(lambda: _refuse(error))


def _refuse(error: SettingsError) -> None:
    raise error


if __name__ == "__main__":
    main()
