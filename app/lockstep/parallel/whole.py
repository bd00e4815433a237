"""What replicas and the stages of a pipeline have in common: a rank that holds a parameter holds all of it."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from lockstep.comm.cluster import Cluster
from lockstep.data.batch import Batch
from lockstep.parallel.gradients import Gradients
from lockstep.parallel.strategy import Objective, Strategy
from lockstep.parallel.tensor_slices import Piece, SavedState, State, load_model, model_state
from lockstep.settings import GradientSettings


class WholeParameters(Strategy):
    """
    Attributes:
        gradients: of what this rank holds, after an update over all `replicas`.
    """

    def __init__(
        self,
        cluster: Cluster,
        settings: GradientSettings,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        like: Mapping[str, Tensor],
        first_names: Mapping[str, str],
        replicas: Cluster,
    ) -> None:
        """
        Args:
            model: what this rank holds.
            replicas: the ranks that hold the same.

        Raises:
            SettingsError: on every rank: the number of replicas does not fit `settings`.
        """
        pieces: dict[Tensor, Piece] = {}
        for name, parameter in model.named_parameters():
            pieces[parameter] = Piece.whole(name, parameter)
        super().__init__(cluster, settings, model, optimizer, pieces, like, first_names, replicas)
        self._num_micro_batches = settings.num_micro_batches
        self.gradients = Gradients(model, replicas, settings)

    @abstractmethod
    def _backward(self, batch: Batch, objective: Objective, seed: int, send: bool = True) -> Tensor:
        """`send` lets gradients go to the other replicas as they become ready; without it, they stay this rank's."""

    def reduce_gradients(self) -> None:
        self.gradients.finish()

    def _reduced_gradients(self) -> Sequence[Tensor]:
        return [self.gradients.flat]

    def _not_finite(self, batch: Batch, objective: Objective, seed: int) -> list[str]:
        self._backward(batch, objective, seed, send=False)
        return self.gradients.not_finite(self.model)

    def _model_state(self) -> State:
        return model_state(self.model)

    def _load_model(self, saved: SavedState) -> None:
        load_model(self.model, saved)
