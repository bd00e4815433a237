"""Batches with a position: (epoch, consumed) says all that is needed to go on from there, on any number of shards."""

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
    """One shard's part of a global batch.

    Attributes:
        targets: (n,) int64.
        ids: (n,) which samples of the data set these are.
        index: the number of the global batch in its epoch.
        partner_targets: (n,) int64 of the samples that these are mixed with.
        share: of each sample in its mixture.
    """

    targets: Tensor
    ids: Ids
    index: int
    partner_targets: Tensor | None = None
    share: float = 1.0


class BatchLoader:
    """Divides each *global* batch over the shards (reference, section 5.3), so that the order in which samples are
    learned depends on (seed, epoch) alone and not on the number of shards. The last batch of an epoch may be ragged.

    Attributes:
        batch_size: samples of one global batch.
        epoch: the epoch that the next batch belongs to.
        consumed: samples of that epoch that all shards together have been given.
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
        first = self.consumed
        on_their_way: deque[tuple[Ids, Ids, Ids]] = deque()

        def wanted() -> Iterator[Ids]:
            for start in range(first, len(order), self.batch_size):
                whole = order[start : start + self.batch_size]
                mine = data_shard(whole, self._shard_id, self._num_shards, self._sharding, self._seed, self.epoch)
                fetched = with_partners(mine, whole) if self._mixup else mine
                on_their_way.append((mine, whole, fetched))
                yield fetched

        for inputs, targets in self._images.batches(wanted(), self._dtype, (self._seed, self.epoch)):
            ids, global_ids, fetched = on_their_way.popleft()
            index = self.consumed // self.batch_size
            self.consumed += len(global_ids)
            batch = LabelledBatch(inputs, len(global_ids), targets, ids, index)
            yield self._mixed(batch, global_ids, fetched) if self._mixup else batch
        self.epoch, self.consumed = self.epoch + 1, 0

    def _mixed(self, batch: LabelledBatch, global_ids: Ids, fetched: Ids) -> LabelledBatch:
        """`batch`, of which the inputs and targets are those of the samples `fetched`, mixed (Zhang et al. 2018)."""
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
    """The sample after each of `ids` in the global batch, after the last one the first."""
    after = dict(zip(global_ids.tolist(), np.roll(global_ids, -1).tolist(), strict=True))
    return np.array([after[number] for number in ids.tolist()], dtype=global_ids.dtype)


def with_partners(ids: Ids, global_ids: Ids) -> Ids:
    """`ids`, and behind them those of their partners that are not among them."""
    return np.concatenate([ids, np.setdiff1d(partners_of(ids, global_ids), ids)])
