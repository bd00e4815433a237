"""One rank's samples of an optimizer step: trees of tensors, whose rows are samples."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from typing import Any, Self

import numpy as np
from torch import Tensor

from lockstep.data.sharding import Ids

Tree = Any
"""A tensor, or a dictionary, list or tuple of trees, as `torch.utils.data.default_collate` gives them. Other leaves,
such as texts, are kept as they are."""


def map_tensors(change: Callable[[Tensor], Any], tree: Tree) -> Tree:
    """Apply `change` to every tensor of `tree`."""
    return map_leaves(lambda leaf: change(leaf) if isinstance(leaf, Tensor) else leaf, tree)


def map_leaves(change: Callable[[Any], Any], tree: Tree) -> Tree:
    """Apply `change` to every leaf of `tree`."""
    if isinstance(tree, Mapping):
        return {name: map_leaves(change, value) for name, value in tree.items()}
    if isinstance(tree, list | tuple):
        return _like(tree, [map_leaves(change, value) for value in tree])
    return change(tree)


def rows(tree: Tree, start: int, stop: int) -> Tree:
    """Select the rows `start` ... `stop` - 1 of every tensor, array and list of texts of `tree`."""
    if isinstance(tree, Tensor | np.ndarray):
        return tree[start:stop] if tree.ndim else tree
    if isinstance(tree, Mapping):
        return {name: rows(value, start, stop) for name, value in tree.items()}
    if isinstance(tree, list | tuple):
        if not any(isinstance(value, Tensor | np.ndarray | Mapping | list | tuple) for value in tree):
            return tree[start:stop] if isinstance(tree, list) else tree  # a list of texts; a tuple such as a size
        return _like(tree, [rows(value, start, stop) for value in tree])
    return tree


def _like(tree: Any, values: list[Tree]) -> Tree:
    """Make a list, tuple or named tuple, as `tree` is, of `values`."""
    return type(tree)(*values) if hasattr(tree, "_fields") else type(tree)(values)


def leaves_of(tree: Tree) -> Iterator[Any]:
    """Yield every leaf of `tree`, in order: tensors and others."""
    if isinstance(tree, Mapping | list | tuple):
        for value in tree.values() if isinstance(tree, Mapping) else tree:
            yield from leaves_of(value)
    else:
        yield tree


def tensors_of(tree: Tree) -> Iterator[Tensor]:
    """Yield every tensor of `tree`, in order."""
    yield from (leaf for leaf in leaves_of(tree) if isinstance(leaf, Tensor))


def named_tensors(tree: Tree, name: str, inside: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor of `tree` with a flat name: keys and places, joined by dots.

    Args:
        name: of a tensor that is the whole tree; in a list or tuple it stands before the places: name.0, name.1.
        inside: the name of the part of a tree that `tree` is.
    """
    if isinstance(tree, Tensor):
        yield inside or name, tree
    elif isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from named_tensors(value, name, f"{inside}.{key}" if inside else str(key))
    elif isinstance(tree, list | tuple):
        for place, value in enumerate(tree):
            yield from named_tensors(value, name, f"{inside or name}.{place}")


@dataclass(frozen=True)
class Batch:
    """This rank's samples of a global batch. Tasks subclass it and add trees or arrays with one row for each sample.

    Attributes:
        inputs: the model's inputs, with n rows.
        global_size: number of samples over all ranks.
    """

    inputs: Tree
    global_size: int

    def __len__(self) -> int:
        """The number of samples; 0 if a ragged last batch has fewer samples than there are ranks."""
        return len(next(tensors_of(self.inputs)))

    def take(self, rows: Tensor, global_size: int) -> Self:
        """Select the samples in `rows` (k,); all ranks together select `global_size`."""
        chosen = {name: map_tensors(lambda tensor: tensor[rows], value) for name, value in self._trees().items()}
        return replace(self, **{**chosen, "global_size": global_size})

    def split(self, num_parts: int, allow_empty: bool = False) -> list[Self]:
        """Split this rank's samples into up to `num_parts` micro-batches of nearly equal size; only an empty batch
        gives an empty one.

        With `allow_empty` exactly `num_parts`, some of which may be empty: for strategies whose forward pass is a
        collective, which every rank must enter equally often.
        """
        if not allow_empty:
            num_parts = max(1, min(num_parts, len(self)))
        if num_parts == 1:
            return [self]
        bounds = np.cumsum([0, *(len(rows) for rows in np.array_split(np.arange(len(self)), num_parts))]).tolist()
        return [self._rows(start, stop) for start, stop in pairwise(bounds)]

    def _rows(self, start: int, stop: int) -> Self:
        """Select the samples `start` ... `stop` - 1."""
        return replace(self, **{name: rows(value, start, stop) for name, value in self._trees().items()})

    def _trees(self) -> dict[str, Tree]:
        """What has one row for each sample, by name."""
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        return {
            name: value
            for name, value in values.items()
            if isinstance(value, Tensor | np.ndarray | Mapping | list | tuple)
        }


@dataclass(frozen=True)
class DataBatch(Batch):
    """One shard of a global batch of a data set.

    Where the shard has no sample, its trees have one all the same, which counts for nothing: models and losses need not
    know empty batches.

    Attributes:
        data: the collated samples, of which `inputs` are a part.
        ids: (n,) numbers of the samples in the data set.
        index: the number of the global batch in its epoch, from 0.
    """

    data: Tree
    ids: Ids
    index: int

    def __len__(self) -> int:
        return len(self.ids)

    def _rows(self, start: int, stop: int) -> Self:
        shown = (start, stop) if start < stop else (0, 1)
        inputs, data = (rows(tree, *shown) for tree in (self.inputs, self.data))
        return replace(self, inputs=inputs, data=data, ids=self.ids[start:stop])
