"""Least squares as a quadratic: against numpy's solution and against its own spectrum."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from losslab.lecture.section_6_4.regression import Regressions, steps_to


def problem(seed, members=3, n=40, d=4, k=2, constant=False):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((members, n, d)) * 10 ** rng.uniform(
        -1, 1, (members, 1, d)
    ) + rng.standard_normal(d)
    if constant:
        x[:, :, 0] = 0.0
    y = rng.standard_normal((members, n, k))
    return torch.from_numpy(x), torch.from_numpy(y)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("constant", [False, True])
def test_optimum_and_condition_are_those_of_numpy(seed, constant):
    x, y = problem(seed, d=2 + seed, k=1 + seed % 3, constant=constant)
    found = Regressions.of(list(x), list(y))
    for i in range(len(x)):
        u = np.concatenate([x[i].numpy(), np.ones((len(x[i]), 1))], axis=1)
        singular = np.linalg.svd(u / len(u) ** 0.5, compute_uv=False)
        singular = singular[singular > 1e-6 * singular[0]]
        assert len(singular) == u.shape[1] - constant
        assert float(found.condition[i]) == pytest.approx((singular[0] / singular[-1]) ** 2, rel=1e-9)
        assert np.allclose(found.optimum[i], np.linalg.lstsq(u, y[i].numpy(), rcond=None)[0], atol=1e-9)


def test_without_a_bias_the_hessian_is_the_second_moment():
    x, y = problem(0)
    found = Regressions.of(list(x), list(y), bias=False)
    assert torch.allclose(found.hessian[1], x[1].T @ x[1] / len(x[1]), rtol=1e-12)


@pytest.mark.parametrize("seed", range(4))
def test_descent_is_that_of_the_loss_itself(seed):
    x, y = problem(seed)
    found = Regressions.of(list(x), list(y))
    scale = torch.tensor([0.5, 1.0, 1.9], dtype=torch.float64)
    path = found.descend(7, scale)
    for i in range(3):
        u = torch.cat([x[i], torch.ones(len(x[i]), 1, dtype=torch.float64)], dim=1)

        def loss(w, u=u, i=i):
            return (u @ w - y[i]).square().sum(1).mean() / 2

        floor = loss(found.optimum[i])
        w = torch.zeros(u.shape[1], y.shape[2], dtype=torch.float64)
        start = loss(w) - floor
        for step in range(8):
            assert float((loss(w) - floor) / start) == pytest.approx(float(path[step, i]), abs=1e-9)
            w.requires_grad_()
            (gradient,) = torch.autograd.grad(loss(w), w)
            w = w.detach() - scale[i] / found.largest[i] * gradient


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("target", [0.3, 0.01])
def test_the_spectrum_predicts_the_steps(seed, target):
    x, y = problem(seed, members=4, constant=seed % 2 == 1)
    found = Regressions.of(list(x), list(y))
    predicted = found.predicted(target)
    counted = steps_to(found.descend(int(predicted.max()) + 1), target)
    assert torch.equal(counted, predicted)


@pytest.mark.parametrize("seed", range(3))
def test_the_slowest_start_takes_the_time_of_the_condition_number(seed):
    x, y = problem(seed, constant=seed == 1)
    worst = Regressions.of(list(x), list(y)).slowest()
    expected = torch.ceil(np.log(1e-2) / (2 * torch.log1p(-1 / worst.condition)))
    assert torch.equal(worst.predicted(1e-2), expected)


def test_steps_to_counts_the_first_arrival():
    curves = torch.tensor([[1.0, 0.1, 1.0], [0.5, 0.3, 1.0], [0.1, 0.1, 1.0]])
    assert steps_to(curves, 0.2).tolist() == [2.0, 0.0, float("inf")]
