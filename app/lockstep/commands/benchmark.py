"""How fast a run is, beside what limits it and beside its peers.

    env/run horovodrun -np 2 lockstep benchmark throughput    the run as launched, beside its ranks each for itself
    env/run horovodrun -np 2 lockstep benchmark comm          all-reduce by size, a fit, a forecast to 4,096 ranks
    env/run mpirun -np 4 lockstep benchmark sharding          is each strategy `replicated`? what it holds, sends
    env/run mpirun -np 2 lockstep benchmark pipeline          updates/s beside a pipeline's ideal, with its bubble
    env/run lockstep benchmark peers --ranks 2                DDP, Horovod's example, plain PyTorch, in turn
    env/run lockstep benchmark peers --suite sharding         ZeRO 1-3 beside PyTorch's ZeRO and FSDP2
    env/run lockstep benchmark scaling --ranks 1,2,4          weak and strong; starts the ranks itself

    env/run mpirun -np 2 lockstep benchmark checks              what ledger, replica check and checkpoints cost
    env/run mpirun -np 2 lockstep benchmark optimizer          our gradient buffer beside Horovod's own optimizer
    env/run mpirun -np 2 lockstep benchmark preemption          PPO with and without preemption of slow ranks
    env/run lockstep benchmark ppo                              PPO beside CleanRL's style and Stable-Baselines3
    env/run lockstep benchmark two_nodes -- COMMAND             COMMAND on two simulated nodes, over a slow link

Each prints a table; those of the first group write JSON and a picture to --out. `throughput`, `comm` and `pipeline`
take every setting of app/train.py beside their own (--help shows them), `sharding` those of the model's size; `scaling`
hands on what it does not know to the runs that it starts.
"""

import os
import sys
from importlib import import_module

from lockstep.runtime.errors import SettingsError, run_alone
from lockstep.runtime.network_counters import OVER_LOOPBACK

INSIDE_JOB = ("throughput", "comm", "sharding", "pipeline")
LAUNCHING = ("peers", "scaling")
BY_RANKS = {"checks": "checks", "optimizer": "horovod_optimizer", "preemption": "preemption"}  # kind: module
ALONE = {"ppo": "ppo_peers", "two_nodes": "two_nodes"}


def main() -> None:
    kind = sys.argv[1] if len(sys.argv) > 1 else "--help"
    arguments = sys.argv[2:]
    if kind in ("-h", "--help"):
        print(__doc__)
    elif kind in LAUNCHING:
        from lockstep.benchmark import launching

        run_alone(lambda: launching.main(kind, arguments))
    elif kind in ALONE:
        run_alone(lambda: import_module(f"lockstep.benchmark.{ALONE[kind]}").main(arguments))
    elif kind in INSIDE_JOB or kind in BY_RANKS:
        if kind == "sharding":
            os.environ.update(OVER_LOOPBACK)  # so that the kernel counts what is sent
        # To import these is to become an MPI process, which could not start others.
        from lockstep.benchmark import inside_job
        from lockstep.comm.program import run_program

        if kind in BY_RANKS:
            run_program(lambda cluster: import_module(f"lockstep.benchmark.{BY_RANKS[kind]}").main(cluster, arguments))
        else:
            run_program(lambda cluster: inside_job.main(cluster, kind, arguments))
    else:
        run_alone(lambda: _refuse(kind))


def _refuse(kind: str) -> None:
    kinds = ", ".join([*INSIDE_JOB, *LAUNCHING, *BY_RANKS, *ALONE])
    raise SettingsError(f"there is no benchmark {kind!r}: choose one of {kinds}")
