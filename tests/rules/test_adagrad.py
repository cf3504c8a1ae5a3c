"""AdaGrad's theory: the regret bounds of both forms, and the l1 step as the argmin it stands for."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from losslab.rules import AdaGrad

T, P = 400, 6


def sequence(kind: str, seed: int) -> np.ndarray:
    """Gradients ``[T, P]`` of linear losses, the hardest for a regret bound."""
    rng = np.random.default_rng(seed)
    g = rng.standard_normal((T, P))
    if kind == "sparse":
        g *= rng.random((T, P)) < np.linspace(0.01, 1.0, P)
    if kind == "drifting":
        g += 2 * np.sin(np.linspace(0, 3, T))[:, None] * np.linspace(-1, 1, P)
    return g


def play(rule: AdaGrad, kind: str, seed: int) -> tuple[float, np.ndarray]:
    """Regret against the best point of the box in hindsight, and every gradient met."""
    gradients = sequence(kind, seed)
    x = {"x": torch.zeros(1, P, dtype=torch.float64)}
    state, paid, met = rule.init(x), 0.0, []
    for t in range(T):
        at = x["x"][0].numpy()
        g = np.where(at >= 0, 1.0, -1.0) * abs(gradients[t]) if kind == "adversarial" else gradients[t]
        paid += g @ at
        met.append(g)
        x, state = rule.update({"x": torch.from_numpy(g)[None]}, state, x, t)
    return paid + abs(np.sum(met, axis=0)).sum(), np.array(met)


@pytest.mark.parametrize("kind", ["gaussian", "sparse", "drifting", "adversarial"])
@pytest.mark.parametrize("seed", [0, 1])
def test_regret_of_mirror_descent_is_within_the_bound(kind: str, seed: int) -> None:
    diameter = 2.0  # largest |x_t - x*| in a coordinate of the box |x| <= 1
    regret, met = play(AdaGrad(lr=diameter / 2**0.5, box=1.0), kind, seed)
    bound = 2**0.5 * diameter * np.sqrt((met**2).sum(0)).sum()
    assert 0.01 * bound < regret <= bound


@pytest.mark.parametrize("kind", ["gaussian", "sparse", "drifting", "adversarial"])
@pytest.mark.parametrize("lr", [0.3, 1.0])
def test_regret_of_dual_averaging_is_within_the_bound(kind: str, lr: float) -> None:
    delta = float(abs(sequence(kind, 0)).max())
    regret, met = play(AdaGrad(lr=lr, eps=delta, box=1.0, variant="dual"), kind, 0)
    norms = np.sqrt((met**2).sum(0)).sum()
    bound = delta / lr * P + norms / lr + lr * norms  # |x*|_2^2 = P and |x*|_inf = 1 at a corner of the box
    assert 0.01 * bound < regret <= bound


def test_the_bound_can_be_broken() -> None:
    regret, met = play(AdaGrad(lr=1e-4, box=1.0), "drifting", 0)
    assert regret > 2**0.5 * 2.0 * np.sqrt((met**2).sum(0)).sum()


numbers = st.floats(-3, 3, allow_nan=False)
positive = st.floats(0.05, 2)


@settings(max_examples=40, deadline=None)
@given(
    start=numbers,
    gradients=st.lists(numbers.filter(lambda g: abs(g) > 1e-3), min_size=1, max_size=4),
    lr=positive,
    l1=st.floats(0, 2),
    dual=st.booleans(),
)
def test_the_l1_step_is_the_argmin(
    start: float, gradients: list[float], lr: float, l1: float, dual: bool
) -> None:
    """Against a fine grid: the objective at our point is below that of every grid point."""
    eps = 0.1
    x = {"x": torch.tensor([[start]], dtype=torch.float64)}
    rule = AdaGrad(lr=lr, l1=l1, eps=eps, variant="dual" if dual else "mirror")
    state = rule.init(x)
    for t, g in enumerate(gradients, 1):
        before = x["x"].item()
        x, state = rule.update({"x": torch.tensor([[g]], dtype=torch.float64)}, state, x, t - 1)
        h = eps + np.sqrt(np.sum(np.square(gradients[:t])))

        def objective(
            u: np.ndarray | float, t: int = t, g: float = g, h: float = h, before: float = before
        ) -> np.ndarray:
            if dual:
                mean = np.mean(gradients[:t])
                return lr * (mean * u + l1 * np.abs(u)) + h * np.square(u - start) / (2 * t)
            return lr * (g * u + l1 * np.abs(u)) + h * np.square(u - before) / 2

        at = x["x"].item()
        grid = np.concatenate([np.linspace(at - 2, at + 2, 4001), [0.0]])
        assert objective(at) <= objective(grid).min() + 1e-12


def test_l1_makes_weights_exactly_zero() -> None:
    x = {"x": torch.tensor([[0.05, 1.0], [0.05, 1.0]])}
    rule = AdaGrad(lr=0.1, l1=[1.0, 0.0])
    new, _ = rule.update({"x": torch.ones(2, 2)}, rule.init(x), x, 0)
    np.testing.assert_allclose(new["x"], [[0.0, 0.8], [-0.05, 0.9]], atol=1e-6)
    assert new["x"][0, 0] == 0.0


def test_dual_averaging_is_centred_at_the_start() -> None:
    x = {"x": torch.tensor([[5.0]], dtype=torch.float64)}
    rule = AdaGrad(lr=1.0, eps=0.0, variant="dual")
    state = rule.init(x)
    for step, expected in enumerate([4.0, 5.0 - 2 / 2**0.5]):
        x, state = rule.update({"x": torch.ones(1, 1, dtype=torch.float64)}, state, x, step)
        assert x["x"].item() == pytest.approx(expected)
