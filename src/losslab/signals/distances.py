"""How far a distribution of activations has moved between two moments."""

from __future__ import annotations

import torch
from torch import Tensor

from losslab.errors import LosslabError
from losslab.signals.statistics import Histogram, by_unit, sort_rows


def drift(earlier: Tensor, later: Tensor, unit_axis: int = -1, per_unit: bool = False) -> Tensor:
    """D = |median_later - median_earlier| / IQR_later of each unit, in the middle over units.

    The range between the quartiles (IQR) is the unit's own, at the later moment. A unit without any spread
    counts 0 if it has not moved and infinity if it has, which is why their median is taken, not the mean.

    Args:
        earlier: Outputs or inputs of a layer, ``[N, B, ...]``, as a `Flow` holds them.
        later: The same layer, later in training, the same number of units.
        unit_axis: Which axis counts the units: ``flow.layers[name].unit_axis``.
        per_unit: Whether to give every unit's number, ``[N, U]``, instead of their median ``[N]``.

    Raises:
        LosslabError: The two have not the same members and units.

    Example:
        >>> x = torch.linspace(0, 4, 5)[None, :, None]
        >>> drift(x, x + 3).tolist()
        [1.5]
    """
    before, after = (_sorted_units(t, unit_axis) for t in _matched(earlier, later, unit_axis))
    low, middle, high = (_quantile(after, q) for q in (0.25, 0.5, 0.75))
    moved = (middle - _quantile(before, 0.5)).abs()
    found = torch.where((moved == 0) & (high == low), torch.zeros_like(moved), moved / (high - low))
    return found if per_unit else _middle(found)


def shift_in_distribution(
    earlier: Tensor, later: Tensor, unit_axis: int = -1, per_unit: bool = False
) -> Tensor:
    """Wasserstein-1 distance of each unit's distribution, divided by IQR_later, in the middle over units.

    Sees what `drift` does not: a change of width or shape around the same median. Arguments as for `drift`.

    Example:
        >>> x = torch.linspace(-2, 2, 5)[None, :, None]
        >>> drift(x, 2 * x).tolist(), shift_in_distribution(x, 2 * x).tolist()
        ([0.0], [0.30000001192092896])
    """
    before, after = (by_unit(t, unit_axis) for t in _matched(earlier, later, unit_axis))
    apart = wasserstein(before, after)
    ordered = _rows_sorted(after)
    spread = _quantile(ordered, 0.75) - _quantile(ordered, 0.25)
    found = torch.where((apart == 0) & (spread == 0), torch.zeros_like(apart), apart / spread)
    return found if per_unit else _middle(found)


def wasserstein(a: Tensor, b: Tensor) -> Tensor:
    """Wasserstein-1 distance between samples: the area between their distribution functions; exact.

    Args:
        a: Samples along the last axis, ``[..., S]``.
        b: The same leading axes, ``[..., T]``; the numbers of samples may differ.

    Returns:
        ``[...]``; NaN where a sample is NaN.

    Raises:
        LosslabError: Other leading axes, or no sample.

    Example:
        >>> wasserstein(torch.tensor([0.0, 1.0]), torch.tensor([3.0, 2.0, 2.0, 3.0])).item()
        2.0
    """
    if a.shape[:-1] != b.shape[:-1] or 0 in (a.shape[-1], b.shape[-1]):
        raise LosslabError(
            f"samples of shapes {tuple(a.shape)} and {tuple(b.shape)}: pass the same leading axes, "
            "and at least one sample along the last"
        )
    first, second = _rows_sorted(a), _rows_sorted(b)
    if a.shape[-1] == b.shape[-1]:
        return (first - second).abs().mean(-1)
    both = _rows_sorted(torch.cat([first, second], -1))
    here = both[..., :-1].contiguous()
    below = [
        torch.searchsorted(t.contiguous(), here, right=True).to(here.dtype) / t.shape[-1]
        for t in (first, second)
    ]
    found = ((below[0] - below[1]).abs() * both.diff(dim=-1)).sum(-1)
    return torch.where(both[..., -1].isnan(), both[..., -1], found)


def histogram_distance(a: Histogram, b: Histogram) -> Tensor:
    """Wasserstein-1 distance between histograms on the same edges, each bin's mass spread evenly, ``[N]``.

    Raises:
        LosslabError: Other edges.

    Example:
        >>> edges = torch.tensor([0.0, 1.0, 2.0])
        >>> one, other = (Histogram(torch.tensor([c]), edges) for c in ([4.0, 0.0], [0.0, 2.0]))
        >>> histogram_distance(one, other).tolist()
        [1.0]
    """
    if a.edges.shape != b.edges.shape or not torch.equal(a.edges, b.edges):
        raise LosslabError("the histograms have other edges: count both with the same bins and span")
    apart = [h.counts.double().cumsum(1) / h.counts.double().sum(1, keepdim=True) for h in (a, b)]
    right = apart[0] - apart[1]
    left = torch.cat([torch.zeros_like(right[:, :1]), right[:, :-1]], 1)
    size = left.abs() + right.abs()
    # Between two edges the difference is linear; where it changes sign it is two triangles.
    crossing = (left.square() + right.square()) / (2 * size).clamp(min=torch.finfo(torch.float64).tiny)
    area = torch.where(left * right < 0, crossing, size / 2)
    return (area * a.edges.double().diff()).sum(1)


def _matched(earlier: Tensor, later: Tensor, unit_axis: int) -> tuple[Tensor, Tensor]:
    shapes = [(t.shape[0], by_unit(t, unit_axis).shape[1]) for t in (earlier, later)]
    if shapes[0] != shapes[1]:
        raise LosslabError(
            f"members and units are {shapes[0]} earlier and {shapes[1]} later: pass the same layer twice"
        )
    return earlier, later


def _sorted_units(values: Tensor, unit_axis: int) -> Tensor:
    return _rows_sorted(by_unit(values, unit_axis))


def _rows_sorted(values: Tensor) -> Tensor:
    return sort_rows(values.reshape(-1, values.shape[-1])).view(values.shape)


def _quantile(ordered: Tensor, q: float) -> Tensor:
    place = q * (ordered.shape[-1] - 1)
    low = int(place)
    high = min(low + 1, ordered.shape[-1] - 1)
    return torch.lerp(ordered[..., low], ordered[..., high], place - low)


def _middle(values: Tensor) -> Tensor:
    """The median over units; the mean of the two middle ones if their number is even; NaN if one is NaN."""
    ordered = sort_rows(values)
    count = ordered.shape[1]
    middle = (ordered[:, (count - 1) // 2] + ordered[:, count // 2]) / 2
    return torch.where(ordered[:, -1].isnan(), ordered[:, -1], middle)
