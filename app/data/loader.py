"""Batches with a position: (epoch, consumed) says all that is needed to go on from there, on any number of shards."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from app.data.batch import Batch
from app.data.image_set import ImageSet
from app.data.sharding import Ids, Sharding, data_shard, epoch_order


@dataclass(frozen=True)
class LabelledBatch(Batch):
    """One shard's part of a global batch.

    Attributes:
        targets: (n,) int64.
        ids: (n,) which samples of the data set these are.
        index: the number of the global batch in its epoch.
    """

    targets: Tensor
    ids: Ids
    index: int


class BatchLoader:
    """Divides each *global* batch over the shards (seed, section 5.3), so that the order in which samples are learned
    depends on (seed, epoch) alone and not on the number of shards. The last batch of an epoch may be ragged.

    Attributes:
        batch_size: samples of one global batch.
        epoch: the epoch that the next batch belongs to.
        consumed: samples of that epoch that all shards together have been given.
    """

    def __init__(
        self,
        images: ImageSet,
        batch_size: int,
        sharding: Sharding,
        shard_id: int,
        num_shards: int,
        seed: int,
        dtype: torch.dtype,
    ) -> None:
        self._images = images
        self.batch_size = batch_size
        self._sharding = sharding
        self._shard_id = shard_id
        self._num_shards = num_shards
        self._seed = seed
        self._dtype = dtype
        self.epoch = 0
        self.consumed = 0

    @property
    def num_samples(self) -> int:
        return len(self._images)

    @property
    def updates_per_epoch(self) -> int:
        return -(-len(self._images) // self.batch_size)

    def position_after(self, num_batches: int) -> tuple[int, int]:
        """(epoch, consumed) after so many global batches from the very beginning; after the last one of an epoch, still
        in that epoch.
        """
        epoch, index = divmod(max(num_batches - 1, 0), self.updates_per_epoch)
        return epoch, min((index + 1) * self.batch_size, self.num_samples) if num_batches else 0

    def after_checkpoint(self) -> None:
        """Nothing of it is outside of a checkpoint: the position is all that it needs."""

    def rest_of_epoch(self) -> Iterator[LabelledBatch]:
        """This shard's part of every global batch that is left of the epoch; then the position is the next epoch."""
        order = epoch_order(len(self._images), self._seed, self.epoch)
        while self.consumed < len(order):
            global_ids = order[self.consumed : self.consumed + self.batch_size]
            index = self.consumed // self.batch_size
            self.consumed += len(global_ids)
            ids = data_shard(global_ids, self._shard_id, self._num_shards, self._sharding, self._seed, self.epoch)
            inputs, targets = self._images.batch(torch.from_numpy(ids).to(self._images.labels.device), self._dtype)
            yield LabelledBatch(inputs, len(global_ids), targets, ids, index)
        self.epoch, self.consumed = self.epoch + 1, 0
