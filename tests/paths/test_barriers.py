"""Barriers in both definitions, by hand."""

from __future__ import annotations

import pytest
import torch

from losslab.errors import LosslabError
from losslab.paths import barrier


def by_hand(values, t):
    first, last = values[0], values[-1]
    chord = [v - (1 - s) * first - s * last for v, s in zip(values, t, strict=True)]
    return (
        max(values) - (first + last) / 2,
        max(chord),
        t[values.index(max(values))],
        t[chord.index(max(chord))],
    )


@pytest.mark.parametrize("seed", range(20))
def test_both_definitions_with_their_place(seed):
    g = torch.Generator().manual_seed(seed)
    values = torch.randn(3, 6, generator=g).double()
    t = torch.cat([torch.zeros(1), torch.rand(4, generator=g).sort().values, torch.ones(1)]).double()
    found = barrier(values, t)
    for i, row in enumerate(values.tolist()):
        wanted = by_hand(row, t.tolist())
        got = (found.over_mean, found.over_chord, found.mean_place, found.chord_place)
        torch.testing.assert_close([float(v[i]) for v in got], list(wanted))


def test_ends_of_unequal_height():
    found = barrier(torch.tensor([0.0, 1.0, 2.0]))
    assert float(found.over_mean) == 1.0  # a climb, counted as a barrier by this definition
    assert float(found.over_chord) == 0.0
    assert float(found.mean_place) == 1.0


def test_nan_and_infinity_are_not_hidden():
    nan, inf = float("nan"), float("inf")
    found = barrier(torch.tensor([[0.0, nan, 5.0], [0.0, inf, 5.0], [0.0, 1.0, 0.0]]))
    assert found.over_mean.isnan().tolist() == [True, False, False]
    assert found.over_chord[1].isinf()
    assert found.chord_place.tolist() == [0.5, 0.5, 0.5]


@pytest.mark.parametrize("t", [[0.0, 0.5, 0.4], [0.0, 1.0], [0.0, 0.5, 1.5]])
def test_a_wrong_parameter_is_refused(t):
    with pytest.raises(LosslabError, match="ascending"):
        barrier(torch.zeros(3), torch.tensor(t))
    with pytest.raises(LosslabError, match="both ends"):
        barrier(torch.zeros(1))
