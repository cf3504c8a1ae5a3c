"""Data: the examples of a task, all in memory, indexed along one leading axis."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import NoneType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    default_collate,
)

from losslab.errors import LosslabError
from losslab.tasks.nest import Nest, leaves, map_leaves, map_nest, walk

_CHUNK = 4096  # examples collated at a time: bounds the memory beyond the data themselves
_EMPTY = "the data are empty, zero examples: give at least one example"


@dataclass(frozen=True, eq=False, repr=False)
class Data:
    """A nest of tensors that share one leading axis of n examples.

    Where the source holds tensors or arrays, the data share their memory: to change one is to change both.

    Attributes:
        examples: The nest; every tensor has shape ``[n, ...]`` and no gradient.

    Raises:
        LosslabError: If there is no tensor, no example, or the tensors disagree on n.

    Example:
        >>> data = Data.of((torch.arange(6.0).view(3, 2), torch.tensor([0, 1, 0])))
        >>> len(data)
        3
        >>> data.take(torch.tensor([2, 0]))
        (tensor([[4., 5.],
                [0., 1.]]), tensor([0, 0]))
    """

    examples: Nest

    def __post_init__(self) -> None:
        tensors = [(place, leaf) for place, leaf in walk(self.examples) if isinstance(leaf, Tensor)]
        if not tensors:
            kind = type(self.examples).__name__
            raise LosslabError(f"the data hold no tensor, only a {kind}: give a tensor, or a nest of tensors")
        for place, leaf in tensors:
            if leaf.ndim == 0:
                raise LosslabError(f"data{place} is a single number: give it a leading axis of examples")
        if len({len(leaf) for _, leaf in tensors}) > 1:
            sizes = ", ".join(f"data{place} has {len(leaf)}" for place, leaf in tensors[:6])
            raise LosslabError(
                f"the data disagree on the number of examples: {sizes}; give all the same length"
            )
        if len(tensors[0][1]) == 0:
            raise LosslabError(_EMPTY)
        object.__setattr__(self, "examples", map_nest(Tensor.detach, self.examples))

    def __repr__(self) -> str:
        kinds = (
            f"{str(leaf.dtype).removeprefix('torch.')} {list(leaf.shape[1:])}"
            for leaf in leaves(self.examples)
        )
        return f"Data({len(self)} examples of {', '.join(kinds)})"

    @staticmethod
    def of(source: Any) -> Data:
        """Read a source whole, every example once, in the source's own order.

        Args:
            source: Data (returned as they are), a tensor or array, a nest of these, a map-style ``Dataset``
                of torch or of Hugging Face (numeric columns), or a ``DataLoader``. A loader's ``collate_fn``
                is used, its shuffling is not, and a ``SubsetRandomSampler`` restricts the examples. A loader
                over an iterable dataset is read through once.

        Raises:
            LosslabError: If the source is of another kind, empty, ragged, or holds text.
        """
        if isinstance(source, Data):
            return source
        with torch.random.fork_rng(devices=[]):  # a dataset may draw its augmentations
            if isinstance(source, DataLoader):
                return Data(_read_loader(source))
            if isinstance(source, Dataset) and not isinstance(source, IterableDataset):
                return Data(_collate(source, range(_length(source)), default_collate, _CHUNK))
        if _is_hugging_face(source):
            return Data(_read_hugging_face(source))
        return Data(_tensors(source))

    def __len__(self) -> int:
        return len(leaves(self.examples)[0])

    def take(self, index: Tensor) -> Nest:
        """The examples at ``index``.

        Args:
            index: int64, on the data's device: ``[B]``, or ``[N, B]`` for N batches at once.

        Returns:
            The nest with contiguous tensors ``[B, ...]``, or ``[N, B, ...]``.
        """
        if index.ndim == 1:
            return map_nest(lambda leaf: leaf.index_select(0, index), self.examples)
        flat = index.reshape(-1)
        return map_nest(
            lambda leaf: leaf.index_select(0, flat).view(*index.shape, *leaf.shape[1:]), self.examples
        )

    def all(self) -> Nest:
        """The nest of all examples, without a copy."""
        return self.examples

    def head(self, n: int) -> Data:
        """The first n examples (all of them if there are fewer), without a copy."""
        return Data(map_nest(lambda leaf: leaf[:n], self.examples))

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Data:
        """The data on another device or in another precision; ``dtype`` is for floating tensors only."""

        def move(leaf: Tensor) -> Tensor:
            return leaf.to(device=device, dtype=dtype if leaf.is_floating_point() else None)

        return Data(map_nest(move, self.examples))


def _tensors(nest: Nest) -> Nest:
    """A nest whose arrays have become tensors and whose other leaves are ones that may ride along."""
    for place, leaf in walk(nest):
        if not isinstance(leaf, (Tensor, np.ndarray, np.generic, int, float, NoneType)):
            raise LosslabError(
                f"data{place} is a {type(leaf).__name__}: give a tensor, an array, a nest of these, "
                "a map-style Dataset with numeric columns, or a DataLoader"
            )
    return map_leaves(_tensor, nest)


def _tensor(leaf: Any) -> Any:
    if not isinstance(leaf, (np.ndarray, np.generic)):
        return leaf
    array = np.asarray(leaf)
    try:
        return torch.from_numpy(array if array.flags.writeable else array.copy())
    except (TypeError, ValueError) as error:
        raise LosslabError(
            f"the data hold an array of {array.dtype}, which torch has not: give numbers"
        ) from error


def _collate(dataset: Any, indices: Sequence[int], collate: Callable[[list[Any]], Any], chunk: int) -> Nest:
    """The dataset's examples at ``indices``, collated ``chunk`` at a time and joined."""
    starts = range(0, len(indices), chunk)
    try:
        return _join(collate([dataset[i] for i in indices[start : start + chunk]]) for start in starts)
    except LosslabError:
        raise
    except Exception as error:  # whatever the dataset or its collate_fn raises
        raise LosslabError(
            f"the examples of {type(dataset).__name__} do not make a batch ({type(error).__name__}: "
            f"{error}): give all of them one shape, or a DataLoader whose collate_fn pads them"
        ) from error


def _join(batches: Iterable[Nest]) -> Nest:
    parts = [_tensors(batch) for batch in batches]
    if not parts:
        raise LosslabError(_EMPTY)
    try:
        return parts[0] if len(parts) == 1 else map_nest(lambda *leaf: torch.cat(leaf), *parts)
    except (RuntimeError, TypeError) as error:
        raise LosslabError(f"the batches do not join ({error}): give all examples one shape") from error


def _read_loader(loader: DataLoader[Any]) -> Nest:
    dataset, collate = loader.dataset, loader.collate_fn
    if isinstance(dataset, IterableDataset):
        return _join(loader)
    indices = _loader_indices(loader)
    if loader.batch_sampler is None:  # each item of the dataset is a batch already
        return _collate(dataset, indices, lambda items: _join(map(collate, items)), _CHUNK)
    # A collate_fn of the user's own may pad to the longest example: it gets all of them, for one length.
    return _collate(dataset, indices, collate, _CHUNK if collate is default_collate else max(1, len(indices)))


def _loader_indices(loader: DataLoader[Any]) -> Sequence[int]:
    sampler = loader.sampler
    own = type(loader.batch_sampler) not in (BatchSampler, NoneType)
    if not own and isinstance(sampler, SubsetRandomSampler):
        return sorted(sampler.indices)
    if not own and isinstance(sampler, (SequentialSampler, RandomSampler)):
        return range(_length(loader.dataset))
    kind = type(loader.batch_sampler if own else sampler).__name__
    raise LosslabError(
        f"the DataLoader draws its examples with a {kind}, and losslab draws its own batches: "
        "pass loader.dataset, or a torch.utils.data.Subset of it"
    )


def _is_hugging_face(source: Any) -> bool:
    # A DatasetDict, a mapping of splits, is no data set; nor is a streaming one, which has no length.
    return all(hasattr(source, name) for name in ("with_format", "__len__")) and not isinstance(
        source, Mapping
    )


def _read_hugging_face(dataset: Any) -> Nest:
    rows = dataset.with_format("torch")
    return _join(rows[start : start + _CHUNK] for start in range(0, len(rows), _CHUNK))


def _length(dataset: Any) -> int:
    try:
        return len(dataset)
    except TypeError as error:
        kind = type(dataset).__name__
        raise LosslabError(f"{kind} has no length: give a Dataset with __len__ and __getitem__") from error
