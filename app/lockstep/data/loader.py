"""A batch loader with a position: (epoch, consumed) is all it needs to resume, on any number of shards."""

from collections import deque
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from lockstep.data.batch import DataBatch, Tree
from lockstep.data.sharding import Ids, Sharding, data_shard, epoch_order
from lockstep.data.tree_set import DataSet

MixedSamples = tuple[Tensor, Tensor, Tensor, float]
"""Mixed inputs, labels (n,), labels of the partners (n,), and the share of each sample in its mixture; its partner has
1 - share."""


def first_of(batch: Tree) -> Tree:
    """The first part of a batch (inputs, labels, ...)."""
    return batch[0]


class BatchLoader:
    """Divides each *global* batch over the shards (reference, section 5.3), so that the order of the samples depends on
    (seed, epoch) alone and not on the number of shards. The last batch of an epoch may be smaller.

    Attributes:
        batch_size: samples of one global batch.
        mixup: alpha; 0: none.
        epoch: the epoch of the next batch.
        consumed: samples of that epoch that have been yielded, over all shards.
    """

    def __init__(
        self,
        data_set: DataSet,
        batch_size: int,
        sharding: Sharding,
        shard_id: int,
        num_shards: int,
        seed: int,
        dtype: torch.dtype,
        mixup: float = 0.0,
        inputs_of: Callable[[Tree], Tree] = first_of,
    ) -> None:
        """
        Args:
            mixup: alpha; above 0 the batches of `data_set` must be (inputs, labels), and become `MixedSamples`.
            inputs_of: picks the model's inputs from a batch of `data_set`.
        """
        self._data_set = data_set
        self._inputs_of = inputs_of
        self.batch_size = batch_size
        self._sharding = sharding
        self._shard_id = shard_id
        self._num_shards = num_shards
        self._seed = seed
        self._dtype = dtype
        self.mixup = mixup
        self.epoch = 0
        self.consumed = 0

    @property
    def num_samples(self) -> int:
        return len(self._data_set)

    @property
    def updates_per_epoch(self) -> int:
        return -(-len(self._data_set) // self.batch_size)

    def position_after(self, num_batches: int) -> tuple[int, int]:
        """Compute (epoch, consumed) after `num_batches` global batches since the start of the run.

        After the last batch of an epoch it is still that epoch, with all of its samples consumed.
        """
        epoch, index = divmod(max(num_batches - 1, 0), self.updates_per_epoch)
        return epoch, min((index + 1) * self.batch_size, self.num_samples) if num_batches else 0

    def after_checkpoint(self) -> None:
        """Do nothing: the position, which the checkpoint holds, is all of the loader's state."""

    def rest_of_epoch(self) -> Iterator[DataBatch]:
        """Yield this shard of every remaining global batch of the epoch, then move the position to the next epoch."""
        order = epoch_order(len(self._data_set), self._seed, self.epoch)
        first = self.consumed
        in_flight: deque[tuple[Ids, Ids, Ids]] = deque()

        def wanted() -> Iterator[Ids]:
            for start in range(first, len(order), self.batch_size):
                global_ids = order[start : start + self.batch_size]
                mine = data_shard(global_ids, self._shard_id, self._num_shards, self._sharding, self._seed, self.epoch)
                shown = mine if len(mine) else global_ids[:1]  # a stand-in, which counts for nothing
                fetched = with_partners(shown, global_ids) if self.mixup else shown
                in_flight.append((mine, global_ids, fetched))
                yield fetched

        for data in self._data_set.batches(wanted(), self._dtype, (self._seed, self.epoch)):
            ids, global_ids, fetched = in_flight.popleft()
            index = self.consumed // self.batch_size
            self.consumed += len(global_ids)
            if self.mixup:
                data = self._mixed(data, fetched[: max(1, len(ids))], global_ids, fetched, index)
            yield DataBatch(self._inputs_of(data), len(global_ids), data, ids, index)
        self.epoch, self.consumed = self.epoch + 1, 0

    def _mixed(self, data: tuple[Tensor, Tensor], ids: Ids, global_ids: Ids, fetched: Ids, index: int) -> MixedSamples:
        """Mix each of the samples `ids` with its partner (mixup, Zhang et al. 2018).

        Args:
            data: inputs and labels of the samples `fetched`: first `ids`, then missing partners.
        """
        inputs, labels = data
        row_of = {number: row for row, number in enumerate(fetched.tolist())}
        partners = partners_of(ids, global_ids).tolist()
        rows = torch.tensor([row_of[number] for number in partners], dtype=torch.int64, device=inputs.device)
        generator = np.random.default_rng((self._seed, self.epoch, index))
        share = float(generator.beta(self.mixup, self.mixup))
        own = slice(0, len(ids))
        return inputs[own].lerp(inputs[rows], 1 - share), labels[own], labels[rows], share


def partners_of(ids: Ids, global_ids: Ids) -> Ids:
    """Return the mixup partner of each of `ids`: the next sample of the global batch, or the first after the last."""
    after = dict(zip(global_ids.tolist(), np.roll(global_ids, -1).tolist(), strict=True))
    return np.array([after[number] for number in ids.tolist()], dtype=global_ids.dtype)


def with_partners(ids: Ids, global_ids: Ids) -> Ids:
    """Append to `ids` those of their mixup partners that are not among them."""
    return np.concatenate([ids, np.setdiff1d(partners_of(ids, global_ids), ids)])
