"""The task of telling classes apart: images in, log-probabilities out, the negative log-likelihood as loss."""

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from app.cluster.comm import Cluster
from app.config import DataSettings, Settings
from app.data.digits import load_digits
from app.data.image_set import ImageSet
from app.data.loader import Batch, BatchLoader
from app.data.mnist import download_mnist, load_mnist
from app.data.sharding import shard_bounds
from app.data.synthetic import load_synthetic
from app.models.net import net_blocks
from app.models.vit import vit_blocks
from app.training.seeding import seed_model

EVALUATION_BATCH_SIZE = 500

Forward = Callable[[Tensor], Tensor | None]


@dataclass(frozen=True)
class Evaluation:
    """How a model does on the held-out samples, each of which counts once.

    Attributes:
        loss: mean negative log-likelihood.
        confusion: (num_classes, num_classes) int64, rows the true class and columns the predicted one.
    """

    loss: float
    confusion: Tensor

    @property
    def num_samples(self) -> int:
        return int(self.confusion.sum())

    @property
    def accuracy(self) -> float:
        return int(self.confusion.trace()) / max(1, self.num_samples)

    def __str__(self) -> str:
        return f"Accuracy: {self.accuracy:.4f} on {self.num_samples} held-out samples, loss {self.loss:.4f}"


class Classify:
    """Builds the model and its data, gives the loss and evaluates."""

    def __init__(self, settings: Settings, cluster: Cluster) -> None:
        """Collective: rank 0 fetches the data while the others wait, then all load it.

        Raises:
            DataError: on every rank, if the data is missing on any.
        """
        self._settings = settings
        self._cluster = cluster
        self._in_bf16 = settings.precision == "bf16"
        self._dtype = torch.float32 if self._in_bf16 else getattr(torch, settings.precision)
        self._layout = torch.channels_last if settings.model.channels_last else torch.contiguous_format
        torch.backends.cudnn.allow_tf32 = False  # float32 means float32, on GPUs too
        cluster.on_root(lambda: _fetch(settings.data))
        sets = cluster.on_every_rank(lambda: [_load(settings.data, train) for train in (True, False)])
        self._train, self.held_out = (images.to(cluster.device) for images in sets)

    def model_blocks(self) -> Iterator[tuple[str, nn.Module]]:
        """The network block by block, on this rank's device and of the run's data type: the same at every call."""
        settings = self._settings.model
        seed_model(self._settings.seed)
        if settings.name == "vit":
            blocks = vit_blocks(**asdict(settings.vit))
        else:
            blocks = net_blocks(settings.dropout1, settings.dropout2)
        for name, block in blocks:
            yield name, block.to(self._cluster.device, self._dtype).to(memory_format=self._layout)

    def build_model(self) -> nn.Module:
        """The whole network."""
        model = nn.Sequential(OrderedDict(self.model_blocks()))
        if self._settings.model.compile:
            model.compile()
        return model

    def example_inputs(self, num_samples: int) -> Tensor:
        """Images (n, ...) of the training data, as a model takes them."""
        ids = torch.arange(min(num_samples, len(self._train)), device=self._cluster.device)
        return self._train.batch(ids, self._dtype)[0]

    def build_loader(self, shard_id: int, num_shards: int) -> BatchLoader:
        """One shard of the training data."""
        data = self._settings.data
        return BatchLoader(
            self._train,
            data.global_batch_size(num_shards),
            data.sharding,
            shard_id,
            num_shards,
            seed=self._settings.seed,
            dtype=self._dtype,
        )

    def loss_sum(self, outputs: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """The loss summed over `batch` and its tally (loss sum, number correct, number of samples), (3,) float64."""
        loss = F.nll_loss(outputs, batch.targets, reduction="sum")
        num_correct = (outputs.detach().argmax(1) == batch.targets).sum()
        num_samples = torch.full_like(num_correct, len(batch.targets))
        return loss, torch.stack([loss.detach().double(), num_correct, num_samples])

    def outputs(self, model: nn.Module, inputs: Tensor) -> Tensor:
        """Log-probabilities (n, num_classes) of `inputs` (n, channels, height, width), in the run's precision; or what
        one of the model's blocks makes of its inputs.
        """
        if inputs.dim() == 4:
            inputs = inputs.contiguous(memory_format=self._layout)
        with torch.autocast(inputs.device.type, torch.bfloat16, enabled=self._in_bf16):
            output: Tensor = model(inputs)
        return output

    @torch.no_grad()
    def evaluate(self, model: nn.Module, forward: Forward, shard_id: int, num_shards: int) -> Evaluation:
        """Collective: the held-out samples are divided into shards, and what was counted is summed over all ranks once.

        Args:
            model: what is in evaluation mode meanwhile.
            forward: the model's outputs for images; None where another rank of the same shard has them.
        """
        num_classes = self.held_out.num_classes
        start, stop = shard_bounds(len(self.held_out), num_shards)[shard_id : shard_id + 2]
        ids = torch.arange(start, stop, device=self._cluster.device)
        sums = torch.zeros(1 + num_classes**2, dtype=torch.float64, device=self._cluster.device)
        # As many pieces on every rank: a model in parts is gathered for each.
        largest = -(-len(self.held_out) // num_shards)
        with evaluating(model):
            for piece in ids.tensor_split(max(1, -(-largest // EVALUATION_BATCH_SIZE))):
                self._cluster.recorder.beat()
                inputs, labels = self.held_out.batch(piece, self._dtype)
                if (output := forward(inputs)) is not None:
                    sums[0] += F.nll_loss(output.double(), labels, reduction="sum")
                    sums[1:] += torch.bincount(labels * num_classes + output.argmax(1), minlength=num_classes**2)
        sums = self._cluster.sum_(sums, name="evaluation").cpu()
        return Evaluation(
            loss=sums[0].item() / max(1, len(self.held_out)),
            confusion=sums[1:].to(torch.int64).view(num_classes, num_classes),
        )

    @torch.no_grad()
    def predict(self, model: nn.Module, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probabilities (n, num_classes) and labels (n,) of the held-out samples `ids` (n,). Not a collective."""
        with evaluating(model):
            pieces = torch.split(ids, EVALUATION_BATCH_SIZE)
            outputs = [self.outputs(model, self.held_out.batch(piece, self._dtype)[0]) for piece in pieces]
        return torch.cat(outputs), self.held_out.labels[ids]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """No dropout inside, and running statistics in place of the batch's."""
    was_training = model.training
    model.eval()
    yield
    model.train(was_training)


def _fetch(data: DataSettings) -> None:
    if data.name == "mnist":
        download_mnist(Path(data.root))


def _load(data: DataSettings, train: bool) -> ImageSet:
    if data.name == "mnist":
        return load_mnist(Path(data.root), train)
    if data.name == "synthetic":
        return load_synthetic(data.num_samples, train)
    return load_digits(train)
