"""Drift and Wasserstein distances: planted moves, scipy as the oracle, members and units apart."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import wasserstein_distance
from torch import Tensor

from losslab.errors import LosslabError
from losslab.signals import (
    Histogram,
    drift,
    histogram,
    histogram_distance,
    shift_in_distribution,
    wasserstein,
)


def samples(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def slow_drift(earlier: np.ndarray, later: np.ndarray) -> float:
    """One unit's D, by numpy."""
    low, high = np.percentile(later, [25, 75])
    return abs(np.median(later) - np.median(earlier)) / (high - low)


@given(st.integers(1, 4), st.integers(2, 30), st.integers(1, 6), st.integers(0, 99))
def test_drift_is_that_of_each_unit_in_the_middle(members: int, examples: int, units: int, seed: int) -> None:
    earlier, later = (
        samples(members, examples, units, seed=seed),
        samples(members, examples, units, seed=seed + 1),
    )
    each = drift(earlier, later, per_unit=True)
    assert each.shape == (members, units)
    for i in range(members):
        for j in range(units):
            wanted = slow_drift(earlier[i, :, j].numpy(), later[i, :, j].numpy())
            assert each[i, j].item() == pytest.approx(wanted, rel=1e-9)
    torch.testing.assert_close(drift(earlier, later), torch.from_numpy(np.median(each.numpy(), axis=1)))


def test_planted_moves_and_scales() -> None:
    x = samples(2, 4001, 3)
    moved = x + torch.tensor([0.0, 1.349])[:, None, None]  # the second member by the IQR of a standard normal
    found = drift(x, moved)
    assert found[0] == 0
    assert found[1].item() == pytest.approx(1.0, rel=0.05)
    torch.testing.assert_close(drift(5 * x, 5 * moved), found)  # scale-free
    wider = shift_in_distribution(x, 2 * x)
    assert float(drift(x, 2 * x).max()) < 0.05
    assert bool((wider > 0.2).all())
    torch.testing.assert_close(shift_in_distribution(x, x + 3.0)[0], 3.0 / iqr(x), rtol=1e-9, atol=0)


def iqr(x: Tensor) -> Tensor:
    spread = torch.quantile(x[0], 0.75, dim=0) - torch.quantile(x[0], 0.25, dim=0)
    return spread.median()


def test_channels_are_units() -> None:
    earlier, later = samples(2, 5, 3, 4, 4), samples(2, 5, 3, 4, 4, seed=1)
    flat = [t.movedim(2, -1).flatten(1, 3) for t in (earlier, later)]
    torch.testing.assert_close(drift(earlier, later, unit_axis=2), drift(*flat))


def test_units_without_spread_and_members_that_diverged() -> None:
    x = samples(2, 9, 3)
    x[0, :, 1:] = 1.0
    y = x.clone()
    y[0, :, 2] = 2.0
    x[1] = torch.nan
    told = drift(x, y, per_unit=True)
    assert told[0].tolist() == [0.0, 0.0, torch.inf]
    assert drift(x, y)[0] == 0
    assert bool(drift(x, y)[1].isnan())
    assert shift_in_distribution(x, y, per_unit=True)[0].tolist() == [0.0, 0.0, torch.inf]
    assert bool(shift_in_distribution(x, y)[1].isnan())


@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 99))
def test_wasserstein_is_scipys(a: int, b: int, seed: int) -> None:
    x, y = (
        samples(3, a, seed=seed).round(decimals=1),
        samples(3, b, seed=seed + 1).round(decimals=1),
    )  # with ties
    wanted = [wasserstein_distance(x[i], y[i]) for i in range(3)]
    np.testing.assert_allclose(wasserstein(x, y), wanted, rtol=1e-9, atol=1e-12)


def test_wasserstein_keeps_nan_and_shapes() -> None:
    x = samples(2, 3, 4)
    x[0, 1, 2] = torch.nan
    for y in (samples(2, 3, 4), samples(2, 3, 5)):
        found = wasserstein(x, y)
        assert found.shape == (2, 3)
        assert found.isnan().nonzero().tolist() == [[0, 1]]


@given(st.integers(1, 8), st.integers(0, 99))
def test_histogram_distance_is_that_of_evenly_spread_bins(bins: int, seed: int) -> None:
    x, y = samples(2, 40, seed=seed), samples(2, 30, seed=seed + 1)
    a, b = (histogram(t, bins, (-2.0, 2.0)) for t in (x, y))
    fine = 400
    for i in range(2):
        middles = [
            np.linspace(e, f, fine, endpoint=False) + (f - e) / fine / 2
            for e, f in itertools.pairwise(a.edges.tolist())
        ]
        weights = [np.repeat(h.counts[i].numpy(), fine) + 1e-300 for h in (a, b)]
        wanted = wasserstein_distance(np.concatenate(middles), np.concatenate(middles), *weights)
        assert histogram_distance(a, b)[i].item() == pytest.approx(wanted, abs=2e-3)


def test_errors() -> None:
    with pytest.raises(LosslabError, match=r"\(1, 3\) earlier and \(1, 4\) later"):
        drift(samples(1, 5, 3), samples(1, 5, 4))
    with pytest.raises(LosslabError, match="same leading axes"):
        wasserstein(samples(2, 5), samples(3, 5))
    edges = torch.linspace(0, 1, 3)
    one = Histogram(torch.ones(1, 2), edges)
    with pytest.raises(LosslabError, match="other edges"):
        histogram_distance(one, Histogram(torch.ones(1, 2), 2 * edges))
