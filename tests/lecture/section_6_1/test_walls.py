"""The networks of C6 whose copies are cut off: the two proofs, checked in numpy, and a small run."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import brentq, least_squares

from losslab.engine import Points
from losslab.lecture.section_6_1 import walls as c

ANGLES = 2 * np.pi * np.arange(3) / 3
X = np.stack([np.cos(ANGLES), np.sin(ANGLES)])  # [2, 3], a point a column
Y = X[:, [1, 2, 0]]
BITS = np.array([[0.0, 0, 1, 1], [0, 1, 0, 1]])
XOR = np.array([0.0, 1, 1, 0])


def hidden(w):
    return np.maximum(w @ X, 0)


def best(w):
    """The least loss over all outgoing weights, with these incoming ones."""
    a = hidden(w)
    solution = np.linalg.lstsq(a.T, Y.T, rcond=None)[0]
    return float(((solution.T @ a - Y) ** 2).sum() / 6)


def test_the_loss_where_the_determinant_is_zero():
    """On the way between incoming weights of either sign, at the root: above 1/12, whatever comes after."""
    rng, losses = np.random.default_rng(0), []
    while len(losses) < 300:
        a, b = rng.standard_normal((2, 3, 2))

        def det(t, a=a, b=b):
            return np.linalg.det(hidden((1 - t) * a + t * b))

        if det(0) * det(1) < 0:
            t = brentq(det, 0, 1, xtol=1e-15)
            kernel = np.linalg.svd(hidden((1 - t) * a + t * b))[2][2]  # A n = 0 up to rounding
            losses.append(float(((Y @ kernel) ** 2).sum() / 6))
            assert best(a) < 1e-20 > best(b)
    assert min(losses) > 1 / 12
    assert min(losses) < 0.13  # the bound is not idle


def test_the_bound_cannot_be_raised():
    """Two units that see nearly the same, and a third like the first: as close to 1/12 as one likes."""
    for epsilon, most in ((0.1, 1.3), (0.001, 1.003)):
        seen = np.array([[epsilon, -1 - epsilon, 1], [-1 - epsilon, epsilon, 1], [epsilon, -1 - epsilon, 1]])
        w = np.linalg.lstsq(X.T, seen.T, rcond=None)[0].T
        np.testing.assert_allclose(w @ X, seen, atol=1e-12)
        assert 1 / 12 < best(w) < most / 12


def test_exclusive_or_below_the_wall_no_sign_changes():
    """With a first-layer weight or an outgoing one held at zero no fit gets below 1/16."""
    rng = np.random.default_rng(1)

    def residuals(p, zero):
        p = p.copy()
        p[zero] = 0.0
        h = np.tanh(p[:4].reshape(2, 2) @ BITS + p[4:6, None])
        return p[6:8] @ h + p[8] - XOR

    lowest = {}
    for zero in (0, 1, 2, 3, 6, 7):
        starts = 2 * rng.standard_normal((6, 9))
        fits = [least_squares(residuals, p, args=(zero,), max_nfev=60).fun for p in starts]
        lowest[zero] = min((fit**2).sum() / 8 for fit in fits)
    assert min(lowest.values()) >= 1 / 16 - 1e-12
    assert min(lowest.values()) == pytest.approx(1 / 16, rel=0.01)  # the bound is not idle


@pytest.mark.parametrize("name", ["three points, 2-3-2", "exclusive or, 2-2-1"])
def test_every_solution_and_its_copy_lie_apart(name):
    walled = c.networks()[name]
    own = c.solutions(walled.task, 12)
    assert own.members >= 3
    copies = c.exchanged(walled.task, own)
    assert c.apart(walled, own, copies).all()
    assert not c.apart(walled, own, own).any()


def test_determinants_are_those_of_the_hidden_units():
    w = np.random.default_rng(2).standard_normal((4, 3, 2))
    points = Points({"0.weight": torch.tensor(w), "2.weight": torch.zeros(4, 2, 3, dtype=torch.float64)}, {})
    expected = [np.linalg.det(hidden(one)) for one in w]
    np.testing.assert_allclose(c.determinants(points)[:, 0].numpy(), expected, rtol=1e-12)


def test_networks_with_a_unit_to_spare_have_no_sides():
    walled = c.networks()["three points, 2-4-2"]
    own = c.solutions(walled.task, 4)
    assert np.isnan(c.apart(walled, own, own)).all()
