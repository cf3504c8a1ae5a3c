"""Quadrature against closed forms, the recursion against wide networks, fixed points against iteration."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from losslab.errors import LosslabError
from losslab.layers.initialisation import gaussian
from losslab.signals import mean_field as m
from losslab.tasks import ACTIVATIONS

VARIANCES = (1e-6, 0.3, 1.0, 40.0, 1e5)


def arcsine(q: float) -> float:
    """E erf(sqrt(q) z)^2 (Williams, Computing with infinite networks, 1997)."""
    return 2 / math.pi * math.asin(2 * q / (1 + 2 * q))


def erf_slope(q: float) -> float:
    return 4 / math.pi / math.sqrt(1 + 4 * q)


@pytest.mark.parametrize("q", VARIANCES)
def test_closed_forms(q: float) -> None:
    exact = pytest.approx
    assert m.mean_square("relu", q) == exact(q / 2, rel=1e-13)
    assert m.expectation("relu", q) == exact(math.sqrt(q / (2 * math.pi)), rel=1e-13)
    assert m.mean_square_slope("relu", q) == exact(0.5, rel=1e-13)
    assert m.mean_square("identity", q) == exact(q, rel=1e-13)
    assert m.mean_square("leaky_relu", q) == exact(q / 2 * (1 + 1e-4), rel=1e-13)
    assert m.mean_square(torch.erf, q) == exact(arcsine(q), rel=1e-11)
    assert m.mean_square_slope(torch.erf, q) == exact(erf_slope(q), rel=1e-11)
    assert m.expectation("sigmoid", q) == exact(0.5, rel=1e-13)
    assert m.expectation(torch.cos, q if q < 1e3 else 1.0) == exact(
        math.exp(-(q if q < 1e3 else 1.0) / 2), abs=1e-13
    )


@pytest.mark.parametrize("q", VARIANCES)
def test_a_step_away_from_zero_needs_its_kink(q: float) -> None:
    share = m.expectation(lambda x: (x > 1).double(), q, kinks=(1.0,))
    assert share == pytest.approx(0.5 * math.erfc(1 / math.sqrt(2 * q)), rel=1e-9, abs=1e-15)


def test_the_numbers_of_the_literature() -> None:
    """tanh and its scaled form at unit variance, as an independent sum over a fine grid gives them."""
    z = np.linspace(-10, 10, 2_000_001)
    weight = np.exp(-(z**2) / 2) / math.sqrt(2 * math.pi) * (z[1] - z[0])
    slope = 1 - np.tanh(z) ** 2
    for found, values, rounded in (
        (m.mean_square("tanh"), np.tanh(z) ** 2, 0.39429),
        (m.expectation(m.derivative("tanh")), slope, 0.60571),
        (m.mean_square_slope("tanh"), slope**2, 0.4644),
        (m.mean_square("lecun_tanh"), (1.7159 * np.tanh(2 * z / 3)) ** 2, 0.7504),
    ):
        assert found == pytest.approx(float((values * weight).sum()), rel=1e-10)
        assert found == pytest.approx(rounded, abs=6e-5)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gauss_hermite_agrees_where_it_converges(activation: str) -> None:
    nodes, weights = np.polynomial.hermite_e.hermegauss(150)
    z, w = torch.from_numpy(nodes), torch.from_numpy(weights / math.sqrt(2 * math.pi))
    f = ACTIVATIONS[activation]()
    smooth = activation in ("tanh", "sigmoid", "gelu", "silu", "identity", "lecun_tanh")
    assert m.mean_square(activation, 0.7) == pytest.approx(
        float(f(z * 0.7**0.5).square() @ w), rel=1e-8 if smooth else 2e-3
    )


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_slope_is_the_derivative(activation: str) -> None:
    x = torch.linspace(-3, 3, 40, dtype=torch.float64)
    f = ACTIVATIONS[activation]()
    finite = (f(x + 1e-6) - f(x - 1e-6)) / 2e-6
    assert torch.allclose(m.derivative(activation)(x), finite, atol=1e-8)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gain_preserves_the_variance(activation: str) -> None:
    gain = m.preserving_gain(activation, 0.8)
    assert m.recursion(activation, 2, forward=[1.0, gain**2], inputs=0.8).variance[1] == pytest.approx(0.8)


# -- the recursion -------------------------------------------------------------------------------------


def test_recursion_by_hand() -> None:
    r = m.recursion(
        "relu", 3, forward=[2.0, 1.0, 3.0], backward=[5.0, 7.0, 11.0], bias=[0, 0.5, 0], inputs=4.0
    )
    assert r.variance == pytest.approx((8.0, 4.5, 6.75))
    assert r.mean_square == pytest.approx((4.0, 2.25, 3.375))
    assert r.slope == pytest.approx((0.5, 0.5, 0.5))
    assert r.chi == pytest.approx((3.5, 5.5))
    assert r.gradient == pytest.approx((3.5 * 5.5, 5.5, 1.0))
    assert r.mean == pytest.approx([math.sqrt(q / (2 * math.pi)) for q in r.variance])
    assert r.std == pytest.approx([math.sqrt(q / 2 * (1 - 1 / math.pi)) for q in r.variance])


@pytest.mark.parametrize(
    ("activation", "factor", "bias"),
    [("tanh", 1.0, 0.0), ("tanh", 1.7, 0.1), ("relu", 2.0, 0.0), ("sigmoid", 1.0, 0.2), ("softsign", 3, 0)],
)
def test_wide_networks_follow(activation: str, factor: float, bias: float) -> None:
    """Width 1000 in float64: over 5 draws, forward variance and back-propagated gradient of every layer."""
    depth, width, draws = 4, 1000, 5
    g = torch.Generator().manual_seed(3)
    f, slope = ACTIVATIONS[activation](), m.derivative(activation)
    forward, back = np.zeros((draws, depth)), np.zeros((draws, depth))
    for k in range(draws):
        layers = [torch.nn.Linear(width, width) for _ in range(depth)]
        for layer in layers:
            gaussian(math.sqrt(factor / width)).apply(layer.double(), g)
            torch.nn.init.normal_(layer.bias, std=math.sqrt(bias), generator=g)
        a, hidden = torch.randn(20, width, generator=g, dtype=torch.float64), []
        for layer in layers:
            hidden.append(layer(a).detach())
            a = f(hidden[-1])
        d = torch.randn(20, width, generator=g, dtype=torch.float64)
        gradients = [d]
        for layer, h in zip(layers[:0:-1], hidden[-2::-1], strict=True):
            d = (d @ layer.weight.detach()) * slope(h)
            gradients.insert(0, d)
        forward[k] = [float(h.square().mean()) for h in hidden]
        back[k] = [float(d.square().mean()) for d in gradients]
    r = m.recursion(activation, depth, factor, bias=bias)
    for found, theory in ((forward, r.variance), (back, r.gradient)):
        error = found.std(0, ddof=1) / math.sqrt(draws)
        assert np.all(np.abs(found.mean(0) - theory) < 5 * error + 0.02 * np.asarray(theory))


# -- fixed points --------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ["tanh", "sigmoid", "softsign", "lecun_tanh", "relu", "elu", "gelu"])
@pytest.mark.parametrize(("factor", "bias"), [(0.5, 0.3), (1.8, 0.01), (1.5, 0.2)])
def test_fixed_points_are_where_the_iteration_ends(activation: str, factor: float, bias: float) -> None:
    q = 1.0
    for _ in range(400):
        q = factor * m.mean_square(activation, q) + bias
    found = m.fixed_point(activation, factor, bias)
    assert found.variance == pytest.approx(q, rel=1e-6)
    assert found.chi == pytest.approx(factor * m.mean_square_slope(activation, q), rel=1e-6)


def test_fixed_points_at_the_ends() -> None:
    assert m.fixed_point("tanh") == m.FixedPoint(0.0, pytest.approx(1.0))
    assert m.fixed_point("relu", 1.9) == m.FixedPoint(0.0, pytest.approx(0.95))
    assert m.fixed_point("relu", 2.0, start=3.0) == m.FixedPoint(3.0, pytest.approx(1.0))
    assert m.fixed_point("relu", 2.1).variance == math.inf
    assert math.isnan(m.fixed_point("elu", 2.0).chi)
    for start in (1e-3, 1.0, 1e3):
        assert m.fixed_point("tanh", 2.0, start=start).variance == pytest.approx(0.61796477, rel=1e-7)


# -- errors --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda: m.expectation("tanh", -1.0), "variance is -1.0"),
        (lambda: m.expectation("tanh", math.nan), "variance is nan"),
        (lambda: m.expectation("tan"), "did you mean 'tanh'"),
        (lambda: m.expectation(lambda x: x.sum()), "elementwise"),
        (lambda: m.recursion("tanh", 0), "depth is 0"),
        (lambda: m.recursion("tanh", 3, forward=[1.0, 2.0]), "3 of them"),
        (lambda: m.recursion("tanh", 3, bias=-1.0), "bias is -1.0"),
        (lambda: m.fixed_point("tanh", start=0.0), "start is 0.0"),
        (lambda: m.preserving_gain(lambda x: 0 * x), "keeps nothing"),
    ],
)
def test_errors(call, told: str) -> None:
    with pytest.raises(LosslabError, match=told):
        call()
