"""Image classification: networks that give log-probabilities, trained on the negative log-likelihood."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from lockstep.data.data_sets import fetch, load_images, load_unlabelled
from lockstep.data.image_set import LabelledImages, Samples
from lockstep.data.loader import BatchLoader, MixedSamples
from lockstep.data.tree_set import DataSet, MapStyleSet, TensorSet
from lockstep.models.classifier import classifier_blocks
from lockstep.parallel.strategy import Strategy
from lockstep.runtime.user_code import call
from lockstep.tasks.metric_sums import Metric, Number
from lockstep.tasks.pictures import Pictures
from lockstep.tasks.supervised import Evaluation, SupervisedTask

EVALUATION_BATCH_SIZE = 500
TOP = 5
MAX_CLASSES_IN_DETAILS = 100
NUM_MISTAKES, NUM_COLUMNS = 24, 8  # that are shown


class Classify(SupervisedTask):
    """The classification task: model, data, loss and evaluation."""

    samples = "images"
    weight_per_sample = 1.0
    train_set: LabelledImages
    held_out: LabelledImages

    @override
    def prepare(self) -> None:
        """Download the data, if need be.

        Raises:
            DataError: it cannot be downloaded.
        """
        fetch(self.settings.data)

    @override
    def data_set(self, train: bool) -> LabelledImages:
        """Load the training or the held-out images.

        Raises:
            DataError: they are missing or damaged.
        """
        return load_images(self.settings.data, train)

    @override
    def blocks(self) -> Iterator[tuple[str, nn.Module]]:
        return classifier_blocks(self.settings.model, self.train_set.shape, len(self.train_set.classes))

    @override
    def build_loader(self, shard_id: int, num_shards: int, strategy: Strategy | None = None) -> BatchLoader:
        """Build the loader of one shard of the training data, with mixup if it is asked for."""
        loader = super().build_loader(shard_id, num_shards, strategy)
        loader.mixup = self.settings.data.mixup
        return loader

    @override
    def loss(self, outputs: Tensor, batch: Samples | MixedSamples) -> tuple[Tensor, Number]:
        """Compute the negative log-likelihood, with label smoothing and of both images of a mixture."""
        labels = batch[1]
        loss = self._smooth_loss(outputs, labels)
        if len(batch) > 2:
            _, _, partner_labels, share = batch
            loss = share * loss + (1 - share) * self._smooth_loss(outputs, partner_labels)
        return loss, len(labels)

    def _smooth_loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        loss = F.nll_loss(outputs, labels, reduction="sum")
        if (smoothing := self.settings.data.label_smoothing) > 0:
            return (1 - smoothing) * loss - smoothing * outputs.mean(1).sum()
        return loss

    @override
    def metrics(self, outputs: Tensor, batch: Samples | MixedSamples) -> Mapping[str, Metric]:
        labels = batch[1]
        return {"accuracy": ((outputs.argmax(1) == labels).sum(), len(labels))}

    @override
    def held_out_metrics(self, outputs: Tensor, batch: Samples) -> Mapping[str, Metric]:
        """Compute accuracies, the loss without label smoothing, and the confusion matrix: rows are true classes."""
        _, labels = batch
        num_classes, size = len(self.held_out.classes), len(labels)
        pairs = torch.bincount(labels * num_classes + outputs.argmax(1), minlength=num_classes**2)
        found: dict[str, Metric] = {
            **self.metrics(outputs, batch),
            "loss": (F.nll_loss(outputs.double(), labels, reduction="sum"), size),
            "confusion": pairs.view(num_classes, num_classes),
        }
        if num_classes > TOP:
            in_top = (outputs.topk(TOP).indices == labels[:, None]).sum()
            found["top5_accuracy"] = (in_top, size)
        return found

    @override
    def predictions(self, outputs: Tensor) -> dict[str, Tensor]:
        """Compute the most probable class (n,) and the probability (n, num_classes) of each."""
        return {"class": outputs.argmax(1), "probabilities": outputs.exp()}

    @override
    def unlabelled(self, found: Any, name: str) -> DataSet:
        """Wrap images, PIL's or uint8 tensors, which are resized and normalised as the held-out ones. Floating-point
        tensors are the network's inputs as they are.
        """
        wrapped = super().unlabelled(found, name)
        if isinstance(wrapped, TensorSet):
            found = call(self._named("predict_inputs"), lambda: self.predict_inputs(wrapped.tree))
            if found.is_floating_point():
                return wrapped
        elif not isinstance(wrapped, MapStyleSet):
            return wrapped
        return load_unlabelled(self.settings.data, found, self.held_out, name)

    @override
    def evaluation_batch_size(self, num_shards: int) -> int:
        return EVALUATION_BATCH_SIZE

    @override
    def evaluation_of(self, scores: dict[str, float], counts: Mapping[str, Tensor]) -> Evaluation:
        """Make the result of an evaluation; its details are the names of the classes and the confusion matrix."""
        classes = list(self.held_out.classes)
        small = len(classes) <= MAX_CLASSES_IN_DETAILS
        details = {"classes": classes, "confusion": counts["confusion"].long().tolist()} if small else {}
        return Evaluation(scores, len(self.held_out), details)

    @override
    def pictures(self, model: nn.Module) -> Pictures:
        """Show the misclassified samples whose true class got the lowest probability."""
        found = [(self.outputs(model, batch.inputs), batch.data[1]) for batch in self.held_out_batches()]
        outputs, labels = (torch.cat(parts) for parts in zip(*found, strict=True))
        predicted, names = outputs.argmax(1), self.held_out.classes
        wrong = (predicted != labels).nonzero().flatten()
        worst = wrong[outputs[wrong, labels[wrong]].argsort()][:NUM_MISTAKES].cpu()
        titles = [f"{names[int(labels[index])]} taken for {names[int(predicted[index])]}" for index in worst.tolist()]
        images = [image.permute(1, 2, 0).squeeze(-1) for image in self.held_out.pictures(worst.numpy()).cpu()]
        heading = f"{len(wrong)} mistakes of {len(labels)}, the worst first"
        return Pictures("mistakes", heading, [image.numpy() for image in images], titles, NUM_COLUMNS)
