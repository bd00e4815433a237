"""Batches with a position: (epoch, consumed) says all that is needed to go on from there, on any number of shards."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from app.data.image_set import ImageSet
from app.data.sharding import Ids, Sharding, data_shard, epoch_order


@dataclass(frozen=True)
class Batch:
    """One shard's part of a global batch.

    Attributes:
        inputs: (n, ...) of the run's data type; n may be 0 where a ragged batch has fewer samples than shards.
        targets: (n,) int64.
        ids: (n,) which samples of the data set these are.
        index: the number of the global batch in its epoch.
        global_size: samples in the global batch, over all shards.
    """

    inputs: Tensor
    targets: Tensor
    ids: Ids
    index: int
    global_size: int

    def split(self, num_pieces: int, allow_empty: bool = False) -> list["Batch"]:
        """Up to `num_pieces` pieces of this shard's part, of nearly equal size; none is empty unless all of it is.

        With `allow_empty` as many as asked for: the same number on every shard, where a piece is a collective.
        """
        if not allow_empty:
            num_pieces = max(1, min(num_pieces, len(self.targets)))
        if num_pieces == 1:
            return [self]
        pieces = zip(
            self.inputs.tensor_split(num_pieces),
            self.targets.tensor_split(num_pieces),
            np.array_split(self.ids, num_pieces),
            strict=True,
        )
        return [replace(self, inputs=inputs, targets=targets, ids=ids) for inputs, targets, ids in pieces]


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
    def batches_per_epoch(self) -> int:
        return -(-len(self._images) // self.batch_size)

    def position_after(self, num_batches: int) -> tuple[int, int]:
        """(epoch, consumed) after so many global batches from the very beginning; after the last one of an epoch, still
        in that epoch.
        """
        epoch, index = divmod(max(num_batches - 1, 0), self.batches_per_epoch)
        return epoch, min((index + 1) * self.batch_size, self.num_samples) if num_batches else 0

    def rest_of_epoch(self) -> Iterator[Batch]:
        """This shard's part of every global batch that is left of the epoch; then the position is the next epoch."""
        order = epoch_order(len(self._images), self._seed, self.epoch)
        while self.consumed < len(order):
            global_ids = order[self.consumed : self.consumed + self.batch_size]
            index = self.consumed // self.batch_size
            self.consumed += len(global_ids)
            ids = data_shard(global_ids, self._shard_id, self._num_shards, self._sharding, self._seed, self.epoch)
            inputs, targets = self._images.batch(torch.from_numpy(ids).to(self._images.labels.device), self._dtype)
            yield Batch(inputs, targets, ids, index, len(global_ids))
        self.epoch, self.consumed = self.epoch + 1, 0
