"""Supervised learning of any problem: data sets, a network, a loss and metrics make a task.

All else is the same for every such task: sharding, loading, exact means over the ranks, evaluation.
"""

import json
import math
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import default_collate
from typing_extensions import override

from lockstep.comm.cluster import Cluster
from lockstep.data.batch import DataBatch, Tree, named_tensors, tensors_of
from lockstep.data.loader import BatchLoader
from lockstep.data.sharding import Ids, shard_bounds
from lockstep.data.tree_set import DataSet, as_data_set, seeded, split_by_hash
from lockstep.parallel.strategy import Strategy
from lockstep.runtime.errors import DataError, SettingsError, UserCodeError
from lockstep.runtime.seeding import seed_model
from lockstep.runtime.user_code import call
from lockstep.settings import Settings
from lockstep.settings.reading import build_options
from lockstep.tasks.metric_sums import Metric, MetricLayout, Number, check_metrics
from lockstep.tasks.pictures import Pictures
from lockstep.tasks.task import Forward, Task, evaluating

NUM_TRIED = 2  # samples


@dataclass(frozen=True)
class Evaluation:
    """A model's results on the held-out samples, each of which counts once.

    Attributes:
        scores: by name; runs are compared by the first one.
        num_samples: number of held-out samples.
        details: further results for evaluation.json.
    """

    scores: dict[str, float]
    num_samples: int
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def counts(self) -> dict[str, int]:
        return {"num_held_out_samples": self.num_samples}

    def __str__(self) -> str:
        first, *others = self.scores.items()
        more = "".join(f", {name} {value:.4f}" for name, value in others[:1])
        return f"{first[0].capitalize()}: {first[1]:.4f} on {self.num_samples} held-out samples{more}"


class SupervisedTask(Task):
    """A problem of your own: override `data_set`, `network`, `loss`, and what else differs.

    Attributes:
        Options: a frozen dataclass of the task's own settings: `--options.width 64` in the command line.
        weight_per_sample: what each sample weighs in the loss, if that is the same for all of them and known ahead,
            such as 1 or the number of pixels; saves one small reduction an update. None: `loss` tells.
        options: the task's own settings, an `Options`.
        train_set, held_out: the data sets.
    """

    samples = "samples"
    Options: ClassVar[type[Any] | None] = None
    weight_per_sample: ClassVar[float | None] = None

    def __init__(self, settings: Settings, cluster: Cluster) -> None:
        """Collective: rank 0 prepares the data while the others wait, then all load it.

        Raises:
            DataError, UserCodeError: on every rank: the data cannot be used on any of them.
            SettingsError: on every rank: the task's own settings are wrong.
        """
        super().__init__(settings, cluster)
        self.options = self._build_options()
        if self.options is not None:  # with defaults, as a file holds them: so runs can be compared and resumed
            self.settings = replace(settings, options=json.loads(json.dumps(asdict(self.options), default=str)))
        if settings.gradient.reduction == "adasum" and self.weight_per_sample is None:
            message = "gradient.reduction is adasum, which needs a task whose samples weigh alike (weight_per_sample)"
            raise SettingsError(message).as_shared()
        cluster.on_root(lambda: call(self._named("prepare"), self.prepare))
        sets = cluster.on_every_rank(self._load)
        lengths = cluster.all_gather_object([len(each) for each in sets])
        if any(other != lengths[0] for other in lengths):
            told = ", ".join(f"{train} and {held_out} on rank {rank}" for rank, (train, held_out) in enumerate(lengths))
            message = f"{self._named('data_set')} gave other numbers of training and held-out samples on other ranks"
            raise DataError(f"{message}: {told}").as_shared()
        self.train_set, self.held_out = (each.to(cluster.device) for each in sets)
        self._layouts: tuple[MetricLayout, MetricLayout] | None = None
        self._usual_weight = 1.0

    # -- what makes a problem --------------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Download or make the data, if need be: on rank 0 alone, before the other ranks load it."""

    @abstractmethod
    def data_set(self, train: bool) -> Any:
        """Load the training data, or with `train` False the held-out data.

        Returns:
            A map-style data set, whose items are trees of tensors, arrays and numbers; or a tensor, tuple or dictionary
            of tensors with one row for each sample, which then lives on the device. None for the held-out data: a share
            of the training data is held out (`data.held_out_share`).
        """

    def network(self) -> nn.Module:
        """Build the network. Its initial weights come from PyTorch's random numbers, which are seeded."""
        raise NotImplementedError(f"{type(self).__name__} must have a method network, or blocks")

    def blocks(self) -> Iterator[tuple[str, nn.Module]]:
        """Build the network as named blocks in order, which zero3 and a pipeline can divide. Each but the first takes
        the output of the one before.
        """
        yield "network", self.network()

    def inputs(self, batch: Tree) -> Tree:
        """Pick the network's inputs from a batch: a tensor, a tuple of arguments, or a dictionary of named ones."""
        if isinstance(batch, Tensor):
            return batch
        if isinstance(batch, Mapping):
            return batch["inputs"]
        return batch[0]

    def predict_inputs(self, batch: Tree) -> Tree:
        """Pick the network's inputs from a batch without labels, for `lockstep predict`. By default a tensor is the
        inputs itself; of other batches, `inputs` picks them.
        """
        return batch if isinstance(batch, Tensor) else self.inputs(batch)

    @abstractmethod
    def loss(self, outputs: Any, batch: Tree) -> tuple[Tensor, Number]:
        """Compute the *sum* of the loss over a batch, with its graph, and its weight: what the sum over all ranks is
        divided by, such as the number of samples, pixels or tokens that count.
        """

    def metrics(self, outputs: Any, batch: Tree) -> Mapping[str, Metric]:
        """Compute metrics of a batch: means as (sum, weight), or tensors of counts, for `scores_of_counts`."""
        del outputs, batch
        return {}

    def held_out_metrics(self, outputs: Any, batch: Tree) -> Mapping[str, Metric]:
        """Compute metrics of a held-out batch. Runs are compared by the first one."""
        return {"loss": self.loss(outputs, batch), **self.metrics(outputs, batch)}

    def scores_of_counts(self, counts: Mapping[str, Tensor]) -> dict[str, float]:
        """Compute scores from counts that are summed over all samples, such as mean IoU from a confusion matrix."""
        del counts
        return {}

    def predictions(self, outputs: Any) -> Tree:
        """Make what `lockstep predict` writes of the network's outputs: a tree of tensors, a row for each sample."""
        return outputs

    @staticmethod
    def collate(items: list[Any]) -> Tree:
        """Make a batch of a list of items. Static, since worker processes call it."""
        return default_collate(items)

    # -- the model -------------------------------------------------------------------------------------------------

    def model_blocks(self) -> Iterator[tuple[str, nn.Module]]:
        seed_model(self.settings.seed)
        blocks = iter(self.blocks())
        while (named := call(self._named("blocks"), partial(next, blocks, None))) is not None:
            name, block = named
            yield name, block.to(self.cluster.device, self.dtype).to(memory_format=self._layout)

    def example_inputs(self, num_samples: int) -> Tree:
        ids = np.arange(min(num_samples, len(self.train_set)))
        return self.inputs(next(self.train_set.batches([ids], self.dtype)))

    # -- learning --------------------------------------------------------------------------------------------------

    @property
    def num_epochs(self) -> int:
        return self.settings.num_epochs

    @property
    def evaluate_every(self) -> int:
        every = self.settings.evaluate_every
        return 1 if every is None else every

    @override
    def try_out(self) -> None:
        """Collective: compute the loss and metrics of a few samples on rank 0, so that what does not fit is told first.

        Raises:
            SettingsError: on every rank: a setting names a held-out score that there is not.
            UserCodeError: on every rank: the model, the loss or the metrics do not fit.
        """
        if self._layouts is None:
            train, held_out, self._usual_weight = self.cluster.on_root(self._try_out)
            self._layouts = MetricLayout(train), MetricLayout(held_out)

    def _try_out(self) -> tuple[dict[str, Any], dict[str, Any], float]:
        """Return the shapes of training and held-out metrics, and what a sample weighs, about."""
        ids = np.arange(min(NUM_TRIED, len(self.train_set)))
        batch = next(self.train_set.batches([ids], self.dtype))
        outputs = call(self._named("inputs"), lambda: self.inputs(batch))
        learns = False
        with torch.no_grad():
            for index, (name, block) in enumerate(self.model_blocks()):
                learns = learns or any(parameter.requires_grad for parameter in block.parameters())
                self._check_between(index, outputs)
                forward = partial(self.outputs, block.eval(), outputs if index == 0 else (outputs,))
                outputs = call(f"{self._network_name()}, block {name}, given {_shapes(outputs)},", forward)
            loss, weight = self._checked_loss(outputs, batch)
            metrics = self._train_metrics(outputs, batch, loss, weight)
            held_out = self._held_out_metrics(outputs, batch)
        if not learns:
            raise UserCodeError(f"{self._network_name()} has no parameters to learn")
        if not held_out:
            raise UserCodeError(f"{self._named('held_out_metrics')} gave no metric: runs are compared by the first one")
        self._check_criteria(held_out)
        weight_of_one = self.weight_per_sample or float(weight) / len(ids)
        usual = weight_of_one if 0 < weight_of_one < math.inf else 1.0
        return dict(MetricLayout.of(metrics).shapes), dict(MetricLayout.of(held_out).shapes), usual

    def _check_between(self, index: int, inputs: Any) -> None:
        """Check that the strategy can pass on what block `index` is given.

        Raises:
            SettingsError: it cannot.
        """
        how, first = self.settings.parallel, 1 if self.settings.parallel in ("zero2", "zero3") else 0
        if how in ("zero2", "zero3", "pipeline") and index >= first and not isinstance(inputs, Tensor):
            what = "the network's inputs" if index == 0 else f"what block {index + 1} of the network is given"
            raise SettingsError(f"parallel is {how}, which passes on one tensor, and {what}: {_shapes(inputs)}")

    def _check_criteria(self, metrics: Mapping[str, Metric]) -> None:
        """Check that the scores exist by which the run is to be judged, as far as the metrics of a few samples tell.

        Raises:
            SettingsError: one does not.
        """
        criteria = [self.settings.stop.early_criterion, self.settings.checkpoint.best_criterion]
        layout = MetricLayout.of(metrics)
        known = {name: 0.0 for name, shape in layout.shapes.items() if shape is None}
        if all(criterion is None or criterion.metric in known for criterion in criteria):
            return
        means, counts = layout.unpack(layout.pack(metrics, self.cluster.device).cpu())
        try:
            known |= self.evaluation_of({**means, **self.scores_of_counts(counts)}, counts).scores
        except Exception:  # a user's own scores may need more samples: the first evaluation tells
            return
        for criterion in criteria:
            if criterion:
                criterion.check_known(known)

    @property
    @override
    def num_metric_sums(self) -> int:
        return 1 + self._train_layout.size

    @property
    @override
    def curves(self) -> tuple[str, ...]:
        return tuple(name for name, shape in self._train_layout.shapes.items() if shape is None)

    @override
    def build_loader(self, shard_id: int, num_shards: int, strategy: Strategy | None = None) -> BatchLoader:
        self.try_out()
        data = self.settings.data
        return BatchLoader(
            self.train_set,
            data.global_batch_size(num_shards),
            data.sharding,
            shard_id,
            num_shards,
            seed=self.settings.seed,
            dtype=self.dtype,
            inputs_of=self.inputs,
        )

    def loss_sum(self, outputs: Any, batch: DataBatch) -> tuple[Tensor, Tensor]:
        loss, weight = self._checked_loss(outputs, batch.data)
        if torch.is_grad_enabled() and not loss.requires_grad:
            raise UserCodeError(f"{self._named('loss')} gave a loss that does not depend on the model's parameters")
        with torch.no_grad():
            metrics = self._train_layout.pack(self._train_metrics(outputs, batch.data, loss, weight), loss.device)
            num_samples = torch.full_like(metrics[:1], len(batch))
        return loss / self._usual_weight, torch.cat([num_samples, metrics])

    def weight(self, metric_sums: Tensor) -> Tensor | None:
        """The weight in units of what a sample usually weighs: gradients keep the size of a mean, so that those of many
        pixels or tokens can be sent in two bytes.
        """
        return None if self.weight_per_sample is not None else metric_sums[2] / self._usual_weight

    def scores(self, metric_sums: Sequence[float]) -> dict[str, float]:
        num_samples, _, weight = metric_sums[:3]
        known = self.weight_per_sample
        if known is not None and not math.isclose(weight, num_samples * known, rel_tol=1e-6):
            raise UserCodeError(
                f"{self._named('weight_per_sample')} is {known}, and its loss gave {num_samples:.0f} "
                f"samples the weight {weight}: set weight_per_sample to None"
            ).as_shared()
        means, counts = self._train_layout.unpack(torch.tensor(metric_sums[1:], dtype=torch.float64))
        return {**means, **self.scores_of_counts(counts)} if weight else {}

    @override
    def line(self, epoch: int, item: Any, num_samples: int, mean: dict[str, float], last: dict[str, float]) -> str:
        """Format a log line with the loss of the last global batch, as in the reference."""
        return f"Epoch: {epoch}, Batch: {item.index}, Loss: {last.get('loss', float('nan')):.4f}"

    @override
    def immutable_settings(self, loader: BatchLoader, num_shards: int) -> dict[str, Any]:
        return {
            "data.name": self.settings.data.name,
            "options": dict(self.settings.options),
            "data.sharding": self.settings.data.sharding,
            "the number of samples": loader.num_samples,
            "the global batch (data.batch_size, or data.batch_size_per_rank times the shards)": loader.batch_size,
        }

    # -- evaluation ------------------------------------------------------------------------------------------------

    def evaluation_batch_size(self, num_shards: int) -> int:
        """Number of samples that a rank evaluates at once."""
        return max(1, self.settings.data.global_batch_size(num_shards) // num_shards)

    @torch.no_grad()
    def evaluate(self, model: nn.Module, forward: Forward, shard_id: int, num_shards: int) -> Evaluation:
        """Collective: evaluate the held-out samples, divided over the shards; one reduction sums the metrics."""
        self.try_out()
        assert self._layouts
        layout = self._layouts[1]
        sums = torch.zeros(layout.size, dtype=torch.float64, device=self.cluster.device)
        with evaluating(model):
            for batch in self.held_out_batches(shard_id, num_shards):
                self.cluster.recorder.beat()
                if (outputs := forward(batch.inputs)) is not None and len(batch):
                    sums += layout.pack(self._held_out_metrics(outputs, batch.data), sums.device)
        means, counts = layout.unpack(self.cluster.sum_(sums, name="evaluation").cpu())
        of_means = {name: means.get(name, math.nan) for name, shape in layout.shapes.items() if shape is None}
        evaluation = self.evaluation_of({**of_means, **self.scores_of_counts(counts)}, counts)
        if not evaluation.scores:
            message = f"{self._named('held_out_metrics')} gave counts alone: scores_of_counts must make a score of them"
            raise UserCodeError(message).as_shared()
        return evaluation

    def evaluation_of(self, scores: dict[str, float], counts: Mapping[str, Tensor]) -> Evaluation:
        """Make the result of an evaluation from its scores, and from counts over all held-out samples."""
        del counts
        return Evaluation(scores, len(self.held_out))

    def held_out_batches(self, shard_id: int = 0, num_shards: int = 1) -> Iterator[DataBatch]:
        """Yield the held-out samples of one shard in order, in equally many batches on every shard."""
        return self._in_order(self.held_out, self.inputs, shard_id, num_shards)

    def _in_order(
        self, data_set: DataSet, inputs_of: Callable[[Tree], Tree], shard_id: int, num_shards: int
    ) -> Iterator[DataBatch]:
        """Yield the samples of one shard of `data_set` in order, in equally many batches on every shard."""
        num_samples, size = len(data_set), self.evaluation_batch_size(num_shards)
        start, stop = shard_bounds(num_samples, num_shards)[shard_id : shard_id + 2]
        # The forward pass of a sharded model is a collective.
        largest = -(-num_samples // num_shards)
        parts: list[Ids] = np.array_split(np.arange(start, stop), max(1, -(-largest // size)))
        shown = [ids if len(ids) else np.array([0]) for ids in parts]  # a stand-in, which counts for nothing
        for index, (ids, data) in enumerate(zip(parts, data_set.batches(shown, self.dtype), strict=True)):
            yield DataBatch(inputs_of(data), num_samples, data, ids, index)

    def pictures(self, model: nn.Module) -> Pictures | None:
        """Show held-out samples and what `model`, in evaluation mode, makes of them, for `lockstep evaluate` and
        `lockstep report`. Not a collective; no gradients are computed.
        """
        del model
        return None

    # -- prediction ------------------------------------------------------------------------------------------------

    def unlabelled(self, found: Any, name: str) -> DataSet:
        """Wrap what a user gives for prediction, as `as_data_set` does."""
        return as_data_set(found, name, self.collate, self.settings.data.num_workers)

    @torch.no_grad()
    def predict(
        self, model: nn.Module, data_set: DataSet | None, shard_id: int, num_shards: int
    ) -> Iterator[tuple[Ids, dict[str, Tensor]]]:
        """Yield the predictions for the samples of one shard in order, in equally many batches on every shard: the
        numbers (n,) of the samples, and tensors (n, ...) by flat names.

        Args:
            data_set: of unlabelled samples; None: the held-out ones.

        Raises:
            DataError, UserCodeError: a sample cannot be used, or the task's own code fails.
        """
        if data_set is None:
            batches = self.held_out_batches(shard_id, num_shards)
        else:
            name = self._named("predict_inputs")
            batches = self._in_order(
                data_set, lambda data: call(name, lambda: self.predict_inputs(data)), shard_id, num_shards
            )
        with evaluating(model):
            for batch in batches:
                forward = partial(self.outputs, model, batch.inputs)
                outputs = call(f"{self._network_name()}, given {_shapes(batch.inputs)},", forward)
                yield batch.ids, self._checked_predictions(outputs, len(batch))

    # -- a user's code ---------------------------------------------------------------------------------------------

    def _named(self, method: str) -> str:
        return f"{type(self).__module__}.{type(self).__qualname__}.{method}"

    def _network_name(self) -> str:
        return f"the network of {type(self).__module__}.{type(self).__qualname__}"

    def _build_options(self) -> Any:
        given = self.settings.options
        if self.Options is None:
            if given:
                raise SettingsError(f"{type(self).__name__} has no settings of its own (Options): {given}").as_shared()
            return None
        try:
            return build_options(self.Options, given)
        except SettingsError as error:
            raise error.as_shared() from None

    def _load(self) -> tuple[DataSet, DataSet]:
        name, data = self._named("data_set"), self.settings.data
        with seeded((self.settings.seed,)):  # what it draws is the same on every rank
            train, held_out = (call(name, partial(self.data_set, part)) for part in (True, False))
        whole = as_data_set(train, name, self.collate, data.num_workers)
        if held_out is not None:
            return whole, as_data_set(held_out, name, self.collate, data.num_workers)
        if len(whole) == 1 or not hasattr(whole, "take"):
            raise DataError(f"{name} gave no held-out data, and its training data cannot be divided")
        parts = split_by_hash(len(whole), data.held_out_share, self.settings.seed)
        train_part, held_out_part = parts
        return whole.take(train_part), whole.take(held_out_part)

    def _checked_predictions(self, outputs: Any, num_samples: int) -> dict[str, Tensor]:
        name = self._named("predictions")
        found = dict(named_tensors(call(name, lambda: self.predictions(outputs)), "outputs"))
        if not found:
            raise UserCodeError(f"{name} must return a tensor, or a tuple or dictionary of tensors")
        for each, tensor in found.items():
            if tensor.shape[:1] != (max(1, num_samples),):
                what = f"{each} of shape {tuple(tensor.shape)} for a batch of {max(1, num_samples)}"
                raise UserCodeError(f"{name} gave {what}: a row for each sample is needed")
        # A copy in row-major order, to be sent and written; of a stand-in, no row.
        row_major = torch.contiguous_format
        return {each: tensor[:num_samples].clone(memory_format=row_major) for each, tensor in found.items()}

    def _checked_loss(self, outputs: Any, batch: Tree) -> tuple[Tensor, Number]:
        name = self._named("loss")
        found = call(name, lambda: self.loss(outputs, batch))
        if not (isinstance(found, tuple) and len(found) == 2):
            raise UserCodeError(f"{name} must return (sum, weight), and returned {type(found).__name__}")
        loss, weight = found
        if not isinstance(loss, Tensor) or loss.dim():
            shape = f"of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise UserCodeError(f"{name} must return the sum of the loss as a scalar tensor, and returned one {shape}")
        check_metrics({"loss": (loss, weight)}, name)
        if isinstance(weight, int | float) and not 0 <= weight < float("inf"):
            raise UserCodeError(f"{name} gave the weight {weight}: it must be a number of at least 0")
        return loss, weight

    def _train_metrics(self, outputs: Any, batch: Tree, loss: Tensor, weight: Number) -> dict[str, Metric]:
        name = self._named("metrics")
        found = check_metrics(call(name, lambda: self.metrics(outputs, batch)), name)
        if "loss" in found:
            raise UserCodeError(f"{name} gave a metric called loss, which is what the method loss gives: rename it")
        return {"loss": (loss, weight), **found}

    def _held_out_metrics(self, outputs: Any, batch: Tree) -> dict[str, Metric]:
        name = self._named("held_out_metrics")
        return check_metrics(call(name, lambda: self.held_out_metrics(outputs, batch)), name)

    @property
    def _train_layout(self) -> MetricLayout:
        assert self._layouts, "try_out comes first"
        return self._layouts[0]


def _shapes(tree: Tree) -> str:
    return ", ".join(f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}" for tensor in tensors_of(tree))
