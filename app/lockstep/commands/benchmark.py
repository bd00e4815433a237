"""Measures how fast a run is, compared with its limits and with other frameworks.

    env/run horovodrun -np 2 lockstep benchmark throughput    the run as launched, and its ranks without communication
    env/run horovodrun -np 2 lockstep benchmark comm          all-reduce by size, a fit, a forecast up to 4,096 ranks
    env/run mpirun -np 4 lockstep benchmark sharding          equality with `replicated`; memory held, bytes sent
    env/run mpirun -np 2 lockstep benchmark pipeline          updates/s compared with the ideal of its bubble
    env/run lockstep benchmark peers --ranks 2                DDP, Horovod's example, plain PyTorch, in turn
    env/run lockstep benchmark peers --suite sharding         ZeRO 1-3 and PyTorch's ZeRO and FSDP2
    env/run lockstep benchmark scaling --ranks 1,2,4          weak and strong scaling; starts the ranks itself

    env/run mpirun -np 2 lockstep benchmark checks              cost of ledger, replica check and checkpoints
    env/run mpirun -np 2 lockstep benchmark optimizer          our gradient buffer and Horovod's own optimizer
    env/run mpirun -np 2 lockstep benchmark preemption          PPO with and without preemption of slow ranks
    env/run lockstep benchmark ppo                              our PPO, CleanRL's style and Stable-Baselines3
    env/run lockstep benchmark two_nodes -- COMMAND             COMMAND on two simulated nodes, over a slow link

Each prints a table; those of the first group also write JSON and a figure to --out. `throughput`, `comm` and
`pipeline` take every setting of app/train.py in addition to their own options (see --help), `sharding` those of the
model's size; `scaling` passes unknown options on to the runs that it starts.
"""

import os
import sys
from importlib import import_module

from lockstep.runtime.errors import SettingsError, run_alone
from lockstep.runtime.resources import OVER_LOOPBACK

INSIDE_JOB = ("throughput", "comm", "sharding", "pipeline")
LAUNCHING = ("peers", "scaling")
OTHER_INSIDE_JOB = {"checks": "checks", "optimizer": "horovod_optimizer", "preemption": "preemption"}  # kind -> module
ALONE = {"ppo": "ppo_peers", "two_nodes": "two_nodes"}


def main() -> None:
    kind, *arguments = sys.argv[1:] or ["--help"]
    if kind in ("-h", "--help"):
        print(__doc__)
    elif kind in LAUNCHING:
        from lockstep.benchmark import launching

        run_alone(lambda: launching.main(kind, arguments))
    elif kind in ALONE:
        run_alone(lambda: import_module(f"lockstep.benchmark.{ALONE[kind]}").main(arguments))
    elif kind in INSIDE_JOB or kind in OTHER_INSIDE_JOB:
        if kind == "sharding":
            os.environ.update(OVER_LOOPBACK)  # the kernel counts the bytes sent over it
        # These imports start MPI, and an MPI process could not start other jobs.
        from lockstep.benchmark import inside_job
        from lockstep.comm.program import run_program

        if kind in OTHER_INSIDE_JOB:
            name = f"lockstep.benchmark.{OTHER_INSIDE_JOB[kind]}"
            run_program(lambda cluster: import_module(name).main(cluster, arguments))
        else:
            run_program(lambda cluster: inside_job.main(cluster, kind, arguments))
    else:
        run_alone(lambda: _refuse(kind))


def _refuse(kind: str) -> None:
    kinds = ", ".join([*INSIDE_JOB, *LAUNCHING, *OTHER_INSIDE_JOB, *ALONE])
    raise SettingsError(f"there is no benchmark {kind!r}: choose one of {kinds}")
