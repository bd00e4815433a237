"""What is learned: the contract between the training loop and a task."""

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from lockstep.comm.cluster import Cluster
from lockstep.data.sharding import Ids
from lockstep.parallel.step import train_step
from lockstep.parallel.strategy import Strategy
from lockstep.settings import Settings

Forward = Callable[[Tensor], Tensor | None]


class WorkItem(Protocol):
    """What one update learns from: this rank's part of it."""

    @property
    def ids(self) -> Ids:
        """Which samples of a data set these are, for the ledger; none where there is no data set."""
        ...

    @property
    def index(self) -> int:
        """The number of the update in its epoch."""
        ...

    @property
    def global_size(self) -> int:
        """Samples, over all ranks."""
        ...


class Loader(Protocol):
    """Yields the work items, with a position to go on from.

    Attributes:
        epoch: that the next work item belongs to.
        consumed: how much of that epoch has been given away.
    """

    epoch: int
    consumed: int

    @property
    def num_samples(self) -> int:
        """Samples of the data set; 0 where there is none."""
        ...

    @property
    def updates_per_epoch(self) -> int: ...

    def position_after(self, num_updates: int) -> tuple[int, int]:
        """(epoch, consumed) after so many updates from the very beginning."""
        ...

    def rest_of_epoch(self) -> Iterator[Any]:
        """Collective: the units that are left of the epoch; then the position is the next epoch."""
        ...

    def after_checkpoint(self) -> None:
        """A checkpoint has been taken: what it does not hold begins anew, so that going on from it is exact."""
        ...


class Evaluation(Protocol):
    """How a model does, over all ranks; as text for people."""

    @property
    def scores(self) -> dict[str, float]:
        """What goes into metrics.jsonl and summary.json, by name; the first is the one by which runs are compared."""
        ...

    @property
    def counts(self) -> dict[str, int]:
        """How many samples or episodes the scores are of, for summary.json."""
        ...

    @property
    def details(self) -> dict[str, Any]:
        """What evaluation.json has beside the scores."""
        ...


class Task(ABC):
    """Builds the model, yields the next work item, gives the loss and evaluates. It is a strategy's `Objective`.

    Attributes:
        samples: what is counted, for people.
        num_metric_sums: numbers that an update adds up on each rank.
        curves: names in metrics.jsonl that are worth a picture.
        cluster, settings: of the run.
        dtype: of parameters.
    """

    samples: ClassVar[str]
    num_metric_sums: ClassVar[int]
    curves: ClassVar[tuple[str, ...]]

    def __init__(self, settings: Settings, cluster: Cluster) -> None:
        self.settings = settings
        self.cluster = cluster
        self._in_bf16 = settings.precision == "bf16"
        self.dtype = torch.float32 if self._in_bf16 else getattr(torch, settings.precision)
        self._layout = torch.channels_last if settings.model.channels_last else torch.contiguous_format
        torch.backends.cudnn.allow_tf32 = False  # float32 means float32, on GPUs too

    # -- the model -------------------------------------------------------------------------------------------------

    @abstractmethod
    def model_blocks(self) -> Iterator[tuple[str, nn.Module]]:
        """The network block by block, on this rank's device and of the run's data type: the same at every call."""

    def build_model(self) -> nn.Module:
        """The whole network."""
        model = nn.Sequential(OrderedDict(self.model_blocks()))
        if self.settings.model.compile:
            model.compile()
        return model

    @abstractmethod
    def example_inputs(self, num_samples: int) -> Tensor:
        """Inputs (n, ...) of up to `num_samples` samples, as the model takes them."""

    def outputs(self, model: nn.Module, inputs: Tensor) -> Tensor:
        """What `model`, or one of its blocks, makes of `inputs` (n, ...), in the run's precision."""
        if inputs.dim() == 4:
            inputs = inputs.contiguous(memory_format=self._layout)
        if self._in_bf16:
            with torch.autocast(inputs.device.type, torch.bfloat16):
                return model(inputs)  # type: ignore[no-any-return]
        return model(inputs)  # type: ignore[no-any-return]

    @abstractmethod
    def loss_sum(self, outputs: Tensor, batch: Any) -> tuple[Tensor, Tensor]:
        """The loss summed over `batch`, and its metric sums (num_metric_sums,) float64."""

    # -- learning --------------------------------------------------------------------------------------------------

    @property
    @abstractmethod
    def num_epochs(self) -> int:
        """Of the run."""

    @property
    @abstractmethod
    def evaluate_every(self) -> int:
        """Epochs between two evaluations; 0: only after the last."""

    @abstractmethod
    def build_loader(self, shard_id: int, num_shards: int, strategy: Strategy | None = None) -> Loader:
        """One shard of the work.

        Args:
            strategy: where the model is, for work that it takes part in.
        """

    def learn(self, item: Any, strategy: Strategy, seed: int, before_step: Callable[[], None] | None = None) -> Tensor:
        """Collective: one update; the arguments and what it raises are those of `train_step`.

        Returns:
            This rank's metric sums (num_metric_sums,).
        """
        return train_step(strategy, item, self, seed, before_step)

    @abstractmethod
    def scores(self, metric_sums: Sequence[float]) -> dict[str, float]:
        """The means that metric sums over all ranks stand for, by name; empty if they count nothing."""

    @abstractmethod
    def line(self, epoch: int, item: Any, num_samples: int, mean: dict[str, float], last: dict[str, float]) -> str:
        """A log line for people.

        Args:
            num_samples: of the run so far, over all ranks.
            mean: the scores since the line before.
            last: those of the last update alone.
        """

    @abstractmethod
    def immutable_settings(self, loader: Any, num_shards: int) -> dict[str, Any]:
        """What a run cannot change when it goes on, beside what holds for every task."""

    @abstractmethod
    def evaluate(self, model: nn.Module, forward: Forward, shard_id: int, num_shards: int) -> Evaluation:
        """Collective: how the model does, divided over the shards, each sample or episode once.

        Args:
            model: what is in evaluation mode meanwhile.
            forward: the model's outputs for inputs; None where another rank of the same shard has them.
        """


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """No dropout inside, and running statistics in place of the batch's."""
    was_training = model.training
    model.eval()
    yield
    model.train(was_training)
