"""A peer: PyTorch's FSDP2 (`fully_shard`: ZeRO stage 3; with --keep stage 2), over gloo.

torchrun --standalone --nproc-per-node 2 -m lockstep.benchmark.peers.fsdp2 [--keep] [--pin]
"""

import sys

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from lockstep.benchmark.peers.sharding import train


def build(model: nn.Module, learning_rate: float) -> tuple[nn.Module, torch.optim.Optimizer]:
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    for block in model.children():
        if any(True for _ in block.parameters()):
            fully_shard(block, mesh=mesh, reshard_after_forward=not keep)
    fully_shard(model, mesh=mesh, reshard_after_forward=not keep)
    return model, torch.optim.Adam(model.parameters(), lr=learning_rate)


if __name__ == "__main__":
    keep = "--keep" in sys.argv
    sys.argv = [argument for argument in sys.argv if argument != "--keep"]
    train(__doc__, build)
