"""Data sets of any problem: items are trees of tensors, in memory or read on demand."""

import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Protocol, Self

import numpy as np
import torch
from torch.utils.data import Dataset, IterableDataset, Subset, TensorDataset, default_collate

from lockstep.data.batch import Tree, leaves_of, map_leaves, map_tensors, tensors_of
from lockstep.data.item_reader import ItemReader, Key
from lockstep.data.sharding import Ids, content_hash
from lockstep.runtime.errors import DataError, LockstepError
from lockstep.runtime.user_code import where

Collate = Callable[[list[Any]], Tree]


class DataSet(Protocol):
    """Samples 0 ... len - 1, which are read in batches."""

    def __len__(self) -> int: ...

    def to(self, device: torch.device) -> "DataSet":
        """Return the data set with its batches on `device`."""
        ...

    def batches(self, ids: Iterable[Ids], dtype: torch.dtype, seed: tuple[int, ...] | None = None) -> Iterator[Tree]:
        """Yield one batch for each array in `ids`; floating-point tensors as `dtype`, others as they are.

        Args:
            seed: of what is random about a sample, together with its number; None for no augmentation.
        """
        ...


@dataclass(frozen=True)
class TensorSet:
    """A tree of tensors in memory, whose rows are the samples."""

    tree: Tree

    def __len__(self) -> int:
        return len(next(tensors_of(self.tree)))

    def to(self, device: torch.device) -> Self:
        return replace(self, tree=map_tensors(lambda tensor: tensor.to(device), self.tree))

    def batches(
        self,
        ids: Iterable[Ids],
        dtype: torch.dtype,
        seed: tuple[int, ...] | None = None,  # noqa: ARG002  # nothing is random here
    ) -> Iterator[Tree]:
        for batch_ids in ids:
            chosen = torch.from_numpy(batch_ids)
            yield as_dtype(map_tensors(lambda tensor: tensor[chosen.to(tensor.device)], self.tree), dtype)  # noqa: B023

    def take(self, ids: Ids) -> Self:
        """Select the samples `ids` (n,)."""
        return replace(self, tree=map_tensors(lambda tensor: tensor[torch.from_numpy(ids)], self.tree))


@dataclass(frozen=True)
class MapStyleSet:
    """A map-style data set, whose items are read on demand.

    Attributes:
        samples: has len() and items 0 ... len - 1.
        collate: makes a batch of a list of items.
        num_workers: processes that read ahead; with 0 the rank reads by itself.
        name: of the data set, for messages.
    """

    samples: Any
    collate: Collate
    num_workers: int
    name: str
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def __len__(self) -> int:
        return len(self.samples)

    def to(self, device: torch.device) -> Self:
        return replace(self, device=device)

    def batches(self, ids: Iterable[Ids], dtype: torch.dtype, seed: tuple[int, ...] | None = None) -> Iterator[Tree]:
        for batch in self._reader.read(ids, seed):
            on_device = map_tensors(lambda tensor: tensor.to(self.device, non_blocking=True), batch)
            yield as_dtype(on_device, dtype)

    def take(self, ids: Ids) -> Self:
        """Select the samples `ids` (n,)."""
        return replace(self, samples=Subset(self.samples, ids.tolist()))

    @cached_property
    def _reader(self) -> ItemReader:
        items = _SeededItems(self.samples, self.name)
        return ItemReader(items, self.collate, self.num_workers, self.device.type == "cuda")


def as_data_set(value: Any, name: str, collate: Collate = default_collate, num_workers: int = 0) -> DataSet:
    """Wrap what a user gives as a data set.

    Args:
        value: a tree of tensors with one row for each sample, or a map-style data set.
        name: of the data set, for messages.

    Raises:
        DataError: it is neither, or is empty.
    """
    if isinstance(value, TensorDataset):
        value = value.tensors
    found: DataSet
    kinds = (torch.Tensor, np.ndarray)
    if isinstance(value, (*kinds, Mapping, tuple)) and any(isinstance(leaf, kinds) for leaf in leaves_of(value)):
        if others := [type(leaf).__name__ for leaf in leaves_of(value) if not isinstance(leaf, kinds)]:
            raise DataError(f"{name} gave tensors and {others[0]}: each part must be a tensor or an array")
        value = map_leaves(lambda leaf: torch.from_numpy(leaf) if isinstance(leaf, np.ndarray) else leaf, value)
        tensors = [*tensors_of(value)]
        if len(lengths := {len(tensor) if tensor.dim() else 0 for tensor in tensors}) > 1:
            raise DataError(f"{name} gave tensors of {sorted(lengths)} rows: each needs one row for each sample")
        found = TensorSet(value)
    elif hasattr(value, "batches") and hasattr(value, "to"):
        found = value
    elif isinstance(value, IterableDataset) or not (hasattr(value, "__len__") and hasattr(value, "__getitem__")):
        raise DataError(
            f"{name} gave {type(value).__name__}: a map-style data set is needed, with len() and items by number, or a "
            "tensor, tuple or dictionary of tensors with one row for each sample"
        )
    else:
        found = MapStyleSet(value, collate, num_workers, name)
    if not len(found):
        raise DataError(f"{name} gave a data set without samples")
    return found


def split_by_hash(num_samples: int, share: float, seed: int) -> tuple[Ids, Ids]:
    """Divide samples into a training and a held-out part by the sha256 of (seed, number): the same on every rank, and
    nearly the same when samples are added.

    Args:
        share: of the held-out samples, 0 ... 1; each part has one sample at least.
    """
    numbers = np.arange(num_samples)
    keys = np.array([int(content_hash((seed, "held out", number))[:13], 16) for number in numbers.tolist()])
    is_held_out = keys < share * 16.0**13
    if is_held_out.all() or not is_held_out.any():  # a few samples only
        is_held_out = keys == keys.min()
    return numbers[~is_held_out], numbers[is_held_out]


def as_dtype(tree: Tree, dtype: torch.dtype) -> Tree:
    """Convert floating-point tensors to `dtype`; integers, booleans and complex numbers stay."""
    return map_tensors(lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor, tree)


@contextmanager
def seeded(seed: tuple[int, ...]) -> Iterator[None]:
    """Seed the global generators of PyTorch, NumPy and Python inside, and restore them afterwards.

    What a data set draws for a sample is then the same on any rank, in any worker, and after a resume.
    """
    before = torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002  # what user code may use
    number = int(content_hash(seed)[:15], 16)
    torch.default_generator.manual_seed(number)
    np.random.seed(number % 2**32)  # noqa: NPY002
    random.seed(number)
    try:
        yield
    finally:
        torch.set_rng_state(before[0])
        np.random.set_state(before[1])  # noqa: NPY002
        random.setstate(before[2])


@dataclass(frozen=True)
class _SeededItems(Dataset[Any]):
    """The items of a user's data set, each drawn with the random numbers of its key."""

    samples: Any
    name: str

    def __getitem__(self, key: Key) -> Any:
        number, seed = key
        try:
            with seeded((*(seed or ()), number)):
                return self.samples[number]
        except LockstepError as error:
            return DataError(str(error))
        except Exception as error:  # a user's data set may raise anything
            return DataError(f"sample {number} of {self.name} cannot be used: {where(error)}")
