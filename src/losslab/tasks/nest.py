"""Nests: the tuples, lists and dicts of tensors that a batch can be."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor

from losslab.errors import LosslabError

#: A tensor, or a tuple, namedtuple, list or mapping of nests; other leaves (None, numbers, text) ride along.
Nest = Any


def map_nest(fn: Callable[..., Any], nest: Nest, *rest: Nest) -> Nest:
    """Apply ``fn`` to every tensor of a nest, and keep the nest's shape.

    Tuples, namedtuples, lists, dicts and ordered dicts keep their type. Any other mapping, such as a Hugging
    Face ``BatchEncoding``, becomes a plain dict, because ``torch.func.vmap`` maps over no other kind.

    Args:
        fn: Called with one tensor of ``nest`` and the leaves of ``rest`` in the same place.
        nest: The nest that decides the structure.
        *rest: Nests of the same structure.

    Returns:
        The nest of results. Leaves that are not tensors are those of ``nest``, unchanged.

    Raises:
        LosslabError: If a nest of ``rest`` has another structure.

    Example:
        >>> import torch
        >>> map_nest(lambda t: t + 1, {"x": torch.zeros(2), "name": "a"})
        {'x': tensor([1., 1.]), 'name': 'a'}
    """
    if type(nest) is tuple and not rest:  # the commonest batch, met at every training step
        return tuple(fn(leaf) if isinstance(leaf, Tensor) else map_nest(fn, leaf) for leaf in nest)
    return map_leaves(
        lambda leaf, *others: fn(leaf, *others) if isinstance(leaf, Tensor) else leaf, nest, *rest
    )


def map_leaves(fn: Callable[..., Any], nest: Nest, *rest: Nest) -> Nest:
    """As :func:`map_nest`, with ``fn`` applied to every leaf, tensor or not."""
    if isinstance(nest, Tensor):  # asked first: this runs at every step, and the next question is slow
        return fn(nest, *rest)
    if isinstance(nest, Mapping):
        for other in rest:
            if not isinstance(other, Mapping) or other.keys() != nest.keys():
                raise _differ(nest, other)
        mapped = {key: map_leaves(fn, value, *(other[key] for other in rest)) for key, value in nest.items()}
        return OrderedDict(mapped) if isinstance(nest, OrderedDict) else mapped
    if isinstance(nest, (tuple, list)):
        for other in rest:
            if not isinstance(other, (tuple, list)) or len(other) != len(nest):
                raise _differ(nest, other)
        parts = [map_leaves(fn, *group) for group in zip(nest, *rest, strict=True)]
        if isinstance(nest, list):
            return parts
        return type(nest)(*parts) if hasattr(nest, "_fields") else tuple(parts)
    return fn(nest, *rest)


def leaves(nest: Nest) -> list[Tensor]:
    """The tensors of a nest, in order.

    Example:
        >>> import torch
        >>> leaves((torch.ones(1), {"y": torch.zeros(1), "note": None}))
        [tensor([1.]), tensor([0.])]
    """
    return [leaf for _, leaf in walk(nest) if isinstance(leaf, Tensor)]


def walk(nest: Nest, place: str = "") -> Iterator[tuple[str, Any]]:
    """Every leaf of a nest, tensor or not, with its place as one would write it in Python.

    Example:
        >>> [place for place, _ in walk((1, {"y": 2}))]
        ['[0]', "[1]['y']"]
    """
    if isinstance(nest, Mapping):
        for key, value in nest.items():
            yield from walk(value, f"{place}[{key!r}]")
    elif isinstance(nest, (tuple, list)):
        for number, value in enumerate(nest):
            yield from walk(value, f"{place}[{number}]")
    else:
        yield place, nest


def _differ(nest: Nest, other: Nest) -> LosslabError:
    return LosslabError(
        f"two nests differ, one has {_describe(nest)} where the other has {_describe(other)}: "
        "give both the same structure"
    )


def _describe(nest: Nest) -> str:
    if isinstance(nest, Mapping):
        return f"a mapping with the keys {', '.join(map(repr, nest)) or '(none)'}"
    if isinstance(nest, (tuple, list)):
        return f"a {type(nest).__name__} of {len(nest)}"
    return f"a {'tensor' if isinstance(nest, Tensor) else type(nest).__name__}"
