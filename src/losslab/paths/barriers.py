"""Barriers: how much higher the loss gets on the way than at the ends."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from losslab.errors import LosslabError


@dataclass(frozen=True)
class Barrier:
    """The height of a barrier in both definitions in use, and where it stands.

    For one way the values are ``[]``, for N ways ``[N]``; float64. A way through NaN has barriers that are
    NaN; one through infinity has infinite ones.

    Attributes:
        over_mean: ``max_t L(t) - (L(0) + L(1)) / 2`` (Frankle et al. 2020; Ainsworth et al. 2023).
        over_chord: ``max_t [L(t) - (1 - t) L(0) - t L(1)]`` (Entezari et al. 2022), never negative. The two
            differ where the ends do: the mean ignores that the higher end is a climb of its own.
        mean_place: The t of the first.
        chord_place: The t of the second.
        highest: ``max_t L(t)``.
    """

    over_mean: Tensor
    over_chord: Tensor
    mean_place: Tensor
    chord_place: Tensor
    highest: Tensor


def barrier(values: Tensor, t: Tensor | None = None) -> Barrier:
    """The barrier of a way, from values measured along it.

    Args:
        values: ``[..., T]``, from end to end.
        t: Where: from 0 to 1, ``[T]`` or ``[..., T]``; even by default. On a bent path, shares of its length.

    Raises:
        LosslabError: Fewer than two values, or t that does not ascend.

    Example:
        >>> b = barrier(torch.tensor([0.0, 3.0, 1.5, 2.0]))
        >>> float(b.over_mean), round(float(b.over_chord), 3), round(float(b.chord_place), 3)
        (2.0, 2.333, 0.333)
    """
    values = values.double()
    count = values.shape[-1] if values.dim() else 0
    if count < 2:
        raise LosslabError("a barrier needs the values of at least both ends: pass [..., T] with T >= 2")
    t = torch.linspace(0, 1, count, dtype=torch.float64) if t is None else t.double()
    if t.shape[-1] != count or not bool((t.diff() >= 0).all()) or not bool(((t >= 0) & (t <= 1)).all()):
        raise LosslabError("t is no way from 0 to 1: pass one ascending number a value")
    t = t.expand(values.shape)
    first, last = values[..., :1], values[..., -1:]
    highest, top = _highest(values)
    chord = (1 - t) * first + t * last
    above, peak = _highest(values - chord)
    mean = (first + last).squeeze(-1) / 2
    return Barrier(highest - mean, above, _at(t, top), _at(t, peak), highest)


def _highest(values: Tensor) -> tuple[Tensor, Tensor]:
    """The maximum and its index along the last axis; NaN wherever there is one."""
    lost = values.isnan()
    found = values.masked_fill(lost, -torch.inf).max(-1)
    any_lost = lost.any(-1)
    index = torch.where(any_lost, lost.int().argmax(-1), found.indices)
    return found.values.masked_fill(any_lost, torch.nan), index


def _at(t: Tensor, index: Tensor) -> Tensor:
    return t.gather(-1, index.unsqueeze(-1)).squeeze(-1)
