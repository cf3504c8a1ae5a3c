"""The closed forms of escape, and the driver of rules, against brute force."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from losslab.lecture.section_6_2.motion import (
    deviation,
    escaped,
    first_passage,
    gradient_of,
    growth_time,
    mean_escape,
    walk,
)
from losslab.lecture.section_6_2.noise_floor import expected_excess, problem
from losslab.rules import GD, SGD, Momentum


@given(st.integers(0, 40), st.floats(0.01, 0.5), st.floats(0.1, 2.0), st.floats(1e-3, 1.0))
def test_deviation_solves_the_recursion(steps: int, rate: float, curvature: float, noise: float) -> None:
    variance = 0.0
    for _ in range(steps):
        variance = (1 + rate * curvature) ** 2 * variance + (rate * noise) ** 2
    found = deviation(np.array([float(steps)]), rate, 1 + rate * curvature, noise)
    assert found[0] == pytest.approx(variance**0.5, rel=1e-9)


@given(st.integers(0, 30), st.floats(0.01, 1.9), st.floats(-3, 3))
def test_expected_excess_solves_the_recursion(steps: int, rate: float, start: float) -> None:
    values = np.array([0.01, 0.3, 1.0])
    second = np.full(3, start**2)
    for _ in range(steps):
        second = (1 - rate * values) ** 2 * second + rate**2
    found = expected_excess(values, rate, np.full(3, start), np.array([steps]))
    assert found[0] == pytest.approx(float((values * second).sum() / 2), rel=1e-9)


def test_escape_is_what_many_noisy_runs_do() -> None:
    start = torch.zeros(4000, 1, dtype=torch.float64)
    points = walk(SGD(lr=0.2), lambda y: -y, start, 80, noise=0.01, seed=1)
    steps = first_passage(points, lambda y: y[:, 0].abs() >= 1)
    assert steps.mean() == pytest.approx(mean_escape(0.2, 1.0, 0.01, 1.0), rel=0.02)
    for t in (25, 30, 40):
        share = escaped(np.array([float(t)]), 0.2, 1.0, 0.01, 1.0)[0]
        assert (steps <= t).mean() == pytest.approx(share, abs=0.03)


def test_walk_is_the_rule_on_the_function() -> None:
    bowl = problem()
    start = torch.randn(3, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    points = list(walk(Momentum(lr=0.1), gradient_of(bowl.f), start, 5))
    leaf = start.clone().requires_grad_()
    optimizer = torch.optim.SGD([leaf], lr=0.1, momentum=0.9)
    for point in points:
        assert torch.allclose(point, leaf, rtol=1e-12)
        optimizer.zero_grad()
        bowl.f(leaf).sum().backward()
        optimizer.step()


def test_noise_is_drawn_from_its_seed_and_only_where_asked() -> None:
    start, level = torch.zeros(2, 1), torch.tensor([[0.0], [1.0]])
    once, again, other = (
        list(walk(GD(lr=1.0), torch.zeros_like, start, 3, level, seed))[-1] for seed in (0, 0, 1)
    )
    assert once[0] == 0
    assert once[1] == again[1] != other[1]


def test_growth_time_counts_doublings() -> None:
    assert growth_time(1024, 2) == pytest.approx(10)
