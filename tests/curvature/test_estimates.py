"""Trace, diagonal, density, condition and layers: exact where they can be, and intervals that hold."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from tests.curvature.spectra import SPECTRA, rotated
from tests.engine.cases import NAMED
from tests.engine.test_objective import modules_of, task_of

from losslab.curvature import (
    EmpiricalFisher,
    GaussNewton,
    Hessian,
    by_layer,
    condition,
    density,
    diagonal,
    stability_sentence,
    trace,
)
from losslab.engine import Objective, Points
from losslab.errors import LosslabError
from losslab.tasks import supervised

DRAWS = 200


def draws(count: int = DRAWS):
    return [torch.Generator().manual_seed(seed) for seed in range(count)]


def coverage(estimates, truth: float) -> float:
    return sum(bool(e.low <= truth <= e.high) for e in estimates) / len(estimates)


def network(name: str = "mlp-tanh"):
    case = NAMED[name]
    points = Points.from_modules(modules_of(case, 1))
    return Hessian(Objective(task_of(case), chunk=5), points)


# 200 intervals at 95 %: 190 on average, fewer than 180 once in a thousand times.
@pytest.mark.parametrize("name", ["outliers", "nine-fold", "spread", "negative"])
@pytest.mark.parametrize(("method", "products"), [("hutchinson", 12), ("hutch++", 36)])
def test_the_interval_of_the_trace_holds(name, method, products):
    matrix = rotated(SPECTRA[name])
    found = [trace(matrix, products, method, generator=g) for g in draws()]
    assert coverage(found, float(SPECTRA[name].double().sum())) >= 0.9
    values = torch.stack([e.value for e in found])
    standard_error = values.std() / math.sqrt(len(values))
    assert abs(values.mean() - SPECTRA[name].double().sum()) <= 4 * standard_error


def test_hutch_plus_plus_beats_hutchinson_where_few_eigenvalues_count():
    matrix = rotated(SPECTRA["outliers"])
    errors = [
        torch.stack([trace(matrix, 36, m, generator=g).value for g in draws(50)]).std()
        for m in ("hutchinson", "hutch++")
    ]
    assert errors[1] < errors[0] / 10


def test_the_interval_of_the_diagonal_holds():
    matrix = rotated(SPECTRA["outliers"])
    found = [diagonal(matrix, 12, generator=g) for g in draws(40)]
    inside = torch.stack([(e.low <= matrix.diagonal()) & (matrix.diagonal() <= e.high) for e in found])
    assert inside.double().mean() >= 0.93


def test_with_products_enough_they_are_exact():
    matrix = rotated(SPECTRA["tiny"])
    assert trace(matrix, 3).products == 3
    torch.testing.assert_close(trace(matrix, 3).value, matrix.trace())
    torch.testing.assert_close(diagonal(matrix, 3).value, matrix.diagonal())
    found = trace(rotated(SPECTRA["identity"]), 9)
    assert float(found.low) == pytest.approx(60.0) == float(found.high)


def test_of_networks():
    hessian = network()
    dense = hessian.dense()
    torch.testing.assert_close(trace(hessian, 10**6).value, dense.trace())
    torch.testing.assert_close(diagonal(hessian, 10**6).value, dense.diagonal())
    found = trace(hessian, 30)
    assert found.low <= dense.trace() <= found.high


def test_points_in_a_stack():
    rows = torch.stack([rotated(SPECTRA["outliers"]), rotated(SPECTRA["spread"].repeat(2)[:300], 1)])
    for estimate in (lambda m: trace(m, 30), lambda m: trace(m, 9, "hutchinson"), lambda m: diagonal(m, 5)):
        together = estimate(rows)
        for i in range(2):
            alone = estimate(rows[i])
            torch.testing.assert_close(together.value[i], alone.value)
            torch.testing.assert_close(together.high[i], alone.high)
    both = density(rows, 3, 10)
    torch.testing.assert_close(both.nodes[1], density(rows[1], 3, 10).nodes)
    grid = torch.linspace(-2, 10, 50, dtype=torch.float64)
    torch.testing.assert_close(both(grid, 0.2)[1].value[0], density(rows[0], 3, 10)(grid, 0.2)[1].value)


# -- the density ------------------------------------------------------------------------------------------


def smoothed(values, grid, width):
    z = (grid[:, None] - values.double()[None]) / width
    return torch.exp(-0.5 * z.square()).mean(1) / (width * math.sqrt(2 * math.pi))


@pytest.mark.parametrize("name", ["spread", "nine-fold", "outliers"])
def test_the_density_is_that_of_the_eigenvalues(name):
    values = SPECTRA[name]
    found = density(rotated(values), probes=20, steps=60)
    width = 0.05 * float(values.max() - values.min())
    grid, curve = found(width=width)
    step = grid[1] - grid[0]
    assert float(curve.value.sum() * step) == pytest.approx(1.0, abs=5e-3)
    truth = smoothed(values, grid, width)
    assert (curve.value - truth).abs().max() < 0.12 * truth.max()
    assert (curve.low >= 0).all()


def test_the_intervals_of_the_density_hold():
    values = SPECTRA["spread"]
    matrix = rotated(values)
    grid = torch.linspace(-0.9, 0.9, 15, dtype=torch.float64)
    truth = smoothed(values, grid, 0.1)
    inside, shares, means = [], [], []
    for g in draws(60):
        found = density(matrix, 5, 30, generator=g)
        curve = found(grid, 0.1)[1]
        inside.append((curve.low <= truth) & (truth <= curve.high))
        shares.append(found.share(0.0))
        means.append(found.moment(2))
    assert 0.9 <= torch.stack(inside).double().mean() <= 0.995
    assert coverage(shares, 0.5) >= 0.85
    assert coverage(means, float(values.double().square().mean())) >= 0.85


def test_no_eigenvalue_appears_twice():
    values = torch.cat([torch.linspace(0, 0.1, 99), torch.tensor([5.0])])
    found = density(rotated(values), probes=2, steps=40)
    for nodes, weights in zip(found.nodes, found.weights, strict=True):
        assert ((nodes > 4).sum()) == 1
        assert float(weights[nodes > 4]) < 0.2
    assert float(found.share(4.0).value) == pytest.approx(0.01, abs=0.01)


def test_an_invariant_space_ends_a_chain():
    found = density(rotated(SPECTRA["identity"]), probes=2, steps=10)
    torch.testing.assert_close(found.weights.sum(1), torch.ones(2, dtype=torch.float64))
    assert float(found.share(0.99, 1.01).value) == pytest.approx(1.0)
    assert float(found.moment().value) == pytest.approx(1.0)


@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_the_scale_changes_the_axis_alone(scale):
    matrix = rotated(SPECTRA["nine-fold"], dtype=torch.float32)
    plain, scaled = density(matrix, 3, 25), density(scale * matrix, 3, 25)
    grid, curve = plain()
    torch.testing.assert_close(
        scaled(scale * grid)[1].value * scale, curve.value, rtol=1e-2, atol=1e-3 * float(curve.value.max())
    )


# -- condition, stability, layers --------------------------------------------------------------------------


def test_condition_numbers():
    values = torch.logspace(0, 2, 60, dtype=torch.float64)
    found = condition(rotated(values))
    assert float(found.low) <= 100.0 <= float(found.high)
    assert float(found.value) == pytest.approx(100.0, rel=1e-4)
    semidefinite = condition(rotated(torch.cat([values, torch.zeros(3)])))
    assert math.isinf(float(semidefinite.high))
    assert float(semidefinite.low) > 1e3
    assert math.isinf(float(condition(rotated(SPECTRA["outliers"])).value))


def test_what_a_learning_rate_means():
    assert stability_sentence(0.1, 64.5) == (
        "learning rate 0.1 is 3.2 times the stability limit 2/lambda_max = 0.03101"
    )
    assert "too near" in stability_sentence(0.1, 20.1, 0.5)
    assert "too near" not in stability_sentence(0.1, 30.0, 0.5)
    assert "no direction curves upwards" in stability_sentence(0.1, -1.0)


def test_the_table_of_layers():
    hessian = network("bn1d")
    table = by_layer(hessian, tol=1e-6)
    assert table.layer.tolist() == list(hessian.names)
    for row in table.itertuples():
        dense = hessian.restrict(row.layer).dense()
        values = torch.linalg.eigvalsh(dense)
        scale = float(values.abs().max()) or 1.0
        assert row.parameters == len(dense)
        assert row.largest == pytest.approx(float(values[-1]), abs=1e-4 * scale)
        assert row.smallest == pytest.approx(float(values[0]), abs=1e-4 * scale)
        assert row.converged
        assert row.trace_low - 1e-9 <= row.trace <= row.trace_high + 1e-9


def test_any_kind_of_matrix():
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(30, 4, generator=g).double(), torch.randint(3, (30,), generator=g)
    module = torch.nn.Linear(4, 3).double()
    task = supervised(lambda: copy.deepcopy(module), (x, y))
    points = Points.from_modules([module])
    for kind in (Hessian, GaussNewton, EmpiricalFisher):
        matrix = kind(Objective(task, chunk=7), points)
        dense = matrix.dense()
        torch.testing.assert_close(trace(matrix, 15).value, dense.trace())
        found = density(matrix, 8, 15)
        assert float(found.moment().value) * 15 == pytest.approx(float(dense.trace()), rel=0.5)


BAD = [
    (lambda m: trace(m, 3), "probes is 1"),
    (lambda m: trace(m, 30, "guess"), "no way to a trace is named 'guess'"),
    (lambda m: trace(m, 1, "hutchinson"), "needs at least 2"),
    (lambda m: diagonal(m, 1), "needs at least 2"),
    (lambda m: diagonal(m, 5, level=1.0), "between 0 and 1"),
    (lambda m: density(m, 1), "needs at least 2"),
    (lambda m: density(m, 2, 0), "at least one"),
    (lambda m: density(m)(width=0.0), "positive number"),
    (lambda m: density(torch.nan * m), "not finite"),
]


@pytest.mark.parametrize(("use", "told"), BAD)
def test_mistakes_are_told(use, told):
    with pytest.raises(LosslabError, match=told):
        use(rotated(SPECTRA["identity"]))
