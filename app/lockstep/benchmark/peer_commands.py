"""The commands that are compared: Lockstep and its peers, as their users write them and pinned."""

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field

LOCKSTEP, BF16, ONE_RANK = "Lockstep", "Lockstep, bf16", "Lockstep, one rank"
ALONE, ALONE_PINNED = "plain PyTorch, one process", "plain PyTorch, one process, pinned"
THROUGHPUT = "lockstep benchmark throughput --json true --rounds 1 --limit false --data.batch_size_per_rank 32"
VIT = (  # 49.7 million parameters, as in peers/sharding.py
    "--model.name vit --model.vit.width 768 --model.vit.depth 7 --model.vit.num_heads 12 --optimizer.name adam "
    "--optimizer.weight_decay 0 --data.batch_size_per_rank 8 --updates 10"
)
HOW = ("", ", pinned")
ZERO = {
    "PyTorch ZeroRedundancyOptimizer": ("zero1", "zero_redundancy"),
    "PyTorch FSDP2, parameters kept": ("zero2", "fsdp2 --keep"),
    "PyTorch FSDP2": ("zero3", "fsdp2"),
}
LOCKSTEP_COMMANDS = {
    LOCKSTEP: f"{{launcher}} {THROUGHPUT}",
    BF16: f"{{launcher}} {THROUGHPUT} --precision bf16",
    ONE_RANK: THROUGHPUT,
}


@dataclass(frozen=True)
class Peer:
    """A command to be timed.

    Attributes:
        environment: what it has other than this process; None: unset.
        num_copies: processes to start at once, whose rates are added; each is told its LOCAL_RANK.
    """

    name: str
    command: tuple[str, ...]
    environment: Mapping[str, str | None] = field(default_factory=dict)
    num_copies: int = 1


def peers(
    num_ranks: int, num_cores: int, environment: Mapping[str, str], launcher: str = "horovodrun -np {ranks}"
) -> list[Peer]:
    """Lockstep and its peers, all on the CPU.

    Args:
        num_cores: cores of this machine that we may use.
        environment: of this process; its LOCKSTEP_DEFAULTS names what env/activate has set.
        launcher: starts `ranks` processes of Lockstep or Horovod.
    """
    launcher = launcher.format(ranks=num_ranks)
    cpu: dict[str, str | None] = {"CUDA_VISIBLE_DEVICES": ""}
    written = cpu | dict.fromkeys(_lockstep_only(environment, oversubscribed=num_ranks > num_cores))
    pinned = written | {"OMPI_MCA_mpi_yield_when_idle": "1"}
    first = pinned | {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": str(num_ranks)}  # alone, on the cores of rank 0
    ddp = f"torchrun --standalone --nproc-per-node {num_ranks} -m lockstep.benchmark.peers.ddp"
    horovod = f"{launcher} python -m lockstep.benchmark.peers.horovod_example"
    plain = "python -m lockstep.benchmark.peers.plain"
    one_thread = cpu | {"OMP_NUM_THREADS": "1"}  # as the peers; a rank of Lockstep alone would take all cores
    arms = [
        *(_peer(name, command.format(launcher=launcher), one_thread) for name, command in LOCKSTEP_COMMANDS.items()),
        _peer("PyTorch DDP (gloo)", ddp, written),
        _peer("PyTorch DDP (gloo), pinned", f"{ddp} --pin", pinned),
        _peer("Horovod example", horovod, written),
        _peer("Horovod example, pinned", f"{horovod} --pin", pinned),
        _peer(ALONE, plain, written),
        _peer(ALONE_PINNED, f"{plain} --pin", first),
    ]
    never_talk = f"plain PyTorch, {num_ranks} pinned processes that never talk"
    return [*arms, _peer(never_talk, f"{plain} --pin", pinned, num_ranks)]


def sharding_peers(
    num_ranks: int, num_cores: int, environment: Mapping[str, str], launcher: str = "mpirun -np {ranks}"
) -> list[Peer]:
    """ZeRO 1 to 3 of Lockstep, and of PyTorch over gloo: as it is written, and with each rank pinned."""
    launcher = launcher.format(ranks=num_ranks)
    cpu: dict[str, str | None] = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    written = cpu | dict.fromkeys(_lockstep_only(environment, oversubscribed=num_ranks > num_cores))
    arms = []
    for name, (parallel, script) in ZERO.items():
        torchrun = f"torchrun --standalone --nproc-per-node {num_ranks}"
        command = f"{torchrun} -m lockstep.benchmark.peers.{script} --updates 10 --warmup 3"
        ours = f"{launcher} {THROUGHPUT.replace('--data.batch_size_per_rank 32', VIT)} --parallel {parallel}"
        arms += [
            _peer(f"Lockstep {parallel}", ours, cpu),
            _peer(name, command, written),
            _peer(f"{name}, pinned", f"{command} --pin", written),
        ]
    return arms


def _peer(name: str, command: str, environment: Mapping[str, str | None], num_copies: int = 1) -> Peer:
    return Peer(name, tuple(shlex.split(command)), environment, num_copies)


def _lockstep_only(environment: Mapping[str, str], oversubscribed: bool) -> list[str]:
    """The variables that env/activate has set and without which the peers start all the same."""
    names = environment.get("LOCKSTEP_DEFAULTS", "").split()
    needed = ("ALLOW_RUN_AS_ROOT", "rmaps") if oversubscribed else ("ALLOW_RUN_AS_ROOT",)
    return [name for name in names if not any(part in name for part in needed)]
