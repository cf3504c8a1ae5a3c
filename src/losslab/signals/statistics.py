"""Numbers that describe what flows: moments, percentiles, histograms, saturation, dead units, step sizes.

Everything takes the tensors of a `Flow`, ``[N, B, ...]``, and gives one number a member, ``[N]``, or one a
unit, ``[N, U]``. The units lie along ``unit_axis``; all other axes but the first are samples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from losslab.engine.compiled import CONSTANT
from losslab.engine.points import Stack
from losslab.engine.randomness import generator
from losslab.errors import LosslabError
from losslab.signals.capture import Layer
from losslab.signals.flows import Flow

PERCENTILES = (2, 15, 50, 85, 98)
"""Those reported by default; 15, 50 and 85 are those of Ioffe and Szegedy's figure 1."""

SAMPLE = 4096
"""Values of a layer, the same ones for every member, that percentiles are taken of."""

CACHED = 2**17
"""Values that are passed over at a time, so that the second pass finds them in a core's cache."""

Statistics = dict[str, Tensor]
"""Statistic -> ``[N]``."""


def by_unit(values: Tensor, unit_axis: int = -1) -> Tensor:
    """``[N, B, ...]`` -> ``[N, U, samples]``: all values of each unit, a convolution's channels being units.

    Example:
        >>> by_unit(torch.zeros(2, 5, 3, 4, 4), unit_axis=2).shape
        torch.Size([2, 3, 80])
    """
    if values.dim() < 3:  # one number an example
        values = values.unsqueeze(-1)
    return values.movedim(unit_axis, 1).flatten(2)


def unit_moments(values: Tensor, unit_axis: int = -1) -> tuple[Tensor, Tensor]:
    """Mean and variance (biased) of each unit over examples and positions, both ``[N, U]``."""
    if values.dim() < 3:
        values = values.unsqueeze(-1)
    axes = [a for a in range(1, values.dim()) if a != unit_axis % values.dim()]
    return mean_and_variance(values, axes)


def mean_and_variance(values: Tensor, axes: list[int]) -> tuple[Tensor, Tensor]:
    """Over some axes, ``[N, ...]``; as exact as torch.var_mean and on a CPU several times faster."""
    if values.is_cpu and values.numel() > CACHED:
        members = max(1, CACHED * len(values) // values.numel())
        parts = [_two_passes(part, axes) for part in values.split(members)]
        mean, variance = (torch.cat(column) for column in zip(*parts, strict=True))
        return mean, variance
    return _two_passes(values, axes)


def _two_passes(values: Tensor, axes: list[int]) -> tuple[Tensor, Tensor]:
    mean = values.mean(axes, keepdim=True)
    return mean.squeeze(axes), (values - mean).square_().mean(axes)


def moments(values: Tensor, unit_axis: int = -1) -> Statistics:
    """``mean`` and ``std`` of all values; ``unit_std`` and ``constant`` over units.

    ``unit_std`` is the root mean square over units of the standard deviation that a unit has over examples,
    ``constant`` the share of units that have none; NaN where each unit has a single value.
    """
    mean, variance = unit_moments(values, unit_axis)
    told = of_units(mean[None], variance[None], single_valued(values, unit_axis))
    return {name: column[0] for name, column in told.items()}


def single_valued(values: Tensor, unit_axis: int) -> bool:
    """Whether each unit has a single value."""
    return values[0].numel() == (values.shape[unit_axis] if values.dim() > 2 else 1)


def of_units(mean: Tensor, variance: Tensor, single: bool) -> Statistics:
    """`moments` of K layers from those of their units ``[K, N, U]``: statistic -> ``[K, N]``."""
    within, middle = variance.mean(2), mean.mean(2)
    total = within + (mean - middle[..., None]).square_().mean(2)
    square = total + middle.square()
    if single:
        within = flat = torch.full_like(within, torch.nan)
    else:
        flat = (variance <= CONSTANT * square[..., None]).to(mean.dtype).mean(2) + 0 * square
    return {"mean": middle, "std": total.sqrt(), "unit_std": within.sqrt(), "constant": flat}


def percentiles(
    values: Tensor, which: Sequence[float] = PERCENTILES, sample: int | None = SAMPLE, seed: int = 0
) -> Tensor:
    """Percentiles of all values, by linear interpolation, ``[N, len(which)]``; NaN for members with a NaN.

    Args:
        values: ``[N, ...]``.
        which: Between 0 and 100.
        sample: At most so many values a member, drawn with replacement by a generator of ``seed``; None for
            all. The rank of a percentile p then has the standard error ``sqrt(p (100 - p) / sample)``.
        seed: Of the draw.

    Raises:
        LosslabError: A percentile outside of 0 to 100.

    Example:
        >>> percentiles(torch.arange(101.0)[None], (15, 50)).tolist()
        [[15.0, 50.0]]
    """
    return ranked(drawn(values, sample, seed), as_percentiles(which))


def as_percentiles(which: Sequence[float]) -> tuple[float, ...]:
    """Checked: between 0 and 100."""
    if not all(0 <= p <= 100 for p in which):
        raise LosslabError(f"percentiles {tuple(which)}: pass numbers from 0 to 100")
    return tuple(which)


def drawn(values: Tensor, sample: int | None, seed: int) -> Tensor:
    """At most ``sample`` values a member, at the same places of each, ``[N, S]``: a copy."""
    if sample is None or values[0].numel() <= sample:
        return values.reshape(len(values), -1).clone()
    return _sampled(values, sample, seed)


def ranked(values: Tensor, which: tuple[float, ...]) -> Tensor:
    """Percentiles of the last axis: ``[..., S]`` -> ``[..., len(which)]``; they may be sorted in place."""
    ordered = sort_rows(values.reshape(-1, values.shape[-1]), ours=True).view(values.shape)
    low, high, share = (t.to(values.device) for t in _ranks(values.shape[-1], which))
    below = ordered[..., low]
    found = below + share.to(values.dtype) * (ordered[..., high] - below)
    last = ordered[..., -1:]
    return torch.where(last.isnan(), last, found)


@lru_cache(maxsize=64)
def _ranks(count: int, which: tuple[float, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """The ranks between which each percentile of ``count`` values lies, and how far from the lower one."""
    place = torch.tensor([p / 100 * (count - 1) for p in which], dtype=torch.float64)
    low = place.long().clamp(max=max(0, count - 2))
    return low, (low + 1).clamp(max=count - 1), place - low


def sort_rows(values: Tensor, ours: bool = False) -> Tensor:
    """Each row in ascending order, NaN last, ``[N, S]``; on a CPU by numpy, whose sort is 30 times faster.

    Args:
        values: ``[N, S]``.
        ours: Whether the values may be overwritten.
    """
    if not _in_numpy(values):
        return values.sort(1).values
    if ours:
        values.detach().numpy().sort(axis=1)
        return values
    return torch.from_numpy(np.sort(values.detach().numpy(), axis=1))


def _in_numpy(values: Tensor) -> bool:
    return values.is_cpu and values.dtype in (torch.float32, torch.float64)


def _sampled(values: Tensor, sample: int, seed: int) -> Tensor:
    """The same places of every member's values."""
    places = _places(values.shape[1:], sample, seed)
    if _in_numpy(values):  # two times faster
        here: Any = (slice(None), *(p.numpy() for p in places))
        return torch.from_numpy(values.detach().numpy()[here])
    index: tuple[slice | Tensor, ...] = (slice(None), *(p.to(values.device) for p in places))
    return values[index]


@lru_cache(maxsize=64)
def chosen(count: int, sample: int | None, seed: int = 0) -> Tensor:
    """Which of so many values are drawn, ``[S]``, int64, along memory; all if they are not more than that."""
    if sample is None or count <= sample:
        return torch.arange(count)
    return torch.randint(count, (sample,), generator=generator(seed, "percentiles")).sort().values


@lru_cache(maxsize=64)
def _places(shape: torch.Size, sample: int, seed: int) -> tuple[Tensor, ...]:
    index = chosen(shape.numel(), sample, seed).numpy()
    return tuple(torch.from_numpy(p) for p in np.unravel_index(index, shape))  # torch's loads sympy


@dataclass(frozen=True)
class Histogram:
    """How values are distributed.

    Attributes:
        counts: ``[N, bins]``.
        edges: ``[bins + 1]``, the same for all members; values beyond them are counted in the outer bins.
    """

    counts: Tensor
    edges: Tensor

    @property
    def density(self) -> Tensor:
        """Counts divided by their sum and by the width of a bin, ``[N, bins]``."""
        return self.counts / self.counts.sum(1, keepdim=True) / self.edges.diff()


def histogram(values: Tensor, bins: int = 50, span: tuple[float, float] | None = None) -> Histogram:
    """Histograms of each member's values on common edges; what is not finite is not counted.

    Args:
        values: ``[N, ...]``.
        bins: How many.
        span: The outer edges; by default from the smallest to the largest value.

    Raises:
        LosslabError: No bin, or a span that is not ascending and finite.

    Example:
        >>> histogram(torch.tensor([[0.0, 0.1, 0.9, 1.0]]), bins=2).counts.tolist()
        [[2.0, 2.0]]
    """
    flat = values.reshape(len(values), -1).to(torch.promote_types(values.dtype, torch.float32))
    finite = flat.isfinite()
    if span is None:
        there = flat[finite] if bool(finite.any()) else flat.new_zeros(1)
        low, high = float(there.min()), float(there.max())
        span = (low, high) if high > low else (low - 0.5, high + 0.5)
    if bins < 1 or not -torch.inf < span[0] < span[1] < torch.inf:
        raise LosslabError(f"a histogram of {bins} bins on {span}: pass at least one bin and low < high")
    place = ((flat.nan_to_num() - span[0]) * (bins / (span[1] - span[0]))).floor().clamp(0, bins - 1).long()
    counts = flat.new_zeros(len(flat), bins).scatter_add_(1, place, finite.to(flat.dtype))
    return Histogram(counts, torch.linspace(*span, bins + 1, dtype=torch.float64, device=flat.device))


def saturated(seen: Flow, layer: str) -> Tensor:
    """Share of (example, unit) pairs in an activation's flat part, ``[N]``.

    Sigmoid: an input beyond 3 in size. Others: a slope below a tenth of the largest one. NaN for layers that
    are no known activation, and for ReLU, which is flat on half of the line by design.
    """
    told = seen.layers[layer]
    flat = None if gates(told) else flat_part(told, seen.inputs.get(layer))
    return _share(flat, seen.outputs[layer])


def gates(layer: Layer) -> bool:
    """Whether it passes or blocks by design."""
    return layer.activation is not None and layer.activation.gates


def flat_part(layer: Layer, entered: Tensor | None) -> Tensor | None:
    """Which values of an activation's input pass nearly no gradient; None where the output tells, or none."""
    if layer.activation is None or layer.activation.name == "relu" or entered is None:
        return None
    return layer.activation.flat(entered)


def dead(seen: Flow, layer: str) -> Tensor:
    """Share of an activation's units that pass no gradient for any example, ``[N]``.

    ReLU: at zero for every example. Others: saturated for every example. NaN for layers that are no known
    activation.
    """
    told, values = seen.layers[layer], seen.outputs[layer]
    return _share(silent_units(told, values, flat_part(told, seen.inputs.get(layer))), values)


def silent_units(layer: Layer, values: Tensor, flat: Tensor | None) -> Tensor | None:
    """Which units of a layer are dead, or None where that does not apply; ``flat`` is `flat_part`."""
    if layer.activation is not None and layer.activation.name == "relu":
        return by_unit(values, layer.unit_axis).amax(2) <= 0
    return None if flat is None else by_unit(flat, layer.unit_axis).all(2)


def _share(flags: Tensor | None, values: Tensor) -> Tensor:
    """`share_of`; NaN for members whose values hold a NaN."""
    spoilt = values.flatten(1).sum(1)
    return torch.where(spoilt.isnan(), spoilt, share_of(flags, spoilt))


def share_of(flags: Tensor | None, like: Tensor) -> Tensor:
    """The mean of flags ``[N, ...]``, ``[N]`` in the dtype of ``like``; NaN without flags."""
    if flags is None:
        return torch.full_like(like, torch.nan)
    return flags.flatten(1).to(like.dtype).mean(1)


def update_ratio(
    earlier: Mapping[str, Tensor], later: Mapping[str, Tensor], steps: int = 1, ours: bool = False
) -> Stack:
    """``||W' - W|| / (steps ||W||)`` of every weight, name -> ``[N]``.

    With one step between the two it is the update-to-weight ratio. With more it is a lower bound of the mean
    ratio along the way, since updates partly cancel.

    Args:
        earlier: Stacked weights, e.g. ``points.weights``.
        later: The same after ``steps`` updates.
        steps: Updates between the two.
        ours: Whether the earlier weights may be overwritten.
    """
    found = {}
    for name, before in earlier.items():
        size = before.flatten(1).norm(dim=1)
        away = torch.sub(later[name], before, out=before if ours else None)
        found[name] = away.flatten(1).norm(dim=1) / (steps * size)
    return found
