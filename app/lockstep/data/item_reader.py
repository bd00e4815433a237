"""Samples that are read one by one when they are needed, by this process or by workers that read ahead.

Workers are started by forkserver and never load MPI: a fork of a rank would copy the state of its MPI library, which
does not survive that.
"""

import multiprocessing
import pickle
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch.utils.data import DataLoader, Dataset

from lockstep.data.sharding import Ids
from lockstep.runtime.errors import DataError

BATCHES_AHEAD = 4  # prefetched by each worker

Key = tuple[int, tuple[int, ...] | None]
"""A sample's number and the seed of its augmentation."""


@dataclass(frozen=True)
class ItemReader:
    """Reads and collates samples.

    Attributes:
        items: maps a `Key` to a sample, or to the error of one that cannot be used: a DataLoader would re-raise another
            one, with a traceback.
        collate: makes a batch of a list of samples.
        num_workers: processes that read ahead; with 0 the rank reads by itself.
        pin_memory: for a GPU.
    """

    items: "Dataset[Any]"
    collate: Callable[[list[Any]], Any]
    num_workers: int
    pin_memory: bool = False

    def read(self, ids: Iterable[Ids], seed: tuple[int, ...] | None = None) -> Iterator[Any]:
        """Yield one collated batch for each array in `ids`.

        Args:
            seed: of what is random about a sample, together with its number.

        Raises:
            DataError: a sample cannot be used.
        """
        self._keys.set([(number, seed) for number in batch_ids.tolist()] for batch_ids in ids)
        with _without_main():
            try:
                batches = iter(self._loader)
            except (AttributeError, TypeError, pickle.PicklingError) as error:
                raise DataError(
                    f"the data set cannot be pickled for its workers ({error}): define it at the top level of a "
                    "module, or read without workers: --data.num_workers 0"
                ) from error
        yield from map(raise_if_error, batches)

    @cached_property
    def _keys(self) -> "_Keys":
        return _Keys()

    @cached_property
    def _loader(self) -> DataLoader[Any]:
        """The one loader of the whole run, so that its worker processes persist."""
        several = self.num_workers > 0
        forkserver = multiprocessing.get_context("forkserver")
        forkserver.set_forkserver_preload([__name__, "torchvision.transforms.v2"])  # once, not in each worker
        return DataLoader(
            self.items,
            batch_sampler=self._keys,
            collate_fn=_CollateGood(self.collate),
            num_workers=self.num_workers,
            multiprocessing_context=forkserver if several else None,
            persistent_workers=several,
            prefetch_factor=BATCHES_AHEAD if several else None,
            pin_memory=self.pin_memory,
        )


def raise_if_error(batch: Any) -> Any:
    """Return `batch`, or raise it if it is an error."""
    if isinstance(batch, DataError):
        raise batch
    return batch


class _Keys:
    """A batch sampler whose batches are set anew for each pass over the loader."""

    def __init__(self) -> None:
        self._batches: Iterable[list[Key]] = ()

    def set(self, batches: Iterable[list[Key]]) -> None:
        self._batches = batches

    def __iter__(self) -> Iterator[list[Key]]:
        return iter(self._batches)


@dataclass(frozen=True)
class _CollateGood:
    """Collate samples to a batch, or return the first error among them instead."""

    collate: Callable[[list[Any]], Any]

    def __call__(self, items: list[Any]) -> Any:
        for item in items:
            if isinstance(item, DataError):
                return item
        try:
            return self.collate(items)
        except Exception as error:  # whatever a user's collation raises
            return DataError(f"the samples of a batch cannot be collated ({type(error).__name__}: {error})")


@contextmanager
def _without_main() -> Iterator[None]:
    """Inside, worker processes start without importing the main program, which would join the job as a rank."""
    main = sys.modules["__main__"]
    file, spec = getattr(main, "__file__", None), main.__spec__
    try:
        main.__file__, main.__spec__ = None, None
        yield
    finally:
        main.__file__, main.__spec__ = file, spec
