"""A batch loader with a position: (epoch, consumed) is all it needs to resume, on any number of shards."""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from lockstep.data.batch import Batch
from lockstep.data.image_set import LabelledImages
from lockstep.data.sharding import Ids, Sharding, data_shard, epoch_order


@dataclass(frozen=True)
class LabelledBatch(Batch):
    """One shard of a global batch.

    Attributes:
        targets: (n,) int64 labels.
        ids: (n,) numbers of the samples in the data set.
        index: the number of the global batch in its epoch, from 0.
        partner_targets: (n,) int64 labels of the mixup partners; None without mixup.
        share: the weight of each sample in its mixture; its partner has 1 - share.
    """

    targets: Tensor
    ids: Ids
    index: int
    partner_targets: Tensor | None = None
    share: float = 1.0


class BatchLoader:
    """Divides each *global* batch over the shards (reference, section 5.3), so that the order of the samples depends on
    (seed, epoch) alone and not on the number of shards. The last batch of an epoch may be smaller.

    Attributes:
        batch_size: samples of one global batch.
        epoch: the epoch of the next batch.
        consumed: samples of that epoch that have been yielded, over all shards.
    """

    def __init__(
        self,
        images: LabelledImages,
        batch_size: int,
        sharding: Sharding,
        shard_id: int,
        num_shards: int,
        seed: int,
        dtype: torch.dtype,
        mixup: float = 0.0,
    ) -> None:
        self._images = images
        self.batch_size = batch_size
        self._sharding = sharding
        self._shard_id = shard_id
        self._num_shards = num_shards
        self._seed = seed
        self._dtype = dtype
        self._mixup = mixup
        self.epoch = 0
        self.consumed = 0

    @property
    def num_samples(self) -> int:
        return len(self._images)

    @property
    def updates_per_epoch(self) -> int:
        return -(-len(self._images) // self.batch_size)

    def position_after(self, num_batches: int) -> tuple[int, int]:
        """Compute (epoch, consumed) after `num_batches` global batches since the start of the run.

        After the last batch of an epoch it is still that epoch, with all of its samples consumed.
        """
        epoch, index = divmod(max(num_batches - 1, 0), self.updates_per_epoch)
        return epoch, min((index + 1) * self.batch_size, self.num_samples) if num_batches else 0

    def after_checkpoint(self) -> None:
        """Do nothing: the position, which the checkpoint holds, is all of the loader's state."""

    def rest_of_epoch(self) -> Iterator[LabelledBatch]:
        """Yield this shard of every remaining global batch of the epoch, then move the position to the next epoch."""
        order = epoch_order(len(self._images), self._seed, self.epoch)
        first = self.consumed
        in_flight: deque[tuple[Ids, Ids, Ids]] = deque()

        def wanted() -> Iterator[Ids]:
            for start in range(first, len(order), self.batch_size):
                global_ids = order[start : start + self.batch_size]
                mine = data_shard(global_ids, self._shard_id, self._num_shards, self._sharding, self._seed, self.epoch)
                fetched = with_partners(mine, global_ids) if self._mixup else mine
                in_flight.append((mine, global_ids, fetched))
                yield fetched

        for inputs, targets in self._images.batches(wanted(), self._dtype, (self._seed, self.epoch)):
            ids, global_ids, fetched = in_flight.popleft()
            index = self.consumed // self.batch_size
            self.consumed += len(global_ids)
            batch = LabelledBatch(inputs, len(global_ids), targets, ids, index)
            yield self._mixed(batch, global_ids, fetched) if self._mixup else batch
        self.epoch, self.consumed = self.epoch + 1, 0

    def _mixed(self, batch: LabelledBatch, global_ids: Ids, fetched: Ids) -> LabelledBatch:
        """Mix each sample of the shard with its partner (mixup, Zhang et al. 2018).

        Args:
            batch: its inputs and targets are those of the samples `fetched`: the shard's own, then missing partners.
        """
        ids = batch.ids
        row_of = {number: row for row, number in enumerate(fetched.tolist())}
        partners = partners_of(ids, global_ids).tolist()
        rows = torch.tensor([row_of[number] for number in partners], dtype=torch.int64, device=batch.inputs.device)
        generator = np.random.default_rng((self._seed, self.epoch, batch.index))
        share = float(generator.beta(self._mixup, self._mixup))
        own = batch.inputs[: len(ids)]
        return replace(
            batch,
            inputs=own.lerp(batch.inputs[rows], 1 - share),
            targets=batch.targets[: len(ids)],
            partner_targets=batch.targets[rows],
            share=share,
        )


def partners_of(ids: Ids, global_ids: Ids) -> Ids:
    """Return the mixup partner of each of `ids`: the next sample of the global batch, or the first after the last."""
    after = dict(zip(global_ids.tolist(), np.roll(global_ids, -1).tolist(), strict=True))
    return np.array([after[number] for number in ids.tolist()], dtype=global_ids.dtype)


def with_partners(ids: Ids, global_ids: Ids) -> Ids:
    """Append to `ids` those of their mixup partners that are not among them."""
    return np.concatenate([ids, np.setdiff1d(partners_of(ids, global_ids), ids)])
