"""Every rank holds the whole model; gradients are summed over all ranks after each backward pass."""

from collections.abc import Callable, Mapping
from functools import reduce

import torch
from torch import Tensor, nn

from app.cluster.comm import Cluster
from app.cluster.failure import NonFiniteError, ReplicasDifferError
from app.config import GradientSettings
from app.data.loader import Batch
from app.parallel.gradients import Gradients
from app.parallel.merge import merge_shards, shard_of, state_digest, state_tensors
from app.parallel.sentinel import compare_replicas
from app.training.seeding import seed_update

LossSum = Callable[[nn.Module, Batch], tuple[Tensor, Tensor]]
"""(model, batch) -> the loss *summed* over the batch, with its graph, and tallies (k,) float64 that add up."""


class Replicated:
    """Synchronous data parallelism: the same model, the same step, on every rank.

    Attributes:
        model: this rank's replica.
        optimizer: over all parameters of `model`.
        gradients: of the last update, over all ranks.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        cluster: Cluster,
        settings: GradientSettings | None = None,
    ) -> None:
        """
        Raises:
            SettingsError: on every rank: the number of ranks does not fit `settings`.
        """
        settings = settings or GradientSettings()
        self.model = model
        self.optimizer = optimizer
        self._cluster = cluster
        self._num_micro_batches = settings.num_micro_batches
        self.gradients = Gradients(model, cluster, settings)
        names = {parameter: name for name, parameter in model.named_parameters()}
        self._names = [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]

    # -- updates ---------------------------------------------------------------------------------------------------

    def update(
        self,
        batch: Batch,
        loss_sum: LossSum,
        seed: int,
        before_step: Callable[[], None] | None = None,
    ) -> Tensor:
        """Collective: one optimizer step along the exact mean gradient over the global batch.

        Each rank divides its summed loss by the *global* number of samples, and the gradients are summed: ranks may
        hold different numbers of samples, or none. Adasum combines the means over each rank's own samples instead.

        Args:
            batch: this rank's samples of a global batch.
            loss_sum: what to minimise.
            seed: of everything random in this update, on this rank.
            before_step: called after the backward pass, before parameters and optimizer state change.

        Returns:
            The sum of this rank's tallies (k,); the other ranks' are not in it.

        Raises:
            NonFiniteError: on every rank, with nothing of the model changed but buffers, if a loss or gradient is
                infinite or not a number on any rank; names the first such rank and tensor.
        """
        tally = self._backward(batch, loss_sum, seed, send=True)
        self.gradients.finish()
        if not self.gradients.are_finite():  # waits for the device, so that all ranks stop or skip in this update
            raise self._non_finite(batch, loss_sum, seed)
        if before_step:
            before_step()
        self.optimizer.step()
        return tally

    def _backward(self, batch: Batch, loss_sum: LossSum, seed: int, send: bool) -> Tensor:
        """This rank's gradients; `send` (collective) lets them go to the other ranks as they become ready."""
        seed_update(seed, batch.inputs.device)
        gradients = self.gradients
        gradients.begin()
        num_samples = max(1, len(batch.targets)) if gradients.reduction == "adasum" else batch.global_size
        tallies: list[Tensor] = []
        pieces = batch.split(self._num_micro_batches)
        for piece in pieces:
            loss, tally = loss_sum(self.model, piece)
            loss = loss / num_samples
            gradients.add_loss(loss)
            if send and piece is pieces[-1]:
                gradients.send_from_now_on()
            loss.backward()
            tallies.append(tally)
        return reduce(torch.add, tallies)

    def _non_finite(self, batch: Batch, loss_sum: LossSum, seed: int) -> NonFiniteError:
        """Collective: compute this rank's part once more, by itself, and find the rank and the tensor."""
        self._backward(batch, loss_sum, seed, send=False)
        named = [(f"the gradient of {name}", parameter.grad) for name, parameter in self.model.named_parameters()]
        found = [name for name, tensor in [("the loss", self.gradients.flat[-1]), *named] if not _is_finite(tensor)]
        first = self._cluster.all_gather_object(found[:1])
        culprits = [f"{names[0]} on rank {rank}" for rank, names in enumerate(first) if names]
        where = culprits[0] if culprits else "the sum of the ranks' finite gradients"
        return NonFiniteError(f"{where} is infinite or not a number").on_all_ranks()

    # -- state -----------------------------------------------------------------------------------------------------

    def synchronise(self) -> None:
        """Collective: every rank takes rank 0's parameters and buffers, and all make sure that they are equal.

        Raises:
            ReplicasDifferError: on every rank, naming the first tensor and the ranks that differ.
        """
        self._cluster.broadcast_parameters(state_tensors(self.model))
        self.compare("after the broadcast of parameters")

    def compare(self, when: str) -> None:
        """Collective: make sure that all ranks hold the same model, optimizer state and learning rate.

        Raises:
            ReplicasDifferError: on every rank, naming the first tensor and the ranks that differ.
        """
        groups = {f"optimizer group {index}": group for index, group in enumerate(self._hyperparameters())}
        compare_replicas(self._cluster, {**self.state(), **groups}, when)

    def state(self) -> dict[str, Tensor]:
        """What must be saved to go on, by name: `model/<tensor>` and `optimizer/<kind>/<parameter>`. No copies.

        Knows nothing of the number of ranks.
        """
        state = {f"model/{name}": tensor for name, tensor in state_tensors(self.model).items()}
        for index, kinds in self.optimizer.state_dict()["state"].items():
            for kind, value in kinds.items():
                if value is not None:
                    state[f"optimizer/{kind}/{self._names[index]}"] = torch.as_tensor(value)
        return state

    @property
    def changed_by_forward(self) -> list[str]:
        """The names in `state` of what a forward pass may change: buffers, such as running means."""
        saved = state_tensors(self.model)
        return [f"model/{name}" for name, _ in self.model.named_buffers() if name in saved]

    def load_state(self, state: Mapping[str, Tensor] | None) -> None:
        """Collective: rank 0 gives the `state` of an earlier run, the others None; all go on from it.

        The optimizer's state is sent as it is, to ranks that have none yet, and the parameters are sent last.
        Horovod's `broadcast_optimizer_state` would instead make such ranks take a step with gradients of zero, which
        weight decay and momentum turn into another model.

        Raises:
            ReplicasDifferError: on every rank, if they are not equal afterwards.
        """
        of_optimizer = {name: tensor for name, tensor in (state or {}).items() if name.startswith("optimizer/")}
        layout = self._cluster.on_root(lambda: {name: (part.shape, part.dtype) for name, part in of_optimizer.items()})
        received = of_optimizer or {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in layout.items()}
        self._cluster.broadcast_parameters(received)
        by_index: dict[int, dict[str, Tensor]] = {}
        parameters = dict(self.model.named_parameters())
        for name, tensor in received.items():
            _, kind, of = name.split("/")
            if tensor.shape == parameters[of].shape:
                # Fused optimizers walk through memory: they take the elements for others unless the strides are equal.
                tensor = torch.empty_like(parameters[of]).copy_(tensor)
            by_index.setdefault(self._names.index(of), {})[kind] = tensor
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": by_index})
        if state is not None:
            model = {name.removeprefix("model/"): part for name, part in state.items() if name.startswith("model/")}
            self.model.load_state_dict(model)
        self.synchronise()

    def full_state(self) -> dict[str, Tensor] | None:
        """Collective: the merged model on rank 0, None elsewhere (seed, step 5 of section 3).

        Rank r gives part r of every tensor, so that the merged model comes from all ranks alike; it is made sure that
        all ranks hold the same model, and that the merged one is it.

        Raises:
            ReplicasDifferError: on every rank, naming the first tensor and the ranks that differ.
        """
        self.compare("at the merge")
        state = state_tensors(self.model)
        rank, size = self._cluster.rank, self._cluster.size
        gathered = {name: self._cluster.gather_parts(shard_of(tensor, rank, size)) for name, tensor in state.items()}
        merged = merge_shards(gathered, like=state) if self._cluster.is_root else None
        if merged is not None and state_digest(merged) != state_digest(state):
            raise ReplicasDifferError(
                "the merged model is not the model that all ranks hold: parts were lost on the way"
            )
        return merged

    def _hyperparameters(self) -> list[dict[str, object]]:
        return [
            {key: value for key, value in group.items() if key != "params"} for group in self.optimizer.param_groups
        ]


def _is_finite(tensor: Tensor | None) -> bool:
    return tensor is None or bool(tensor.isfinite().all())
