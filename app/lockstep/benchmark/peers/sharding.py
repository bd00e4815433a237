"""Two peers that shard: PyTorch's ZeroRedundancyOptimizer (ZeRO stage 1) and FSDP2 (stage 3; with --keep 2), over gloo.

torchrun --standalone --nproc-per-node 2 -m lockstep.benchmark.peers.sharding zero_redundancy [--pin]
torchrun --standalone --nproc-per-node 2 -m lockstep.benchmark.peers.sharding fsdp2 [--keep] [--pin]

The model is a vision transformer of 49.7 million parameters on the digits, trained with Adam.
"""

import os
from collections import OrderedDict

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler

from lockstep.benchmark.peers.common import Digits, measure, peer_parser, set_threads, update_of
from lockstep.models.networks import vit_blocks

BATCH_SIZE_PER_RANK = 8
LEARNING_RATE = 1e-6  # timed updates must not diverge to NaN


def main() -> None:
    parser = peer_parser(__doc__)
    parser.add_argument("kind", choices=["zero_redundancy", "fsdp2"])
    parser.add_argument("--keep", action="store_true", help="of fsdp2: keep parameters after the forward pass")
    arguments = parser.parse_args()
    set_threads(arguments.pin, int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"]))
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    data_set = Digits()
    sampler: DistributedSampler[int] = DistributedSampler(data_set)
    loader = DataLoader(data_set, BATCH_SIZE_PER_RANK, sampler=sampler, drop_last=True)
    model: nn.Module = nn.Sequential(
        OrderedDict(vit_blocks(width=768, depth=7, num_heads=12, patch_size=7, dropout=0.0))
    )
    optimizer: torch.optim.Optimizer
    if arguments.kind == "fsdp2":
        shard_fully(model, keep=arguments.keep)
        optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
    else:
        optimizer = ZeroRedundancyOptimizer(model.parameters(), optimizer_class=torch.optim.Adam, lr=LEARNING_RATE)
        model = DistributedDataParallel(model)

    update = update_of(model, optimizer)
    measure(update, loader, arguments, dist.barrier, dist.get_rank(), dist.get_world_size(), BATCH_SIZE_PER_RANK)
    dist.destroy_process_group()


def shard_fully(model: nn.Module, keep: bool) -> None:
    """Shard `model` in place, each block by itself; with `keep`, parameters stay gathered until the backward pass."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in model.children():
        if any(True for _ in block.parameters()):
            fully_shard(block, mesh=mesh, reshard_after_forward=not keep)
    fully_shard(model, mesh=mesh, reshard_after_forward=not keep)


if __name__ == "__main__":
    main()
