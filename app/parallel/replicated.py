"""Every rank holds the whole model; gradients are summed over all ranks after each backward pass."""

from collections import Counter
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from app.cluster.comm import Cluster
from app.cluster.failure import ReplicasDifferError
from app.data.loader import Batch
from app.parallel.merge import merge_shards, shard_of, state_digest, state_tensors

LossSum = Callable[[nn.Module, Batch], tuple[Tensor, Tensor]]
"""(model, batch) -> the loss *summed* over the batch, with its graph, and tallies (k,) float64 that add up."""


class Replicated:
    """Synchronous data parallelism: the same model, the same step, on every rank.

    Gradients live in one flat buffer per data type, of which each parameter's `.grad` is a view: one all-reduce an
    update, of fixed size and order, with no copy in or out.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, cluster: Cluster) -> None:
        self.model = model
        self.optimizer = optimizer
        self._cluster = cluster
        self._gradients = _flat_gradients(model)

    def synchronise(self) -> None:
        """Collective: every rank takes rank 0's parameters and buffers, and all make sure that they are equal.

        Raises:
            ReplicasDifferError: on every rank, naming the ranks that differ from the others.
        """
        self._cluster.broadcast_parameters(state_tensors(self.model))
        self._agreed_digest("after the broadcast of parameters")

    def update(self, micro_batches: Sequence[Batch], loss_sum: LossSum) -> Tensor:
        """Collective: one optimizer step along the exact mean gradient over the global batch.

        Each rank divides its summed loss by the *global* number of samples, and the gradients are summed: ranks may
        hold different numbers of samples, or none.

        Args:
            micro_batches: this rank's samples; their `global_size` adds up to the global batch.
            loss_sum: what to minimise.

        Returns:
            The sum of this rank's tallies (k,); the other ranks' are not in it.
        """
        global_size = sum(batch.global_size for batch in micro_batches)
        for gradient in self._gradients:
            gradient.zero_()
        tallies = []
        for batch in micro_batches:
            loss, tally = loss_sum(self.model, batch)
            (loss / global_size).backward()
            tallies.append(tally)
        for index, gradient in enumerate(self._gradients):
            self._cluster.sum_(gradient, name=f"gradient.{index}")
        self.optimizer.step()
        return torch.stack(tallies).sum(0)

    def full_state(self) -> dict[str, Tensor] | None:
        """Collective: the merged model on rank 0, None elsewhere (seed, step 5 of section 3).

        Rank r gives part r of every tensor, so that the merged model comes from all ranks alike; it is made sure that
        all ranks hold the same model, and that the merged one is it.

        Raises:
            ReplicasDifferError: on every rank, naming the ranks that differ from the others.
        """
        digest = self._agreed_digest("at the merge")
        state = state_tensors(self.model)
        rank, size = self._cluster.rank, self._cluster.size
        gathered = {name: self._cluster.gather_parts(shard_of(tensor, rank, size)) for name, tensor in state.items()}
        merged = merge_shards(gathered, like=state) if self._cluster.is_root else None
        if merged is not None and state_digest(merged) != digest:
            raise ReplicasDifferError(
                "the merged model is not the model that all ranks hold: parts were lost on the way"
            )
        return merged

    def _agreed_digest(self, when: str) -> str:
        """Collective: the digest that every rank's model has; the ranks outside the majority are named if not."""
        digests = self._cluster.all_gather_object(state_digest(self.model))
        majority, _ = Counter(digests).most_common(1)[0]
        differing = [rank for rank, digest in enumerate(digests) if digest != majority]
        if differing:
            ranks = ", ".join(map(str, differing))
            error = ReplicasDifferError(f"the replicas differ {when}: rank {ranks} does not hold the others' model")
            error.shared = True
            raise error
        return majority


def _flat_gradients(model: nn.Module) -> list[Tensor]:
    """Give each trainable parameter a `.grad` that is a view of one flat buffer per (data type, device).

    A view has its parameter's own strides, without which fused optimizers refuse channels-last weights.
    """
    groups: dict[tuple[torch.dtype, torch.device], list[nn.Parameter]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            groups.setdefault((parameter.dtype, parameter.device), []).append(parameter)
    buffers = []
    for (dtype, device), parameters in groups.items():
        buffer = torch.zeros(sum(parameter.numel() for parameter in parameters), dtype=dtype, device=device)
        offset = 0
        for parameter in parameters:
            parameter.grad = buffer.as_strided(parameter.size(), parameter.stride(), offset)
            offset += parameter.numel()
        buffers.append(buffer)
    return buffers
