"""The interface between the trainer and a task: model, loader, loss and evaluation."""

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from lockstep.comm.cluster import Cluster
from lockstep.data.batch import Tree, map_tensors
from lockstep.data.sharding import Ids
from lockstep.models.block_sequence import BlockSequence, apply
from lockstep.parallel.step import train_step
from lockstep.parallel.strategy import Strategy
from lockstep.settings import Settings

NUM_IMAGE_DIMENSIONS = 4  # of a batch: samples, channels, height, width

Forward = Callable[[Tree], Any]


class WorkItem(Protocol):
    """This rank's samples of one update."""

    @property
    def ids(self) -> Ids:
        """Numbers of the samples in the data set, for the sample ledger; empty if there is no data set."""
        ...

    @property
    def index(self) -> int:
        """The number of the update in its epoch."""
        ...

    @property
    def global_size(self) -> int:
        """Number of samples over all ranks."""
        ...


class Loader(Protocol):
    """Yields work items and has a position from which a run can resume.

    Attributes:
        epoch: the epoch of the next work item.
        consumed: how much of that epoch has been yielded, over all shards.
    """

    epoch: int
    consumed: int

    @property
    def num_samples(self) -> int:
        """Number of samples of the data set; 0 if there is none."""
        ...

    @property
    def updates_per_epoch(self) -> int: ...

    def position_after(self, num_updates: int) -> tuple[int, int]:
        """Compute (epoch, consumed) after `num_updates` updates since the start of the run."""
        ...

    def rest_of_epoch(self) -> Iterator[Any]:
        """Collective: yield the remaining work items of the epoch, then move the position to the next epoch."""
        ...

    def after_checkpoint(self) -> None:
        """Called after each checkpoint: reset any state that it does not hold, so that resuming from it is exact."""
        ...


class Evaluation(Protocol):
    """The result of an evaluation over all ranks; `str` gives one line for people."""

    @property
    def scores(self) -> dict[str, float]:
        """Scores by name, for metrics.jsonl and summary.json; runs are compared by the first one."""
        ...

    @property
    def counts(self) -> dict[str, int]:
        """The number of evaluated samples or episodes, by name, for summary.json."""
        ...

    @property
    def details(self) -> dict[str, Any]:
        """Further results for evaluation.json."""
        ...


class Task(ABC):
    """Builds the model and the loader, computes the loss and evaluates.

    By `outputs` and `loss_sum` it implements `Objective`, which is what strategies minimise.

    Attributes:
        samples: plural name of what is learned from, such as images, for messages.
        cluster, settings: of the run.
        dtype: data type of the parameters.
    """

    samples: ClassVar[str]

    def __init__(self, settings: Settings, cluster: Cluster) -> None:
        self.settings = settings
        self.cluster = cluster
        self._in_bf16 = settings.precision == "bf16"
        self.dtype = torch.float32 if self._in_bf16 else getattr(torch, settings.precision)
        self._layout = torch.channels_last if settings.model.channels_last else torch.contiguous_format
        torch.backends.cudnn.allow_tf32 = False  # float32 stays float32 on GPUs

    # -- the model -------------------------------------------------------------------------------------------------

    @abstractmethod
    def model_blocks(self) -> Iterator[tuple[str, nn.Module]]:
        """Build the network block by block, on this rank's device and in the run's data type; equal at every call."""

    def build_model(self) -> nn.Module:
        """Build the whole network."""
        model = BlockSequence(OrderedDict(self.model_blocks()))
        if self.settings.model.compile:
            model.compile()
        return model

    @abstractmethod
    def example_inputs(self, num_samples: int) -> Tree:
        """Return example inputs (n, ...) of the model for up to `num_samples` samples."""

    def outputs(self, model: nn.Module, inputs: Tree) -> Any:
        """Apply `model`, or one of its blocks, to `inputs` (n, ...) in the run's precision."""
        inputs = map_tensors(self._with_layout, inputs)
        if self._in_bf16:
            with torch.autocast(self.cluster.device.type, torch.bfloat16):
                return apply(model, inputs)
        return apply(model, inputs)

    def _with_layout(self, tensor: Tensor) -> Tensor:
        return tensor.contiguous(memory_format=self._layout) if tensor.dim() == NUM_IMAGE_DIMENSIONS else tensor

    @abstractmethod
    def loss_sum(self, outputs: Any, batch: Any) -> tuple[Tensor, Tensor]:
        """Compute the loss summed over `batch`, and its metric sums (num_metric_sums,) float64."""

    def weight(self, metric_sums: Tensor) -> Tensor | None:  # noqa: ARG002
        """The weight of this rank's loss in an update; None: the number of its samples."""
        return None

    # -- learning --------------------------------------------------------------------------------------------------

    def try_out(self) -> None:  # noqa: B027  # not all need it
        """Collective: find out before the run begins whether model, loss and metrics fit the data."""

    @property
    @abstractmethod
    def num_metric_sums(self) -> int:
        """Number of metric sums of an update."""

    @property
    @abstractmethod
    def curves(self) -> tuple[str, ...]:
        """Names in metrics.jsonl that are plotted at the end of a run."""

    @property
    @abstractmethod
    def num_epochs(self) -> int:
        """Number of epochs of the run."""

    @property
    @abstractmethod
    def evaluate_every(self) -> int:
        """Number of epochs between two evaluations; 0 for only one after the last epoch."""

    @abstractmethod
    def build_loader(self, shard_id: int, num_shards: int, strategy: Strategy | None = None) -> Loader:
        """Build the loader of one data shard.

        Args:
            strategy: gives the model to loaders that need it, such as those that collect rollouts.
        """

    def learn(self, item: Any, strategy: Strategy, seed: int, before_step: Callable[[], None] | None = None) -> Tensor:
        """Collective: one update; the arguments and what it raises are those of `train_step`.

        Returns:
            This rank's metric sums (num_metric_sums,).
        """
        return train_step(strategy, item, self, seed, before_step)

    @abstractmethod
    def scores(self, metric_sums: Sequence[float]) -> dict[str, float]:
        """Compute scores by name from metric sums over all ranks; empty if no sample was counted."""

    @abstractmethod
    def line(self, epoch: int, item: Any, num_samples: int, mean: dict[str, float], last: dict[str, float]) -> str:
        """Format a log line for people.

        Args:
            num_samples: samples of the run so far, over all ranks.
            mean: scores since the line before.
            last: scores of the last update alone.
        """

    @abstractmethod
    def immutable_settings(self, loader: Any, num_shards: int) -> dict[str, Any]:
        """Return this task's settings and derived values that a resumed run cannot change."""

    @abstractmethod
    def evaluate(self, model: nn.Module, forward: Forward, shard_id: int, num_shards: int) -> Evaluation:
        """Collective: evaluate the model on samples or episodes that are divided over the shards, each once.

        Args:
            model: the model, or this rank's part of it, to be put into evaluation mode.
            forward: computes the model's outputs for inputs, or None if another rank of the same shard has them.
        """


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put `model` into evaluation mode inside the `with` block."""
    was_training = model.training
    model.eval()
    yield
    model.train(was_training)
